"""The pictures of the diagnostics, in the style of `report.plots`.

Each function draws what its callers measured, leaves out what is None, and returns whether there was anything to draw;
where there was not, it writes no file. Matplotlib is imported when they are called. Where all models have sites of the
same names, the axis of depth has these names; otherwise it goes from each model's first norm to its last, so that
models of another family or depth fit beside each other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, quantiles
from typing import TYPE_CHECKING, Any

from ...norms import all_measures
from ...report.plots import SMALL, WIDTH, above, clip, crowd, draw_heat, look, panels
from . import axes

if TYPE_CHECKING:
    from ..noise import NoiseRobustness

NO_TRANSFORMATION = "no transformation"
MARGIN = 0.7
"""Inches above and below all rows of panels."""
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
    factor: Callable[[int], float] = lambda _: 1.0
    scale: str = "linear"
    reference: Callable[[int], float] | None = None

    def of(self, site: Mapping[str, Any]) -> float:
        """The number of a site, or NaN."""
        value: Any = site
        for key in self.keys:
            value = None if value is None else value.get(key)
        if value is None or not math.isfinite(value) or (self.scale == "log" and value <= 0):
            return math.nan
        return float(value) * self.factor(site["width"])

    def set_scale(self, panel: Any, values: Sequence[float]) -> None:
        """Scale the vertical axis for these numbers, of which one is finite."""
        known = [value for value in values if math.isfinite(value)]
        if self.scale == "log" and max(known) > 10 * min(known):
            panel.set_yscale("log")
        elif self.scale == "wide" and max(map(abs, known)) > 20:
            panel.set_yscale("symlog", linthresh=1.0, linscale=0.5)
        elif self.scale == "share":  # room for a curve at 0, and no zooming in on rounding errors
            top = max(1.0, 1.02 * panel.get_ylim()[1])
            panel.set_ylim(-0.04 * top, top)


def _percent(_: int) -> float:
    return 100.0


def _one(_: int) -> float:
    return 1.0


def _always(value: float, _: int) -> float:
    return value


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


def draw_profiles(
    models: Mapping[str, Sites], path: Path, wanted: Sequence[_Quantity] = COMMON, reference: str = "Gaussian"
) -> bool:
    """Quantities over depth, a panel for each: by default what goes into the norms and what comes out of them.

    Args:
        models: name → site → what `SiteStatistics.result` returns.
        path: PNG file.
        wanted: quantities.
        reference: what the number is called where there is nothing to see.
    """
    profiles = {
        quantity: {name: [quantity.of(site) for site in sites.values()] for name, sites in models.items()}
        for quantity in wanted
    }
    profiles = {quantity: curves for quantity, curves in profiles.items() if any(map(axes.any_finite, curves.values()))}
    if not profiles:
        return False
    # A model keeps its colour in all pictures: that of its place among all models, drawn here or not.
    drawn = [name for name in models if any(axes.any_finite(curves[name]) for curves in profiles.values())]
    depth = axes.Depth.of({name: list(models[name]) for name in drawn})
    widths = {site["width"] for name in drawn for site in models[name].values() if site.get("width")}
    columns = 3 if len(profiles) in (1, 2, 3, 5, 6, 9) else 4
    with panels(path, len(profiles), columns, 2.1, MARGIN) as flat:
        axes.share(flat, "x")
        for i, (panel, (quantity, curves)) in enumerate(zip(flat, profiles.items(), strict=True)):
            known = {quantity.reference(width) for width in widths} if quantity.reference else set()
            if len(known) == 1:  # models of different widths may have different references: then none is drawn
                panel.axhline(*known, linestyle=(0, (1, 1)), label=reference, **axes.REFERENCE)
            for name in filter(lambda name: axes.any_finite(curves[name]), drawn):
                axes.draw_marked_curve(panel, list(models).index(name), depth.places(name), curves[name], name)
            quantity.set_scale(panel, [value for curve in curves.values() for value in curve])
            clip(panel, curves)
            axes.set_title(panel, quantity.title, columns)
            panel.tick_params(labelbottom=i + columns >= len(flat))
        depth.label(flat)
        above(flat, [*drawn, reference])
    return True


def draw_norm_profiles(models: Mapping[str, Sites], path: Path) -> bool:
    """What belongs to one kind of norm, over depth; arguments as for `draw_profiles`."""
    wanted = []
    for each in all_measures().values():
        title, factor = (f"{each.title}, %", _percent) if each.percent else (each.title, _one)
        scale = "log" if each.log else "share" if each.percent else "linear"
        reference = None if each.neutral is None else partial(_always, each.neutral)
        wanted.append(_Quantity(title, each.keys, factor, scale, reference))
    return draw_profiles(models, path, wanted, NO_TRANSFORMATION)


def draw_qq(grid: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Q-Q plots against the normal distribution, rows and columns of panels with the same axes.

    Each channel is drawn in units of its own line (its `slope` and `intercept`, where it has them), so that the
    diagonal is the line that R² is of. What is more than twice as far out as the quantiles go is not shown.

    Args:
        grid: title of the row, as of a model → title of the column, as a site → what `normality.qq` returns, of one
            channel or a list of several, drawn as thin lines. Panels may be missing.
        path: PNG file.
    """
    cells = {
        (row, column): channels
        for row, of_columns in grid.items()
        for column, cell in of_columns.items()
        if (channels := [each for each in ([cell] if isinstance(cell, Mapping) else cell or []) if each])
    }
    if not cells:
        return False
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = [
        column
        for column in dict.fromkeys(column for of_columns in grid.values() for column in of_columns)
        if any(column == key[1] for key in cells)
    ]
    size = (WIDTH - 0.8) / max(2, len(columns))
    limit = max(abs(x) for channels in cells.values() for each in channels for x in each["theoretical"])
    ends = [abs(y) for channels in cells.values() for each in channels for y in _standardized(each)]
    height = min(2 * limit, max(limit, *ends))
    with panels(path, len(rows) * len(columns), len(columns), min(2.4, max(1.2, 0.75 * size)), MARGIN) as flat:
        for i, panel in enumerate(flat):
            row, column = rows[i // len(columns)], columns[i % len(columns)]
            panel.plot([-limit, limit], [-limit, limit], linestyle="--", zorder=3, **axes.REFERENCE)
            _draw_channels(panel, cells.get((row, column), []), brief=size <= 1.2)
            panel.set(xlim=(-1.08 * limit, 1.08 * limit), ylim=(-1.08 * height, 1.08 * height))
            axes.outer_ticks(panel, i, len(flat), len(columns))
            if i < len(columns):
                axes.set_title(panel, axes.short_site(column), len(columns))
            if i % len(columns) == len(columns) - 1:
                panel.text(1.03, 0.5, row, transform=panel.transAxes, rotation=270, va="center")
        flat[0].figure.supxlabel("quantile of the normal distribution")
        flat[0].figure.supylabel("quantile of the channel, standardized")
    return True


def _standardized(channel: Mapping[str, Any]) -> list[float]:
    slope, intercept = channel.get("slope") or 1.0, channel.get("intercept") or 0.0
    return [(value - intercept) / slope for value in channel["ordered"]]


def _draw_channels(panel: Any, channels: Sequence[Mapping[str, Any]], brief: bool) -> None:
    several = len(channels) > 1
    options: Any = {"linewidth": 0.8, "alpha": 0.5} if several else {"linewidth": 1.6}
    for each in channels:
        panel.plot(each["theoretical"], _standardized(each), color=look(0)[0], **options)
    if channels:
        mean = fmean(each["r_squared"] for each in channels)
        text = f"mean R² {mean:.3f}" if several and not brief else f"R² {mean:.3f}"
        panel.text(0.05, 0.96, text, transform=panel.transAxes, va="top", fontsize=SMALL)


def draw_zeta(maps: Mapping[str, "NoiseRobustness"], path: Path) -> bool:
    """ζ of several models as heat maps in one scale, in percent; cells without a value stay white.

    The last site, after which nothing is measured, has no row, and the first no column.

    Args:
        maps: name → what `noise_robustness` returns.
        path: PNG file.
    """
    tables = {
        name: [[math.nan if each is None else 100 * each for each in row[1:]] for row in robustness.zeta[:-1]]
        for name, robustness in maps.items()
    }
    tables = {name: table for name, table in tables.items() if any(map(axes.any_finite, table))}
    if not tables:
        return False
    top = max(value for table in tables.values() for row in table for value in row if math.isfinite(value)) or 1.0
    strengths = {maps[name].delta for name in tables}
    columns = {1: 1, 2: 2, 4: 2}.get(len(tables), 3)
    size = (WIDTH - 1.6) / max(2, columns)
    alike = len({maps[name].sites for name in tables}) == 1
    with panels(path, len(tables), columns, 0.9 * size + 0.1, MARGIN) as flat:
        for i, (panel, (name, table)) in enumerate(zip(flat, tables.items(), strict=True)):
            image = _draw_heat(panel, table, top, [axes.short_site(site) for site in maps[name].sites])
            if alike:
                axes.outer_ticks(panel, i, len(flat), columns)
            axes.set_title(panel, name if len(strengths) == 1 else f"{name}, δ = {maps[name].delta:g}", max(2, columns))
        at = f" at δ = {next(iter(strengths)):g}" if len(strengths) == 1 else ""
        bar = flat[0].figure.colorbar(image, ax=flat, aspect=30, pad=0.02)
        bar.set_label(f"ζ{at}, % of the values before gain and bias")
        flat[0].figure.supxlabel("measured at")
        flat[0].figure.supylabel("noise at")
    return True


def _draw_heat(panel: Any, table: Sequence[Sequence[float]], top: float, names: Sequence[str]) -> Any:
    """A table as a heat map from 0 to `top`, with its numbers where there is room for them; returns the image."""
    texts = [["" if math.isnan(each) else f"{each:.{each < 9.5:d}f}" for each in row] for row in table]
    image = draw_heat(panel, table, texts if len(table) < 10 else [], (0.0, top), cmap="viridis")
    for axis, part in ((panel.xaxis, names[1:]), (panel.yaxis, names[:-1])):
        named = axes.thinned(len(part), axes.NAMED)
        axis.set_ticks(named, [part[i] for i in named])
    panel.tick_params(axis="x", labelrotation=90)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    return image


def draw_lam_hat(models: Mapping[str, Sites], path: Path) -> bool:
    """λ̂ of the rows over depth: the mean, nine in ten rows, and all of them, with the share outside [0, 2].

    Args:
        models: name → site → what `SiteStatistics.result` returns. Those without a LayerNormalNorm are left out, and
            so are the nine in ten where there is no histogram.
        path: PNG file.
    """
    lam_hats = {
        name: {site: cells["lam_hat"] for site, cells in sites.items() if cells.get("lam_hat")}
        for name, sites in models.items()
    }
    lam_hats = {name: sites for name, sites in lam_hats.items() if sites}
    if not lam_hats:
        return False
    depth = axes.Depth.of({name: list(sites) for name, sites in lam_hats.items()})
    everything = [each for sites in lam_hats.values() for each in sites.values()]
    middles = [_most_rows(each) or (each["mean"],) * 2 for each in everything]
    low, high = crowd([(each["least"], each["most"]) for each in everything])
    # The rows are many, and one of them can be anywhere.
    low = max(min(0.0, low), min(-0.5, *(3 * each[0] - 2 for each in middles)))
    high = min(max(2.0, high), max(2.5, *(3 * each[1] - 2 for each in middles)))
    with panels(path, 1, 1, 3.4, MARGIN) as (panel,):
        panel.axhspan(0, 2, color="0.94", linewidth=0, zorder=0)
        panel.axhline(1, linestyle=(0, (1, 1)), label=NO_TRANSFORMATION, **axes.REFERENCE)
        for name, sites in lam_hats.items():
            i, places = list(models).index(name), depth.places(name, list(lam_hats))
            for place, each in zip(places, sites.values(), strict=True):
                _draw_rows(panel, place, each, (low, high), look(i)[0])
            axes.draw_marked_curve(panel, i, places, [each["mean"] for each in sites.values()], name)
        panel.set_ylim(low - 0.05, high + 0.15)
        depth.label([panel])
        panel.set_ylabel("λ̂ of a row")
        several = any(map(_most_rows, next(iter(lam_hats.values())).values()))
        bars = "thick bars: nine in ten rows; thin bars: all rows" if several else "bars: all rows"
        longer = any(each["least"] < low or each["most"] > high for each in everything)
        numbers = any(each["outside"] for each in everything)
        shaded = "numbers: share of rows outside [0, 2], shaded" if numbers else "shaded: [0, 2]"
        note = ", some longer than shown (triangles)" if longer else ""
        axes.set_title(panel, f"marks: mean; {bars}{note}; {shaded}", 1)
        above([panel], [*lam_hats, NO_TRANSFORMATION])
    return True


def _draw_rows(panel: Any, place: float, site: Mapping[str, Any], ends: tuple[float, float], colour: str) -> None:
    """Bars for λ̂ of a site's rows, with a triangle where they go on beyond the ends of the axis."""
    low, high = ends
    panel.plot([place] * 2, [max(low, site["least"]), min(high, site["most"])], color=colour, linewidth=1)
    if most := _most_rows(site):
        panel.plot([place] * 2, most, color=colour, linewidth=5, alpha=0.5, solid_capstyle="butt")
    for end, is_off, mark in ((low, site["least"] < low, "v"), (high, site["most"] > high, "^")):
        if is_off:
            panel.plot([place], [end], mark, color=colour, markersize=5, clip_on=False)
    if site["outside"]:
        share_text = f"{100 * site['outside']:.1f} %" if site["outside"] >= 0.0005 else "< 0.1 %"
        at: Any = {"xy": (place, min(high, max(2.0, site["most"]))), "xytext": (0, 4), "textcoords": "offset points"}
        panel.annotate(share_text, ha="center", fontsize=SMALL, color=colour, **at)


def _most_rows(site: Mapping[str, Any]) -> tuple[float, float] | None:
    """From where to where nine in ten rows are, from a histogram; None where there is none, or not so far."""
    counts, edges = site.get("counts") or (), site.get("edges", ())
    rows = sum(counts) + site.get("below", 0) + site.get("above", 0)
    ends = []
    for share_below in (0.05, 0.95):
        seen = site.get("below", 0)
        for count, low, high in zip(counts, edges, edges[1:], strict=False):
            if count and seen <= share_below * rows <= seen + count:
                ends.append(low + (high - low) * (share_below * rows - seen) / count)
                break
            seen += count
    return (ends[0], ends[1]) if len(ends) == 2 else None


def draw_likelihood(models: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> bool:
    """How far λ̂ of one Newton step is from the most likely λ, a point for each row, a panel for each model.

    The norms of a model are in one panel, coloured by depth, dark first. Points that are far off are crosses at the
    edge.

    Args:
        models: name → site → what `lambda_against_likelihood` returns.
        path: PNG file.
    """
    known = {name: [each for each in sites.values() if each.get("newton")] for name, sites in models.items()}
    known = {name: sites for name, sites in known.items() if sites}
    if not known:
        return False
    points = {
        name: [[(x, y - x) for x, y in zip(each["likelihood"], each["newton"], strict=True)] for each in sites]
        for name, sites in known.items()
    }
    everything = [point for sites in points.values() for site in sites for point in site]
    (left, right), (low, high) = (_nearly_all([point[axis] for point in everything]) for axis in (0, 1))
    columns = min(3, len(points))
    with panels(path, len(points), columns, 3.2, MARGIN) as flat:
        colours = axes.depth_colours()
        for i, (panel, (name, sites)) in enumerate(zip(flat, points.items(), strict=True)):
            panel.axhline(0, linestyle="--", **axes.REFERENCE)
            off = 0
            for site, place in zip(sites, axes.relative(len(sites)), strict=True):
                inside = [(x, y) for x, y in site if left <= x <= right and low <= y <= high]
                if inside:
                    dots: Any = {"color": colours(place), "markersize": 3, "alpha": 0.6, "linewidth": 0}
                    panel.plot(*zip(*inside, strict=True), "o", **dots)
                for x, y in set(site) - set(inside):
                    off += 1
                    edge = min(max(x, left), right), min(max(y, low), high)
                    panel.plot(*edge, "x", markersize=5, color=look(1)[0], clip_on=False)
            correlations = [each["correlation"] for each in known[name] if each.get("correlation")]
            least = math.floor(1e4 * min(correlations)) / 1e4 if correlations else None
            agreement = "" if least is None else f"; correlation at least {least:.4f} at every norm"
            beyond = f"; {off} off the scale (×)" if off else ""
            axes.set_title(panel, f"{name}: {sum(map(len, sites)):,} rows{agreement}{beyond}", columns)
            panel.set(xlim=(left, right), ylim=(low, high))
            axes.outer_ticks(panel, i, len(flat), columns)
        axes.depth_bar(flat)
        flat[0].figure.supxlabel("λ of the largest likelihood")
        flat[0].figure.supylabel("λ̂ of one Newton step - that λ")
    return True


def _nearly_all(values: Sequence[float]) -> tuple[float, float]:
    """From where to where nearly all values are: half as far again as 98 % of them go, if any go further."""
    cuts = quantiles(values, n=100)
    room = 0.5 * (cuts[-1] - cuts[0])
    low, high = max(min(values), cuts[0] - room), min(max(values), cuts[-1] + room)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin
