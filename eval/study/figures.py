"""The pictures of a study's report."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hf_ibnorm.report import plots
from hf_ibnorm.report.plots import COLOURS, MARKS, SMALL, STYLES, ForestLine, Points

from ..statistics import BETTER, WORSE
from .plan import VALIDATION, slug
from .results import BASELINE, metric_title
from .training import DIVERGED, Group

SHOWN = 8
"""Norms in one picture of losses; of a λ sweep only the best λ is drawn."""
SMOOTH = 20
"""Steps in a mean of the training loss."""


@dataclass(frozen=True)
class Curve:
    """The losses of one compared training as they are drawn: step and loss, the training loss averaged over steps."""

    condition: str
    norm: str
    seed: int
    training: Points
    validation: Points


CURVE = ("condition", "norm", "seed", "kind", "step", "loss")
"""Columns of `curves.csv`."""


def curves_of(groups: Sequence[Group]) -> list[Curve]:
    """The curves that are drawn: of norms with a run, the baseline first, then the best; of each sweep the best λ."""
    curves = []
    for condition in dict.fromkeys(group.condition for group in groups):
        for group in _shown([group for group in groups if group.condition == condition]):
            runs = group.runs()
            seeds = [seed for seed, training in group.finals.items() if training.run in runs]
            training = [plots.smoothed(run.curve("loss"), SMOOTH) for run in runs]
            shortest = min(map(len, training))  # a run may have skipped steps
            for seed, run, losses in zip(seeds, runs, training, strict=True):
                curves.append(Curve(condition, group.arm.name, seed, losses[:shortest], run.curve(VALIDATION)))
    return curves


def curve_rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """The curves as rows of `curves.csv`."""
    return [
        dict(zip(CURVE, (curve.condition, curve.norm, curve.seed, kind, *point), strict=True))
        for curve in curves
        for kind, points in (("training", curve.training), ("validation", curve.validation))
        for point in points
    ]


def draw_losses(curves: Sequence[Curve], baseline: str | None, path: Path) -> None:
    """Training loss, averaged over up to 20 steps, and by how much the validation loss differs from the baseline's:
    mean over seeds, band from best to worst. Without a baseline, the validation loss itself."""
    steps: dict[str, dict[int, list[float]]] = {}
    for curve in curves:
        steps.setdefault(curve.norm, {})[curve.seed] = [step for step, _ in curve.validation]
    if paired := baseline in steps and all(of_norm == steps[baseline] for of_norm in steps.values()):
        base = {curve.seed: dict(curve.validation) for curve in curves if curve.norm == baseline}
        differences = [[(step, loss - base[curve.seed][step]) for step, loss in curve.validation] for curve in curves]
        curves = [replace(curve, validation=points) for curve, points in zip(curves, differences, strict=True)]
    training = {name: [curve.training for curve in curves if curve.norm == name] for name in steps}
    validation = {name: [curve.validation for curve in curves if curve.norm == name] for name in steps}
    with plots.panels(path, 2, 2) as (left, right):
        # The axis fits the second half of the training loss: the ends are compared, not the beginnings.
        _draw_seeds(left, training, 0.5)
        _draw_seeds(right, validation, 0.0)
        left.set_title(f"training loss, nats per token, mean of {SMOOTH} steps")
        difference = f"validation loss, difference from {baseline}, nats per token"
        right.set_title(difference if paired else "validation loss, nats per token")
        plots.beside(right)


def _draw_seeds(panel: Any, curves: Mapping[str, Sequence[Points]], start: float) -> None:
    """For each name the mean over the curves of its seeds, with a band from the least to the greatest.

    The vertical axis need not show the first share `start` of the points.
    """
    late: dict[str, list[float]] = {}
    for i, (name, seeds) in enumerate(curves.items()):
        points = list(zip(*seeds, strict=False))  # a run may have skipped steps
        steps, values = [point[0][0] for point in points], [[loss for _, loss in point] for point in points]
        means = list(zip(steps, map(fmean, values), strict=True))
        style: Any = {"linestyle": STYLES[i // len(COLOURS) % len(STYLES)], "linewidth": 1.3}
        plots.draw_curve(panel, i, means, name, **style)
        least, most = list(map(min, values)), list(map(max, values))
        panel.fill_between(steps, least, most, color=plots.look(i)[0], alpha=0.15, linewidth=0)
        first = int(start * len(values))
        late[name] = least[first:] + most[first:]
    low, high = min(map(min, late.values())), max(map(max, late.values()))
    room = 0.06 * (high - low) or 0.1
    panel.set(xlabel="step", ylim=(low - room, high + room))
    plots.clip(panel, late)


def draw_cost(groups: Sequence[Group], path: Path, metric: str, title: str) -> None:
    """The metric against the seconds that a training took: means over seeds, with standard deviations.

    The norms of a sweep have one look, with λ beside each; a norm that is far off is a mark at the edge, with its
    number.
    """
    sweeps, known = _sweep_titles(groups), _centers(groups, metric)
    # The sweeps first: each has its colour of the picture over λ.
    names = list(dict.fromkeys([*sweeps.values(), *(sweeps.get(group, group.arm.name) for group in known)]))
    last, crowded = len(COLOURS) - 1, len(names) > len(COLOURS)
    low, high = plots.crowd([(y - error, y + error) for y, error in known.values()])
    room = 0.06 * (high - low) or 0.5
    low, high = low - room, high + room
    with plots.figure(path, height=4.2) as axes:
        entries: dict[str, Any] = {}
        for group, (y, error) in known.items():
            x, seconds = _center([run.seconds() for run in group.runs()])
            name = sweeps.get(group, group.arm.name)
            i = names.index(name)
            off, at = not low <= y <= high, min(max(y, low), high)
            # With more norms than colours, the last ones share a colour, and their names stand beside the marks.
            shared, colour = i >= last and crowded, COLOURS[min(i, last)]
            mark = ("^" if y > high else "v") if off else MARKS[i % len(MARKS)]
            look: Any = {"fmt": mark, "clip_on": not off, "color": colour, "elinewidth": 0.7, "alpha": 0.85}
            drawn = axes.errorbar(x, at, xerr=seconds, yerr=None if off else error, **look)
            texts = [f"{group.arm.lam:g}"] if group in sweeps else []
            texts += [name] if shared else []
            texts += [f"{group.arm.name}: {y:.4g}, off the scale"] if off else []
            place: Any = {"xytext": (6, -10 if off else 4), "textcoords": "offset points"}
            axes.annotate(", ".join(texts), (x, at), **place, fontsize=SMALL, color=colour)
            entries.setdefault("others" if shared else name, drawn)
        axes.set(ylim=(low, high), xlabel="seconds per training, validation not counted", ylabel=title)
        plots.beside(axes, entries, "numbers in the picture: λ" if sweeps else None)


def draw_lam(groups: Sequence[Group], path: Path, metric: str, title: str) -> None:
    """The metric against λ, a line for each sweep, at the best learning rate of each λ; other norms as lines across."""
    sweeps, swept, known = sweeps_of(groups), _sweep_titles(groups), _centers(groups, metric)
    lams = sorted({group.arm.lam or 0.0 for group in swept})
    shown = {}
    with plots.figure(path, height=4.2) as axes:
        for i, (name, sweep) in enumerate(sweeps.items()):
            aside = 1.05 ** (i - len(sweeps) // 2)  # or the error bars of one λ would cover each other
            points = [(group.arm.lam or 0.0, *known[group]) for group in sweep if group in known]
            for lam, y, error in points:
                shown[f"{name}, λ = {lam:g},"] = [y - error, y + error]
            if points:
                places, means, errors = zip(*[(lam * aside, y, error) for lam, y, error in points], strict=True)
                look: Any = {"color": COLOURS[i % len(COLOURS)], "elinewidth": 0.8, "capsize": 3, "label": name}
                axes.errorbar(places, means, yerr=errors, fmt=MARKS[i % len(MARKS)] + STYLES[i % len(STYLES)], **look)
        for i, group in enumerate(group for group in known if group not in swept):
            y, error = known[group]
            shown[group.arm.name] = [y]
            look = {"color": "black", "alpha": 0.8, "linewidth": 1, "label": group.arm.name}
            axes.axhline(y, linestyle=STYLES[i % len(STYLES)], **look)
            if group.verdict == BASELINE and error:
                axes.axhspan(y - error, y + error, color="black", alpha=0.08)
        if lams[0]:
            axes.set_xscale("log", base=2)
        else:  # 0 has no place on a logarithmic axis
            axes.set_xscale("symlog", base=2, linthresh=next(filter(None, lams)), linscale=0.5)
        axes.set_xticks(lams, [f"{lam:g}" for lam in lams])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="λ", ylabel=title)
        plots.clip(axes, shown)
        plots.beside(axes)


def _center(values: Collection[float]) -> tuple[float, float]:
    """Mean and standard deviation, which is 0 of a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _centers(groups: Sequence[Group], metric: str) -> dict[Group, tuple[float, float]]:
    """Mean and standard deviation of the metric, for each norm that has it."""
    return {group: _center(values) for group in groups if (values := group.values(metric).values())}


