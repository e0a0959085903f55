"""Studies as a user runs them: real processes, killed and stopped, at once, on Ray, or by another scheduler."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from studying import TINY, rewrite
from training import pages
from warm import kill, python
from warm import path as warm_path

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
PLAN = {**TINY, "set": {**TINY["set"], "max_steps": 60, "eval_every": 20, "max_eval_blocks": 100}}
PLAN |= {"learning_rates": [0.02], "seeds": [0, 1], "suites": ["sva_simple"], "scoring": {"limit": 3}}


@pytest.fixture
def begin(tmp_path):
    """begin(*words) starts `python -m eval study ...` on a tiny study."""
    texts = {"corpus": "train", "validation_corpus": "validation"}
    for split in texts.values():
        (tmp_path / f"{split}.txt").write_text("\n\n".join(pages("austen", split)))
    files = {field: str(tmp_path / f"{split}.txt") for field, split in texts.items()}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**PLAN, "set": {**PLAN["set"], **files}}))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_IBNORM_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    started = []

    def start(verb, *words):
        command = [python(), "-m", "eval", "study", verb, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        kill(process)


def ended(process):
    said, complained = process.communicate(timeout=300)
    return process.returncode, said, complained


def wait_for(found, process):
    for _ in range(1200):
        if found():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("waited for two minutes")


def finals(folder):
    """When each training ended, by its final model."""
    return {path.parents[1]: path.stat().st_mtime_ns for path in folder.rglob("run/final/model.safetensors")}


def metrics(folder):
    rows = {}
    for path in sorted(folder.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rows[path.parent.relative_to(folder)] = [(row["step"], row["loss"], row["batch_sha"]) for row in lines]
    return rows


def verdicts(folder):
    return (folder / "report" / "verdicts.csv").read_bytes()


def test_killed_and_stopped_and_started_again_it_repeats_nothing(begin, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    code, said, complained = ended(begin("run", "tiny.yaml", "--output", str(whole), "--jobs", "2"))
    assert (code, complained) == (0, "")
    assert "[4/4]" in said

    process = begin("run", "tiny.yaml", "--output", str(part))
    wait_for(lambda: finals(part) and len(list(part.rglob("metrics.jsonl"))) > 1, process)
    kill(process)  # its training lives on
    first = finals(part)

    process = begin("run", "tiny.yaml", "--output", str(part))
    wait_for(lambda: len(finals(part)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    code, _, complained = ended(process)
    assert code == 75
    assert complained.startswith("stopped: ")
    assert "the same command goes on from there" in complained
    second = finals(part)

    code, said, _ = ended(begin("run", "tiny.yaml", "--output", str(part)))
    assert code == 0
    third = finals(part)
    assert len(third) == 4
    assert first.items() <= second.items() <= third.items()
    assert metrics(part / "cells") == metrics(whole / "cells")
    assert verdicts(part) == verdicts(whole)
    code, said, _ = ended(begin("run", "tiny.yaml", "--output", str(part)))
    assert code == 0
    assert said.startswith("norm "), "nothing was left to do, the report comes at once"
    assert finals(part) == third


def test_two_runs_do_not_work_in_one_directory(begin, tmp_path):
    folder = tmp_path / "study"
    rewrite(tmp_path / "tiny.yaml", lambda plan: plan["set"].update(max_steps=5000))  # its first training lasts
    process = begin("run", "tiny.yaml", "--output", str(folder))
    wait_for(lambda: (folder / "running.json").exists(), process)
    code, _, complained = ended(begin("run", "tiny.yaml", "--output", str(folder)))
    assert code == 2
    assert complained == f"error: output: {folder} is in use by another `study run`\n"
    code, said, _ = ended(begin("status", str(folder)))
    assert code == 0
    assert "running now: rmsnorm, learning rate " in said
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 75


def test_on_a_ray_cluster(begin, tmp_path):
    pytest.importorskip("ray")
    folder = tmp_path / "study"
    code, said, _ = ended(begin("run", "tiny.yaml", "--output", "study", "--ray", "local"))
    assert code == 0
    assert "[4/4]" in said
    assert len(finals(folder)) == 4
    process = begin("run", "tiny.yaml", "--output", "stopped", "--ray", "local")
    wait_for(lambda: list((tmp_path / "stopped").rglob("metrics.jsonl")), process)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 75
    before = len(finals(tmp_path / "stopped"))
    time.sleep(5)
    assert len(finals(tmp_path / "stopped")) == before, "its trainings were stopped, too"
    code, _, complained = ended(begin("run", "tiny.yaml", "--output", "x", "--ray", "127.0.0.1:1"))
    assert code == 2
    assert complained.startswith("error: ray: got '127.0.0.1:1', no cluster there")


def test_commands_for_another_scheduler(begin, tmp_path):
    folder = tmp_path / "study"
    for trainings in (2, 4, 0):  # the learning rates first, then the other seeds, and the scores of all
        code, said, _ = ended(begin("commands", "tiny.yaml", "--output", "study"))
        assert code == 0
        lines = said.splitlines()
        assert len(lines) == trainings
        for line in lines:  # from anywhere
            subprocess.run(
                line, shell=True, cwd="/", check=True, capture_output=True, env={**ENVIRONMENT, "PATH": warm_path()}
            )
    code, said, _ = ended(begin("cell", "study", "cells/rmsnorm/lr=0.02/seed=0"))
    assert (code, said) == (0, "nothing is left to be done\n")
    code, _, complained = ended(begin("cell", "study", "cells/rmsnorm"))
    assert (code, complained.count("\n")) == (2, 1)
    code, said, _ = ended(begin("report", "study"))
    assert code == 0
    assert "not distinguishable" in said
    assert len(finals(folder)) == 4


def test_a_training_that_fails_elsewhere_is_told(begin, tmp_path):
    ended(begin("commands", "tiny.yaml", "--output", "study"))
    (tmp_path / "study" / "recipes" / "recipe.yaml").write_text("max_steps: 5\nnonsense: 1\n")
    code, _, complained = ended(begin("cell", "study", "cells/rmsnorm/lr=0.02/seed=0"))
    assert code == 2
    assert complained.startswith("error: rmsnorm, learning rate 0.02, seed 0: failed: ")
    code, said, _ = ended(begin("status", "study"))
    assert "failed: rmsnorm, learning rate 0.02, seed 0" in said
