"""Scoring a model through lm-eval: right numbers, refused models, nothing half-written."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.__main__ import main
from eval.runner import SMOKE, load_model, prepare, run, run_benchmark
from eval.suites import MULTIPLE_CHOICE, SUITES, Benchmark
from hf_ibnorm import load_corpus
from hf_ibnorm.cli import UserError
from train_lm.config import build_model_config, read_command_line
from train_lm.tokenizer import train_tokenizer, wrap_tokenizer

ROOT = Path(__file__).parents[2]
NOVEL = 3_000
"""Characters of the test novel that these tests read."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained model with noise norms and large weights, so that its answers differ, and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    config = read_command_line(["--config", "tiny", "--run_dir", "unused", "--model.norm_type", "layernormalnorm"])
    tokenizer = wrap_tokenizer(train_tokenizer([load_corpus("austen", "train")[0][:50_000]], 300), 512)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build_model_config(config, len(tokenizer), tokenizer.eos_token_id))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def short_novel(monkeypatch):
    monkeypatch.setattr("eval.suites.load_corpus", lambda name, split: [load_corpus(name, split)[0][:NOVEL]])


def changed(checkpoint, target, change):
    shutil.copytree(checkpoint, target, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        change(model)
    model.save_pretrained(target)
    return target


def score(harness, benchmark, limit=None):
    return run_benchmark(harness, *prepare(harness, benchmark, limit))


@torch.no_grad()
def loglikelihood(model, context, answer):
    """Sum of log-probabilities of `answer` after `context`, token by token, without the harness."""
    logits = model(torch.tensor([context + answer])).logits.double().log_softmax(-1)[0]
    return sum(logits[len(context) + i - 1, token].item() for i, token in enumerate(answer))


def test_scores_agree_with_log_likelihoods_computed_independently(checkpoint, tmp_path):
    scores = run(str(checkpoint), "embedded", str(tmp_path / "out"), limit=40)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint).eval(),
        AutoTokenizer.from_pretrained(checkpoint),
    )

    def encode(text):
        return tokenizer(text)["input_ids"]

    for name in MULTIPLE_CHOICE:
        right, rows = 0, Benchmark(name, "multiple_choice").rows()[:40]
        for row in rows:
            context = encode(row["query"])
            values = [
                loglikelihood(model, context, encode(f"{row['query']} {choice}")[len(context) :])
                for choice in row["choices"]
            ]
            right += values.index(max(values)) == row["gold"]
        assert scores["benchmarks"][name]["raw"] == pytest.approx(right / len(rows))
        assert scores["benchmarks"][name]["n"] == len(rows)

    text = load_corpus("austen", "test")[0][:NOVEL]
    ids = encode(text)
    # The harness's windows: one token of context each, but the last, which reaches back to fill the model's context.
    total = loglikelihood(model, [tokenizer.eos_token_id], ids[:512])
    for start in range(512, len(ids), 512):
        end = min(start + 512, len(ids))
        total += loglikelihood(model, ids[end - 513 : start], ids[start:end])
    assert scores["benchmarks"]["austen_test"]["raw"] == pytest.approx(
        -total / math.log(2) / len(text.encode()), rel=1e-5
    )


def test_accuracy_without_ties_is_the_harness_own(checkpoint, monkeypatch):
    from lm_eval import evaluator

    seen = {}

    def recording(*args, original=evaluator.evaluate, **kwargs):
        seen.update(original(*args, **kwargs)["results"])
        return original(*args, **kwargs)

    monkeypatch.setattr(evaluator, "evaluate", recording)
    ours = score(load_model(checkpoint, 8, "cpu", "auto"), Benchmark("sva_linzen", "multiple_choice"), 60)
    assert ours["details"]["ties"] == 0
    assert ours["raw"] == pytest.approx(seen["sva_linzen"]["acc,none"])


def test_trained_with_noise_scores_are_bit_identical_twice_and_for_any_batch_size(checkpoint, tmp_path):
    results = [
        run(str(checkpoint), "embedded", str(tmp_path / name), limit=30, batch_size=size)
        for name, size in (("a", 8), ("b", 8), ("c", 1))
    ]
    assert results[0] == results[1]
    for name, score in results[0]["benchmarks"].items():
        assert score["raw"] == pytest.approx(results[2]["benchmarks"][name]["raw"], rel=1e-6)


def test_written_files_hold_the_documented_fields(checkpoint, tmp_path):
    out = tmp_path / "new" / "out"
    run(str(checkpoint), "embedded", str(out), limit=5)
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores) == ["suite", "smoke", "model", "average", "benchmarks"]
    assert scores["smoke"] is True
    assert list(scores["benchmarks"]) == [benchmark.name for benchmark in SUITES["embedded"]]
    for score in scores["benchmarks"].values():
        assert list(score) == ["raw", "stderr", "normalized", "chance", "n", "details"]
    markdown = (out / "scores.md").read_text()
    assert SMOKE in markdown
    assert "| sva_simple |" in markdown
    assert "at chance" in markdown
    assert sorted(path.name for path in out.iterdir()) == ["environment.json", "scores.json", "scores.md"]


def test_a_run_directory_or_a_training_checkpoint_may_be_named_instead(checkpoint, tmp_path):
    for name in ("final", "model"):
        shutil.copytree(checkpoint, tmp_path / name / name)
        run(str(tmp_path / name), "embedded", str(tmp_path / f"scores-{name}"), limit=2)


