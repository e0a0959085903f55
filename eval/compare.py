"""Whether models differ: the same items, paired; difference, interval, test and verdict for each benchmark, written as
table, forest plot, data, and one page that holds them."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import write_json, write_text
from hf_ibnorm.report.document import Document, readings
from hf_ibnorm.report.environment import package_versions
from hf_ibnorm.report.plots import COLOURS, ForestLine, plot_forest
from hf_ibnorm.report.tables import Table, csv_text, decimals, number_cell, score_cell

from .options import Prompting
from .scoring import DAMAGE, ScoringError, Stratum, independent, score_benchmark, strata
from .statistics import BETTER, SAME, TEST_FROM, WORSE, Pairs, bootstrap_interval, holm, p_of_no_difference, verdict_of
from .store import READING, benchmarks_of, read_run
from .suites import Benchmark

CHANCE, NOT_TESTED = "both at chance", "not tested"
"""Verdicts beside those of `statistics`; the second: there are too few independent items for any other."""


@dataclass
class Difference:
    """One benchmark of one model against the same of another; scores are fractions, or bits per byte."""

    benchmark: str  # lm-eval's name
    title: str  # how a leaderboard heads its column
    first: float  # score of the model that is compared with
    second: float  # score of the other
    difference: float  # second - first
    # 95 % of the differences over resampled items lie in it; None for fewer than ten clusters of items in a task, and
    # where the models do not differ on any item.
    interval: tuple[float, float] | None
    p: float | None  # of no difference (two-sided); None for fewer than six clusters: no test can tell anything then
    adjusted: float | None  # p after Holm's correction for the number of benchmarks
    wins: int  # items that only the second gets right (or has more of)
    losses: int  # items that only the first gets right (or has more of)
    n: int  # items
    verdict: str  # on the second model: better, worse, not distinguishable, both at chance, or not tested


Differences = dict[str, list[Difference]]
"""Name of a run → its differences from the first."""


def pair(first: Sequence[Stratum], second: Sequence[Stratum]) -> list[Pairs]:
    """Item by item second - first; ScoringError where the two have other items."""
    pairs = []
    for a, b in zip(first, second, strict=True):
        if a.items != b.items:
            raise ScoringError(f"{a.task}: the runs have other items")
        pairs.append(Pairs.summed(np.subtract(b.values, a.values), a.clusters, a.weight))
    return pairs


def compare(
    benchmarks: Sequence[Benchmark], first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]
) -> list[Difference]:
    """Set the second of two runs against the first, benchmark by benchmark; ScoringError where they have other items.

    `first` and `second` are the result files of the runs, by benchmark.
    """
    rows = [_difference(benchmark, first[benchmark.name], second[benchmark.name]) for benchmark in benchmarks]
    for benchmark, row, p in zip(benchmarks, rows, holm([row.p for row in rows]), strict=True):
        tested = NOT_TESTED if p is None else verdict_of(row.difference, p, benchmark.rolling)
        row.adjusted, row.verdict = p, row.verdict or tested
    return rows


def _difference(benchmark: Benchmark, first: dict[str, Any], second: dict[str, Any]) -> Difference:
    """One benchmark's difference: not corrected yet, and with a verdict only where both models are at chance."""
    generator = np.random.default_rng(0)
    ours, theirs = (independent(strata(benchmark, result)) for result in (first, second))
    a, b = (score_benchmark(benchmark, result) for result in (first, second))
    pairs = pair(ours, theirs)
    interval = bootstrap_interval(pairs, generator)
    enough = sum(each.sums.size for each in pairs) >= TEST_FROM
    moved = np.concatenate([np.subtract(y.values, x.values) for x, y in zip(ours, theirs, strict=True)])
    better = -moved if benchmark.rolling else moved
    return Difference(
        benchmark.name,
        benchmark.title,
        first=a["raw"],
        second=b["raw"],
        difference=b["raw"] - a["raw"],
        interval=interval,
        p=p_of_no_difference(pairs, generator) if enough else None,
        adjusted=None,
        wins=int((better > 0).sum()),
        losses=int((better < 0).sum()),
        n=a["n"],
        verdict=CHANCE if a["details"]["at_chance"] and b["details"]["at_chance"] else "",
    )


