"""What paired items can say of two models, and answers of one model about guessing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

DRAWS = 10_000
"""Resamples of a bootstrap interval and sign flips of a test."""
LEVEL = 0.05
TEST_FROM, BOOTSTRAP_FROM = 6, 10
"""Independent values from which a test by signs can reach 5 % at all (2/2^6 = 3 %), and from which a bootstrap interval
is worth showing: of three values it covers the truth 76 % of the time instead of 95 %."""
_MOST = 20_000_000
"""Numbers that are drawn at a time."""


@dataclass(frozen=True)
class Pairs:
    """Differences of one task item by item, summed over clusters: `sums` and `sizes` have one entry a cluster."""

    sums: "np.ndarray"
    sizes: "np.ndarray"
    weight: float


def summed(values: Sequence[float], clusters: Sequence[str], weight: float) -> Pairs:
    """One value an item, summed over clusters."""
    import numpy as np

    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    where = np.array([names[name] for name in clusters])
    sizes = np.bincount(where, minlength=len(names)).astype(float)
    return Pairs(np.bincount(where, values, len(names)), sizes, weight)


def bootstrap_interval(
    pairs: Sequence[Pairs], generator: "np.random.Generator", draws: int = DRAWS
) -> tuple[float, float] | None:
    """95 % percentile interval of the weighted mean difference; clusters are drawn again within each task.

    Clusters with the same sum and size are one kind, and a resample is a draw of how often each kind occurs: a few
    numbers instead of thousands of items.

    Returns:
        Both ends; None where a task has fewer than ten clusters, and where all differ by the same amount, most often by
        none: without scatter there is nothing to measure a difference against.
    """
    import numpy as np

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
    for start in range(0, draws, chunk := max(1, _MOST // moved.size)):
        signs = generator.integers(0, 2, size=(min(chunk, draws - start), moved.size), dtype=np.int8) * 2 - 1
        beyond += int((np.abs(signs @ moved) >= observed * (1 - 1e-9)).sum())
    return (beyond + 1) / (draws + 1)


def p_of_guessing(
    right: Mapping[tuple[float, float], tuple[int, float]], generator: "np.random.Generator", draws: int = DRAWS
) -> float:
    """Two-sided p-value of the hypothesis that every item was guessed, of answers that are right or wrong.

    Where all items weigh the same and are as easily guessed this is the exact binomial test. Otherwise the score is
    drawn again and again under the hypothesis: a Monte Carlo test, which errs no more often than it says either.

    Args:
        right: (weight of an item in the score, its probability of being guessed) → (items, right ones, of which an item
            that stands for several may be a part).
        generator: for the draws.
        draws: how many.
    """
    import numpy as np
    from scipy.stats import binomtest

    if len(right) == 1:
        (((_, guess), (items, hits)),) = right.items()
        if hits == round(hits):
            return float(binomtest(round(hits), items, guess).pvalue)
    expected = math.fsum(weight * guess * items for (weight, guess), (items, _) in right.items())
    observed = abs(math.fsum(weight * hits for (weight, _), (_, hits) in right.items()) - expected)
    drawn = np.zeros(draws)
    for (weight, guess), (items, _) in right.items():
        drawn += weight * generator.binomial(items, guess, draws)
    return (int((np.abs(drawn - expected) >= observed * (1 - 1e-9)).sum()) + 1) / (draws + 1)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values after Holm's step-down correction; None stays None and does not count."""
    import numpy as np

    known = np.array([value for value in values if value is not None])
    order = np.argsort(known)
    known[order] = np.minimum(1, np.maximum.accumulate(known[order] * np.arange(known.size, 0, -1)))
    corrected = iter(known.tolist())
    return [None if value is None else next(corrected) for value in values]
