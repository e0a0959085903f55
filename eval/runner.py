"""Running a suite: load the model once through lm-eval's HFLM, one harness call a benchmark, scores written whole."""

import importlib
import io
import logging
import math
import os
from contextlib import redirect_stderr
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_ibnorm.cli import UserError, bad_input, quiet_libraries
from hf_ibnorm.files import atomic_directory, check_new_directory, environment_record, write_json, write_text
from hf_ibnorm.report.tables import Table, score_cell

from .scoring import ScoringError, check_answers, score_multiple_choice, score_rolling
from .suites import SUITES, Benchmark

SMOKE = "SMOKE - not a leaderboard score"


def run(
    model: str,
    suite: str,
    output: str,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Score a model on a suite and write `scores.json`, `scores.md` and `environment.json` into `output`.

    Args:
        model: directory of a checkpoint with its tokenizer, or of a training run (its `final` is taken).
        suite: "embedded".
        output: a new directory.
        limit: only the first so many items of each benchmark; the scores are then marked as a smoke test.
        batch_size: sequences at a time.
        device: of torch; CUDA if there is any, else the CPU.
        dtype: of the weights: auto (the checkpoint's), float32, bfloat16 or float16.

    Returns:
        The content of `scores.json`.

    Raises:
        UserError: bad input, or answers that cannot be scored; nothing is written then.
    """
    if suite not in SUITES:
        raise UserError(f"suite: got {suite!r}, allowed are {', '.join(SUITES)}")
    target = Path(output)
    with bad_input():
        check_new_directory("output", target)
    harness = load_model(find_model(Path(model)), batch_size, device, dtype)

    console = Console()
    benchmarks = {}
    for i, benchmark in enumerate(SUITES[suite], 1):
        try:
            benchmarks[benchmark.name] = score = run_benchmark(harness, benchmark, limit)
        except ScoringError as error:
            raise UserError(str(error)) from error
        cell = score_cell(score["raw"], score["stderr"], score["details"]["at_chance"])
        console.print(f"{i}/{len(SUITES[suite])} {benchmark.name} {cell}", highlight=False)
    scores = {
        "suite": suite,
        "smoke": limit is not None,
        "model": model,
        "average": None,  # accuracies with different chance levels and bits per byte have no common mean
        "benchmarks": benchmarks,
    }
    table = score_table(scores)
    with bad_input():
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(target) as directory:
            write_json(directory / "scores.json", scores)
            write_text(directory / "scores.md", scores_markdown(scores, table))
            write_json(directory / "environment.json", environment_record())
    if scores["smoke"]:
        console.print(SMOKE, highlight=False)
    table.print()
    return scores


def find_model(path: Path) -> Path:
    """The directory with the checkpoint: `path` itself, its `model` (a training checkpoint) or its `final` (a run)."""
    for candidate in (path, path / "model", path / "final"):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(f"model: {path} is not a model directory (it has no config.json)")


def load_model(path: Path, batch_size: int, device: str | None, dtype: str) -> Any:
    """lm-eval's stock HFLM around the checkpoint at `path`.

    Raises:
        UserError: the checkpoint cannot be loaded, or its tokenizer does not fit the model.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers import AutoConfig, AutoTokenizer

    importlib.import_module("hf_ibnorm")  # registers our models, which the harness cannot do
    quiet_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM

    with bad_input():
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        highest = max(tokenizer.get_vocab().values())
        if highest >= config.vocab_size:
            raise ValueError(
                f"tokenizer: its highest token id is {highest}, the model's vocab_size is {config.vocab_size}; "
                f"the tokenizer in {path} is not this model's"
            )
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        # The first form of this command loads what safetensors holds, never code or pickles.
        return HFLM(
            pretrained=str(path),
            tokenizer=tokenizer,
            backend="causal",
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            use_safetensors=True,
        )


def run_benchmark(harness: Any, benchmark: Benchmark, limit: int | None) -> dict[str, Any]:
    """Put one benchmark through the harness and score its answers.

    Raises:
        ScoringError: the answers are not finite, or the same for every token.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    rows = benchmark.rows()[:limit]
    rolling = benchmark.kind == "rolling"
    # A BOS-adding tokenizer would put a second BOS into a rolling text and score it.
    added, harness.add_bos_token = harness.add_bos_token, False if rolling else harness.add_bos_token
    try:
        tokens = answer_tokens(harness, benchmark, rows)
        task = TaskManager(include_defaults=False).load([benchmark.harness_task()])
        with redirect_stderr(io.StringIO()):  # the harness draws a bar for every batch of a novel
            results = evaluate(harness, task, limit=limit, bootstrap_iters=0, log_samples=True, verbosity="ERROR")
    finally:
        harness.add_bos_token = added
    samples = sorted(results["samples"][benchmark.name], key=lambda sample: int(sample["doc_id"]))
    answers = [sample["filtered_resps"] for sample in samples]
    choices = [[float(value) for value in item] if rolling else [float(value) for value, _ in item] for item in answers]

    check_answers(benchmark.name, list(chain(*choices)), tokens, -math.log(harness.model.config.vocab_size))
    if rolling:
        return score_rolling(list(chain(*choices)), tokens, [row["text"] for row in rows])
    return score_multiple_choice(choices, [row["gold"] for row in rows], [row["cluster"] for row in rows])


def answer_tokens(harness: Any, benchmark: Benchmark, rows: list[dict[str, Any]]) -> list[int]:
    """Number of tokens of every answer the harness will score, item after item.

    Raises:
        ScoringError: an item is longer than the model's context; the harness would cut it or stop.
    """
    if benchmark.kind == "rolling":
        return [len(harness.tok_encode(row["text"])) for row in rows]
    lengths = []
    for row in rows:
        query = len(harness.tok_encode(row["query"]))
        for choice in row["choices"]:
            whole = len(harness.tok_encode(f"{row['query']} {choice}"))
            if whole > harness.max_length + 1:  # the last token is only predicted, never read
                raise ScoringError(
                    f"{benchmark.name}: an item of {whole} tokens, the model's context is {harness.max_length}"
                )
            lengths.append(whole - query)
    return lengths


def score_table(scores: dict[str, Any]) -> Table:
    """The scores as a table: score ± stderr, chance, n, ties, and "at chance" where a model is."""
    table = Table(["benchmark", "score", "chance", "n", "ties", ""])
    for name, score in scores["benchmarks"].items():
        bits = score["details"]["metric"] == "bits_per_byte"
        chance = "" if score["chance"] is None else f"{score['chance']:.3f}"
        ties = "" if bits else str(score["details"]["ties"])
        note = "bits per byte" if bits else "at chance" if score["details"]["at_chance"] else ""
        table.rows.append([name, score_cell(score["raw"], score["stderr"]), chance, str(score["n"]), ties, note])
    return table


def scores_markdown(scores: dict[str, Any], table: Table) -> str:
    """`scores.md`."""
    smoke = f"**{SMOKE}**\n\n" if scores["smoke"] else ""
    return (
        f"# {scores['suite']}: {scores['model']}\n\n{smoke}{table.markdown()}\n"
        "Accuracy ± standard error (robust to items that share a sentence); bits per byte: lower is better. "
        "An item whose best choice is tied counts as wrong. "
        "At chance: within 1.96 standard errors of guessing.\n"
    )
