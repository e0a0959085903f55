"""The pictures of a study's report."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hf_ibnorm.report import plots
from hf_ibnorm.report.plots import COLOURS, MARKS, SMALL, STYLES, ForestLine, Points

from ..compare import BETTER, WORSE
from .plan import VALIDATION
from .results import BASELINE, Group
from .training import DIVERGED

SHOWN = 8
"""Norms in one picture of losses; of a λ sweep only the best λ is drawn."""
SMOOTH = 20
"""Steps in a mean of the training loss."""


@dataclass(frozen=True)
class Curve:
    """Losses of one compared training, as they are drawn.

    Args:
        condition, norm, seed: of the training.
        training: step and training loss, averaged over steps.
        validation: step and validation loss.
    """

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
            seeds = [seed for seed, each in group.finals.items() if each.run in runs]
            training = [plots.smoothed(run.curve("loss"), SMOOTH) for run in runs]
            shortest = min(map(len, training))  # a run may have skipped steps
            for seed, run, losses in zip(seeds, runs, training, strict=True):
                curves.append(Curve(condition, group.arm.name, seed, losses[:shortest], run.curve(VALIDATION)))
    return curves


def curve_rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """The same as rows of `curves.csv`."""
    return [
        dict(zip(CURVE, (each.condition, each.norm, each.seed, kind, *point), strict=True))
        for each in curves
        for kind, points in (("training", each.training), ("validation", each.validation))
        for point in points
    ]


def draw_losses(curves: Sequence[Curve], baseline: str | None, path: Path) -> None:
    """Training loss, averaged over up to 20 steps, and by how much the validation loss differs from the baseline's:
    mean over seeds, band from best to worst. Without a baseline, the validation loss itself."""
    names = list(dict.fromkeys(each.norm for each in curves))
    training = {name: [each.training for each in curves if each.norm == name] for name in names}
    validation = {name: {each.seed: each.validation for each in curves if each.norm == name} for name in names}
    base = validation.get(baseline or "", {})
    if paired := bool(base) and all(_steps(each) == _steps(base) for each in validation.values()):
        validation = {
            name: {
                seed: [(step, loss - other) for (step, loss), (_, other) in zip(points, base[seed], strict=True)]
                for seed, points in each.items()
            }
            for name, each in validation.items()
        }
    with plots.panels(path, 2, 2) as (left, right):
        # The axis fits the second half of the training loss: the ends are compared, not the beginnings.
        _draw_seeds(left, training, 0.5)
        _draw_seeds(right, {name: list(each.values()) for name, each in validation.items()}, 0.0)
        left.set_title(f"training loss, nats per token, mean of {SMOOTH} steps")
        difference = f"validation loss, difference from {baseline}, nats per token"
        right.set_title(difference if paired else "validation loss, nats per token")
        plots.beside(right)


def _draw_seeds(panel: Any, curves: Mapping[str, Sequence[Points]], start: float) -> None:
    """The mean over the curves of each name, with a band from the least to the greatest.

    Args:
        panel: to draw on; its vertical axis is made for what comes after `start`.
        curves: name → points of each seed, at the same steps.
        start: a share of the points.
    """
    late = {}
    for i, (name, seeds) in enumerate(curves.items()):
        style: Any = {"linestyle": STYLES[i // len(COLOURS) % len(STYLES)], "linewidth": 1.3}
        points = list(zip(*seeds, strict=False))  # a run may have skipped steps
        steps, values = [each[0][0] for each in points], [[loss for _, loss in each] for each in points]
        plots.draw_curve(
            panel, i, [(step, fmean(each)) for step, each in zip(steps, values, strict=True)], name, **style
        )
        ends = [min(each) for each in values], [max(each) for each in values]
        panel.fill_between(steps, *ends, color=plots.look(i)[0], alpha=0.15, linewidth=0)
        late[name] = [end for each in ends for end in each[int(start * len(values)) :]]
    shown = [value for values in late.values() for value in values]
    room = 0.06 * (max(shown) - min(shown)) or 0.1
    panel.set_ylim(min(shown) - room, max(shown) + room)
    plots.clip(panel, late)
    panel.set_xlabel("step")


def forest_lines(groups: Sequence[Group]) -> list[ForestLine]:
    """Lines of the forest plot: differences from the baseline, a tick for each seed; filled where one is a verdict."""
    return [
        ForestLine(
            each.label, each.paired.mean, each.paired.interval, each.differences, each.verdict in (BETTER, WORSE)
        )
        for each in groups
        if each.paired
    ]


def draw_cost(groups: Sequence[Group], path: Path, metric: str, what: str) -> None:
    """The metric against the seconds that a training took: means over seeds, with standard deviations.

    The norms of a sweep have one look, with λ beside each; one that is far off is a mark at the edge, with its number.
    """
    points = [
        (group, *_center(group.values(metric).values()), *_center([run.seconds() for run in group.runs()]))
        for group in groups
        if group.values(metric)
    ]
    families = {id(group): name for name, sweep in sweeps_of(groups).items() for group in sweep}
    # A sweep has its colour of the picture over λ.
    names = list(dict.fromkeys([*sweeps_of(groups), *(families.get(id(each[0]), each[0].arm.name) for each in points)]))
    last, crowded = len(COLOURS) - 1, len(names) > len(COLOURS)
    low, high = plots.crowd([(y - error, y + error) for _, y, error, _, _ in points])
    room = 0.06 * (high - low) or 0.5
    low, high = low - room, high + room
    with plots.figure(path, height=4.2) as axes:
        entries: dict[str, Any] = {}
        for group, y, error, x, seconds in points:
            name = families.get(id(group), group.arm.name)
            i = names.index(name)
            off, at = not low <= y <= high, min(max(y, low), high)
            look: Any = {"fmt": ("^" if y > high else "v") if off else MARKS[i % len(MARKS)], "clip_on": not off}
            # With more norms than colours, the last ones share a colour, and their names stand beside the marks.
            look |= {"color": COLOURS[min(i, last)], "elinewidth": 0.7, "alpha": 0.85}
            drawn = axes.errorbar(x, at, xerr=seconds, yerr=None if off else error, **look)
            texts = [f"{group.arm.lam:g}"] if id(group) in families else []
            texts += [name] if i >= last and crowded else []
            texts += [f"{group.arm.name}: {y:.4g}, off the scale"] if off else []
            side: Any = {"textcoords": "offset points", "fontsize": SMALL, "color": look["color"]}
            axes.annotate(", ".join(texts), (x, at), (6, -10 if off else 4), **side)
            entries.setdefault("others" if i >= last and crowded else name, drawn)
        axes.set(ylim=(low, high), xlabel="seconds per training, validation not counted", ylabel=what)
        plots.beside(axes, entries, "numbers in the picture: λ" if families else None)


def draw_lam(groups: Sequence[Group], path: Path, metric: str, what: str) -> None:
    """The metric against λ, a line for each sweep, at the best learning rate of each λ; other norms as lines across."""
    sweeps, shown = sweeps_of(groups), {}
    lams = sorted({group.arm.lam or 0.0 for sweep in sweeps.values() for group in sweep})
    swept = {id(group) for sweep in sweeps.values() for group in sweep}
    with plots.figure(path, height=4.2) as axes:
        for i, (name, sweep) in enumerate(sweeps.items()):
            known = [group for group in sweep if group.values(metric)]
            aside = 1.05 ** (i - len(sweeps) // 2)  # or the error bars of one λ would cover each other
            points = [((group.arm.lam or 0.0) * aside, *_center(group.values(metric).values())) for group in known]
            for group, (_, y, error) in zip(known, points, strict=True):
                shown[f"{name}, λ = {group.arm.lam:g},"] = [y - error, y + error]
            if points:
                places, means, errors = zip(*points, strict=True)
                look: Any = {"color": COLOURS[i % len(COLOURS)], "elinewidth": 0.8, "capsize": 3, "label": name}
                axes.errorbar(places, means, yerr=errors, fmt=MARKS[i % len(MARKS)] + STYLES[i % len(STYLES)], **look)
        for i, group in enumerate(group for group in groups if id(group) not in swept and group.values(metric)):
            y, error = _center(group.values(metric).values())
            shown[group.arm.name] = [y]
            look = {"color": "black", "alpha": 0.8, "linewidth": 1, "label": group.arm.name}
            axes.axhline(y, linestyle=STYLES[i % len(STYLES)], **look)
            if group.verdict == BASELINE and error:
                axes.axhspan(y - error, y + error, color="black", alpha=0.08)
        if lams[0]:
            axes.set_xscale("log", base=2)
        else:  # a norm too, and no place on a logarithmic axis
            axes.set_xscale("symlog", base=2, linthresh=next(filter(None, lams)), linscale=0.5)
        axes.set_xticks(lams, [f"{lam:g}" for lam in lams])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="λ", ylabel=what)
        plots.clip(axes, shown)
        plots.beside(axes)


def _center(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation, which is 0 of a single value."""
    values = list(values)
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


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


def _steps(curves: Mapping[int, Points]) -> dict[int, list[float]]:
    return {seed: [step for step, _ in curve] for seed, curve in curves.items()}


def _tuned_text(group: Group, rate: float) -> str:
    if (loss := group.tuned().get(rate)) is not None:
        return f"{loss:.2f}"
    return "×" if any(each.state == DIVERGED for each in group.tuning.get(rate, [])) else ""
