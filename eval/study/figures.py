"""The pictures of a study's report."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hf_ibnorm.report.plots import (
    COLOURS,
    MARKS,
    SMALL,
    STYLES,
    Estimate,
    Points,
    beside,
    clip,
    crowd,
    draw_curve,
    figure,
    look,
    panels,
    smoothed,
)

from ..compare import BETTER, WORSE
from .plan import VALIDATION
from .results import BASELINE, Group
from .training import DIVERGED

SHOWN = 8
"""Norms in one picture of losses; of a λ sweep only the best λ is drawn."""
SMOOTH = 20
"""Steps that the training loss is averaged over."""


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
    training: Sequence[tuple[int, float]]
    validation: Sequence[tuple[int, float]]


CURVE = ("condition", "norm", "seed", "kind", "step", "loss")
"""Columns of `curves.csv`."""


def curves_of(groups: Sequence[Group]) -> list[Curve]:
    """The curves that are drawn: of norms with a run, the baseline first, then the best; of each sweep the best λ."""
    curves = []
    for condition in dict.fromkeys(group.condition for group in groups):
        for group in _shown([group for group in groups if group.condition == condition]):
            runs = group.runs()
            seeds = [seed for seed, each in group.finals.items() if each.run in runs]
            training = [smoothed(run.curve("loss"), SMOOTH) for run in runs]
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
    with panels(path, 2, 2) as (left, right):
        # Where a norm ends is what counts, and the second half of its training loss leads there.
        _draw_seeds(left, training, 0.5)
        _draw_seeds(right, {name: list(each.values()) for name, each in validation.items()}, 0.0)
        left.set_title(f"training loss, nats per token, mean of {SMOOTH} steps")
        difference = f"validation loss, difference from {baseline}, nats per token"
        right.set_title(difference if paired else "validation loss, nats per token")
        beside(right)


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
        draw_curve(panel, i, [(step, fmean(each)) for step, each in zip(steps, values, strict=True)], name, **style)
        ends = [min(each) for each in values], [max(each) for each in values]
        panel.fill_between(steps, *ends, color=look(i)[0], alpha=0.15, linewidth=0)
        late[name] = [end for each in ends for end in each[int(start * len(values)) :]]
    shown = [value for values in late.values() for value in values]
    room = 0.06 * (max(shown) - min(shown)) or 0.1
    panel.set_ylim(min(shown) - room, max(shown) + room)
    clip(panel, late)
    panel.set_xlabel("step")


def estimates(groups: Sequence[Group]) -> list[Estimate]:
    """Lines of the forest plot: differences from the baseline, a tick for each seed; filled where one is a verdict."""
    return [
        Estimate(each.label, each.paired.mean, each.paired.interval, each.differences, each.verdict in (BETTER, WORSE))
        for each in groups
        if each.paired
    ]


def draw_cost(groups: Sequence[Group], path: Path, metric: str, what: str) -> None:
    """The metric against the seconds that a training took: means over seeds, with standard deviations.

    The norms of a sweep have one look, with λ beside each; what is far off is a mark at the edge, with its number.
    """
    found = [
        (group, list(group.values(metric).values()), [run.seconds() for run in group.runs()])
        for group in groups
        if group.values(metric)
    ]
    families = {id(group): name for name, sweep in sweeps_of(groups).items() for group in sweep}
    # A sweep has its colour of the picture over λ.
    names = list(dict.fromkeys([*sweeps_of(groups), *(families.get(id(group), group.arm.name) for group, *_ in found)]))
    low, high = crowd([(fmean(values) - _error(values), fmean(values) + _error(values)) for _, values, _ in found])
    room = 0.06 * (high - low) or 0.5
    with figure(path, height=4.2) as axes:
        entries: dict[str, Any] = {}
        for group, values, seconds in found:
            name = families.get(id(group), group.arm.name)
            i = names.index(name)
            x, y = fmean(seconds), fmean(values)
            # Norms that are more than there are colours share the last one, and have their names beside them.
            colour, mark = COLOURS[min(i, len(COLOURS) - 1)], MARKS[i % len(MARKS)]
            off = not low - room <= y <= high + room
            drawn = axes.errorbar(
                x,
                high + room if off and y > high else low - room if off else y,
                xerr=_spread(seconds),
                yerr=None if off else _spread(values),
                fmt=("^" if y > high else "v") if off else mark,
                color=colour,
                elinewidth=0.7,
                alpha=0.85,
                clip_on=not off,
            )
            texts = [f"{group.arm.lam:g}"] if id(group) in families else []
            texts += [name] if i >= len(COLOURS) - 1 and len(names) > len(COLOURS) else []
            texts += [f"{group.arm.name}: {y:.4g}, off the scale"] if off else []
            side: Any = {"textcoords": "offset points", "fontsize": SMALL, "color": colour}
            axes.annotate(
                ", ".join(texts), (x, min(max(y, low - room), high + room)), (6, 4 if not off else -10), **side
            )
            entries.setdefault(name if i < len(COLOURS) - 1 or len(names) <= len(COLOURS) else "others", drawn)
        axes.set_ylim(low - room, high + room)
        axes.set_xlabel("seconds per training, validation not counted")
        axes.set_ylabel(what)
        beside(axes, entries, "numbers in the picture: λ" if families else None)


def draw_lam(groups: Sequence[Group], path: Path, metric: str, what: str) -> None:
    """The metric against λ, a line for each sweep, at the best learning rate of each λ; other norms as lines across."""
    sweeps, shown = sweeps_of(groups), {}
    with figure(path, height=4.2) as axes:
        for i, (name, sweep) in enumerate(sweeps.items()):
            found = [(group.arm.lam or 0.0, list(group.values(metric).values())) for group in sweep]
            points = [(lam, values) for lam, values in found if values]
            if not points:
                continue
            for lam, values in points:
                shown[f"{name}, λ = {lam:g},"] = [fmean(values) + sign * _error(values) for sign in (-1, 1)]
            colour = COLOURS[i % len(COLOURS)]
            aside = 1.05 ** (i - len(sweeps) // 2)  # or the error bars of one λ would cover each other
            axes.errorbar(
                [lam * aside for lam, _ in points],
                [fmean(values) for _, values in points],
                yerr=[_spread(values) or 0.0 for _, values in points],
                fmt=MARKS[i % len(MARKS)] + STYLES[i % len(STYLES)],
                color=colour,
                elinewidth=0.8,
                capsize=3,
                label=name,
            )
        swept = {id(group) for sweep in sweeps.values() for group in sweep}
        for i, group in enumerate(group for group in groups if id(group) not in swept and group.values(metric)):
            values = list(group.values(metric).values())
            shown[group.arm.name] = [fmean(values)]
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
        clip(axes, shown)
        beside(axes)


def draw_stability(groups: Sequence[Group], path: Path) -> None:
    """Validation loss over λ × learning rate, a panel for each sweep; a cross where a training diverged."""
    sweeps = sweeps_of(groups)
    rates = sorted({rate for sweep in sweeps.values() for group in sweep for rate in group.tuning})
    losses = [loss for group in groups for loss in group.tuned().values() if loss is not None]
    low = min(losses)
    # What is a nat behind the best is as lost as what is three behind.
    high = min(max(losses), low + 1.0)
    with panels(path, len(sweeps), 3, 2.9) as flat:
        for panel, (name, sweep) in zip(flat, sweeps.items(), strict=True):
            table = [[_loss(group, rate) for rate in rates] for group in sweep]
            panel.imshow(table, cmap="viridis_r", vmin=low, vmax=high, aspect="auto", origin="lower")
            for y, group in enumerate(sweep):
                for x, (rate, loss) in enumerate(zip(rates, table[y], strict=True)):
                    text = f"{loss:.2f}" if not math.isnan(loss) else "×" if _diverged(group, rate) else ""
                    dark = math.isnan(loss) or loss < (low + high) / 2
                    place: Any = {"ha": "center", "va": "center", "fontsize": SMALL}
                    panel.text(x, y, text, color="black" if dark else "white", **place)
            panel.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
            panel.set_yticks(range(len(sweep)), [f"{group.arm.lam:g}" for group in sweep])
            panel.grid(False)
            panel.set_title(name)
        flat[0].figure.supxlabel("learning rate; × diverged")
        flat[0].figure.supylabel("λ")


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


def _steps(curves: Mapping[int, Sequence[tuple[int, float]]]) -> dict[int, list[int]]:
    return {seed: [step for step, _ in curve] for seed, curve in curves.items()}


def _loss(group: Group, rate: float) -> float:
    loss = group.tuned().get(rate)
    return math.nan if loss is None else loss


def _diverged(group: Group, rate: float) -> bool:
    return any(each.state == DIVERGED for each in group.tuning.get(rate, []))


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _error(values: Sequence[float]) -> float:
    return _spread(values) or 0.0
