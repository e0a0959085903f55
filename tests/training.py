"""What the tests of training share: small runs in this process, their results, and signals that come at a step."""

import json
import os
import signal
import subprocess
from functools import cache
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel
from warm import python

from hf_ibnorm import data
from hf_ibnorm.base.errors import Stopped
from train_lm.config import read_command_line
from train_lm.metrics import MEASURED
from train_lm.train import train


@cache
def pages(corpus, split):
    """The first pages of each split: the loop does not care, and a tokenizer trains in no time."""
    return [text[: 20_100 if split == "train" else 2_000] for text in data.load_corpus(corpus, split)[:2]]


@pytest.fixture
def small_corpus(monkeypatch):
    monkeypatch.setattr("train_lm.corpus.load_corpus", pages)
    AcceleratorState._reset_state(True)  # one process may not change its precision
    yield
    AcceleratorState._reset_state(True)


def config(run_dir, *flags):
    return read_command_line(["--config", "tiny", "--run_dir", str(run_dir), *flags])


def run(run_dir, *flags):
    AcceleratorState._reset_state(True)
    return train(config(run_dir, *flags))


def run_on_pages(run_dir, *flags):
    """The same for a fixture of a whole file, which comes before `small_corpus`; returns the run directory."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("train_lm.corpus.load_corpus", pages)
        run(run_dir, *flags)
    return run_dir


def metrics(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def without_timing(rows):
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def result(run_dir):
    """What two runs must have in common to be the same to the bit."""
    final = Path(run_dir) / "final"
    return without_timing(metrics(run_dir)), {path.name: path.read_bytes() for path in final.iterdir()}


def run_stopped(step, run_dir, *flags, number=signal.SIGTERM):
    """Run until a signal that comes once `step` is noted down; the checkpoint is one of the step after it."""

    def send_signal(module, _inputs):
        if isinstance(module, PreTrainedModel) and module.training and len(metrics(run_dir)) == step:
            hook.remove()
            os.kill(os.getpid(), number)

    hook = register_module_forward_pre_hook(send_signal)
    try:
        with pytest.raises(Stopped, match=f"after step {step + 1}"):
            run(run_dir, *flags)
    finally:
        hook.remove()


def steps(run_dir):
    """Names in the folder of checkpoints."""
    return sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())


def killed(folder, *flags):
    """Run the program that kills and resumes trainings; returns its counts."""
    program = [python(), str(Path(__file__).with_name("killing.py")), "--folder", str(folder), *flags]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
