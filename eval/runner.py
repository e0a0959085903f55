"""Running a suite: load the model once through lm-eval's HFLM, one harness call a benchmark, scores written whole."""

import io
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
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
    with bad_input(ScoringError):
        # All items are measured before any is scored: no novel is read for nothing.
        prepared = [prepare(harness, benchmark, limit) for benchmark in SUITES[suite]]
    for i, (benchmark, rows, tokens) in enumerate(prepared, 1):
        with bad_input(ScoringError):
            benchmarks[benchmark.name] = score = run_benchmark(harness, benchmark, rows, tokens)
        console.print(f"{i}/{len(prepared)} {benchmark.name} {score_cell(score)}", highlight=False)
    scores = {
        "suite": suite,
        "smoke": limit is not None,
        "model": model,
        "average": None,  # accuracies with different chance levels and bits per byte have no common mean
        "benchmarks": benchmarks,
    }
    table = score_table(scores)
    with bad_input(OSError, about="output: "):
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
        UserError: the checkpoint cannot be loaded whole, or its tokenizer does not fit the model or ends texts.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    quiet_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with bad_input(RuntimeError, AssertionError, about=f"device: got {device!r}: "):
        torch.empty(1, device=device)
    causes = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)
    if not any(path.glob("*token*")) and not any(path.glob("vocab.*")):
        raise UserError(f"tokenizer: {path} has none (no tokenizer.json); save it beside the model")
    with bad_input(*causes, about=f"model: {path} cannot be loaded: "):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise UserError(
            f"tokenizer: its highest token id is {highest}, the model's vocab_size is {config.vocab_size}; "
            f"the tokenizer in {path} is not this model's"
        )
    with bad_input(*causes, about=f"model: {path} cannot be loaded: "):
        # Loaded here and not by the harness, which would fill missing weights at random and say so nowhere.
        model, report = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = sorted(str(key) for key in report[problem])
            kind = problem.replace("_keys", "")
            raise UserError(f"model: the weights in {path} do not fit its config, {kind}: {', '.join(names[:3])}")
    harness = HFLM(
        pretrained=model.to(device),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        softmax_dtype="float32",  # in half precision choices would tie, and a constant model would not be noticed
    )
    if len(ids := harness.tok_encode("a")) > 1 and ids[-1] == tokenizer.eos_token_id:
        raise UserError(
            f"tokenizer: the one in {path} ends every text with {tokenizer.eos_token!r}; only that would score"
        )
    return harness


@contextmanager
def bos_for(harness: Any, benchmark: Benchmark) -> Iterator[None]:
    """Without BOS while a rolling text is encoded: the harness puts one before it, a second would be scored."""
    before = harness.add_bos_token
    harness.add_bos_token = False if benchmark.kind == "rolling" else before
    try:
        yield
    finally:
        harness.add_bos_token = before


def prepare(harness: Any, benchmark: Benchmark, limit: int | None) -> tuple[Benchmark, list[dict[str, Any]], list[int]]:
    """A benchmark with its rows and the number of tokens of every answer, item after item.

    Raises:
        ScoringError: an item is longer than the model's context; the harness would cut it or stop.
    """
    rows, lengths = benchmark.rows()[:limit], []
    with bos_for(harness, benchmark):
        for row in rows:
            if benchmark.kind == "rolling":
                lengths.append(len(harness.tok_encode(row["text"])))
                continue
            query = len(harness.tok_encode(row["query"]))
            for choice in row["choices"]:
                whole = len(harness.tok_encode(f"{row['query']} {choice}"))
                if whole > harness.max_length + 1:  # the last token is only predicted, never read
                    raise ScoringError(
                        f"{benchmark.name}: an item of {whole} tokens, the model's context is {harness.max_length}"
                    )
                lengths.append(whole - query)
    return benchmark, rows, lengths


def run_benchmark(harness: Any, benchmark: Benchmark, rows: list[dict[str, Any]], tokens: list[int]) -> dict[str, Any]:
    """Put a prepared benchmark through the harness and score its answers.

    Raises:
        ScoringError: the answers are not finite, or the same for every token.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    task = TaskManager(include_defaults=False).load([benchmark.harness_task(rows)])
    # The harness draws a bar for every batch of a novel.
    with bos_for(harness, benchmark), redirect_stderr(io.StringIO()):
        results = evaluate(harness, task, bootstrap_iters=0, log_samples=True, verbosity="ERROR")
    samples = sorted(results["samples"][benchmark.name], key=lambda sample: int(sample["doc_id"]))
    answers = [sample["filtered_resps"] for sample in samples]
    rolling = benchmark.kind == "rolling"
    choices = [[float(value) for value in item] if rolling else [float(value) for value, _ in item] for item in answers]

    check_answers(benchmark.name, list(chain(*choices)), tokens, -math.log(harness.model.config.vocab_size))
    if rolling:
        return score_rolling(list(chain(*choices)), tokens, [row["text"] for row in rows])
    return score_multiple_choice(choices, [row["gold"] for row in rows], [row["cluster"] for row in rows])


def score_table(scores: dict[str, Any]) -> Table:
    """The scores as a table: score ± stderr and whether that is chance, the chance level, n, ties."""
    table = Table(["benchmark", "score", "chance", "n", "ties"])
    for name, score in scores["benchmarks"].items():
        bits = score["details"]["metric"] == "bits_per_byte"
        chance = "" if score["chance"] is None else f"{score['chance']:.3f}"
        ties = "" if bits else str(score["details"]["ties"])
        table.rows.append([name, score_cell(score) + bits * " bits per byte", chance, str(score["n"]), ties])
    return table


def scores_markdown(scores: dict[str, Any], table: Table) -> str:
    """`scores.md`."""
    smoke = f"**{SMOKE}**\n\n" if scores["smoke"] else ""
    return (
        f"# {scores['suite']}: {scores['model']}\n\n{smoke}{table.markdown()}\n"
        "Accuracy ± standard error (robust to items that share a sentence); bits per byte: lower is better. "
        "An item whose best choice is tied counts as wrong. "
        "At chance: within 1.96 standard errors of guessing; below chance: further down, as a model that prefers short "
        "answers can be.\n"
    )
