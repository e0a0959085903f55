"""One training, however it is spread: the shipped config files, DDP, FSDP2, several machines; and what speeds it up."""

import json
import shutil
import signal
import time
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from launching import CONFIGS, free_port, launch, needs_deepspeed, program, start
from safetensors.torch import load_file, save_file
from training import config, killed, metrics, result, run, small_corpus, steps, without_timing
from transformers import AutoModelForCausalLM

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.base.manifest import damage
from hf_ibnorm.swap.optim import no_decay_parameter_names
from train_lm.distribution import make_accelerator, sharding

pytestmark = pytest.mark.usefixtures(small_corpus.__name__)

NOISE = ("--model.norm_type", "layernormalnorm")
KINDS = ("ddp", "fsdp2")
ZERO = [pytest.param(f"deepspeed_zero{stage}", marks=[needs_deepspeed, pytest.mark.slow]) for stage in (2, 3)]
# Of parameters as small as these ZeRO-3 would shard none.
SHARD_ALL = "import train_lm.distribution\ntrain_lm.distribution.PERSISTENT = 0"


@pytest.fixture
def script(tmp_path):
    return program(tmp_path, SHARD_ALL)


def losses(run_dir, *keys):
    return {key: [row[key] for row in metrics(run_dir) if key in row] for key in keys}


