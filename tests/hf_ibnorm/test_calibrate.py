"""Gains and biases fitted to what the old norms gave: the least squared error there is, and never worse than before."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import FAMILIES, FINAL, STOCK_NORM, build, shake
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ibnorm import apply_norm, convert_checkpoint, norm_sites
from hf_ibnorm.cli import main
from hf_ibnorm.convert.calibrate import Sums, fit_norms
from hf_ibnorm.convert.weights import INDEX
from hf_ibnorm.data.text import draw_text


def test_the_fit_is_that_of_a_least_squares_solver():
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(50, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    sums = Sums.of([(z[:20], y[:20]), (z[20:].view(3, 10, 3), y[20:].view(3, 10, 3))])
    gain, bias = sums.fit(torch.ones(3), with_bias=True)
    for channel in range(3):
        columns = torch.stack([z[:, channel], torch.ones(50, dtype=torch.float64)], 1)
        expected = np.linalg.lstsq(columns.numpy(), y[:, channel].numpy(), rcond=None)[0]
        np.testing.assert_allclose([gain[channel], bias[channel]], expected, rtol=1e-10)
    squares = (gain * z + bias - y).square().sum() / (y - y.mean(0)).square().sum()
    assert sums.error(gain, bias) == pytest.approx(squares.item(), rel=1e-10)
    alone, nothing = sums.fit(torch.ones(3), with_bias=False)
    assert not nothing.any()
    torch.testing.assert_close(alone, (z * y).sum(0) / (z * z).sum(0))


def test_a_channel_that_never_moves_keeps_its_gain_and_takes_the_mean():
    z, y = torch.full((9, 2), 3.0), torch.arange(18.0).view(9, 2)
    gain, bias = Sums.of([(z, y)]).fit(torch.tensor([2.0, 5.0]), with_bias=True)
    assert gain.tolist() == [2.0, 5.0]
    torch.testing.assert_close(gain * 3 + bias, y.double().mean(0))


def models(tiny_config, family, norm, **options):
    """A stock model with trained weights, and the config of the same with another norm."""
    stock = shake(build(tiny_config(family, norm_type=STOCK_NORM[family])))
    other = apply_norm(copy.deepcopy(stock), norm, **options)
    return stock, other


IDS = torch.randint(1, 61, (10, 48), generator=torch.Generator().manual_seed(2))


def fit(stock, other):
    config = other.config
    kinds = {s: "stream" for s in config.norm_pin.names(config) if config.norm_at(s)[0] != config.norm_pin.stock}
    return fit_norms(copy.deepcopy(stock), config, kinds, IDS)


def with_fitted(other, found):
    with torch.no_grad():
        for name, value in found.items():
            other.base_model.get_parameter(name).copy_(value)
    return other


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["ibnorm_l", "ibnorm_t", "layernormalnorm", "dyt", "layernorm", "rmsnorm"])
def test_no_norm_is_further_from_the_old_one_than_it_was(tiny_config, family, norm):
    stock, other = models(tiny_config, family, norm)
    found, errors = fit(stock, other)
    expected = {site for site, module in norm_sites(other).items() if norm != STOCK_NORM[family]}
    assert {site.rpartition(f"{stock.base_model_prefix}.")[2] for site in expected} == set(errors)
    assert all(error["fitted"] <= error["kept"] * (1 + 1e-9) for error in errors.values())
    if norm != STOCK_NORM[family]:
        final = errors[FINAL[family]]
        assert final["fitted"] < final["kept"]
        wanted = stock(IDS).logits
        kept, fitted = other.eval()(IDS).logits, with_fitted(other, found).eval()(IDS).logits
        assert (fitted - wanted).norm() < (kept - wanted).norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_that_can_be_the_old_one_becomes_it(tiny_config, family):
    # Gains and biases of other values: calibration has to find the old ones.
    options = {"lam": 0.0, "standardize": "rms" if family == "llama" else "layer"}
    stock, other = models(tiny_config, family, "ibnorm_l", **options)
    found, errors = fit(stock, other)
    assert max(error["fitted"] for error in errors.values()) < 1e-9
    torch.testing.assert_close(with_fitted(other, found).eval()(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-4)


def test_each_norm_is_fitted_behind_the_ones_that_were_replaced(tiny_config):
    # The final norm's input is that of the model with all other norms fitted already, its target the old model's.
    stock, other = models(tiny_config, "llama", "ibnorm_t", lam=3.0)
    found, _ = fit(stock, other)
    with_fitted(other, found)
    seen = {}
    for name, model in (("old", stock), ("new", other)):
        model.model.norm.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
        with torch.no_grad():
            model.eval()(IDS)
    bare = copy.deepcopy(other.model.norm)
    bare.weight = bare.bias = None
    with torch.no_grad():
        gain, bias = Sums.of([(bare(seen["new"][0]), seen["old"][1])]).fit(torch.ones(32), with_bias=True)
    torch.testing.assert_close(other.model.norm.weight.double(), gain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.model.norm.bias.double(), bias, rtol=1e-3, atol=1e-4)


@pytest.fixture
def folder(source):
    return source("llama")


def test_the_command_calibrates_and_says_how_well(folder, tmp_path, command):
    flags = [
        "--norm",
        "ibnorm_t",
        "--init",
        "calibrate",
        "--data",
        "austen",
        "--calibration_tokens",
        "2000",
        "--no_report",
    ]
    code, _, error = command(main, "convert", str(folder), str(tmp_path / "new"), *flags, "--dtype", "bfloat16")
    assert (code, error) == (0, "")
    record = json.loads((tmp_path / "new" / "conversion.json").read_text())["calibration"]
    assert record["data"] == "austen"
    assert len(record["sites"]) == 5
    convert_checkpoint(folder, tmp_path / "kept", "ibnorm_t")
    tokens = draw_text("data", "austen", "train", AutoTokenizer.from_pretrained(folder), 2000, 40).ids
    old, new, kept = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(tokens).logits
        for path in (folder, tmp_path / "new", tmp_path / "kept")
    )
    assert (new - old).norm() < (kept - old).norm()


def test_a_norm_divided_between_two_parts_is_calibrated_whole(source, tmp_path):
    folder, options = source("gpt2"), {"init": "calibrate", "calibration_tokens": 600}
    convert_checkpoint(folder, tmp_path / "one", "ibnorm_t", **options)
    tensors = load_file(folder / "model.safetensors")
    second = {"transformer.h.1.ln_1.bias": tensors.pop("transformer.h.1.ln_1.bias")}
    second["transformer.ln_f.weight"] = tensors.pop("transformer.ln_f.weight")
    places = {}
    for part, held in (("a.safetensors", tensors), ("b.safetensors", second)):
        save_file(held, folder / part, metadata={"format": "pt"})
        places |= dict.fromkeys(held, part)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    convert_checkpoint(folder, tmp_path / "two", "ibnorm_t", **options)
    one = load_file(tmp_path / "one" / "model.safetensors")
    two = {part: load_file(tmp_path / "two" / part) for part in ("a.safetensors", "b.safetensors")}
    assert sorted(one) == sorted([*two["a.safetensors"], *two["b.safetensors"]])
    assert all(torch.equal(value, one[name]) for held in two.values() for name, value in held.items())
    index = json.loads((tmp_path / "two" / INDEX).read_text())
    assert all(name in two[part] for name, part in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in one.values())


def test_norms_that_no_token_reaches_keep_what_they_have(source, tmp_path):
    folder = source("gpt2", add_cross_attention=True)
    convert_checkpoint(folder, tmp_path / "new", "ibnorm_t", init="calibrate", calibration_tokens=600)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "new"))
    same = {name for name, value in before.items() if torch.equal(after[name], value)}
    assert {name for name in before if "ln_cross_attn" in name} <= same
    assert "transformer.h.0.ln_1.weight" not in same


def test_gains_are_fitted_for_the_dtype_that_is_written(source, tmp_path):
    folder = source("llama", dtype=torch.bfloat16)
    convert_checkpoint(folder, tmp_path / "new", "ibnorm_t", init="calibrate", calibration_tokens=600, dtype="float32")
    gain = load_file(tmp_path / "new" / "model.safetensors")["model.norm.weight"]
    assert not torch.equal(gain, gain.bfloat16().float())
    record = json.loads((tmp_path / "new" / "conversion.json").read_text())["calibration"]
    assert record["tokens"] == 512  # one sequence of at most so many


def test_text_to_calibrate_on_comes_from_all_over_a_corpus_or_from_a_file(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = draw_text("data", "sotu", "train", tokenizer, 5000, 64).ids
    assert ids.shape == (78, 64)
    assert len({tuple(row.tolist()) for row in ids}) == 78
    (tmp_path / "text.txt").write_text("Once upon a time. " * 100)
    assert draw_text("data", str(tmp_path / "text.txt"), "train", tokenizer, 600, 512).ids.shape == (1, 512)
    (tmp_path / "text.txt").write_text("好" * 90_000)  # no spaces
    assert draw_text("data", str(tmp_path / "text.txt"), "train", tokenizer, 600, 512).ids.shape == (1, 512)


BAD = {
    "data: got 'nowhere', neither a corpus": ["--data", "nowhere"],
    "calibration_tokens: got 3, must be": ["--calibration_tokens", "3"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, command, message):
    flags = ["--norm", "ibnorm_t", "--init", "calibrate", *BAD[message]]
    code, _, error = command(main, "convert", str(folder), str(tmp_path / "new"), *flags)
    assert code == 2
    assert error.startswith(f"error: {message}")
    assert not (tmp_path / "new").exists()


def test_too_little_text_is_refused(folder, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="has [0-9]+ tokens; must have at least 256"):
        convert_checkpoint(folder, tmp_path / "new", "ibnorm_t", init="calibrate", data=str(tmp_path / "short.txt"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="has no tokenizer to calibrate with"):
        convert_checkpoint(folder, tmp_path / "new", "ibnorm_t", init="calibrate")
    assert not (tmp_path / "new").exists()