def draw_stability(groups: Sequence[Group], path: Path) -> None:
    """Validation loss over λ × learning rate, a panel for each sweep; a cross where a training diverged."""
    sweeps = sweeps_of(groups)
    rates = sorted({rate for sweep in sweeps.values() for group in sweep for rate in group.tuning})
    losses = [loss for group in groups for loss in group.tuned().values() if loss is not None]
    # The colours end one nat above the best loss: beyond it, a training is lost by however much.
    ends = min(losses), min(max(losses), min(losses) + 1.0)
    with plots.panels(path, len(sweeps), 3, 2.9) as flat:
        for panel, (name, sweep) in zip(flat, sweeps.items(), strict=True):
            table = [[group.tuned().get(rate) for rate in rates] for group in sweep]
            texts = [[_tuned_text(group, rate) for rate in rates] for group in sweep]
            plots.draw_heat(panel, table, texts, ends, cmap="viridis_r", origin="lower")
            panel.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
            panel.set_yticks(range(len(sweep)), [f"{group.arm.lam:g}" for group in sweep])
            panel.set_title(name)
        flat[0].figure.supxlabel("learning rate; × diverged")
        flat[0].figure.supylabel("λ")


def _tuned_text(group: Group, rate: float) -> str:
    if (loss := group.tuned().get(rate)) is not None:
        return f"{loss:.2f}"
    return "×" if DIVERGED in group.tuning_states(rate) else ""


