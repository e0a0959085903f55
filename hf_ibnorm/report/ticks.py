"""Labels of logarithmic axes as plain text. It imports matplotlib."""

import re
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogFormatterMathtext

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
WRITTEN_OUT = 3
"""Powers of ten up to this exponent, and down to its negative, are written as a number."""


class PlainLog(Formatter):
    """What a matplotlib formatter of a logarithmic axis labels, without the markup that it writes."""

    def __init__(self, inner: LogFormatterMathtext) -> None:
        self.inner = inner

    def set_axis(self, axis: Any) -> None:
        """The axis that is labelled."""
        super().set_axis(axis)
        self.inner.set_axis(axis)

    def set_locs(self, locs: Any) -> None:
        """The places of the ticks, which decide what is labelled."""
        super().set_locs(locs)
        self.inner.set_locs(locs)

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label at `x`, empty where there is none."""
        return plain(self.inner(x, pos))


def plain(text: str) -> str:
    r"""`$\mathdefault{2\times10^{-3}}$` as `0.002`, and `$\mathdefault{10^{7}}$` as `10⁷`; other text as it is."""
    text = re.sub(r"^\$\\mathdefault\{(.*)\}\$$", r"\1", text)
    if not (match := re.fullmatch(r"(-?)(?:([\d.]+)\\times)?([\d.]+)\^\{(-?[\d.]+)\}", text)):
        return text.replace("-", "−")
    sign, factor, base, exponent = match.groups()
    if base != "10" or abs(float(exponent)) <= WRITTEN_OUT:
        return f"{sign}{float(factor or 1) * float(base) ** float(exponent):.4g}".replace("-", "−")
    return f"{sign}{f'{factor}·' if factor else ''}{base}{exponent.translate(_RAISED)}".replace("-", "−")


def plain_ticks(figure: Figure) -> None:
    """Let every logarithmic axis of a figure write plain text."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            for kind in ("major", "minor"):
                if isinstance(inner := getattr(axis, f"get_{kind}_formatter")(), LogFormatterMathtext):
                    getattr(axis, f"set_{kind}_formatter")(PlainLog(inner))