def assert_same_training(one, other, rel, keys=("loss", "grad_norm", "eval_loss", "gain_movement")):
    assert [row["batch_sha"] for row in metrics(one)] == [row["batch_sha"] for row in metrics(other)]
    first, second = losses(one, *keys), losses(other, *keys)
    assert first["eval_loss"]
    for key in keys:
        assert second[key] == pytest.approx(first[key], rel=rel, abs=1e-7), key


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_accelerate_itself_loads_every_shipped_config_file(name, monkeypatch):
    path = CONFIGS / f"{name}.yaml"
    loaded = load_config_from_file(str(path))  # unknown keys are an error there
    for key, value in yaml.safe_load(path.read_text()).items():
        now = getattr(loaded, key)
        assert getattr(now, "value", now) == value
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "train_lm"])
    arguments, *_ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(loaded.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(arguments)[1]
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name[-1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (name == "fsdp2")
    assert (environment.get("ACCELERATE_USE_DEEPSPEED") == "true") == name.startswith("deepspeed")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    plugin = sharding("bf16")
    assert (plugin is None) == (name != "fsdp2")
    if plugin is not None:
        assert plugin.reshard_after_forward is True
        assert plugin.mixed_precision_policy.param_dtype is plugin.mixed_precision_policy.reduce_dtype is None


REFUSED = {
    "fsdp_version: got 1": {"FSDP_VERSION": "1"},
    "fsdp_cpu_ram_efficient_loading: got True": {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    "fsdp_activation_checkpointing: got True, allowed with FSDP: False; set gradient_checkpointing in the recipe": {
        "FSDP_ACTIVATION_CHECKPOINTING": "true"
    },
    "fsdp_offload_params: got True": {"FSDP_OFFLOAD_PARAMS": "true"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_launcher_asks_for_and_is_not_done_is_refused_by_name(message, monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **REFUSED[message]}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"launcher: {message}"):
        sharding("no")


def test_fp16_is_refused_where_the_model_is_sharded(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="mixed_precision: got fp16, allowed with FSDP: no, bf16"):
        sharding("fp16")


@pytest.mark.parametrize(
    ("processes", "size", "expected"),
    [(1, 64, (64, 8)), (2, 64, (64, 4)), (8, 64, (64, 1)), (8, 512, (64, 1)), (3, 8, (8, 20)), (7, 5, None)],
)
def test_a_global_batch_is_dealt_out_to_any_number_of_processes(processes, size, expected):
    total = 480 if processes == 3 else 512
    asked = config("unused", "--global_batch_size", str(total), "--per_device_train_batch_size", str(size))
    if expected is None:
        with pytest.raises(ValueError, match="global_batch_size: got 512, must be a multiple of .* processes, 7"):
            asked.spread_over(processes)
        return
    spread = asked.spread_over(processes)
    assert (spread.per_device_train_batch_size, spread.gradient_accumulation_steps) == expected
    assert spread.spread_over(processes) == spread


def test_one_process_takes_the_global_batch_and_says_how(tmp_path):
    run(tmp_path / "a", "--gradient_accumulation_steps", "2")
    run(tmp_path / "b", "--global_batch_size", "8")
    assert result(tmp_path / "a")[1] == result(tmp_path / "b")[1]
    recipe = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert (recipe["per_device_train_batch_size"], recipe["gradient_accumulation_steps"]) == (4, 2)
    with pytest.raises(UserError, match="global_batch_size: got 0"):
        run(tmp_path / "c", "--global_batch_size", "0")


def test_the_patience_of_processes_with_each_other_is_set():
    AcceleratorState._reset_state(True)
    made = make_accelerator(config("unused", "--ddp_timeout", "90"))
    assert made.init_handler.timeout == timedelta(seconds=90)
    for value in ("0", "1e20"):
        with pytest.raises(UserError, match="ddp_timeout: got "):
            config("unused", "--ddp_timeout", value)


def few_blocks(*flags):
    """Flags of a run of 20 steps whose last block is mostly padding, so that micro-batches have unequal tokens, and
    whose 3 blocks of validation are an unequal share for two processes."""
    sizes = ["--block_size", "512", "--per_device_eval_batch_size", "1", "--per_device_train_batch_size", "4"]
    return [*sizes, "--max_steps", "20", "--eval_every", "10", "--learning_rate", "3e-3", *flags]


@pytest.mark.parametrize("kind", [*KINDS, *ZERO])
def test_two_processes_train_as_one_with_twice_the_batch_does(tmp_path, kind):
    # Each process notes how much of the model it holds once that is spread.
    probe = f"""import train_lm.distribution, train_lm.session
original = train_lm.session.settle_buckets
def noting(model, task, accelerator):
    held = sum(train_lm.distribution.mine(each).numel() for each in accelerator.unwrap_model(model).parameters())
    with open({str(tmp_path / "held-")!r} + str(accelerator.process_index), "w") as file:
        print(held, file=file)
    original(model, task, accelerator)
train_lm.session.settle_buckets = noting"""
    script = program(tmp_path, f"{SHARD_ALL}\n{probe}")
    done = launch(script, kind, "--config", "tiny", "--run_dir", tmp_path / kind, *few_blocks())
    assert done.returncode == 0, done.stderr
    run(tmp_path / "one", *few_blocks("--gradient_accumulation_steps", "4"))
    tokens = [0, *losses(tmp_path / "one", "tokens")["tokens"]]
    assert {after - before for before, after in pairwise(tokens)} > {16 * 512}, "no padded block was met"
    assert_same_training(tmp_path / "one", tmp_path / kind, rel=1e-5)
    assert json.loads((tmp_path / kind / "environment.json").read_text())["num_processes"] == 2
    state = json.loads((tmp_path / kind / "checkpoints" / "step-0" / "state.json").read_text())
    assert state["distribution"] == kind.removeprefix("deepspeed_")
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", kind))
    parameters = sum(value.numel() for name, value in one.items() if not name.endswith(".lam"))  # λ is in a buffer
    held = [int((tmp_path / f"held-{process}").read_text()) for process in (0, 1)]
    assert held == [parameters, parameters] if kind in ("ddp", "deepspeed_zero2") else sum(held) == parameters
    assert max(held) < 0.6 * parameters or kind in ("ddp", "deepspeed_zero2")
    assert one.keys() == two.keys()
    assert all(one[name].shape == two[name].shape for name in one)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / kind / "final").config.norm_type == "ibnorm_l"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", ZERO[1]])
@pytest.mark.parametrize("flags", [("--model.model_type", "gpt2"), ("--mixed_precision", "bf16")])
def test_both_families_and_bfloat16_are_sharded(tmp_path, script, kind, flags):
    done = launch(script, kind, "--config", "tiny", "--run_dir", tmp_path / "two", *few_blocks(*flags))
    assert done.returncode == 0, done.stderr
    run(tmp_path / "one", *few_blocks("--gradient_accumulation_steps", "4", *flags))
    assert_same_training(tmp_path / "one", tmp_path / "two", rel=1e-3 if "bf16" in flags else 1e-5)
    final = load_file(tmp_path / "two" / "final" / "model.safetensors")
    assert {value.dtype for value in final.values()} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "final")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "checkpoints" / "step-0" / "model")
    gains = [name for name in no_decay_parameter_names(model) if name.endswith("norm.weight") or ".ln_" in name]
    assert gains
    assert all(not torch.equal(model.get_parameter(name), start.get_parameter(name)) for name in gains)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *ZERO])
