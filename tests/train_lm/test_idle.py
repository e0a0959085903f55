"""Flags that nothing would use are refused; a recipe's own fields, and taking one back, are not."""

import pytest
from training import small_corpus  # noqa: F401

from hf_ibnorm.base.errors import UserError
from train_lm.config import RECIPES, read_command_line, shipped_recipes
from train_lm.train import train

IDLE = {
    "lora_rank": (["8"], [], ["--trainable", "lora", "--model.init_from", "x"]),
    "lora_targets": (["[q_proj]"], [], ["--trainable", "lora", "--model.init_from", "x"]),
    "distillation_weight": (["0.3"], [], ["--teacher", "x"]),
    "tokenizer_vocab_size": (["300"], ["--tokenizer", "x"], []),
    "tokenizer_documents": (["300"], ["--model.init_from", "x"], []),
    "gradient_accumulation_steps": (["4"], ["--global_batch_size", "8"], []),
    "shuffle_buffer": (["5"], [], ["--streaming", "true", "--corpus", "x"]),
    "tracker_project": (["mine"], [], ["--log_with", "[wandb]"]),
    "validation_every": (["5"], ["--corpus", "x", "--validation_corpus", "y"], ["--corpus", "x"]),
    "corpus_config": (["en"], [], ["--corpus", "x"]),
    "text_field": (["body"], [], ["--validation_corpus", "x"]),
    "model.hidden_size": (["64"], ["--model.init_from", "x"], []),
    "model.model_type": (["gpt2"], ["--model.init_from", "x"], []),
    "model.norm_eps": (["1e-3"], ["--model.init_from", "x"], []),
}


def read(*flags):
    return read_command_line(["--run_dir", "x", *flags])


@pytest.mark.parametrize("field", IDLE)
def test_a_flag_that_nothing_would_use_is_refused(field):
    value, idle, used = IDLE[field]
    with pytest.raises(UserError, match=rf"^{field}: got .*, which nothing would use: .*; leave it out$"):
        read(f"--{field}", *value, *idle)
    with pytest.raises(UserError, match=f"^{field}: "):
        read(*idle, f"--{field}={value[0]}")
    read(f"--{field}", *value, *used)


def test_a_recipe_may_list_what_it_does_not_use_and_a_flag_may_take_it_back(tmp_path):
    for name in shipped_recipes():
        flags = ["--model.init_from", "x"] if name == "heal" else []
        read("--config", name, *flags)
        text = (RECIPES / f"{name}.yaml").read_text()
        if "corpus_config: en" in text:
            read("--config", name, "--corpus", "austen", "--corpus_config", "null")
    (tmp_path / "own.yaml").write_text("lora_rank: 4\ntrainable: all\n")
    assert read("--config", str(tmp_path / "own.yaml")).lora_rank == 4


@pytest.mark.parametrize("flags", [["--checkpoint_every", "100"], ["--checkpoint_every", "0"]])
def test_keep_every_must_be_among_the_steps_that_have_checkpoints(flags):
    with pytest.raises(UserError, match="keep_every: got 150, must be a multiple of checkpoint_every = "):
        read("--keep_every", "150", *flags)
    read("--keep_every", "150", "--checkpoint_every", "50")


def test_a_configuration_of_a_corpus_of_files_is_refused(tmp_path, small_corpus):  # noqa: F811
    (tmp_path / "text.txt").write_text("some words of a text. " * 2000)
    flags = ["--config", "tiny", "--run_dir", str(tmp_path / "run"), "--corpus", str(tmp_path / "text.txt")]
    with pytest.raises(UserError, match="corpus_config: got 'en', which files have none of"):
        train(read_command_line([*flags, "--corpus_config", "en"]))
