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
from itertools import pairwise
from pathlib import Path
from statistics import fmean, quantiles
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from ..report.plots import figure, look

if TYPE_CHECKING:
    from .noise import NoiseRobustness
    from .plane import PlanePoint

WIDTH = 8.4
"""Of a picture, in inches: at the width of a page its text shrinks by a quarter."""
TITLE, SMALL = 9.0, 8.0
"""Font sizes of titles and labels, and of ticks and legends."""
NAMED = 12
"""Site names on one axis; of more sites every n-th is named."""
LAM_HAT_SITES = 24
"""Sites in one picture of λ̂; of more sites these are evenly spaced."""
MARKS = "os^Dv<"
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
    _Quantity(
        "excess kurtosis of a row, after", ("after", "row_excess_kurtosis"), scale="wide", reference=lambda _: 0.0
    ),
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
    with _panels(path, len(shown), 3, 2.1) as panels:
        _share(panels, "x")
        for i, (panel, (quantity, curves)) in enumerate(zip(panels, shown.items(), strict=True)):
            known = {quantity.reference(width) for width in widths} if quantity.reference else set()
            if len(known) == 1:  # or models of different width have different ones
                panel.axhline(*known, color="0.35", linewidth=1.0, linestyle=(0, (1, 1)), label=reference)
            for name in filter(lambda name: _any_finite(curves[name]), drawn):
                _draw_curve(panel, list(models).index(name), depth.places(name), curves[name], name)
            _scale(panel, quantity.scale, [value for curve in curves.values() for value in curve])
            panel.set_title(quantity.title, fontsize=TITLE, loc="left")
            depth.label(panel)
            panel.tick_params(labelbottom=i + 3 >= len(panels))
        panels[0].figure.supxlabel(depth.title, fontsize=TITLE)
        _legend_above(panels, _entries(panels, [*drawn, reference]))
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
    size = min(2.2, (WIDTH - 0.8) / len(columns))
    limit = max(abs(x) for channels in found.values() for each in channels for x in each["theoretical"])
    ends = [abs(y) for channels in found.values() for each in channels for y in _standardized(each)]
    height = min(2 * limit, max(limit, *ends))
    with _panels(
        path, len(rows) * len(columns), len(columns), max(1.2, 0.75 * size), 0.8 + size * len(columns)
    ) as flat:
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
                panel.set_title(short_site(column), fontsize=TITLE)
            if i % len(columns) == len(columns) - 1:
                place: Any = {"transform": panel.transAxes, "rotation": 270, "va": "center"}
                panel.text(1.03, 0.5, row, fontsize=TITLE, **place)
        flat[0].figure.supxlabel("quantile of the normal distribution", fontsize=TITLE)
        flat[0].figure.supylabel("quantile of the channel, standardized", fontsize=TITLE)
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
    with _panels(path, len(tables), columns, 0.9 * size + 0.1, 1.6 + columns * size) as panels:
        for i, (panel, (name, table)) in enumerate(zip(panels, tables.items(), strict=True)):
            image = panel.imshow(table, cmap="viridis", vmin=0.0, vmax=top, aspect="auto")
            names = [short_site(site) for site in maps[name].sites]
            for axis, part in ((panel.xaxis, names[1:]), (panel.yaxis, names[:-1])):
                shown = _thinned(len(part), NAMED)
                axis.set_ticks(shown, [part[k] for k in shown], fontsize=SMALL)
            panel.tick_params(axis="x", labelrotation=90)
            panel.tick_params(length=0)
            if alike:
                _outer_ticks(panel, i, len(panels), columns)
            if len(table) < 10:
                for y, row in enumerate(table):
                    for x, value in enumerate(row):
                        if math.isfinite(value):
                            colour = "white" if value < 0.6 * top else "black"
                            panel.text(x, y, _short_number(value), ha="center", va="center", fontsize=7, color=colour)
            _title(panel, name if len(strengths) == 1 else f"{name}, δ = {maps[name].delta:g}", max(2, columns))
            panel.grid(False)
            for spine in panel.spines.values():
                spine.set_visible(False)
        at = f" at δ = {next(iter(strengths)):g}" if len(strengths) == 1 else ""
        bar = panels[0].figure.colorbar(image, ax=panels, aspect=30, pad=0.02)
        bar.set_label(f"ζ{at}, % of the output", fontsize=TITLE)
        bar.ax.tick_params(labelsize=SMALL)
        panels[0].figure.supxlabel("measured after", fontsize=TITLE)
        panels[0].figure.supylabel("noise after", fontsize=TITLE)
    return True


