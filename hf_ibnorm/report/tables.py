"""Tables, written for a terminal, as Markdown, LaTeX or CSV."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable


@dataclass
class Table:
    """A table of text; the first columns are words, the others are aligned to the right.

    Args:
        columns: headings.
        rows: cells, as many as columns.
        text: how many columns are words; the first names the rows.
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
        lines = [" & ".join(map(_escaped, row)) + r" \\" for row in [self.columns, *self.rows]]
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{_escaped(caption)}}}",
                rf"\begin{{tabular}}{{{'l' * self.text}{'r' * (len(self.columns) - self.text)}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def print(self) -> None:
        """On standard output; as wide as the table where that is no terminal."""
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
    """Rows as CSV with a line of headings; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def decimals(error: float | None, most: int = 4) -> int:
    """Digits after the point that a number with this standard error carries: two digits of the error are shown.

    Args:
        error: standard error; None or 0 where it is not known, for which all digits are shown.
        most: that are ever shown.
    """
    if not error or not math.isfinite(error):
        return most
    return min(max(1 - math.floor(math.log10(float(f"{error:.1e}"))), 0), most)


def number_cell(value: float | None, form: str, missing: str = "-") -> str:
    """A number in a format of `format`; `missing` where there is none."""
    return missing if value is None else format(value, form)


def _escaped(text: str) -> str:
    """Plain text as LaTeX."""
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "λ": r"$\lambda$", "~": r"\textasciitilde{}", "^": r"\^{}"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def score_cell(score: dict[str, Any]) -> str:
    """One row of `scores.json` as text: `0.531 ± 0.020`, with `(at chance)` or `(below chance)` where that is so; `-`
    where there is no score."""
    if score["raw"] is None:
        return "-"
    text = f"{score['raw']:.3f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.3f}")
    if score["details"]["at_chance"]:
        return f"{text} (at chance)"
    return f"{text} (below chance)" if score["chance"] is not None and score["raw"] < score["chance"] else text
