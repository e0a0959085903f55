"""Healing a converted checkpoint: λ ramped from the identity, norms or adapters trained alone, a teacher's logits."""

import json
import math
import shutil
from itertools import pairwise

import pytest
import torch
from launching import launch, program
from safetensors.torch import load_file, save_file
from training import config, metrics, result, run, run_stopped, small_corpus
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_ibnorm import convert_checkpoint
from hf_ibnorm.base.errors import UserError
from hf_ibnorm.report.runs import Run
from train_lm.config import read_command_line
from train_lm.data import IGNORE
from train_lm.distribution import deepspeed_plugin, make_accelerator
from train_lm.memory import step_memory
from train_lm.optim import add_adapters, freeze, merged
from train_lm.plan import main as plan
from train_lm.push import model_card
from train_lm.tasks.language import distillation_loss
from train_lm.tokenizer import train_tokenizer, wrap_tokenizer
from train_lm.train import train

pytestmark = pytest.mark.usefixtures(small_corpus.__name__)

QUICK = ("--max_steps", "6", "--max_eval_blocks", "2", "--eval_every", "6", "--checkpoint_every", "3")
RAMP = ("--lam_schedule", "linear", "--lam_warmup_steps", "4")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A stock Llama and a stock GPT-2 with a tokenizer, every weight off its initial value, and conversions of both."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(3)
    sizes = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
    llama = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **sizes)
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **sizes)
    tokenizer = wrap_tokenizer(train_tokenizer(["some text to learn from " * 9], 300), 64)
    for name, model in {"llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt2)}.items():
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        convert_checkpoint(folder / name, folder / f"{name}-identity", "ibnorm_l", init="identity")
        standardize = {"llama": "rms", "gpt2": "layer"}[name]
        convert_checkpoint(folder / name, folder / f"{name}-s", "ibnorm_s", norm_kwargs={"standardize": standardize})
        convert_checkpoint(
            folder / name, folder / f"{name}-t", "ibnorm_t", norm_kwargs={"standardize": standardize, "lam": 1.5}
        )
    return folder


def heal(run_dir, source, *flags):
    """Train the checkpoint `source` with the norms it has."""
    return run(run_dir, "--model.init_from", str(source), "--model.norm_type", "null", *QUICK, *flags)


def moved(run_dir):
    """Names of the tensors of the finished model that are not, to the bit, those of the first checkpoint."""
    start = load_file(run_dir / "checkpoints" / "step-0" / "model" / "model.safetensors")
    end = load_file(run_dir / "final" / "model.safetensors")
    assert start.keys() == end.keys()
    return {name for name, value in end.items() if not torch.equal(value, start[name])}


def is_norms(name):
    return "norm" in name or ".ln_" in name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_ramp_of_s_begins_as_its_source(sources, tmp_path, family):
    heal(tmp_path / "s", sources / f"{family}-s", *RAMP, "--model.norm_kwargs.lam", "3")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "s" / "checkpoints" / "step-0" / "model")
    stock = AutoModelForCausalLM.from_pretrained(sources / family)
    ids = torch.arange(60).view(2, 30)
    assert {float(norm.lam) for norm in model.modules() if hasattr(norm, "lam")} == {1.0}
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-5)
    assert [row["lam_fraction"] for row in metrics(tmp_path / "s")] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_identity_is_ramped_to_the_lam_that_is_named_in_its_own_standardization(sources, tmp_path, family):
    heal(tmp_path / "run", sources / f"{family}-identity", *RAMP, "--model.norm_kwargs.lam", "3")
    made = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    standardize = {"llama": "rms", "gpt2": "layer"}[family]
    assert (made["norm_kwargs"]["lam"], made["norm_kwargs"]["standardize"]) == (3.0, standardize)
    recipe = tmp_path / "run" / "config.yaml"
    train(read_command_line(["--config", str(recipe), "--run_dir", str(tmp_path / "again")]))
    assert result(tmp_path / "run") == result(tmp_path / "again")


@pytest.mark.parametrize("given", [("--model.norm_type", "null"), ("--model.norm_type", "ibnorm_t")])
def test_a_ramp_over_a_checkpoints_own_norm_resumes_to_the_bit(sources, tmp_path, given):
    flags = ("--model.init_from", str(sources / "llama-t"), *QUICK, *RAMP, *given)
    run(tmp_path / "straight", *flags)
    run_stopped(1, tmp_path / "stopped", *flags)
    run(tmp_path / "stopped", *flags, "--resume", "auto")
    assert result(tmp_path / "stopped") == result(tmp_path / "straight")
    with pytest.raises(UserError, match=r"resume: model.norm_kwargs was"):
        run(tmp_path / "stopped", *flags, "--resume", "auto", "--model.norm_kwargs.lam", "1")


