"""The pictures of the diagnostics, in the style of `report.plots`.

Each function draws what its callers measured, leaves out what is None, and returns whether there was anything to draw;
where there was not, it writes no file. They need matplotlib when they are called. Sites that have the same names in all
models are drawn by name, others by their relative place, so that models of another family or depth fit beside each
other.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, quantiles
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from ..report.plots import MARKS, SMALL, WIDTH, above, clip, crowd, figure, handles, look

if TYPE_CHECKING:
    from .noise import NoiseRobustness
    from .plane import PlanePoint

NAMED = 12
"""Site names on one axis; of more sites every n-th is named."""
ESTIMATOR_NAMES = {"renyi": "Rényi", "ksg": "KSG"}

Sites = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class _Quantity:
    """What a panel of profiles shows.

    Args:
        title: with its unit.
        keys: where it is in what `SiteStatistics.result` returns.
        factor: by which a number is drawn; from the norm's width.
        scale: of the axis: "linear"; "share", from 0; "log", where it goes over a decade; "wide", symlog where it
            goes far.
        reference: the number where there is nothing to see, from the norm's width.
    """

    title: str
    keys: tuple[str, ...]
    factor: Callable[[int], float] = lambda width: 1.0
    scale: str = "linear"
    reference: Callable[[int], float] | None = None

    def of(self, site: Mapping[str, Any]) -> float:
        """The number of a site, or NaN."""
        found: Any = site
        for key in self.keys:
            found = None if found is None else found.get(key)
        if found is None or not math.isfinite(found) or (self.scale == "log" and found <= 0):
            return math.nan
        return float(found) * self.factor(site["width"])


def _percent(_: int) -> float:
    return 100.0


def _gaussian_hoyer(width: int) -> float:
    """Of a Gaussian row, whose |v|₁/|v|₂ is about √(2N/π)."""
    root = math.sqrt(width)
    return (1 - math.sqrt(2 / math.pi)) * root / (root - 1) if width > 1 else math.nan


COMMON = (
    _Quantity("variance, before", ("before", "variance"), scale="log"),
    _Quantity("excess kurtosis, before", ("before", "excess_kurtosis"), scale="wide", reference=lambda _: 0.0),
    _Quantity("largest / median size, before", ("before", "massive"), scale="log"),
    _Quantity("excess kurtosis, after", ("after", "excess_kurtosis"), scale="wide", reference=lambda _: 0.0),
    _Quantity("skewness, after", ("after", "skewness"), scale="wide", reference=lambda _: 0.0),
    _Quantity("elements near zero, after, %", ("after", "near_zero"), _percent, "share", lambda _: 6.36),
    _Quantity("Hoyer sparsity, after", ("after", "hoyer"), reference=_gaussian_hoyer),
    _Quantity("effective rank, after, % of width", ("after", "effective_rank"), lambda width: 100 / width),
)
OF_A_NORM = (
    _Quantity("variance left by compression, %", ("contraction",), _percent, "log"),
    _Quantity("mean slope of compression", ("slope",)),
    _Quantity("saturated elements, %", ("saturation",), _percent, "share"),
    _Quantity("λ̂, mean of the rows", ("lam_hat", "mean"), reference=lambda _: 1.0),
    _Quantity("rows with λ̂ outside [0, 2], %", ("lam_hat", "outside"), _percent, "share"),
    _Quantity("std after power transform", ("p_std", "mean"), reference=lambda _: 1.0),
)


def draw_profiles(models: Mapping[str, Sites], path: Path) -> bool:
    """What goes into the norms and what comes out of them, over depth: a panel for each quantity.

    Args:
        models: name → site → what `SiteStatistics.result` returns.
        path: PNG file.
    """
    return _draw_quantities(models, COMMON, "Gaussian", path)


def draw_norm_profiles(models: Mapping[str, Sites], path: Path) -> bool:
    """What belongs to one kind of norm, over depth; arguments as for `draw_profiles`."""
    return _draw_quantities(models, OF_A_NORM, "no transformation", path)


def _draw_quantities(models: Mapping[str, Sites], wanted: Sequence[_Quantity], reference: str, path: Path) -> bool:
    shown = {
        quantity: {name: [quantity.of(site) for site in sites.values()] for name, sites in models.items()}
        for quantity in wanted
    }
    shown = {quantity: curves for quantity, curves in shown.items() if any(map(_any_finite, curves.values()))}
    if not shown:
        return False
    # The look of a model goes by its place among all, so that it has one colour in all pictures.
    drawn = [name for name in models if any(_any_finite(curves[name]) for curves in shown.values())]
    depth = _Depth.of({name: list(models[name]) for name in drawn})
    widths = {site["width"] for name in drawn for site in models[name].values() if site.get("width")}
    columns = 3 if len(shown) in (1, 2, 3, 5, 6, 9) else 4
    with _panels(path, len(shown), columns, 2.1) as panels:
        _share(panels, "x")
        for i, (panel, (quantity, curves)) in enumerate(zip(panels, shown.items(), strict=True)):
            known = {quantity.reference(width) for width in widths} if quantity.reference else set()
            if len(known) == 1:  # or models of different width have different ones
                panel.axhline(*known, color="0.35", linewidth=1.0, linestyle=(0, (1, 1)), label=reference)
            for name in filter(lambda name: _any_finite(curves[name]), drawn):
                _draw_curve(panel, list(models).index(name), depth.places(name), curves[name], name)
            _scale(panel, quantity.scale, [value for curve in curves.values() for value in curve])
            clip(panel, curves)
            _title(panel, quantity.title, columns)
            depth.label(panel)
            panel.tick_params(labelbottom=i + columns >= len(panels))
        panels[0].figure.supxlabel(depth.title)
        above(panels[0].figure, _entries(panels, [*drawn, reference]))
    return True


def draw_qq(panels: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Q-Q plots against the normal distribution, rows and columns of panels with the same axes.

    Each channel is drawn in units of its own line (its `slope` and `intercept`, where it has them), so that the
    diagonal is the line that R² is of. What is more than twice as far out as the quantiles go is not shown.

    Args:
        panels: title of the row, as of a model → title of the column, as a site → what `normality.qq` returns, of one
            channel or a list of several, drawn as thin lines. Panels may be missing.
        path: PNG file.
    """
    found = {
        (row, column): channels
        for row, cells in panels.items()
        for column, cell in cells.items()
        if (channels := [each for each in ([cell] if isinstance(cell, Mapping) else cell or []) if each])
    }
    if not found:
        return False
    rows = [row for row in panels if any(row == key[0] for key in found)]
    columns = list(dict.fromkeys(column for cells in panels.values() for column in cells))
    columns = [column for column in columns if any(column == key[1] for key in found)]
    size = (WIDTH - 0.8) / max(2, len(columns))
    limit = max(abs(x) for channels in found.values() for each in channels for x in each["theoretical"])
    ends = [abs(y) for channels in found.values() for each in channels for y in _standardized(each)]
    height = min(2 * limit, max(limit, *ends))
    with _panels(path, len(rows) * len(columns), len(columns), min(2.4, max(1.2, 0.75 * size))) as flat:
        for i, panel in enumerate(flat):
            row, column = rows[i // len(columns)], columns[i % len(columns)]
            panel.plot([-limit, limit], [-limit, limit], color="0.35", linewidth=1.0, linestyle="--", zorder=3)
            channels, colour = found.get((row, column), []), look(0)[0]
            several = len(channels) > 1
            for each in channels:
                options: Any = {"linewidth": 0.8, "alpha": 0.5} if several else {"linewidth": 1.6}
                panel.plot(each["theoretical"], _standardized(each), color=colour, **options)
            if channels:
                mean = fmean(each["r_squared"] for each in channels)
                text = f"mean R² {mean:.3f}" if several and size > 1.2 else f"R² {mean:.3f}"
                panel.text(0.05, 0.96, text, transform=panel.transAxes, va="top", fontsize=SMALL)
            panel.set_xlim(-1.08 * limit, 1.08 * limit)
            panel.set_ylim(-1.08 * height, 1.08 * height)
            _outer_ticks(panel, i, len(flat), len(columns))
            if i < len(columns):
                _title(panel, short_site(column), len(columns))
            if i % len(columns) == len(columns) - 1:
                place: Any = {"transform": panel.transAxes, "rotation": 270, "va": "center"}
                panel.text(1.03, 0.5, row, **place)
        flat[0].figure.supxlabel("quantile of the normal distribution")
        flat[0].figure.supylabel("quantile of the channel, standardized")
    return True


def _standardized(channel: Mapping[str, Any]) -> list[float]:
    slope, intercept = channel.get("slope") or 1.0, channel.get("intercept") or 0.0
    return [(value - intercept) / slope for value in channel["ordered"]]


def draw_zeta(maps: Mapping[str, "NoiseRobustness"], path: Path) -> bool:
    """ζ of several models as heat maps in one scale, in percent; cells without a value stay white.

    The last site, after which nothing is measured, has no row, and the first no column.

    Args:
        maps: name → what `noise_robustness` returns.
        path: PNG file.
    """
    tables = {
        name: [[math.nan if each is None else 100 * each for each in row[1:]] for row in found.zeta[:-1]]
        for name, found in maps.items()
    }
    tables = {name: table for name, table in tables.items() if any(map(_any_finite, table))}
    if not tables:
        return False
    top = max(value for table in tables.values() for row in table for value in row if math.isfinite(value)) or 1.0
    strengths = {maps[name].delta for name in tables}
    columns = {1: 1, 2: 2, 4: 2}.get(len(tables), 3)
    size = (WIDTH - 1.6) / max(2, columns)
    alike = len({maps[name].sites for name in tables}) == 1
    with _panels(path, len(tables), columns, 0.9 * size + 0.1) as panels:
        for i, (panel, (name, table)) in enumerate(zip(panels, tables.items(), strict=True)):
            image = panel.imshow(table, cmap="viridis", vmin=0.0, vmax=top, aspect="auto")
            names = [short_site(site) for site in maps[name].sites]
            for axis, part in ((panel.xaxis, names[1:]), (panel.yaxis, names[:-1])):
                shown = _thinned(len(part), NAMED)
                axis.set_ticks(shown, [part[k] for k in shown])
            panel.tick_params(axis="x", labelrotation=90)
            panel.tick_params(length=0)
            if alike:
                _outer_ticks(panel, i, len(panels), columns)
            if len(table) < 10:
                for y, row in enumerate(table):
                    for x, value in enumerate(row):
                        if math.isfinite(value):
                            colour = "white" if value < 0.6 * top else "black"
                            panel.text(
                                x, y, _short_number(value), ha="center", va="center", fontsize=SMALL, color=colour
                            )
            _title(panel, name if len(strengths) == 1 else f"{name}, δ = {maps[name].delta:g}", max(2, columns))
            panel.grid(False)
            for spine in panel.spines.values():
                spine.set_visible(False)
        at = f" at δ = {next(iter(strengths)):g}" if len(strengths) == 1 else ""
        bar = panels[0].figure.colorbar(image, ax=panels, aspect=30, pad=0.02)
        bar.set_label(f"ζ{at}, % of the values before gain and bias")
        panels[0].figure.supxlabel("measured at")
        panels[0].figure.supylabel("noise at")
    return True


def draw_lam_hat(models: Mapping[str, Sites], path: Path) -> bool:
    """λ̂ of the rows over depth: the mean, nine in ten rows, and all of them, with the share outside [0, 2].

    Args:
        models: name → site → what `SiteStatistics.result` returns. Those without a LayerNormalNorm are left out, and
            so are the nine in ten where there is no histogram.
        path: PNG file.
    """
    found = {
        name: {site: cells["lam_hat"] for site, cells in sites.items() if cells.get("lam_hat")}
        for name, sites in models.items()
    }
    found = {name: sites for name, sites in found.items() if sites}
    if not found:
        return False
    depth = _Depth.of({name: list(sites) for name, sites in found.items()})
    middles = [_most_rows(each) or (each["mean"],) * 2 for sites in found.values() for each in sites.values()]
    low, high = crowd([(each["least"], each["most"]) for sites in found.values() for each in sites.values()])
    # The rows are many, and one of them can be anywhere.
    low = max(min(0.0, low), min(-0.5, *(3 * each[0] - 2 for each in middles)))
    high = min(max(2.0, high), max(2.5, *(3 * each[1] - 2 for each in middles)))
    with _panels(path, 1, 1, 3.4) as (panel,):
        panel.axhspan(0, 2, color="0.94", linewidth=0, zorder=0)
        panel.axhline(1, color="0.35", linewidth=1.0, linestyle=(0, (1, 1)), label="no transformation")
        beyond = False
        for k, (name, sites) in enumerate(found.items()):
            i = list(models).index(name)
            colour = look(i)[0]
            aside = (k - (len(found) - 1) / 2) * 0.08 * depth.step(name)  # or bars would cover each other
            places = [place + aside for place in depth.places(name)]
            for place, each in zip(places, sites.values(), strict=True):
                panel.plot(
                    [place, place], [max(low, each["least"]), min(high, each["most"])], color=colour, linewidth=1
                )
                if most := _most_rows(each):
                    panel.plot([place, place], most, color=colour, linewidth=5, alpha=0.5, solid_capstyle="butt")
                for end, is_off, mark in ((low, each["least"] < low, "v"), (high, each["most"] > high, "^")):
                    if is_off:
                        beyond = True
                        panel.plot([place], [end], mark, color=colour, markersize=5, clip_on=False)
                if each["outside"]:
                    text, at = _percent_text(100 * each["outside"]), (place, min(high, max(2.0, each["most"])))
                    panel.annotate(
                        text, at, (0, 4), textcoords="offset points", ha="center", fontsize=SMALL, color=colour
                    )
            _draw_curve(panel, i, places, [each["mean"] for each in sites.values()], name)
        panel.set_ylim(low - 0.05, high + 0.15)
        depth.label(panel)
        panel.set_ylabel("λ̂ of a row")
        bars = (
            "thick bars: nine in ten rows; thin bars: all rows"
            if any(map(_most_rows, next(iter(found.values())).values()))
            else "bars: all rows"
        )
        shares = (
            "; numbers: share of rows outside [0, 2], shaded"
            if any(each["outside"] for sites in found.values() for each in sites.values())
            else "; shaded: [0, 2]"
        )
        longer = ", some longer than shown (triangles)" if beyond else ""
        _title(panel, f"marks: mean; {bars}{longer}{shares}", 1)
        panel.figure.supxlabel(depth.title)
        above(panel.figure, _entries([panel], [*found, "no transformation"]))
    return True


def _most_rows(found: Mapping[str, Any]) -> tuple[float, float] | None:
    """From where to where nine in ten rows are, from a histogram; None where there is none, or not so far."""
    counts = found.get("counts") or ()
    rows = sum(counts) + found.get("below", 0) + found.get("above", 0)
    ends = []
    for share in (0.05, 0.95):
        seen = found.get("below", 0)
        for count, low, high in zip(counts, found.get("edges", ()), found.get("edges", ())[1:], strict=False):
            if count and seen <= share * rows <= seen + count:
                ends.append(low + (high - low) * (share * rows - seen) / count)
                break
            seen += count
    return (ends[0], ends[1]) if len(ends) == 2 else None


def draw_likelihood(found: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> bool:
    """How far λ̂ of one Newton step is from the most likely λ, a point for each row, a panel for each model.

    The norms of a model are in one panel, coloured by depth, dark first. Points that are far off are crosses at the
    edge.

    Args:
        found: model → site → what `lambda_against_likelihood` returns.
        path: PNG file.
    """
    shown = {name: [each for each in sites.values() if each.get("newton")] for name, sites in found.items()}
    shown = {name: sites for name, sites in shown.items() if sites}
    if not shown:
        return False
    pairs = {
        name: [[(x, y - x) for x, y in zip(each["likelihood"], each["newton"], strict=True)] for each in sites]
        for name, sites in shown.items()
    }
    everything = [pair for sites in pairs.values() for site in sites for pair in site]
    (left, right), (low, high) = (_most([pair[axis] for pair in everything]) for axis in (0, 1))
    columns = min(3, len(shown))
    with _panels(path, len(shown), columns, 3.2) as panels:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        colours = _depth_colours()
        for i, (panel, (name, sites)) in enumerate(zip(panels, pairs.items(), strict=True)):
            panel.axhline(0, color="0.35", linewidth=1.0, linestyle="--")
            off = 0
            for k, site in enumerate(sites):
                inside = [(x, y) for x, y in site if left <= x <= right and low <= y <= high]
                colour = colours(k / max(1, len(sites) - 1))
                if inside:
                    panel.plot(*zip(*inside, strict=True), "o", markersize=3, color=colour, alpha=0.6, linewidth=0)
                for x, y in set(site) - set(inside):
                    off += 1
                    edge = min(max(x, left), right), min(max(y, low), high)
                    panel.plot(*edge, "x", markersize=5, color=look(1)[0], clip_on=False)
            rows, known = sum(map(len, sites)), [each["correlation"] for each in shown[name] if each.get("correlation")]
            least = f"; correlation at least {math.floor(1e4 * min(known)) / 1e4:.4f} at every norm" if known else ""
            _title(panel, f"{name}: {rows:,} rows{least}{f'; {off} off the scale (×)' if off else ''}", columns)
            panel.set_xlim(left, right)
            panel.set_ylim(low, high)
            _outer_ticks(panel, i, len(panels), columns)
        bar = panels[0].figure.colorbar(ScalarMappable(Normalize(0, 1), colours), ax=panels, aspect=30, pad=0.02)
        bar.set_ticks([0, 1], labels=["first", "last"])
        bar.set_label("norm")
        panels[0].figure.supxlabel("λ of the largest likelihood")
        panels[0].figure.supylabel("λ̂ of one Newton step - that λ")
    return True


def _depth_colours() -> Any:
    """A colour map for depth without its brightest end, which is not seen on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](range(225)))


def draw_plane(models: Mapping[str, Sequence["PlanePoint"]], path: Path) -> bool:
    """The information plane: a panel for each model and estimator, a curve through the steps for each site.

    Sites are coloured by depth, dark first. A large point is the last step; its bars are 95 % intervals.

    Args:
        models: name → what `information_plane` or `run_information_plane` returns.
        path: PNG file.
    """
    points = {name: [each for each in every if each.ib.value is not None] for name, every in models.items()}
    points = {name: each for name, each in points.items() if each}
    if not points:
        return False
    depth = _Depth.of({name: list(dict.fromkeys(each.site for each in models[name])) for name in points})
    columns = min(3, len(points)) if len(points) > 1 else len(_estimators(points))
    cells: list[tuple[str, str] | None] = []
    for estimator in _estimators(points):
        cells += [
            (estimator, name) for name, every in points.items() if any(each.estimator == estimator for each in every)
        ]
        if len(points) > 1:  # each estimator starts a row
            cells += [None] * (-len(cells) % columns)
    with _panels(path, len(cells), columns, 2.2) as panels:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        colours = _depth_colours()
        first: dict[str, Any] = {}
        for i, (panel, cell) in enumerate(zip(list(panels), cells, strict=True)):
            if cell is None:
                panels.remove(panel)
                panel.remove()
                continue
            estimator, name = cell
            _share([first.setdefault(estimator, panel), panel], "xy")
            below = cells[i + columns] if i + columns < len(cells) else None
            left = cells[i - 1] if i % columns else None
            panel.tick_params(
                labelleft=left is None or left[0] != estimator,
                labelbottom=below is None or below[0] != estimator,
            )
            here = [each for each in points[name] if each.estimator == estimator]
            for site, place in zip(depth.sites[name], depth.relative(name), strict=True):
                _draw_path(panel, [each for each in here if each.site == site], colours(place))
            _title(panel, f"{ESTIMATOR_NAMES.get(estimator, estimator)}, {name}", columns)
        bar = panels[0].figure.colorbar(ScalarMappable(Normalize(0, 1), colours), ax=panels, aspect=40)
        if depth.names:
            shown = _thinned(len(depth.names), 2 * NAMED)
            bar.set_ticks([i / max(1, len(depth.names) - 1) for i in shown], labels=[depth.names[i] for i in shown])
        else:
            bar.set_ticks([0, 1], labels=["first", "last"])
        bar.set_label("norm")
        told = "I(X;T), nats; large points: last step, bars: 95 % intervals"
        panels[0].figure.supxlabel(told)
        panels[0].figure.supylabel("I(T;Y), nats")
    return True


def draw_ib(models: Mapping[str, Sequence["PlanePoint"]], path: Path) -> bool:
    """The IB value over depth at each model's last step, with its 95 % interval: a panel for each estimator.

    Args: as for `draw_plane`.
    """
    last = {name: _last_step(points) for name, points in models.items()}
    known = {name: [each for each in points if each.ib.value is not None] for name, points in last.items()}
    known = {name: points for name, points in known.items() if points}
    if not known:
        return False
    depth = _Depth.of({name: list(dict.fromkeys(each.site for each in last[name])) for name in known})
    estimators = _estimators(known)
    betas = ", ".join(sorted({f"{each.beta:g}" for points in known.values() for each in points}))
    columns = min(2, len(estimators))
    with _panels(path, len(estimators), columns, 3.0) as panels:
        for panel, estimator in zip(panels, estimators, strict=True):
            for name, points in known.items():
                values = {each.site: each.ib for each in points if each.estimator == estimator}
                i = list(models).index(name)
                aside = (i - (len(models) - 1) / 2) * 0.08 * depth.step(name)  # or intervals would cover each other
                places = [place + aside for place in depth.places(name)]
                estimates = [values.get(site) for site in depth.sites[name]]
                curve = [math.nan if each is None or each.value is None else each.value for each in estimates]
                if _any_finite(curve):
                    _draw_curve(panel, i, places, curve, name)
                for place, each in zip(places, estimates, strict=True):
                    if each is not None and each.interval is not None:
                        panel.plot([place, place], each.interval, color=look(i)[0], linewidth=1.0)
            panel.set_title(f"{ESTIMATOR_NAMES.get(estimator, estimator)}, β = {betas}")
            depth.label(panel)
        panels[0].set_ylabel("I(T;Y) - β·I(X;T), nats")
        panels[0].figure.supxlabel(depth.title)
        above(panels[0].figure, _entries(panels, list(known)))
    return True


def short_site(site: str) -> str:
    """A site's name for an axis: "model.layers.3.post_attention_layernorm" is "3.post"; other text stays as it is."""
    if found := re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)\.(?:\w+\.)*(\w+)", site):
        return f"{found[1]}.{found[2].removesuffix('_layernorm').removesuffix('_attention')}"
    return site.rpartition(".")[2] if re.fullmatch(r"(.*\.)?(norm|ln_f)", site) else site


@dataclass(frozen=True)
class _Depth:
    """The axis of depth that several models share.

    Args:
        sites: name of a model → its sites.
        names: what the sites are called on the axis; empty where models have different ones.
    """

    sites: Mapping[str, Sequence[str]]
    names: list[str]

    @classmethod
    def of(cls, sites: Mapping[str, Sequence[str]]) -> "_Depth":
        names = [[short_site(site) for site in each] for each in sites.values()]
        return cls(sites, names[0] if all(each == names[0] for each in names) else [])

    def places(self, name: str) -> list[float]:
        """Where the sites of a model are on the axis."""
        return [float(i) for i in range(len(self.names))] if self.names else self.relative(name)

    def relative(self, name: str) -> list[float]:
        """The same from 0, the first site, to 1, the last."""
        count = len(self.sites[name])
        return [i / max(1, count - 1) for i in range(count)]

    def step(self, name: str) -> float:
        """From one site of a model to the next."""
        return 1.0 if self.names else 1 / max(1, len(self.sites[name]) - 1)

    @property
    def title(self) -> str:
        return (
            "norm, from the embedding to the output" if self.names else "norm, from the first to the last of each model"
        )

    def label(self, panel: Any) -> None:
        """Ticks."""
        if self.names:
            shown = _thinned(len(self.names), NAMED)
            panel.set_xticks(shown, [self.names[i] for i in shown], rotation=90)
        else:
            panel.set_xticks([0, 0.5, 1], ["first", "middle", "last"])


@contextmanager
def _panels(path: Path, count: int, columns: int, height: float) -> Iterator[list[Any]]:
    """`count` panels, at most `columns` beside each other, `height` inches each."""
    columns = min(columns, count)
    rows = -(-count // columns)
    with figure(path, rows, columns, height) as axes:
        panels = list(getattr(axes, "flat", [axes]))
        panels[0].figure.set_size_inches(WIDTH, 0.7 + height * rows)
        for panel in panels[count:]:
            panel.remove()
        yield panels[:count]


def _share(panels: Sequence[Any], axes: str) -> None:
    """The same limits of "x", "y" or "xy"; before anything is drawn, or what is outside the first's is cut off."""
    for panel in panels:
        if panel is not panels[0]:
            for axis in axes:
                getattr(panel, f"share{axis}")(panels[0])


def _title(panel: Any, text: str, columns: int) -> None:
    """Over a panel that has an n-th of the width, in lines that do not run into the next."""
    panel.set_title("\n".join(wrap(text, int(10.5 * WIDTH / columns) - 4)))


def _outer_ticks(panel: Any, i: int, count: int, columns: int) -> None:
    """Tick labels of the i-th of `count` panels only where it is leftmost or lowest."""
    panel.tick_params(labelleft=i % columns == 0, labelbottom=i + columns >= count)


def _entries(panels: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
    """What of `labels` is in any panel, in their order, and how it looks."""
    found = handles(panels)
    return {label: found[label] for label in labels if label in found}


def _draw_curve(panel: Any, i: int, places: Sequence[float], values: Sequence[float], name: str) -> None:
    colour, style = look(i)
    size = 3.5 if len(places) <= 30 else 1.8
    marks: Any = {"marker": MARKS[i % len(MARKS)], "markersize": size}
    panel.plot(places, values, color=colour, linestyle=style, linewidth=1.2, label=name, **marks)


def _draw_path(panel: Any, points: Sequence["PlanePoint"], colour: Any) -> None:
    """A site's way through the plane, and where it ends."""
    if not points:
        return
    x, y = ([getattr(each, field).value for each in points] for field in ("input", "output"))
    panel.plot(x, y, "o-", color=colour, linewidth=1.0, markersize=2)
    panel.plot(x[-1:], y[-1:], "o", color=colour, markersize=5, markeredgecolor="black", markeredgewidth=0.5, zorder=4)
    for estimate, across in ((points[-1].input, True), (points[-1].output, False)):
        if estimate.interval is not None:
            ends = (estimate.interval, y[-1:] * 2) if across else (x[-1:] * 2, estimate.interval)
            panel.plot(*ends, color=colour, linewidth=0.8, alpha=0.6, zorder=1)


def _scale(panel: Any, scale: str, values: Sequence[float]) -> None:
    known = [value for value in values if math.isfinite(value)]
    if scale == "log" and max(known) > 10 * min(known):
        panel.set_yscale("log")
    elif scale == "wide" and max(map(abs, known)) > 20:
        panel.set_yscale("symlog", linthresh=1.0, linscale=0.5)
    elif scale == "share":  # room for a curve at 0, and no zooming in on rounding errors
        top = max(1.0, 1.02 * panel.get_ylim()[1])
        panel.set_ylim(-0.04 * top, top)


def _most(values: Sequence[float]) -> tuple[float, float]:
    """From where to where nearly all values are: half as far again as 98 % of them go, if any go further."""
    cuts = quantiles(values, n=100)
    room = 0.5 * (cuts[-1] - cuts[0])
    low, high = max(min(values), cuts[0] - room), min(max(values), cuts[-1] + room)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _estimators(models: Mapping[str, Sequence["PlanePoint"]]) -> list[str]:
    return sorted({each.estimator for points in models.values() for each in points}, reverse=True)


def _last_step(points: Sequence["PlanePoint"]) -> list["PlanePoint"]:
    last = max((-1 if each.step is None else each.step for each in points), default=-1)
    return [each for each in points if (-1 if each.step is None else each.step) == last]


def _any_finite(values: Sequence[float]) -> bool:
    return any(map(math.isfinite, values))


def _thinned(count: int, most: int) -> list[int]:
    """Indices of every n-th of `count`, n even as a block has two norms, and of the last; about `most` in all."""
    if count <= most:
        return list(range(count))
    step = 2 * -(-count // (2 * most))
    return [i for i in range(0, count - 1, step) if count - 1 - i > step / 2] + [count - 1]


def _percent_text(value: float) -> str:
    return f"{value:.1f} %" if value >= 0.05 else "< 0.1 %" if value > 0 else "0 %"


def _short_number(value: float) -> str:
    """Two digits."""
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}"
