"""How normal the channels of a sample are, and how dependent on each other: the measures of arXiv 2505.00685.

The tests are SciPy's, pingouin's and scikit-learn's; what is here is which channels and pairs they see, and when there
is too little to see. All of it runs on the host, on a sample that `RowSample` (`watch(model, sample=...)`) took; it
needs the extra `analysis`.
"""

import inspect
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from ..base.command import require_extra
from ..checks import check_number
from ..functional import newton_lambda

LEAST_SAMPLE = 20
"""Values that a measure needs: the approximation behind D'Agostino's test is said to hold from here."""
LEVEL = 0.05
"""A test rejects normality where its p-value is below this."""
HENZE_ZIRKLER_ROWS = 500
"""Rows that Henze-Zirkler sees at most, because its memory grows as their square."""
LEAST_SPREAD = 0.5
"""A standardized row of a smaller standard deviation is mostly eps: its most likely λ means nothing."""
SINGULAR = 1e-9
"""Two channels are one when 1 - r² is below this."""

OF_CHANNELS = ("r_squared", "dagostino", "anderson_darling")
OF_PAIRS = ("henze_zirkler", "correlation", "rank_correlation", "mutual_information", "mutual_information_uniform")
"""Measures of a channel, and of a pair of channels."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def _extra() -> None:
    require_extra("analysis", "scipy", "sklearn", "pingouin")


def _rows(sample: Any, field: str = "sample") -> Array:
    """A tensor or array as float64 rows on the host, without those that are not finite."""
    rows = torch.as_tensor(sample).detach().double().cpu().numpy()
    if rows.ndim != 2:
        raise ValueError(f"{field}: got shape {rows.shape}, must be (rows, channels)")
    return rows[np.isfinite(rows).all(1)]


def _standardized(rows: Array) -> Array:
    """Channels of mean 0 and variance 1, constant ones 0: no measure minds, and none overflows."""
    if not len(rows):
        return rows
    size = np.abs(rows).max(0)
    c = rows / np.where(size > 0, size, 1.0)
    c = np.where(np.ptp(c, axis=0) > 0, c - c.mean(0), 0.0)
    spread = c.std(0)
    return c / np.where(spread > 0, spread, 1.0)


def qq(values: Any, points: int = 101) -> dict[str, Any]:
    """A Q-Q plot against the normal distribution (its Figure 5).

    Args:
        values: one channel, shape (M,), M >= 3, not all alike.
        points: how many to return at most, evenly spaced in rank, both ends among them.

    Returns:
        `theoretical` and `ordered` quantiles; `slope`, `intercept` and `r_squared` of the line through all M points.

    Raises:
        UserError: SciPy is not installed.
    """
    _extra()
    from scipy.stats import probplot

    (theoretical, ordered), (slope, intercept, r) = probplot(np.asarray(values, np.float64))
    shown = np.unique(np.linspace(0, len(ordered) - 1, points).round().astype(int))
    return {
        "theoretical": theoretical[shown].tolist(),
        "ordered": ordered[shown].tolist(),
        "slope": float(slope),
        "intercept": float(intercept),
        "r_squared": float(r * r),
    }


def dagostino(values: Array) -> tuple[float, bool]:
    """D'Agostino and Pearson's K² of values of shape (M,), and whether it rejects normality at 5 %."""
    from scipy.stats import normaltest

    statistic, p = normaltest(values)
    return float(statistic), bool(p < LEVEL)


def anderson_darling(values: Array) -> tuple[float, bool]:
    """Anderson and Darling's A² of values of shape (M,), mean and variance unknown, and whether it rejects at 5 %."""
    from scipy.stats import anderson

    if "method" in inspect.signature(anderson).parameters:  # SciPy 1.17 gives p-values, and warns who does not ask
        found = anderson(values, "norm", method="interpolate")
        return float(found.statistic), bool(found.pvalue < LEVEL)
    found = anderson(values, "norm")
    critical = dict(zip(found.significance_level, found.critical_values, strict=True))[100 * LEVEL]
    return float(found.statistic), bool(found.statistic > critical)


def henze_zirkler(pair: Array) -> tuple[float, bool]:
    """Henze and Zirkler's statistic of rows of shape (M, 2), and whether it rejects joint normality at 5 %.

    NaN where one channel is a multiple of the other: the statistic divides by the covariance.
    """
    from pingouin import multivariate_normality

    pair = pair[:HENZE_ZIRKLER_ROWS]
    if not 1 - _r(pair) ** 2 >= SINGULAR:  # r is NaN where these rows of a channel are constant
        return math.nan, False
    found = multivariate_normality(pair, alpha=LEVEL)
    return float(found.hz), bool(found.pval < LEVEL)


