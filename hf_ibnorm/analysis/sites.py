"""What goes into the norms of a model and what comes out of them, while it runs or trains.

`watch` puts a hook on every site. What is measured there is the row x that the norm is given and z, what it makes of it
before gain and bias and without training noise. Everything is computed by `moments`, so that no step waits for the
device; `result` reads it off.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..norms import NORMS, Measure
from ..sites import contract
from .moments import Covariance, Histogram, Moments, QuantileSketch, RowSample, RowStatistics, finite_rows
from .places import known_norms, matching

NEAR_ZERO = 0.1
"""An element is near zero when it is smaller than this share of its row's mean absolute value: 6.4 % of a Gaussian."""
LEAST_ROWS = 30
"""Rows a site must have seen before anything is said about it."""
RANK_WIDTH = 1024
"""The widest norm whose effective rank is measured: it takes a matrix of N² numbers before and one after."""
RANK_ROWS = 4
"""Rows for each channel that the effective rank needs; with so few it is too low by an eighth."""
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)

_OF_A_ROW = ("near_zero", "hoyer", "massive", "row_skewness", "row_excess_kurtosis")


class ValueStatistics:
    """Statistics of the rows at one place: streaming, merged, and read off as plain numbers.

    Args:
        width: N.
        device: that of the data.
        sample: rows to keep for tests of normality, at most; 0 keeps none.
        seed: of the sample.
        rank_width: the effective rank is measured up to this N; 0 for never.
    """

    def __init__(
        self,
        width: int,
        device: torch.device | str = "cpu",
        sample: int = 0,
        seed: int = 0,
        rank_width: int = RANK_WIDTH,
    ) -> None:
        self.width, self.rank_width = width, rank_width
        self.moments = Moments(width, device)
        self.quantiles = QuantileSketch(device=device)
        self.of_rows = RowStatistics(_OF_A_ROW, device)
        self.covariance = Covariance(width, device) if width <= rank_width else None
        self.sample = RowSample(sample, width, device, seed=seed) if sample else None

    def update(self, x: Tensor) -> None:
        """Take in rows of shape (R, N); one that is not finite is NaN throughout."""
        for each in (self.moments, self.quantiles, self.covariance, self.sample):
            if each is not None:
                each.update(x)
        size, root = x.abs(), math.sqrt(self.width)
        mean_size = size.mean(-1)
        near_zero = (size < NEAR_ZERO * mean_size[:, None]).to(x.dtype).mean(-1)
        # The lower median as the least of the upper half: torch.median has no deterministic form on GPUs.
        median = size.topk(self.width // 2 + 1, sorted=False).values.amin(-1)
        c = x - x.mean(-1, keepdim=True)
        c2 = c * c
        variance = c2.mean(-1)
        self.of_rows.update(
            near_zero=torch.where(mean_size > 0, near_zero, torch.nan),
            hoyer=(root - self.width * mean_size / x.norm(dim=-1)) / (root - 1 or torch.nan),
            massive=size.amax(-1) / median,
            row_skewness=(c2 * c).mean(-1) / variance**1.5,
            row_excess_kurtosis=(c2 * c2).mean(-1) / variance**2 - 3,
        )

    def merge(self, other: "ValueStatistics") -> None:
        """Take in all that `other`, of the same place, has seen."""
        self.moments.merge(other.moments)
        self.quantiles.merge(other.quantiles)
        self.of_rows.merge(other.of_rows)
        if self.covariance is not None and other.covariance is not None:
            self.covariance.merge(other.covariance)
        if self.sample is not None and other.sample is not None:
            self.sample.merge(other.sample)

    def result(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Cells, as `SiteStatistics.result` describes them, and for those that are None the reason."""
        pooled, rows = self.moments.pooled(), self.of_rows.read()
        channels = torch.stack([self.moments.skewness, self.moments.excess_kurtosis])
        quantiles = self.quantiles.quantile(list(QUANTILES)).tolist()
        cells: dict[str, Any] = {
            "mean": pooled.mean.item(),
            "variance": pooled.variance.item(),
            "skewness": pooled.skewness.item(),
            "excess_kurtosis": pooled.excess_kurtosis.item(),
            "channel_skewness": channels[0].nanmedian().item(),
            "channel_excess_kurtosis": channels[1].nanmedian().item(),
            **{name: rows[name]["mean"] for name in _OF_A_ROW},
            "massive_most": rows["massive"]["most"],
            "quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
        }
        reasons = dict.fromkeys(cells, "no row has one: all are constant, or half zeros")
        cells["effective_rank"], reasons["effective_rank"] = self._effective_rank()
        return _emptied(cells, reasons)

    def _effective_rank(self) -> tuple[float | None, str]:
        if self.covariance is None:
            return None, f"width {self.width}; measured up to {self.rank_width}"
        rows, least = int(self.covariance.count), RANK_ROWS * self.width
        if rows < least:
            return None, f"{rows} rows; needs {least}, {RANK_ROWS} for each channel"
        return self.covariance.effective_rank().item(), "all rows are alike"


class SiteStatistics:
    """Statistics of one norm: of what goes in, of what comes out, and of what this kind of norm does.

    Made for its first rows; its memory does not grow after them.

    Args:
        norm: the norm.
        rows: take in at most that many rows a call, evenly spaced; None for all.
        sample: rows of x and of z to keep for tests of normality, at most, the same ones of both; 0 keeps none.
        seed: of the sample; statistics that will be merged need different ones.
        rank_width: the effective rank is measured up to this width; 0 for never, which spares a matrix product a call.
    """

    def __init__(
        self,
        norm: nn.Module,
        rows: int | None = None,
        sample: int = 0,
        seed: int = 0,
        rank_width: int = RANK_WIDTH,
    ) -> None:
        self.norm, self.rows, self.sample, self.seed, self.rank_width = norm, rows, sample, seed, rank_width
        self.before: ValueStatistics | None = None
        self.after: ValueStatistics | None = None
        self.own: RowStatistics | None = None
        """Of the diagnostics that the norm brings, if it brings any."""
        self.histograms: dict[str, Histogram] = {}
        self.measures: tuple[Measure, ...] = contract(norm).measures

    def _start(self, width: int, device: torch.device) -> tuple[ValueStatistics, ValueStatistics]:
        if self.before is None or self.after is None:
            options = (width, device, self.sample, self.seed, self.rank_width)
            self.before, self.after = (ValueStatistics(*options) for _ in range(2))
            if self.measures:
                self.own = RowStatistics(tuple(each.name for each in self.measures), device)
                self.histograms = {each.name: Histogram(*each.bins, device) for each in self.measures if each.bins}
        return self.before, self.after

    def update(self, x: Tensor) -> None:
        """Take in what the norm is given, shape (..., N); no gradient flows, and nothing waits for the device."""
        # Tensors made in inference mode could not be updated outside it; autocast would round the sums to 16 bits.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            before, after = self._start(x.shape[-1], x.device)
            rows = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])
            if self.rows is not None:
                rows = rows[:: max(1, -(-len(rows) // self.rows))]
            rows = finite_rows(rows if rows.dtype == torch.float64 else rows.float())
            before.update(rows)
            z, numbers = contract(self.norm).measured(rows)
            after.update(finite_rows(z))
            if self.own is not None:
                self.own.update(**numbers)
            for name, histogram in self.histograms.items():
                histogram.update(numbers[name])

    def merge(self, other: "SiteStatistics") -> None:
        """Take in all that `other`, of the same site, has seen: in another process, or on other text."""
        if other.before is None or other.after is None:
            return
        before, after = self._start(other.before.width, other.before.moments.mean.device)
        before.merge(other.before)
        after.merge(other.after)
        if self.own is not None and other.own is not None:
            self.own.merge(other.own)
        for name, histogram in self.histograms.items():
            histogram.merge(other.histograms[name])

    def packed(self) -> Tensor | None:
        """All that was measured, but for a sample, to be sent to another process and merged there after `unpacked`.

        Returns:
            float64 of shape (M,), where M depends on the width and the kind of norm; None where the norm has not run.
        """
        tensors = self._tensors()
        return torch.cat([each.flatten().double() for each in tensors]) if tensors else None  # counts are below 2^53

    def unpacked(self, vector: Tensor) -> "SiteStatistics":
        """The statistics that another process has `packed` at the same site; the norm must have run here too."""
        other = SiteStatistics(self.norm, rank_width=self.rank_width)
        if self.before is not None:
            other._start(self.before.width, self.before.moments.mean.device)
        tensors = other._tensors()
        for each, values in zip(tensors, vector.split([each.numel() for each in tensors]), strict=True):
            each.copy_(values.view_as(each))
        return other

    def _own_cells(self) -> dict[str, Any]:
        """Cells of the diagnostics that the norm brings."""
        cells: dict[str, Any] = {}
        numbers = {} if self.own is None else self.own.read()
        for each in self.measures:
            of_rows = numbers[each.name]
            parent, _, part = each.name.rpartition(".")
            if parent:
                if cells[parent] is not None:
                    cells[parent][part] = of_rows["mean"]
            elif not each.spread:
                cells[each.name] = of_rows["mean"]
            else:
                keys = ("mean", "least", "most")
                cells[each.name] = {key: of_rows[key] for key in keys} if of_rows["rows"] else None
        for name, histogram in self.histograms.items():
            if cells[name] is not None:
                cells[name] |= {"edges": histogram.edges, "counts": histogram.inside.tolist()}
                cells[name] |= {"below": int(histogram.below), "above": int(histogram.above)}
        return cells

    def _tensors(self) -> list[Tensor]:
        """What was measured, in an order that depends on the kind of norm only."""
        if self.before is None or self.after is None:
            return []
        parts: list[Any] = [self.own, *self.histograms.values()]
        for place in (self.before, self.after):
            parts += [place.moments, place.quantiles, place.of_rows, place.covariance]
        held = [value for part in parts if part is not None for value in vars(part).values()]
        return [value for value in held if isinstance(value, Tensor)]

    def result(self) -> dict[str, Any]:
        """Everything as plain numbers; waits for the device, and takes a moment for wide norms (eigenvalues).

        Returns:
            * `norm`, `width`; `rows` taken in, `skipped` ones that held a NaN or an infinity
            * `before` (of x) and `after` (of z), each
                - `mean`, `variance`, `skewness`, `excess_kurtosis` of all elements together;
                  `channel_...`: of each channel over the rows, median of the channels;
                  `row_...`: of each row over its elements, mean of the rows
                - `near_zero`: share of elements with |v| < 0.1·mean|v| of their row
                - `hoyer`: (√N - |v|₁/|v|₂) / (√N - 1) of a row, 0 all alike, 1 a single one; mean of the rows
                - `massive`, `massive_most`: max|v| / median|v| of a row (the lower median); mean and largest
                - `effective_rank`: exp of the entropy of the covariance's eigenvalues, from 1 to N
                - `quantiles` of all elements, to 1 %
            * IBNorm: `contraction`: var(s) / var(x) of a row, before standardization (with `standardize_first`, of what
              is compressed: the standardized row); `saturation`: share of elements where f' < 0.1; `slope`: mean f'
            * LayerNormalNorm: `lam_hat` of the rows: mean, least, most, `outside` (share outside [0, 2]), a histogram's
              `edges`, `counts`, `below` and `above`; `p_std`: standard deviation of a row after the power transform,
              mean, least and most
            * `reasons`: for every cell that is None, under "cell" or "before.cell", why
        """
        site: dict[str, Any] = {"norm": type(self.norm).__name__, "rows": 0, "skipped": 0}
        foreign = {name: norms for name, norms in _measured_by().items() if name not in _cells(self.measures)}
        empty = ("width", "before", "after", *_cells(self.measures), *foreign)
        site |= dict.fromkeys(empty)
        if self.before is None or self.after is None:
            return {**site, "reasons": dict.fromkeys(empty, "the norm has not run")}
        rows = int(self.before.moments.count)
        site |= {"width": self.before.width, "rows": rows, "skipped": int(self.before.moments.skipped)}
        if rows < LEAST_ROWS:
            return {**site, "reasons": dict.fromkeys(empty[1:], f"{rows} rows; needs {LEAST_ROWS}")}
        reasons: dict[str, str] = {}
        for place, statistics in (("before", self.before), ("after", self.after)):
            site[place], why = statistics.result()
            reasons |= {f"{place}.{cell}": reason for cell, reason in why.items()}
        site |= self._own_cells()
        why_empty = {name: f"only {_a(norms)} has one" for name, norms in foreign.items()}
        why_empty |= {each.name: each.missing for each in self.measures if each.name in site}
        site, why = _emptied(site, why_empty)
        return {**site, "reasons": reasons | why}


def _cells(measures: tuple[Measure, ...]) -> list[str]:
    """The cells that results have for these diagnostics."""
    return [each.name for each in measures if "." not in each.name]


def _measured_by() -> dict[str, list[str]]:
    """Cell → the classes of norms that bring it, of every norm that is known."""
    norms: dict[str, list[str]] = {}
    for entry in NORMS.values():
        for name in _cells(entry.contract.measures):
            if entry.cls.__name__ not in norms.setdefault(name, []):
                norms[name].append(entry.cls.__name__)
    return norms


def _a(names: list[str]) -> str:
    return " or ".join(f"{'an' if name[0] in 'AEIOU' else 'a'} {name}" for name in names)


def _emptied(cells: dict[str, Any], reasons: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`cells` with None for what is no number, and those of `reasons` that explain one."""
    cells = {k: None if isinstance(cell, float) and not math.isfinite(cell) else cell for k, cell in cells.items()}
    return cells, {name: reason for name, reason in reasons.items() if cells[name] is None}


class ModelStatistics:
    """Statistics of every norm of a model.

    Args:
        model: as `known_norms` takes it.
        rows, sample, seed, rank_width: as in `SiteStatistics`.
        sites: globs (fnmatch) over the names; None for all.

    Raises:
        ValueError: the model runs no known norm, or a glob matches none.
        RuntimeError: the norms are not those of the architecture.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: int | None = None,
        sample: int = 0,
        seed: int = 0,
        rank_width: int = RANK_WIDTH,
        sites: str | Collection[str] | None = None,
    ) -> None:
        self.sites: dict[str, SiteStatistics] = {}
        shared: dict[nn.Module, SiteStatistics] = {}
        for site, norm in matching(known_norms(model), sites).items():
            self.sites[site] = shared.setdefault(norm, SiteStatistics(norm, rows, sample, seed, rank_width))

    def merge(self, other: "ModelStatistics") -> None:
        """Take in all that `other`, of the same architecture and device, has seen."""
        for site, statistics in {id(each): (site, each) for site, each in self.sites.items()}.values():
            statistics.merge(other.sites[site])

    def result(self) -> dict[str, dict[str, Any]]:
        """Site → what `SiteStatistics.result` says of it; sites that share a norm share its statistics."""
        return {site: statistics.result() for site, statistics in self.sites.items()}


@contextmanager
def watch(
    model: nn.Module,
    statistics: ModelStatistics | None = None,
    *,
    rows: int | None = None,
    sample: int = 0,
) -> Iterator[ModelStatistics]:
    """`with watch(model) as statistics: model(...)` measures what goes through the norms, for `statistics.result()`.

    Training goes on as if nothing were there: no gradient, no random number and no output is changed. A block that
    gradient checkpointing computes again in the backward pass is not counted twice. Padding is not known to a norm and
    is counted as text. Hooks do not run in a graph that torch.compile has made: watch the model that it was made of.

    Args:
        model: a Llama or GPT-2, stock or registered, bare or wrapped by PEFT; or another, as `known_norms` takes it.
        statistics: go on with these, as at every K-th step of a training; new ones by default.
        rows, sample: of new ones, as in `SiteStatistics`.

    Yields:
        The statistics; they stay readable after the block.

    Raises:
        ValueError: the model runs no known norm, or `statistics` are of other norms: of another model, or from before
            the norms were swapped.
        RuntimeError: the norms are not those of the architecture.
    """
    statistics = ModelStatistics(model, rows, sample) if statistics is None else statistics
    norms = known_norms(model)
    for site, each in statistics.sites.items():
        if norms.get(site) is not each.norm:
            raise ValueError(f"statistics: made for other norms than {site} of this model; merge() joins two of them")
    handles = [each.norm.register_forward_hook(_hook(each)) for each in dict.fromkeys(statistics.sites.values())]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def _hook(statistics: SiteStatistics) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # Inside a backward pass this is gradient checkpointing at work (torch.utils.module_tracker asks the same way).
        if torch._C._current_graph_task_id() == -1:
            statistics.update(args[0])

    return hook