@dataclass(frozen=True)
class Scored:
    """A run that was scored, and the result files of the benchmarks that it answered."""

    name: str
    manifest: dict[str, Any]
    results: dict[str, dict[str, Any]]


def _check_same_questions(first: Scored, run: Scored) -> None:
    """Raise UserError where two runs differ in suite, prompts, examples, limits or items."""
    for field in ("suite", "prompting"):
        ours, theirs = (_setting(each.manifest["identity"][field]) for each in (first, run))
        if ours != theirs:
            raise UserError(f"compare: {run.name} was run with {field} {theirs}, {first.name} with {ours}")
    for name in set(first.results) & set(run.results):
        ours, theirs = first.results[name]["tasks"], run.results[name]["tasks"]
        for task in sorted({*ours, *theirs}):
            for field in ("hash", "shots", "version", "generation"):
                a, b = (tasks.get(task, {}).get(field) for tasks in (ours, theirs))
                if a != b:
                    a, b = (value[:12] if isinstance(value, str) else value for value in (a, b))
                    values = f"{b} in {run.name}, {a} in {first.name}"
                    raise UserError(f"compare: {task} has another {field}: {values}; these are other questions")


def _setting(value: Any) -> str:
    """The suite's name, or every field of `Prompting`: runs of earlier versions lack the newer ones."""
    if not isinstance(value, dict):
        return repr(value)
    return ", ".join(f"{name}={each}" for name, each in asdict(Prompting(**value)).items())


def difference_table(differences: Differences) -> Table:
    """Every comparison, a row each, with the digits that the width of its interval leaves."""
    several = len(differences) > 1
    words = ["benchmark", "verdict", *(["run"] if several else [])]
    columns = ["first", "other", "difference", "95 % interval", "p", "corrected", "only other : only first", "n"]
    table = Table([*words, *columns], text=len(words))
    for name, row in [(name, row) for name, rows in differences.items() for row in rows]:
        low, high = row.interval or (0.0, 0.0)
        digits = decimals((high - low) / (2 * 1.96))
        points = max(digits - 2, 0)
        numbers = [
            *(f"{score:.{digits}f}" for score in (row.first, row.second)),
            f"{100 * row.difference:+.{points}f}",
            "-" if row.interval is None else f"{100 * low:+.{points}f} to {100 * high:+.{points}f}",
            *(number_cell(p, ".2g") for p in (row.p, row.adjusted)),
            *(f"{row.wins} : {row.losses}", str(row.n)),
        ]
        table.rows.append([row.title, row.verdict, *([name] if several else []), *numbers])
    return table


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
                table.rows.append([f"  {task}", *(f"{row['details']['tasks'][task]['raw']:.3f}" for row in rows)])
    return table


def made_from(runs: Sequence[Scored]) -> Table:
    """Hashes, settings and versions of each run."""
    columns = []
    for run in runs:
        identity, column = run.manifest["identity"], {"model": run.manifest["model"]}
        model = identity["model"]
        column |= {f"sha256 of {field}": model[field][:16] for field in ("weights", "config", "tokenizer")}
        column |= {"dtype": model["dtype"], "max_length": model["max_length"], "overlong prompts": identity["overlong"]}
        column |= asdict(Prompting(**identity["prompting"]))  # an earlier version lacks newer settings
        columns.append(column | identity["versions"])
    rows = [[name, *(str(column.get(name)) for column in columns)] for name in columns[0]]
    return Table(["", *(run.name for run in runs)], rows)