BROKEN = {
    "nan": (lambda model: model.model.layers[0].mlp.up_proj.weight.fill_(math.nan), "austen_test: .* must be finite"),
    "constant": (lambda model: model.model.embed_tokens.weight.zero_(), "austen_test: .* every token the same score"),
}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_an_error_naming_the_task(checkpoint, tmp_path, name, dtype):
    change, message = BROKEN[name]
    broken = changed(checkpoint, tmp_path / "model", change)
    with pytest.raises(UserError, match=message):
        run(str(broken), "embedded", str(tmp_path / "out"), limit=5, dtype=dtype)
    assert not (tmp_path / "out").exists()
    harness = load_model(broken, 8, "cpu", dtype)
    for benchmark in SUITES["embedded"][1:]:
        with pytest.raises(ValueError, match=benchmark.name):
            score(harness, benchmark, 20)


def test_half_precision_weights_do_not_make_choices_tie(checkpoint):
    linzen = Benchmark("sva_linzen", "multiple_choice")
    half = score(load_model(checkpoint, 8, "cpu", "bfloat16"), linzen, 100)
    assert half["details"]["ties"] <= 2


def edit_config(path, **fields):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def drop_a_weight(path):
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


DAMAGED = {
    "missing weight": (drop_a_weight, "do not fit its config, missing: model.layers.0.mlp.up_proj.weight"),
    "truncated": (lambda path: os.truncate(path / "model.safetensors", 1000), "model: .* cannot be loaded"),
    "other width": (lambda path: edit_config(path, hidden_size=64), "model: .*(mismatched|cannot be loaded)"),
    "more layers": (lambda path: edit_config(path, num_hidden_layers=3), "missing: model.layers.2"),
    "fewer layers": (lambda path: edit_config(path, num_hidden_layers=1), "unexpected: model.layers.1"),
    "bad norm": (lambda path: edit_config(path, norm_type=3), "model: .* cannot be loaded: .*norm_type"),
    "unknown type": (lambda path: edit_config(path, model_type="nonesuch"), "model: .* cannot be loaded"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "model: .* cannot be loaded"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_checkpoint_that_is_not_whole_is_refused_and_never_filled_at_random(checkpoint, tmp_path, name):
    damage, message = DAMAGED[name]
    shutil.copytree(checkpoint, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        run(str(tmp_path / "model"), "embedded", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(checkpoint, device):
    with pytest.raises(UserError, match=f"device: got '{device}'"):
        load_model(checkpoint, 8, device, "auto")


def with_template(checkpoint, target, single):
    """A copy whose tokenizer adds the end-of-text token where `single` says."""
    shutil.copytree(checkpoint, target)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    special = [(tokenizer.eos_token, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    tokenizer.save_pretrained(target)
    return target


def test_a_model_without_its_tokenizer_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match="tokenizer: .*model has none"):
        load_model(tmp_path / "model", 8, "cpu", "auto")


def test_an_eos_appending_tokenizer_is_refused(checkpoint, tmp_path):
    path = with_template(checkpoint, tmp_path / "model", "$A <|endoftext|>")
    with pytest.raises(UserError, match="tokenizer: .* ends every text with '<.endoftext.>'"):
        load_model(path, 8, "cpu", "auto")


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    wrap_tokenizer(train_tokenizer([load_corpus("austen", "test")[0]], 400), 512).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="tokenizer: its highest token id is 399, the model's vocab_size is 300"):
        run(str(tmp_path / "model"), "embedded", str(tmp_path / "out"))


def test_an_item_longer_than_the_context_is_refused(checkpoint, tmp_path):
    short = changed(checkpoint, tmp_path / "model", lambda model: setattr(model.config, "max_position_embeddings", 64))
    with pytest.raises(UserError, match="sva_linzen: an item of .* tokens, the model's context is 64"):
        run(str(short), "embedded", str(tmp_path / "out"))


def test_a_bos_adding_tokenizer_scores_the_same_rolling_text(checkpoint, tmp_path):
    adding = load_model(with_template(checkpoint, tmp_path / "model", "<|endoftext|> $A"), 8, "cpu", "auto")
    assert adding.tok_encode("a")[0] == adding.tokenizer.eos_token_id
    novel = SUITES["embedded"][0]
    assert score(adding, novel) == score(load_model(checkpoint, 8, "cpu", "auto"), novel)
    assert adding.tok_encode("a")[0] == adding.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "missing"], "model: missing is not a model directory"),
        (["--suite", "v3"], "suite: got 'v3', allowed are embedded"),
        (["--limit", "0"], "argument --limit: got '0', must be a whole number >= 1"),
        (["--batch_size", "auto"], "argument --batch_size: got 'auto'"),
        (["--modle", "x"], "did you mean '--model'"),
        (["--output", "."], "output: . is not empty"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(command, flags, message, tmp_path, monkeypatch):
    (tmp_path / "mine").touch()
    monkeypatch.chdir(tmp_path)
    code, out, err = command(main, "run", "--model", ".", "--suite", "embedded", "--output", "out", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_scores_from_any_folder(checkpoint, tmp_path):
    words = ["run", "--model", str(checkpoint), "--suite", "embedded", "--limit", "2", "--output", "out"]
    # From the tree's root, as in the README: the embedded tasks are found wherever the model and the output are.
    done = subprocess.run(
        [sys.executable, "-m", "eval", *words[:-1], str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1/7 austen_test ")
    assert SMOKE in done.stdout
    assert done.stderr == ""


def test_tasks_ship_the_rows_of_their_sources():
    counts = {name: len(Benchmark(name, "multiple_choice").rows()) for name in MULTIPLE_CHOICE}
    assert counts == {
        "sva_simple": 600,
        "sva_nounpp": 2400,
        "sva_linzen": 499,
        "cause_and_effect": 51,
        "phrase_relatedness": 100,
        "human_organs_senses": 42,
    }
