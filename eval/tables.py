"""Scores as a table."""

from pathlib import Path
from typing import Any

from hf_ibnorm.report.document import Document, readings
from hf_ibnorm.report.tables import Table, number_cell, score_cell

from .suites import AVERAGED, DEFINED, SUITES

READING = Path(__file__).with_name("reading.md")
SMOKE = "SMOKE - not a leaderboard score"


def score_table(scores: dict[str, Any]) -> Table:
    """Raw ± stderr and whether that is chance, normalized, chance, n, ties, truncated prompts; the average last."""
    table = Table(["benchmark", "raw", "normalized", "chance", "n", "ties", "truncated"])
    for name, row in scores["benchmarks"].items():
        details = row["details"]
        title = DEFINED[name].title if name in DEFINED else name
        unit = " bits per byte" if details["metric"] == "bits_per_byte" else ""
        numbers = [(row["normalized"], ".2f"), (row["chance"], ".3f"), (row["n"], "d")]
        numbers += [(details.get(each), "d") for each in ("ties", "truncated")]
        table.rows.append([title, score_cell(row) + unit, *(number_cell(*each, missing="") for each in numbers)])
        seconds = {key: value for key, value in details.items() if "," in key}
        if "size_weighted" in details:
            seconds["size-weighted"] = details["size_weighted"]
        table.rows += [[f"  {key.removesuffix(',none')}", f"{value:.3f}", *[""] * 5] for key, value in seconds.items()]
    if scores["average"] is not None:
        raw = scores["suite"] == "v1"
        average = f"{scores['average']:.2f}"
        table.rows.append(["Average", average if raw else "", "" if raw else average, *[""] * 4])
    elif scores["suite"] in AVERAGED:
        table.rows.append(["Average", "-", "-", *[""] * 4])
    return table


def suites_table(suite: str) -> Table:
    """What a suite consists of: benchmarks, tasks, shots, metric, aggregation, chance."""
    table = Table(["benchmark", "lm-eval", "tasks", "shots", "metric", "mean over", "chance"])
    for each in SUITES[suite]:
        if each.rolling:
            chance = ""
        elif each.bounds is None:
            chance = "right/choices" if each.name == "truthfulqa_mc2" else "1/choices"
        elif isinstance(each.bounds, float):
            chance = f"{each.bounds:.2f}"
        else:
            chance = f"{min(each.bounds.values()):.3f} to {max(each.bounds.values()):.2f} by task"
        metric = each.metric if each.filter == "none" else f"{each.metric}, {each.filter}"
        mean = {"size": "items", "task": "tasks"}[each.mean]
        table.rows.append([each.title, each.name, str(len(each.tasks)), str(each.shots), metric, mean, chance])
    return table


def describe(scores: dict[str, Any]) -> Document:
    """The report on the scores of a run."""
    document = Document(f"{scores['suite']}: {scores['model']}")
    smoke = f" {SMOKE}." if scores["smoke"] else ""
    if smoke:
        document.strong(SMOKE)
    document.table(score_table(scores), latex_caption=f"{scores['model']} on suite {scores['suite']}.{smoke}")
    document.bullets(scores["notes"])
    texts = readings(READING)
    document.paragraph(texts["Scores"])
    if scores["suite"] in texts:
        document.paragraph(texts[scores["suite"]])
    return document
