"""The pictures of the information plane: name of a model → its points, drawn as the module `pictures` says."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...report.plots import above, look, panels
from ..plane import PlanePoint
from . import axes
from .pictures import MARGIN

ESTIMATOR_NAMES = {"renyi": "Rényi", "ksg": "KSG"}
Models = Mapping[str, Sequence[PlanePoint]]


def draw_plane(models: Models, path: Path) -> bool:
    """The information plane: a panel for each model and estimator, a curve through the steps for each site.

    Sites are coloured by depth, dark first. A large point is the last step; its bars are 95 % intervals.
    """
    known, estimators = _known(models)
    if not known:
        return False
    depth = axes.Depth({name: list(dict.fromkeys(each.site for each in models[name])) for name in known})
    columns = min(3, len(known)) if len(known) > 1 else len(estimators)
    count, names_at = 0, dict[str, dict[int, str]]()  # estimator → place of a panel → model
    for estimator in estimators:
        start = -(-count // columns) * columns if len(known) > 1 else count  # each estimator starts a row
        names = [name for name in known if any(each.estimator == estimator for each in known[name])]
        names_at[estimator] = dict(enumerate(names, start))
        count = start + len(names)
    with panels(path, count, columns, 2.2, MARGIN) as flat:
        shown = [flat[i] for own in names_at.values() for i in own]
        for panel in set(flat) - set(shown):
            panel.remove()
        for estimator, own in names_at.items():
            axes.share([flat[i] for i in own], "xy")
            for i, name in own.items():
                panel = flat[i]
                panel.tick_params(labelleft=not i % columns or i - 1 not in own, labelbottom=i + columns not in own)
                for site, place in zip(depth.sites[name], axes.relative(len(depth.sites[name])), strict=True):
                    points = [each for each in known[name] if (each.estimator, each.site) == (estimator, site)]
                    _draw_path(panel, points, axes.depth_colours()(place))
                axes.set_title(panel, f"{ESTIMATOR_NAMES.get(estimator, estimator)}, {name}", columns)
        axes.depth_bar(shown, depth.names)
        flat[0].figure.supxlabel("I(X;T), nats; large points: last step, bars: 95 % intervals")
        flat[0].figure.supylabel("I(T;Y), nats")
    return True


def _draw_path(panel: Any, points: Sequence[PlanePoint], colour: Any) -> None:
    """The way of a site through the plane, step by step, its last point marked."""
    if not points:
        return
    x, y = ([getattr(each, field).value for each in points] for field in ("input", "output"))
    panel.plot(x, y, "o-", color=colour, linewidth=1.0, markersize=2)
    panel.plot(x[-1:], y[-1:], "o", color=colour, markersize=5, markeredgecolor="black", markeredgewidth=0.5, zorder=4)
    across, along = points[-1].input.interval, points[-1].output.interval
    for ends in ((across, y[-1:] * 2), (x[-1:] * 2, along)):
        if None not in ends:
            panel.plot(*ends, color=colour, linewidth=0.8, alpha=0.6, zorder=1)


def draw_ib(models: Models, path: Path) -> bool:
    """The IB value over depth at each model's last step, with its 95 % interval: a panel for each estimator."""
    last = {name: [each for each in points if each.step == points[-1].step] for name, points in models.items()}
    known, estimators = _known(last)
    if not known:
        return False
    depth = axes.Depth({name: list(dict.fromkeys(each.site for each in last[name])) for name in known})
    betas = ", ".join(sorted({f"{each.beta:g}" for points in known.values() for each in points}))
    with panels(path, len(estimators), min(2, len(estimators)), 3.0, MARGIN) as flat:
        for panel, estimator in zip(flat, estimators, strict=True):
            for name, points in known.items():
                i, places = list(models).index(name), depth.places(name, list(models))
                estimates: dict[str, Any] = {each.site: each.ib for each in points if each.estimator == estimator}
                curve = [estimates[site].value if site in estimates else math.nan for site in depth.sites[name]]
                if axes.any_finite(curve):
                    axes.draw_marked_curve(panel, i, places, curve, name)
                for site, place in zip(depth.sites[name], places, strict=True):
                    if site in estimates and estimates[site].interval is not None:
                        panel.plot([place] * 2, estimates[site].interval, color=look(i)[0], linewidth=1.0)
            panel.set_title(f"{ESTIMATOR_NAMES.get(estimator, estimator)}, β = {betas}")
        depth.label(flat)
        flat[0].set_ylabel("I(T;Y) - β·I(X;T), nats")
        above(flat, list(known))
    return True


def _known(models: Models) -> tuple[dict[str, list[PlanePoint]], list[str]]:
    """The points with an estimate, of the models that have such points; and their estimators, Rényi's first."""
    known = {name: [each for each in points if each.ib.value is not None] for name, points in models.items()}
    known = {name: points for name, points in known.items() if points}
    return known, sorted({each.estimator for points in known.values() for each in points}, reverse=True)