def draw_lam_hat(models: Mapping[str, Sites], path: Path) -> bool:
    """Histograms of λ̂ over the rows, a panel for each site, with the share of rows outside [0, 2].

    The panels go as far as the histograms do; the shares count what lies beyond, too.

    Args:
        models: name → site → what `SiteStatistics.result` returns. Those without a LayerNormalNorm are left out.
        path: PNG file.
    """
    found = {
        name: {site: cells["lam_hat"] for site, cells in sites.items() if cells.get("lam_hat")}
        for name, sites in models.items()
    }
    found = {name: sites for name, sites in found.items() if sites}
    if not found:
        return False
    sites = list(dict.fromkeys(site for each in found.values() for site in each))
    sites = [sites[i] for i in _spaced(len(sites), LAM_HAT_SITES)]
    ends = [_ends(each[site]) for each in found.values() for site in sites if site in each]
    low, high = min(-0.5, *(end[0] for end in ends)), max(2.5, *(end[1] for end in ends))
    columns = 3 if len(sites) <= 9 else 4
    with _panels(path, len(sites), columns, 1.5) as panels:
        _share(panels, "xy")
        for k, (panel, site) in enumerate(zip(panels, sites, strict=True)):
            panel.set_axisbelow(True)
            panel.axvspan(0, 2, color="0.93", linewidth=0, zorder=0)
            for i, name in enumerate(models):
                if site not in found.get(name, {}):
                    continue
                histogram, (colour, style) = found[name][site], look(i)
                counts = histogram["counts"]
                rows = sum(counts) + histogram["below"] + histogram["above"] or 1
                shares = [100 * count / rows for count in counts]
                outside = _percent_text(100 * histogram["outside"])
                if len(found) == 1:
                    panel.stairs(shares, histogram["edges"], fill=True, color=colour, label=outside)
                else:  # steps of several would hide each other
                    middles = [(a + b) / 2 for a, b in pairwise(histogram["edges"])]
                    panel.plot(middles, shares, style, color=colour, linewidth=1.2, label=outside)
            options: Any = {"handlelength": 1.6 if len(found) > 1 else 0, "borderpad": 0.1, "labelspacing": 0.2}
            panel.legend(loc="upper right", fontsize=SMALL, borderaxespad=0.1, **options)
            panel.set_title(short_site(site), fontsize=TITLE, loc="left")
            _outer_ticks(panel, k, len(panels), columns)
        panels[0].set_xlim(low, high)
        panels[0].xaxis.get_major_locator().set_params(integer=True)
        # Above the histograms is room for the shares.
        panels[0].set_ylim(0, max(panel.dataLim.y1 for panel in panels) * (1.05 + 0.16 * len(found)))
        names = {
            name: panels[0].plot([], [], look(i)[1], color=look(i)[0])[0]
            for i, name in enumerate(models)
            if name in found
        }
        panels[0].figure.supxlabel("λ̂; shaded is [0, 2], written the share of rows outside", fontsize=TITLE)
        first = next(iter(next(iter(found.values())).values()))["edges"]
        panels[0].figure.supylabel(f"rows, % per {first[1] - first[0]:.2g}", fontsize=TITLE)
        _legend_above(panels, names)
    return True


