"""The package as a whole: which part may import which, what the wheel holds, and that it works elsewhere."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

import hf_ibnorm
from hf_ibnorm import functional

ROOT = Path(__file__).parents[1]


def imports(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module.split(".")[0]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("hf_ibnorm", {"train_lm", "eval"}), ("train_lm", {"eval"}), ("eval", {"train_lm"})],
)
def test_imports_point_down_only(package, forbidden):
    assert not forbidden & set(imports(package))


def test_public_names_are_the_documented_ones():
    assert sorted(hf_ibnorm.__all__) == [
        "DynamicTanh",
        "IBNorm",
        "IBNormGPT2Config",
        "IBNormGPT2DoubleHeadsModel",
        "IBNormGPT2ForQuestionAnswering",
        "IBNormGPT2ForSequenceClassification",
        "IBNormGPT2ForTokenClassification",
        "IBNormGPT2LMHeadModel",
        "IBNormGPT2Model",
        "IBNormLlamaConfig",
        "IBNormLlamaForCausalLM",
        "IBNormLlamaForQuestionAnswering",
        "IBNormLlamaForSequenceClassification",
        "IBNormLlamaForTokenClassification",
        "IBNormLlamaModel",
        "LayerNormalNorm",
        "Measure",
        "NORMS",
        "NormBase",
        "apply_norm",
        "build_norm",
        "convert_checkpoint",
        "describe_sites",
        "load_corpus",
        "no_decay_parameter_names",
        "norm_sites",
        "register_norm",
        "restore_norm",
        "set_lam",
        "swapped_norms",
    ]
    assert all(getattr(hf_ibnorm, name).__doc__ for name in hf_ibnorm.__all__)


REFERENCE = [
    *(value for name in hf_ibnorm.__all__ if inspect.isfunction(value := getattr(hf_ibnorm, name))),
    *(getattr(functional, name) for name in ("ib_norm", "compress", "normal_norm", "power_transform", "newton_lambda")),
    *(hf_ibnorm.IBNorm, hf_ibnorm.LayerNormalNorm, hf_ibnorm.DynamicTanh),
]


@pytest.mark.parametrize("documented", REFERENCE, ids=lambda each: each.__name__)
def test_docstrings_say_what_goes_in_and_what_comes_out(documented):
    text = inspect.getdoc(documented)
    for name in inspect.signature(documented).parameters:
        assert re.search(rf"^    [\w, *]*\b{name}\b[\w, *]*:", text, re.MULTILINE), name
    returns_nothing = documented in (hf_ibnorm.set_lam, hf_ibnorm.register_norm)
    assert returns_nothing or re.search("^(Returns|Yields|Shape):", text, re.MULTILINE)
    if documented.__module__.startswith(("hf_ibnorm.functional", "hf_ibnorm.norms")) and documented not in (
        hf_ibnorm.build_norm,
        hf_ibnorm.register_norm,
    ):
        assert "arXiv" in text


def test_using_the_library_loads_none_of_the_heavy_libraries():
    code = """
        import sys
        import transformers.models.llama.modeling_llama, transformers.models.gpt2.modeling_gpt2
        heavy = {"lm_eval", "datasets", "scipy", "matplotlib", "peft", "sklearn", "pandas"}
        stock = heavy & set(sys.modules)
        from hf_ibnorm import *
        from hf_ibnorm.analysis import *
        print(*stock, "|", *heavy & set(sys.modules) - stock)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    stock, _, ours = done.stdout.partition("|")
    assert set(stock.split()) <= {"scipy"}  # Transformers' losses import it where it is installed
    assert ours.split() == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out, tree = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("tree") / "copy"
    # From a copy: setuptools leaves build/ behind, and what lies there enters the next wheel.
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".venv", ".git", "demo", "runs", "build", "dist"))
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(tree)], check=True)
    return next(out.glob("*.whl"))


def test_a_commit_is_checked_by_what_make_lint_runs():
    (hooks,) = (repo["hooks"] for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"])
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert [hook["entry"] for hook in hooks] == [
        line.replace("$(PY)", "python").strip() for line in recipe.splitlines()
    ]


@pytest.mark.slow
def test_a_wheel_installed_in_an_empty_environment_works_from_another_folder(wheel, tmp_path):
    environment = tmp_path / "env"
    venv.create(environment, with_pip=True)
    bin_dir = environment / "bin"
    constraints = tmp_path / "constraints.txt"
    constraints.write_text((ROOT / "constraints.txt").read_text())
    # torch first and by its exact version, as `make setup` does: a looser requirement may bring another build of it.
    pins = [line for line in constraints.read_text().splitlines() if line.startswith("torch==")]
    subprocess.run([bin_dir / "pip", "install", "-q", *pins], check=True)
    subprocess.run([bin_dir / "pip", "install", "-q", "-c", constraints, f"{wheel}[train,eval]"], check=True)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(*command):
        done = subprocess.run(
            [bin_dir / command[0], *command[1:]], cwd=elsewhere, env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shipped = {name for name in ZipFile(wheel).namelist() if name.endswith(".yaml")}
    there = [path for part in ("train_lm", "eval") for path in (ROOT / part).rglob("*.yaml")]
    assert shipped == {str(path.relative_to(ROOT)) for path in there}
    where = run("python", "-c", "import hf_ibnorm; print(hf_ibnorm.__file__)")
    assert str(environment) in where
    for command in ("hf-ibnorm", "hf-ibnorm-train", "hf-ibnorm-eval"):
        assert "usage:" in run(command, "--help")
    for corpus in ("austen", "sotu"):
        run("python", "-c", f"import hf_ibnorm; assert hf_ibnorm.load_corpus({corpus!r}, 'test')")
    run("hf-ibnorm-train", "--config", "tiny", "--run_dir", "run")
    run(
        "hf-ibnorm-eval", "run", "--model", "run", "--suite", "embedded", "--batch_size", "64", "--output", "run/scores"
    )
    assert "austen_test" in (elsewhere / "run" / "scores" / "scores.md").read_text()
    assert "git_revision" in run("hf-ibnorm", "env", "--json")
    assert (next(environment.glob("lib/*/site-packages/hf_ibnorm")) / "py.typed").exists()
