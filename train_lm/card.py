"""The model card of a finished training run: front matter that the Hub reads, and the text of `card.md`, filled in."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_ibnorm.data import CORPORA
from hf_ibnorm.report.document import template
from hf_ibnorm.report.runs import Run
from hf_ibnorm.report.tables import Table, number_cell, score_cell

FAMILY_NAMES = {"llama": "Llama", "gpt2": "GPT-2"}
COMPUTE_OPTIMAL = 20
"""Tokens per parameter, about, at which a given amount of computation is spent best (Hoffmann et al., 2022)."""
HASHES = {"training text": "train_sha", "validation text": "validation_sha", "tokenizer": "tokenizer_sha"}
PACKAGES = ("hf_ibnorm", "torch", "transformers", "accelerate", "python")


def model_card(run: Run, repo: str | None = None, remote_code: bool = False) -> str:
    """The card of a finished run: a `README.md`, with YAML front matter, that stands beside the model and `loss.png`.

    The same run gives the same text. Of a path on this machine, such as a corpus came from, it has the last part only.
    `repo`, NAMESPACE/NAME, is where the model is loaded from, None for a directory; with `remote_code`, its code lies
    beside it.
    """
    name = repo.split("/")[-1] if repo else run.name
    model = run.config["model"]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=benchmark,
            dataset_name=benchmark,
            metric_type=row["details"]["metric"],
            metric_value=row["raw"],
        )
        for benchmark, row in (run.scores["benchmarks"].items() if run.scores and not run.scores["smoke"] else ())
        if row["raw"] is not None
    ]
    # Names that the run loaded from the Hub: only where it ran could a name be told from a directory.
    on_hub = run.environment.get("on_hub", [])
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_ibnorm", *(norm for _, norm, _ in run.norms())],
        base_model=model["init_from"] if model.get("init_from") in on_hub else None,
        datasets=[run.config["corpus"]] if run.config["corpus"] in on_hub else None,
        model_name=name if results else None,
        eval_results=results or None,
    )

    def named(source: str) -> str:
        """A corpus, tokenizer or checkpoint by its name on the Hub, or by the last part of its path."""
        return _code(source if source in on_hub else re.split(r"[/\\]", source.rstrip("/\\"))[-1])

    filters = {"code": _code, "plain": _plain, "named": named}
    text = template(Path(__file__).with_name("card.md"), autoescape=False, **filters).render(
        name=name, repo=repo, remote_code=remote_code, model=model, norm=_norm, **_facts(run)
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _facts(run: Run) -> dict[str, Any]:
    """The variables of `card.md` that come from a run."""
    config, environment, last = run.config, run.environment, run.metrics[-1]
    model_type, known = config["model"]["model_type"], environment.get("train_tokens")
    processes = environment.get("num_processes", 1)
    sequences = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] * processes
    seen = last["tokens"] / environment["parameters"]
    versions = {name: environment["versions"].get(name) for name in PACKAGES}
    notes = run.scores.get("notes", []) if run.scores else []
    path = r"(?<![\w:/.])~?/(?:[^\s/'\"]+/)+([^\s/'\"]*)"  # an absolute one; its last part is group 1
    return {
        "family": FAMILY_NAMES.get(model_type, model_type),
        "config": config,
        "environment": environment,
        "last": last,
        "embedded": config["corpus"] in CORPORA,
        "hashes": ", ".join(f"{text} {_code(sha)}" for text, key in HASHES.items() if (sha := environment.get(key))),
        "passes": f"{last['tokens'] / known:.2g}" if known else None,
        "processes": processes,
        "sequences": sequences,
        "skipped": sum("skipped" in row for row in run.metrics),
        "duration": _duration(run.seconds()),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "scores": run.scores,
        "table": _score_table(run.scores).markdown() if run.scores else "",
        "notes": [re.sub(path, r"\1", note) for note in notes if not note.startswith("SMOKE")],
        "tokens_per_parameter": f"{seen:.2g}",
        "optimal": COMPUTE_OPTIMAL,
        "undertrained": not config["model"].get("init_from") and seen < COMPUTE_OPTIMAL,
    }


def _score_table(scores: dict[str, Any]) -> Table:
    table = Table(["benchmark", "metric", "score", "normalized", "items"])
    for name, row in scores["benchmarks"].items():
        metric = row["details"]["metric"]
        lower = " (lower is better)" if metric == "bits_per_byte" else ""
        level, items = number_cell(row["normalized"], ".2f"), number_cell(row["n"], ",")
        table.rows.append([_code(name), _code(metric) + lower, score_cell(row), level, items])
    return table


def _norm(name: str, options: dict[str, Any]) -> str:
    """A norm with its options, the choice of its kernels apart."""
    shown = ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in options.items()
        if key != "backend" and value is not None
    )
    return _code(name) + (f" with {_code(shown)}" if shown else "")


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} seconds"


def _code(value: object) -> str:
    """Any text, with backticks or without, as inline code on one line."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{space}{text}{space}{fence}"


def _plain(value: object) -> str:
    """Any text on one line, with Markdown's own characters escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", " ".join(str(value).split()))
