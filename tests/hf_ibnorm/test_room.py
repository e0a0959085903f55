"""Sizes that a machine cannot hold are refused at once, and running out of memory is one line."""

import json

import pytest
import torch

import hf_ibnorm.cli
import train_lm.__main__
from hf_ibnorm.base.command import run_command
from hf_ibnorm.base.errors import UserError
from hf_ibnorm.base.room import check_room, machine_memory

TRAIN = ("--config", "tiny", "--run_dir", "NEW", "--max_steps", "1", "--warmup_steps", "0", "--log_with", "[]")


@pytest.mark.parametrize(
    ("field", "flags"),
    [
        ("num_hidden_layers: got 1000000", ("--model.num_hidden_layers", "1000000")),
        ("model: got 2 blocks 100000000 wide", ("--model.hidden_size", "100000000")),
        ("per_device_train_batch_size: got 1000000000", ("--per_device_train_batch_size", "1000000000")),
        ("per_device_eval_batch_size: got 1000000000", ("--per_device_eval_batch_size", "1000000000")),
        ("gradient_accumulation_steps: got 100000000", ("--gradient_accumulation_steps", "100000000")),
        ("tokenizer_vocab_size: got 1000000000000", ("--tokenizer_vocab_size", "1000000000000")),
        ("tokenizer_threads: got 1000000, must be", ("--tokenizer_threads", "1000000")),
        ("max_steps: got 100000000000000000000, must be", ("--max_steps", "1" + "0" * 20)),
    ],
)
def test_a_run_that_cannot_be_held_is_refused_before_anything_is_allocated(command, tmp_path, field, flags):
    words = [str(tmp_path / "new") if word == "NEW" else word for word in TRAIN]
    code, _, err = command(train_lm.__main__.main, *words, *flags)
    assert code == 2
    assert field in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", ["convert", "analyze"])
def test_a_checkpoint_that_cannot_be_held_is_refused_by_its_config(source, command, tmp_path, verb):
    folder = source("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**7}))
    new = str(tmp_path / "new")
    words = {
        "convert": ("convert", str(folder), new, "--norm", "dyt"),
        "analyze": ("analyze", "--model", str(folder), "--output", new),
    }
    code, _, err = command(hf_ibnorm.cli.main, *words[verb])
    assert code == 2
    assert "num_hidden_layers: got 10000000, which takes 500 GB for its blocks" in err


def test_memory_is_that_of_the_machine_or_less():
    assert 1 << 28 < machine_memory() < 1 << 50
    check_room("a", 1, machine_memory(), "for all")
    with pytest.raises(UserError, match=r"^a: got 1, which takes .* GB for all; this machine has .* GB$"):
        check_room("a", 1, machine_memory() * 2, "for all")


def test_out_of_memory_says_what_to_lower(capsys):
    with pytest.raises(SystemExit) as ending:
        run_command(lambda: torch.empty(1 << 60), lower="the batch")
    assert ending.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory: ")
    with pytest.raises(RuntimeError, match="shape"):  # of any other kind is ours
        run_command(lambda: torch.empty(2).view(3), lower="the batch")