def by_hand(logits, taught, targets, weight, temperature):
    """The loss of distillation, token by token in float64."""
    total = divergence = torch.zeros((), dtype=torch.float64)
    logits, taught = logits.double().view(-1, 7), taught.double().view(-1, 7)
    for row, other, target in zip(logits, taught, targets.view(-1), strict=True):
        if target == IGNORE:
            continue
        p = torch.softmax(other / temperature, 0)
        kl = (p * (p.log() - torch.softmax(row / temperature, 0).log())).sum()
        total = total + (1 - weight) * -torch.log_softmax(row, 0)[target] + weight * temperature**2 * kl
        divergence = divergence + kl
    return total, divergence


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (1.0, 3.0), (0.2, 0.5)])
def test_the_loss_of_distillation_and_its_gradient_are_as_written_by_hand(weight, temperature):
    torch.manual_seed(0)
    logits, taught = (3 * torch.randn(2, 5, 7) for _ in range(2))
    logits.requires_grad_()
    targets = torch.randint(7, (2, 5))
    targets[1, 3:] = IGNORE
    loss, kl = distillation_loss(logits, taught, targets, weight, temperature)
    gradient = torch.autograd.grad(loss, logits)[0]
    expected, divergence = by_hand(logits, taught, targets, weight, temperature)
    assert (loss.item(), kl.item()) == pytest.approx((expected.item(), divergence.item()), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-4, atol=1e-6)
    assert not gradient[1, 3:].any()
    assert not kl.requires_grad


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_identity_has_nothing_to_learn_from_its_source_and_a_damaged_model_has(sources, tmp_path, family):
    teacher = ("--teacher", str(sources / family), "--distillation_weight", "1")
    heal(tmp_path / "same", sources / f"{family}-identity", *teacher, "--max_steps", "2", "--eval_every", "2")
    first = metrics(tmp_path / "same")[0]
    assert abs(first["kl"]) < 1e-6
    assert first["loss"] == pytest.approx(first["kl"], abs=1e-9)
    assert first["grad_norm"] < 1e-4
    damaged = ("--model.norm_kwargs.lam", "20", "--max_steps", "40", "--learning_rate", "3e-3")
    heal(tmp_path / "damaged", sources / f"{family}-t", *teacher, *damaged)
    kl = [row["kl"] for row in metrics(tmp_path / "damaged")]
    assert sum(kl[-10:]) / 10 < 0.8 * kl[0]  # another release draws other weights, and begins elsewhere


def test_a_teacher_changes_nothing_else(sources, tmp_path):
    """The noise drawn, the batches read, and the loss on the text are those of a run without one."""
    flags = ("--model.init_from", str(sources / "gpt2"), "--model.norm_type", "layernormalnorm", *QUICK)
    run(tmp_path / "without", *flags)
    run(tmp_path / "with", *flags, "--teacher", str(sources / "gpt2"), "--distillation_weight", "1e-12")
    for row, other in zip(metrics(tmp_path / "without"), metrics(tmp_path / "with"), strict=True):
        assert all(row[key] == other[key] for key in ("batch_sha", "lr", "tokens"))
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_alone_are_trained_and_everything_else_stays_to_the_bit(sources, tmp_path, family):
    flags = ("--trainable", "norms", "--learning_rate", "1e-2", "--max_steps", "30")
    heal(tmp_path / "run", sources / f"{family}-t", *flags)
    names = moved(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert names == {name for name, _ in model.named_parameters() if is_norms(name)}
    rows = metrics(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert rows[-1]["gain_movement"] > 0
    held = load_file(tmp_path / "run" / "checkpoints" / "step-30" / "training.safetensors")
    assert {name.partition("/")[2] for name in held if name.startswith("exp_avg/")} == names


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_merged_into_what_is_saved(sources, tmp_path, family):
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}[family]
    flags = ("--trainable", "lora", "--lora_rank", "4", "--learning_rate", "1e-2", "--lora_targets", str(targets))
    heal(tmp_path / "run", sources / f"{family}-t", *flags)
    for name in moved(tmp_path / "run"):
        assert is_norms(name) or any(f".{target}.weight" in name for target in targets), name
    assert any(targets[0] in name for name in moved(tmp_path / "run"))
    assert not any("lora" in name for name in load_file(tmp_path / "run" / "final" / "model.safetensors"))
    # The checkpoint's unmerged parts give what its merged model gives.
    wanted = config("unused", "--model.init_from", "x", *flags)
    folder = tmp_path / "run" / "checkpoints" / "step-6"
    whole = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    freeze(model, wanted)
    add_adapters(model, wanted)
    held = load_file(folder / "training.safetensors")
    parts = {name.removeprefix("apart/"): value for name, value in held.items() if name.startswith("apart/")}
    model.load_state_dict(parts, strict=False)
    ids = torch.arange(60).view(2, 30)
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)
    for name, value in merged(model):
        torch.testing.assert_close(value, dict([*whole.named_parameters(), *whole.named_buffers()])[name])