def test_a_run_stopped_under_a_launcher_resumes_to_the_bit(tmp_path, script, kind):
    # Validation at every step: each checkpoint then follows a forward pass without a backward one.
    flags = ["--config", "tiny", *NOISE, "--max_steps", "60", "--eval_every", "1", "--max_eval_blocks", "1"]
    flags += ["--checkpoint_every", "7", "--resume", "auto", "--model.dropout", "0.1"]
    done = launch(script, kind, *flags, "--run_dir", tmp_path / "straight")
    assert done.returncode == 0, done.stderr
    begun = start(script, kind, *flags, "--run_dir", tmp_path / "stopped")
    path, end = tmp_path / "stopped" / "metrics.jsonl", time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") > 3):
        assert begun.poll() is None, begun.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    begun.send_signal(signal.SIGTERM)
    begun.communicate(timeout=30)
    found = (name.partition("step-")[2] for name in steps(tmp_path / "stopped"))
    stopped = max(int(step) for step in found if step)
    assert stopped < 60, "the signal came too late to test anything"
    # Of a step whose validation was cut short the metrics wait in the checkpoint.
    assert stopped - len(metrics(tmp_path / "stopped")) in (0, 1)
    done = launch(script, kind, *flags, "--run_dir", tmp_path / "stopped")
    assert f"going on after step-{stopped}" in done.stdout
    assert result(tmp_path / "stopped") == result(tmp_path / "straight")


@pytest.mark.slow
def test_a_sharded_run_killed_at_any_moment_resumes_to_the_bit(tmp_path):
    counts = killed(tmp_path, "--kills", "6", "--fsdp", "--seed", "3")
    assert counts["identical"] == counts["runs"] >= 1


@pytest.mark.slow
@needs_deepspeed
def test_a_checkpoint_goes_on_under_any_kind_of_distribution(tmp_path, script):
    flags = ["--config", "tiny", "--max_eval_blocks", "4", "--global_batch_size", "8", "--max_steps", "12"]
    flags += ["--checkpoint_every", "2", "--eval_every", "2", "--keep_last", "9", "--resume", "auto"]
    run_dir = tmp_path / "passed-on"
    done = launch(script, "fsdp2", *flags, "--run_dir", tmp_path / "straight")
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "straight", run_dir)
    # Each goes on from a checkpoint that another kind has written.
    for step, kind, processes in (
        (2, "ddp", 2),
        (4, "deepspeed_zero3", 2),
        (6, "fsdp2", 4),
        (8, "deepspeed_zero2", 2),
        (10, None, 1),
    ):
        shutil.rmtree(run_dir / "final")
        for later in range(step + 2, 13, 2):
            shutil.rmtree(run_dir / "checkpoints" / f"step-{later}")
        if kind is None:
            run(run_dir, *flags[2:])
        else:
            done = launch(script, kind, *flags, "--run_dir", run_dir, processes=processes)
            assert done.returncode == 0, done.stderr
            assert f"going on after step-{step}" in done.stdout
            assert "become" in done.stdout
        assert_same_training(tmp_path / "straight", run_dir, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *ZERO])