def _r(pair: Array) -> float:
    return float(np.asarray(np.corrcoef(pair.T))[0, 1])


def _ranks(pair: Array) -> Array:
    """Every channel's ranks, from just above 0 to 1; equal values share one, so that none tells the order of rows."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(pair, axis=0) / len(pair))


def adjusted_mutual_information(pair: Array, uniform: bool = False) -> float:
    """Of rows of shape (M, 2), each channel cut into floor(√M) bins: about 0 if independent.

    Args:
        pair: two channels that vary.
        uniform: bins of equal width from the least value to the largest, as the paper has them (its Figure 14): a
            single value far away leaves all others in one bin, and channels that depend on each other look
            independent. Otherwise bins of equally many rows.
    """
    from sklearn.metrics import adjusted_mutual_info_score

    bins = math.isqrt(len(pair))
    low, high = pair.min(0), pair.max(0)
    share = (pair - low) / (high - low) if uniform else _ranks(pair) - 0.5 / len(pair)
    binned = np.minimum((share * bins).astype(int), bins - 1)
    return float(adjusted_mutual_info_score(binned[:, 0], binned[:, 1]))


def measure_normality(sample: Any, *, channels: int = 64, pairs: int = 32, seed: int = 0) -> dict[str, Any]:
    """Every measure of normality and of dependence on one sample.

    Args:
        sample: tensor or array of shape (rows, channels); rows that are not finite are left out.
        channels: look at that many at most, evenly spaced; constant ones have no shape and are left out.
        pairs: look at that many pairs of them at most, drawn by `seed`.
        seed: of the drawing.

    Returns:
        * `rows`, `channels` (indices looked at), `constant` (how many were left out), `pairs` (of indices)
        * `r_squared` of the Q-Q line: `mean`, `least`, and `each` channel's
        * `dagostino`, `anderson_darling`, `henze_zirkler`: `statistic` (median), `rejected` (share at 5 %), `each`
          channel's or pair's statistic, None for a pair of multiples. The more rows, the smaller the departure that is
          rejected.
        * `correlation`, `rank_correlation` (Spearman's): `mean` of |r|, `each` pair's r
        * `mutual_information` (adjusted, bins of equally many rows), `mutual_information_uniform` (bins of equal width,
          the paper's): `mean`, `each` pair's. One row far away decides r and the uniform bins, and not the other two.
        * `reasons`: why a measure is None

    Raises:
        UserError: the extra `analysis` is not installed.
        ValueError: the sample is not two-dimensional, or a number is no count.
    """
    _extra()
    check_number("channels", channels, 1)
    check_number("pairs", pairs, 0)
    rows = _standardized(_rows(sample))
    chosen = np.unique(np.linspace(0, rows.shape[1] - 1, min(channels, rows.shape[1])).round().astype(int))
    varied = [int(i) for i in chosen if rows[:, i].any()]
    first, second = np.triu_indices(len(varied), 1)
    draw = np.sort(np.random.default_rng(seed).permutation(len(first))[:pairs])
    drawn = [(varied[i], varied[j]) for i, j in zip(first[draw], second[draw], strict=True)]
    found: dict[str, Any] = {"rows": len(rows), "channels": varied, "constant": len(chosen) - len(varied)}
    found |= {"pairs": [list(pair) for pair in drawn]}
    reasons: dict[str, str] = {}
    if len(rows) < LEAST_SAMPLE:
        reasons = dict.fromkeys((*OF_CHANNELS, *OF_PAIRS), f"{len(rows)} rows; needs {LEAST_SAMPLE}")
    else:
        if not varied:
            reasons |= dict.fromkeys(OF_CHANNELS, "every channel is constant")
        if not drawn:
            reasons |= dict.fromkeys(OF_PAIRS, "no two channels to pair")
    for name in (*OF_CHANNELS, *OF_PAIRS):
        parts = found["channels" if name in OF_CHANNELS else "pairs"]
        found[name] = None if name in reasons else _MEASURES[name]([rows[:, which] for which in parts])
    if found["henze_zirkler"] and found["henze_zirkler"]["statistic"] is None:
        found["henze_zirkler"], reasons["henze_zirkler"] = None, "every channel of a pair is a multiple of the other"
    return {**found, "reasons": reasons}


def _tested(test: Callable[[Array], tuple[float, bool]]) -> Callable[[list[Array]], dict[str, Any]]:
    def run(parts: list[Array]) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a p-value is beyond a table: here it only has to be small or not
            found = [test(part) for part in parts]
        kept = [each for each in found if math.isfinite(each[0])]
        return {
            "statistic": float(np.median([statistic for statistic, _ in kept])) if kept else None,
            "rejected": float(np.mean([rejected for _, rejected in kept])) if kept else None,
            "each": [statistic if math.isfinite(statistic) else None for statistic, _ in found],
        }

    return run


def _r_squared(parts: list[Array]) -> dict[str, Any]:
    each = [qq(part)["r_squared"] for part in parts]
    return {"mean": float(np.mean(each)), "least": min(each), "each": each}


def _correlation(parts: list[Array]) -> dict[str, Any]:
    each = [_r(part) for part in parts]
    return {"mean": float(np.mean(np.abs(each))), "each": each}


def _rank_correlation(parts: list[Array]) -> dict[str, Any]:
    return _correlation([_ranks(part) for part in parts])


def _mutual_information(parts: list[Array], uniform: bool = False) -> dict[str, Any]:
    each = [adjusted_mutual_information(part, uniform) for part in parts]
    return {"mean": float(np.mean(each)), "each": each}


_MEASURES: dict[str, Callable[[list[Array]], dict[str, Any]]] = {
    "r_squared": _r_squared,
    "dagostino": _tested(dagostino),
    "anderson_darling": _tested(anderson_darling),
    "henze_zirkler": _tested(henze_zirkler),
    "correlation": _correlation,
    "rank_correlation": _rank_correlation,
    "mutual_information": _mutual_information,
    "mutual_information_uniform": partial(_mutual_information, uniform=True),
}


def lambda_against_likelihood(sample: Any, *, alpha: float = 1.0, eps: float = 1e-5, rows: int = 200) -> dict[str, Any]:
    """λ̂ of one Newton step against the λ of the largest likelihood, row by row (its Figure 6).

    Args:
        sample: what goes into a norm, tensor or array of shape (rows, N).
        alpha, eps: of the norm, as in `functional.newton_lambda`.
        rows: look at the first so many; a `RowSample` has them in no order. Some 5 ms each.

    Returns:
        `rows`; `skipped`, those that are constant up to eps; for each row `newton` and `likelihood`; their
        `correlation`; `mean_error` and `mean_absolute_error` of the former; `reasons` why these are None.

    Raises:
        UserError: the extra `analysis` is not installed.
        ValueError: the sample is not two-dimensional, or an option is out of range.
    """
    _extra()
    from scipy.stats import yeojohnson_normmax

    check_number("alpha", alpha, 0.0, 1.0)
    check_number("eps", eps, 0.0)
    check_number("rows", rows, 1)
    x = torch.from_numpy(_rows(sample)[:rows])
    cells = ("newton", "likelihood", "correlation", "mean_error", "mean_absolute_error")
    empty: dict[str, Any] = {"rows": 0, "skipped": len(x), **dict.fromkeys(cells)}
    if x.shape[1] < LEAST_SAMPLE:
        return {**empty, "reasons": dict.fromkeys(cells, f"rows of {x.shape[1]}; needs {LEAST_SAMPLE}")}
    h = torch.nn.functional.layer_norm(x, x.shape[1:], eps=eps)
    h = h[h.std(-1, correction=0) >= LEAST_SPREAD]
    if len(h) < LEAST_SAMPLE:
        skipped = len(x) - len(h)
        reason = f"{len(h)} rows that are not constant; needs {LEAST_SAMPLE}"
        return {**empty, "rows": len(h), "skipped": skipped, "reasons": dict.fromkeys(cells, reason)}
    newton = newton_lambda(h, alpha=alpha, eps=eps)[:, 0].numpy()
    likelihood = np.array([yeojohnson_normmax(row) for row in h.numpy()])
    varied = np.ptp(newton) > 0 and np.ptp(likelihood) > 0
    return {
        "rows": len(h),
        "skipped": len(x) - len(h),
        "newton": newton.tolist(),
        "likelihood": likelihood.tolist(),
        "correlation": float(np.corrcoef(newton, likelihood)[0, 1]) if varied else None,
        "mean_error": float((newton - likelihood).mean()),
        "mean_absolute_error": float(np.abs(newton - likelihood).mean()),
        "reasons": {} if varied else {"correlation": "all of them are alike"},
    }
