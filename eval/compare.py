"""Whether models differ: the same items, paired; difference, interval, test and verdict for each benchmark."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_ibnorm.base.errors import UserError

from .harness import Prompting
from .scoring import ScoringError, Stratum, independent, score_benchmark, strata
from .statistics import LEVEL, TEST_FROM, Pairs, bootstrap_interval, holm, p_of_no_difference, summed
from .store import benchmarks_of, read_run
from .suites import Benchmark

BETTER, WORSE, SAME, CHANCE = "better", "worse", "not distinguishable", "both at chance"
NOT_TESTED = "not tested"
"""Too few independent items for any verdict."""


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
    """Item by item second - first.

    Raises:
        ScoringError: the two have other items.
    """
    import numpy as np

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
    judged = []
    for benchmark, row, adjusted in zip(benchmarks, rows, holm([row.p for row in rows]), strict=True):
        verdict = row.verdict
        if not verdict and adjusted is None:
            verdict = NOT_TESTED
        elif not verdict and adjusted is not None and adjusted >= LEVEL:
            verdict = SAME
        elif not verdict:
            verdict = BETTER if (row.difference < 0) == benchmark.rolling else WORSE
        judged.append(replace(row, adjusted=adjusted, verdict=verdict))
    return judged


def _difference(benchmark: Benchmark, first: dict[str, Any], second: dict[str, Any], seed: int) -> Difference:
    """One benchmark before p is corrected; without a verdict, unless both are at chance."""
    import numpy as np

    generator = np.random.default_rng(seed)
    parts = [independent(strata(benchmark, result)) for result in (first, second)]
    a, b = (score_benchmark(benchmark, result) for result in (first, second))
    pairs = pair(*parts)
    interval = bootstrap_interval(pairs, generator)
    enough = sum(each.sums.size for each in pairs) >= TEST_FROM
    p = p_of_no_difference(pairs, generator) if enough else None
    moved = np.concatenate([np.subtract(theirs.values, ours.values) for ours, theirs in zip(*parts, strict=True)])
    wins, losses = int((moved > 0).sum()), int((moved < 0).sum())
    if benchmark.rolling:
        wins, losses = losses, wins
    verdict = CHANCE if a["details"]["at_chance"] and b["details"]["at_chance"] else ""
    raw = a["raw"], b["raw"], b["raw"] - a["raw"]
    return Difference(benchmark.name, benchmark.title, *raw, interval, p, None, wins, losses, a["n"], verdict)


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
    """The benchmarks that all runs have answered, asked the same way.

    Raises:
        UserError: the runs differ in prompts, examples or limits, or share no benchmark.
    """
    first = runs[0]
    for run in runs[1:]:
        for field in ("suite", "prompting"):
            a, b = (_asked(each.manifest["identity"][field]) for each in (first, run))
            if a != b:
                raise UserError(f"compare: {run.name} was run with {field} {b}, {first.name} with {a}")
        for name in set(first.results) & set(run.results):
            tasks = first.results[name]["tasks"], run.results[name]["tasks"]
            for task in sorted({*tasks[0], *tasks[1]}):
                for field in ("hash", "shots", "version", "generation"):
                    a, b = (each.get(task, {}).get(field) for each in tasks)
                    if a != b:
                        values = f"{str(b)[:12]} in {run.name}, {str(a)[:12]} in {first.name}"
                        raise UserError(f"compare: {task} has another {field}: {values}; these are other questions")
    shared = [name for name in first.results if all(name in run.results for run in runs)]
    if not shared:
        raise UserError("compare: the runs share no benchmark that was answered")
    return benchmarks_of(first.manifest["identity"]["suite"], first.results, shared)


def _asked(value: Any) -> str:
    """A suite's name, or every setting of how it was put: runs of earlier versions lack the newer ones."""
    if not isinstance(value, dict):
        return repr(value)
    return ", ".join(f"{name}={each}" for name, each in asdict(Prompting(**value)).items())
