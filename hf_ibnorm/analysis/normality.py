"""How normal the channels of a sample are, and how dependent on each other: the measures of arXiv 2505.00685.

The tests are SciPy's, pingouin's and scikit-learn's; this module decides which channels and pairs they see, and when
there are too few rows. All of it runs on the host, on a sample that `RowSample` (`watch(model, sample=...)`) took; it
needs the extra `analysis`.
"""

import inspect
import math
import warnings
from collections.abc import Callable
from functools import partial
from itertools import combinations
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
"""A standardized row of a smaller standard deviation is mostly eps, and its most likely λ means nothing."""
SINGULAR = 1e-9
"""Two channels count as one when 1 - r² is below this."""
Array = np.ndarray[Any, np.dtype[np.float64]]

require_analysis = partial(require_extra, "analysis", "scipy", "sklearn", "pingouin")


def spaced(count: int, most: int) -> list[int]:
    """Up to `most` of `count` indices, evenly spaced, both ends among them (of one only the first)."""
    indices: list[int] = np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()
    return indices


def _rows(sample: Any) -> Array:
    """A tensor or array as float64 rows on the host, without rows that are not finite."""
    rows = torch.as_tensor(sample).detach().double().cpu().numpy()
    if rows.ndim != 2:
        raise ValueError(f"sample: got shape {rows.shape}, must be (rows, channels)")
    return rows[np.isfinite(rows).all(1)]


def _standardized(rows: Array) -> Array:
    """Channels of mean 0 and variance 1, constant channels 0: no measure depends on either, and none overflows."""
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
        UserError: the extra `analysis` is not installed.
    """
    require_analysis()
    from scipy.stats import probplot

    (theoretical, ordered), (slope, intercept, r) = probplot(np.asarray(values, np.float64))
    shown = spaced(len(ordered), points)
    line = {"slope": float(slope), "intercept": float(intercept), "r_squared": float(r * r)}
    return {"theoretical": theoretical[shown].tolist(), "ordered": ordered[shown].tolist(), **line}


def dagostino(values: Array) -> tuple[float, bool]:
    """D'Agostino and Pearson's K² of values of shape (M,), and whether it rejects normality at 5 %."""
    from scipy.stats import normaltest

    statistic, p = normaltest(values)
    return float(statistic), bool(p < LEVEL)


def anderson_darling(values: Array) -> tuple[float, bool]:
    """Anderson and Darling's A² of values of shape (M,), mean and variance unknown, and whether it rejects at 5 %."""
    from scipy.stats import anderson

    if "method" in inspect.signature(anderson).parameters:  # SciPy 1.17 gives p-values, and warns without a method
        test = anderson(values, "norm", method="interpolate")
        return float(test.statistic), bool(test.pvalue < LEVEL)
    test = anderson(values, "norm")
    critical = dict(zip(test.significance_level, test.critical_values, strict=True))[100 * LEVEL]
    return float(test.statistic), bool(test.statistic > critical)


def henze_zirkler(pair: Array) -> tuple[float, bool]:
    """Henze and Zirkler's statistic of rows of shape (M, 2), and whether it rejects joint normality at 5 %.

    NaN where one channel is a multiple of the other: the statistic divides by the covariance.
    """
    from pingouin import multivariate_normality

    pair = pair[:HENZE_ZIRKLER_ROWS]
    if not 1 - _correlation(pair) ** 2 >= SINGULAR:  # r is NaN where these rows of a channel are constant
        return math.nan, False
    test = multivariate_normality(pair, alpha=LEVEL)
    return float(test.hz), bool(test.pval < LEVEL)


def _correlation(pair: Array) -> float:
    return float(np.asarray(np.corrcoef(pair.T))[0, 1])


def _ranks(pair: Array) -> Array:
    """Every channel's ranks, from just above 0 to 1; equal values share one, so the order of rows does not matter."""
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


