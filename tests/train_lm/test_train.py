"""Pretraining as a user meets it: the command, the run directory, repeatability, errors before anything is written."""

import json
import re
import subprocess
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from launching import launch, program
from tokenizers.processors import TemplateProcessing
from training import config, metrics, small_corpus, without_timing
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm import python

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.data.tokens import Encoder
from train_lm.__main__ import main
from train_lm.config import RECIPES, ModelConfig, TrainConfig, build_model_config, read_command_line, shipped_recipes
from train_lm.data import IGNORE, PackedTokens
from train_lm.optim import build_optimizer, learning_rate
from train_lm.tasks.language import evaluate
from train_lm.tokenizer import train_tokenizer, wrap_tokenizer
from train_lm.train import train

pytestmark = pytest.mark.usefixtures(small_corpus.__name__)


def test_run_directory_holds_what_the_design_says(tmp_path):
    final = train(config(tmp_path / "run"))
    run = tmp_path / "run"
    assert final == run / "final"
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "final",
        "metrics.jsonl",
        "tensorboard",
    ]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-0", "step-10", "step-5"]
    assert (run / "checkpoints" / "latest").read_text() == "step-10\n"
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 11))
    promised = {"step", "loss", "lr", "tokens", "tokens_per_second", "grad_norm", "batch_sha"}
    assert set(rows[0]) == promised | {"gain_movement", "mfu", "memory_gb"}
    assert [row["step"] for row in rows if "eval_loss" in row] == [5, 10]
    assert rows[-1]["tokens"] == 10 * 4 * 2 * 32
    assert rows[-1]["eval_loss"] < rows[4]["eval_loss"] < np.log(300)
    environment = json.loads((run / "environment.json").read_text())
    for key in ("init_sha", "tokenizer_sha", "train_sha", "validation_sha"):
        assert len(environment[key]) == 64
    assert environment["versions"]["torch"] == torch.__version__
    assert {"keep_last", "log_with"} < {*environment["harmless_settings"]} < {*TrainConfig("").as_recipe()}
    assert "learning_rate" not in environment["harmless_settings"]
    for path in (final, run / "checkpoints" / "step-0" / "model"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        assert model.config.norm_type == "ibnorm_l"
        assert model.config.vocab_size == len(tokenizer)
        assert environment["parameters"] == model.num_parameters()


def test_same_seed_gives_the_same_metrics_and_weights(tmp_path):
    for name in ("a", "b"):
        train(config(tmp_path / name, "--model.norm_type", "layernormalnorm"))
    assert without_timing(metrics(tmp_path / "a")) == without_timing(metrics(tmp_path / "b"))
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "final") for name in ("a", "b"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_config_yaml_is_a_recipe_that_repeats_the_run(tmp_path):
    train(config(tmp_path / "a", "--model.norm_kwargs.lam", "3", "--seed", "5"))
    recipe = tmp_path / "a" / "config.yaml"
    assert yaml.safe_load(recipe.read_text())["model"]["norm_kwargs"]["lam"] == 3.0
    train(read_command_line(["--config", str(recipe), "--run_dir", str(tmp_path / "b")]))
    assert without_timing(metrics(tmp_path / "a")) == without_timing(metrics(tmp_path / "b"))


def test_norms_share_data_order_and_initial_weights_and_seeds_do_not(tmp_path):
    for name, flags in {
        "rms": ["--model.norm_type", "rmsnorm"],
        "ib": ["--model.norm_type", "ibnorm_t"],
        "other": ["--seed", "1"],
    }.items():
        train(config(tmp_path / name, "--max_steps", "3", *flags))

    def hashes(name):
        environment = json.loads((tmp_path / name / "environment.json").read_text())
        return environment["init_sha"], [row["batch_sha"] for row in metrics(tmp_path / name)]

    assert hashes("rms") == hashes("ib")
    assert hashes("rms")[0] != hashes("other")[0]
    assert hashes("rms")[1] != hashes("other")[1]


def few_blocks(*flags):
    """Flags of a run whose last block holds 7 tokens and 505 that do not count, so that micro-batches are unequal."""
    return ["--block_size", "512", "--max_steps", "20", "--eval_every", "10", "--learning_rate", "3e-3", *flags]


@pytest.mark.slow
def test_accumulation_leaves_the_losses_as_they_are(tmp_path):
    losses = []
    for size, parts in (("8", "1"), ("8", "1"), ("2", "4"), ("1", "8")):
        split = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", parts]
        run_dir = tmp_path / f"run{len(losses)}"
        AcceleratorState._reset_state(True)
        train(config(run_dir, *few_blocks(*split)))
        rows = metrics(run_dir)
        assert {row["tokens"] - before for before, row in pairwise_tokens(rows)} > {8 * 512}, "no padded block was met"
        losses.append([row["loss"] for row in rows])
    for each in losses[1:]:
        torch.testing.assert_close(torch.tensor(each), torch.tensor(losses[0]), rtol=1e-5, atol=1e-5)


def pairwise_tokens(rows):
    return zip([0, *(row["tokens"] for row in rows)], rows, strict=False)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_both_families_and_autocast_train(tmp_path, family, precision):
    train(config(tmp_path / "run", "--model.model_type", family, "--mixed_precision", precision, "--max_steps", "40"))
    rows = metrics(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step-0" / "model")
    assert final.dtype == torch.float32
    gains = {name: value for name, value in final.named_parameters() if name.endswith("norm.weight") or ".ln_" in name}
    assert gains
    assert all(not torch.equal(value, start.get_parameter(name)) for name, value in gains.items())


def test_validation_is_the_token_mean_over_the_whole_split_in_eval_mode():
    texts = ["Some words to validate on, some more words. " * 9, "And another text."]
    tokenizer = wrap_tokenizer(train_tokenizer(texts, 280), 512)
    run = read_command_line(["--config", "tiny", "--run_dir", "unused", "--model.norm_type", "layernormalnorm"])
    run.per_device_eval_batch_size = 4
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build_model_config(run, len(tokenizer), 0)).train()
    data = PackedTokens(Encoder(tokenizer).documents(texts), tokenizer.eos_token_id, 16)
    assert data.padding > 0
    assert data.blocks % run.per_device_eval_batch_size != 0
    measured = evaluate(model, data, run, Accelerator(cpu=True))
    inputs, targets = data.batch(np.arange(data.blocks))
    logits = model.eval()(input_ids=inputs).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    assert measured == pytest.approx(expected.item(), rel=1e-6)


def test_decay_is_on_matrices_only(tmp_path):
    run = config(tmp_path)
    model = AutoModelForCausalLM.from_config(build_model_config(run, 300, 0))
    decayed, kept = build_optimizer(model, run).param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert all(parameter.ndim < 2 for parameter in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_learning_rate_warms_up_and_ends_at_the_floor(tmp_path):
    run = config(
        tmp_path, "--max_steps", "100", "--warmup_steps", "10", "--learning_rate", "1.0", "--min_lr_rate", "0.1"
    )
    rates = [learning_rate(step, run) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[9:]))
    run.warmup_steps = 0
    assert learning_rate(1, run) < 1.0


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_is_complete_and_commented(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    recipe = yaml.safe_load(text)
    start = ["--model.init_from", "given"] if name == "heal" else []
    run = read_command_line(["--config", name, "--run_dir", "unused", *start])
    for key, value in recipe.items():
        if key != "model":
            assert getattr(run, key) == value
    assert set(recipe) == set(TrainConfig.__dataclass_fields__) - {"run_dir", "resume"}
    assert set(recipe["model"]) == set(ModelConfig.__dataclass_fields__)
    for line in text.splitlines():
        assert line.startswith("#") or re.match(r" *\w+:.* # .{5,}", line), f"no comment: {line}"


def test_config_applies_first_wherever_it_stands():
    for argv in (["--config", "tiny", "--seed", "7"], ["--seed", "7", "--config=tiny"]):
        run = read_command_line([*argv, "--run_dir", "x", "--model.norm_kwargs.lam", "3"])
        assert run.seed == 7
        assert run.max_steps == 10
        assert run.model.norm_kwargs == {"lam": 3}


BAD = {
    "unknown norm": (["--model.norm_type", "ibnorm_x"], "unknown norm 'ibnorm_x' (did you mean 'ibnorm_"),
    "unknown kwarg": (
        ["--model.norm_kwargs.lamm", "4"],
        "norm_kwargs.lamm: ibnorm_l has no such option (did you mean 'lam'?)",
    ),
    "unknown field": (["--learnin_rate", "1"], "(did you mean 'learning_rate'?)"),
    "unknown model field": (["--model.hiden_size", "8"], "(did you mean 'model.hidden_size'?)"),
    "negative lam": (["--model.norm_kwargs.lam", "-1"], "norm_kwargs.lam: got -1.0, must be a finite number >= 0"),
    "small lam for S": (
        ["--model.norm_type", "ibnorm_s", "--model.norm_kwargs.lam", "0.5"],
        "norm_kwargs.lam: got 0.5",
    ),
    "lam nan": (["--model.norm_kwargs.lam", "nan"], "norm_kwargs.lam: got 'nan'"),
    "lam nan in yaml": (["--model.norm_kwargs", "{lam: nan}"], "norm_kwargs.lam: got 'nan'"),
    "lam .nan in yaml": (["--model.norm_kwargs", "{lam: .nan}"], "norm_kwargs.lam: got nan"),
    "small vocabulary": (["--model.vocab_size", "290"], "model.vocab_size: got 290, the tokenizer has 300 tokens"),
    "long blocks": (["--block_size", "1024"], "block_size: got 1024, must be <= model.max_position_embeddings = 512"),
    "zero steps": (["--max_steps", "0"], "max_steps: got 0, must be a finite number >= 1"),
    "a word for a number": (["--max_steps", "many"], "max_steps: got 'many', must be int"),
    "a shortened flag": (["--learning", "1"], "--learning"),
    "heads of odd width": (["--model.hidden_size", "6"], "which makes heads 3 wide"),
    "width that heads do not divide": (["--model.hidden_size", "31"], "model.num_attention_heads: got 2, must divide"),
    "fp16 without a GPU": (["--mixed_precision", "fp16"], "mixed_precision: got 'fp16', which needs a GPU"),
    "more warmup than steps": (["--max_steps", "1"], "warmup_steps: got 2, must be <= max_steps = 1"),
    "nan learning rate": (["--learning_rate", "nan"], "learning_rate: got 'nan', must be float"),
    "unknown corpus": (["--corpus", "bronte"], "corpus: got 'bronte', no embedded corpus (austen, sotu), no file"),
    "heads that do not divide": (["--model.num_attention_heads", "3"], "model.num_attention_heads: got 3"),
    "no repository": (["--push_to_hub", "tiny"], "push_to_hub: got 'tiny', must be NAMESPACE/NAME"),
    "unknown recipe": (["--config", "tinny"], "(did you mean 'tiny'?)"),
    "norms watched too often": (
        ["--watch_norms", "-1"],
        "watch_norms: got -1, must be a finite number >= 0",
    ),
    "norms watched in compiled blocks": (
        ["--watch_norms", "5", "--compile", "true"],
        "watch_norms: got 5, must be 0 with compile true",
    ),
    "unknown precision": (
        ["--mixed_precision", "fp8"],
        "mixed_precision: got 'fp8', must be one of ['no', 'bf16', 'fp16']",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_named_error_and_nothing_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags, message = BAD[name]
    with pytest.raises(UserError) as caught:
        train(config(tmp_path / "run", *flags))
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_recipe_field_in_a_file_is_named_with_the_nearest(tmp_path):
    (tmp_path / "r.yaml").write_text("model: null")
    with pytest.raises(UserError, match="model: got null"):
        read_command_line(["--config", str(tmp_path / "r.yaml"), "--run_dir", "x"])
    for text, hint in (("learnin_rate: 1.0", "learning_rate"), ("model: {hiden_size: 8}", "hidden_size")):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(UserError, match=rf"did you mean '(model\.)?{hint}'"):
            read_command_line(["--config", str(tmp_path / "r.yaml"), "--run_dir", "x"])


def test_a_run_directory_that_is_not_empty_is_refused_untouched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="run_dir: .* is not empty"):
        train(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_directory_that_cannot_be_made_is_refused():
    with pytest.raises(UserError, match="run_dir: /proc/x cannot be written"):
        train(config("/proc/x"))


def test_divergence_stops_the_run_with_a_reason_and_keeps_what_was_written(tmp_path):
    with pytest.raises(UserError, match=r"training diverged: a learning_rate of 1e.*the last checkpoint is step-0"):
        train(config(tmp_path / "run", "--learning_rate", "1e30", "--max_grad_norm", "0", "--warmup_steps", "0"))
    assert len(metrics(tmp_path / "run")) >= 1
    assert not (tmp_path / "run" / "final").exists()


def test_the_command_prints_one_line_and_exits_2_on_bad_input(tmp_path):
    command = [python(), "-m", "train_lm", "--config", "tiny", "--run_dir", str(tmp_path / "run")]
    done = subprocess.run([*command, "--model.norm_kwargs.lam", "-3"], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr == "error: norm_kwargs.lam: got -3.0, must be a finite number >= 0 and <= 1e+30 (norm ibnorm_l)\n"
    )
    assert not list(tmp_path.iterdir())


def test_help_explains_every_field_with_its_default(command):
    code, out, _ = command(main, "--help")
    assert code == 0
    text = " ".join(out.partition("options:")[2].split())
    for prefix, cls in (("", TrainConfig), ("model.", ModelConfig)):
        for name in cls.__dataclass_fields__:
            if name != "model":
                explained = re.search(
                    rf"--{re.escape(prefix + name)} (\S+|\{{.*?\}}) (.+?) \((required|type: .+?, default: .+?)", text
                )
                assert explained, name
                assert len(explained[2]) > 10, name
    assert "merges into it" in text


def test_gradients_are_clipped_and_adam_is_as_configured(tmp_path):
    run = config(tmp_path / "a", "--adam_beta1", "0.8", "--adam_beta2", "0.9", "--adam_epsilon", "1e-5")
    model = AutoModelForCausalLM.from_config(build_model_config(run, 300, 0))
    defaults = build_optimizer(model, run).defaults
    assert (defaults["betas"], defaults["eps"]) == ((0.8, 0.9), 1e-5)
    # With a large epsilon Adam's step is proportional to the gradient, so a clipped one hardly moves the weights.
    moved = {}
    for norm in ("0", "1e-6"):
        flags = ["--max_grad_norm", norm, "--adam_epsilon", "1", "--weight_decay", "0", "--learning_rate", "1"]
        final = train(config(tmp_path / norm, "--max_steps", "1", "--warmup_steps", "0", "--min_lr_rate", "1", *flags))
        start = AutoModelForCausalLM.from_pretrained(tmp_path / norm / "checkpoints" / "step-0" / "model")
        end = AutoModelForCausalLM.from_pretrained(final)
        moved[norm] = max((a - b).abs().max().item() for a, b in zip(start.parameters(), end.parameters(), strict=True))
        assert metrics(tmp_path / norm)[0]["grad_norm"] > 0.1
    assert moved["1e-6"] < 1e-5
    assert moved["0"] > 100 * moved["1e-6"]


@pytest.mark.parametrize("step", ["1", "2"])
def test_weights_that_the_last_step_destroyed_are_not_saved_as_final(tmp_path, step):
    flags = ["--max_steps", step, "--warmup_steps", "0", "--learning_rate", "1e30"]
    with pytest.raises(UserError, match="got nan at step"):
        train(config(tmp_path / "run", *flags))
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.slow
def test_bad_input_under_a_launcher_is_one_line_of_ours(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    done = launch(program(tmp_path), "ddp", "--config", "tiny", "--run_dir", tmp_path / "full")
    assert done.returncode != 0
    assert done.stderr.count("error: run_dir:") == 1
    assert "train_lm/train.py" not in done.stderr, "a rank left a traceback"


def test_check_prints_the_recipe_and_trains_nothing(command, tmp_path):
    flags = ["--config", "tiny", "--run_dir", str(tmp_path / "run"), "--max_steps", "7"]
    code, said, _ = command(main, *flags, "--check")
    assert code == 0
    assert yaml.safe_load(said) == config(tmp_path / "run", "--max_steps", "7").as_recipe()
    assert list(tmp_path.iterdir()) == []
    code, said, complained = command(main, *flags, "--check", "--model.norm_kwargs.lamb", "3")
    assert (code, said) == (2, "")
    assert complained.startswith("error: norm_kwargs.lamb: ibnorm_l has no such option")


def test_documents_begin_with_bos_as_the_settings_and_the_tokenizer_say(tmp_path, capsys):
    tokenizer = wrap_tokenizer(train_tokenizer(["a word or two"], 280), 64)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": f"{name} <s> text"}) + "\n") * 20)
    flags = ["--corpus", str(tmp_path / "*.jsonl"), "--tokenizer", str(tmp_path / "tokenizer"), "--max_steps", "1"]
    flags += ["--warmup_steps", "1"]
    found = {}
    for add_bos in ("auto", "true", "false"):
        AcceleratorState._reset_state(True)
        train(config(tmp_path / add_bos, *flags, "--add_bos", add_bos))
        environment = json.loads((tmp_path / add_bos / "environment.json").read_text())
        found[add_bos] = environment["bos_token_id"], environment["train_tokens"]
    assert found["auto"] == found["true"] == (bos, found["false"][1] + 20)
    assert found["false"][0] is None
    assert f"not trained on: validation: {tmp_path / 'valid.jsonl'}" in capsys.readouterr().out


def test_validating_on_training_text_is_said(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "some text to train on"}) + "\n") * 20)
    flags = ["--corpus", str(tmp_path / "a.jsonl"), "--validation_corpus", str(tmp_path / "a.jsonl")]
    train(config(tmp_path / "run", *flags, "--max_steps", "1", "--warmup_steps", "1"))
    assert "WARNING: validation_corpus: all of it is training text, too" in capsys.readouterr().out
