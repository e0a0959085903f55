"""The report on a study, written: Markdown, one self-contained page, CSV, LaTeX and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import write_text
from hf_ibnorm.report.document import Document, readings
from hf_ibnorm.report.tables import Table, csv_text

from ..options import SMOKE
from ..statistics import BETTER, WORSE
from . import figures, findings
from .folder import SOURCE, Folder
from .plan import Study
from .results import REFUSED, gather, metric_title
from .training import DIVERGED, FAILED, Group

COST = "What quality cost"


def write_report(folder: Folder, output: Path) -> list[Group]:
    """Print the verdicts, write the report into `output`, and return the norms with their verdicts.

    The files are report.md, report.html, verdicts.csv, verdicts.tex, cells.csv, curves.csv and pictures.

    Raises:
        UserError: the study's files are damaged, or the report cannot be written.
    """
    study, groups = folder.study, gather(folder)
    if not any(training.ended for group in groups for training in group.cells().values()):
        raise UserError(f"study: {folder.path} has no training yet that has ended; see `study status`")
    equal, made = findings.equality_sentences(folder, groups, study.metric), findings.provenance(folder, groups)
    cost, wrong = findings.cost_table(groups, study.metric), findings.failure_table(groups)
    rows, curves = findings.cell_rows(groups, study.metric), figures.curves_of(groups)
    with bad_input(OSError, about="output: "):
        output.mkdir(parents=True, exist_ok=True)
        pictures = figures.draw_pictures(groups, curves, output, study.metric)
        document = study_document(study, groups, pictures, equal, cost, as_table(rows), made, wrong)
        write_verdicts(document, groups, output)
        write_text(output / "cells.csv", csv_text(list(rows[0]), rows))
        if curves:
            write_text(output / "curves.csv", csv_text(figures.CURVE, figures.curve_rows(curves)))
        write_text(output / SOURCE, study.source)
        for condition in study.conditions:
            path = folder.recipe(condition)
            write_text(output / f"recipe-{path.name}", path.read_text(encoding="utf-8"))
    findings.verdict_table(groups, study.metric).print()
    print(*_verdict_sentences(study, groups), *equal, f"Report: {output / 'report.html'}", sep="\n")
    return groups


def study_document(
    study: Study,
    groups: Sequence[Group],
    pictures: Sequence[tuple[str, Path]],
    equal: Sequence[str],
    cost: Table,
    trainings: Table,
    made: list[str],
    wrong: Table | None = None,
) -> Document:
    """The report on a study, from its norms with their verdicts, and pictures (title and PNG file).

    `equal` are sentences on the conditions that the norms share, `made` sentences on how the report was made. The table
    `trainings` has the content of `cells.csv`, the table `wrong` the trainings and pairs that do not count.
    """
    caption = f"{metric_title(groups, study.metric)}, mean ± standard deviation over seeds."
    stamp = f"{SMOKE}. " if _is_smoke(groups) else ""
    bad = [group for group in groups if group.verdict in (WORSE, DIVERGED, REFUSED, FAILED)]
    marked = {findings.verdict_text(group): "bad" for group in bad} | {BETTER: "good"}
    document = Document(f"Study: {study.name}", marked, made)
    document.lead(study.about)
    for line in _verdict_sentences(study, groups):
        document.strong(line)
    document.table(findings.verdict_table(groups, study.metric), caption, f"{stamp}Study {study.name}: {caption}")
    for title, path in pictures:
        document.picture(path, title)
    for title, text in readings(Path(__file__).with_name("reading.md")).items():
        document.heading(title)
        document.paragraph(text)
    document.heading("What was equal")
    document.bullets(equal)
    for title, table in (
        (COST, cost),
        ("Tuning", findings.tuning_table(groups)),
        ("Benchmarks", findings.benchmark_table(groups)),
        ("What went wrong", wrong),
    ):
        if table and table.rows:
            document.heading(title)
            document.table(table)
    document.heading("Every training")
    document.folded(trainings, f"{len(trainings.rows)} trainings", "cells.csv")
    return document


def _is_smoke(groups: Sequence[Group]) -> bool:
    return any(training.smoke for group in groups for training in group.finals.values())


def _verdict_sentences(study: Study, groups: Sequence[Group]) -> list[str]:
    stamp = [f"{SMOKE}: scored on part of the items."] if _is_smoke(groups) else []
    return [*stamp, *findings.verdict_sentences(groups, study.baseline)]


def write_verdicts(document: Document, groups: Sequence[Group], output: Path) -> None:
    """Write report.md, report.html, verdicts.tex and verdicts.csv into `output`, where the pictures are."""
    document.write(output / "report.md", output / "report.html", output / "verdicts.tex")
    stamp = SMOKE + "." if _is_smoke(groups) else ""
    rows = [{"stamp": stamp, **_verdict_row(group)} for group in groups]
    write_text(output / "verdicts.csv", csv_text(list(rows[0]), rows))


def _verdict_row(group: Group) -> dict[str, Any]:
    paired = group.paired
    low, high = (paired and paired.interval) or (None, None)
    bootstrap_low, bootstrap_high = (paired and paired.bootstrap) or (None, None)
    return {
        "condition": group.condition,
        "norm": group.arm.name,
        "learning_rate": group.learning_rate,
        "seeds": len(group.finals),
        "difference": paired and paired.mean,
        "low": low,
        "high": high,
        "p": paired and paired.p,
        "adjusted": group.adjusted,
        "detectable": paired and paired.detectable,
        "sign_p": paired and paired.sign_p,
        "bootstrap_low": bootstrap_low,
        "bootstrap_high": bootstrap_high,
        "verdict": group.verdict,
    }


def as_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of a CSV file as a table, with six digits of fractions."""
    texts = [[f"{value:.6g}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    return Table(list(rows[0]), [["" if text is None else str(text) for text in row] for row in texts])
