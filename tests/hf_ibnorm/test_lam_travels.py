"""Weights and λ travel together, by every way that weights travel, or it is an error; weights without λ still load."""

import json
import logging
import subprocess

import peft
import pytest
import torch
import warm
from helpers import FAMILIES, FINAL, STOCK_NORM, build, shake, tokens
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.optim.swa_utils import AveragedModel
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_ibnorm import IBNorm, norm_sites, set_lam
from hf_ibnorm.swap.loading import load_whole

pytestmark = pytest.mark.oldest

QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(tiny_config, family):
    return shake(build(tiny_config(family, norm_type="ibnorm_t", norm_kwargs={"lam": 2.0})))


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens()).logits


def lams(model):
    return [norm.lam_value for norm in norm_sites(model).values()]


def rewrite_weights(folder, change):
    path = folder / "model.safetensors"
    save_file({name: new for name, value in load_file(path).items() if (new := change(name, value)) is not None}, path)


def without_lam(name, value):
    return None if name.endswith(".lam") else value


def by_state_dict(saved, into, folder):
    into.load_state_dict(saved.state_dict())


def by_assignment(saved, into, folder):
    into.load_state_dict(saved.state_dict(), assign=True)


def by_safetensors(saved, into, folder):
    save_model(saved, folder / "x.safetensors")
    load_model(into, folder / "x.safetensors")


def by_torch_save(saved, into, folder):
    torch.save(saved.state_dict(), folder / "x.pt")
    into.load_state_dict(torch.load(folder / "x.pt", weights_only=True))


def by_a_file_that_save_pretrained_wrote(saved, into, folder):
    saved.save_pretrained(folder)
    into.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # it lacks a tied embedding


WAYS = [by_state_dict, by_assignment, by_safetensors, by_torch_save, by_a_file_that_save_pretrained_wrote]


@pytest.mark.parametrize("way", WAYS)
def test_lam_comes_with_the_weights(model, tiny_config, family, way, tmp_path):
    other = shake(build(tiny_config(family, norm_type="ibnorm_t", norm_kwargs={"lam": 2.0}), seed=9))
    norm_sites(model).popitem()[1].set_lam(0.3)  # not even in the config
    set_lam(other, 8.0)
    way(model, other, tmp_path)
    assert lams(other) == lams(model) == [2.0] * 4 + [0.3]
    assert torch.equal(logits(other), logits(model))
    assert other.config.norm_kwargs["lam"] == 2.0
    assert other.config.norm_at(FINAL[family])[1]["lam"] == 0.3
    other.half().float()
    assert lams(other) == lams(model)


def test_a_state_dict_of_a_stock_model_loads_strictly_and_changes_no_lam(model, stock_model, family):
    stock = stock_model(family).state_dict()
    if family == "llama":
        stock |= {name: value for name, value in model.state_dict().items() if name.endswith(".bias")}
    model.load_state_dict(stock)
    assert lams(model) == [2.0] * 5
    norm = IBNorm(4, lam=3.0)
    norm.load_state_dict({"weight": torch.ones(4), "bias": torch.zeros(4)})
    assert norm.lam_value == 3.0


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("options", "state", "message"),
    [
        ({"learn_lam": True}, {"lam": torch.tensor(2.0)}, "lam: the state dict has a fixed lam"),
        ({}, {"theta": torch.tensor([2.0])}, "theta: the state dict has a learned lam"),
        ({"variant": "S"}, {"lam": torch.tensor(0.5)}, r"lam: got 0.5, must be .*>= 1 .*\(variant S\)"),
        ({}, {"lam": torch.tensor(float("nan"))}, "lam: got nan"),
    ],
)
def test_a_lam_that_the_norm_cannot_have_is_an_error_even_where_others_would_be_passed_over(
    options, state, message, strict
):
    norm = IBNorm(4, **options)
    before = norm.lam_value
    with pytest.raises(RuntimeError, match=message):
        norm.load_state_dict({"weight": torch.ones(4), "bias": torch.zeros(4), **state}, strict=strict)
    assert norm.lam_value == before


