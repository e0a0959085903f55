"""Checkpoints: whole or not there, damage named, older ones kept and pruned as asked."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from training import result, run, run_on_pages, small_corpus, steps
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ibnorm.base.errors import UserError
from train_lm.checkpoint import (
    Checkpointer,
    Snapshot,
    copy_model,
    damage,
    process_state,
    read_checkpoint,
    restore_random_states,
    write_checkpoint,
)
from train_lm.distribution import Spread

pytestmark = pytest.mark.usefixtures(small_corpus.__name__)

FILES = [
    "manifest.json",
    "metrics.jsonl.gz",
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "process-00000.jsonl.gz",
    "state.json",
    "training.safetensors",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with the checkpoints 0, 4 and 8, and what it ended with."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    return run_on_pages(run_dir, "--checkpoint_every", "4", "--model.norm_type", "layernormalnorm")


@pytest.fixture
def cut(finished, tmp_path):
    """That run before it ended, in a directory of its own."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    return tmp_path / "run"


def test_a_checkpoint_holds_these_files_and_no_pickle(finished):
    for name in ("step-0", "step-4", "step-8"):
        folder = finished / "checkpoints" / name
        assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == FILES
        assert damage(folder) is None
        assert AutoModelForCausalLM.from_pretrained(folder / "model").dtype == torch.float32
        assert AutoTokenizer.from_pretrained(folder / "model").eos_token == "<|endoftext|>"


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("harm", [truncate, empty, flip, os.unlink], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file_is_found_and_named(cut, name, harm):
    folder = cut / "checkpoints" / "step-8"
    harm(folder / name)
    assert name in damage(folder)
    with pytest.raises(ValueError, match=name):
        read_checkpoint(folder)


@pytest.mark.parametrize("place", range(0, 1000, 37))
def test_any_flipped_bit_of_the_manifest_is_found_or_harmless(cut, place):
    folder = cut / "checkpoints" / "step-8"
    before = json.loads((folder / "manifest.json").read_text())
    raw = bytearray((folder / "manifest.json").read_bytes())
    raw[place % len(raw)] ^= 1 << (place % 8)
    (folder / "manifest.json").write_bytes(raw)
    if damage(folder) is None:
        assert json.loads(raw) == before


@pytest.mark.parametrize("harm", [truncate, flip, os.unlink], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", ["model/model.safetensors", "training.safetensors", "manifest.json"])
def test_resume_says_what_it_skipped_and_falls_back(cut, finished, name, harm, capsys):
    harm(cut / "checkpoints" / "step-8" / name)
    run(cut, "--checkpoint_every", "4", "--model.norm_type", "layernormalnorm", "--resume", "auto")
    out = capsys.readouterr().out
    assert f"resume: skipped step-8: {name}" in out
    assert "resume: going on after step-4" in out
    assert result(cut) == result(finished)
    assert damage(cut / "checkpoints" / "step-8") is None, "written again"


def resumed(cut):
    return run(cut, "--checkpoint_every", "4", "--model.norm_type", "layernormalnorm", "--resume", "auto")


def bytes_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damaged", [("step-0", "step-4", "step-8"), ("step-4", "step-8")])
def test_starting_over_must_be_asked_for_where_the_checkpoints_are_damaged(cut, finished, damaged):
    for name in damaged:
        flip(cut / "checkpoints" / name / "state.json")
    before = bytes_in(cut)
    with pytest.raises(UserError, match=r"none after step 0 is whole \(step-8: state.json is damaged; .* over$"):
        resumed(cut)
    assert bytes_in(cut) == before
    for name in damaged:
        shutil.rmtree(cut / "checkpoints" / name)
    resumed(cut)
    assert result(cut) == result(finished)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that gives an I/O error")
@pytest.mark.parametrize("name", ["checkpoints/step-8/manifest.json", "config.yaml"])
def test_a_file_that_cannot_be_read_is_an_error_and_no_damage(cut, name):
    shutil.move(cut / name, cut / "kept")
    (cut / name).symlink_to("/proc/self/mem")
    before = steps(cut)
    with pytest.raises(UserError, match=r"run_dir: .* cannot be read: (\[Errno 5\] )?Input/output error"):
        resumed(cut)
    assert steps(cut) == before
    assert not (cut / "final").exists()


@pytest.mark.parametrize("kind", ["a link to another disk", "a link to nothing", "a link to itself", "a file"])
def test_a_checkpoint_that_is_no_folder_bricks_no_run(cut, finished, tmp_path, kind):
    path, elsewhere = cut / "checkpoints" / "step-8", tmp_path / "elsewhere"
    shutil.move(path, elsewhere)
    if kind == "a file":
        path.write_text("mine")
    else:
        path.symlink_to({"another disk": elsewhere, "nothing": "gone", "itself": path}[kind.removeprefix("a link to ")])
    flags = ["--checkpoint_every", "1", "--keep_last", "1", "--model.norm_type", "layernormalnorm"]
    run(cut, *flags, "--resume", "auto")
    assert result(cut) == result(finished)
    assert steps(cut) == ["latest", "step-0", "step-10"]
    assert damage(elsewhere) is None, "what a link leads to was removed"


@pytest.mark.parametrize("harm", [empty, truncate, flip, os.unlink], ids=lambda harm: harm.__name__)
def test_metrics_are_made_whole_from_the_checkpoint(cut, finished, harm):
    harm(cut / "metrics.jsonl")
    run(cut, "--checkpoint_every", "4", "--model.norm_type", "layernormalnorm", "--resume", "auto")
    assert result(cut) == result(finished)


def test_damaged_checkpoints_do_not_count_among_those_to_keep(cut):
    # 4 is whole, 8 is not: with two to keep, 4 must survive 9.
    flip(cut / "checkpoints" / "step-8" / "state.json")
    flags = ["--checkpoint_every", "9", "--keep_last", "2", "--model.norm_type", "layernormalnorm"]
    run(cut, *flags, "--resume", "auto")
    whole = [name for name in steps(cut) if name.startswith("step-") and damage(cut / "checkpoints" / name) is None]
    assert whole == ["step-0", "step-4", "step-9"]


def test_a_checkpoint_whose_weights_turn_out_bad_is_never_written(tmp_path):
    # The update of the first step destroys the weights, which only the second step finds out.
    flags = ["--learning_rate", "1e20", "--warmup_steps", "0", "--max_grad_norm", "0"]
    with pytest.raises(UserError, match="training diverged.*the last checkpoint is step-0"):
        run(tmp_path / "run", *flags, "--checkpoint_every", "1", "--keep_last", "1", "--max_skipped_steps", "3")
    assert steps(tmp_path / "run") == ["latest", "step-0"]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (("--keep_last", "1"), ["step-0", "step-8"]),
        (("--keep_last", "2"), ["step-0", "step-6", "step-8"]),
        (("--keep_last", "1", "--keep_every", "4"), ["step-0", "step-4", "step-8"]),
        (("--keep_last", "9"), ["step-0", "step-2", "step-4", "step-6", "step-8"]),
        (("--checkpoint_every", "0"), ["step-0"]),
    ],
)
def test_the_last_ones_and_every_nth_are_kept(tmp_path, flags, kept):
    run(tmp_path / "run", "--max_steps", "9", "--checkpoint_every", "2", *flags)
    assert steps(tmp_path / "run") == ["latest", *kept]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == kept[-1] + "\n"


