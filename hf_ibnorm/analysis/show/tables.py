"""The tables in the report of a survey, from its record."""

from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean, median
from typing import Any

from ...norms import all_measures
from ...report.tables import Table, number_cell
from ..model import PLACES
from ..plane import PlanePoint
from .rows import UNKNOWN

OF_PAIRS = (
    ("|r|", "correlation"),
    ("|r| of ranks", "rank_correlation"),
    ("AMI", "mutual_information"),
    ("AMI, uniform bins", "mutual_information_uniform"),
)
TESTS = (("D'Agostino", "dagostino"), ("Anderson-Darling", "anderson_darling"), ("Henze-Zirkler", "henze_zirkler"))


def median_table(record: Mapping[str, Any]) -> Table:
    """A column for each model: medians over its norms."""
    models = record["models"].values()
    table = Table(["median over the norms", *record["models"]])
    table.rows.append(["norm", *(model["norm"] for model in models)])
    table.rows.append(["loss, nats a token", *(f"{model['loss']:.4f}" for model in models)])
    for title, place, key, form in (
        *(("excess kurtosis", place, "excess_kurtosis", ".3f") for place in PLACES),
        ("near zero", "after", "near_zero", ".3f"),
        ("Hoyer sparsity", "after", "hoyer", ".3f"),
        ("largest / median size", "before", "massive", ".1f"),
        ("effective rank", "after", "effective_rank", ".1f"),
    ):
        table.rows.append([f"{title}, {place}", *(_median(model["sites"], place, key, form=form) for model in models)])
    for title, key in (("Q-Q R²", "r_squared"), *OF_PAIRS):
        cells = (_median(model["normality"] or {}, "after", key, "mean", form=".4f") for model in models)
        table.rows.append([f"{title}, after", *cells])
    table.rows.append(["ζ to the last norm, mean", *map(_mean_zeta, models)])
    return table


def _median(sites: Mapping[str, Any], *keys: str, form: str) -> str:
    """Median over sites of the number that is found under nested keys."""
    numbers = [number for site in sites.values() if (number := _cell(site, *keys)) is not None]
    return format(median(numbers), form) if numbers else "-"


def _mean_zeta(model: Mapping[str, Any]) -> str:
    zeta = [line[-1] for line in model["noise"]["zeta"] if line[-1] is not None] if model["noise"] else []
    return f"{fmean(zeta):.3f}" if zeta else "-"


def _cell(cells: Any, *keys: str) -> Any:
    """What is found under nested keys; None where there is nothing on the way."""
    for key in keys:
        cells = None if cells is None else cells.get(key)
    return cells


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
        cells = (number_cell(_cell(site, *keys), ".4g") for keys in columns.values())
        table.rows.append([name, site["norm"], str(site["rows"]), *cells])
    return table


def normality_table(stage: Mapping[str, Any]) -> Table:
    """Two rows for each norm: what goes in and what comes out."""
    columns = {f"Q-Q R², {key}": ("r_squared", key, ".4f") for key in ("mean", "least")}
    columns |= {f"{title} rejects": (test, "rejected", ".0%") for title, test in TESTS}
    columns |= {f"mean {title}": (name, "mean", ".4f") for title, name in OF_PAIRS}
    table = Table(["site", "", "rows", *columns], text=2)
    for site, places in stage["normality"].items():
        for place in PLACES:
            cells = (number_cell(_cell(places[place], *keys), form) for *keys, form in columns.values())
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
    """What is empty anywhere, and why."""
    rows = [[name, *row] for name, model in record["models"].items() for row in _reasons(model)]
    return Table(["model", "site", "empty", "because"], rows, text=4)


def _reasons(model: Mapping[str, Any]) -> Iterator[list[str]]:
    """Site, cell and reason, for every empty cell of a model."""
    for part, why in model["reasons"].items():
        yield ["", part, why]
    for site in model["unknown"]:
        yield [site, "everything", UNKNOWN]
    for site, cells in model["sites"].items():
        by_reason: dict[str, list[str]] = {}
        for cell, why in cells["reasons"].items():
            if not why.startswith("only a"):  # of another kind of norm
                by_reason.setdefault(why, []).append(cell)
        for why, empty in by_reason.items():
            yield [site, ", ".join(empty), why]
    for site, places in (model["normality"] or {}).items():
        for place in PLACES:
            for cell, why in places[place]["reasons"].items():
                yield [site, f"{place}: {cell}", why]
    for site, pairs in (model["likelihood"] or {}).items():
        for cell, why in pairs["reasons"].items():
            yield [site, f"λ: {cell}", why]
    for point in model["plane"] or ():
        if why := point["ib"]["reason"]:
            yield [point["site"], f"information, {point['estimator']}", why]
