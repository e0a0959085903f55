"""Statistics: paired items of two models, paired seeds of two norms, the answers of one model against guessing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

DRAWS = 10_000
"""Resamples of a bootstrap interval and sign flips of a test."""
LEVEL, POWER = 0.05, 0.8
BETTER, WORSE, SAME = "better", "worse", "not distinguishable"
TEST_FROM, BOOTSTRAP_FROM = 6, 10
"""Independent values from which a test by signs can reach 5 % at all (2/2^6 = 3 %), and from which a bootstrap interval
is worth showing: of three values it covers the truth 76 % of the time instead of 95 %."""
_MOST = 20_000_000
"""The most random numbers that are held in memory at a time."""


@dataclass(frozen=True)
class Pairs:
    """Differences of one task item by item, summed over clusters: `sums` and `sizes` have one entry a cluster."""

    sums: np.ndarray
    sizes: np.ndarray
    weight: float

    @classmethod
    def summed(cls, values: np.ndarray, clusters: Sequence[str], weight: float) -> "Pairs":
        """Of one value an item, and the cluster of each."""
        names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
        where = np.array([names[name] for name in clusters])
        return cls(np.bincount(where, values), np.bincount(where).astype(float), weight)


def bootstrap_interval(
    pairs: Sequence[Pairs], generator: np.random.Generator, draws: int = DRAWS
) -> tuple[float, float] | None:
    """95 % percentile interval of the weighted mean difference; clusters are drawn again within each task.

    Clusters with the same sum and size are one kind, and a resample is a draw of how often each kind occurs: a few
    numbers instead of thousands of items.

    Returns:
        Both ends; None where a task has fewer than ten clusters, and where all clusters have the same mean difference,
        most often 0: without scatter the error of the difference cannot be estimated.
    """
    means = np.concatenate([each.sums / each.sizes for each in pairs])
    if min(each.sums.size for each in pairs) < BOOTSTRAP_FROM or np.ptp(means) <= 1e-12 * np.abs(means).max():
        return None
    total = np.zeros(draws)
    for each in pairs:
        kinds, counts = np.unique(np.stack([each.sums, each.sizes]), axis=1, return_counts=True)
        for start in range(0, draws, chunk := max(1, _MOST // kinds.shape[1])):
            part = generator.multinomial(counts.sum(), counts / counts.sum(), size=min(chunk, draws - start))
            sums, sizes = (part @ kinds.T).T
            total[start : start + chunk] += each.weight * sums / sizes
    low, high = np.quantile(total, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def p_of_no_difference(pairs: Sequence[Pairs], generator: np.random.Generator, draws: int = DRAWS) -> float:
    """Two-sided p-value of the hypothesis that either model is as likely to be ahead on each cluster of items.

    Without clusters, for answers that are right or wrong and items that weigh the same, this is McNemar's exact test:
    a sign test on the items that only one model gets right. Otherwise the signs of the clusters' differences are
    flipped at random.
    """
    scaled = np.concatenate([each.weight * each.sums / each.sizes.sum() for each in pairs])
    moved = scaled[scaled != 0]
    if not moved.size or np.allclose(np.abs(moved), np.abs(moved[0]), rtol=1e-9):
        return sign_test(moved)
    observed, beyond = abs(math.fsum(moved)), 0
    for start in range(0, draws, chunk := max(1, _MOST // moved.size)):
        signs = generator.integers(0, 2, size=(min(chunk, draws - start), moved.size), dtype=np.int8) * 2 - 1
        beyond += int((np.abs(signs @ moved) >= observed * (1 - 1e-9)).sum())
    return (beyond + 1) / (draws + 1)


def p_of_guessing(right: Mapping[tuple[float, float], tuple[int, float]], generator: np.random.Generator) -> float:
    """Two-sided p-value of the hypothesis that every item was guessed, of answers that are right or wrong.

    Where all items weigh the same and are as easily guessed this is the exact binomial test. Otherwise it is a Monte
    Carlo test: scores are drawn under the hypothesis.

    Args:
        right: (weight of an item in the score, its probability of being guessed) → (items, right ones; not a whole
            number where an item stands for several).
        generator: of the draws.
    """
    if len(right) == 1:
        (((_, guess), (items, hits)),) = right.items()
        if hits == round(hits):
            return float(stats.binomtest(round(hits), items, guess).pvalue)
    expected = math.fsum(weight * guess * items for (weight, guess), (items, _) in right.items())
    observed = abs(math.fsum(weight * hits for (weight, _), (_, hits) in right.items()) - expected)
    drawn = np.zeros(DRAWS)
    for (weight, guess), (items, _) in right.items():
        drawn += weight * generator.binomial(items, guess, DRAWS)
    return (int((np.abs(drawn - expected) >= observed * (1 - 1e-9)).sum()) + 1) / (DRAWS + 1)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values after Holm's step-down correction; None stays None and does not count."""
    known = np.array([value for value in values if value is not None], dtype=float)
    order = np.argsort(known)
    known[order] = np.minimum(1, np.maximum.accumulate(known[order] * np.arange(known.size, 0, -1)))
    corrected = iter(known.tolist())
    return [None if value is None else next(corrected) for value in values]


