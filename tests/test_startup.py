"""What is imported when: commands answer before they load torch, and the Auto classes know our models in any order."""

import ast
import importlib
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from helpers import FAMILIES, tokens
from transformers import AutoModelForCausalLM

import hf_ibnorm
from hf_ibnorm.base import lazy
from hf_ibnorm.swap.families import FAMILIES as REGISTERED

pytestmark = pytest.mark.oldest

LAZY_PACKAGES = ("hf_ibnorm", "hf_ibnorm.analysis", "hf_ibnorm.convert", "hf_ibnorm.kernels")


def fresh(*words, **options):
    """A process of its own that nothing has been imported into."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)


def run(code, *words):
    done = fresh("-c", textwrap.dedent(code), *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("hf_ibnorm.cli --help", 0, "usage: hf-ibnorm"),
        ("hf_ibnorm.cli convert --help", 0, "--norm_kwargs.NAME VALUE"),
        ("hf_ibnorm.cli analyze --model x --output y --tokns 9", 2, "did you mean '--tokens'"),
        ("hf_ibnorm.report --help", 0, "usage: hf_ibnorm.report"),
        ("train_lm --help", 0, "--model.norm_type"),
        ("train_lm --max_step 3", 2, "did you mean 'max_steps'"),
        ("train_lm --config dmeo", 2, "did you mean 'demo'"),
        ("train_lm --config tiny --run_dir x --max_steps -1", 2, "max_steps: got -1"),
        ("train_lm.plan --help", 0, "usage: train_lm.plan"),
        ("train_lm.plot --help", 0, "usage: train_lm.plot"),
        ("train_lm.push --help", 0, "usage: train_lm.push"),
        ("eval --help", 0, "usage: eval"),
        ("eval run --model x --suite v1 --output y --limt 3", 2, "did you mean '--limit'"),
        ("eval study run quikc", 2, "did you mean 'quick'"),
        ("eval suites", 0, "austen_test"),
    ],
)
def test_commands_answer_without_torch_and_transformers(words, code, said):
    done = fresh("-X", "importtime", "-m", *words.split())
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    told = done.stdout + "".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    assert (done.returncode, said in told) == (code, True), told
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "numpy", "lm_eval", "datasets", "matplotlib.pyplot"}


def test_importing_the_package_imports_neither_torch_nor_transformers():
    assert run("import hf_ibnorm, sys; print({'torch', 'transformers'} & set(sys.modules))") == "set()\n"


def test_env_tells_of_the_kernels_without_importing_a_model():
    code = """
        import sys
        from hf_ibnorm.cli import main
        sys.argv = ["hf-ibnorm", "env"]
        try:
            main()
        finally:
            print(*{"torch._dynamo", "transformers"} & set(sys.modules))
    """
    assert run(code).splitlines()[-1] == ""


@pytest.mark.parametrize("package", LAZY_PACKAGES)
def test_names_on_demand_are_those_that_type_checkers_see(package):
    module = importlib.import_module(package)
    (checked,) = [
        node
        for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    names = {name for node in checked.body for name in (alias.asname for alias in node.names)}
    for node in checked.body:
        home = importlib.import_module(f".{node.module}", package)
        for alias in node.names:
            assert alias.asname == alias.name
            assert getattr(module, alias.name) is getattr(home, alias.name)
    assert names <= set(dir(module))
    assert set(module._HOMES) == {node.module for node in checked.body}
    assert {name for each in module._HOMES.values() for name in each} == names
    assert sorted(getattr(module, "__all__", names)) == sorted(names)


def test_a_name_that_the_package_has_not_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hf_ibnorm' has no attribute 'apply_nrom'"):
        hf_ibnorm.apply_nrom  # noqa: B018
    assert not hasattr(hf_ibnorm, "__wrapped__")
    with pytest.raises(ImportError, match="apply_nrom"):
        exec("from hf_ibnorm import apply_nrom")


def test_modules_are_attributes_of_the_package():
    assert run("import hf_ibnorm; print(hf_ibnorm.functional.ib_norm.__name__, hf_ibnorm.kernels.__name__)") == (
        "ib_norm hf_ibnorm.kernels\n"
    )


LOADED = """
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is hf_ibnorm.IBNormLlamaForCausalLM, type(model)
    assert type(config) is type(model.config) is hf_ibnorm.IBNormLlamaConfig
    assert type(AutoModel.from_config(config)) is hf_ibnorm.IBNormLlamaModel
    classifier = AutoModelForSequenceClassification.from_config(config)
    assert type(classifier) is hf_ibnorm.IBNormLlamaForSequenceClassification
