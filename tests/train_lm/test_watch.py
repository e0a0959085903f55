"""What can be watched while a run goes: trackers, pictures, and figures of speed that mean what they say."""

import json
import re
import shutil
import sys
import types

import pytest
import torch
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import config, metrics, run, run_stopped, small_corpus
from transformers import AutoModelForCausalLM

from hf_ibnorm.base.errors import UserError
from train_lm.config import build_model_config
from train_lm.flops import flops_per_token
from train_lm.plot import main as plot
from train_lm.throughput import peak_flops

pytestmark = pytest.mark.usefixtures(small_corpus.__name__)


def scalars(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_step_once_across_a_resume(tmp_path):
    run_stopped(3, tmp_path / "run", "--checkpoint_every", "2")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    run(tmp_path / "run", "--checkpoint_every", "2", "--resume", "auto")
    logged, rows = scalars(tmp_path / "run"), metrics(tmp_path / "run")
    for name in ("loss", "lr", "grad_norm", "gain_movement", "tokens"):
        assert logged[name] == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    assert [step for step, _ in logged["eval_loss"]] == [5, 10]
    assert "mfu" not in logged


def test_off_a_terminal_there_is_a_line_every_so_many_seconds(tmp_path, capsys):
    run(tmp_path / "often", "--progress_seconds", "1e-6")
    often = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(often) == 10
    assert re.fullmatch(r"step      1  loss \d\.\d{4}  [\d,]+ tokens/s", often[0])
    assert re.fullmatch(r"step      4  loss \d\.\d{4}  [\d,]+ tokens/s  left 0:00:0\d", often[3])
    assert re.fullmatch(r"step      5  loss \d\.\d{4}  validation \d\.\d{4}  [\d,]+ tokens/s  left 0:00:0\d", often[4])
    for name, seconds in (("seldom", "3600"), ("never", "0")):
        run(tmp_path / name, "--progress_seconds", seconds)
        seldom = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
        assert [line.split()[1] for line in seldom] == ["5", "10"]


def test_no_tracker_may_be_wanted(tmp_path):
    run(tmp_path / "run", "--log_with", "[]")
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("wandb", "log_with: got 'wandb', which is not installed: pip install wandb"), ("tensorbord", "did you mean")],
)
def test_a_tracker_that_cannot_be_had_is_an_error_before_training(tmp_path, name, message):
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", "--log_with", f"[{name}]")
    assert message in str(caught.value) or "allowed are tensorboard" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for W&B's module, which is not installed here: what `init` was given, and the steps it was told."""
    module = types.ModuleType("wandb")
    module.given, module.steps, module.config = [], [], {}

    def init(**given):
        module.given.append(given)
        finish = lambda: None  # noqa: E731
        return types.SimpleNamespace(log=lambda values, step: module.steps.append(step), finish=finish)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    return module


def test_a_resumed_run_is_the_same_one_at_wandb(tmp_path, wandb):
    flags = ["--log_with", "[tensorboard, wandb]", "--tracker_project", "mine"]
    run_stopped(3, tmp_path / "run", *flags)
    run(tmp_path / "run", *flags, "--resume", "auto")
    run(tmp_path / "other", *flags, "--max_steps", "2")
    first, second, other = wandb.given
    assert first == second == {"project": "mine", "id": first["id"], "resume": "allow"}
    assert other["id"] != first["id"]
    assert sorted({*wandb.steps}) == list(range(1, 11))
    assert wandb.config["max_steps"] == 2
    assert scalars(tmp_path / "run")["loss"], "TensorBoard's folder is not named after the project"
    (tmp_path / "run" / "wandb_id").write_text("two\nlines of something else")
    shutil.rmtree(tmp_path / "run" / "final")
    with pytest.raises(UserError, match=r"log_with: a tracker cannot start: .*wandb_id holds no id of a run"):
        run(tmp_path / "run", *flags, "--resume", "auto")


def test_a_tracker_that_does_not_start_is_an_error_in_one_line(tmp_path):
    run(tmp_path / "run", "--max_steps", "2", "--log_with", "[]")
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "tensorboard").write_text("mine")
    with pytest.raises(UserError, match=r"log_with: a tracker cannot start: .*tensorboard"):
        run(tmp_path / "run", "--max_steps", "2", "--resume", "auto")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_the_formula(tmp_path, family, tied):
    wanted = config(
        tmp_path,
        "--model.model_type",
        family,
        "--model.tie_word_embeddings",
        str(tied).lower(),
        "--model.norm_type",
        "rmsnorm",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_model_config(wanted, 300, 0))
    layers, width, inner, length = 2, 32, 64, 32
    block = 4 * width * width + (3 if family == "llama" else 2) * width * inner
    by_hand = 6 * (layers * block + 300 * width) + 12 * layers * width * length
    # Of rotary embeddings torch counts a few more.
    assert flops_per_token(model, length) == pytest.approx(by_hand, rel=0.005)
    assert model.config._attn_implementation == "sdpa"


def test_peak_flops_are_known_for_known_devices_only():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA L40S", "no") == 91.6e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "no") == 19.5e12
    for unknown in ("AMD EPYC", "NVIDIA L40", "NVIDIA RTX A4000", "NVIDIA T400"):
        assert peak_flops(unknown, "no") is None


def test_an_unknown_device_says_that_it_is_and_mfu_is_null(tmp_path, capsys):
    run(tmp_path / "run", "--max_steps", "2")
    assert "peak FLOP/s unknown, so no MFU" in capsys.readouterr().out
    assert [row["mfu"] for row in metrics(tmp_path / "run")] == [None, None]


def test_mfu_of_a_known_device_follows_from_the_speed(tmp_path, monkeypatch):
    monkeypatch.setattr("train_lm.session.device_name", lambda accelerator: "NVIDIA T4")
    run(tmp_path / "run", "--max_steps", "2")
    wanted = config(tmp_path)
    model = AutoModelForCausalLM.from_config(build_model_config(wanted, 300, 0))
    for row in metrics(tmp_path / "run"):
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops_per_token(model, 32) / 8.1e12)
        assert 0.05 < row["memory_gb"] < 20


def test_a_picture_of_several_runs_finished_or_not(tmp_path, command):
    for name, norm in (("a", "rmsnorm"), ("b", "ibnorm_t")):
        run(tmp_path / name, "--model.norm_type", norm)
    shutil.rmtree(tmp_path / "b" / "final")
    rows = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    torn = {**json.loads(rows[6]), "loss": None, "skipped": 1}
    lines = [*rows[:6], json.dumps(torn)]
    (tmp_path / "b" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')
    output = tmp_path / "pictures" / "both.png"
    code, out, _ = command(plot, str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(output))
    assert code == 0
    assert out.endswith(f"\n{output}\n")
    assert output.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_no_run_is_one_line(tmp_path, command):
    code, _, err = command(plot, str(tmp_path / "none"), "--output", str(tmp_path / "x.png"))
    assert code == 2
    assert err == f"error: run: {tmp_path / 'none'} is not a run directory (it has no config.yaml)\n"
    assert not (tmp_path / "x.png").exists()
