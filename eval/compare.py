"""Whether models differ: the same items, paired; difference, interval, test and verdict for each benchmark."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_ibnorm.base.errors import UserError

from .options import Prompting
from .scoring import ScoringError, Stratum, independent, score_benchmark, strata
from .statistics import BETTER as BETTER
from .statistics import SAME as SAME
from .statistics import TEST_FROM, Pairs, bootstrap_interval, holm, p_of_no_difference, summed, verdict_of
from .statistics import WORSE as WORSE
from .store import benchmarks_of, read_run
from .suites import Benchmark

CHANCE, NOT_TESTED = "both at chance", "not tested"
"""Verdicts beside those of `statistics`; the second: there are too few independent items for any other."""


@dataclass(frozen=True)
class Difference:
    """One benchmark of one model against the same of another.

    Args:
        benchmark: lm-eval's name.
        title: how a leaderboard heads its column.
        first: score of the model that is compared with, as a fraction or in bits per byte.
        second: score of the other.
        difference: second - first.
        interval: 95 % of the differences over resampled items lie in it; None for fewer than ten clusters of items in a
            task, and where the models do not differ on any item.
        p: of no difference (two-sided); None for fewer than six clusters, of which no test can tell anything.
        adjusted: p after Holm's correction for the number of benchmarks.
        wins: items that only the second gets right (or has more of), and `losses` the first.
        n: items.
        verdict: about the second model: better, worse, not distinguishable, both at chance, or not tested.
    """

    benchmark: str
    title: str
    first: float
    second: float
    difference: float
    interval: tuple[float, float] | None
    p: float | None
    adjusted: float | None
    wins: int
    losses: int
    n: int
    verdict: str


def pair(first: Sequence[Stratum], second: Sequence[Stratum]) -> list[Pairs]:
    """Item by item second - first; ScoringError where the two have other items."""
    pairs = []
    for a, b in zip(first, second, strict=True):
        if a.items != b.items:
            raise ScoringError(f"{a.task}: the runs have other items")
        pairs.append(summed(np.subtract(b.values, a.values), a.clusters, a.weight))
    return pairs


def compare(
    benchmarks: Sequence[Benchmark], first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]], seed: int = 0
) -> list[Difference]:
    """Set the second of two runs against the first, benchmark by benchmark.

    Args:
        benchmarks: those that both have answered.
        first: result files by benchmark.
        second: result files by benchmark.
        seed: of the resampling.

    Raises:
        ScoringError: the runs have other items.
    """
    rows = [_difference(each, first[each.name], second[each.name], seed) for each in benchmarks]
    compared = []
    for benchmark, row, p in zip(benchmarks, rows, holm([row.p for row in rows]), strict=True):
        tested = NOT_TESTED if p is None else verdict_of(row.difference, p, benchmark.rolling)
        compared.append(replace(row, adjusted=p, verdict=row.verdict or tested))
    return compared


def _difference(benchmark: Benchmark, first: dict[str, Any], second: dict[str, Any], seed: int) -> Difference:
    """One benchmark's difference: not corrected yet, and with a verdict only where both models are at chance."""
    generator = np.random.default_rng(seed)
    ours, theirs = (independent(strata(benchmark, result)) for result in (first, second))
    a, b = (score_benchmark(benchmark, result) for result in (first, second))
    pairs = pair(ours, theirs)
    interval = bootstrap_interval(pairs, generator)
    enough = sum(each.sums.size for each in pairs) >= TEST_FROM
    moved = np.concatenate([np.subtract(y.values, x.values) for x, y in zip(ours, theirs, strict=True)])
    better = -moved if benchmark.rolling else moved
    return Difference(
        benchmark.name,
        benchmark.title,
        first=a["raw"],
        second=b["raw"],
        difference=b["raw"] - a["raw"],
        interval=interval,
        p=p_of_no_difference(pairs, generator) if enough else None,
        adjusted=None,
        wins=int((better > 0).sum()),
        losses=int((better < 0).sum()),
        n=a["n"],
        verdict=CHANCE if a["details"]["at_chance"] and b["details"]["at_chance"] else "",
    )


@dataclass(frozen=True)
class Scored:
    """A run that was scored, as its directory has it."""

    name: str
    manifest: dict[str, Any]
    results: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "Scored":
        """Read the run in `path`; UserError where that cannot be done."""
        manifest, results = read_run(path)
        return cls(str(path), manifest, {name: result for name, result in results.items() if "tasks" in result})


def comparable(runs: Sequence[Scored]) -> list[Benchmark]:
    """The benchmarks that all runs have answered, asked the same way; UserError where the runs differ in prompts,
    examples or limits, or share no benchmark."""
    first = runs[0]
    for run in runs[1:]:
        _check_same_questions(first, run)
    shared = [name for name in first.results if all(name in run.results for run in runs)]
    if not shared:
        raise UserError("compare: the runs share no benchmark that was answered")
    return benchmarks_of(first.manifest["identity"]["suite"], first.results, shared)


def _check_same_questions(first: Scored, run: Scored) -> None:
    """Raise UserError where two runs were asked otherwise, or other questions."""
    for field in ("suite", "prompting"):
        ours, theirs = (_asked(each.manifest["identity"][field]) for each in (first, run))
        if ours != theirs:
            raise UserError(f"compare: {run.name} was run with {field} {theirs}, {first.name} with {ours}")
    for name in set(first.results) & set(run.results):
        ours, theirs = first.results[name]["tasks"], run.results[name]["tasks"]
        for task in sorted({*ours, *theirs}):
            for field in ("hash", "shots", "version", "generation"):
                a, b = (tasks.get(task, {}).get(field) for tasks in (ours, theirs))
                if a != b:
                    a, b = (value[:12] if isinstance(value, str) else value for value in (a, b))
                    values = f"{b} in {run.name}, {a} in {first.name}"
                    raise UserError(f"compare: {task} has another {field}: {values}; these are other questions")


def _asked(value: Any) -> str:
    """A suite's name, or every setting of how it was put: runs of earlier versions lack the newer ones."""
    if not isinstance(value, dict):
        return repr(value)
    return ", ".join(f"{name}={each}" for name, each in asdict(Prompting(**value)).items())
