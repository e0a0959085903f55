"""Tables, written for a terminal, as Markdown, LaTeX or CSV."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "±": r"$\pm$", "λ": r"$\lambda$", "~": r"\textasciitilde{}", "^": r"\^{}"}
)


@dataclass
class Table:
    """A table of text.

    Args:
        columns: headings.
        rows: a cell for each column.
        text: how many columns hold words, from the left; the others, of numbers, are aligned to the right.
    """

    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    text: int = 1

    def markdown(self) -> str:
        """As GitHub Markdown, ending in a newline."""
        rule = ["---"] * self.text + ["---:"] * (len(self.columns) - self.text)
        lines = [[cell.replace("|", "\\|") for cell in row] for row in [self.columns, rule, *self.rows]]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def latex(self, caption: str) -> str:
        """As a LaTeX table with the rules of the package booktabs, ending in a newline."""
        cells = [[cell.translate(_LATEX) for cell in row] for row in [self.columns, *self.rows]]
        head, *body = [" & ".join(row) + r" \\" for row in cells]
        aligned = "l" * self.text + "r" * (len(self.columns) - self.text)
        begin = [r"\begin{table}", rf"\caption{{{caption.translate(_LATEX)}}}", rf"\begin{{tabular}}{{{aligned}}}"]
        end = [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
        return "\n".join([*begin, r"\toprule", head, r"\midrule", *body, *end])

    def print(self) -> None:
        """Print the table, as wide as the terminal; 200 characters wide where standard output is none."""
        table = RichTable(box=None, pad_edge=False, header_style="bold")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i < self.text else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console = Console()
        if not console.is_terminal:
            console.width = 200
        console.print(table, highlight=False, markup=False)


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV with a line of headings; a value of None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def decimals(error: float | None, most: int = 4) -> int:
    """How many decimals of a number to show: as many as show two digits of its standard error.

    Args:
        error: the standard error; None or 0 where it is not known, and then there are `most` decimals.
        most: the greatest number of decimals.
    """
    if not error or not math.isfinite(error):
        return most
    return min(max(1 - math.floor(math.log10(float(f"{error:.1e}"))), 0), most)


def number_cell(value: float | None, form: str, missing: str = "-") -> str:
    """A number in a format specification of Python; `missing` for None."""
    return missing if value is None else format(value, form)


def score_cell(score: dict[str, Any]) -> str:
    """A benchmark's row of `scores.json` as text, such as `0.531 ± 0.020 (at chance)`; `-` where it has no score."""
    if score["raw"] is None:
        return "-"
    text = f"{score['raw']:.3f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.3f}")
    if score["details"]["at_chance"]:
        return f"{text} (at chance)"
    return f"{text} (below chance)" if score["chance"] is not None and score["raw"] < score["chance"] else text
