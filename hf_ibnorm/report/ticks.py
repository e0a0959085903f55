"""Labels of logarithmic axes as plain text. It imports matplotlib."""

import re

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterMathtext

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
WRITTEN_OUT = 3
"""Powers of ten up to this exponent, and down to its negative, are written as a number."""


def plain(text: str) -> str:
    r"""`$\mathdefault{2\times10^{-3}}$` as `0.002`, and `$\mathdefault{10^{7}}$` as `10⁷`; other text as it is."""
    text = re.sub(r"^\$\\mathdefault\{(.*)\}\$$", r"\1", text)
    if match := re.fullmatch(r"(-?)(?:([\d.]+)\\times)?([\d.]+)\^\{(-?[\d.]+)\}", text):
        sign, factor, base, exponent = match.groups()
        if base != "10" or abs(float(exponent)) <= WRITTEN_OUT:
            text = f"{sign}{float(factor or 1) * float(base) ** float(exponent):.4g}"
        else:
            text = f"{sign}{f'{factor}·' if factor else ''}{base}{exponent.translate(_RAISED)}"
    return text.replace("-", "−")


def plain_ticks(figure: Figure) -> None:
    """Let every logarithmic axis of a figure write plain text."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        for formatter in (axis.get_major_formatter(), axis.get_minor_formatter()):
            if isinstance(formatter, LogFormatterMathtext):
                _write_plain(formatter)


def _write_plain(formatter: LogFormatterMathtext) -> None:
    with_markup = formatter.format_ticks

    def format_ticks(values: list[float]) -> list[str]:
        return [plain(label) for label in with_markup(values)]

    formatter.format_ticks = format_ticks  # type: ignore[method-assign]
