"""The pictures of a study's report."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hf_ibnorm.report.plots import COLOURS, STYLES, figure
from hf_ibnorm.report.runs import Run

from ..compare import BETTER, WORSE
from .plan import VALIDATION
from .results import BASELINE, Group
from .training import DIVERGED

SHOWN = 8
"""Norms in one picture of losses; of a λ sweep only the best λ is drawn."""
SMOOTH = 20
"""Steps that the training loss is averaged over."""


def draw_losses(groups: Sequence[Group], path: Path) -> None:
    """Training loss, averaged over up to 20 steps, and validation loss: mean over seeds, band from best to worst."""
    shown = _shown(groups)
    with figure(path, 1, 2) as axes:
        for i, group in enumerate(shown):
            look: dict[str, Any] = {
                "color": COLOURS[i % len(COLOURS)],
                "linestyle": STYLES[i // len(COLOURS) % len(STYLES)],
            }
            for panel, curves in zip(axes, (_smoothed(group.runs()), _validated(group.runs())), strict=True):
                steps = [step for step, _ in curves[0]]
                values = list(zip(*([loss for _, loss in curve] for curve in curves), strict=True))
                panel.plot(steps, [fmean(each) for each in values], linewidth=1.3, label=group.arm.name, **look)
                ends = [min(each) for each in values], [max(each) for each in values]
                panel.fill_between(steps, *ends, color=look["color"], alpha=0.18, linewidth=0)
        for panel, title in zip(axes, ("training loss", "validation loss"), strict=True):
            panel.set_xlabel("step")
            panel.set_ylabel(f"{title}, nats per token")
        _second_half(axes[0])
        axes[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))


def draw_forest(groups: Sequence[Group], path: Path, what: str) -> None:
    """Differences from the baseline: seeds as ticks, the mean with its t-interval; filled where the verdict is one."""
    rows = [group for group in groups if group.paired]
    with figure(path) as axes:
        axes.figure.set_size_inches(7, 1.2 + 0.34 * max(len(rows), 1))
        for y, group in enumerate(rows):
            found = group.paired
            assert found is not None
            colour = COLOURS[0]
            if found.interval:
                axes.plot(found.interval, [y, y], color=colour, linewidth=1.6, zorder=2)
            filled = colour if group.verdict in (BETTER, WORSE) else "white"
            axes.plot([found.mean], [y], "o", color=colour, markerfacecolor=filled, markersize=6.5, zorder=4)
            axes.plot(group.differences, [y] * found.n, "|", color="black", markersize=7, alpha=0.6, zorder=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [group.label for group in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(what)


def draw_cost(groups: Sequence[Group], path: Path, metric: str, what: str) -> None:
    """The metric against the seconds that a training took: means over seeds, with standard deviations."""
    with figure(path) as axes:
        for i, group in enumerate(group for group in groups if group.values(metric)):
            values, seconds = list(group.values(metric).values()), [run.seconds() for run in group.runs()]
            errors = {"xerr": _spread(seconds), "yerr": _spread(values)}
            mark = "os^Dv<>P"[i // len(COLOURS) % 8]
            colour = COLOURS[i % len(COLOURS)]
            axes.errorbar(
                fmean(seconds), fmean(values), **errors, fmt=mark, color=colour, elinewidth=1, label=group.label
            )
        axes.set_xlabel("seconds per training, validation not counted")
        axes.set_ylabel(what)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))


def draw_lam(groups: Sequence[Group], path: Path, metric: str, what: str) -> None:
    """The metric against λ, a line for each sweep, at the best learning rate of each λ; other norms as lines across."""
    sweeps = sweeps_of(groups)
    with figure(path) as axes:
        for i, (name, sweep) in enumerate(sweeps.items()):
            found = [(group.arm.lam or 0.0, list(group.values(metric).values())) for group in sweep]
            points = [(lam, values) for lam, values in found if values]
            if not points:
                continue
            colour = COLOURS[(i + 1) % len(COLOURS)]
            aside = 1.05 ** (i - len(sweeps) // 2)  # or the error bars of one λ would cover each other
            axes.errorbar(
                [lam * aside for lam, _ in points],
                [fmean(values) for _, values in points],
                yerr=[_spread(values) or 0.0 for _, values in points],
                fmt="os^D"[i % 4] + STYLES[i % len(STYLES)],
                color=colour,
                capsize=3,
                label=name,
            )
        swept = {id(group) for sweep in sweeps.values() for group in sweep}
        for i, group in enumerate(group for group in groups if id(group) not in swept and group.values(metric)):
            values = list(group.values(metric).values())
            style: Any = {"color": "black", "alpha": 0.8}
            axes.axhline(fmean(values), linestyle=STYLES[i % len(STYLES)], linewidth=1, label=group.arm.name, **style)
            if group.verdict == BASELINE and len(values) > 1:
                axes.axhspan(fmean(values) - stdev(values), fmean(values) + stdev(values), color="black", alpha=0.08)
        lams = sorted({group.arm.lam or 0.0 for sweep in sweeps.values() for group in sweep})
        if lams[0]:
            axes.set_xscale("log", base=2)
        else:  # a norm too, and no place on a logarithmic axis
            axes.set_xscale("symlog", base=2, linthresh=next(filter(None, lams)), linscale=0.5)
        axes.set_xticks(lams, [f"{lam:g}" for lam in lams])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("λ")
        axes.set_ylabel(what)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))


def draw_stability(groups: Sequence[Group], path: Path) -> None:
    """Validation loss over λ × learning rate, a panel for each sweep; a cross where a training diverged."""
    sweeps = sweeps_of(groups)
    rates = sorted({rate for sweep in sweeps.values() for group in sweep for rate in group.tuning})
    found = [loss for group in groups for loss in group.tuned().values() if loss is not None]
    low = min(found)
    # What is a nat behind the best is as lost as what is three behind.
    high = min(max(found), low + 1.0)
    with figure(path, 1, len(sweeps)) as axes:
        panels = list(axes) if len(sweeps) > 1 else [axes]
        panels[0].figure.set_size_inches(1.0 + 2.9 * len(sweeps), 3.4)
        for panel, (name, sweep) in zip(panels, sweeps.items(), strict=True):
            table = [[_loss(group, rate) for rate in rates] for group in sweep]
            panel.imshow(table, cmap="viridis_r", vmin=low, vmax=high, aspect="auto", origin="lower")
            for y, group in enumerate(sweep):
                for x, rate in enumerate(rates):
                    loss = table[y][x]
                    text = f"{loss:.2f}" if not math.isnan(loss) else "×" if _diverged(group, rate) else ""
                    dark = math.isnan(loss) or loss < (low + high) / 2
                    panel.text(x, y, text, ha="center", va="center", fontsize=8, color="black" if dark else "white")
            panel.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
            panel.set_yticks(range(len(sweep)), [f"{group.arm.lam:g}" for group in sweep])
            panel.grid(False)
            panel.set_title(name, fontsize=10)
            panel.set_xlabel("learning rate")
        panels[0].set_ylabel("λ")


def sweeps_of(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Norms that differ in λ alone, three or more: what their names share → sorted by λ."""
    families: dict[str, list[Group]] = {}
    for group in groups:
        if group.arm.lam is not None:
            families.setdefault(group.arm.family, []).append(group)
    found: dict[str, list[Group]] = {}
    for family in families.values():
        if len(family) >= 3:
            title = re.sub(r" ?\blam=\S+", "", family[0].arm.name)
            while title in found:
                title += "'"
            found[title] = sorted(family, key=lambda group: group.arm.lam or 0.0)
    return found


