"""Plots in one style: as wide as the page, text in points at that width, colours that differ in brightness.

They are readable in print, too: line styles and marks differ beside the colours.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import fmean, median
from textwrap import wrap
from typing import Any

from ..base.files import write_bytes
from .runs import Run, labels

WIDTH = 10.0
"""Inches across a picture, and across the page that shows it: so text is as large on the page as in the picture."""
TEXT, SMALL = 10.0, 9.0
"""Font sizes in points: of titles and labels, and of ticks, legends and notes."""
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#000000", "#882255", "#999933", "#6A3D9A"),
)
STYLES = ("-", "--", "-.", ":")
MARKS = "os^Dv<>P"
FAR_OFF = 3.0
"""How many times as far from the middle as the next one something must be to be left off an axis."""
Ends = tuple[float, float]
SETTINGS: Any = {
    "figure.dpi": 144,
    "figure.constrained_layout.use": True,
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.titlelocation": "left",
    "axes.labelsize": TEXT,
    "figure.labelsize": TEXT,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.title_fontsize": SMALL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # names may have a $
}


@contextmanager
def panels(path: Path, count: int, columns: int = 1, height: float = 3.6, margin: float = 0.0) -> Iterator[list[Any]]:
    """Axes to draw on, row by row; saved to `path` (PNG), whole or not at all.

    Args:
        path: PNG file.
        count: of axes.
        columns: axes beside each other, at most.
        height: of a row of axes, in inches.
        margin: height of what stands above and below all rows, in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from .ticks import plain_ticks

    columns = min(columns, count)
    rows = -(-count // columns)
    with plt.rc_context(SETTINGS):
        fig, grid = plt.subplots(rows, columns, figsize=(WIDTH, margin + height * rows), squeeze=False)
        for surplus in grid.flat[count:]:
            surplus.remove()
        try:
            yield list(grid.flat[:count])
            plain_ticks(fig)
            drawn = BytesIO()
            # Without the version in its metadata the same numbers give the same bytes.
            fig.savefig(drawn, format="png", metadata={"Software": None})
            write_bytes(path, drawn.getvalue())
        finally:
            plt.close(fig)


@contextmanager
def figure(path: Path, height: float = 3.6) -> Iterator[Any]:
    """The same with one axes."""
    with panels(path, 1, height=height) as (axes,):
        yield axes


def look(i: int) -> tuple[str, str]:
    """Colour and line style of the i-th curve."""
    return COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]