@pytest.fixture
def snapshot(finished):
    """A snapshot of step 2 made from a checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(finished / "checkpoints" / "step-4" / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    return Snapshot(
        2, model, tokenizer, {"start/x": torch.ones(3)}, [process_state({"place": 3})], {"tokens": 7}, bytes
    )


def crashing_at(call):
    """Let this process end at the `call`-th of the calls that reach the disk."""
    count = 0

    def wrap(function):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                os._exit(3)
            return function(*args, **kwargs)

        return wrapped

    for name in ("fsync", "rename", "replace", "rmdir", "unlink", "chmod"):
        setattr(os, name, wrap(getattr(os, name)))
    Path.chmod = wrap(Path.chmod)


def test_a_process_that_ends_at_any_call_leaves_whole_checkpoints_only(snapshot, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (0, 1):
        write_checkpoint(folder, Snapshot(**{**vars(snapshot), "step": step}))
    for call in range(1, 200):
        trial = tmp_path / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(folder, trial)
        pid = os.fork()
        if not pid:
            try:
                crashing_at(call)
                checkpointer = Checkpointer(trial, keep_last=1, keep_every=0)
                checkpointer.write(snapshot)
                checkpointer.wait()
                os._exit(9 if checkpointer.error else 0)
            finally:
                os._exit(8)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = {path.name for path in trial.iterdir() if path.name.startswith("step-")}
        assert found in ({"step-0", "step-1"}, {"step-0", "step-1", "step-2"}, {"step-0", "step-2"})
        assert all(damage(trial / name) is None for name in found)
        assert damage(trial / (trial / "latest").read_text().strip()) is None
        if code == 0:
            break
        assert code == 3
    assert code == 0
    assert call > 30


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_leaves_the_old_ones(snapshot, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, Snapshot(**{**vars(snapshot), "step": 1}))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train_lm.checkpoint.save_file", full)
    checkpointer = Checkpointer(tmp_path, keep_last=1, keep_every=0)
    checkpointer.write(snapshot)
    checkpointer.wait()
    assert checkpointer.problem == "run_dir: a checkpoint could not be written: [Errno 28] No space left on device"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1"]
    assert damage(tmp_path / "step-1") is None


def test_a_snapshot_does_not_move_with_the_model(tiny_config):
    model = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step():
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()

    step()
    copied = copy_model(model, lambda each: each.detach().clone())
    tensors = Spread(model, Accelerator(cpu=True)).optimizer_tensors(model, optimizer, keep=True)
    before = {name: value.clone() for name, value in [*model.state_dict().items(), *tensors.items()]}
    step()
    assert all(torch.equal(before[name], value) for name, value in copied.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in tensors.items())
    assert not any(torch.equal(value, model.get_parameter(name)) for name, value in copied.named_parameters())
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert all(parameter.grad is None for parameter in copied.parameters())


def test_optimizer_state_goes_back_to_the_parameters_it_came_from(tiny_config):
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    # Other groups, so that the order of the parameters is another one.
    parameters = list(model.parameters())
    other = torch.optim.AdamW([{"params": parameters[3:]}, {"params": parameters[:3]}], lr=0.1, fused=True)
    spread = Spread(model, Accelerator(cpu=True))
    spread.restore_optimizer(model, other, spread.optimizer_tensors(model, optimizer, keep=True))
    for parameter in parameters:
        assert other.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for kind, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][kind], value)


def test_a_shuffle_buffer_comes_back_text_for_text(snapshot, tmp_path):
    buffer = ["two\nlines", "", "日本 \u2028 \x00", "\r\n", "plain"]
    snapshot.processes = [process_state({"epoch": 3, "buffer": buffer}), process_state({"epoch": 4, "buffer": []})]
    write_checkpoint(tmp_path, snapshot)
    checkpoint = read_checkpoint(tmp_path / "step-2")
    for i, expected in enumerate(snapshot.processes):
        assert checkpoint.process(i) == json.loads(json.dumps(expected))


def test_random_states_survive_json():
    import random

    import numpy as np

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(2).tolist(), torch.randn(3).tolist()

    draw()
    state = json.loads(json.dumps(process_state({})))
    expected = draw(), draw()
    draw()
    restore_random_states(state)
    assert (draw(), draw()) == expected


def test_a_checkpoint_has_the_metrics_up_to_its_step(finished):
    checkpoint = read_checkpoint(finished / "checkpoints" / "step-8")
    rows = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert checkpoint.metrics == b"".join(rows[:8])
    assert checkpoint.state["tokens"] == json.loads(rows[7])["tokens"]