def test_a_loss_that_is_not_finite_in_one_process_skips_the_step_in_all(tmp_path, kind):
    # The loss alone: its gradients stay finite. A step has two micro-batches, and DDP's buckets are settled before.
    third_step = 5 + (kind == "ddp")
    probe = f"""import torch.distributed, train_lm.tasks.language
original, calls = train_lm.tasks.language.token_loss, []
def spoiled(model, inputs, targets):
    loss = original(model, inputs, targets)
    calls.append(1)
    if len(calls) == {third_step} and torch.distributed.get_rank() == 1:
        loss = loss + float("inf")
    return loss
train_lm.tasks.language.token_loss = spoiled"""
    script = program(tmp_path, f"{SHARD_ALL}\n{probe}")
    flags = ["--config", "tiny", "--run_dir", tmp_path / "run", "--checkpoint_every", "0", "--eval_every", "10"]
    done = launch(script, kind, *flags, "--max_eval_blocks", "1")
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "skipped" in row] == [3]
    assert rows[2]["loss"] is None
    assert rows[2]["gain_movement"] > 0
    assert rows[3]["gain_movement"] == rows[2]["gain_movement"]  # as of the start of the step
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, ZERO[1]])
def test_noise_differs_between_processes_and_comes_again_on_resume(tmp_path, kind):
    # Every token is the same, so that without noise both processes would see the same. Each notes what its norms give,
    # in a file of its own: on a shared standard output lines of two processes can run together.
    probe = f"""from accelerate import PartialState
import train_lm.tasks.language
loss = train_lm.tasks.language.token_loss
train_lm.tasks.language.token_loss = lambda model, inputs, targets: loss(model, inputs * 0 + 7, targets * 0 + 8)
import hf_ibnorm.norms as norms
forward = norms.LayerNormalNorm.forward
def noting(self, x):
    out = forward(self, x)
    if self.training and x.requires_grad:
        with open({str(tmp_path / "noise-")!r} + str(PartialState().process_index), "a") as file:
            print(float(out.detach().double().sum()), file=file)
    return out
norms.LayerNormalNorm.forward = noting"""
    script = program(tmp_path, f"{SHARD_ALL}\n{probe}")
    flags = ["--config", "tiny", "--run_dir", tmp_path / "run", *NOISE, "--max_steps", "4", "--checkpoint_every", "2"]
    flags += ["--eval_every", "4", "--max_eval_blocks", "1", "--resume", "auto"]
    assert launch(script, kind, *flags).returncode == 0
    first = [(tmp_path / f"noise-{i}").read_text().split() for i in (0, 1)]
    assert len(first[0]) == len(first[1]) > 20
    settling = 5 if kind == "ddp" else 0  # what DDP does before generators are set apart
    assert first[0][:settling] == first[1][:settling]
    assert not set(first[0][settling:]) & set(first[1][settling:])
    for name in ("final", "checkpoints/step-4"):
        shutil.rmtree(tmp_path / "run" / name)
    for i in (0, 1):
        (tmp_path / f"noise-{i}").unlink()
    assert launch(script, kind, *flags).returncode == 0
    for i in (0, 1):
        again = (tmp_path / f"noise-{i}").read_text().split()
        assert again[-20:] == first[i][-20:]


def machines(script, port, folders, *flags, codes=(0, 0)):
    """A run on two machines with a process each and no file system in common: here, in two folders of this one."""
    started = []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        launcher = ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        started.append(start(script, "multi_node", *flags, launcher=launcher, cwd=folder))
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [*codes], said
    return said


@pytest.mark.slow
def test_two_machines_train_and_resume_without_a_shared_file_system(tmp_path, script):
    folders = [tmp_path / "a", tmp_path / "b"]
    flags = ["--config", "tiny", "--run_dir", "run", *NOISE, "--gradient_accumulation_steps", "1", "--resume", "auto"]
    machines(script, free_port(), folders, *flags)
    assert (tmp_path / "a" / "run" / "final").is_dir()
    assert not (tmp_path / "b" / "run").exists()
    expected = result(tmp_path / "a" / "run")
    for name in ("final", "checkpoints/step-10"):
        shutil.rmtree(tmp_path / "a" / "run" / name)
    said = machines(script, free_port(), folders, *flags)
    assert "going on after step-5" in said[0][0]
    assert result(tmp_path / "a" / "run") == expected
    assert [path.name for path in (tmp_path / "b" / "run" / "checkpoints").iterdir()] == ["step-5"]


