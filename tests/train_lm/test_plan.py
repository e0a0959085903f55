"""Planning a run: memory as it was measured, formulas worked out by hand, and a command that says all of it."""

import gc
import re
import shlex

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from train_lm.config import build_model_config, read_command_line, shipped_recipes
from train_lm.distribution import make_accelerator
from train_lm.memory import step_memory
from train_lm.model import speed_up
from train_lm.optim import build_optimizer
from train_lm.plan import MFU, ROOM, Cluster, Plan
from train_lm.plan import main as plan
from train_lm.tasks.language import token_loss
from train_lm.throughput import DEVICES, Device

WIDE = ["--block_size", "256", "--tokenizer_vocab_size", "2048", "--per_device_train_batch_size", "8"]
WIDE += ["--gradient_accumulation_steps", "1", "--per_device_eval_batch_size", "1", "--model.num_hidden_layers", "4"]
WIDE += ["--model.hidden_size", "256", "--model.intermediate_size", "688", "--model.num_attention_heads", "4"]
GPT2 = ["--model.model_type", "gpt2", "--model.norm_type", "layernormalnorm"]
LONG = ["--block_size", "2048", "--model.max_position_embeddings", "2048"]
MEASURED = {
    "llama in float32": ["--model.norm_type", "ibnorm_t"],
    "gpt2 in bfloat16": [*GPT2, "--mixed_precision", "bf16"],
    "llama with recomputed activations": ["--gradient_checkpointing", "true", "--gradient_accumulation_steps", "2"],
    "llama of one long sequence": [*LONG, "--per_device_train_batch_size", "1"],
}


def config(*flags, name="tiny"):
    return read_command_line(["--config", name, "--run_dir", "unused", *flags])


def cluster(device="h100", gpus=1, per_node=8):
    return Cluster.of(device, gpus, per_node, MFU)


def peak_of_real_steps(wanted):
    """Most bytes that torch's allocator had given away at a time, in two steps and all that comes before them."""
    AcceleratorState._reset_state(True)
    accelerator = make_accelerator(wanted)
    # What an earlier profile saw allocated and a reference cycle still holds would be freed in the middle of this one.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model = AutoModelForCausalLM.from_config(build_model_config(wanted), dtype=torch.float32)
        speed_up(model, wanted)
        model, optimizer = accelerator.prepare(model, build_optimizer(model, wanted))
        model.train()
        for _ in range(2):
            for _ in range(wanted.gradient_accumulation_steps):
                size = (2, wanted.per_device_train_batch_size, wanted.block_size)
                accelerator.backward(token_loss(model, *torch.randint(300, size)))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    AcceleratorState._reset_state(True)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "flags",
    [pytest.param(MEASURED[each], marks=[pytest.mark.slow] * bool(i), id=each) for i, each in enumerate(MEASURED)],
)
def test_memory_of_a_step_is_what_was_measured(flags):
    wanted = config(*WIDE, *flags)
    counted, peak = step_memory(wanted), peak_of_real_steps(wanted)
    print(f"counted {counted.total / 1e6:.1f} MB, measured {peak / 1e6:.1f} MB")
    assert counted.total == pytest.approx(peak, rel=0.05)
    assert counted.activations > counted.weights, "too small a batch to test anything"


def test_parts_of_a_model_worked_out_by_hand():
    step = step_memory(config("--model.norm_type", "rmsnorm"))
    width, mlp, layers, rows = 32, 64, 2, 300
    block = 4 * width * width + 3 * width * mlp + 2 * width
    assert (step.block, step.outside) == (block, rows * width + width)
    assert step.parameters == layers * step.block + step.outside
    rotary = 2 * 4 * width // 2 // 2  # two buffers: frequencies of a head, and their original
    assert step.weights == 4 * step.parameters + rotary
    assert (step.gradients, step.optimizer) == (4 * step.parameters, 8 * step.parameters)


def test_half_the_batch_takes_half_the_activations_and_recomputing_takes_less():
    whole, half = (
        step_memory(config(*WIDE, "--per_device_train_batch_size", size), gradients_stay=True) for size in "84"
    )
    assert half.activations == pytest.approx(whole.activations / 2, rel=0.05)
    recomputed = step_memory(config(*WIDE, "--gradient_checkpointing", "true"), gradients_stay=True)
    assert recomputed.activations < 0.6 * whole.activations
    assert recomputed.weights == whole.weights


def test_attention_keeps_no_scores_with_dropout_neither():
    short, dropping = (step_memory(config(*WIDE, *flags)) for flags in ((), ("--model.dropout", "0.1")))
    assert dropping == short