def sweeps_of(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Three or more norms that differ in λ alone: the common part of their names → the norms, sorted by λ."""
    families: dict[str, list[Group]] = {}
    for group in groups:
        if group.arm.lam is not None:
            families.setdefault(group.arm.family, []).append(group)
    sweeps: dict[str, list[Group]] = {}
    for family in families.values():
        if len(family) >= 3:
            title = re.sub(r" ?\blam=\S+", "", family[0].arm.name)
            while title in sweeps:
                title += "'"
            sweeps[title] = sorted(family, key=lambda group: group.arm.lam or 0.0)
    return sweeps


def _sweep_titles(groups: Sequence[Group]) -> dict[Group, str]:
    """Norm of a sweep → the sweep's title."""
    return {group: title for title, sweep in sweeps_of(groups).items() for group in sweep}


def _shown(groups: Sequence[Group]) -> list[Group]:
    """Norms with a run, of each sweep the one with the least validation loss; the baseline first, then the best."""
    losses = {group: fmean(group.values(VALIDATION).values()) for group in groups if group.runs()}
    best: dict[str, Group] = {}
    sweeps = _sweep_titles(groups)
    for group in sorted(losses, key=losses.__getitem__):
        best.setdefault(sweeps.get(group, group.arm.name), group)
    return sorted(best.values(), key=lambda group: (group.verdict != BASELINE, losses[group]))[:SHOWN]


def draw_pictures(
    groups: Sequence[Group], curves: Sequence[Curve], output: Path, metric: str
) -> list[tuple[str, Path]]:
    """Draw every picture that there are data for into a folder: title and file."""
    about, drawn = metric_title(groups, metric), list[tuple[str, Path]]()

    def add(title: str, name: str) -> Path:
        drawn.append((title, output / f"{name}.png"))
        return output / f"{name}.png"

    lines = []
    for group in groups:
        if paired := group.paired:  # its mark is filled where there is a verdict
            filled = group.verdict in (BETTER, WORSE)
            lines.append(ForestLine(group.label, paired.mean, paired.interval, group.differences, filled))
    if lines:
        path = add("differences from the baseline", "forest")
        plots.plot_forest(lines, path, f"difference from the baseline: {about}")
    for condition in dict.fromkeys(group.condition for group in groups):
        here = [group for group in groups if group.condition == condition]
        where, end = (f" ({condition})", f"-{slug(condition)}") if condition else ("", "")
        if shown := [curve for curve in curves if curve.condition == condition]:
            base = next((group.arm.name for group in here if group.verdict == BASELINE), None)
            draw_losses(shown, base, add(f"losses{where}", f"losses{end}"))
        swept = _sweep_titles(here)
        if any(group.values(metric) for group in here):
            draw_cost(here, add(f"quality against time{where}", f"cost{end}"), metric, about)
            if swept:
                draw_lam(here, add(f"quality against λ{where}", f"lambda{end}"), metric, about)
        if any(len(group.tuning) > 1 and any(group.tuned().values()) for group in swept):
            title = f"where it breaks: validation loss over λ and learning rate{where}"
            draw_stability(here, add(title, f"stability{end}"))
    return drawn
