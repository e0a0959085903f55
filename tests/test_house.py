"""The order of the house: which module may import which, found in the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("hf_ibnorm", "train_lm", "eval")


def modules():
    """Module → its file, of the three packages."""
    names = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = modules()


def imported(node, package):
    """Modules that an import statement inside of `package` names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
    home = ".".join([*above, *([node.module] if node.module else [])])
    return [f"{home}.{alias.name}" if f"{home}.{alias.name}" in MODULES else home for alias in node.names]


def imports(module):
    """What `module` imports of ours, anywhere in it but for type checkers alone."""
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found, nodes = set(), [ast.parse(file.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(name for name in imported(node, package) if name in MODULES)
        nodes += ast.iter_child_nodes(node)
    return found - {module}


GRAPH = {module: imports(module) for module in MODULES}


def circle(start):
    """Modules from one that imports `start` back to it, empty where none does."""
    seen, paths = set(), [[start]]
    while paths:
        path = paths.pop()
        for module in GRAPH[path[-1]]:
            if module == start:
                return [*path, start]
            if module not in seen:
                seen.add(module)
                paths.append([*path, module])
    return []


def test_the_graph_is_seen():
    assert "hf_ibnorm.functional" in GRAPH["hf_ibnorm.norms_ibnorm"]
    assert "eval.study.cli" in GRAPH["eval.__main__"]  # imported in a function


def test_no_module_imports_itself_by_a_detour():
    assert [found for module in sorted(MODULES) if (found := circle(module))] == []


@pytest.mark.parametrize(
    ("package", "others"), [("hf_ibnorm", ("train_lm", "eval")), ("train_lm", ("eval",)), ("eval", ("train_lm",))]
)
def test_no_program_imports_another_and_the_library_none(package, others):
    wrong = {m: [n for n in GRAPH[m] if n.split(".")[0] in others] for m in MODULES if m.split(".")[0] == package}
    assert not any(wrong.values()), wrong


def test_the_base_imports_nothing_of_ours():
    wrong = {m: [n for n in GRAPH[m] if not n.startswith("hf_ibnorm.base")] for m in MODULES if ".base" in m}
    assert {m: names for m, names in wrong.items() if names not in ([], ["hf_ibnorm.checks"])} == {}
    assert GRAPH["hf_ibnorm.checks"] == set()  # at the root, for it travels with checkpoints


def test_nobody_imports_the_command():
    commands = ("hf_ibnorm.cli", "train_lm.__main__", "eval.__main__")
    assert {m: list(names & set(commands)) for m, names in GRAPH.items() if names & set(commands)} == {}
