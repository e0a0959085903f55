"""Statistics of the inputs and outputs of a model's norms, while it runs or trains.

`watch` puts a hook on every site, which measures the norm's input rows x and its output rows z before gain and bias,
without training noise. Everything is computed by `moments`, so no step waits for the device; `result` does.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..grouping import to_rows
from ..norms import NORMS, Measure
from ..sites import contract
from .moments import Covariance, Device, Histogram, Moments, QuantileSketch, RowSample, RowStatistics, finite_rows
from .places import hooked, known_norms, matching

NEAR_ZERO = 0.1
"""An element is near zero when it is smaller than this share of its row's mean absolute value: 6.4 % of a Gaussian."""
LEAST_ROWS = 30
"""Rows a site must have seen before it gets numbers."""
RANK_WIDTH = 1024
"""The widest norm whose effective rank is measured: it takes a matrix of N² numbers before and one after."""
RANK_ROWS = 4
"""Rows for each channel that the effective rank needs; with so few it is too low by an eighth."""
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)

_OF_A_ROW = ("near_zero", "hoyer", "massive", "row_skewness", "row_excess_kurtosis")


class ValueStatistics:
    """Statistics of the rows at one place.

    Args:
        width, device: of the rows.
        sample: rows to keep for tests of normality, at most; 0 keeps none.
        seed: of the sample; statistics that will be merged need different ones.
        rank_width: the effective rank is measured up to this N; 0 for never, which spares a matrix product a call.
    """

    def __init__(
        self, width: int, device: Device = "cpu", sample: int = 0, seed: int = 0, rank_width: int = RANK_WIDTH
    ) -> None:
        self.width, self.rank_width = width, rank_width
        self.moments: Moments = Covariance(width, device) if width <= rank_width else Moments(width, device)
        self.quantiles = QuantileSketch(device=device)
        self.of_rows = RowStatistics(_OF_A_ROW, device)
        self.sample = RowSample(sample, width, device, seed)
        self.parts: list[Any] = [self.moments, self.quantiles, self.of_rows, self.sample]

    def update(self, x: Tensor) -> None:
        """Take in rows of shape (R, N); a row that is not finite is NaN throughout."""
        for each in (self.moments, self.quantiles, self.sample):
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

    def result(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Cells, as `SiteStatistics.result` describes them; and for each cell that is None the reason."""
        pooled, rows = self.moments.pooled(), self.of_rows.read()
        quantiles = self.quantiles.quantile(list(QUANTILES)).tolist()
        shape = ("skewness", "excess_kurtosis")
        cells: dict[str, Any] = {
            **{name: getattr(pooled, name).item() for name in ("mean", "variance", *shape)},
            **{f"channel_{name}": getattr(self.moments, name).nanmedian().item() for name in shape},
            **{name: rows[name]["mean"] for name in _OF_A_ROW},
            "massive_most": rows["massive"]["most"],
            "quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
        }
        reasons = dict.fromkeys(cells, "no row has one: all are constant, or half zeros")
        count, least, cells["effective_rank"] = int(self.moments.count), RANK_ROWS * self.width, None
        if not isinstance(self.moments, Covariance):
            reasons["effective_rank"] = f"width {self.width}; measured up to {self.rank_width}"
        elif count < least:
            reasons["effective_rank"] = f"{count} rows; needs {least}, {RANK_ROWS} for each channel"
        else:
            cells["effective_rank"] = self.moments.effective_rank().item()
            reasons["effective_rank"] = "all rows are alike"
        return _emptied(cells, reasons)


class SiteStatistics:
    """Statistics of one norm: of its input, of its output, and of the diagnostics that it brings.

    Their memory is allocated for the first rows, which tell the `width`, and does not grow after them.

    Args:
        norm: the norm.
        rows: take in at most so many rows of a call, evenly spaced; None for all.
        **options: of the `ValueStatistics` before and after the norm; their samples are of the same rows.
    """

    before: ValueStatistics
    after: ValueStatistics

    def __init__(self, norm: nn.Module, rows: int | None = None, **options: int) -> None:
        self.norm, self.rows, self.options = norm, rows, options
        self.measures: tuple[Measure, ...] = contract(norm).measures
        self.width: int | None = None

    def _start(self, width: int, device: Device) -> None:
        if self.width is None:
            self.width = width
            self.before, self.after = (ValueStatistics(width, device, **self.options) for _ in range(2))
            self.own = RowStatistics(tuple(each.name for each in self.measures), device)
            self.histograms = {each.name: Histogram(*each.bins, device) for each in self.measures if each.bins}
            self.parts: list[Any] = [self.own, *self.histograms.values(), *self.before.parts, *self.after.parts]

    def update(self, x: Tensor) -> None:
        """Take in the norm's input, as the norm takes it; no gradient flows, and nothing waits for the device."""
        # Tensors made in inference mode could not be updated outside it; autocast would round the sums to 16 bits.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x = to_rows(x, contract(self.norm).area)
            self._start(x.shape[-1], x.device)
            rows = finite_rows(x.detach())
            if self.rows is not None:
                rows = rows[:: max(1, -(-len(rows) // self.rows))]
            rows = rows if rows.dtype == torch.float64 else rows.float()
            self.before.update(rows)
            z, numbers = contract(self.norm).measured(rows)
            self.after.update(finite_rows(z))
            self.own.update(**numbers)
            for name, histogram in self.histograms.items():
                histogram.update(numbers[name])

    def merge(self, other: "SiteStatistics") -> None:
        """Take in all that `other`, of the same site and options, has seen: in another process, or on other text."""
        if other.width is not None:
            self._start(other.width, other.before.moments.mean.device)
            for mine, others in zip(self.parts, other.parts, strict=True):
                mine.merge(others)

    def _tensors(self) -> list[Tensor]:
        """All tensors of the parts, without the sample's, in an order that depends on the kind of norm alone."""
        held = [value for part in self.parts if not isinstance(part, RowSample) for value in vars(part).values()]
        return [value for value in held if isinstance(value, Tensor)]

    def packed(self) -> Tensor | None:
        """All that was measured, but for a sample, to be sent to another process and merged there after `unpacked`:
        float64 of shape (M,), where M depends on the width and the kind of norm; None where the norm has not run."""
        # Counts are below 2^53, so float64 holds them.
        return None if self.width is None else torch.cat([each.flatten().double() for each in self._tensors()])

    def unpacked(self, vector: Tensor) -> "SiteStatistics":
        """The statistics that another process has `packed` at the same site; the norm must have run here too."""
        other = SiteStatistics(self.norm, **self.options | {"sample": 0})
        other._start(self.before.width, self.before.moments.mean.device)
        tensors = other._tensors()
        for each, values in zip(tensors, vector.split([each.numel() for each in tensors]), strict=True):
            each.copy_(values.view_as(each))
        return other

    def _own_result(self) -> dict[str, Any]:
        """Cells of the diagnostics that the norm brings; NaN or None for one without a number."""
        cells: dict[str, Any] = {}
        numbers = self.own.read()
        for each in self.measures:
            of_rows = numbers[each.name]
            parent, _, part = each.name.rpartition(".")
            if parent and cells[parent] is not None:
                cells[parent][part] = of_rows["mean"]
            elif not parent:
                spread = {key: of_rows[key] for key in ("mean", "least", "most")} if of_rows["rows"] else None
                cells[each.name] = spread if each.spread else of_rows["mean"]
        for name, histogram in self.histograms.items():
            if cells[name] is not None:
                cells[name] |= {"edges": histogram.edges, "counts": histogram.inside.tolist()}
                cells[name] |= {"below": int(histogram.below), "above": int(histogram.above)}
        return cells

    def result(self) -> dict[str, Any]:
        """Everything as plain numbers; waits for the device, and takes a moment for wide norms (eigenvalues).

        Returns:
            * `norm`, `width`; `rows` taken in, `skipped` rows that held a NaN or an infinity
            * `before` (of x) and `after` (of z), each
                - `mean`, `variance`, `skewness`, `excess_kurtosis` of all elements together; `channel_...`: of each
                  channel over the rows, median of the channels; `row_...`: of each row, mean of the rows
                - `near_zero`: share of elements with |v| < 0.1·mean|v| of their row
                - `hoyer`: (√N - |v|₁/|v|₂) / (√N - 1) of a row, 0 where all elements are alike, 1 for a single one
                  that is not 0; mean of the rows
                - `massive`, `massive_most`: max|v| / median|v| of a row (the lower median); mean and largest
                - `effective_rank`: exp of the entropy of the covariance's eigenvalues, from 1 to N
                - `quantiles` of all elements, to 1 %
            * IBNorm: `contraction`: var(s) / var(x) of a row, x the compression's input (with `standardize_first` the
              standardized row); `saturation`: share of elements where f' < 0.1; `slope`: mean f'
            * LayerNormalNorm: `lam_hat` of the rows: mean, least, most, `outside` (share outside [0, 2]), a histogram's
              `edges`, `counts`, `below` and `above`; `p_std`: standard deviation of a row after the power transform,
              mean, least and most
            * `reasons`: why a cell is None, under "cell" or "before.cell"
        """
        foreign = _foreign_cells(self.measures)
        empty = ("width", "before", "after", *(each.name for each in self.measures if "." not in each.name), *foreign)
        site: dict[str, Any] = {"norm": type(self.norm).__name__, "rows": 0, "skipped": 0, **dict.fromkeys(empty)}
        if self.width is None:
            return {**site, "reasons": dict.fromkeys(empty, "the norm has not run")}
        rows = int(self.before.moments.count)
        site |= {"width": self.width, "rows": rows, "skipped": int(self.before.moments.skipped)}
        if rows < LEAST_ROWS:
            return {**site, "reasons": dict.fromkeys(empty[1:], f"{rows} rows; needs {LEAST_ROWS}")}
        reasons: dict[str, str] = {}
        for place, statistics in (("before", self.before), ("after", self.after)):
            site[place], of_place = statistics.result()
            reasons |= {f"{place}.{cell}": reason for cell, reason in of_place.items()}
        missing = {each.name: each.missing for each in self.measures if each.name in site}
        site, of_site = _emptied(site | self._own_result(), foreign | missing)
        return {**site, "reasons": reasons | of_site}


def _foreign_cells(measures: tuple[Measure, ...]) -> dict[str, str]:
    """Cell → why it is empty, for the diagnostics of all known norms that are not among `measures`."""
    norms: dict[str, dict[str, None]] = {}
    for entry in NORMS.values():
        name = entry.cls.__name__
        for each in entry.contract.measures:
            if "." not in each.name and each.name not in {own.name for own in measures}:
                norms.setdefault(each.name, {})[f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"] = None
    return {cell: f"only {' or '.join(names)} has one" for cell, names in norms.items()}


def _emptied(cells: dict[str, Any], reasons: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`cells` with None for NaN and infinity, and the `reasons` of the cells that are None."""
    cells = {k: None if isinstance(cell, float) and not math.isfinite(cell) else cell for k, cell in cells.items()}
    return cells, {name: reason for name, reason in reasons.items() if cells[name] is None}


class ModelStatistics:
    """Statistics of every norm of a model.

    Args:
        model: as `known_norms` takes it.
        sites: globs (fnmatch) over the names; None for all.
        **options: of `SiteStatistics`, for all sites.

    Raises:
        ValueError: the model runs no known norm, or a glob matches none.
        RuntimeError: the norms are not those of the architecture.
    """

    def __init__(self, model: nn.Module, *, sites: str | Collection[str] | None = None, **options: Any) -> None:
        norms = known_norms(model)
        chosen = matching(norms, sites)
        of_norm = {norms[site]: SiteStatistics(norms[site], **options) for site in chosen}
        self.sites = {site: of_norm[norms[site]] for site in chosen}

    def merge(self, other: "ModelStatistics") -> None:
        """Take in all that `other`, of the same architecture and device, has seen."""
        pairs = {statistics: other.sites[site] for site, statistics in self.sites.items()}  # sites may share a norm
        for mine, others in pairs.items():
            mine.merge(others)

    def result(self) -> dict[str, dict[str, Any]]:
        """Site → its `SiteStatistics.result`; sites that share a norm share its statistics."""
        return {site: statistics.result() for site, statistics in self.sites.items()}


@contextmanager
def watch(
    model: nn.Module, statistics: ModelStatistics | None = None, *, rows: int | None = None, sample: int = 0
) -> Iterator[ModelStatistics]:
    """`with watch(model) as statistics: model(...)` measures inputs and outputs of norms, for `statistics.result()`.

    Training goes on as if nothing were there: no gradient, no random number and no output is changed. A block that
    gradient checkpointing computes again in the backward pass is not counted twice. Norms do not know padding, which is
    counted as text. Hooks do not run in a graph that torch.compile has made: watch the model that was compiled.

    Args:
        model: a Llama or GPT-2, stock or registered, bare or wrapped by PEFT; or another, as `known_norms` takes it.
        statistics: go on with these, as at every K-th step of a training; new ones by default.
        rows, sample: of new ones, as in `SiteStatistics` and `ValueStatistics`.

    Yields:
        The statistics; they stay readable after the block.

    Raises:
        ValueError: the model runs no known norm, or `statistics` are of other norms: of another model, or from before
            the norms were swapped.
        RuntimeError: the norms are not those of the architecture.
    """
    statistics = ModelStatistics(model, rows=rows, sample=sample) if statistics is None else statistics
    norms = known_norms(model)
    for site, each in statistics.sites.items():
        if norms.get(site) is not each.norm:
            raise ValueError(f"statistics: made for other norms than {site} of this model; merge() joins two of them")
    with hooked({each.norm: partial(_take_in, each) for each in statistics.sites.values()}):
        yield statistics


def _take_in(statistics: SiteStatistics, _norm: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
    # Inside a backward pass this is gradient checkpointing at work (torch.utils.module_tracker asks the same way).
    if torch._C._current_graph_task_id() == -1:
        statistics.update(args[0])