HEALINGS = {
    "adapters and a teacher": ("--trainable", "lora", "--teacher", "TEACHER", "--model.dropout", "0.1"),
    "norms, a teacher and a ramp": ("--trainable", "norms", "--teacher", "TEACHER", *RAMP),
    "adapters of gpt2, recomputed, in bf16": (
        *("--trainable", "lora", "--mixed_precision", "bf16", "--gradient_checkpointing", "true"),
        *("--model.init_from", "GPT2"),
    ),
}


@pytest.mark.parametrize("name", HEALINGS)
def test_a_stopped_healing_resumes_as_if_never_stopped(sources, tmp_path, name):
    places = {"TEACHER": str(sources / "llama"), "GPT2": str(sources / "gpt2-t")}
    flags = [places.get(flag, flag) for flag in HEALINGS[name]]
    flags = ["--model.init_from", str(sources / "llama-t"), "--model.norm_type", "null", *QUICK, *flags]
    run(tmp_path / "straight", *flags)
    run_stopped(1, tmp_path / "stopped", *flags)
    torch.manual_seed(123)
    run(tmp_path / "stopped", *flags, "--resume", "auto")
    assert result(tmp_path / "stopped") == result(tmp_path / "straight")


def test_a_step_is_the_same_however_it_is_accumulated(sources, tmp_path):
    flags = ("--trainable", "lora", "--teacher", str(sources / "llama"), "--distillation_temperature", "2")
    # A block of 512 tokens holds few sequences, the last of them mostly padding.
    flags += ("--block_size", "512", "--max_steps", "12", "--eval_every", "12")
    rows = []
    for name, size, parts in (("whole", "8", "1"), ("parts", "2", "4")):
        split = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", parts)
        heal(tmp_path / name, sources / "llama-t", *flags, *split)
        rows.append([[row[key] for key in ("loss", "kl", "grad_norm")] for row in metrics(tmp_path / name)])
    tokens = [0, *(row["tokens"] for row in metrics(tmp_path / "whole"))]
    assert len({b - a for a, b in pairwise(tokens)}) > 1, "no padded block was met"
    torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]), rtol=1e-5, atol=1e-5)


def lost_in(said):
    return [line for line in said.splitlines() if line.startswith("lost: ")]


def test_trained_weights_that_the_run_has_no_place_for_are_named(sources, tmp_path, capsys):
    few = ("--max_steps", "2", "--max_eval_blocks", "1", "--log_with", "[]")
    run(tmp_path / "biases", "--model.init_from", str(sources / "gpt2"), "--model.norm_type", "rmsnorm", *few)
    assert [line.partition(", values")[0] for line in lost_in(capsys.readouterr().out)] == [
        "lost: 5 trained tensors (bias)"
    ]
    shutil.copytree(sources / "llama", tmp_path / "cut")
    settings = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 1}))
    run(tmp_path / "layer", "--model.init_from", str(tmp_path / "cut"), "--model.norm_type", "dyt", *few)
    (line,) = lost_in(capsys.readouterr().out)
    assert line.startswith("lost: 9 trained tensors (weight), values up to ")
    assert "for which the model has no place: model.layers.1.input_layernorm.weight, " in line
    GPT2LMHeadModel.from_pretrained(sources / "gpt2").save_pretrained(tmp_path / "untrained")
    tensors = load_file(tmp_path / "untrained" / "model.safetensors")
    for name in tensors:
        if is_norms(name) and name.endswith("bias"):
            tensors[name].zero_()
    save_file(tensors, tmp_path / "untrained" / "model.safetensors", {"format": "pt"})
    untrained = ("--model.init_from", str(tmp_path / "untrained"), "--tokenizer", str(sources / "gpt2"))
    run(tmp_path / "nothing", *untrained, "--model.norm_type", "rmsnorm", *few)
    assert lost_in(capsys.readouterr().out) == []


