"""Plots in one style, readable in print: colours that differ in brightness, and line styles that differ too."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from ..files import write_bytes
from .runs import Run, labels

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
_SETTINGS: Any = {
    "figure.figsize": (7.0, 4.0),
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # names may have a $
}


@contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1) -> Iterator[Any]:
    """Axes to draw on, a grid of them where there are more; saved to `path` (PNG), whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_SETTINGS):
        width, height = _SETTINGS["figure.figsize"]
        fig, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows))
        try:
            yield axes
            drawn = BytesIO()
            # Without the version in its metadata the same numbers give the same bytes.
            fig.savefig(drawn, format="png", metadata={"Software": None})
            write_bytes(path, drawn.getvalue())
        finally:
            plt.close(fig)


def plot_losses(runs: list[Run], path: Path) -> None:
    """Training loss (averaged over up to 10 steps) and validation loss of several runs against the step."""
    with figure(path) as axes:
        _draw_losses(axes, runs)


PANELS = {
    "grad_norm": "gradient norm",
    "gain_movement": "gain movement, root mean square",
    "tokens_per_second": "tokens per second",
}


def plot_runs(runs: list[Run], path: Path) -> None:
    """Losses, gradient norm, movement of the gains and speed of several runs, finished or not, in one picture."""
    with figure(path, 2, 2) as axes:
        losses, *others = axes.flat
        _draw_losses(losses, runs)
        for panel, (field, title) in zip(others, PANELS.items(), strict=True):
            for i, run in enumerate(runs):
                rows = [row for row in run.metrics if row.get(field) is not None]
                colour, style = look(i)
                steps, values = [row["step"] for row in rows], [row[field] for row in rows]
                panel.plot(steps, values, style, color=colour, linewidth=1.0)
            panel.set_xlabel("step")
            panel.set_ylabel(title)
            if field == "grad_norm":
                panel.set_yscale("log")


def look(i: int) -> tuple[str, str]:
    """Colour and line style of the i-th curve."""
    return COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]


def _draw_losses(axes: Any, runs: list[Run]) -> None:
    names = [f"{label}, " for label in labels(runs)] if len(runs) > 1 else [""]
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour, style = look(i)
        counted = [row for row in run.metrics if row["loss"] is not None]  # of a skipped step there may be none
        steps, losses = [row["step"] for row in counted], [row["loss"] for row in counted]
        window = max(1, min(10, len(losses) // 10))
        smooth = [sum(losses[j : j + window]) / window for j in range(len(losses) - window + 1)]
        axes.plot(steps[-len(smooth) :], smooth, style, color=colour, linewidth=1.2, label=f"{name}training")
        validated = [row for row in run.metrics if row.get("eval_loss") is not None]
        axes.plot(
            [row["step"] for row in validated],
            [row["eval_loss"] for row in validated],
            "os^D"[i % 4],
            color=colour,
            markersize=6,
            markerfacecolor="white",
            label=f"{name}validation",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.legend()