def _shown(groups: Sequence[Group]) -> list[Group]:
    """Norms with a run, of each sweep the one with the least validation loss; the baseline first, then the best."""
    best: dict[str, Group] = {}
    swept = {id(group): name for name, sweep in sweeps_of(groups).items() for group in sweep}
    for group in sorted((group for group in groups if group.runs()), key=_validation):
        best.setdefault(swept.get(id(group), group.arm.name), group)
    chosen = sorted(best.values(), key=lambda group: (group.verdict != BASELINE, _validation(group)))
    return chosen[:SHOWN]


def _validation(group: Group) -> float:
    return fmean(group.values(VALIDATION).values())


def _smoothed(runs: Sequence[Run]) -> list[list[tuple[int, float]]]:
    """Step and training loss of each run, averaged over steps."""
    curves = []
    for run in runs:
        rows = [(row["step"], row["loss"]) for row in run.metrics if row["loss"] is not None]
        size = max(1, min(SMOOTH, len(rows) // 10))
        blocks = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
        curves.append([(block[-1][0], fmean(loss for _, loss in block)) for block in blocks])
    shortest = min(map(len, curves))  # a run may have skipped steps
    return [curve[:shortest] for curve in curves]


def _validated(runs: Sequence[Run]) -> list[list[tuple[int, float]]]:
    """Step and validation loss of each run."""
    return [[(row["step"], row[VALIDATION]) for row in run.metrics if row.get(VALIDATION) is not None] for run in runs]


def _second_half(panel: Any) -> None:
    """Show the losses from where half of the way down is done, or from where the highest curve ends."""
    curves = [line.get_ydata() for line in panel.get_lines()]
    if curves:
        low, high = min(map(min, curves)), max(map(max, curves))
        top = max(low + 0.55 * (high - low), max(curve[-1] for curve in curves) + 0.03 * (high - low))
        panel.set_ylim(low - 0.03 * (high - low), top)


def _loss(group: Group, rate: float) -> float:
    loss = group.tuned().get(rate)
    return math.nan if loss is None else loss


def _diverged(group: Group, rate: float) -> bool:
    return any(each.state == DIVERGED for each in group.tuning.get(rate, []))


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
