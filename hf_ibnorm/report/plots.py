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
}


@contextmanager
def figure(path: Path) -> Iterator[Any]:
    """Axes to draw on; saved to `path` (PNG), whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_SETTINGS):
        fig, axes = plt.subplots()
        try:
            yield axes
            drawn = BytesIO()
            # Without the version in its metadata the same numbers give the same bytes.
            fig.savefig(drawn, format="png", metadata={"Software": None})
            write_bytes(path, drawn.getvalue())
        finally:
            plt.close(fig)


def plot_losses(runs: list[Run], path: Path) -> None:
    """Training loss (averaged over 10 steps) and validation loss of several runs against the step."""
    with figure(path) as axes:
        for i, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
            colour, style = COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]
            steps = [row["step"] for row in run.metrics]
            losses = [row["loss"] for row in run.metrics]
            window = min(10, len(losses))
            smooth = [sum(losses[j : j + window]) / window for j in range(len(losses) - window + 1)]
            axes.plot(steps[window - 1 :], smooth, style, color=colour, linewidth=1.2, label=f"{label}, training")
            validated = [row for row in run.metrics if "eval_loss" in row]
            axes.plot(
                [row["step"] for row in validated],
                [row["eval_loss"] for row in validated],
                "os^D"[i % 4],
                color=colour,
                markersize=6,
                markerfacecolor="white",
                label=f"{label}, validation",
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        axes.legend()
