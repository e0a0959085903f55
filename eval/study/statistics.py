"""What a handful of seeds can say: paired differences, t-interval, what could have been seen, and a verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..compare import verdict_of
from ..statistics import BOOTSTRAP_FROM, DRAWS, LEVEL, TEST_FROM, holm

if TYPE_CHECKING:
    import numpy as np

POWER = 0.8


@dataclass(frozen=True)
class Paired:
    """Differences of one norm from the baseline, a pair for each seed.

    Args:
        n: pairs.
        mean: of the differences.
        interval: 95 % t-interval of the mean; None for fewer than two pairs, and where all differ by the same amount:
            without scatter there is nothing to measure it against.
        p: of no difference, by the paired t-test (two-sided); 1 where there is none at all, None as above elsewhere.
        detectable: the smallest true difference that would get a verdict with a probability of 80 %, if seeds scatter
            as they did here; None as above.
        sign_p: p of the sign test; None for fewer than six pairs.
        bootstrap: 95 % bias-corrected and accelerated bootstrap interval; None for fewer than ten pairs.
    """

    n: int
    mean: float
    interval: tuple[float, float] | None
    p: float | None
    detectable: float | None
    sign_p: float | None
    bootstrap: tuple[float, float] | None


def paired(differences: Sequence[float], norms: int = 1, seed: int = 0) -> Paired:
    """What paired differences say, one for each seed.

    Args:
        differences: norm - baseline; at least one.
        norms: how many norms are compared with the baseline, all of which share a probability of 5 % to err.
        seed: of the bootstrap's resampling.
    """
    import numpy as np
    from scipy.stats import ttest_1samp

    values = np.asarray(differences, dtype=float)
    n, mean = len(values), float(np.mean(values))
    if n < 2 or np.ptp(values) <= 1e-12 * abs(mean):
        return Paired(n, mean, None, 1.0 if n > 1 and not values.any() else None, None, None, None)
    low, high = t_interval(values)
    return Paired(
        n,
        mean,
        interval=(float(low), float(high)),
        p=float(ttest_1samp(values, 0).pvalue),
        detectable=detectable(values, LEVEL / norms),
        sign_p=sign_test(values) if n >= TEST_FROM else None,
        bootstrap=bootstrap_interval(values, seed) if n >= BOOTSTRAP_FROM else None,
    )


def t_interval(values: "np.ndarray", level: float = LEVEL) -> tuple[Any, Any]:
    """Both ends of the t-interval of a mean that covers the truth with probability 1 - `level`.

    Args:
        values: differences, shape (..., n), n ≥ 2.
        level: probability of missing the truth.

    Returns:
        Two arrays of shape (...).
    """
    from scipy.stats import ttest_1samp

    interval = ttest_1samp(values, 0, axis=-1).confidence_interval(1 - level)
    return interval.low, interval.high


def detectable(values: "np.ndarray", level: float = LEVEL, power: float = POWER) -> float:
    """The smallest true difference that the t-test finds with probability `power`, given how n ≥ 2 values scatter."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    n, spread = len(values), float(values.std(ddof=1))
    critical = t.ppf(1 - level / 2, n - 1)

    def missing(shift: float) -> float:
        # The other tail, below -critical, is far beyond reach where this one has a probability of 80 %.
        return float(nct.sf(critical, n - 1, shift)) - power

    return spread / math.sqrt(n) * float(brentq(missing, 0.0, 2 * (critical + 1)))


def sign_test(values: "np.ndarray") -> float:
    """Two-sided p-value of differences being as often above 0 as below; those that are 0 say nothing."""
    from scipy.stats import binomtest

    moved = values[values != 0]
    return float(binomtest(int((moved > 0).sum()), moved.size).pvalue) if moved.size else 1.0


def bootstrap_interval(values: "np.ndarray", seed: int) -> tuple[float, float]:
    """95 % bias-corrected and accelerated bootstrap interval of the mean (Efron 1987)."""
    import numpy as np
    from scipy.stats import bootstrap

    found = bootstrap((values,), np.mean, n_resamples=DRAWS, confidence_level=1 - LEVEL, method="BCa", rng=seed)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def verdicts(found: Sequence[Paired], lower_is_better: bool, norms: int) -> list[tuple[float | None, str]]:
    """p after Holm's correction, and what it says about each norm.

    Args:
        found: a norm each.
        lower_is_better: of the metric.
        norms: how many are to be compared; those that have no p, or none yet, count as if theirs were 1.

    Returns:
        Corrected p and verdict: better, worse or not distinguishable, or nothing where there is no p.
    """
    values = [each.p for each in found]
    missing = norms - sum(value is not None for value in values)
    corrected = holm([*values, *[1.0] * missing])[: len(found)]
    return [
        (p, "" if p is None else verdict_of(each.mean, p, lower_is_better))
        for each, p in zip(found, corrected, strict=True)
    ]
