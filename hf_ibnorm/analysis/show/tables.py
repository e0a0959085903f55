"""The tables in the report of a survey, from its record."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import fmean, median
from typing import Any

from ...norms import all_measures
from ...report.tables import Table, number_cell
from ..model import PLACES
from ..plane import PlanePoint
from .rows import UNKNOWN, cell

OF_PAIRS = {
    "|r|": "correlation",
    "|r| of ranks": "rank_correlation",
    "AMI": "mutual_information",
    "AMI, uniform bins": "mutual_information_uniform",
}
TESTS = {"D'Agostino": "dagostino", "Anderson-Darling": "anderson_darling", "Henze-Zirkler": "henze_zirkler"}
MEDIANS = {
    **{f"excess kurtosis, {place}": (".3f", "sites", place, "excess_kurtosis") for place in PLACES},
    "near zero, after": (".3f", "sites", "after", "near_zero"),
    "Hoyer sparsity, after": (".3f", "sites", "after", "hoyer"),
    "largest / median size, before": (".1f", "sites", "before", "massive"),
    "effective rank, after": (".1f", "sites", "after", "effective_rank"),
    "Q-Q R², after": (".4f", "normality", "after", "r_squared", "mean"),
    **{f"{title}, after": (".4f", "normality", "after", name, "mean") for title, name in OF_PAIRS.items()},
}
"""Title → format, part of a model's record, and path to the number in a site's results."""


def median_table(record: Mapping[str, Any]) -> Table:
    """A column for each model: medians over its norms."""
    models = record["models"].values()
    table = Table(["median over the norms", *record["models"]])
    table.rows.append(["norm", *(model["norm"] for model in models)])
    table.rows.append(["loss, nats a token", *(f"{model['loss']:.4f}" for model in models)])
    for title, (form, part, *keys) in MEDIANS.items():
        columns = [[cell(site, *keys) for site in (model[part] or {}).values()] for model in models]
        table.rows.append([title, *(_average(median, column, form) for column in columns)])
    zeta = [[line[-1] for line in cell(model, "noise", "zeta") or ()] for model in models]
    table.rows.append(["ζ to the last norm, mean", *(_average(fmean, column, ".3f") for column in zeta)])
    return table


def _average(average: Callable[[list[float]], float], numbers: Iterable[float | None], form: str) -> str:
    """Median or mean of the numbers that are not None; "-" where all are."""
    known = [number for number in numbers if number is not None]
    return number_cell(average(known) if known else None, form)


def sites_table(sites: Mapping[str, Any]) -> Table:
    """A row for each norm, with the most telling numbers; the CSV file has all."""
    values = ("mean", "variance", "skewness", "excess_kurtosis", "near_zero", "hoyer", "massive", "effective_rank")
    columns: dict[str, tuple[str, ...]]
    columns = {f"{value.replace('_', ' ')}, {place}": (place, value) for value in values for place in PLACES}
    for each in all_measures().values():
        title = each.symbol or each.name
        of_rows = {f"{title}, {key}": (each.name, key) for key in ("mean", "least")}
        columns |= of_rows if each.spread else {title: each.keys}
    table = Table(["site", "norm", "rows", *columns], text=2)
    for name, site in sites.items():
        cells = (number_cell(cell(site, *keys), ".4g") for keys in columns.values())
        table.rows.append([name, site["norm"], str(site["rows"]), *cells])
    return table


def normality_table(stage: Mapping[str, Any]) -> Table:
    """Two rows for each norm: what goes in and what comes out."""
    columns = {f"Q-Q R², {key}": (".4f", "r_squared", key) for key in ("mean", "least")}
    columns |= {f"{title} rejects": (".0%", name, "rejected") for title, name in TESTS.items()}
    columns |= {f"mean {title}": (".4f", name, "mean") for title, name in OF_PAIRS.items()}
    table = Table(["site", "", "rows", *columns], text=2)
    for site, places in stage["normality"].items():
        for place in PLACES:
            cells = (number_cell(cell(places[place], *keys), form) for form, *keys in columns.values())
            table.rows.append([site, place, str(places[place]["rows"]), *cells])
    return table


def plane_table(points: Iterable[PlanePoint]) -> Table:
    """Points of the information plane, with 95 % intervals; the note says why there is no estimate."""
    columns = ["I(X;T)", "chance", "I(T;Y)", "chance", "I(T;Y) - β·I(X;T)", "β", "n", "note"]
    table = Table(["site", "step", "estimator", *columns])
    for point in points:
        cells = [point.site, "" if point.step is None else str(point.step), point.estimator]
        for estimate in (point.input, point.output):
            cells += [str(estimate), number_cell(estimate.chance, ".3f", "")]
        table.rows.append([*cells, str(point.ib), f"{point.beta:g}", str(point.ib.n), point.ib.reason])
    return table


def reasons_table(record: Mapping[str, Any]) -> Table:
    """Every cell of the record that is empty, and why."""
    rows = [[name, *row] for name, model in record["models"].items() for row in _reasons(model)]
    return Table(["model", "site", "empty", "because"], rows, text=4)


def _reasons(model: Mapping[str, Any]) -> Iterator[list[str]]:
    """Site, cell and reason, for every empty cell of a model."""
    yield from (["", part, why] for part, why in model["reasons"].items())
    yield from ([site, "everything", UNKNOWN] for site in model["unknown"])
    for site, cells in model["sites"].items():
        by_reason: dict[str, list[str]] = {}
        for name, why in cells["reasons"].items():
            if not why.startswith("only a"):  # of another kind of norm
                by_reason.setdefault(why, []).append(name)
        yield from ([site, ", ".join(empty), why] for why, empty in by_reason.items())
    for site, places in (model["normality"] or {}).items():
        for place in PLACES:
            yield from ([site, f"{place}: {name}", why] for name, why in places[place]["reasons"].items())
    for site, pairs in (model["likelihood"] or {}).items():
        yield from ([site, f"λ: {name}", why] for name, why in pairs["reasons"].items())
    for point in model["plane"] or ():
        if why := point["ib"]["reason"]:
            yield [point["site"], f"information, {point['estimator']}", why]
