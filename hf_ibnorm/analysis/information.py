"""The information plane: how much a norm's output says of the token read, and of the token to come.

X is the token that the model reads at a position (its id), T a norm's output there, Y the next token of the text (its
id). X is one token and not all the context: about a context seen once no estimator says anything. T depends on the
tokens before, too, so X, T and Y are no Markov chain, and I(T;Y) may be larger than I(X;T).

All values are in nats. No estimate here is the mutual information itself:

* `renyi_information`: matrix-based entropies of order 2. Another quantity than Shannon's, in a scale that the kernel's
  width sets; compare its values with each other only.
* `ksg_information`: nearest neighbours in at most 4 dimensions. Shannon's information, but of a projection, and with a
  bias in 4 dimensions: a lower bound in effect (numbers in its docstring).

Of the generalization bounds of arXiv 2510.25262, whose text was not at hand, the terms computed are I(X;T), I(T;Y) and
the IB value I(T;Y) - β·I(X;T). No bound is given: what else goes into it is not known here.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..functional import check_number
from ..report.tables import Table
from .noise import chosen_norms, evaluating

if TYPE_CHECKING:
    import numpy as np

    _Draws = tuple[np.ndarray, np.ndarray]

RENYI_LEAST, KSG_LEAST = 200, 2000
"""Samples that an estimate needs."""
KSG_DIMENSIONS = 4
NEIGHBOURS = 3
HALVES, SHUFFLES = 100, 10
ESTIMATORS = ("renyi", "ksg")


@dataclass(frozen=True)
class Estimate:
    """An amount of information in nats.

    Args:
        value: None where it cannot be estimated.
        interval: 95 %, from random halves of the samples; None as above. It says how estimates of this size scatter,
            not how biased they are; and it takes samples to be independent, which tokens of one text are not quite.
        chance: what the estimator finds where there is nothing: the same samples, shuffled against each other, mean of
            some shuffles. None as above.
        n: samples.
        reason: why there is no value.
    """

    value: float | None
    interval: tuple[float, float] | None
    chance: float | None
    n: int
    reason: str = ""

    def __str__(self) -> str:
        if self.value is None or self.interval is None:
            return ""
        return f"{self.value:.3f} ({self.interval[0]:.3f} to {self.interval[1]:.3f})"


@dataclass(frozen=True)
class PlanePoint:
    """Where a site is in the information plane.

    Args:
        step: of the checkpoint; None for a model that is none.
        site: name of the norm, relative to the base model.
        estimator: "renyi" or "ksg".
        input: I(X;T).
        output: I(T;Y).
        ib: I(T;Y) - β·I(X;T), from the same samples.
        beta: β.
    """

    step: int | None
    site: str
    estimator: str
    input: Estimate
    output: Estimate
    ib: Estimate
    beta: float


class _CannotEstimateError(Exception):
    """The samples do not allow an estimate; the message says why."""


@dataclass(frozen=True)
class _Renyi:
    """Of two variables: squared distances of all pairs, float32 (n, n), or of labels whether they are equal."""

    x: "np.ndarray"
    y: "np.ndarray"

    @classmethod
    def of(cls, x: "np.ndarray", y: "np.ndarray") -> "_Renyi":
        if len(x) < RENYI_LEAST:
            raise _CannotEstimateError(f"{len(x)} samples, at least {RENYI_LEAST} are needed")
        return cls(_pairs(x), _pairs(y))

    def information(self, subsets: "list[np.ndarray]") -> "np.ndarray":
        import numpy as np

        values = []
        for subset in subsets:
            # The width follows the subset, as it follows the samples: kept, it would make the values scatter more.
            x, y = (_squared_kernel(pairs[subset][:, subset]) for pairs in (self.x, self.y))
            joint, alone, other = (kernel.mean(dtype=float) for kernel in (x * y, x, y))
            values.append(np.log(joint / (alone * other)))
        return np.array(values)

    def shuffled(self, order: "np.ndarray") -> "_Renyi":
        return _Renyi(self.x, self.y[order][:, order])


@dataclass(frozen=True)
class _Ksg:
    """Two continuous variables of shape (n, d), or labels of shape (n,) for one of them, then `y`."""

    x: "np.ndarray"
    y: "np.ndarray"

    @classmethod
    def of(cls, x: "np.ndarray", y: "np.ndarray") -> "_Ksg":
        import numpy as np

        if len(x) < KSG_LEAST:
            raise _CannotEstimateError(f"{len(x)} samples, at least {KSG_LEAST} are needed")
        if x.ndim == 1:
            x, y = y, x
        if y.ndim == 1:
            return cls(_projected(x), _merged(y))
        x, y = _projected(x), _projected(y)
        if not _distances(np.hstack([x, y]), NEIGHBOURS).all():
            raise _CannotEstimateError(
                f"a sample occurs more than {NEIGHBOURS} times, which this estimator cannot take"
            )
        return cls(x, y)

    def information(self, subsets: "list[np.ndarray]") -> "np.ndarray":
        import numpy as np

        estimate = _ross if self.y.ndim == 1 else _kraskov
        return np.array([estimate(self.x[chosen], self.y[chosen]) for chosen in subsets])

    def shuffled(self, order: "np.ndarray") -> "_Ksg":
        return _Ksg(self.x, self.y[order])


def renyi_information(
    x: "np.ndarray", y: "np.ndarray", *, seed: int = 0, resamples: int = HALVES, shuffles: int = SHUFFLES
) -> Estimate:
    """Matrix-based Rényi mutual information of order 2 (Sánchez Giraldo, Rao and Príncipe, arXiv 1211.2459)::

        A = K / n,  K_ij = exp(-|x_i - x_j|² / (2σ²)), or for labels 1 where they are equal and else 0
        S(A) = -log tr(A²)
        I = S(A_x) + S(A_y) - S(A_xy),  A_xy = K_x∘K_y / n

    σ is the median of all |x_i - x_j|, of each variable by itself: no parameter to choose, and the
    value does not change when a variable is scaled (all its columns alike), moved or rotated.

    Of labels S is the collision entropy -log Σ p², and I(y;y) is S(y). Of continuous variables S is about 1 at most,
    and I(x;x) is less than S(x): near 0.54 in one dimension, where Shannon's information is infinite. Of
    independent variables it is not 0 but a little more, for labels in the order of 1/(n·Σ p²): see `chance` of the
    result.

    Args:
        x, y: samples: floats of shape (n, d) or (n,), or labels as integers of shape (n,).
        seed: of the halves and shuffles.
        resamples: halves to draw for the interval, at least 20.
        shuffles: for `chance`, at least 1.

    Returns:
        The estimate. Without a value for fewer than 200 samples, a variable that does not vary (or of which more than
        half of the pairs are equal), and values that are not finite.

    Raises:
        TypeError, ValueError: shapes that do not fit, or a number out of range.
    """
    return _estimated(_Renyi, x, y, seed, resamples, shuffles)


def ksg_information(
    x: "np.ndarray", y: "np.ndarray", *, seed: int = 0, resamples: int = HALVES, shuffles: int = SHUFFLES
) -> Estimate:
    """Mutual information from distances to the third nearest neighbour, in at most 4 dimensions.

    Two continuous variables: the first estimator of Kraskov, Stögbauer and Grassberger (arXiv cond-mat/0305641). A
    continuous one and labels: that of Ross (2014, doi 10.1371/journal.pone.0087357), which here takes samples that are
    equal, too. A variable of more than 4 dimensions is projected onto its first 4 principal components. Then each
    column is divided by its standard deviation, so that scaling columns changes nothing. Labels that occur fewer than 4
    times are taken for one. A function of a variable knows no more than the variable: projecting and merging only ever
    lose information.

    Bias, for Gaussians of correlation ρ in each of d dimensions, n = 2,000, mean of 5 samples that scatter by 0.004 to
    0.03:

    ======  ===========  ===========  ===========
    ρ       d = 1        d = 2        d = 4
    ======  ===========  ===========  ===========
    0       -0.01        0.00         +0.01
    0.5     -0.02        +0.01        -0.08 of 0.58
    0.9     -0.01        0.00         -0.64 of 3.32
    0.99    0.00         -0.19        -2.84 of 7.83
    ======  ===========  ===========  ===========

    In one dimension the tests hold it to 0.05. With 5 labels of any entropy it is within 0.03, in 1 and 4 dimensions.
    With 500 labels, distributed by Zipf's law, in 4 dimensions, merging costs 0.14 of 0.47, 0.9 of 2.9 and 1.5 of 4.7;
    where nothing is shared it finds 0.03 at most.

    Args:
        x, y: samples: floats of shape (n, d) or (n,), or labels as integers of shape (n,), but not both labels.
        seed, resamples, shuffles: as in `renyi_information`.

    Returns:
        The estimate. Without a value for fewer than 2,000 samples, a variable that does not vary, values that are not
        finite, and, for two continuous variables, a sample that occurs more than 3 times.

    Raises:
        TypeError, ValueError: shapes that do not fit, labels on both sides, or a number out of range.
    """
    return _estimated(_Ksg, x, y, seed, resamples, shuffles)


def information_plane(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    sites: str | Collection[str] | None = None,
    estimators: Sequence[str] = ESTIMATORS,
    samples: int = KSG_LEAST,
    beta: float = 1.0,
    seed: int = 0,
    resamples: int = HALVES,
    shuffles: int = SHUFFLES,
    step: int | None = None,
) -> list[PlanePoint]:
    """I(X;T), I(T;Y) and the IB value of every site of a language model; X, T and Y as the module says.

    With the options' defaults some ten seconds a site on one core.

    Args:
        model: a stock or registered Llama or GPT-2; put in eval mode meanwhile.
        ids: tokens, int64 of shape (rows, length).
        sites: globs (fnmatch) over names relative to the base model; None for all.
        estimators: of "renyi" and "ksg".
        samples: positions to draw from all of `ids`, all of them if there are fewer. The same for every model. Not the
            first of a row, whose activations are like no others in trained models, nor the last, which has no next
            token. The Rényi estimator takes memory for some 5·samples² numbers.
        beta: β ≥ 0.
        seed: of the positions, halves and shuffles.
        resamples, shuffles: as in `renyi_information`.
        step: goes into the points.

    Raises:
        TypeError: a model of another family, or an argument that is no number.
        ValueError: a glob that matches no site, an unknown estimator, or a value out of range.
    """
    check_number("beta", beta, 0.0)
    if unknown := set(estimators) - set(ESTIMATORS):
        raise ValueError(f"estimators: got {', '.join(sorted(unknown))}, allowed are {', '.join(ESTIMATORS)}")
    x, y, outputs = _collected(model, ids, sites, samples, seed)
    kinds: dict[str, Any] = {"renyi": _Renyi, "ksg": _Ksg}
    points = []
    for site, t in outputs.items():
        for name in estimators:
            read, to_come = (_drawn(kinds[name], t, labels, seed, resamples, shuffles) for labels in (x, y))
            if isinstance(read, str) or isinstance(to_come, str):
                ib: _Draws | str = read if isinstance(read, str) else to_come
            else:  # the same halves were drawn for both
                ib = to_come[0] - beta * read[0], to_come[1] - beta * read[1]
            x_t, t_y, value = (_summary(each, len(t)) for each in (read, to_come, ib))
            points.append(PlanePoint(step, site, name, x_t, t_y, value, beta))
    return points


def run_information_plane(run: Path, ids: Tensor, **options: Any) -> Iterator[PlanePoint]:
    """The information plane at every checkpoint that a training run left, in order of steps.

    Args:
        run: run directory of train_lm, with `checkpoints/step-N/model`.
        ids: tokens, int64 of shape (rows, length), made by the run's tokenizer.
        **options: of `information_plane`.

    Yields:
        Points with their step, a checkpoint after the other; one model is in memory at a time.

    Raises:
        ValueError: no checkpoint in `run`.
        As `information_plane`.
    """
    steps = {int(path.parent.name.removeprefix("step-")): path for path in run.glob("checkpoints/step-*/model")}
    if not steps:
        raise ValueError(f"run: got {str(run)!r}, which has no checkpoints/step-N/model")
    for step in sorted(steps):
        model = AutoModelForCausalLM.from_pretrained(steps[step], dtype=torch.float32)
        yield from information_plane(model, ids, step=step, **options)


def plane_table(points: Sequence[PlanePoint]) -> Table:
    """Points of the information plane as a table, with 95 % intervals; what cannot be estimated says why."""
    columns = [
        "site",
        "step",
        "estimator",
        "I(X;T)",
        "chance",
        "I(T;Y)",
        "chance",
        "I(T;Y) - β·I(X;T)",
        "β",
        "n",
        "note",
    ]
    table = Table(columns)
    for point in points:
        cells = [str(point.step if point.step is not None else ""), point.estimator]
        for each in (point.input, point.output):
            cells += [str(each), "" if each.chance is None else f"{each.chance:.3f}"]
        cells += [str(point.ib), f"{point.beta:g}", str(point.ib.n), point.ib.reason]
        table.rows.append([point.site, *cells])
    return table


def plot_plane(points: Sequence[PlanePoint], path: Path) -> None:
    """The information plane in a PNG file: a panel for each estimator, a curve through the steps for each site."""
    from ..report.plots import figure, look

    estimators = sorted({point.estimator for point in points})
    with figure(path, 1, max(1, len(estimators))) as axes:
        for panel, name in zip([axes] if len(estimators) < 2 else axes, estimators, strict=False):
            for i, site in enumerate(dict.fromkeys(point.site for point in points)):
                here = [point for point in points if (point.site, point.estimator) == (site, name)]
                known = [(p.input.value, p.output.value) for p in here if p.ib.value is not None]
                if known:
                    colour, style = look(i)
                    panel.plot(*zip(*known, strict=True), f"o{style}", color=colour, markersize=3, label=site)
                    panel.plot(*known[-1], "o", color=colour)  # where it ends
            panel.set_title(name)
            panel.set_xlabel("I(X;T), nats")
            panel.set_ylabel("I(T;Y), nats")
            if panel.lines:
                panel.legend(fontsize=6)


@torch.no_grad()
def _collected(
    model: PreTrainedModel, ids: Tensor, sites: str | Collection[str] | None, samples: int, seed: int
) -> tuple["np.ndarray", "np.ndarray", dict[str, "np.ndarray"]]:
    """X and Y of shape (n,), and T of shape (n, hidden size) for each site, at positions drawn from all of `ids`."""
    check_number("samples", samples, 1)
    rows, length = ids.shape
    places = max(0, length - 2)  # of a row
    drawn = torch.randperm(rows * places, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    base: Any = model.base_model
    norms, seen = chosen_norms(model, sites), dict[str, list[Tensor]]()
    here = torch.empty(0, dtype=torch.int64)

    def keep(site: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            seen.setdefault(site, []).append(output[0, here.to(output.device)].float().cpu())

        return hook

    handles = [norm.register_forward_hook(keep(site)) for site, norm in norms.items()]
    x, y = [ids.new_empty(0)], [ids.new_empty(0)]
    try:
        with evaluating(model):
            for i, row in enumerate(ids):
                here = drawn[drawn // max(1, places) == i] % max(1, places) + 1
                if len(here):
                    x.append(row[here])
                    y.append(row[here + 1])
                    base(input_ids=row[None].to(base.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    empty = [torch.empty(0, 1)]
    outputs = {site: torch.cat(seen.get(site, empty)).numpy() for site in norms}
    return torch.cat(x).cpu().numpy(), torch.cat(y).cpu().numpy(), outputs


def _estimated(kind: Any, x: "np.ndarray", y: "np.ndarray", seed: int, resamples: int, shuffles: int) -> Estimate:
    import numpy as np

    x, y = np.asarray(x), np.asarray(y)
    for name, values in (("x", x), ("y", y)):
        if (
            values.ndim not in (1, 2)
            or len(values) != len(x)
            or values.dtype.kind not in ("iuf" if values.ndim == 1 else "f")
        ):
            raise ValueError(
                f"{name}: got {values.dtype} of shape {values.shape}; must be floats of shape (n, d) or (n,), "
                "or integers of shape (n,), n the same for both"
            )
    x, y = (values[:, None] if values.ndim == 1 and values.dtype.kind == "f" else values for values in (x, y))
    if kind is _Ksg and x.ndim == y.ndim == 1:
        raise ValueError("x, y: got labels on both sides; one must be continuous")
    return _summary(_drawn(kind, x, y, seed, resamples, shuffles), len(x))


def _drawn(kind: Any, x: "np.ndarray", y: "np.ndarray", seed: int, resamples: int, shuffles: int) -> "_Draws | str":
    """Estimates from all samples followed by those from random halves, and those from shuffled samples; or why not.

    Halves are drawn without replacement. An ordinary bootstrap repeats samples, which looks like information to both
    estimators: of unrelated labels the Rényi value was 0.02 and the bootstrap's interval 0.03 to 0.06. The scatter of
    half-samples around the whole is, to first order, that of the whole around the truth, because 1/(n/2) - 1/n = 1/n
    (Politis and Romano 1994; the delete-half jackknife).
    """
    import numpy as np

    check_number("resamples", resamples, 20)
    check_number("shuffles", shuffles, 1)
    n, random = len(x), np.random.default_rng(seed)
    try:
        for values in (x, y):
            if not np.isfinite(values).all():
                raise _CannotEstimateError("values that are not finite")
        estimator = kind.of(x, y)
    except _CannotEstimateError as error:
        return str(error)
    everything = np.arange(n)
    halves = [np.sort(random.permutation(n)[: n // 2]) for _ in range(resamples)]
    by_chance = [estimator.shuffled(random.permutation(n)).information([everything])[0] for _ in range(shuffles)]
    return estimator.information([everything, *halves]), np.array(by_chance)


def _summary(drawn: "_Draws | str", n: int) -> Estimate:
    import numpy as np

    if isinstance(drawn, str):
        return Estimate(None, None, None, n, drawn)
    (value, *halves), by_chance = drawn
    # Halves have a bias of their own, which their mean takes with it.
    low, high = value + np.percentile(np.array(halves) - np.mean(halves), [2.5, 97.5])
    return Estimate(float(value), (float(low), float(high)), float(by_chance.mean()), n)


def _pairs(values: "np.ndarray") -> "np.ndarray":
    """Squared distances (n, n); of labels, whether they are equal."""
    import numpy as np

    if values.ndim == 1:
        if (values == values[0]).all():
            raise _CannotEstimateError("a variable that does not vary")
        return values[:, None] == values
    centred = values.astype(float) - values.mean(0, dtype=float)
    norms = (centred**2).sum(-1)
    squares = np.maximum(norms[:, None] + norms - 2 * centred @ centred.T, 0.0)
    np.fill_diagonal(squares, 0.0)
    if _median(squares) <= 1e-12 * norms.max():  # what rounding leaves of equal samples
        raise _CannotEstimateError("a variable that does not vary, or hardly")
    return squares.astype(np.float32)  # six digits are plenty here, and far faster


def _squared_kernel(pairs: "np.ndarray") -> "np.ndarray":
    """K∘K from what `_pairs` gives: Gaussian with the median distance as its width, or equality."""
    import numpy as np

    return pairs.astype(np.float32) if pairs.dtype == bool else np.exp(-pairs / _median(pairs))


def _median(values: "np.ndarray") -> Any:
    """The upper one of an even number: numpy's own takes five times as long."""
    import numpy as np

    return np.partition(values.ravel(), values.size // 2)[values.size // 2]


def _projected(values: "np.ndarray") -> "np.ndarray":
    """At most 4 columns of standard deviation 1: those of `values`, or their first principal components."""
    import numpy as np

    centred = values.astype(float) - values.mean(0, dtype=float)
    if centred.shape[1] > KSG_DIMENSIONS:
        _, vectors = np.linalg.eigh(centred.T @ centred)  # in ascending order
        centred = centred @ vectors[:, -KSG_DIMENSIONS:]
    deviations = centred.std(0)
    varying = deviations > 1e-6 * max(deviations.max(), np.abs(values).max() * 1e-6)
    if not varying.any():
        raise _CannotEstimateError("a variable that does not vary")
    return centred[:, varying] / deviations[varying]


def _merged(labels: "np.ndarray") -> "np.ndarray":
    """Labels from 0, of which those that occur too seldom to have neighbours are the last one."""
    import numpy as np

    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    merged = np.where(counts[numbers] > NEIGHBOURS, numbers, len(counts))
    if (merged == merged[0]).all():
        raise _CannotEstimateError(f"no two labels that occur more than {NEIGHBOURS} times")
    return merged


def _distances(points: "np.ndarray", neighbours: int) -> "np.ndarray":
    """Distance in the maximum norm from each point to its k-th neighbour, shape (n,)."""
    from scipy.spatial import cKDTree

    return cKDTree(points).query(points, neighbours + 1, p=float("inf"))[0][:, -1]


def _within(points: "np.ndarray", radii: "np.ndarray") -> "np.ndarray":
    """How many other points there are within its radius around each point, those just at it included."""
    from scipy.spatial import cKDTree

    return cKDTree(points).query_ball_point(points, radii, p=float("inf"), return_length=True) - 1


def _kraskov(x: "np.ndarray", y: "np.ndarray") -> float:
    """ψ(k) + ψ(n) - mean(ψ(n_x + 1) + ψ(n_y + 1)), n_x and n_y counted strictly within the distance to neighbour k."""
    import numpy as np
    from scipy.special import digamma

    inside = np.nextafter(_distances(np.hstack([x, y]), NEIGHBOURS), 0.0)
    counts = digamma(_within(x, inside) + 1) + digamma(_within(y, inside) + 1)
    return float(digamma(NEIGHBOURS) + digamma(len(x)) - counts.mean())


def _ross(points: "np.ndarray", labels: "np.ndarray") -> float:
    """ψ(n) - mean ψ(n_c) + mean ψ(k) - mean ψ(m): m samples as near as the k-th neighbour among the n_c of its label.

    Where samples are equal more than k of that label can be as near; k is then how many they are, as in arXiv
    1709.06212. A label's only sample has no neighbour and is left out.
    """
    import numpy as np
    from scipy.special import digamma

    radii, near, size = (np.zeros(len(points)) for _ in range(3))
    for label in np.unique(labels):
        chosen = labels == label
        size[chosen] = count = chosen.sum()
        if count > 1:
            radii[chosen] = _distances(points[chosen], min(NEIGHBOURS, count - 1))
            near[chosen] = _within(points[chosen], radii[chosen])
    kept = size > 1
    around = _within(points[kept], radii[kept])
    terms = digamma(near[kept]) - digamma(size[kept]) - digamma(around)
    return float(digamma(kept.sum()) + terms.mean())
