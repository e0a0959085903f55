"""Scoring a model through lm-eval: right numbers, refused models, nothing half-written."""

import csv
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from warm import python

from eval.__main__ import main
from eval.model import load_model
from eval.options import SMOKE
from eval.runner import run
from eval.scoring import ScoringError
from eval.suites import MULTIPLE_CHOICE, SUITES, embedded_rows
from hf_ibnorm import load_corpus
from hf_ibnorm.base.errors import UserError
from train_lm.tokenizer import train_tokenizer, wrap_tokenizer

ROOT = Path(__file__).parents[2]
NOVEL = 3_000  # as in conftest.py
EMBEDDED = {each.name: each for each in SUITES["embedded"]}


def changed(checkpoint, target, change):
    shutil.copytree(checkpoint, target, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        change(model)
    model.save_pretrained(target)
    return target


@torch.no_grad()
def loglikelihood(model, context, answer):
    """Sum of log-probabilities of `answer` after `context`, token by token, without the harness."""
    logits = model(torch.tensor([context + answer])).logits.double().log_softmax(-1)[0]
    return sum(logits[len(context) + i - 1, token].item() for i, token in enumerate(answer))


@pytest.mark.oldest
def test_scores_agree_with_log_likelihoods_computed_independently(checkpoint, tmp_path):
    scores = run(str(checkpoint), "embedded", str(tmp_path / "out"), limit=40)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(checkpoint).eval(),
        AutoTokenizer.from_pretrained(checkpoint),
    )

    def encode(text):
        return tokenizer(text)["input_ids"]

    for name in MULTIPLE_CHOICE:
        right, rows = 0, embedded_rows(name)[:40]
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


def test_accuracy_without_ties_is_the_harness_own(checkpoint, tmp_path):
    scores = run(str(checkpoint), "embedded", str(tmp_path / "out"), limit=60)
    for name in MULTIPLE_CHOICE:
        ours = scores["benchmarks"][name]
        result = json.loads((tmp_path / "out" / "results" / f"{name}.json").read_text())
        assert ours["details"]["ties"] == 0
        assert ours["raw"] == pytest.approx(result["harness"][name]["acc,none"])


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
    assert list(scores) == ["suite", "smoke", "model", "average", "benchmarks", "notes"]
    assert scores["smoke"] is True
    assert list(scores["benchmarks"]) == [benchmark.name for benchmark in SUITES["embedded"]]
    for score in scores["benchmarks"].values():
        assert list(score) == ["raw", "stderr", "normalized", "chance", "n", "details"]
    markdown = (out / "scores.md").read_text()
    assert SMOKE in markdown
    assert "| sva_simple |" in markdown
    assert "at chance" in markdown
    files = {path.name for path in out.iterdir()}
    scored = {f"scores.{kind}" for kind in ("json", "md", "csv", "tex")}
    assert files == {".lock", "environment.json", "manifest.json", "results", *scored}
    assert all(SMOKE in (out / f"scores.{kind}").read_text() for kind in ("md", "tex"))
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert [row["benchmark"] for row in rows] == list(scores["benchmarks"])
    assert all(row["stamp"] == SMOKE for row in rows)
    assert scores["notes"][0] == SMOKE
    assert all(json.loads(path.read_text())["stamp"] == SMOKE for path in (out / "results").iterdir())
    assert [float(row["raw"]) for row in rows] == [score["raw"] for score in scores["benchmarks"].values()]


def test_a_run_directory_or_a_training_checkpoint_may_be_named_instead(checkpoint, tmp_path):
    for name in ("final", "model"):
        shutil.copytree(checkpoint, tmp_path / name / name)
        run(str(tmp_path / name), "embedded", str(tmp_path / f"scores-{name}"), limit=2)


BROKEN = {
    "nan": (lambda model: model.model.layers[0].mlp.up_proj.weight.fill_(math.nan), "logits: .* are NaN or infinite"),
    "constant": (lambda model: model.model.embed_tokens.weight.zero_(), "logits: .* every token the same score"),
}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused_before_and_by_every_task(checkpoint, tmp_path, score, name, dtype):
    change, message = BROKEN[name]
    broken = changed(checkpoint, tmp_path / "model", change)
    with pytest.raises(UserError, match=message):
        run(str(broken), "embedded", str(tmp_path / "out"), limit=5, dtype=dtype)
    assert not (tmp_path / "out").exists()
    harness = load_model(broken, 8, "cpu", dtype)
    for benchmark in SUITES["embedded"]:
        with pytest.raises(ScoringError, match=benchmark.name):
            score(harness, benchmark, 20)


