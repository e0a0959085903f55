"""Parts that the pictures of diagnostics share: the axis of depth, names of sites, titles and ticks of panels."""

import math
import re
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from ...report.plots import MARKS, WIDTH, draw_curve

NAMED = 12
"""Site names on one axis; of more sites every n-th is named."""
REFERENCE = {"color": "0.35", "linewidth": 1.0}
"""Look of a line at the number where there is nothing to see."""


def short_site(site: str) -> str:
    """A site's name for an axis: "model.layers.3.post_attention_layernorm" is "3.post"; other text stays as it is."""
    if match := re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)\.(?:\w+\.)*(\w+)", site):
        return f"{match[1]}.{match[2].removesuffix('_layernorm').removesuffix('_attention')}"
    return site.rpartition(".")[2] if re.fullmatch(r"(.*\.)?(norm|ln_f)", site) else site


def thinned(count: int, most: int) -> list[int]:
    """Indices of every n-th of `count`, n even as a block has two norms, and of the last; about `most` in all."""
    if count <= most:
        return list(range(count))
    step = 2 * -(-count // (2 * most))
    return [i for i in range(0, count - 1, step) if count - 1 - i > step / 2] + [count - 1]


def relative(count: int) -> list[float]:
    """Places from 0, the first of `count`, to 1, the last."""
    return [i / max(1, count - 1) for i in range(count)]


class Depth:
    """The axis of depth that several models share: by the names of their sites, or by relative place from 0 to 1.

    Args:
        sites: name of a model → its sites.
    """

    def __init__(self, sites: Mapping[str, Sequence[str]]) -> None:
        names = [[short_site(site) for site in each] for each in sites.values()]
        self.sites, self.names = sites, names[0] if all(each == names[0] for each in names) else []

    def places(self, name: str, beside: Sequence[str] = ()) -> list[float]:
        """Where the sites of a model are on the axis, a little aside for each of the models drawn `beside` it."""
        aside = 0.08 * (beside.index(name) - (len(beside) - 1) / 2) if beside else 0.0
        last = 1 if self.names else max(1, len(self.sites[name]) - 1)
        return [(i + aside) / last for i in range(len(self.sites[name]))]

    def label(self, panels: Sequence[Any]) -> None:
        """Ticks of the panels, and the title of the axis below them all."""
        for panel in panels:
            if self.names:
                named = thinned(len(self.names), NAMED)
                panel.set_xticks(named, [self.names[i] for i in named], rotation=90)
            else:
                panel.set_xticks([0, 0.5, 1], ["first", "middle", "last"])
        ends = "from the embedding to the output" if self.names else "from the first to the last of each model"
        panels[0].figure.supxlabel(f"norm, {ends}")


def depth_colours() -> Any:
    """A colour map from 0 to 1 without its brightest end, which is not seen on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](range(225)))


def depth_bar(panels: Sequence[Any], names: Sequence[str] = ()) -> None:
    """A bar of the colours of depth, with the names of the sites where they are given."""
    from matplotlib.cm import ScalarMappable

    bar = panels[0].figure.colorbar(ScalarMappable(cmap=depth_colours()), ax=panels, aspect=40, pad=0.02)
    places = relative(len(names))
    ticks = {places[i]: names[i] for i in thinned(len(names), 2 * NAMED)} or {0.0: "first", 1.0: "last"}
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.set_label("norm")


def share(panels: Sequence[Any], axes: str) -> None:
    """Give panels the same limits of "x", "y" or "xy". Call it before anything is drawn, or curves are cut off."""
    for panel in panels[1:]:
        for axis in axes:
            getattr(panel, f"share{axis}")(panels[0])


def set_title(panel: Any, text: str, columns: int) -> None:
    """A title over a panel that is one of `columns` across, wrapped so that it ends before the next panel's."""
    panel.set_title("\n".join(wrap(text, int(10.5 * WIDTH / columns) - 4)))


def outer_ticks(panel: Any, i: int, count: int, columns: int) -> None:
    """Keep the tick labels of the i-th of `count` panels only at the left and the lower edge of the grid."""
    panel.tick_params(labelleft=i % columns == 0, labelbottom=i + columns >= count)


def draw_marked_curve(panel: Any, i: int, places: Sequence[float], values: Sequence[float], name: str) -> None:
    """The i-th curve with a mark at every site."""
    points = list(zip(places, values, strict=True))
    draw_curve(panel, i, points, name, marker=MARKS[i % len(MARKS)], markersize=3.5 if len(places) <= 30 else 1.8)


def any_finite(values: Sequence[float]) -> bool:
    """Whether there is anything to draw."""
    return any(map(math.isfinite, values))