def crowd(extents: Sequence[tuple[float, float]], cores: Sequence[tuple[float, float]] | None = None) -> Ends:
    """The ends of an axis that shows things well: all of them but those that are far off.

    Far off are fewer than half of the things, where the nearest of them reaches at least three times as far from the
    middle as what is next, and only where the axis is less than half as long without them.

    Args:
        extents: the ends of each thing; at least one.
        cores: the ends of most of each thing, by which its distance is judged; `extents` unless given.
    """
    cores = extents if cores is None else cores
    middle = median((low + high) / 2 for low, high in cores)
    reach = sorted(
        (max(high - middle, middle - low), *extent) for (low, high), extent in zip(cores, extents, strict=True)
    )
    everything = min(low for low, _ in extents), max(high for _, high in extents)
    for i in range(len(reach) - 1, len(reach) // 2, -1):
        if reach[i][0] > FAR_OFF * reach[i - 1][0] > 0:
            kept = min(low for _, low, _ in reach[:i]), max(high for *_, high in reach[:i])
            return kept if 2 * (kept[1] - kept[0]) < everything[1] - everything[0] else everything
    return everything


def clip(axes: Any, curves: Mapping[str, Sequence[float]]) -> None:
    """Fit the vertical axis to most curves, and name in the picture the curves that leave it, with their ends.

    Args:
        axes: where the curves are drawn; on a logarithmic scale nothing is changed.
        curves: name → its values, of which those that are not finite are passed over.
    """
    known = {name: sorted(filter(math.isfinite, values)) for name, values in curves.items()}
    extents = {name: (values[0], values[-1]) for name, values in known.items() if values}
    if not extents or axes.get_yscale() != "linear":
        return
    cores = [(known[name][len(known[name]) // 4], known[name][-1 - len(known[name]) // 4]) for name in extents]
    low, high = crowd(list(extents.values()), cores)
    off = {name: each for name, each in extents.items() if each[0] < low or each[1] > high}
    if off:
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        letters = int(axes.get_position().width * WIDTH * 72 / (0.6 * SMALL))
        notes = [f"{name} is off the scale: {_from_to(*each)}" for name, each in off.items()]
        lines = [line for note in notes for line in wrap(note, letters)]
        axes.set_ylim(low - room, high + room * (1 + 2 * len(lines)))
        box: Any = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.0}
        place: Any = {"transform": axes.transAxes, "ha": "right", "va": "top", "zorder": 5, "in_layout": False}
        axes.text(0.99, 0.99, "\n".join(lines), fontsize=SMALL, bbox=box, **place)


def _from_to(low: float, high: float) -> str:
    ends = list(dict.fromkeys(f"{each:.3g}".replace("-", "−") for each in (low, high)))
    return " to ".join(ends)


def beside(axes: Any, entries: Mapping[str, Any] | None = None, title: str | None = None) -> None:
    """A legend to the right of the axes: of their labelled artists, or of `entries`, label → handle."""
    given: dict[str, Any] = {"title": title, "alignment": "left"}
    given |= {} if entries is None else {"handles": list(entries.values()), "labels": list(entries)}
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, **given)


def above(panels: Sequence[Any], order: Sequence[str] = ()) -> None:
    """One legend over the whole picture, which grows by it, of more than one label in the panels.

    Args:
        panels: whose labelled artists are told; the same label means the same look.
        order: labels that are told, in this order; all of them, as they were drawn, without.
    """
    drawn, figure = handles(panels), panels[0].figure
    entries = {label: drawn[label] for label in order or drawn if label in drawn}
    if len(entries) > 1:
        most = max(1, min(5, int(WIDTH / (0.6 + 0.075 * max(map(len, entries))))))
        columns = -(-len(entries) // -(-len(entries) // most))
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.22 * -(-len(entries) // columns))
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns)


def handles(panels: Sequence[Any]) -> dict[str, Any]:
    """Label → handle of the labelled artists in any of the panels."""
    legends = [panel.get_legend_handles_labels() for panel in panels]
    return {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}


@dataclass(frozen=True)
class ForestLine:
    """A line of a forest plot.

    Args:
        label: on the axis.
        value: a mark.
        interval: a bar.
        points: ticks, such as a value for each seed.
        filled: whether the mark is filled.
        colour: of mark and bar.
        name: in the legend.
    """

    label: str
    value: float
    interval: tuple[float, float] | None = None
    points: Sequence[float] = field(default_factory=tuple)
    filled: bool = False
    colour: str = COLOURS[0]
    name: str = ""


def plot_forest(lines: Sequence[ForestLine], path: Path, what: str) -> None:
    """Differences from 0, a line each; a difference that is far off is an arrow at the edge, with its number.

    Args:
        lines: from top to bottom.
        path: PNG file.
        what: the title of the axis, with its unit.
    """
    reach = [(0.0, each.value, *(each.interval or ())) for each in lines]
    extents = [(min(each), max(each)) for each in reach]
    low, high = crowd(extents) if extents else (-1.0, 1.0)
    room = 0.06 * (high - low) or 1.0
    low, high = low - room, high + room
    with figure(path, height=1.0 + 0.3 * max(len(lines), 1)) as axes:
        for y, each in enumerate(lines):
            mark: Any = {"color": each.colour, "markersize": 6.5, "zorder": 4}
            if not low <= each.value <= high:
                far = each.value > high
                axes.plot([high if far else low], [y], ">" if far else "<", clip_on=False, label=each.name, **mark)
                side: Any = {"ha": "right" if far else "left", "va": "center", "fontsize": SMALL, "color": each.colour}
                ends = "" if each.interval is None else f" ({each.interval[0]:+.3g} to {each.interval[1]:+.3g})"
                shift = (-8 if far else 8, 0)
                text = f"{each.value:+.3g}{ends}, off the scale"
                axes.annotate(text, (high if far else low, y), shift, textcoords="offset points", **side)
                continue
            if each.interval:
                axes.plot(each.interval, [y, y], color=each.colour, linewidth=1.6, zorder=2)
            mark["markerfacecolor"] = each.colour if each.filled else "white"
            axes.plot([each.value], [y], "o", label=each.name, **mark)
            axes.plot(each.points, [y] * len(each.points), "|", color="black", markersize=7, alpha=0.6, zorder=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(lines)), [each.label for each in lines])
        axes.set_ylim(max(len(lines), 1) - 0.4, -0.6)
        axes.set_xlim(low, high)
        axes.set_xlabel(what)
        names = {each.name for each in lines}
        if len(names) > 1:
            beside(axes, handles([axes]))


Points = Sequence[tuple[float, float]]


def draw_curve(axes: Any, i: int, points: Points, label: str = "", **options: Any) -> None:
    """The i-th curve through points (x, y), in its colour and line style unless `options` of matplotlib say others."""
    colour, style = look(i)
    x, y = zip(*points, strict=True) if points else ((), ())
    axes.plot(x, y, **{"color": colour, "linestyle": style, "linewidth": 1.2, "label": label, **options})


def draw_heat(
    axes: Any, table: Sequence[Sequence[float | None]], texts: Sequence[Sequence[str]], ends: Ends, **options: Any
) -> Any:
    """A table as a heat map, a text in each cell; cells of None or NaN stay white.

    Args:
        axes: to draw on.
        table: the numbers.
        texts: of the cells; empty for no text anywhere.
        ends: numbers that get the first and the last colour.
        options: of matplotlib's `imshow`.

    Returns:
        What a colour bar is made of.
    """
    numbers = [[math.nan if number is None else number for number in row] for row in table]
    image = axes.imshow(numbers, vmin=ends[0], vmax=ends[1], aspect="auto", **options)
    axes.grid(False)
    cells = [(x, y, text) for y, row in enumerate(texts) for x, text in enumerate(row) if text]
    for x, y, text in cells:
        red, green, blue, opaque = image.to_rgba(numbers[y][x])
        is_dark = opaque and 0.3 * red + 0.59 * green + 0.11 * blue < 0.48
        place: Any = {"ha": "center", "va": "center", "fontsize": SMALL}
        axes.text(x, y, text, color="white" if is_dark else "black", **place)
    return image


def smoothed(points: Points, most: int, sliding: bool = False) -> list[tuple[float, float]]:
    """Means over `most` points, or a tenth of them where they are few, each at the last x of its mean.

    Args:
        points: (x, y).
        most: points in a mean.
        sliding: whether a mean begins at every point; where not, each point is in one mean.
    """
    size = max(1, min(most, len(points) // 10))
    blocks = [points[i : i + size] for i in range(0, len(points) - size + 1, 1 if sliding else size)]
    return [(block[-1][0], fmean(y for _, y in block)) for block in blocks]


def plot_losses(runs: Sequence[Run], path: Path) -> None:
    """Training loss (averaged over up to 10 steps) and validation loss of several runs against the step."""
    with figure(path) as axes:
        _draw_losses(axes, runs)
        above([axes], [*_names(runs), "validation"])


PANELS = {
    "grad_norm": "gradient norm",
    "gain_movement": "gain movement, root mean square",
    "tokens_per_second": "tokens per second",
}


def plot_runs(runs: Sequence[Run], path: Path) -> None:
    """Losses, gradient norm, movement of the gains and speed of several runs, finished or not, in one picture."""
    with panels(path, 1 + len(PANELS), 2, 2.9) as (losses, *others):
        _draw_losses(losses, runs)
        for axes, (name, title) in zip(others, PANELS.items(), strict=True):
            curves = {}
            for i, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
                draw_curve(axes, i, run.curve(name), linewidth=1.0)
                curves[label] = [value for _, value in run.curve(name)]
            axes.set(xlabel="step", ylabel=title, yscale="log" if name == "grad_norm" else "linear")
            clip(axes, curves)
        above([losses], [*_names(runs), "validation"])


def _names(runs: Sequence[Run]) -> list[str]:
    """Of the lines in the legend."""
    return labels(runs) if len(runs) > 1 else ["training"]


def _draw_losses(axes: Any, runs: Sequence[Run]) -> None:
    """A line for the training loss and marks for the validation loss of each run."""
    curves = {}
    for i, (run, label, name) in enumerate(zip(runs, labels(runs), _names(runs), strict=True)):
        training, validation = smoothed(run.curve("loss"), 10, sliding=True), run.curve("eval_loss")
        draw_curve(axes, i, training, name)
        mark = {"marker": MARKS[i % len(MARKS)], "markersize": 6, "markerfacecolor": "white", "linestyle": ""}
        draw_curve(axes, i, validation, "" if i else "validation", **mark)
        curves[label] = [value for _, value in (*training, *validation)]
    axes.set(xlabel="step", ylabel="loss, nats per token")
    clip(axes, curves)
