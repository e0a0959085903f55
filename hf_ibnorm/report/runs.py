"""Reading finished training runs back from disk, and setting them side by side."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .tables import Table, score_cell


@dataclass(frozen=True)
class Run:
    """A training run as its directory describes it; `scores` is None where `scores/scores.json` is missing."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    scores: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Read the run in `path`.

        Raises:
            ValueError: `path` is no finished run directory.
        """
        for name in ("config.yaml", "environment.json", "metrics.jsonl", "final"):
            if not (path / name).exists():
                raise ValueError(f"run: {path} is not a finished run directory (it has no {name})")
        scores = path / "scores" / "scores.json"
        return cls(
            name=path.name,
            config=yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")),
            environment=json.loads((path / "environment.json").read_text(encoding="utf-8")),
            metrics=[json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()],
            scores=json.loads(scores.read_text(encoding="utf-8")) if scores.exists() else None,
        )

    @property
    def label(self) -> str:
        """The norm with its strength: what tells runs of one study apart."""
        model = self.config["model"]
        lam = model["norm_kwargs"].get("lam")
        return model["norm_type"] + ("" if lam is None else f" λ={lam:g}")

    def seconds_per_step(self) -> float:
        """Median over all steps, validation not counted."""
        before = [0, *(row["tokens"] for row in self.metrics)]
        return statistics.median(
            (row["tokens"] - start) / row["tokens_per_second"] for start, row in zip(before, self.metrics, strict=False)
        )


def comparison(runs: list[Run]) -> Table:
    """Runs as columns: the test set first, then what it cost, then the tasks."""
    table = Table(["", *(run.label for run in runs)])
    scored = [run.scores["benchmarks"] if run.scores else {} for run in runs]
    names = list(dict.fromkeys(name for scores in scored for name in scores))

    def add_scores(metric: str, title: str) -> None:
        for name in names:
            rows = [scores.get(name) for scores in scored]
            if any(row and row["details"]["metric"] == metric for row in rows):
                cells = [
                    score_cell(row["raw"], row["stderr"], row["details"]["at_chance"]) if row else "-" for row in rows
                ]
                table.rows.append([title.format(name=name), *cells])

    add_scores("bits_per_byte", "{name}, bits per byte (lower is better)")
    table.rows += [
        ["validation loss, nats per token", *(f"{run.metrics[-1]['eval_loss']:.3f}" for run in runs)],
        ["parameters", *(f"{run.environment['parameters']:,}" for run in runs)],
        ["tokens trained on", *(f"{run.metrics[-1]['tokens']:,}" for run in runs)],
        ["seconds per step", *(f"{run.seconds_per_step():.3f}" for run in runs)],
    ]
    add_scores("acc", "{name}, accuracy")
    return table


def fairness(runs: list[Run]) -> list[str]:
    """What the runs share, as sentences; a difference that spoils a comparison is said, not hidden."""
    lines = []
    starts = {run.environment["init_sha"] for run in runs}
    if len(starts) == 1:
        lines.append(f"Same initial values of every shared parameter: sha256 {starts.pop()[:16]}.")
    else:
        lines.append("WARNING: the runs did not start from the same values of their shared parameters.")
    orders = {tuple(row["batch_sha"] for row in run.metrics) for run in runs}
    if len(orders) == 1:
        lines.append(f"Same data in the same order: all {len(orders.pop())} batches have equal hashes.")
    else:
        lines.append("WARNING: the runs did not see the same batches in the same order.")
    seeds = sorted({run.config["seed"] for run in runs})
    if len(seeds) == 1:
        lines.append(
            f"One seed ({seeds[0]}) of a small model decides nothing: another seed or learning rate can move these "
            "numbers as much as the norm does."
        )
    return lines