def flipped(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("harm", [flipped, pytest.param(cut, marks=pytest.mark.slow)])
def test_each_machine_verifies_its_own_copy_of_a_checkpoint_and_gets_a_damaged_one_anew(tmp_path, script, harm):
    flags = ["--global_batch_size", "8", "--max_eval_blocks", "2"]
    run(tmp_path / "a" / "run", *flags)
    for name in ("final", "checkpoints/step-10"):
        shutil.rmtree(tmp_path / "a" / "run" / name)
    copy = tmp_path / "b" / "run" / "checkpoints" / "step-5"
    shutil.copytree(tmp_path / "a" / "run" / "checkpoints" / "step-5", copy)
    harm(copy / "training.safetensors")
    flags = ["--config", "tiny", "--run_dir", "run", *flags, "--resume", "auto"]
    said = machines(script, free_port(), [tmp_path / "a", tmp_path / "b"], *flags)
    assert "going on after step-5" in said[0][0]
    assert damage(copy) is None


@pytest.mark.slow
def test_machines_that_begin_with_different_copies_of_a_checkpoint_are_stopped(tmp_path, script):
    # In a norm, which the hash of the initial weights that all norms share leaves out.
    run(tmp_path / "a" / "begin", "--max_steps", "2")
    shutil.copytree(tmp_path / "a" / "begin" / "final", tmp_path / "b" / "begin" / "final")
    file = tmp_path / "b" / "begin" / "final" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1
    save_file(weights, file, {"format": "pt"})
    flags = ["--config", "tiny", "--run_dir", "run", "--model.init_from", "begin/final", "--model.norm_type", "null"]
    said = machines(script, free_port(), [tmp_path / "a", tmp_path / "b"], *flags, codes=[1, 1])
    assert "error: model: weights before the first step on process 1 are not those of process 0" in said[0][1]
    assert not (tmp_path / "a" / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_go_on_with_different_values_are_stopped(tmp_path, kind):
    # As memory that flips a bit would have it, after the files were verified.
    probe = """import os, train_lm.checkpoint
original = train_lm.checkpoint.load_file
def flipping(path):
    tensors = original(path)
    next(iter(tensors.values())).view(-1)[0] += int(os.environ["RANK"])
    return tensors
train_lm.checkpoint.load_file = flipping"""
    flags = ["--config", "tiny", "--global_batch_size", "8", "--max_eval_blocks", "2", "--resume", "auto"]
    run(tmp_path / "run", *flags[2:])
    for name in ("final", "checkpoints/step-10"):
        shutil.rmtree(tmp_path / "run" / name)
    done = launch(program(tmp_path, probe), kind, *flags, "--run_dir", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("error: resume: weights and optimizer states on process 1 are not those of process 0") == 1
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.slow
@needs_deepspeed
def test_what_zero_does_not_do_is_refused_in_one_line(tmp_path, script):
    for flags, message in (
        (["--compile", "true"], "compile: got true, allowed with DeepSpeed's ZeRO-3: false"),
        (["--mixed_precision", "fp16"], "mixed_precision: got 'fp16', which needs a GPU"),
    ):
        done = launch(script, "deepspeed_zero3", "--config", "tiny", "--run_dir", tmp_path / "run", *flags)
        assert done.returncode != 0
        assert done.stderr.count("error: ") == 1
        assert f"error: {message}" in done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_finished_run_is_finished_under_any_number_of_processes(tmp_path, script):
    flags = ["--config", "tiny", "--global_batch_size", "8", "--max_steps", "2", "--resume", "auto"]
    done = launch(script, "ddp", *flags, "--run_dir", tmp_path / "run", "--max_eval_blocks", "2")
    assert done.returncode == 0, done.stderr
    run(tmp_path / "run", *flags[2:], "--max_eval_blocks", "2")
    with pytest.raises(UserError, match="learning_rate was 0.001, got 0.1"):
        run(tmp_path / "run", *flags[2:], "--max_eval_blocks", "2", "--learning_rate", "0.1")


def test_recomputing_activations_changes_no_bit_with_noise_or_dropout(tmp_path):
    for name, flags in {"plain": (), "recomputed": ("--gradient_checkpointing", "true")}.items():
        run(tmp_path / name, *NOISE, "--model.dropout", "0.1", *flags)
    assert result(tmp_path / "plain") == result(tmp_path / "recomputed")


def test_recomputing_really_happens(tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(self.training) or forward(self, x))
    counts = {}
    for name, flags in {"plain": (), "recomputed": ("--gradient_checkpointing", "true")}.items():
        calls.clear()
        run(tmp_path / name, "--max_steps", "2", *flags)
        counts[name] = sum(calls)
    assert counts["recomputed"] == 2 * counts["plain"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["rmsnorm", "ibnorm_t", "layernormalnorm"])
def test_compiled_blocks_train_alike_and_leave_the_same_files(tmp_path, norm):
    flags = ["--model.norm_type", norm]
    if norm == "layernormalnorm":
        flags += ["--model.norm_kwargs.noise", "0"]
    run(tmp_path / "eager", *flags)
    run(tmp_path / "compiled", *flags, "--compile", "true")
    assert_same_training(tmp_path / "eager", tmp_path / "compiled", rel=1e-4, keys=("loss", "eval_loss"))
    eager, compiled = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    for name in ("final", "checkpoints/step-10"):
        shutil.rmtree(tmp_path / "compiled" / name)
    before = without_timing(metrics(tmp_path / "compiled"))
    run(tmp_path / "compiled", *flags, "--compile", "true", "--resume", "auto")
    assert without_timing(metrics(tmp_path / "compiled")) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_train_alike_in_two_processes(tmp_path, script, kind):
    flags = ["--config", "tiny", "--model.norm_type", "ibnorm_t"]
    for name, more in {"eager": (), "compiled": ("--compile", "true", "--gradient_checkpointing", "true")}.items():
        done = launch(script, kind, *flags, *more, "--run_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "eager", tmp_path / "compiled", rel=1e-4, keys=("loss", "eval_loss"))
