"""The pictures of the diagnostics, in the style of `report.plots`.

Each function draws results of the diagnostics by the name of their model, leaves out numbers that are None, and returns
whether there was anything to draw: only then it writes `path`, a PNG file. Matplotlib is imported when they are called.

Where all models have sites of the same names, the axis of depth has these names; otherwise it goes from each model's
first norm to its last, so that models of another family or depth fit beside each other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from ...norms import all_measures
from ...report.plots import SMALL, WIDTH, above, clip, crowd, draw_heat, look, panels
from ..noise import NoiseRobustness
from . import axes
from .tables import cell_at

NO_TRANSFORMATION = "no transformation"
MARGIN = 0.7
"""Inches above and below all rows of panels."""
Cells = Mapping[str, Any]
Sites = Mapping[str, Cells]


@dataclass(frozen=True)
class Quantity:
    """A quantity over depth, as a panel shows it.

    Args:
        name: the title without the unit.
        keys: path to the number in a result of `SiteStatistics`.
        unit: "", "%" or "% of width".
        scale: "linear", in % from 0; "log", where the numbers cover a decade; "wide", symlog where they go far.
        reference: the number of a Gaussian, or of a norm that transforms nothing; it may depend on the norm's width.
    """

    name: str
    keys: tuple[str, ...]
    unit: str = ""
    scale: str = "linear"
    reference: float | Callable[[int], float] | None = None

    @property
    def title(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def of(self, site: Cells) -> float:
        """The number of a site, or NaN."""
        value = cell_at(site, *self.keys)
        if value is None or not math.isfinite(value) or (self.scale == "log" and value <= 0):
            return math.nan
        return float(value) * ({"": 1.0, "%": 100.0}.get(self.unit) or 100 / site["width"])

    def set_scale(self, panel: Any, values: Sequence[float]) -> None:
        """Scale the vertical axis for these numbers, at least one of which is finite."""
        known = [value for value in values if math.isfinite(value)]
        if self.scale == "log" and max(known) > 10 * min(known):
            panel.set_yscale("log")
        elif self.scale == "wide" and max(map(abs, known)) > 20:
            panel.set_yscale("symlog", linthresh=1.0, linscale=0.5)
        elif self.scale == "linear" and self.unit == "%":  # room for a curve at 0, and no zooming in on rounding errors
            top = max(1.0, 1.02 * panel.get_ylim()[1])
            panel.set_ylim(-0.04 * top, top)


def _gaussian_hoyer(width: int) -> float:
    """Hoyer sparsity of a Gaussian row, whose |v|₁/|v|₂ is about √(2N/π)."""
    root = math.sqrt(width)
    return (1 - math.sqrt(2 / math.pi)) * root / (root - 1) if width > 1 else math.nan


COMMON = (
    Quantity("variance, before", ("before", "variance"), scale="log"),
    Quantity("excess kurtosis, before", ("before", "excess_kurtosis"), scale="wide", reference=0.0),
    Quantity("largest / median size, before", ("before", "massive"), scale="log"),
    Quantity("excess kurtosis, after", ("after", "excess_kurtosis"), scale="wide", reference=0.0),
    Quantity("skewness, after", ("after", "skewness"), scale="wide", reference=0.0),
    Quantity("elements near zero, after", ("after", "near_zero"), "%", reference=6.36),
    Quantity("Hoyer sparsity, after", ("after", "hoyer"), reference=_gaussian_hoyer),
    Quantity("effective rank, after", ("after", "effective_rank"), "% of width"),
)


def draw_profiles(
    models: Mapping[str, Sites], path: Path, wanted: Sequence[Quantity] = COMMON, reference: str = "Gaussian"
) -> bool:
    """Results of `SiteStatistics`: the quantities `wanted` over depth, a panel for each.

    Their references are called `reference` in the legend.
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
    depth = axes.Depth({name: list(models[name]) for name in drawn})
    widths = {site["width"] for name in drawn for site in models[name].values() if site.get("width")}
    columns = 3 if len(profiles) in (1, 2, 3, 5, 6, 9) else 4
    with panels(path, len(profiles), columns, 2.1, MARGIN) as flat:
        axes.share(flat, "x")
        for i, (panel, (quantity, curves)) in enumerate(zip(flat, profiles.items(), strict=True)):
            number = quantity.reference
            known = {number(width) if callable(number) else number for width in widths} - {None}
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
    """Results of `SiteStatistics`: the diagnostics that norms bring, over depth."""
    wanted = [
        Quantity(each.title, each.keys, "%" if each.percent else "", "log" if each.log else "linear", each.neutral)
        for each in all_measures().values()
    ]
    return draw_profiles(models, path, wanted, NO_TRANSFORMATION)