def sentences(runs: Sequence[Scored], benchmarks: Sequence[Benchmark], differences: Differences) -> list[str]:
    """The verdicts, a sentence for each run that was compared, and one for each benchmark that a run lacks."""
    lines = []
    for name, rows in differences.items():
        kinds = (BETTER, WORSE, SAME, CHANCE, NOT_TESTED)
        titles = {kind: ", ".join(row.title for row in rows if row.verdict == kind) for kind in kinds}
        counts = "; ".join(f"{kind}: {listed}" for kind, listed in titles.items() if listed)
        lines.append(f"{name} against {runs[0].name} - {counts}.")
    shared = {benchmark.name for benchmark in benchmarks}
    answered = {name: [run.name for run in runs if name in run.results] for run in runs for name in run.results}
    lines += [f"Not compared: {name}, only in {', '.join(by)}." for name, by in answered.items() if name not in shared]
    return lines


def comparison_document(
    runs: Sequence[Scored], benchmarks: Sequence[Benchmark], differences: Differences, stamp: str, picture: Path
) -> Document:
    """The report on a comparison; `stamp` marks scores that no leaderboard has, `picture` is the forest plot."""
    command = shlex.join(["python", "-m", "eval", *sys.argv[1:]])
    made = f"Made by `{command}`, hf_ibnorm {package_versions()['hf_ibnorm']}."
    title = f"{' and '.join(differences)} against {runs[0].name}"
    document = Document(title, {BETTER: "good", WORSE: "bad"}, [made])
    document.lead(f"Suite {runs[0].manifest['identity']['suite']}", page_only=True)
    if stamp:
        document.strong(stamp)
    document.bullets(sentences(runs, benchmarks, differences))
    document.table(difference_table(differences), latex_caption=f"{title}.{f' {stamp}.' if stamp else ''}")
    document.picture(picture, "differences")
    document.heading("How to read it", page_only=True)
    document.paragraph(readings(READING)["Comparison"])
    document.heading("Scores", page_only=True)
    document.folded(scores_side_by_side(runs, benchmarks), "raw ± standard error, task by task")
    document.heading("What was compared", page_only=True)
    document.table(made_from(runs), page_only=True)
    return document


def write_comparison(paths: Sequence[Path], output: Path) -> None:
    """Compare runs with the first, print the verdicts, and write `comparison.json`, `.csv`, `.md`, `.tex`, `.html` and
    `forest.png` into `output`.

    Raises:
        UserError: the runs differ in prompts, examples or limits, or share no benchmark; or a file is damaged, or
            cannot be written.
    """
    if len(paths) < 2:
        raise UserError("compare: name two runs or more")
    runs = []
    for path in paths:
        manifest, results = read_run(path)
        runs.append(Scored(str(path), manifest, {name: each for name, each in results.items() if "tasks" in each}))
    first, identity = runs[0], runs[0].manifest["identity"]
    for run in runs[1:]:
        _check_same_questions(first, run)
    shared = [name for name in first.results if all(name in run.results for run in runs)]
    if not shared:
        raise UserError("compare: the runs share no benchmark that was answered")
    with bad_input(*DAMAGE, about="compare: a result file is damaged: "):
        benchmarks = benchmarks_of(identity["suite"], first.results, shared)
        differences = {run.name: compare(benchmarks, first.results, run.results) for run in runs[1:]}
    stamp = Prompting(**identity["prompting"]).stamp(identity["suite"])
    content = {name: [asdict(row) for row in rows] for name, rows in differences.items()}
    lines = [{"run": name, "stamp": stamp, **row} for name, rows in content.items() for row in rows]
    document = comparison_document(runs, benchmarks, differences, stamp, output / "forest.png")
    with bad_input(OSError, about="output: "):
        output.mkdir(parents=True, exist_ok=True)
        axis = f"difference from {first.name}, percentage points or 0.01 bits per byte"
        plot_forest(forest_lines(differences), output / "forest.png", axis)
        write_json(output / "comparison.json", {"first": first.name, "stamp": stamp, "differences": content})
        write_text(output / "comparison.csv", csv_text(list(lines[0]), lines))
        document.write(*(output / f"comparison.{ending}" for ending in ("md", "tex", "html")))
    if stamp:
        print(stamp)
    difference_table(differences).print()
    print(*sentences(runs, benchmarks, differences), sep="\n")
    print(f"Page: {output / 'comparison.html'}")
