"""Pages and pictures of the studies in docs/results, again, from what is kept there: cells.csv, curves.csv, report.md.

    python benchmarks/studies.py [NAME ...]

No training is needed. Verdicts are computed anew from the scores in cells.csv; what only the trainings' own files say
(parameters, what was equal, versions) is read from report.md. A picture of losses whose curves are not kept stays as it
is. The verdicts of `quick` are put into the README, too.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from page import Row, fill, read_rows

from eval.study.figures import Curve, draw_pictures
from eval.study.findings import mean_spread, verdict_table
from eval.study.plan import Arm, Study, read_study
from eval.study.results import Group, judge
from eval.study.training import TRAINED, Training
from eval.study.writing import COST, as_table, study_document, write_verdicts
from hf_ibnorm.report.runs import Run
from hf_ibnorm.report.tables import Table

ROOT = Path(__file__).parent.parent
RESULTS, README = ROOT / "docs/results", ROOT / "README.md"
STUDIES = ("quick", "lambda")


def training(row: Row, metric: str) -> Training:
    """A training as far as its row knows it."""
    if row["state"] != TRAINED:
        return Training(row["state"])
    steps, tokens = int(row["steps"]), int(row["tokens"])
    speed = {"tokens_per_second": tokens / float(row["seconds"]), "batch_sha": row["batches_sha"]}
    metrics = [{"step": steps, "tokens": tokens, "loss": None, "eval_loss": float(row["eval_loss"]), **speed}]
    run = Run(row["norm"], {"model": {}}, {"init_sha": row["init_sha"]}, metrics, None)
    scores = {metric: {"raw": float(row["metric"]), "details": {"tasks": {}, "metric": ""}}} if row["metric"] else {}
    return Training(TRAINED, run, scores=scores)


def groups_of(study: Study, rows: list[Row]) -> list[Group]:
    """Every norm with its verdict."""

    def group(condition: str, arm: Arm) -> Group:
        here = [row for row in rows if (row["condition"], row["norm"]) == (condition, arm.name)]
        finals = [row for row in here if row["compared"] == "True"]
        tuning: dict[float, dict[int, Training]] = {}
        for row in here:
            if int(row["seed"]) in study.tuning_seeds:
                tuning.setdefault(float(row["learning_rate"]), {})[int(row["seed"])] = training(row, "")
        rate = float(finals[0]["learning_rate"]) if finals else None
        return Group(condition, arm, tuning, rate, {int(row["seed"]): training(row, study.metric) for row in finals})

    groups = []
    for condition in study.conditions:
        here = [group(condition, arm) for arm in study.arms]
        judge(here, next(each for each in here if each.arm.name == study.baseline), study.metric)
        groups += here
    return groups


def curves_of(path: Path) -> list[Curve]:
    """The losses that are kept; none where the file is missing."""
    losses: dict[tuple[str, str, int], dict[str, list[tuple[int, float]]]] = {}
    for row in read_rows(path) if path.is_file() else []:
        kinds = losses.setdefault((row["condition"], row["norm"], int(row["seed"])), {"training": [], "validation": []})
        kinds[row["kind"]].append((int(row["step"]), float(row["loss"])))
    return [Curve(*key, kinds["training"], kinds["validation"]) for key, kinds in losses.items()]


def first_table(text: str) -> Table:
    """The first table in some Markdown."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    columns, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return Table(columns, rows)


def redraw(name: str) -> Table:
    """Write the pages and pictures of one study, and return its verdicts."""
    folder = RESULTS / name
    study = replace(read_study(str(folder / "study.yaml")), name=name)
    rows = read_rows(folder / "cells.csv")
    groups, kept = groups_of(study, rows), (folder / "report.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^## (.+?)\n+(.*?)(?=^## |\Z)", kept, re.M | re.S))
    cost, by_name = first_table(parts[COST]), {group.label: group for group in groups}
    for row in cost.rows:
        row[1] = mean_spread(list(by_name[row[0]].values(study.metric).values()))
    pictures = draw_pictures(groups, curves_of(folder / "curves.csv"), folder, study.metric)
    if not any(path.name == "losses.png" for _, path in pictures):
        pictures.insert(1, ("losses", folder / "losses.png"))
    equal = [line.removeprefix("- ") for line in parts["What was equal"].strip().splitlines()]
    _, *made = [line.strip() for line in parts["Every training"].split("\n\n") if line.strip()]
    trainings = as_table([cells(row) for row in rows])
    write_verdicts(study_document(study, groups, pictures, equal, cost, trainings, made), groups, folder)
    return verdict_table(groups, study.metric)


def cells(row: Row) -> dict[str, Any]:
    """A row of cells.csv with its fractions as numbers, which tables shorten."""
    return {key: float(text) if re.fullmatch(r"\d+\.\d+", text) else text for key, text in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=STUDIES, help="folders of docs/results (default: quick lambda)")
    fill(README, {name: redraw(name).markdown() for name in parser.parse_args().names})


if __name__ == "__main__":
    main()
