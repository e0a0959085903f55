"""A norm of a user's own, a class and `register_norm`, does all that the package's norms do; nothing there names it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import FAMILIES, STOCK_NORM, shake, tokens
from transformers import AutoModelForCausalLM

from hf_ibnorm import (
    NORMS,
    apply_norm,
    convert_checkpoint,
    norm_sites,
    register_norm,
    restore_norm,
    set_lam,
    swapped_norms,
)
from hf_ibnorm.analysis import watch
from hf_ibnorm.norms import norm_name

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests/own_norm.py"


@pytest.fixture(autouse=True)
def tempered():
    import own_norm

    register_norm("tempered", own_norm.Tempered)
    yield own_norm.Tempered
    del NORMS["tempered"]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens()).logits


def test_it_is_chosen_in_a_config_and_its_overrides_and_comes_back_to_the_bit(tiny_config, family, tmp_path):
    sites = {"llama": "layers.0.*", "gpt2": "h.0.*"}
    config = tiny_config(family, norm_overrides=[[sites[family], {"type": "Tempered", "kwargs": {"temper": 3}}]])
    model = shake(AutoModelForCausalLM.from_config(config))
    assert [norm.ramped for norm in norm_sites(model).values() if type(norm).__name__ == "Tempered"] == [3.0, 3.0]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_it_is_applied_over_and_over_and_taken_back(stock_model, family):
    model = stock_model(family)
    before = logits(model)
    apply_norm(model, "tempered")
    apply_norm(model, "tempered", temper=2.0, hush=0.5)
    assert model.config.norm_kwargs["hush"] == 0.5
    inside = logits(model)
    with swapped_norms(model, "layernorm"):
        assert not torch.equal(logits(model), inside)
    assert torch.equal(logits(model), inside)
    with pytest.raises(ValueError, match="has no IBNorm"):
        set_lam(model, 2.0)
    restore_norm(model)
    assert torch.equal(logits(model), before)


def test_what_it_learned_is_named_where_it_is_lost(stock_model, family, tmp_path):
    model = shake(apply_norm(stock_model(family), "tempered"))
    model.save_pretrained(tmp_path / "own")
    record = convert_checkpoint(tmp_path / "own", tmp_path / "stock", STOCK_NORM[family])
    assert "kappa" in {name.rpartition(".")[2] for name in record["lost"]}
    with pytest.warns(UserWarning, match=r"kappa"):
        restore_norm(model)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")), logits(model), atol=1e-6)


def test_it_is_converted_there_and_back(source, family, tmp_path):
    convert_checkpoint(source(family), tmp_path / "own", "tempered")
    convert_checkpoint(tmp_path / "own", tmp_path / "back", STOCK_NORM[family])
    there, back = (logits(AutoModelForCausalLM.from_pretrained(each)) for each in (source(family), tmp_path / "back"))
    assert torch.equal(there, back)


def test_its_diagnostics_stand_beside_the_others(stock_model):
    model = apply_norm(apply_norm(stock_model("llama"), "tempered"), "ibnorm_l", sites="norm")
    with watch(model) as statistics:
        model(torch.cat([tokens(seed) for seed in range(4)]))
    sites = statistics.result()
    own, ibnorm = sites["model.layers.0.input_layernorm"], sites["model.norm"]
    assert 0 < own["loud"] < 1
    assert own["reasons"]["contraction"] == "only an IBNorm has one"
    assert ibnorm["loud"] is None
    assert ibnorm["reasons"]["loud"] == "only a Tempered has one"


def test_a_checkpoint_of_a_norm_that_nobody_registered_says_so_in_a_line(stock_model, tmp_path):
    apply_norm(stock_model("llama"), "tempered").save_pretrained(tmp_path)
    load = f"import hf_ibnorm, transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert "unknown norm 'tempered'" in (last := done.stderr.strip().splitlines()[-1])
    assert "register_norm" in last
    environment = {**os.environ, "HF_IBNORM_NORMS": str(FILE)}
    assert subprocess.run([sys.executable, "-c", load], env=environment).returncode == 0


def test_a_file_of_norms_that_is_not_there_is_one_line():
    environment = {**os.environ, "HF_IBNORM_NORMS": "/no/such.py"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_ibnorm.cli", "env"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: HF_IBNORM_NORMS: got '/no/such.py', no such file\n")


@pytest.mark.parametrize(
    ("name", "cls", "message"),
    [
        ("Own", None, r"name: got 'Own', must be lower-case"),
        ("ibnorml", None, r"name: got 'ibnorml', which is taken by IBNorm"),
        ("layernorm", None, r"name: got 'layernorm', which is taken by LayerNorm"),
        ("own", torch.nn.LayerNorm, r"cls: got .*LayerNorm.*, must be a subclass of hf_ibnorm\.NormBase"),
    ],
)
def test_a_name_or_a_class_that_cannot_be_taken_is_refused(tempered, name, cls, message):
    with pytest.raises((ValueError, TypeError), match=message):
        register_norm(name, cls or tempered)
    assert norm_name("tempered") == "tempered"


def test_an_option_without_a_default_is_refused(tempered):
    class Odd(tempered):
        def __init__(self, normalized_shape, strength, device=None, dtype=None):
            super().__init__(normalized_shape)

    with pytest.raises(TypeError, match="cls: Odd has no default for strength"):
        register_norm("odd", Odd)


@pytest.mark.slow
def test_a_study_of_it_ends_in_a_page(tmp_path):
    study = {
        "about": "A norm of one's own.",
        "recipe": "tiny",
        "set": {"max_steps": 4, "warmup_steps": 1, "log_with": []},
        "norms": ["rmsnorm", {"name": "tempered", "norm": "tempered", "kwargs": {"hush": 0.1}}],
        "baseline": "rmsnorm",
        "learning_rates": [1.0e-3],
        "tuning_seeds": [0],
        "seeds": [0, 1],
        "metric": "eval_loss",
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(study))
    environment = {**os.environ, "HF_IBNORM_NORMS": str(FILE), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "eval", "study", "run", "own.yaml"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tempered" in next(tmp_path.rglob("report.md")).read_text()


KINDS = {"IBNorm", "LayerNormalNorm", "DynamicTanh", "LayerNorm", "RMSNorm", "LlamaRMSNorm"}
OPTIONS = {"lam", "theta", "learn_lam", "variant", "standardize", "init_alpha", "keep_prob", "noise_mode", "alpha"}
OWN = ("norms_ibnorm.py", "norms_normality.py", "norms_classic.py", "norms.py", "functional.py", "kernels/")


def decisions(tree):
    """Places of a module that ask for the class of a norm, or for an option or parameter of one by its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            named = {getattr(each, "id", getattr(each, "attr", "")) for each in ast.walk(node.args[1])}
            yield from ((node.lineno, name) for name in named & KINDS)
        elif isinstance(node, ast.Attribute) and node.attr in OPTIONS - {"variant", "alpha"}:
            yield node.lineno, f".{node.attr}"
        elif isinstance(node, ast.Subscript) and getattr(node.slice, "value", None) in OPTIONS:
            yield node.lineno, f"[{node.slice.value}]"
        elif isinstance(node, ast.Compare):
            named = {
                each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)
            }
            yield from ((node.lineno, name) for name in named & OPTIONS)


def test_nothing_in_the_package_decides_by_what_kind_of_norm_it_has():
    found = []
    for file in (file for package in ("hf_ibnorm", "train_lm", "eval") for file in (ROOT / package).rglob("*.py")):
        place = str(file.relative_to(ROOT))
        if not any(own in place for own in OWN):
            found += [f"{place}:{line}: {what}" for line, what in decisions(ast.parse(file.read_text()))]
    allowed = ("eval/study/", "hf_ibnorm/swap/optim.py")  # searches, `set_lam`
    assert [each for each in found if not each.startswith(allowed)] == []