def test_a_large_batch_of_validationcounts():
    usual, large = (step_memory(config(*WIDE, "--per_device_eval_batch_size", size)) for size in ("8", "256"))
    assert large.activations > 2 * usual.activations


def test_counting_draws_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    step_memory(config("--model.norm_type", "layernormalnorm", "--gradient_checkpointing", "true"))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_each_way_holds_is_as_worked_out_by_hand():
    planned = Plan(config(*WIDE), cluster(gpus=4))
    step = step_memory(planned.config, gradients_stay=True)
    n, p = 4, step.parameters
    ddp, fsdp, zero2, zero3 = (planned.estimate(way, planned.config) for way in planned.ways)
    assert (ddp.weights, ddp.gradients, ddp.optimizer, ddp.buffers) == (step.weights, 4 * p, 8 * p, 0)
    assert ddp.total == pytest.approx((16 * p + step.activations) / 1e9, rel=1e-3)
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer) == (step.weights / n, 4 * p / n, 8 * p / n)
    assert fsdp.buffers == 2 * 4 * (step.outside + 2 * step.block)
    assert (zero2.weights, zero2.gradients, zero2.optimizer) == (step.weights, 4 * p / n, 12 * p / n)
    assert (zero3.weights, zero3.buffers - fsdp.buffers) == (step.weights / n, zero2.buffers)


def test_more_gpus_hold_less_each_with_fsdp2_and_as_much_with_ddp():
    held = {}
    for gpus in (2, 4, 8):
        planned = Plan(config(*WIDE), cluster(gpus=gpus))
        for way in ("ddp", "fsdp2"):
            each = planned.estimate(way, planned.config)
            held[way, gpus] = each.weights + each.gradients + each.optimizer
    assert held["fsdp2", 2] == 2 * held["fsdp2", 4] == 4 * held["fsdp2", 8] == held["ddp", 2] / 2
    assert held["ddp", 2] == held["ddp", 8]


def test_fsdp2_gathers_in_float32_and_casts_as_ddp_does():
    planned = Plan(config(*WIDE, "--mixed_precision", "bf16"), cluster(gpus=4))
    ddp, fsdp = (planned.estimate(way, planned.config) for way in ("ddp", "fsdp2"))
    step = planned.count(planned.config, "fsdp2")
    assert fsdp.buffers == 2 * 4 * (step.outside + 2 * step.block)
    assert fsdp.activations == ddp.activations


def test_time_is_arithmetic_plus_adamw_plus_what_communication_does_not_hide(monkeypatch):
    monkeypatch.setitem(DEVICES, "H100", Device(100e12, 50e12, 80, 1e6, 1e-3))
    wanted = config(*WIDE)
    step = step_memory(wanted, gradients_stay=True)
    arithmetic = 8 * 256 * step.flops_per_token / (MFU * 50e12)
    adamw = 28 * step.parameters / 1e15
    alone, two = (Plan(wanted, cluster(gpus=gpus)) for gpus in (1, 2))
    assert alone.estimate("one process", wanted).seconds == pytest.approx(arithmetic + adamw)
    ring = 2 * 4 * step.parameters / 2 / 1e6
    assert two.estimate("ddp", wanted).seconds == pytest.approx(arithmetic / 3 + adamw + ring)
    recomputing = config(*WIDE, "--gradient_checkpointing", "true")
    assert alone.estimate("one process", recomputing).seconds == pytest.approx(4 / 3 * arithmetic + adamw)


def test_advice_is_the_first_that_fits_and_smaller_devices_ask_for_more(monkeypatch):
    flags = ["--model.num_hidden_layers", "2", "--model.hidden_size", "512", "--per_device_train_batch_size", "2"]
    wanted = config(*WIDE, *flags, "--block_size", "64")
    planned = Plan(wanted, cluster(gpus=4))
    candidates = list(planned.candidates())
    ways = [(each.way, each.config.gradient_checkpointing) for each in candidates[:4]]
    assert ways == [("ddp", False), ("ddp", True), ("fsdp2", False), ("fsdp2", True)]
    for each in candidates:
        split = each.config
        assert split.per_device_train_batch_size * split.gradient_accumulation_steps == 2
    assert candidates[-1].config.per_device_train_batch_size == 1
    advised = []
    for memory in (80.0, *(1.001 * each.total / ROOM for each in candidates[:4]), 0.01):
        monkeypatch.setitem(DEVICES, "H100", Device(1e15, 67e12, memory, 3350, 450))
        found = Plan(wanted, cluster(gpus=4), planned.counts).advice()
        advised.append(found and (found.way, found.config.gradient_checkpointing))
    assert advised == [("ddp", False), *ways, None]