BAD = {
    "model.init_from: got null, must be the directory or name of a checkpoint where trainable is norms": (
        *("--trainable", "norms", "--model.init_from", "null"),
        *("--model.norm_type", "ibnorm_l"),
    ),
    "trainable: got 'norms', but the norms of the model have no parameters": (
        *("--trainable", "norms", "--model.norm_type", "ibnorm_l"),
        *("--model.norm_kwargs.elementwise_affine", "false"),
    ),
    "trainable: got 'embeddings', must be one of": ("--trainable", "embeddings"),
    "lora_rank: got 0": ("--lora_rank", "0"),
    "lora_alpha: got 0, must be > 0": ("--lora_alpha", "0"),
    "lora_targets: got [], must name a layer": ("--lora_targets", "[]"),
    "lora_targets: got 'k_project', allowed are down_proj, gate_proj, k_proj": (
        *("--trainable", "lora", "--lora_targets", "[q_proj, k_project]"),
    ),
    "distillation_weight: got 1.5": ("--distillation_weight", "1.5"),
    "distillation_weight: got 0, must be > 0 with a teacher": ("--teacher", "x", "--distillation_weight", "0"),
    "distillation_temperature: got 0, must be > 0": ("--distillation_temperature", "0"),
    "teacher: got 'nowhere', no such directory": ("--teacher", "nowhere"),
    "a vocabulary of 301, the model has 300": ("--teacher", "VOCABULARY"),
    "whose tokenizer is not the run's": ("--teacher", "TOKENIZER"),
    "which lacks model.layers.1.": ("--teacher", "LACKS"),
    "whose model.layers.1.mlp.up_proj.weight has NaN or infinity: 1 tensors in all": ("--teacher", "NAN"),
    "which lacks model.layers.0.input_layernorm.weight: 1 in all": ("--model.init_from", "NORMLESS"),
    "lam is to end at 0, where it starts; name another with --model.norm_kwargs.lam": ("IDENTITY", *RAMP),
    "model.norm_type: got null, must be a norm's name where model.norm_overrides": (
        *("--model.norm_overrides", "[[norm, dyt]]"),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_named_error_and_nothing_is_written(sources, tmp_path, message):
    flags, source = list(BAD[message]), sources / "llama-t"
    if "IDENTITY" in flags:
        flags.remove("IDENTITY")
        source = sources / "llama-identity"
    with pytest.raises(UserError) as caught:
        heal(tmp_path / "run", source, *(bad_teacher(flag, sources, tmp_path / "teacher") for flag in flags))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def bad_teacher(flag, sources, folder):
    """The directory of a model that cannot teach, or be begun with, for the words that ask for one."""
    if flag not in ("VOCABULARY", "TOKENIZER", "LACKS", "NORMLESS", "NAN"):
        return flag
    shutil.copytree(sources / "llama", folder)
    settings = json.loads((folder / "config.json").read_text())
    if flag == "VOCABULARY":
        (folder / "config.json").write_text(json.dumps({**settings, "vocab_size": 301}))
    elif flag == "TOKENIZER":
        wrap_tokenizer(train_tokenizer(["other text to learn from, quite another " * 9], 280), 64).save_pretrained(
            folder
        )
    else:
        weights = load_file(folder / "model.safetensors")
        gone = {"LACKS": ".layers.1.", "NORMLESS": "layers.0.input_layernorm", "NAN": "nothing"}[flag]
        kept = {name: value for name, value in weights.items() if gone not in name}
        if flag == "NAN":
            kept["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_another_teacher_does_not_go_on(sources, tmp_path):
    shutil.copytree(sources / "llama", tmp_path / "teacher")
    flags = ("--teacher", str(tmp_path / "teacher"))
    flags = ("--model.init_from", str(sources / "llama-t"), "--model.norm_type", "null", *QUICK, *flags)
    run_stopped(1, tmp_path / "run", *flags)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert len(environment["teacher_sha"]) == 64
    model = LlamaForCausalLM.from_pretrained(tmp_path / "teacher")
    model.lm_head.weight.data *= 2
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"resume: the teacher is not what the run began with \(teacher_sha\)"):
        run(tmp_path / "run", *flags, "--resume", "auto")


def test_the_recipe_heals(sources, tmp_path):
    """As the docs give it: from an identity, with its source as the teacher."""
    with pytest.raises(UserError, match="model.init_from: got null, must be the directory or name of a checkpoint"):
        read_command_line(["--config", "heal", "--run_dir", str(tmp_path / "run")])
    flags = ["--model.init_from", str(sources / "llama-identity"), "--model.norm_kwargs.lam", "4"]
    flags += ["--teacher", str(sources / "llama"), "--corpus", "austen", "--max_eval_blocks", "4"]
    few = ["--max_steps", "8", "--lam_warmup_steps", "4", "--warmup_steps", "2", "--block_size", "64"]
    train(read_command_line(["--config", "heal", "--run_dir", str(tmp_path / "run"), *flags, *few]))
    rows = metrics(tmp_path / "run")
    assert rows[0]["kl"] < rows[3]["kl"]
    assert "eval_loss" in rows[-1]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").config.norm_kwargs["lam"] == 4.0
    card = model_card(Run.read(tmp_path / "run"))
    assert "- trained: the norms alone\n" in card
    assert "- teacher: `llama`: the training loss is 0.5 times the cross-entropy" in card


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--trainable", "norms"), "trainable: got norms, allowed with DeepSpeed: all"),
        (("--teacher", "x"), "teacher: got 'x', allowed with DeepSpeed: null"),
    ],
)
def test_deepspeed_is_refused_by_name(flags, message):
    with pytest.raises(UserError) as caught:
        deepspeed_plugin(config("unused", "--model.init_from", "x", *flags))
    assert str(caught.value) == message