"""
AUTO = "AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification"
ORDERS = {
    "the package first": f"""
        import pickle
        with open(folder + "/config.pkl", "rb") as file:
            unpickled = pickle.load(file)  # which imports the package
        from transformers import {AUTO}
        import hf_ibnorm
        assert type(AutoModelForCausalLM.from_config(unpickled)) is hf_ibnorm.IBNormGPT2LMHeadModel
    """,
    "a part of Transformers first": f"""
        from transformers import AutoConfig
        import hf_ibnorm
        from transformers import {AUTO}
    """,
    "both at once": f"""
        import importlib, threading
        names = ["hf_ibnorm", *["transformers.models.auto." + each for each in ("modeling_auto", "configuration_auto")]]
        start = threading.Barrier(6)
        def work(name):
            start.wait()
            importlib.import_module(name)
        threads = [threading.Thread(target=work, args=(name,)) for name in names * 2]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        import hf_ibnorm
        from transformers import {AUTO}
    """,
    "a class of the checkpoint's own code first": f"""
        from transformers import {AUTO}
        remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(remote).__module__.startswith("transformers_modules.")
        import hf_ibnorm
        assert type(AutoModelForCausalLM.from_config(remote.config, trust_remote_code=True)) is type(remote)
    """,
}


@pytest.mark.parametrize(
    "order", [pytest.param(each, marks=[pytest.mark.slow] * (i > 1)) for i, each in enumerate(ORDERS)]
)
def test_auto_classes_know_the_models_in_whatever_order_they_are_imported(order, tiny_config, tmp_path, monkeypatch):
    from hf_ibnorm.swap.remote_code import add_remote_code

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    add_remote_code(tmp_path)
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(tiny_config("gpt2")))
    run("import sys; folder = sys.argv[1]\n" + textwrap.dedent(ORDERS[order]) + textwrap.dedent(LOADED), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_of_names_hold_ours_for_what_chooses_by_them(family, tiny_config):
    from transformers.models.auto import modeling_auto

    (entry,) = (each for each in REGISTERED if each.stock_model_type == family)
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[entry.model_type] == entry.causal_lm.__name__
    assert entry.causal_lm in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.values()
    assert entry.config in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    copy = pickle.loads(pickle.dumps(model))
    assert copy(tokens()).logits.equal(model(tokens()).logits)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package `slow_library` whose module `tables` takes a while to import."""
    folder = tmp_path / "slow_library"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "tables.py").write_text("import time\ntime.sleep(0.1)\nNAMES = ['stock']\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    yield
    for name in ("slow_library.tables", "slow_library"):
        sys.modules.pop(name, None)


def add_ours(module):
    if "ours" not in module.NAMES:
        module.NAMES.append("ours")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("before", [(), ("slow_library",), ("slow_library", "slow_library.tables")])
def test_a_function_sees_a_module_before_anybody_else_does(before):
    for name in before:
        importlib.import_module(name)
    lazy.after_import("slow_library", {"tables": add_ours})
    assert ("slow_library.tables" in sys.modules) == bool(before)
    seen = []

    def use():
        seen.append(list(importlib.import_module("slow_library.tables").NAMES))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["stock", "ours"]] * 4


@pytest.mark.usefixtures("library")
def test_a_function_sees_a_module_that_another_thread_is_importing():
    importer = threading.Thread(target=importlib.import_module, args=("slow_library.tables",))
    importer.start()
    while "slow_library.tables" not in sys.modules:
        pass
    lazy.after_import("slow_library", {"tables": add_ours})
    importer.join()
    assert sys.modules["slow_library.tables"].NAMES == ["stock", "ours"]