def test_half_precision_weights_do_not_make_choices_tie(checkpoint, score):
    linzen = EMBEDDED["sva_linzen"]
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
    "truncated": (lambda path: os.truncate(path / "model.safetensors", 1000), "model: .* cannot be read"),
    "other width": (lambda path: edit_config(path, hidden_size=64), "model: .*(mismatched|cannot be read)"),
    "more layers": (lambda path: edit_config(path, num_hidden_layers=3), "missing: model.layers.2"),
    "fewer layers": (lambda path: edit_config(path, num_hidden_layers=1), "unexpected: model.layers.1"),
    "bad norm": (lambda path: edit_config(path, norm_type=3), "model: .* cannot be read: .*norm_type"),
    "unknown type": (lambda path: edit_config(path, model_type="nonesuch"), "model: .* cannot be read"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "model: .* cannot be read"),
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


def test_a_model_without_its_tokenizer_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match="tokenizer: .*model has none"):
        load_model(tmp_path / "model", 8, "cpu", "auto")


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    wrap_tokenizer(train_tokenizer([load_corpus("austen", "test")[0]], 400), 512).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="tokenizer: it has the token .* with id 399, the model's vocab_size is 300"):
        run(str(tmp_path / "model"), "embedded", str(tmp_path / "out"))


def with_tokens(checkpoint, target, special, plain=()):
    """The checkpoint with tokens that lie beyond its embedding."""
    shutil.copytree(checkpoint, target)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(list(plain))
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.oldest
def test_a_pad_token_beyond_the_embedding_changes_nothing(checkpoint, long_checkpoint, mirror, tmp_path):
    """As in the first release of Llama 2: texts of several lengths are padded with a token that the model has."""
    padded = with_tokens(long_checkpoint, tmp_path / "model", {"pad_token": "<pad>"})
    asked = {"mirror": str(mirror), "limit": 3, "gen_kwargs": {"max_gen_toks": 4}}
    first, second = (
        run(str(each), "gsm8k,truthfulqa_mc1", str(tmp_path / each.name / "out"), **asked)
        for each in (long_checkpoint, padded)
    )
    assert first["benchmarks"] == second["benchmarks"]


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("special", "plain", "token"),
    [({}, ["  "], "  "), ({"bos_token": "<s>"}, [], "<s>"), ({"eos_token": "</s>"}, [], "</s>")],
)
def test_a_token_that_a_text_may_become_must_be_in_the_embedding(checkpoint, tmp_path, special, plain, token):
    path = with_tokens(checkpoint, tmp_path / "model", special, plain)
    with pytest.raises(
        UserError, match=f"tokenizer: it has the token '{token}' with id 300, the model's vocab_size is 300"
    ):
        load_model(path, 8, "cpu", "auto")