def verdict_of(difference: float, corrected: float, lower_is_better: bool) -> str:
    """The verdict on a difference from the baseline, given its p-value after Holm's correction."""
    if corrected >= LEVEL:
        return SAME
    return BETTER if (difference < 0) == lower_is_better else WORSE


@dataclass(frozen=True)
class Paired:
    """Differences of one norm from the baseline, a pair for each seed; a number that cannot be had is None.

    Without scatter, of a single pair or where all pairs differ by the same amount, the error of the mean cannot be
    estimated: then there is a p only where no pair differs at all, and it is 1.
    """

    n: int  # pairs
    mean: float  # of the differences
    interval: tuple[float, float] | None = None  # 95 % t-interval of the mean
    p: float | None = None  # of no difference, by the paired t-test (two-sided)
    # The smallest true difference that would get a verdict with a probability of 80 %, if seeds scatter as here.
    detectable: float | None = None
    sign_p: float | None = None  # p of the sign test; None for fewer than six pairs
    # 95 % bias-corrected and accelerated bootstrap interval of the mean (Efron 1987); None for fewer than ten pairs.
    bootstrap: tuple[float, float] | None = None


def paired(differences: Sequence[float], norms: int = 1) -> Paired:
    """Mean, intervals and tests of differences (norm - baseline), at least one, a pair for each seed.

    `norms` is how many norms are compared with the baseline, all of which share a probability of 5 % to err.
    """
    values = np.asarray(differences, dtype=float)
    n, mean = len(values), float(np.mean(values))
    if n < 2 or np.ptp(values) <= 1e-12 * abs(mean):
        return Paired(n, mean, p=1.0 if n > 1 and not values.any() else None)
    low, high = t_interval(values)
    bootstrap = None
    if n >= BOOTSTRAP_FROM:
        options = {"n_resamples": DRAWS, "confidence_level": 1 - LEVEL, "method": "BCa", "rng": 0}
        ends = stats.bootstrap((values,), np.mean, **options).confidence_interval
        bootstrap = float(ends.low), float(ends.high)
    return Paired(
        n,
        mean,
        interval=(float(low), float(high)),
        p=float(stats.ttest_1samp(values, 0).pvalue),
        detectable=detectable(values, LEVEL / norms),
        sign_p=sign_test(values) if n >= TEST_FROM else None,
        bootstrap=bootstrap,
    )


def t_interval(values: np.ndarray, level: float = LEVEL) -> tuple[Any, Any]:
    """Both ends of the t-interval of the mean of differences (shape (..., n), n ≥ 2; the ends (...)), which misses the
    truth with probability `level`."""
    interval = stats.ttest_1samp(values, 0, axis=-1).confidence_interval(1 - level)
    return interval.low, interval.high


def detectable(values: np.ndarray, level: float = LEVEL) -> float:
    """The smallest true difference that the t-test finds with probability `POWER`, given how n ≥ 2 values scatter."""
    freedom = len(values) - 1
    critical = stats.t.ppf(1 - level / 2, freedom)
    # The other tail, below -critical, is far beyond reach where this one has a probability of 80 %.
    shift = optimize.brentq(lambda shift: stats.nct.sf(critical, freedom, shift) - POWER, 0.0, 2 * (critical + 1))
    return float(stats.sem(values) * shift)


def sign_test(values: np.ndarray) -> float:
    """Two-sided p-value of differences being as often above 0 as below; those that are 0 say nothing."""
    moved = values[values != 0]
    return float(stats.binomtest(int((moved > 0).sum()), moved.size).pvalue) if moved.size else 1.0


def verdicts(compared: Sequence[Paired], lower_is_better: bool, norms: int) -> list[tuple[float | None, str]]:
    """p after Holm's correction, and the verdict ("" where there is no p), for each norm of `compared`.

    `norms` is how many are to be compared: those that have no p, or none yet, count as if theirs were 1.
    """
    values = [each.p for each in compared]
    missing = norms - sum(value is not None for value in values)
    corrected = holm([*values, *[1.0] * missing])[: len(compared)]
    return [
        (p, "" if p is None else verdict_of(each.mean, p, lower_is_better))
        for each, p in zip(compared, corrected, strict=True)
    ]
