"""Whether models differ: the same items, paired; difference, interval, test and verdict for each benchmark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ibnorm.cli import UserError, bad_input

from .scoring import ScoringError, Stratum, independent, score_benchmark, strata
from .store import benchmarks_of, read_manifest, read_results
from .suites import Benchmark

if TYPE_CHECKING:
    import numpy as np

DRAWS = 10_000
"""Resamples of a bootstrap interval and sign flips of a test."""
LEVEL = 0.05
BETTER, WORSE, SAME, CHANCE = "better", "worse", "not distinguishable", "both at chance"


@dataclass(frozen=True)
class Difference:
    """One benchmark of one model against the same of another.

    Args:
        benchmark: lm-eval's name.
        title: how a leaderboard heads its column.
        first: score of the model that is compared with, as a fraction or in bits per byte.
        second: score of the other.
        difference: second - first.
        interval: 95 % of the differences over resampled items lie in it; None for a single cluster of items.
        p: of no difference (two-sided); None for a single cluster.
        adjusted: p after Holm's correction for the number of benchmarks.
        wins: items that only the second gets right (or has more of), and `losses` the first.
        n: items.
        verdict: about the second model: better, worse, not distinguishable, or both at chance.
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


@dataclass(frozen=True)
class Pairs:
    """Differences of one task item by item, summed over clusters: `sums` and `sizes` have one entry a cluster."""

    sums: "np.ndarray"
    sizes: "np.ndarray"
    weight: float


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
        names = {name: i for i, name in enumerate(dict.fromkeys(a.clusters))}
        where = np.array([names[name] for name in a.clusters])
        sums = np.bincount(where, np.subtract(b.values, a.values), len(names))
        found.append(Pairs(sums, np.bincount(where, minlength=len(names)).astype(float), a.weight))
    return found


def bootstrap_interval(
    pairs: Sequence[Pairs], generator: "np.random.Generator", draws: int = DRAWS
) -> tuple[float, float]:
    """95 % percentile interval of the weighted mean difference; clusters are drawn again within each task.

    Clusters with the same sum and size are one kind, and a resample is a draw of how often each kind occurs: a few
    numbers instead of thousands of items.
    """
    import numpy as np

    total = np.zeros(draws)
    for each in pairs:
        kinds, counts = np.unique(np.stack([each.sums, each.sizes]), axis=1, return_counts=True)
        for start in range(0, draws, chunk := max(1, 20_000_000 // kinds.shape[1])):
            part = generator.multinomial(counts.sum(), counts / counts.sum(), size=min(chunk, draws - start))
            sums, sizes = (part @ kinds.T).T
            total[start : start + chunk] += each.weight * sums / sizes
    low, high = np.quantile(total, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def p_of_no_difference(pairs: Sequence[Pairs], generator: "np.random.Generator", draws: int = DRAWS) -> float:
    """Two-sided p-value of the hypothesis that either model is as likely to be ahead on each cluster of items.

    Without clusters, for answers that are right or wrong and items that weigh the same, this is McNemar's exact test:
    a binomial test on the items that only one model gets right. Otherwise the same idea by flipping the signs of the
    clusters' differences at random.
    """
    import numpy as np
    from scipy.stats import binomtest

    scaled = np.concatenate([each.weight * each.sums / each.sizes.sum() for each in pairs])
    moved = scaled[scaled != 0]
    if not moved.size:
        return 1.0
    if np.allclose(np.abs(moved), np.abs(moved[0]), rtol=1e-9):
        return float(binomtest(int((moved > 0).sum()), moved.size).pvalue)
    observed, beyond = abs(math.fsum(moved)), 0
    for start in range(0, draws, chunk := max(1, 20_000_000 // moved.size)):
        signs = generator.integers(0, 2, size=(min(chunk, draws - start), moved.size), dtype=np.int8) * 2 - 1
        beyond += int((np.abs(signs @ moved) >= observed * (1 - 1e-9)).sum())
    return (beyond + 1) / (draws + 1)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values after Holm's step-down correction; None stays None and does not count."""
    order = sorted((value, i) for i, value in enumerate(values) if value is not None)
    found: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * value))
        found[i] = largest
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
        enough = all(each.sums.size > 1 for each in pairs)
        interval = bootstrap_interval(pairs, generator) if enough else None
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
        elif corrected is None or corrected >= LEVEL:
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
        manifest = read_manifest(path)
        results = {name: result for name, result in read_results(path).items() if "tasks" in result}
        return cls(str(path), manifest, results)


def comparable(runs: Sequence[Scored]) -> list[Benchmark]:
    """The benchmarks that all runs have answered, asked the same way.

    Raises:
        UserError: the runs differ in prompts, examples or limits, or share no benchmark.
    """
    first = runs[0]
    for run in runs[1:]:
        for field in ("suite", "prompting"):
            a, b = first.manifest["identity"][field], run.manifest["identity"][field]
            if a != b:
                raise UserError(f"compare: {run.name} was run with {field} {_told(b)}, {first.name} with {_told(a)}")
        for name in set(first.results) & set(run.results):
            tasks = first.results[name]["tasks"], run.results[name]["tasks"]
            for task in sorted({*tasks[0], *tasks[1]}):
                for field in ("hash", "shots", "version"):
                    a, b = (each.get(task, {}).get(field) for each in tasks)
                    if a != b:
                        told = f"{str(b)[:12]} in {run.name}, {str(a)[:12]} in {first.name}"
                        raise UserError(f"compare: {task} has another {field}: {told}; these are other questions")
    shared = [name for name in first.results if all(name in run.results for run in runs)]
    if not shared:
        raise UserError("compare: the runs share no benchmark that was answered")
    return benchmarks_of(first.manifest["identity"]["suite"], first.results, shared)


def _told(value: Any) -> str:
    if not isinstance(value, dict):
        return repr(value)
    return ", ".join(f"{name}={each}" for name, each in value.items())


def write_comparison(paths: Sequence[Path], output: Path) -> dict[str, list[Difference]]:
    """Compare runs with the first, print the verdicts, write the table, the forest plot and the page into `output`.

    Returns:
        The differences by name of the run.

    Raises:
        UserError: the runs cannot be compared, or the files not be written.
    """
    from .page import write_files

    if len(paths) < 2:
        raise UserError("compare: name two runs or more")
    runs = [Scored.read(path) for path in paths]
    benchmarks = comparable(runs)
    with bad_input(ScoringError, KeyError, TypeError, about="compare: a result file is damaged: "):
        found = {run.name: compare(benchmarks, runs[0].results, run.results) for run in runs[1:]}
    write_files(runs, benchmarks, found, output)
    return found