def test_adapters_are_refused_where_the_model_is_sharded(monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="trainable: got lora, allowed with FSDP: all, norms"):
        make_accelerator(config("unused", "--model.init_from", "x", "--trainable", "lora"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "trainable"), [("ddp", "norms"), ("ddp", "lora"), ("fsdp2", "norms"), ("fsdp2", "all")]
)
def test_two_processes_heal_as_one_does(sources, tmp_path, kind, trainable):
    flags = ["--model.init_from", str(sources / "llama-t"), "--model.norm_type", "null", "--trainable", trainable]
    flags += ["--teacher", str(sources / "llama"), "--block_size", "512", "--max_steps", "12", "--eval_every", "6"]
    flags += ["--max_eval_blocks", "3", "--per_device_eval_batch_size", "1", "--learning_rate", "3e-3"]
    done = launch(program(tmp_path), kind, "--config", "tiny", "--run_dir", tmp_path / "two", *flags)
    assert done.returncode == 0, done.stderr
    run(tmp_path / "one", *flags, "--gradient_accumulation_steps", "4")
    for row, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in ("loss", "kl", "grad_norm", "gain_movement", "eval_loss"):
            assert (key in row) == (key in other)
            assert other.get(key, 0.0) == pytest.approx(row.get(key, 0.0), rel=1e-5, abs=1e-7), key
    assert moved(tmp_path / "one") == moved(tmp_path / "two")


def test_a_plan_counts_gradients_of_what_is_trained_and_the_teacher(sources):
    flags = ["--config", "tiny", "--run_dir", "unused", "--model.init_from", str(sources / "llama-t")]
    flags += ["--model.norm_type", "null"]
    whole = step_memory(read_command_line(flags))
    norms = step_memory(read_command_line([*flags, "--trainable", "norms"]))
    taught = step_memory(read_command_line([*flags, "--teacher", str(sources / "llama")]))
    assert whole.trained == whole.parameters == norms.parameters
    assert (norms.trained, norms.gradients, norms.optimizer) == (5 * 64, 4 * 5 * 64, 8 * 5 * 64)
    with pytest.raises(ValueError, match="trainable: got 'lora', which cannot be planned"):
        step_memory(read_command_line([*flags, "--trainable", "lora"]))
    stock, rotary = 4 * (whole.parameters - 5 * 32), 64  # RMSNorm has no bias
    assert taught.activations == whole.activations + stock + rotary
    assert norms.flops_per_token < whole.flops_per_token < taught.flops_per_token


def test_the_recipe_is_planned_without_what_cannot_train_it(sources, command):
    flags = ["--model.init_from", str(sources / "llama-identity"), "--teacher", str(sources / "llama")]
    code, out, err = command(plan, "heal", "--device", "t4", "--gpus", "2", *flags, "--block_size", "64")
    assert (code, err) == (0, "")
    assert "fsdp2" in out
    assert "deepspeed" not in out
    assert "320 trained: only these have gradients and optimizer" in out