def test_a_prompt_that_spells_a_token_beyond_the_embedding_is_refused(checkpoint, tmp_path, monkeypatch):
    path = with_tokens(checkpoint, tmp_path / "model", {"pad_token": "<pad>"})
    monkeypatch.setattr("eval.suites.load_corpus", lambda name, split: ["Some text <pad> and more."])
    with pytest.raises(UserError, match="austen_test: a prompt has the token '<pad>' with id 300, the model's vocab"):
        run(str(path), "austen_test", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def old_gpt2(checkpoint, path, **more):
    """A GPT-2 whose file has what old releases of Transformers wrote: every layer's causal mask, and no prefix."""
    sizes = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, path)
    weights = {name.removeprefix("transformer."): each for name, each in load_file(path / "model.safetensors").items()}
    for i in range(2):
        weights[f"h.{i}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file({**weights, **more}, path / "model.safetensors", metadata={"format": "pt"})
    return model.eval()


@pytest.mark.oldest
def test_the_masks_in_old_files_of_gpt2_are_passed_over(checkpoint, tmp_path):
    model = old_gpt2(checkpoint, tmp_path)
    lm = load_model(tmp_path, 8, "cpu", "auto")
    ids = torch.arange(20)[None]
    assert torch.equal(lm.model(ids).logits, model(ids).logits)


@pytest.mark.oldest
@pytest.mark.parametrize("name", ["h.0.attn.masked_bias", "h.0.attn.extra.bias", "h.2.ln_1.weight"])
def test_a_tensor_of_another_shape_or_name_is_not_passed_over(checkpoint, tmp_path, name):
    old_gpt2(checkpoint, tmp_path, **{name: torch.zeros(96)})
    with pytest.raises(UserError, match=f"do not fit its config, unexpected: .*{name}"):
        load_model(tmp_path, 8, "cpu", "auto")


def test_an_item_longer_than_the_context_is_refused(checkpoint, tmp_path):
    short = changed(checkpoint, tmp_path / "model", lambda model: setattr(model.config, "max_position_embeddings", 64))
    with pytest.raises(UserError, match="context: sva_linzen: .*, the model's context is 64; --overlong skip"):
        run(str(short), "embedded", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "missing"], "model: missing is not a model directory"),
        (["--suite", "openllm"], "suite: got 'openllm', allowed are embedded"),
        (["--suite", "embeded"], "(did you mean 'embedded'?)"),
        (["--suite", "sva_simple,arc_chalenge"], "suite: got 'arc_chalenge', allowed are embedded"),
        (["--tasks", "arc_esy"], "(did you mean 'arc_easy'?)"),
        (["--suite", "sva_simple,sva_simple"], "suite: got 'sva_simple' more than once"),
        (["--suite", "v1,arc_easy"], "suite: got 'v1,arc_easy', 'v1' stands alone"),
        (["--suite", "embedded,"], "stands alone, or is no name"),
        (["--include_path", "nowhere"], "include_path: nowhere is no directory"),
        (["--num_fewshot", "-1"], "argument --num_fewshot: got '-1', must be a whole number >= 0"),
        (["--shard", "3/2"], "argument --shard: got '3/2', must be i/n"),
        (["--skip", "v4"], "skip: got 'v4', allowed are austen_test"),
        (["--ignore", "all"], "ignore: got 'all', allowed are packages"),
        (["--gen_kwargs", "x"], "argument --gen_kwargs: got 'x', must be a JSON object"),
        (["--limit", "0"], "argument --limit: got '0', must be a whole number >= 1"),
        (["--batch_size", "0"], "argument --batch_size: got '0'"),
        (["--modle", "x"], "did you mean '--model'"),
        (["--output", "."], "output: . is not empty"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(command, flags, message, tmp_path, monkeypatch):
    (tmp_path / "mine").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", None)  # which takes half a minute to tell a typo
    code, out, err = command(main, "run", "--model", ".", "--suite", "embedded", "--output", "out", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_batch_size_is_not_searched_for_on_a_cpu(checkpoint, command, tmp_path):
    words = ["--model", str(checkpoint), "--suite", "embedded", "--output", str(tmp_path / "out")]
    code, _, err = command(main, "run", *words, "--batch_size", "auto", "--device", "cpu")
    assert code == 2
    assert err.startswith("error: batch_size: got 'auto', on a CPU it must be a whole number")


def test_a_device_without_values_is_refused(checkpoint, command, tmp_path):
    words = ["--model", str(checkpoint), "--suite", "embedded", "--output", str(tmp_path / "out")]
    code, _, err = command(main, "run", *words, "--device", "meta")
    assert code == 2
    assert err.startswith("error: device: got 'meta': ")


def test_the_manifest_says_what_a_score_is_of(checkpoint, tmp_path):
    scores = run(str(checkpoint), "embedded", str(tmp_path / "out"), limit=3)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    identity = manifest["identity"]
    assert set(identity["model"]) == {"weights", "config", "tokenizer", "generation", "dtype", "max_length"}
    assert identity["versions"]["lm_eval"] == "0.4.13"
    assert identity["seeds"] == {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
    assert manifest["model"] == str(checkpoint)
    assert manifest["settings"]["limit"] == 3
    assert manifest["task_hashes"] == {
        name: row["details"]["tasks"][name]["hash"] for name, row in scores["benchmarks"].items()
    }


def test_the_command_scores_from_any_folder(checkpoint, tmp_path):
    words = ["run", "--model", str(checkpoint), "--suite", "embedded", "--limit", "2", "--output", "out"]
    # From the tree's root, as in the README: the embedded tasks are found wherever the model and the output are.
    done = subprocess.run(
        [python(), "-m", "eval", *words[:-1], str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "\n1/7 austen_test " in done.stdout
    assert SMOKE in done.stdout
    assert done.stderr == ""


def test_tasks_ship_the_rows_of_their_sources():
    counts = {name: len(embedded_rows(name)) for name in MULTIPLE_CHOICE}
    assert counts == {
        "sva_simple": 600,
        "sva_nounpp": 2400,
        "sva_linzen": 499,
        "cause_and_effect": 51,
        "phrase_relatedness": 100,
        "human_organs_senses": 42,
    }
