"""A comparison, written: table, forest plot, data, and the page that holds all of it."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import write_json, write_text
from hf_ibnorm.report.document import Document, readings
from hf_ibnorm.report.environment import package_versions
from hf_ibnorm.report.plots import COLOURS, ForestLine, plot_forest
from hf_ibnorm.report.tables import Table, csv_text, decimals, number_cell, score_cell

from .compare import BETTER, CHANCE, NOT_TESTED, SAME, WORSE, Difference, Scored, comparable, compare
from .options import Prompting
from .scoring import DAMAGE, score_benchmark
from .suites import Benchmark
from .tables import READING, SMOKE

Differences = dict[str, list[Difference]]
"""Name of a run → its differences from the first."""
KINDS = (BETTER, WORSE, SAME, CHANCE, NOT_TESTED)
"""Verdicts in the order in which they are told."""


def difference_table(differences: Differences) -> Table:
    """Every comparison, a row each, with the digits that the width of its interval leaves."""
    several = len(differences) > 1
    words = ["benchmark", "verdict", *(["run"] if several else [])]
    columns = ["first", "other", "difference", "95 % interval", "p", "corrected", "only other : only first", "n"]
    rows = [
        [row.title, row.verdict, *([name] if several else []), *_numbers(row)]
        for name, each in differences.items()
        for row in each
    ]
    return Table([*words, *columns], rows, text=len(words))


def _numbers(row: Difference) -> list[str]:
    """The cells of a comparison after its verdict."""
    low, high = row.interval or (0.0, 0.0)
    digits = decimals((high - low) / (2 * 1.96))
    points = max(digits - 2, 0)
    return [
        *(f"{score:.{digits}f}" for score in (row.first, row.second)),
        f"{100 * row.difference:+.{points}f}",
        "-" if row.interval is None else f"{100 * low:+.{points}f} to {100 * high:+.{points}f}",
        *(number_cell(p, ".2g") for p in (row.p, row.adjusted)),
        *(f"{row.wins} : {row.losses}", str(row.n)),
    ]


def forest_lines(differences: Differences) -> list[ForestLine]:
    """The lines of the forest plot: in percentage points, a filled mark where the verdict is better or worse."""
    last = len(COLOURS) - 1
    return [
        ForestLine(
            row.title if i <= last else f"{row.title}, {name}",
            100 * row.difference,
            row.interval and (100 * row.interval[0], 100 * row.interval[1]),
            filled=row.verdict in (BETTER, WORSE),
            colour=COLOURS[min(i, last)],
            name=name if i <= last else "others",
        )
        for i, (name, rows) in enumerate(differences.items())
        for row in rows
    ]


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
    identities = [run.manifest["identity"] for run in runs]
    rows: dict[str, list[Any]] = {"model": [run.manifest["model"] for run in runs]}
    for field in ("weights", "config", "tokenizer"):
        rows[f"sha256 of {field}"] = [each["model"][field][:16] for each in identities]
    for field in ("dtype", "max_length"):
        rows[field] = [each["model"][field] for each in identities]
    rows["overlong prompts"] = [each["overlong"] for each in identities]
    asked = [asdict(Prompting(**each["prompting"])) for each in identities]  # an earlier version lacks newer settings
    rows |= {field: [each[field] for each in asked] for field in asked[0]}
    versions = [each["versions"] for each in identities]
    rows |= {name: [each.get(name) for each in versions] for name in versions[0]}
    cells = [[name, *map(str, values)] for name, values in rows.items()]
    return Table(["", *(run.name for run in runs)], cells)


def sentences(first: str, differences: Differences) -> list[str]:
    """The verdicts, a sentence for each run that was compared."""
    lines = []
    for name, rows in differences.items():
        titles = {kind: ", ".join(row.title for row in rows if row.verdict == kind) for kind in KINDS}
        counts = "; ".join(f"{kind}: {listed}" for kind, listed in titles.items() if listed)
        lines.append(f"{name} against {first} - {counts}.")
    return lines


def left_out(runs: Sequence[Scored], benchmarks: Sequence[Benchmark]) -> list[str]:
    """Benchmarks that not every run has answered, a sentence each."""
    shared = {each.name for each in benchmarks}
    answered = {name: [run.name for run in runs if name in run.results] for run in runs for name in run.results}
    return [f"Not compared: {name}, only in {', '.join(by)}." for name, by in answered.items() if name not in shared]


def describe(
    runs: Sequence[Scored], benchmarks: Sequence[Benchmark], differences: Differences, stamp: str, picture: Path
) -> Document:
    """The report on a comparison.

    Args:
        runs: the first, and those that are compared with it.
        benchmarks: that all have answered.
        differences: by name of the run.
        stamp: of scores that are none for a leaderboard.
        picture: the forest plot.
    """
    command = shlex.join(["python", "-m", "eval", *sys.argv[1:]])
    made = f"Made by `{command}`, hf_ibnorm {package_versions()['hf_ibnorm']}."
    title = f"{' and '.join(differences)} against {runs[0].name}"
    document = Document(title, {BETTER: "good", WORSE: "bad"}, [made])
    document.lead(f"Suite {runs[0].manifest['identity']['suite']}", page_only=True)
    if stamp:
        document.strong(stamp)
    document.bullets([*sentences(runs[0].name, differences), *left_out(runs, benchmarks)])
    document.table(difference_table(differences), latex_caption=f"{title}.{f' {stamp}.' if stamp else ''}")
    document.picture(picture, "differences")
    document.heading("How to read it", page_only=True)
    document.paragraph(readings(READING)["Comparison"])
    document.heading("Scores", page_only=True)
    document.folded(scores_side_by_side(runs, benchmarks), "raw ± standard error, task by task")
    document.heading("What was compared", page_only=True)
    document.table(made_from(runs), page_only=True)
    return document


def write_files(
    runs: Sequence[Scored], benchmarks: Sequence[Benchmark], differences: Differences, output: Path
) -> None:
    """Print the table and write `comparison.json`, `.csv`, `.md`, `.tex`, `.html` and `forest.png` into `output`.

    Raises:
        UserError: the files cannot be written.
    """
    first, identity = runs[0].name, runs[0].manifest["identity"]
    stamp = SMOKE if Prompting(**identity["prompting"]).smoke(identity["suite"]) else ""
    columns = ["run", "stamp", *(each.name for each in fields(Difference))]
    rows = [{"run": name, "stamp": stamp, **asdict(row)} for name, each in differences.items() for row in each]
    document = describe(runs, benchmarks, differences, stamp, output / "forest.png")
    with bad_input(OSError, about="output: "):
        output.mkdir(parents=True, exist_ok=True)
        what = f"difference from {first}, percentage points or 0.01 bits per byte"
        plot_forest(forest_lines(differences), output / "forest.png", what)
        content = {name: [asdict(row) for row in each] for name, each in differences.items()}
        write_json(output / "comparison.json", {"first": first, "stamp": stamp, "differences": content})
        write_text(output / "comparison.csv", csv_text(columns, rows))
        document.write(*(output / f"comparison.{ending}" for ending in ("md", "tex", "html")))
    if stamp:
        print(stamp)
    difference_table(differences).print()
    print(*sentences(first, differences), *left_out(runs, benchmarks), sep="\n")
    print(f"Page: {output / 'comparison.html'}")


def write_comparison(paths: Sequence[Path], output: Path) -> Differences:
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
        differences = {run.name: compare(benchmarks, runs[0].results, run.results) for run in runs[1:]}
    write_files(runs, benchmarks, differences, output)
    return differences