PLANNED = [(name, gpus) for name in shipped_recipes() if name != "heal" for gpus in (1, 8, 64)]  # heal has no sizes
QUICK = [("demo", 8), ("gpt2-small", 8)]  # one of each family; the others differ in size


@pytest.mark.parametrize(
    ("name", "gpus"), [pytest.param(*each, marks=[] if each in QUICK else [pytest.mark.slow]) for each in PLANNED]
)
def test_every_recipe_is_planned_and_fits_80_gb_as_it_is(name, gpus, command):
    flags = ["--global_batch_size", "512"] if "gpt2" in name and gpus == 64 else []  # 480 is no multiple of 64
    code, out, err = command(plan, name, "--device", "h100", "--gpus", str(gpus), *flags)
    assert (code, err) == (0, "")
    for column in ("weights", "gradients", "optimizer", "activations", "buffers", "sum", "s a step", "B tokens/day"):
        assert f" {column} " in out
    assert re.search(r"^checkpoint: [\d.]+ GB on disk.*^disk in all: [\d.]+ GB", out, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^(one process|ddp|fsdp2|deepspeed_zero[23]) +\d", out, re.MULTILINE)
    assert rows == (["one process"] if gpus == 1 else ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
    *lines, advice = out.splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert lines[-1].startswith(f"advice: {rows[0]}: ")
    assert f"-m train_lm --config {name} " in advice


@pytest.mark.parametrize(("gpus", "machines", "file"), [(8, 1, "ddp"), (16, 2, "multi_node")])
def test_the_advised_command_is_one_that_accelerate_and_train_lm_take(gpus, machines, file, command):
    flags = ["--model.norm_kwargs", "{lam: 2}", "--gradient_accumulation_steps", "1"]
    _, out, _ = command(plan, "tiny", "--gpus", str(gpus), "--device", "RTX 4090", *flags)
    accelerate, launch, *words = shlex.split(out.splitlines()[-1].replace("RANK", "1").replace("ADDRESS", "127.0.0.1"))
    assert (accelerate, launch) == ("accelerate", "launch")
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.config_file.endswith(f"{file}.yaml")
    assert (arguments.num_processes, arguments.num_machines, arguments.training_script) == (gpus, machines, "train_lm")
    wanted = read_command_line(arguments.training_script_args)
    assert wanted.model.norm_kwargs == {"lam": 2}
    assert wanted.run_dir == "runs/tiny"


@pytest.mark.slow
def test_what_fits_nowhere_says_so_and_what_would_do(command):
    wide = ["--model.hidden_size", "4096", "--model.intermediate_size", "10912", "--model.num_attention_heads", "32"]
    code, out, _ = command(plan, "llama-1b", "--device", "t4", *wide, "--model.num_hidden_layers", "4")
    assert code == 0
    *_, said = out.splitlines()
    assert said.startswith("nothing fits: one process --gradient_checkpointing true --per_device_train_batch_size 1 ")
    assert said.endswith("; what would do: 1 × l4 or 4 × t4 with fsdp2 or a smaller model or block_size")
    assert "t4 has no tensor cores for bf16" in out


def test_fsdp2_is_not_planned_in_fp16_which_train_lm_refuses(command):
    _, out, _ = command(plan, "tiny", "--gpus", "2", "--device", "t4", "--mixed_precision", "fp16")
    assert "fsdp2" not in out.replace("with fsdp2", "")


BAD = {
    "device: got 'h101', must be one of b200, h200, .* (did you mean 'h100'?)": ["tiny", "--device", "h101"],
    "config: got 'llama-2b', no such file": ["llama-2b", "--device", "t4"],
    "global_batch_size: got 512, must be a multiple of the number of processes, 7": [
        "llama-1b",
        "--device",
        "t4",
        "--gpus",
        "7",
    ],
    "gpus: got 0": ["tiny", "--device", "t4", "--gpus", "0"],
    "gpus: got 12, must be a multiple of gpus_per_node = 8, or less": ["tiny", "--device", "t4", "--gpus", "12"],
    "mfu: got 2.0": ["tiny", "--device", "t4", "--mfu", "2"],
    "unrecognized arguments: --gpsu": ["tiny", "--device", "t4", "--gpsu", "2"],
    "device": ["tiny"],
    "norm_type: unknown norm 'x'": ["tiny", "--device", "t4", "--model.norm_type", "x"],
    "model.init_from: got 'nowhere'": ["tiny", "--device", "t4", "--model.init_from", "nowhere"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message, command):
    code, out, err = command(plan, *BAD[message])
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(part in err for part in message.split(" .* "))