def draw_likelihood(found: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """λ̂ of one Newton step against the most likely λ, a point for each row, a panel for each title.

    Args:
        found: title → what `lambda_against_likelihood` returns.
        path: PNG file.
    """
    shown = {title: each for title, each in found.items() if each.get("newton")}
    if not shown:
        return False
    low, high = _most([value for each in shown.values() for kind in ("newton", "likelihood") for value in each[kind]])
    columns = min(3, len(shown))
    with _panels(path, len(shown), columns, 2.4, width=max(WIDTH * columns / 3, 3.5)) as panels:
        for i, (panel, (title, each)) in enumerate(zip(panels, shown.items(), strict=True)):
            panel.plot([low, high], [low, high], color="0.35", linewidth=1.0, linestyle="--")
            pairs = list(zip(each["likelihood"], each["newton"], strict=True))
            off = [pair for pair in pairs if not (low <= min(pair) and max(pair) <= high)]
            look_of: Any = {"color": look(0)[0], "alpha": 0.5, "linewidth": 0}
            panel.plot(*zip(*pairs, strict=True), "o", markersize=2.5, **look_of)
            if off:
                at_edge = [[min(max(value, low), high) for value in values] for values in zip(*off, strict=True)]
                panel.plot(*at_edge, "x", markersize=5, color=look(1)[0], clip_on=False)
            r = "" if each.get("correlation") is None else f"r = {each['correlation']:.3f}\n"
            text = f"{r}{each['rows']} rows" + (f",\n{len(off)} off the scale (×)" if off else "")
            panel.text(0.05, 0.95, text, transform=panel.transAxes, va="top", fontsize=SMALL)
            _title(panel, title, 3)
            panel.set_xlim(low, high)
            panel.set_ylim(low, high)
            panel.set_box_aspect(1)
            _outer_ticks(panel, i, len(panels), columns)
        panels[0].figure.supxlabel("λ of the largest likelihood", fontsize=TITLE)
        panels[0].figure.supylabel("λ̂ of one Newton step", fontsize=TITLE)
    return True


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
    with _panels(path, len(cells), columns, 2.2, max(WIDTH * columns / 3, 4.5)) as panels:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        # Without its brightest end, which is not seen on white.
        colours = ListedColormap(colormaps["viridis"](range(225)))
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
                labelsize=SMALL,
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
        bar.ax.tick_params(labelsize=SMALL)
        bar.set_label("norm", fontsize=TITLE)
        told = "I(X;T), nats; large points: last step, bars: 95 % intervals"
        panels[0].figure.supxlabel(told, fontsize=TITLE)
        panels[0].figure.supylabel("I(T;Y), nats", fontsize=TITLE)
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
            panel.set_title(f"{ESTIMATOR_NAMES.get(estimator, estimator)}, β = {betas}", fontsize=TITLE, loc="left")
            depth.label(panel)
        panels[0].set_ylabel("I(T;Y) - β·I(X;T), nats", fontsize=TITLE)
        panels[0].figure.supxlabel(depth.title, fontsize=TITLE)
        _legend_above(panels, _entries(panels, list(known)))
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
        panel.tick_params(which="both", labelsize=SMALL)
        if self.names:
            shown = _thinned(len(self.names), NAMED)
            panel.set_xticks(shown, [self.names[i] for i in shown], rotation=90)
        else:
            panel.set_xticks([0, 0.5, 1], ["first", "middle", "last"])


@contextmanager
def _panels(path: Path, count: int, columns: int, height: float, width: float = WIDTH) -> Iterator[list[Any]]:
    """`count` panels, at most `columns` beside each other, laid out so that nothing overlaps."""
    columns = min(columns, count)
    rows = -(-count // columns)
    with figure(path, rows, columns) as axes:
        panels = list(getattr(axes, "flat", [axes]))
        panels[0].figure.set_layout_engine("constrained")
        panels[0].figure.set_size_inches(width, 0.7 + height * rows)
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
    panel.set_title("\n".join(wrap(text, int(11 * WIDTH / columns) - 4)), fontsize=TITLE, loc="left")


def _outer_ticks(panel: Any, i: int, count: int, columns: int) -> None:
    """Tick labels of the i-th of `count` panels only where it is leftmost or lowest."""
    panel.tick_params(labelsize=SMALL, labelleft=i % columns == 0, labelbottom=i + columns >= count)


def _entries(panels: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
    """What of `labels` is in any panel, in their order, and how it looks."""
    handles = [zip(*reversed(panel.get_legend_handles_labels()), strict=True) for panel in panels]
    found = {label: handle for each in handles for label, handle in each}
    return {label: found[label] for label in labels if label in found}


def _legend_above(panels: Sequence[Any], entries: Mapping[str, Any]) -> None:
    """One legend for all panels, if there is more than one thing to tell."""
    if len(entries) > 1:
        most = max(1, min(4, int(WIDTH / (0.6 + 0.07 * max(map(len, entries))))))
        columns = -(-len(entries) // -(-len(entries) // most))
        options: Any = {"loc": "outside upper center", "ncols": columns, "fontsize": SMALL}
        whole = panels[0].figure
        width, height = whole.get_size_inches()
        whole.set_size_inches(width, height + 0.19 * -(-len(entries) // columns))
        whole.legend(entries.values(), entries.keys(), **options)


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


def _spaced(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count`, evenly spaced, both ends among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _ends(histogram: Mapping[str, Any]) -> tuple[float, float]:
    """From where to where a histogram has counts."""
    filled = [i for i, count in enumerate(histogram["counts"]) if count]
    edges = histogram["edges"]
    if not filled:
        return edges[0], edges[-1]
    return edges[filled[0]], edges[filled[-1] + 1]


def _percent_text(value: float) -> str:
    return f"{value:.1f} %" if value >= 0.05 else "< 0.1 %" if value > 0 else "0 %"


def _short_number(value: float) -> str:
    """Two digits."""
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}"
