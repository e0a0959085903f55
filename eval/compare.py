"""Whether models differ: the same items, paired; difference, interval, test and verdict for each benchmark."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_ibnorm.base.errors import UserError

from .options import Prompting
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

    found = []
    for a, b in zip(first, second, strict=True):
        if a.items != b.items:
            raise ScoringError(f"{a.task}: the runs have other items")
        found.append(summed(np.subtract(b.values, a.values), a.clusters, a.weight))
    return found


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
    import numpy as np

    rows = []
    for benchmark in benchmarks:
        generator = np.random.default_rng(seed)
        results = [run[benchmark.name] for run in (first, second)]
        parts = [independent(strata(benchmark, result)) for result in results]
        scores = [score_benchmark(benchmark, result) for result in results]
        pairs = pair(*parts)
        interval = bootstrap_interval(pairs, generator)
        enough = sum(each.sums.size for each in pairs) >= TEST_FROM
        p = p_of_no_difference(pairs, generator) if enough else None
        moved = np.concatenate([np.subtract(b.values, a.values) for a, b in zip(*parts, strict=True)])
        better = -moved if benchmark.rolling else moved
        rows.append((benchmark, scores, interval, p, int((better > 0).sum()), int((better < 0).sum())))
    adjusted = holm([p for _, _, _, p, _, _ in rows])
    found = []
    for (benchmark, (a, b), interval, p, wins, losses), corrected in zip(rows, adjusted, strict=True):
        difference = b["raw"] - a["raw"]
        if a["details"]["at_chance"] and b["details"]["at_chance"]:
            verdict = CHANCE
        elif corrected is None:
            verdict = NOT_TESTED
        elif corrected >= LEVEL:
            verdict = SAME
        else:
            verdict = BETTER if (difference < 0) == benchmark.rolling else WORSE
        found.append(
            Difference(
                benchmark.name,
                benchmark.title,
                a["raw"],
                b["raw"],
                difference,
                interval,
                p,
                corrected,
                wins,
                losses,
                a["n"],
                verdict,
            )
        )
    return found


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
                raise UserError(f"compare: {run.name} was run with {field} {_told(b)}, {first.name} with {_told(a)}")
        for name in set(first.results) & set(run.results):
            tasks = first.results[name]["tasks"], run.results[name]["tasks"]
            for task in sorted({*tasks[0], *tasks[1]}):
                for field in ("hash", "shots", "version", "generation"):
                    a, b = (each.get(task, {}).get(field) for each in tasks)
                    if a != b:
                        told = f"{_brief(b)} in {run.name}, {_brief(a)} in {first.name}"
                        raise UserError(f"compare: {task} has another {field}: {told}; these are other questions")
    shared = [name for name in first.results if all(name in run.results for run in runs)]
    if not shared:
        raise UserError("compare: the runs share no benchmark that was answered")
    return benchmarks_of(first.manifest["identity"]["suite"], first.results, shared)


def _asked(value: Any) -> Any:
    """A suite's name, or every setting of how it was put: runs of earlier versions lack the newer ones."""
    return asdict(Prompting(**value)) if isinstance(value, dict) else value


def _brief(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) else str(value)


def _told(value: Any) -> str:
    if not isinstance(value, dict):
        return repr(value)
    return ", ".join(f"{name}={each}" for name, each in value.items())
