"""Scores as a table."""

from typing import Any

from hf_ibnorm.report.tables import Table, score_cell

from .suites import AVERAGED, DEFINED, SUITES

SMOKE = "SMOKE - not a leaderboard score"


def score_table(scores: dict[str, Any]) -> Table:
    """Raw ± stderr and whether that is chance, normalized, chance, n, ties, truncated prompts; the average last."""
    table = Table(["benchmark", "raw", "normalized", "chance", "n", "ties", "truncated"])
    for name, row in scores["benchmarks"].items():
        details = row["details"]
        table.rows.append(
            [
                DEFINED[name].title if name in DEFINED else name,
                score_cell(row) + (" bits per byte" if details["metric"] == "bits_per_byte" else ""),
                _number(row["normalized"], ".2f"),
                _number(row["chance"], ".3f"),
                _number(row["n"], "d"),
                _number(details.get("ties"), "d"),
                _number(details.get("truncated"), "d"),
            ]
        )
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


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def scores_markdown(scores: dict[str, Any], table: Table) -> str:
    """`scores.md`."""
    smoke = f"**{SMOKE}**\n\n" if scores["smoke"] else ""
    notes = "".join(f"- {note}\n" for note in scores["notes"])
    return (
        f"# {scores['suite']}: {scores['model']}\n\n{smoke}{table.markdown()}\n{notes}\n"
        "Raw scores are fractions ± standard error (robust to items that share a sentence), bits per byte where lower "
        "is better; normalized puts guessing at 0 and a perfect score at 100. An item whose best choice is tied counts "
        "as wrong. At chance: guessing would bring a score so far off with a probability of 5 % or more; below chance: "
        "further down, as a model that prefers short answers can be.\n" + PROTOCOL.get(scores["suite"], "")
    )


PROTOCOL = {
    "v1": "\nOpen LLM Leaderboard I, with the prompts of today's harness and not those of the commit that the "
    "leaderboard pinned in 2023. The average is that of the raw scores, in percent.\n",
    "v2": "\nOpen LLM Leaderboard II. The average is that of the normalized scores.\n",
}


def scores_caption(scores: dict[str, Any]) -> str:
    """One line on what a table shows."""
    smoke = f" {SMOKE}." if scores["smoke"] else ""
    return f"{scores['model']} on suite {scores['suite']}.{smoke}"