def draw_qq(grid: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Q-Q plots against the normal distribution, rows and columns of panels with the same axes.

    Each channel is drawn in units of its own line (its `slope` and `intercept`, where it has them), so that its R²
    tells how near it is to the diagonal. Points more than twice as far out as the quantiles go are not shown.

    Args:
        grid: title of the row, as of a model → title of the column, as a site → result of `normality.qq` of one
            channel, or a list of several, drawn as thin lines. Panels may be missing.
    """
    channels_at = {
        (row, column): channels
        for row, of_columns in grid.items()
        for column, given in of_columns.items()
        if (channels := [each for each in ([given] if isinstance(given, Mapping) else given or []) if each])
    }
    if not channels_at:
        return False
    rows = list(dict.fromkeys(row for row, _ in channels_at))
    titles = dict.fromkeys(column for of_columns in grid.values() for column in of_columns)
    columns = [column for column in titles if any((row, column) in channels_at for row in rows)]
    size = (WIDTH - 0.8) / max(2, len(columns))
    everything = [each for channels in channels_at.values() for each in channels]
    limit = max(abs(x) for each in everything for x in each["theoretical"])
    height = min(2 * limit, max(limit, *(abs(y) for each in everything for y in _standardized(each))))
    with panels(path, len(rows) * len(columns), len(columns), min(2.4, max(1.2, 0.75 * size)), MARGIN) as flat:
        for i, panel in enumerate(flat):
            row, column = rows[i // len(columns)], columns[i % len(columns)]
            panel.plot([-limit, limit], [-limit, limit], linestyle="--", zorder=3, **axes.REFERENCE)
            channels = channels_at.get((row, column), [])
            several = len(channels) > 1
            options: Any = {"linewidth": 0.8, "alpha": 0.5} if several else {"linewidth": 1.6}
            for each in channels:
                panel.plot(each["theoretical"], _standardized(each), color=look(0)[0], **options)
            if channels:
                mean, named = fmean(each["r_squared"] for each in channels), several and size > 1.2
                text = f"mean R² {mean:.3f}" if named else f"R² {mean:.3f}"
                panel.text(0.05, 0.96, text, transform=panel.transAxes, va="top", fontsize=SMALL)
            panel.set(xlim=(-1.08 * limit, 1.08 * limit), ylim=(-1.08 * height, 1.08 * height))
            axes.outer_ticks(panel, i, len(flat), len(columns))
            if i < len(columns):
                axes.set_title(panel, axes.short_site(column), len(columns))
            if column == columns[-1]:
                panel.text(1.03, 0.5, row, transform=panel.transAxes, rotation=270, va="center")
        flat[0].figure.supxlabel("quantile of the normal distribution")
        flat[0].figure.supylabel("quantile of the channel, standardized")
    return True


def _standardized(channel: Cells) -> list[float]:
    slope, intercept = channel.get("slope") or 1.0, channel.get("intercept") or 0.0
    return [(value - intercept) / slope for value in channel["ordered"]]


def draw_zeta(maps: Mapping[str, NoiseRobustness], path: Path) -> bool:
    """ζ of several models as heat maps in one scale, in percent; cells without a value stay white.

    The last site, after which nothing is measured, has no row, and the first no column.
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
            texts = [["" if math.isnan(each) else f"{each:.{each < 9.5:d}f}" for each in row] for row in table]
            image = draw_heat(panel, table, texts if len(table) < 10 else [], (0.0, top), cmap="viridis")
            sites = [axes.short_site(site) for site in maps[name].sites]
            for axis, part in ((panel.xaxis, sites[1:]), (panel.yaxis, sites[:-1])):
                named = axes.thinned(len(part), axes.NAMED)
                axis.set_ticks(named, [part[place] for place in named])
            panel.tick_params(axis="x", labelrotation=90)
            panel.tick_params(length=0)
            panel.spines[:].set_visible(False)
            if alike:
                axes.outer_ticks(panel, i, len(flat), columns)
            axes.set_title(panel, name if len(strengths) == 1 else f"{name}, δ = {maps[name].delta:g}", max(2, columns))
        at = f" at δ = {strengths.pop():g}" if len(strengths) == 1 else ""
        bar = flat[0].figure.colorbar(image, ax=flat, aspect=30, pad=0.02)
        bar.set_label(f"ζ{at}, % of the values before gain and bias")
        flat[0].figure.supxlabel("measured at")
        flat[0].figure.supylabel("noise at")
    return True


def draw_lam_hat(models: Mapping[str, Sites], path: Path) -> bool:
    """Results of `SiteStatistics`: λ̂ over depth, the mean of the rows, nine in ten rows (where there is a histogram),
    and all rows, with the share outside [0, 2].
    """
    lam_hats = {
        name: {site: cells["lam_hat"] for site, cells in sites.items() if cells.get("lam_hat")}
        for name, sites in models.items()
    }
    lam_hats = {name: sites for name, sites in lam_hats.items() if sites}
    if not lam_hats:
        return False
    depth = axes.Depth({name: list(sites) for name, sites in lam_hats.items()})
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
        thick = any(map(_most_rows, next(iter(lam_hats.values())).values()))
        title = f"marks: mean; {'thick bars: nine in ten rows; thin ' if thick else ''}bars: all rows"
        if any(each["least"] < low or each["most"] > high for each in everything):
            title += ", some longer than shown (triangles)"
        numbers = any(each["outside"] for each in everything)
        title += "; numbers: share of rows outside [0, 2], shaded" if numbers else "; shaded: [0, 2]"
        axes.set_title(panel, title, 1)
        above([panel], [*lam_hats, NO_TRANSFORMATION])
    return True


def _draw_rows(panel: Any, place: float, lam_hat: Cells, ends: tuple[float, float], colour: str) -> None:
    """Bars for λ̂ of a site's rows, with a triangle where they go on beyond the ends of the axis."""
    (low, high), least, most, outside = ends, lam_hat["least"], lam_hat["most"], lam_hat["outside"]
    panel.plot([place] * 2, [max(low, least), min(high, most)], color=colour, linewidth=1)
    if middle := _most_rows(lam_hat):
        panel.plot([place] * 2, middle, color=colour, linewidth=5, alpha=0.5, solid_capstyle="butt")
    for end, is_off, mark in ((low, least < low, "v"), (high, most > high, "^")):
        if is_off:
            panel.plot([place], [end], mark, color=colour, markersize=5, clip_on=False)
    if outside:
        text, xy = f"{100 * outside:.1f} %" if outside >= 0.0005 else "< 0.1 %", (place, min(high, max(2.0, most)))
        above_bar: Any = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center"}
        panel.annotate(text, xy, fontsize=SMALL, color=colour, **above_bar)


def _most_rows(lam_hat: Cells) -> tuple[float, float] | None:
    """The ends of the middle nine in ten rows, from a histogram; None without one, or where they are outside it."""
    counts, edges, below = lam_hat.get("counts") or (), lam_hat.get("edges", ()), lam_hat.get("below", 0)
    ends = []
    for share_below in (0.05, 0.95):
        rest = share_below * (sum(counts) + below + lam_hat.get("above", 0)) - below
        for count, low, high in zip(counts, edges, edges[1:], strict=False):
            if count and 0 <= rest <= count:
                ends.append(low + (high - low) * rest / count)
                break
            rest -= count
    return (ends[0], ends[1]) if len(ends) == 2 else None


def draw_likelihood(models: Mapping[str, Sites], path: Path) -> bool:
    """Results of `lambda_against_likelihood`: how far λ̂ of one Newton step is from the most likely λ.

    A point is a row; the norms of a model are in one panel, coloured by depth, dark first. Points that are far off are
    crosses at the edge.
    """
    known = {name: [each for each in sites.values() if each.get("newton")] for name, sites in models.items()}
    points = {
        name: [[(x, y - x) for x, y in zip(each["likelihood"], each["newton"], strict=True)] for each in sites]
        for name, sites in known.items()
        if sites
    }
    if not points:
        return False
    everything = [point for sites in points.values() for site in sites for point in site]
    (left, right), (low, high) = map(_nearly_all, zip(*everything, strict=True))
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
            title = f"{name}: {sum(map(len, sites)):,} rows"
            if correlations := [each["correlation"] for each in known[name] if each.get("correlation")]:
                title += f"; correlation at least {math.floor(1e4 * min(correlations)) / 1e4:.4f} at every norm"
            if off:
                title += f"; {off} off the scale (×)"
            axes.set_title(panel, title, columns)
            panel.set(xlim=(left, right), ylim=(low, high))
            axes.outer_ticks(panel, i, len(flat), columns)
        axes.depth_bar(flat)
        flat[0].figure.supxlabel("λ of the largest likelihood")
        flat[0].figure.supylabel("λ̂ of one Newton step - that λ")
    return True


def _nearly_all(values: Sequence[float]) -> tuple[float, float]:
    """The ends of nearly all values: half as far again as 98 % of them go, if any go further."""
    cuts = quantiles(values, n=100)
    room = 0.5 * (cuts[-1] - cuts[0])
    low, high = max(min(values), cuts[0] - room), min(max(values), cuts[-1] + room)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin
