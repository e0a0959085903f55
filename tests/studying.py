"""What the tests of studies share: small ones whose trainings and suites run in this process."""

import atexit
import contextlib
import io
import json
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState

import eval.study.folder
import eval.study.jobs
from eval.runner import run as score
from eval.study.folder import Folder
from eval.study.jobs import work
from eval.study.plan import parse_study
from eval.study.run import run_study
from eval.study.writing import write_report
from hf_ibnorm.base.errors import UserError
from hf_ibnorm.base.files import sha256
from train_lm.config import read_command_line
from train_lm.train import train

TINY = {
    "recipe": "tiny",
    "set": {"max_steps": 6, "eval_every": 3, "warmup_steps": 1, "log_with": [], "checkpoint_every": 0},
    "norms": ["rmsnorm", "layernorm"],
    "learning_rates": [0.001, 0.02],
    "seeds": [0, 1, 2],
}


def study(**fields):
    """A tiny study with these fields of its file."""
    content = {**TINY, **fields}
    return parse_study("tiny", content, yaml.safe_dump(content))


KEPT = Path(tempfile.mkdtemp(prefix="hf_ibnorm_trainings_"))
"""Runs of `_train_once`, each in a folder that its flags name."""
atexit.register(shutil.rmtree, KEPT, ignore_errors=True)


class Here:
    """An executor that carries a job out at once, in this process."""

    def __init__(self, room=1 << 30):
        self.left = room
        self.jobs = []

    def room(self):
        return self.left > 0

    def submit(self, job):
        self.left -= 1
        self.jobs.append(job.name)
        future = Future()
        future.set_result(work(job))
        return future

    def cancel(self, future):
        pass

    def close(self):
        pass


def call(words, job, stopping):
    """The program that `words` start, in this process: its exit code and last line."""
    module = words.index("-m") + 1
    rest = list(words[module + 1 :])
    try:
        if words[module] == "train_lm":
            _train_once(rest)
        else:
            flags = {name.removeprefix("--"): value for name, value in zip(rest[1::2], rest[2::2], strict=True)}
            numbers = {name: int(value) for name, value in flags.items() if value.isdecimal()}
            score(**{**flags, **numbers})
    except UserError as error:
        return 2, " ".join(str(error).split())
    return 0, ""


def _train_once(flags):
    """Train as `flags` say, or copy what a training with the same flags and recipe has left before: it is the same run.

    What studies make of trainings is tested with these, and not training, which is tested elsewhere.
    """
    at, recipe = flags.index("--run_dir") + 1, flags.index("--config") + 1
    run_dir = Path(flags[at])
    rest = [flag for i, flag in enumerate(flags) if i not in (at, recipe)]
    kept = KEPT / sha256([*rest, Path(flags[recipe]).read_bytes()])
    fresh = not run_dir.exists()
    if fresh and kept.exists():
        shutil.copytree(kept, run_dir)
        return
    AcceleratorState._reset_state(True)
    train(read_command_line(flags))
    if fresh:
        shutil.copytree(run_dir, kept)


def ask(words):
    """`train_lm --check` in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        try:
            read_command_line(list(words[1:]))
        except UserError as error:
            return 2, f"error: {error}"
    return 0, said.getvalue()


@pytest.fixture
def here(monkeypatch, small_corpus, tmp_path):
    """Programs run in this process; returns carry_out(study, folder="study", room=None) → (Folder, executor, lines)."""
    monkeypatch.setenv("HF_IBNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(eval.study.jobs, "call", call)
    monkeypatch.setattr(eval.study.folder, "ask", ask)

    def carry_out(what, name="study", room=1 << 30):
        folder = Folder.begin(what, tmp_path / name, ["python", "-m", "eval", "study", "run"])
        executor, lines = Here(room), []
        run_study(folder, executor, lines.append)
        return folder, executor, lines

    return carry_out


def report(folder):
    """Write the report; its groups by label."""
    return {group.label: group for group in write_report(folder, folder.path / "report")}


def rewrite(path: Path, change):
    """Change the content of a JSON, JSON lines or YAML file."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        change(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    content = yaml.safe_load(text)
    change(content)
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))