def _tests(results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Median statistic and share of rejections; a part whose statistic is not finite has None and no vote."""
    finite = [each for each in results if math.isfinite(each[0])]
    return {
        "statistic": float(np.median([statistic for statistic, _ in finite])) if finite else None,
        "rejected": float(np.mean([rejected for _, rejected in finite])) if finite else None,
        "each": [statistic if math.isfinite(statistic) else None for statistic, _ in results],
    }


def _mean(numbers: list[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(numbers)), "each": numbers}


def _mean_size(numbers: list[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(np.abs(numbers))), "each": numbers}


_Measure = tuple[Callable[[Array], Any], Callable[[list[Any]], dict[str, Any]]]
_OF_CHANNELS: dict[str, _Measure] = {
    "r_squared": (lambda channel: qq(channel)["r_squared"], lambda each: {**_mean(each), "least": min(each)}),
    "dagostino": (dagostino, _tests),
    "anderson_darling": (anderson_darling, _tests),
}
_OF_PAIRS: dict[str, _Measure] = {
    "henze_zirkler": (henze_zirkler, _tests),
    "correlation": (_correlation, _mean_size),
    "rank_correlation": (lambda pair: _correlation(_ranks(pair)), _mean_size),
    "mutual_information": (adjusted_mutual_information, _mean),
    "mutual_information_uniform": (partial(adjusted_mutual_information, uniform=True), _mean),
}
"""Name of a measure → the function of one channel or pair, and the summary of its results."""
OF_CHANNELS, OF_PAIRS = tuple(_OF_CHANNELS), tuple(_OF_PAIRS)


def measure_normality(sample: Any, *, channels: int = 64, pairs: int = 32, seed: int = 0) -> dict[str, Any]:
    """Every measure of normality and of dependence on one sample.

    Args:
        sample: tensor or array of shape (rows, channels); rows that are not finite are left out.
        channels: look at so many at most, evenly spaced; constant channels have no shape and are left out.
        pairs: look at so many pairs of them at most, drawn by `seed`.
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
    require_analysis()
    check_number("channels", channels, 1)
    check_number("pairs", pairs, 0)
    rows = _standardized(_rows(sample))
    chosen = spaced(rows.shape[1], channels)
    varied = [i for i in chosen if rows[:, i].any()]
    possible = [list(pair) for pair in combinations(varied, 2)]
    drawn = [possible[i] for i in sorted(np.random.default_rng(seed).permutation(len(possible))[:pairs])]
    numbers: dict[str, Any] = {"rows": len(rows), "channels": varied, "constant": len(chosen) - len(varied)}
    numbers["pairs"] = drawn
    reasons: dict[str, str] = {}
    few = f"{len(rows)} rows; needs {LEAST_SAMPLE}" if len(rows) < LEAST_SAMPLE else ""
    of_channels = _OF_CHANNELS, varied, few or "every channel is constant"
    of_pairs = _OF_PAIRS, drawn, few or "no two channels to pair"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a p-value is beyond a table: here it only has to be small or not
        for measures, parts, reason in (of_channels, of_pairs):
            for name, (function, summary) in measures.items():
                if few or not parts:
                    numbers[name], reasons[name] = None, reason
                else:
                    numbers[name] = summary([function(rows[:, part]) for part in parts])
    if numbers["henze_zirkler"] and numbers["henze_zirkler"]["statistic"] is None:
        numbers["henze_zirkler"], reasons["henze_zirkler"] = None, "every channel of a pair is a multiple of the other"
    return {**numbers, "reasons": reasons}


def lambda_against_likelihood(sample: Any, *, alpha: float = 1.0, eps: float = 1e-5, rows: int = 200) -> dict[str, Any]:
    """λ̂ of one Newton step against the λ of the largest likelihood, row by row (its Figure 6).

    Args:
        sample: input of a norm, tensor or array of shape (rows, N).
        alpha, eps: of the norm, as in `functional.newton_lambda`.
        rows: look at the first so many; a `RowSample` has them in no order. Some 5 ms each.

    Returns:
        `rows`; `skipped`, rows that are constant up to eps; for each row `newton` and `likelihood`; their
        `correlation`; `mean_error` and `mean_absolute_error` of `newton`; `reasons` for what is None.

    Raises:
        UserError: the extra `analysis` is not installed.
        ValueError: the sample is not two-dimensional, or an option is out of range.
    """
    require_analysis()
    from scipy.stats import yeojohnson_normmax

    check_number("alpha", alpha, 0.0, 1.0)
    check_number("eps", eps, 0.0)
    check_number("rows", rows, 1)
    x = torch.from_numpy(_rows(sample)[:rows])
    h = torch.nn.functional.layer_norm(x, x.shape[1:], eps=eps)
    wide = x.shape[1] >= LEAST_SAMPLE
    h = h[(h.std(-1, correction=0) >= LEAST_SPREAD) & wide]
    counts = {"rows": len(h), "skipped": len(x) - len(h)}
    if len(h) < LEAST_SAMPLE:
        few = f"{len(h)} rows that are not constant" if wide else f"rows of {x.shape[1]}"
        cells = ("newton", "likelihood", "correlation", "mean_error", "mean_absolute_error")
        return {**counts, **dict.fromkeys(cells), "reasons": dict.fromkeys(cells, f"{few}; needs {LEAST_SAMPLE}")}
    newton = newton_lambda(h, alpha=alpha, eps=eps)[:, 0].numpy()
    likelihood = np.array([yeojohnson_normmax(row) for row in h.numpy()])
    varied = np.ptp(newton) > 0 and np.ptp(likelihood) > 0
    return {
        **counts,
        "newton": newton.tolist(),
        "likelihood": likelihood.tolist(),
        "correlation": float(np.corrcoef(newton, likelihood)[0, 1]) if varied else None,
        "mean_error": float((newton - likelihood).mean()),
        "mean_absolute_error": float(np.abs(newton - likelihood).mean()),
        "reasons": {} if varied else {"correlation": "all of them are alike"},
    }
