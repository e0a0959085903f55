"""What a comparison is written as: table, forest plot, data, and the page that holds all of it."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import write_json, write_text
from hf_ibnorm.report.environment import package_versions
from hf_ibnorm.report.page import Page
from hf_ibnorm.report.plots import COLOURS, Estimate, plot_forest
from hf_ibnorm.report.tables import Table, csv_text, decimals, score_cell

from .compare import BETTER, CHANCE, NOT_TESTED, SAME, WORSE, Difference, Scored, comparable, compare
from .options import Prompting
from .scoring import DAMAGE, score_benchmark
from .suites import Benchmark
from .tables import SMOKE

READING = (
    "Difference: the other model minus the first, of raw scores (percentage points; bits per byte times 100, where "
    "less is better). Interval: 95 % of the differences when items are drawn again with replacement, the same for "
    "both models (whole clusters where items share a sentence); none for fewer than ten clusters, or where no item "
    "differs. p: McNemar's exact test on the items that only one "
    "model gets right, or flips of the signs of paired differences where items are clustered or not just right or "
    "wrong; corrected after Holm for the number of benchmarks. A verdict needs the corrected p below 0.05, and is "
    "'both at chance' where neither model does better or worse than guessing, and 'not tested' where there are fewer "
    "than six clusters, of which no test can tell anything. One pair of models says nothing about other seeds."
)
KINDS = (BETTER, WORSE, SAME, CHANCE, NOT_TESTED)
"""Verdicts in the order in which they are told."""


def difference_table(found: dict[str, list[Difference]]) -> Table:
    """Every comparison, a row each, with the digits that the width of its interval leaves."""
    several = len(found) > 1
    words = ["benchmark", "verdict", *(["run"] if several else [])]
    columns = ["first", "other", "difference", "95 % interval", "p", "corrected", "only other : only first", "n"]
    table = Table([*words, *columns], text=len(words))
    for name, rows in found.items():
        for row in rows:
            low, high = row.interval or (0.0, 0.0)
            digits = decimals((high - low) / (2 * 1.96))
            points = max(digits - 2, 0)
            table.rows.append(
                [
                    row.title,
                    row.verdict,
                    *([name] if several else []),
                    f"{row.first:.{digits}f}",
                    f"{row.second:.{digits}f}",
                    f"{100 * row.difference:+.{points}f}",
                    "-" if row.interval is None else f"{100 * low:+.{points}f} to {100 * high:+.{points}f}",
                    "-" if row.p is None else f"{row.p:.2g}",
                    "-" if row.adjusted is None else f"{row.adjusted:.2g}",
                    f"{row.wins} : {row.losses}",
                    str(row.n),
                ]
            )
    return table


def draw_forest(found: dict[str, list[Difference]], first: str, path: Path) -> None:
    """Differences with their intervals, a line each; a filled mark where the verdict is better or worse."""
    estimates = [
        Estimate(
            row.title if i < len(COLOURS) else f"{row.title}, {name}",
            100 * row.difference,
            row.interval and (100 * row.interval[0], 100 * row.interval[1]),
            filled=row.verdict in (BETTER, WORSE),
            colour=COLOURS[min(i, len(COLOURS) - 1)],
            name=name if i < len(COLOURS) else "others",
        )
        for i, (name, rows) in enumerate(found.items())
        for row in rows
    ]
    plot_forest(estimates, path, f"difference from {first}, percentage points or 0.01 bits per byte")


def scores_side_by_side(runs: Sequence[Scored], benchmarks: Sequence[Benchmark]) -> Table:
    """The scores of each run, and those of the tasks of benchmarks that have several."""
    table = Table(["", *(run.name for run in runs)])
    for benchmark in benchmarks:
        rows = [score_benchmark(benchmark, run.results[benchmark.name]) for run in runs]
        table.rows.append([benchmark.title, *map(score_cell, rows)])
        if len(benchmark.tasks) > 1:
            for task in benchmark.tasks:
                tasks = [row["details"]["tasks"][task] for row in rows]
                table.rows.append([f"  {task}", *(f"{each['raw']:.3f}" for each in tasks)])
    return table


def made_from(runs: Sequence[Scored]) -> Table:
    """What each run was: hashes, settings, versions."""
    table = Table(["", *(run.name for run in runs)])
    identities = [run.manifest["identity"] for run in runs]

    def row(name: str, values: Sequence[Any]) -> None:
        table.rows.append([name, *map(str, values)])

    row("model", [run.manifest["model"] for run in runs])
    for field in ("weights", "config", "tokenizer"):
        row(f"sha256 of {field}", [each["model"][field][:16] for each in identities])
    for field in ("dtype", "max_length"):
        row(field, [each["model"][field] for each in identities])
    row("overlong prompts", [each["overlong"] for each in identities])
    asked = [asdict(Prompting(**each["prompting"])) for each in identities]  # an earlier version lacks newer settings
    for field in asked[0]:
        row(field, [each[field] for each in asked])
    for field in identities[0]["versions"]:
        row(field, [each["versions"].get(field) for each in identities])
    return table


def verdicts(first: str, found: dict[str, list[Difference]]) -> list[str]:
    """A sentence for each run that was compared."""
    lines = []
    for name, rows in found.items():
        counts = [(kind, [row.title for row in rows if row.verdict == kind]) for kind in KINDS]
        told = "; ".join(f"{kind}: {', '.join(titles)}" for kind, titles in counts if titles)
        lines.append(f"{name} against {first} - {told}.")
    return lines


def left_out(runs: Sequence[Scored], benchmarks: Sequence[Benchmark]) -> list[str]:
    """Benchmarks that not every run has answered."""
    shared = {each.name for each in benchmarks}
    found = {name: [run.name for run in runs if name in run.results] for run in runs for name in run.results}
    return [f"Not compared: {name}, only in {', '.join(where)}." for name, where in found.items() if name not in shared]


def write_files(
    runs: Sequence[Scored], benchmarks: Sequence[Benchmark], found: dict[str, list[Difference]], output: Path
) -> None:
    """Print the table and write `comparison.json`, `.csv`, `.md`, `.tex`, `.html` and `forest.png` into `output`.

    Raises:
        UserError: the files cannot be written.
    """
    first = runs[0].name
    identity = runs[0].manifest["identity"]
    smoke = Prompting(**identity["prompting"]).smoke(identity["suite"])
    table, lines = difference_table(found), [*verdicts(first, found), *left_out(runs, benchmarks)]
    command = shlex.join(["python", "-m", "eval", *sys.argv[1:]])
    footer = f"Made by `{command}`, hf_ibnorm {package_versions()['hf_ibnorm']}."
    stamp = SMOKE if smoke else ""
    columns = ["run", "stamp", *(each.name for each in fields(Difference))]
    differences = [{"run": name, "stamp": stamp, **asdict(row)} for name, rows in found.items() for row in rows]

    page = Page(f"{' and '.join(found)} against {first}", f"Suite {identity['suite']}", {BETTER: "good", WORSE: "bad"})
    for line in [*([SMOKE] if smoke else []), *lines]:
        page.paragraph(line)
    page.table(table)
    with bad_input(OSError, about="output: "):
        output.mkdir(parents=True, exist_ok=True)
        draw_forest(found, first, output / "forest.png")
        page.image(output / "forest.png", "differences with their intervals")
        page.heading("How to read it")
        page.paragraph(READING)
        page.heading("Scores")
        page.table(scores_side_by_side(runs, benchmarks), "raw ± standard error, task by task")
        page.heading("What was compared")
        page.table(made_from(runs))
        content = {name: [asdict(row) for row in rows] for name, rows in found.items()}
        write_json(output / "comparison.json", {"first": first, "stamp": stamp, "differences": content})
        write_text(output / "comparison.csv", csv_text(columns, differences))
        title = f"# {page.title}\n\n" + (f"**{SMOKE}**\n\n" if smoke else "")
        told = "".join(f"- {line}\n" for line in lines)
        markdown = f"{title}{told}\n{table.markdown()}\n![differences](forest.png)\n\n{READING}\n\n{footer}\n"
        write_text(output / "comparison.md", markdown)
        write_text(output / "comparison.tex", table.latex(f"{page.title}.{f' {SMOKE}.' if smoke else ''}"))
        write_text(output / "comparison.html", page.html(footer))
    if smoke:
        print(SMOKE)
    table.print()
    for line in lines:
        print(line)
    print(f"Page: {output / 'comparison.html'}")


def write_comparison(paths: Sequence[Path], output: Path) -> dict[str, list[Difference]]:
    """Compare runs with the first, print the verdicts, write the table, the forest plot and the page into `output`.

    Returns:
        The differences by name of the run.

    Raises:
        UserError: the runs cannot be compared, or the files not be written.
    """
    if len(paths) < 2:
        raise UserError("compare: name two runs or more")
    runs = [Scored.read(path) for path in paths]
    benchmarks = comparable(runs)
    with bad_input(*DAMAGE, about="compare: a result file is damaged: "):
        found = {run.name: compare(benchmarks, runs[0].results, run.results) for run in runs[1:]}
    write_files(runs, benchmarks, found, output)
    return found