class Ramp(TrainerCallback):
    """λ is the step times 2, and the first step's model is said to be the best."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        set_lam(model, 2.0 * (state.global_step + 1))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_score"] = -state.global_step


def test_hf_trainer_takes_the_lam_of_the_checkpoint_that_it_goes_back_to(model, tmp_path):
    row = tokens()[0]
    data = [{"input_ids": row, "labels": row}] * 8
    options = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1, **QUIET}
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=4, metric_for_best_model="score", greater_is_better=True, **best, **options
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=[Ramp()])
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert lams(model) == [2.0] * 5
    assert model.config.norm_kwargs["lam"] == 2.0
    trainer.save_model(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-1"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))

    # Resumed at the end, so that nothing but loading changes the model.
    set_lam(model, 8.0)
    again = Trainer(model=model, args=TrainingArguments(tmp_path / "again", max_steps=3, **options), train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert lams(model) == [6.0] * 5


def test_accelerate_restores_lam_with_the_weights(model, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    expected = logits(model)
    accelerator.save_state(tmp_path)
    set_lam(model, 8.0)
    accelerator.load_state(tmp_path)
    assert torch.equal(logits(accelerator.unwrap_model(prepared)), expected)


def test_an_average_of_models_says_the_lam_that_it_has(model, tmp_path):
    average = AveragedModel(model)
    set_lam(model, 0.7)
    average.update_parameters(model)
    assert lams(average.module) == [0.7] * 5
    average.module.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).norm_kwargs["lam"] == 0.7


def test_a_compiled_norm_takes_a_loaded_lam_without_compiling_again():
    x, norm = torch.randn(3, 8), IBNorm(8, lam=2.0)
    state, expected = {name: value.clone() for name, value in norm.state_dict().items()}, norm(x)
    set_lam(norm, 8.0)
    compiled = torch.compile(norm, backend="eager")
    assert not torch.equal(compiled(x), expected)
    norm.load_state_dict(state)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), expected)


def test_the_config_names_each_lam_once_however_often_it_is_saved(model, tmp_path):
    first, *_ = norm_sites(model).values()
    for lam in (3.0, 4.0, 5.0):
        first.set_lam(lam)
        model.save_pretrained(tmp_path)
    assert len(model.config.norm_overrides) == 1
    for norm in norm_sites(model).values():
        norm.set_lam(7.0)
    model.save_pretrained(tmp_path)
    assert model.config.norm_kwargs["lam"] == model.config.norm_overrides[0][1]["kwargs"]["lam"] == 7.0
    assert lams(AutoModelForCausalLM.from_pretrained(tmp_path)) == [7.0] * 5


def test_a_state_dict_that_is_saved_in_place_of_the_model_s_own_brings_its_lam(model, tmp_path):
    state, expected = {name: value.clone() for name, value in model.state_dict().items()}, logits(model)
    set_lam(model, 8.0)
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    assert model.config.norm_kwargs["lam"] == 8.0


def test_a_checkpoint_of_two_minds_is_refused_unless_loading_says_which_lam(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["norm_kwargs"]["lam"] = 8.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"lam: the checkpoint's config has 8.0 at .*, its weights 2.0: .*norm_kwargs="
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    for lam in (2.0, 8.0, 0.5):
        assert lams(AutoModelForCausalLM.from_pretrained(tmp_path, norm_kwargs={"lam": lam})) == [lam] * 5


@pytest.mark.parametrize(
    "given",
    [{"norm_kwargs": {"eps": 1e-5}}, {"norm_type": "ibnorm_l"}, {"norm_overrides": [["norm", "layernorm"]]}],
)
def test_what_loading_says_of_other_things_is_no_word_on_lam(tiny_config, tmp_path, given):
    model = build(tiny_config("llama", norm_type="ibnorm_l", norm_kwargs={"lam": 0.3}))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["norm_kwargs"]["lam"] = 8.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lam: the checkpoint's config has 8.0 at"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **given)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, norm_kwargs={"lam": 8.0})
    with pytest.raises(ValueError, match="lam: the checkpoint's config has 8.0 at"):  # what was said then is over
        AutoModelForCausalLM.from_pretrained(tmp_path, config=loaded.config)


def test_a_lam_that_was_cast_with_the_weights_is_the_config_s(tiny_config, family, tmp_path):
    model = build(tiny_config(family, norm_type="ibnorm_t", norm_kwargs={"lam": 0.3}))
    model.save_pretrained(tmp_path)
    rewrite_weights(tmp_path, lambda name, value: value.bfloat16())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {norm.lam.item() for norm in norm_sites(loaded).values()} == {torch.tensor(0.3).item()}


def test_a_checkpoint_from_before_lam_was_in_the_weights_loads_without_a_word(model, tmp_path, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    model.save_pretrained(tmp_path)
    rewrite_weights(tmp_path, without_lam)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert "MISSING" not in caplog.text
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(load_whole(tmp_path, AutoConfig.from_pretrained(tmp_path), torch.float32)), logits(model))


def test_weights_with_a_lam_that_the_config_has_no_norm_for_are_not_loaded_in_silence(model, family, tmp_path):
    model.save_pretrained(tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, norm_type=STOCK_NORM[family], output_loading_info=True)
    assert not [name for name in info["unexpected_keys"] if name.endswith("lam")], "another norm was asked for"
    config = json.loads((tmp_path / "config.json").read_text()) | {"norm_type": "dyt", "norm_kwargs": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len([name for name in info["unexpected_keys"] if name.endswith("lam")]) == 5


def test_setting_lam_under_adapters_says_that_they_do_not_hold_it(model):
    wrapped = peft.get_peft_model(model, peft.LoraConfig())
    with pytest.warns(UserWarning, match="adapters of PEFT, whose checkpoints do not hold it"):
        set_lam(wrapped, 1.0)


def test_accelerate_fills_a_model_that_it_sharded_on_the_meta_device(tmp_path):
    """What FSDP2 with `cpu_ram_efficient_loading` does, with the one process that it takes."""
    code = """
import sys, torch, types
from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hf_ibnorm import IBNormLlamaConfig, IBNormLlamaForCausalLM, norm_sites
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = IBNormLlamaForCausalLM(IBNormLlamaConfig(norm_type="ibnorm_t", norm_kwargs={"lam": 2.0}, **sizes)).eval()
for norm in norm_sites(model).values():
    norm.set_lam(0.3)
rows = torch.arange(16)[None]
expected, whole = model(rows).logits, model.state_dict()
rotary = {name: value.clone() for name, value in model.named_buffers() if not name.endswith("lam")}
model.to("meta")
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
fsdp2_load_full_state_dict(types.SimpleNamespace(is_main_process=True), model, whole)
for name, value in rotary.items():  # as Accelerate does
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent).register_buffer(last, value, persistent=False)
assert {norm.lam_value for norm in norm_sites(model).values()} == {0.3}
assert not any(norm.lam.is_meta for norm in norm_sites(model).values())
assert torch.equal(model(rows).logits, expected)
torch.distributed.destroy_process_group()
"""
    done = subprocess.run([warm.python(), "-c", code, str(tmp_path / "meet")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
