"""Checkpoints on disk with other norms: the same function where it can be, all other tensors to the bit, or nothing."""

import json
import re
import shutil
import subprocess
from contextlib import nullcontext
from fnmatch import fnmatchcase

import pytest
import torch
from helpers import FAMILIES, STOCK_NORM, build, shake, stock_of, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm import kill, python

from hf_ibnorm import NORMS, apply_norm, convert_checkpoint, norm_sites
from hf_ibnorm.cli import main
from hf_ibnorm.convert.weights import INDEX

IDENTITY = {"llama": ("ibnorm_s", "ibnorm_l", "ibnorm_t", "ibnorm_shrink", "rmsnorm")}
IDENTITY["gpt2"] = (*IDENTITY["llama"][:-1], "layernormalnorm", "layernorm")


def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens()).logits


def weights(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize(("family", "norm"), [(family, norm) for family in FAMILIES for norm in IDENTITY[family]])
def test_identity_changes_nothing_but_rounding(source, tmp_path, family, norm):
    folder = source(family, **({"rms_norm_eps": 3e-5} if family == "llama" else {"layer_norm_epsilon": 3e-5}))
    convert_checkpoint(folder, tmp_path / "new", norm, init="identity")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    expected = logits(folder)
    torch.testing.assert_close(logits(tmp_path / "new"), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert (type(model).__name__[:6] == "IBNorm") == (norm != STOCK_NORM[family])


@pytest.mark.parametrize("norm", ["ibnorm_s", "ibnorm_l", "ibnorm_t"])
def test_identity_in_the_unit_and_order_that_lam_will_be_ramped_up_in(source, tmp_path, norm):
    folder, options = source("llama"), {"unit": "mean_abs", "order": "standardize_first"}
    record = convert_checkpoint(folder, tmp_path / "new", norm, init="identity", norm_kwargs=options)
    assert record["norm_kwargs"].items() >= options.items()
    expected = logits(folder)
    torch.testing.assert_close(logits(tmp_path / "new"), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", NORMS)
def test_keep_is_what_patching_the_loaded_model_gives(source, tmp_path, family, norm):
    folder = source(family)
    record = convert_checkpoint(folder, tmp_path / "new", norm)
    live = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.warns(UserWarning, match="no place") if record["lost"] else nullcontext():
        apply_norm(live, norm)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(converted.eval()(tokens()).logits, live.eval()(tokens()).logits, rtol=1e-5, atol=1e-6)
    assert bool(record["lost"]) == (norm == "rmsnorm" and family == "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_other_tensors_are_the_same_bytes_part_by_part(source, tmp_path, family):
    folder = source(family, shard="20KB")
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(parts) > 2
    convert_checkpoint(folder, tmp_path / "new", "ibnorm_t", norm_kwargs={"lam": 3})
    assert sorted(path.name for path in (tmp_path / "new").glob("*.safetensors")) == parts
    before, after = weights(folder), weights(tmp_path / "new")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    added = {name: after[name] for name in after.keys() - before.keys()}
    lams = [added.pop(name).item() for name in sorted(added) if name.endswith(".lam")]
    assert lams == [3.0] * 5
    assert len(added) == (5 if family == "llama" else 0)
    assert not any(value.any() for value in added.values())
    index = json.loads((tmp_path / "new" / INDEX).read_text())
    assert sorted(index["weight_map"]) == sorted(after)
    for name, part in index["weight_map"].items():
        assert name in load_file(tmp_path / "new" / part)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.config.norm_kwargs["lam"] == 3.0


def test_everything_that_goes_with_the_model_comes_along(source, tmp_path):
    folder = source("llama")
    (folder / "LICENSE.md").write_text("of the author")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    record = convert_checkpoint(folder, tmp_path / "new", "ibnorm_l", init="identity", remote_code=True)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE.md",
    ):
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes(), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").generation_config.max_new_tokens == 7
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    named = (tmp_path / "new" / "additional_chat_templates" / "tool_use.jinja").read_text()
    assert named == (folder / "additional_chat_templates" / "tool_use.jinja").read_text()
    assert (tmp_path / "new" / "modeling_ibnorm_llama.py").is_file()
    assert json.loads((tmp_path / "new" / "conversion.json").read_text()) == json.loads(json.dumps(record))
    assert record["source_architecture"] == "LlamaForCausalLM"
    assert record["architecture"] == "IBNormLlamaForCausalLM"
    assert str(tmp_path) not in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_checkpoint(source, tmp_path, family):
    folder = source(family, shard="20KB")
    convert_checkpoint(folder, tmp_path / "there", "ibnorm_l")
    record = convert_checkpoint(tmp_path / "there", tmp_path / "back", STOCK_NORM[family])
    assert record["lost"] == {}
    assert record["architecture"] == stock_of(type(AutoModelForCausalLM.from_pretrained(tmp_path / "there"))).__name__
    before, after = weights(folder), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert torch.equal(logits(folder), logits(tmp_path / "back"))
    left = ("architectures", "transformers_version", "dtype")
    old, new = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "back"))
    assert {name: value for name, value in old.items() if name not in left} == {
        name: value for name, value in new.items() if name not in left
    }


def test_going_back_says_which_trained_biases_are_lost(source, tmp_path, command):
    convert_checkpoint(source("llama"), tmp_path / "there", "ibnorm_l")
    trained = load_file(tmp_path / "there" / "model.safetensors")
    trained["model.norm.bias"][3] = -0.25
    save_file(trained, tmp_path / "there" / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = command(
        main,
        "convert",
        str(tmp_path / "there"),
        str(tmp_path / "back"),
        "--norm",
        "rmsnorm",
        "--norm_kwargs.eps",
        "1e-6",
        "--no_report",
    )
    assert code == 0
    assert "lost: 1 trained tensors (bias), values up to 0.25 from their start" in out
    assert json.loads((tmp_path / "back" / "conversion.json").read_text())["lost"] == {"model.norm.bias": 0.25}


def test_sites_and_options_of_the_command(source, tmp_path, command):
    folder, flags = (
        source("llama"),
        ["--sites", "layers.0.*", "--sites", "norm", "--norm_kwargs.lam=2.5", "--no_report"],
    )
    code, out, _ = command(main, "convert", str(folder), str(tmp_path / "new"), "--norm", "IBNorm-T", *flags)
    assert code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.model.layers[0].input_layernorm.lam_value == model.model.norm.lam_value == 2.5
    assert type(model.model.layers[1].input_layernorm) is torch.nn.RMSNorm
    assert 'IBNormLlamaForCausalLM with ibnorm_t {"lam": 2.5, ' in out
    assert out.rstrip().endswith("at layers.0.*, norm")
    assert "its norms at `layers.0.*`, `norm` are `ibnorm_t`" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_take_the_dtype_that_is_asked_for(source, tmp_path, dtype):
    folder = source("llama", dtype=torch.bfloat16 if dtype == "float32" else None)
    convert_checkpoint(folder, tmp_path / "new", "ibnorm_l", dtype=dtype)
    before, after = weights(folder), weights(tmp_path / "new")
    wanted = getattr(torch, dtype)
    assert {value.dtype for name, value in after.items() if not name.endswith(".lam")} == {wanted}
    assert {value.dtype for name, value in after.items() if name.endswith(".lam")} == {torch.float32}
    assert all(torch.equal(after[name], value.to(wanted)) for name, value in before.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto").dtype == wanted


def test_a_checkpoint_keeps_its_dtype_and_new_tensors_take_it(source, tmp_path):
    convert_checkpoint(source("llama", dtype=torch.bfloat16), tmp_path / "new", "ibnorm_l")
    after = weights(tmp_path / "new")
    assert {value.dtype for name, value in after.items() if not name.endswith(".lam")} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_s_names_and_tied_embeddings_are_kept(source, tmp_path, family):
    folder = source(family, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    bare = {name.removeprefix(f"{model.base_model_prefix}."): value for name, value in weights(folder).items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(folder, tmp_path / "new", "ibnorm_l", init="identity")
    assert weights(tmp_path / "new").keys() >= bare.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    expected = logits(folder)
    torch.testing.assert_close(logits(tmp_path / "new"), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def spoil_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def many_tokens(folder):
    content = json.loads((folder / "config.json").read_text())
    spoil_config(folder, vocab_size=content["vocab_size"] - 200)


def cut_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without(folder, name):
    held = load_file(folder / "model.safetensors")
    del held[name]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def put(folder, name, value):
    held = load_file(folder / "model.safetensors")
    held[name].view(-1)[3] = value
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def with_index(folder, change):
    """The weights in two parts of one name in two folders, as an index names them, or as `change` makes of that."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"{'ab'[i % 2]}/part.safetensors" for i, name in enumerate(held)}
    for part in ("a/part.safetensors", "b/part.safetensors"):
        (folder / part).parent.mkdir()
        there = {name: value for name, value in held.items() if places[name] == part}
        save_file(there, folder / part, metadata={"format": "pt"})
    change(folder, places)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def outside(folder, places):
    (folder / "b").rename(folder.parent / "b")
    places |= {name: f"../{part}" for name, part in places.items() if part.startswith("b")}


def twice(folder, places):
    save_file(load_file(folder / "a" / "part.safetensors"), folder / "c.safetensors", metadata={"format": "pt"})
    places["another"] = "c.safetensors"


BAD = {
    "layers.1.mlp.up_proj.weight has numbers that are not finite": lambda folder: put(
        folder, "model.layers.1.mlp.up_proj.weight", float("nan")
    ),
    "layers.1.input_layernorm.weight has numbers that are not finite": lambda folder: put(
        folder, "model.layers.1.input_layernorm.weight", float("-inf")
    ),
    r"names '../b/part.safetensors', must be a safetensors file inside": lambda folder: with_index(folder, outside),
    "is in two parts": lambda folder: with_index(folder, twice),
    "index.json: weight_map is empty, must": lambda folder: with_index(folder, lambda _, places: places.clear()),
    "which has an adapter of PEFT: merge it": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "has model.norm.lam, its config no norm with a lam": lambda folder: save_file(
        load_file(folder / "model.safetensors") | {"model.norm.lam": torch.tensor(1.0)}, folder / "model.safetensors"
    ),
    "has no model.layers.1.mlp.up_proj.weight": lambda folder: without(folder, "model.layers.1.mlp.up_proj.weight"),
    r"embed_tokens.weight of shape \[300, 32\], its config makes it \[400, 32\]": lambda folder: spoil_config(
        folder, vocab_size=400
    ),
    "a MistralForCausalLM with the config of a llama; they do not go together": lambda folder: spoil_config(
        folder, architectures=["MistralForCausalLM"]
    ),
    "which is quantized; load it, dequantize": lambda folder: spoil_config(
        folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    "tokenizer: it has the token .* with id 2.., the model's vocab_size is 100": many_tokens,
    "model.safetensors cannot be read": cut_header,
    "has no model.safetensors but pytorch_model.bin, which may run code": as_pickle,
    "config.json": lambda folder: (folder / "config.json").unlink(),
    "source: tokenizer: .* cannot be read": lambda folder: (folder / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_source_is_one_line_and_leaves_nothing(source, tmp_path, command, message):
    folder = source("llama")
    BAD[message](folder)
    code, out, error = command(main, "convert", str(folder), str(tmp_path / "new"), "--norm", "ibnorm_l")
    assert (code, out) == (2, "")
    assert error.startswith("error: source: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert {path.name for path in tmp_path.iterdir()} <= {"llama-source", "b"}


def test_parts_of_one_name_in_two_folders_are_all_there(source, tmp_path):
    folder = source("llama")
    before, expected = weights(folder), logits(folder)
    with_index(folder, lambda *_: None)
    convert_checkpoint(folder, tmp_path / "new", "ibnorm_l", init="identity")
    after = weights(tmp_path / "new")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    torch.testing.assert_close(logits(tmp_path / "new"), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_the_weights_are_those_that_transformers_reads_beside_a_stale_index(source, tmp_path):
    folder = source("llama")
    stale = {name: torch.zeros_like(value) for name, value in weights(folder).items()}
    save_file(stale, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(stale, "model-00001-of-00001.safetensors")}))
    convert_checkpoint(folder, tmp_path / "new", "rmsnorm")
    assert sorted(path.name for path in (tmp_path / "new").glob("*.safetensors*")) == ["model.safetensors"]
    assert torch.equal(logits(tmp_path / "new"), logits(folder))


@pytest.mark.parametrize(("dtype", "hint"), [("float16", "65504"), ("bfloat16", None)])
def test_numbers_that_a_dtype_cannot_hold_are_refused(source, tmp_path, dtype, hint):
    folder = source("llama")
    put(folder, "model.layers.1.mlp.up_proj.weight", -1e5)
    if hint is None:
        convert_checkpoint(folder, tmp_path / "new", "ibnorm_l", dtype=dtype)
    else:
        with pytest.raises(ValueError, match="dtype: .* float16 is 65504, but .*up_proj.weight has 100000"):
            convert_checkpoint(folder, tmp_path / "new", "ibnorm_l", dtype=dtype)
        assert [path.name for path in tmp_path.iterdir()] == ["llama-source"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["ibnorm_t", None])
def test_norms_without_gains_are_converted_to_norms_that_have_them(tiny_config, tmp_path, family, norm):
    norm_type = norm or STOCK_NORM[family]
    bare = tiny_config(family, norm_type=norm_type, norm_kwargs={"elementwise_affine": False})
    model = shake(build(bare)).bfloat16()
    model.save_pretrained(tmp_path / "bare", max_shard_size="20KB")
    convert_checkpoint(tmp_path / "bare", tmp_path / "new", "ibnorm_l")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    expected = apply_norm(AutoModelForCausalLM.from_pretrained(tmp_path / "bare"), "ibnorm_l")
    assert torch.equal(loaded(tokens()).logits, expected(tokens()).logits)
    after = weights(tmp_path / "new")
    assert {value.dtype for name, value in after.items() if not name.endswith(".lam")} == {torch.bfloat16}
    back = convert_checkpoint(tmp_path / "new", tmp_path / "back", norm_type, norm_kwargs={"elementwise_affine": False})
    assert back["lost"] == {}
    assert weights(tmp_path / "back").keys() == weights(tmp_path / "bare").keys()


def test_going_from_one_lam_to_another_changes_it_in_weights_and_config(source, tmp_path):
    convert_checkpoint(source("llama"), tmp_path / "two", "ibnorm_t", norm_kwargs={"lam": 2})
    convert_checkpoint(tmp_path / "two", tmp_path / "three", "ibnorm_l", norm_kwargs={"lam": 3}, sites="layers.0.*")
    after = {name: value.item() for name, value in weights(tmp_path / "three").items() if name.endswith(".lam")}
    assert sorted(after.values()) == [2.0, 2.0, 2.0, 3.0, 3.0]
    loaded = norm_sites(AutoModelForCausalLM.from_pretrained(tmp_path / "three"))
    assert {f"{site}.lam": norm.lam_value for site, norm in loaded.items()} == after


def test_a_source_whose_config_and_weights_have_two_lams_is_refused(source, tmp_path):
    convert_checkpoint(source("llama"), tmp_path / "two", "ibnorm_t", norm_kwargs={"lam": 2})
    content = json.loads((tmp_path / "two" / "config.json").read_text())
    content["norm_kwargs"]["lam"] = 5.0
    (tmp_path / "two" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"source: .*two has 2 as model\..*\.lam, its config 5"):
        convert_checkpoint(tmp_path / "two", tmp_path / "new", "dyt")


def test_sites_are_taken_by_the_names_that_norm_sites_prints(source, tmp_path):
    folder = source("llama")
    names = [name for name in norm_sites(AutoModelForCausalLM.from_pretrained(folder)) if ".layers.0." in name]
    by_glob = convert_checkpoint(folder, tmp_path / "glob", "ibnorm_t", sites="model.layers.0.*")
    by_name = convert_checkpoint(folder, tmp_path / "name", "ibnorm_t", sites=names)
    assert by_glob["norm"] == {**by_name["norm"], "sites": ["layers.0.*"]}
    assert torch.equal(logits(tmp_path / "glob"), logits(tmp_path / "name"))


def test_only_what_goes_with_a_model_is_copied_and_what_stays_behind_is_named(source, tmp_path, command):
    folder = source("llama")
    (tmp_path / "secret").write_text("key")
    (folder / "prod.env").write_text("TOKEN=1")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "optimizer.pkl").write_bytes(b"pickle")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    (folder / "logs").mkdir()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "x.env").write_text("TOKEN=1")
    code, out, _ = command(main, "convert", str(folder), str(tmp_path / "new"), "--norm", "ibnorm_l", "--no_report")
    assert code == 0
    assert "not copied: logs/, notes.txt, optimizer.pkl, prod.env, training_args.bin\n" in out
    copied = {path.name for path in (tmp_path / "new").rglob("*")}
    assert not copied & {"prod.env", "training_args.bin", "optimizer.pkl", "notes.txt", "logs", "x.env"}
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= copied


def test_missing_parts_are_named(source, tmp_path):
    folder = source("llama", shard="20KB")
    parts = sorted(folder.glob("*.safetensors"))
    parts[1].unlink()
    with pytest.raises(ValueError, match=f"lacks {parts[1].name}: 1 of {len(parts)} parts"):
        convert_checkpoint(folder, tmp_path / "new", "ibnorm_l")
    assert not (tmp_path / "new").exists()


def test_a_damaged_gguf_file_is_one_line(tmp_path, command):
    pytest.importorskip("gguf")
    for content in (b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\x01" * 40, b"something else"):
        (tmp_path / "model.gguf").write_bytes(content)
        code, _, error = command(main, "convert", str(tmp_path / "model.gguf"), str(tmp_path / "new"), "--norm", "dyt")
        assert code == 2
        assert error.startswith("error: source: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


ARGUMENTS = {
    r"remote_code: got True, but a stock checkpoint": {"norm": "rmsnorm", "remote_code": True},
    r"unknown norm 'ibnorm_x'": {"norm": "ibnorm_x"},
    r"lamm: .*did you mean 'lam'": {"norm_kwargs": {"lamm": 3}},
    r"norm_kwargs.lam: got 4 with init 'identity', which sets it to 0.0": {
        "init": "identity",
        "norm_kwargs": {"lam": 4},
    },
    r"init: got 'identity', but no options make layernormalnorm a rmsnorm": {
        "init": "identity",
        "norm": "layernormalnorm",
    },
    r"init: got 'identity', but no options make dyt a rmsnorm": {"init": "identity", "norm": "dyt"},
    r"init: got 'reset'": {"init": "reset"},
    r"dtype: got 'int8'": {"dtype": "int8"},
    r"sites: 'layers.9.\*' matches no site": {"sites": "layers.9.*"},
}


@pytest.mark.parametrize("message", ARGUMENTS)
def test_bad_arguments_are_named_and_nothing_is_written(source, tmp_path, message):
    folder = source("llama")
    with pytest.raises((ValueError, TypeError), match=message):
        convert_checkpoint(folder, tmp_path / "new", **{"norm": "ibnorm_l", **ARGUMENTS[message]})
    assert not (tmp_path / "new").exists()


def test_identity_is_for_stock_models(source, tmp_path):
    convert_checkpoint(source("llama"), tmp_path / "new", "ibnorm_l")
    with pytest.raises(ValueError, match="init: got 'identity' for a source with norms of this package"):
        convert_checkpoint(tmp_path / "new", tmp_path / "newer", "ibnorm_t", init="identity")


def test_what_is_there_is_not_overwritten_and_room_is_checked_first(source, tmp_path, monkeypatch):
    folder = source("llama")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    with pytest.raises(OSError, match="target: .*there is not empty"):
        convert_checkpoint(folder, tmp_path / "there", "ibnorm_l")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(OSError, match=r"target: .*new needs .* GB, 1e-06 GB are free"):
        convert_checkpoint(folder, tmp_path / "new", "ibnorm_l")
    assert not (tmp_path / "new").exists()


def test_a_name_the_hub_does_not_give_is_one_line(tmp_path, command):
    code, _, error = command(main, "convert", "nobody/nothing", str(tmp_path / "new"), "--norm", "ibnorm_l")
    assert code == 2
    assert error.startswith("error: source: got 'nobody/nothing', no such directory, and the Hub does not give it")


def test_terms_of_use_come_along_from_the_hub_too(source, tmp_path, monkeypatch):
    folder, terms = source("llama"), ("LICENSE.md", "LICENCE", "NOTICE.txt", "USE_POLICY.md")
    for name in (*terms, "more.bin"):
        (folder / name).write_text("of the author")

    def download(name, allow_patterns):
        (tmp_path / "downloaded").mkdir()
        for path in folder.iterdir():
            if any(fnmatchcase(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, tmp_path / "downloaded")
        return str(tmp_path / "downloaded")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    record = convert_checkpoint("author/model", tmp_path / "new", "ibnorm_l")
    assert (record["source"], record["files_left"]) == ("author/model", [])
    assert {path.name for path in (tmp_path / "new").iterdir()} >= {*terms, "tokenizer.json", "chat_template.jinja"}
    assert not (tmp_path / "downloaded" / "more.bin").exists()


def test_options_of_a_norm_belong_to_convert(command):
    code, _, error = command(main, "env", "--norm_kwargs.lam", "4")
    assert (code, error) == (2, "error: unrecognized arguments: --norm_kwargs.lam 4 (see hf-ibnorm --help)\n")


def test_killed_half_way_it_leaves_no_target(source, tmp_path):
    folder = source("llama", shard="20KB")
    code = """
import os, sys, time
import hf_ibnorm.convert.checkpoint as module
original = module.rewrite
def slow(*arguments):
    written = original(*arguments)
    print("part", flush=True)
    time.sleep(60)
    return written
module.rewrite = slow
module.convert_checkpoint(sys.argv[1], sys.argv[2], "ibnorm_l")
"""
    words = [python(), "-c", code, str(folder), str(tmp_path / "new")]
    begun = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert begun.stdout.readline() == "part\n"
    kill(begun)
    assert not (tmp_path / "new").exists()
    assert [*tmp_path.glob(".new.*")], "what a killed process could not remove"
    convert_checkpoint(folder, tmp_path / "new", "ibnorm_l")
    assert (tmp_path / "new" / "conversion.json").is_file()
    assert not [*tmp_path.glob(".new.*")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_memory_does_not_grow_with_the_checkpoint(source, tmp_path, dtype):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 8000}
    folder = source("llama", shard="200MB", **sizes)
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert total > 3 * largest
    code = """
import sys
from pathlib import Path
from hf_ibnorm import convert_checkpoint
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # ru_maxrss: the parent's too
before = peak()
convert_checkpoint(sys.argv[1], sys.argv[2], "ibnorm_l", init="identity", dtype=sys.argv[3] or None)
print((peak() - before) * 1024)
"""
    words = [python(), "-c", code, str(folder), str(tmp_path / "new"), dtype or ""]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # A part is never in memory whole, whatever becomes of its numbers.
    assert int(done.stdout) < 0.5 * largest
