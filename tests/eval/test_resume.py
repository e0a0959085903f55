"""A run that was stopped goes on: same scores, nothing repeated, nothing mixed up."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM
from warm import kill, python

from eval import runner
from eval.__main__ import main
from eval.model import fingerprint, load_model
from eval.runner import run
from eval.store import still_missing
from hf_ibnorm.base.errors import UserError

ROOT = Path(__file__).parents[2]


class Interrupted(Exception):
    pass


def stop_after(monkeypatch, count):
    """Let so many benchmarks end, and no more."""
    original, ended = runner._run_benchmark, []

    def stopping(*arguments):
        if len(ended) == count:
            raise Interrupted
        ended.append(arguments[1].benchmark.name)
        return original(*arguments)

    monkeypatch.setattr(runner, "_run_benchmark", stopping)
    return ended


def same_scores(first, second):
    return all(
        (first / f"scores.{kind}").read_bytes() == (second / f"scores.{kind}").read_bytes()
        for kind in ("json", "md", "csv", "tex")
    )


def test_a_stopped_run_goes_on_where_it_was(checkpoint, tmp_path, monkeypatch):
    whole = run(str(checkpoint), "embedded", str(tmp_path / "whole"), limit=6)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            run(str(checkpoint), "embedded", str(tmp_path / "part"), limit=6)
    assert len(list((tmp_path / "part" / "results").iterdir())) == 3
    assert not (tmp_path / "part" / "scores.json").exists()
    (tmp_path / "part" / "results" / ".sva_linzen.json.x1").write_text('{"ta')  # killed while writing
    ended = stop_after(monkeypatch, 10)
    assert run(str(checkpoint), "embedded", str(tmp_path / "part"), limit=6) == whole
    assert len(ended) == 4
    assert same_scores(tmp_path / "whole", tmp_path / "part")
    assert not list((tmp_path / "part" / "results").glob(".*"))
    run(str(checkpoint), "embedded", str(tmp_path / "part"), limit=6)
    assert len(ended) == 4  # nothing left to do


CHANGED = {
    "limit": {"limit": 7},
    "overlong": {"overlong": "skip"},
    "dtype": {"dtype": "bfloat16"},
    "benchmarks": {"skip": ["sva_simple"]},
    "generation": {"gen_kwargs": {"max_gen_toks": 2}},
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_run_may_not_go_on_there(checkpoint, tmp_path, monkeypatch, name):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Interrupted):
            run(str(checkpoint), "embedded", str(tmp_path / "out"), limit=6)
    with pytest.raises(UserError, match=rf"output: .* holds a run with another .*{name}"):
        run(str(checkpoint), "embedded", str(tmp_path / "out"), **{"limit": 6, **CHANGED[name]})


def noisier(checkpoint, target):
    """The same model but for one weight."""
    shutil.copytree(checkpoint, target)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1.0
    model.save_pretrained(target)
    return target


def test_another_model_may_not_go_on_there(checkpoint, tmp_path, monkeypatch):
    other = noisier(checkpoint, tmp_path / "model")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Interrupted):
            run(str(checkpoint), "embedded", str(tmp_path / "out"), limit=6)
    with pytest.raises(UserError, match="holds a run with another model.weights"):
        run(str(other), "embedded", str(tmp_path / "out"), limit=6)


def test_shards_together_are_the_whole_run(checkpoint, tmp_path, command):
    whole = run(str(checkpoint), "embedded", str(tmp_path / "whole"), limit=6)
    parts = []
    for i in (1, 2, 3):
        parts.append(str(tmp_path / f"part{i}"))
        run(str(checkpoint), "embedded", parts[-1], limit=6, shard=(i, 3))
    code, _, _ = command(main, "score", *parts, "--output", str(tmp_path / "together"))
    assert code == 0
    together = json.loads((tmp_path / "together" / "scores.json").read_text())
    assert together["benchmarks"] == whole["benchmarks"]
    assert list(together["benchmarks"]) == list(whole["benchmarks"])
    # Put together they are a run like any other.
    paths = [str(tmp_path / name) for name in ("whole", "together")]
    assert command(main, "compare", *paths, "--output", str(tmp_path / "compared"))[0] == 0
    code, _, err = command(main, "score", parts[0], parts[0], "--output", str(tmp_path / "twice"))
    assert code == 2
    assert "is in more than one of the directories" in err
    run(str(checkpoint), "embedded", str(tmp_path / "other"), limit=5, shard=(2, 3))
    code, _, err = command(main, "score", parts[0], str(tmp_path / "other"), "--output", str(tmp_path / "mixed"))
    assert code == 2
    assert "it has another prompting.limit: 6, now 5" in err


CHANGED_ITEMS = {
    "right ones twice": (lambda items: items.extend(each for each in items[:] if each["metrics"]["acc,none"]), "times"),
    "the last one missing": (lambda items: items.pop(), "sva_simple: item 7 is missing, 1 of 8 in all"),
    "one more": (lambda items: items.append({**items[0], "doc_id": 8}), "sva_simple: it has 9 items, 8 were asked"),
    "NaN": (lambda items: items[3]["metrics"].update({"acc,none": float("nan")}), "it has a number NaN"),
}


@pytest.mark.parametrize("name", CHANGED_ITEMS)
def test_items_that_are_not_those_that_were_answered_are_neither_scored_nor_compared(items_of, tmp_path, command, name):
    change, message = CHANGED_ITEMS[name]
    shutil.copytree(items_of, tmp_path / "run")
    path = tmp_path / "run" / "results" / "sva_simple.json"
    content = json.loads(path.read_text())
    change(content["tasks"]["sva_simple"]["items"])
    path.write_text(json.dumps(content))
    before = (tmp_path / "run" / "scores.json").read_bytes()
    run_dir, out = str(tmp_path / "run"), str(tmp_path / "out")
    for words in (["score", run_dir], ["compare", run_dir, run_dir, "--output", out]):
        code, _, err = command(main, *words)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    assert (tmp_path / "run" / "scores.json").read_bytes() == before
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def items_of(checkpoint, tmp_path_factory):
    """A run on eight items of one task."""
    out = tmp_path_factory.mktemp("items") / "run"
    run(str(checkpoint), "sva_simple", str(out), limit=8)
    return out


def test_damaged_files_are_one_line(checkpoint, tmp_path, command):
    out = tmp_path / "out"
    run(str(checkpoint), "embedded", str(out), limit=2)
    result, manifest = out / "results" / "sva_simple.json", out / "manifest.json"
    identity = json.loads(manifest.read_text())["identity"]
    for path, content, message in (
        (result, "{}", "sva_simple.json has no tasks or skipped"),
        (result, '{"tasks": {"sva_simple": {}}}', "sva_simple has no items"),
        (result, '{"ta', "sva_simple.json cannot be read"),
        (manifest, json.dumps({"identity": {"suite": identity["suite"]}}), "identity has no benchmarks"),
        (manifest, "[]", "manifest.json: got [], must be a mapping"),
    ):
        before = path.read_text()
        path.write_text(content)
        code, _, err = command(main, "score", str(out))
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
        path.write_text(before)
    run(str(checkpoint), "embedded", str(tmp_path / "first"), limit=2, cache=str(tmp_path / "cache"))
    (database,) = (tmp_path / "cache").glob("*.db")
    database.write_bytes(b"x" * 8192)
    with pytest.raises(UserError, match=f"cache: {database}: file is not a database"):
        run(str(checkpoint), "embedded", str(tmp_path / "second"), limit=2, cache=str(tmp_path / "cache"))


def counted(lm):
    """The same model, counting the calls of its forward pass."""
    calls = []
    lm.model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_kept_answers_are_used_again_and_never_by_another_model(checkpoint, tmp_path):
    cache = str(tmp_path / "cache")
    plain = run(str(checkpoint), "embedded", str(tmp_path / "plain"), limit=6)
    first = run(str(checkpoint), "embedded", str(tmp_path / "first"), limit=6, cache=cache)
    lm = load_model(checkpoint, 8, "cpu", "auto")
    calls = counted(lm)
    again = run(lm, "embedded", str(tmp_path / "again"), limit=6, cache=cache)
    assert len(calls) <= 4  # the doctor's
    assert plain["benchmarks"] == first["benchmarks"] == again["benchmarks"]

    other = noisier(checkpoint, tmp_path / "model")
    expected = run(str(other), "embedded", str(tmp_path / "other plain"), limit=6)
    assert expected["benchmarks"] != plain["benchmarks"]
    assert (
        run(str(other), "embedded", str(tmp_path / "other"), limit=6, cache=cache)["benchmarks"]
        == expected["benchmarks"]
    )
    assert len(list(Path(cache).glob("*.db"))) == 2
    half = run(str(checkpoint), "embedded", str(tmp_path / "half"), limit=6, cache=cache, dtype="bfloat16")
    assert half["benchmarks"] != plain["benchmarks"]
    assert len(list(Path(cache).glob("*.db"))) == 3


def test_answers_are_kept_as_json_and_not_as_code(checkpoint, tmp_path):
    import sqlite3

    run(str(checkpoint), "embedded", str(tmp_path / "out"), limit=2, cache=str(tmp_path / "cache"))
    (path,) = (tmp_path / "cache").glob("*.db")
    with sqlite3.connect(path) as database:
        values = [value for (value,) in database.execute("select value from unnamed")]
    assert values
    assert all(json.loads(value) is not None for value in values)


def words(checkpoint, out, mirror):
    rest = ["--suite", "v1", "--mirror", str(mirror), "--output", str(out), "--skip", "hellaswag,truthfulqa_mc2"]
    return [python(), "-m", "eval", "run", "--model", str(checkpoint), *rest]


def test_a_signal_ends_a_run_in_one_line_and_it_goes_on(long_checkpoint, tmp_path, mirror):
    out = tmp_path / "out"
    going = subprocess.Popen(
        words(long_checkpoint, out, mirror), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (out / "results").is_dir() and going.poll() is None:
        time.sleep(0.05)
    going.send_signal(signal.SIGTERM)
    _, err = going.communicate(timeout=60)
    assert going.returncode == 75
    assert err.startswith("stopped: SIGTERM; benchmarks that ended are in")
    assert err.count("\n") == 1


def test_what_is_kept_of_a_model_does_not_depend_on_its_last_call(checkpoint):
    lm = load_model(checkpoint, 8, "cpu", "auto")
    before = fingerprint(lm)
    lm.tok_batch_encode(["one", "one two three"])
    assert fingerprint(lm) == before


@pytest.mark.slow
def test_two_processes_answer_as_one(long_checkpoint, tmp_path, mirror):
    alone, together = tmp_path / "alone", tmp_path / "together"
    launch = [python(), "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words(long_checkpoint, alone, mirror), cwd=ROOT, check=True, env=environment)
    again = words(long_checkpoint, together, mirror)[1:]
    done = subprocess.run([*launch, *again], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Average") == 1
    first, second = (json.loads((path / "scores.json").read_text()) for path in (alone, together))
    for name, row in first["benchmarks"].items():
        assert row["raw"] == pytest.approx(second["benchmarks"][name]["raw"], abs=1e-6)
    hashes = [json.loads((path / "manifest.json").read_text())["task_hashes"] for path in (alone, together)]
    assert hashes[0] == hashes[1]


@pytest.mark.slow
def test_killed_at_any_moment_the_scores_are_those_of_a_run_that_was_not(long_checkpoint, tmp_path, mirror):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    subprocess.run(words(long_checkpoint, tmp_path / "whole", mirror), cwd=ROOT, check=True, env=environment)
    seconds = time.monotonic() - start
    generator = random.Random(0)
    for attempt in range(3):
        out, kills = tmp_path / f"killed{attempt}", 0
        while True:
            going = subprocess.Popen(words(long_checkpoint, out, mirror), cwd=ROOT, env=environment)
            try:
                code = going.wait(timeout=generator.uniform(0.4, 1.1) * seconds if kills < 3 else None)
            except subprocess.TimeoutExpired:
                kill(going)
                kills += 1
                continue
            assert code == 0
            break
        assert same_scores(tmp_path / "whole", out)
    assert still_missing(out, json.loads((out / "manifest.json").read_text())["identity"]) == []


def test_two_runs_do_not_work_in_one_directory(checkpoint, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Interrupted):
            run(str(checkpoint), "sva_simple,cause_and_effect", str(tmp_path / "run"), limit=2)
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(UserError, match=r"output: .*run is in use by another run"),
    ):
        run(str(checkpoint), "sva_simple,cause_and_effect", str(tmp_path / "run"), limit=2)
    run(str(checkpoint), "sva_simple,cause_and_effect", str(tmp_path / "run"), limit=2)
