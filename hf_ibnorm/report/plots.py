"""Plots in one style: as wide as the page, with text in points at that width.

They are readable in print, too: colours differ in brightness, and line styles and marks differ beside them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import fmean, median
from textwrap import wrap
from typing import Any

from ..base.files import write_bytes
from .runs import Run, labels

WIDTH = 10.0
"""Inches across a picture and across the page that shows it, so that text is as large on the page as in the picture."""
TEXT, SMALL = 10.0, 9.0
"""Font sizes in points: of titles and labels; of ticks, legends and notes."""
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#000000", "#882255", "#999933", "#6A3D9A"),
)
STYLES = ("-", "--", "-.", ":")
MARKS = "os^Dv<>P"
FAR_OFF = 3.0
"""A curve is far off where it reaches more than so many times as far from the middle as the next one."""
Ends = tuple[float, float]
Points = Sequence[tuple[float, float]]
SETTINGS: Any = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "figure.labelsize"), TEXT),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize"), SMALL),
    "figure.dpi": 144,
    "figure.constrained_layout.use": True,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name is no markup
}


@contextmanager
def panels(path: Path, count: int, columns: int = 1, height: float = 3.6, margin: float = 0.0) -> Iterator[list[Any]]:
    """Yields `count` axes to draw on, row by row, and then saves the picture to `path` (PNG), whole or not at all.

    A row has at most `columns` axes and is `height` inches high; `margin` inches are above and below all rows.
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
            # Without matplotlib's version in the metadata the same numbers give the same bytes.
            fig.savefig(drawn, format="png", metadata={"Software": None})
            write_bytes(path, drawn.getvalue())
        finally:
            plt.close(fig)


@contextmanager
def figure(path: Path, height: float = 3.6) -> Iterator[Any]:
    """`panels` of a single axes, which it yields."""
    with panels(path, 1, height=height) as (axes,):
        yield axes


def look(i: int) -> tuple[str, str]:
    """Colour and line style of the i-th curve."""
    return COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]


def crowd(extents: Sequence[Ends], cores: Sequence[Ends] | None = None) -> Ends:
    """The ends of an axis that shows most curves (or bars, or marks) well: all but those that are far off.

    Far off are fewer than half of the curves, each at least three times as far from the middle as any of the others,
    and only where the axis is less than half as long without them.

    Args:
        extents: both ends of each curve; at least one.
        cores: both ends of most of each curve, by which its distance is judged; `extents` by default.
    """
    cores = extents if cores is None else cores
    middle = median((low + high) / 2 for low, high in cores)
    distances = [max(high - middle, middle - low) for low, high in cores]
    reach = sorted((distance, *extent) for distance, extent in zip(distances, extents, strict=True))
    low, high = min(low for low, _ in extents), max(high for _, high in extents)
    for i in range(len(reach) - 1, len(reach) // 2, -1):
        if reach[i][0] > FAR_OFF * reach[i - 1][0] > 0:
            kept = min(low for _, low, _ in reach[:i]), max(high for *_, high in reach[:i])
            return kept if 2 * (kept[1] - kept[0]) < high - low else (low, high)
    return low, high


def clip(axes: Any, curves: Mapping[str, Sequence[float]]) -> None:
    """Fit a linear vertical axis to most curves (name → values), and name in the picture those that leave it.

    Values that are not finite are passed over.
    """
    finite = {name: sorted(filter(math.isfinite, values)) for name, values in curves.items()}
    extents = {name: (values[0], values[-1]) for name, values in finite.items() if values}
    if not extents or axes.get_yscale() != "linear":
        return
    cores = [(finite[name][len(finite[name]) // 4], finite[name][-1 - len(finite[name]) // 4]) for name in extents]
    low, high = crowd(list(extents.values()), cores)
    letters = int(axes.get_position().width * WIDTH * 72 / (0.6 * SMALL))
    lines = []
    for name, ends in extents.items():
        if ends[0] < low or ends[1] > high:
            shown = dict.fromkeys(f"{end:.3g}".replace("-", "−") for end in ends)  # equal ends once
            lines += wrap(f"{name} is off the scale: {' to '.join(shown)}", letters)
    if lines:
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room * (1 + 2 * len(lines)))
        box: Any = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.0}
        place: Any = {"transform": axes.transAxes, "ha": "right", "va": "top", "zorder": 5, "in_layout": False}
        axes.text(0.99, 0.99, "\n".join(lines), fontsize=SMALL, bbox=box, **place)


def beside(axes: Any, entries: Mapping[str, Any] | None = None, title: str | None = None) -> None:
    """A legend to the right of the axes: of their labelled artists, or of `entries`, label → handle."""
    given: dict[str, Any] = {} if entries is None else {"handles": list(entries.values()), "labels": list(entries)}
    place: Any = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    axes.legend(title=title, alignment="left", **place, **given)


def above(panels: Sequence[Any], order: Sequence[str] = ()) -> None:
    """One legend over the whole picture, which grows by it, for the labels in any of the panels; none for one label.

    `order` has the labels in the order of the legend; by default all, as they were drawn.
    """
    drawn, whole = handles(panels), panels[0].figure
    entries = {label: drawn[label] for label in order or drawn if label in drawn}
    if len(entries) > 1:
        most = max(1, min(5, int(WIDTH / (0.6 + 0.075 * max(map(len, entries))))))
        columns = -(-len(entries) // -(-len(entries) // most))
        width, height = whole.get_size_inches()
        whole.set_size_inches(width, height + 0.22 * -(-len(entries) // columns))
        whole.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns)


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
    interval: Ends | None = None
    points: Sequence[float] = ()
    filled: bool = False
    colour: str = COLOURS[0]
    name: str = ""


def plot_forest(lines: Sequence[ForestLine], path: Path, title: str) -> None:
    """Differences from 0, a line each, from top to bottom; `title` is the axis's, with its unit.

    A difference that is far off is an arrow at the edge, with its number.
    """
    reach = [(0.0, line.value, *(line.interval or ())) for line in lines]
    low, high = crowd([(min(ends), max(ends)) for ends in reach]) if lines else (-1.0, 1.0)
    room = 0.06 * (high - low) or 1.0
    low, high = low - room, high + room
    with figure(path, height=1.0 + 0.3 * max(len(lines), 1)) as axes:
        for y, line in enumerate(lines):
            mark: Any = {"color": line.colour, "markersize": 6.5, "zorder": 4, "label": line.name}
            if low <= line.value <= high:
                if line.interval:
                    axes.plot(line.interval, [y, y], color=line.colour, linewidth=1.6, zorder=2)
                axes.plot([line.value], [y], "o", markerfacecolor=line.colour if line.filled else "white", **mark)
                axes.plot(line.points, [y] * len(line.points), "|", color="black", markersize=7, alpha=0.6, zorder=3)
                continue
            edge, arrow, shift, side = (high, ">", -8, "right") if line.value > high else (low, "<", 8, "left")
            axes.plot([edge], [y], arrow, clip_on=False, **mark)
            ends = "" if line.interval is None else f" ({line.interval[0]:+.3g} to {line.interval[1]:+.3g})"
            note: Any = {"ha": side, "va": "center", "fontsize": SMALL, "color": line.colour}
            text = f"{line.value:+.3g}{ends}, off the scale"
            axes.annotate(text, (edge, y), (shift, 0), textcoords="offset points", **note)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(lines)), [line.label for line in lines])
        axes.set(xlim=(low, high), ylim=(max(len(lines), 1) - 0.4, -0.6), xlabel=title)
        if len({line.name for line in lines}) > 1:
            beside(axes, handles([axes]))


def draw_curve(axes: Any, i: int, points: Points, label: str = "", **options: Any) -> None:
    """The i-th curve through points (x, y), in its colour and line style unless `options` of matplotlib say others."""
    colour, style = look(i)
    x, y = zip(*points, strict=True) if points else ((), ())
    axes.plot(x, y, **{"color": colour, "linestyle": style, "linewidth": 1.2, "label": label, **options})


def draw_heat(
    axes: Any, table: Sequence[Sequence[float | None]], texts: Sequence[Sequence[str]], ends: Ends, **options: Any
) -> Any:
    """A table of numbers as a heat map, a text in each cell (none where `texts` is empty); None and NaN stay white.

    The `ends` get the first and the last colour; `options` are those of matplotlib's `imshow`. Returns the image, of
    which matplotlib makes a colour bar.
    """
    numbers = [[math.nan if number is None else number for number in row] for row in table]
    image = axes.imshow(numbers, vmin=ends[0], vmax=ends[1], aspect="auto", **options)
    axes.grid(False)
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            if text:
                red, green, blue, opaque = image.to_rgba(numbers[y][x])
                is_dark = opaque and 0.3 * red + 0.59 * green + 0.11 * blue < 0.48
                colour = "white" if is_dark else "black"
                axes.text(x, y, text, color=colour, ha="center", va="center", fontsize=SMALL)
    return image


def smoothed(points: Points, most: int, sliding: bool = False) -> list[tuple[float, float]]:
    """Means over `most` points, or over a tenth of all where these are few, each at the last x of its mean.

    With `sliding` a mean begins at every point; otherwise each point is in one mean.
    """
    size = max(1, min(most, len(points) // 10))
    blocks = [points[i : i + size] for i in range(0, len(points) - size + 1, 1 if sliding else size)]
    return [(block[-1][0], fmean(y for _, y in block)) for block in blocks]


def plot_losses(runs: Sequence[Run], path: Path) -> None:
    """Training loss (averaged over up to 10 steps) and validation loss of several runs against the step."""
    with figure(path) as axes:
        _draw_losses(axes, runs)


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


def _draw_losses(axes: Any, runs: Sequence[Run]) -> None:
    """A line for the training loss and marks for the validation loss of each run, with a legend over the picture."""
    curves = {}
    named = labels(runs) if len(runs) > 1 else ["training"]
    for i, (run, label, name) in enumerate(zip(runs, labels(runs), named, strict=True)):
        training, validation = smoothed(run.curve("loss"), 10, sliding=True), run.curve("eval_loss")
        draw_curve(axes, i, training, name)
        mark = {"marker": MARKS[i % len(MARKS)], "markersize": 6, "markerfacecolor": "white", "linestyle": ""}
        draw_curve(axes, i, validation, "" if i else "validation", **mark)
        curves[label] = [value for _, value in (*training, *validation)]
    axes.set(xlabel="step", ylabel="loss, nats per token")
    clip(axes, curves)
    above([axes], [*named, "validation"])
