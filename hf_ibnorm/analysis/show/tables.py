"""The numbers of a survey as rows: the CSV files, and the tables of the report, from its record."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations
from statistics import fmean, median
from typing import Any

from ...norms import all_measures
from ...report.tables import Table, number_cell
from ..model import PLACES
from ..normality import OF_CHANNELS, OF_PAIRS
from ..plane import PlanePoint

UNKNOWN = "a norm of an unknown kind"
"""Why a module that has the name of a norm is not measured."""
Row = dict[str, Any]
DEPENDENCE = {
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
    **{f"{title}, after": (".4f", "normality", "after", name, "mean") for title, name in DEPENDENCE.items()},
}
"""Title → format, part of a model's record, and path to the number in a site's results."""


def cell_at(cells: Any, *keys: str) -> Any:
    """The cell under nested keys; None where one of them is missing or empty."""
    for key in keys:
        cells = None if cells is None else cells.get(key)
    return cells


def csv_rows(record: Mapping[str, Any]) -> dict[str, list[Row]]:
    """CSV file → its rows; a norm's diagnostic that keeps a histogram has a file of its own name."""
    files = defaultdict[str, list[Row]](list)
    for name, model in record["models"].items():
        for step, stage in (*([(0, model["start"])] if model["start"] else []), (model["step"], model)):
            for file, row in _stage_rows(model, stage):
                files[file].append({"model": name, "step": step, **row})
        noise = model["noise"] or {"sites": ()}
        for (i, noisy), (j, measured) in combinations(enumerate(noise["sites"]), 2):
            numbers = {key: noise[key][i][j] for key in ("zeta", "spread")}
            files["noise"].append({"model": name, "noise_at": noisy, "measured_at": measured, **numbers})
        files["plane"] += ({"model": name, **_plane_row(point)} for point in model["plane"] or ())
    return {f"{name}.csv": rows for name, rows in files.items() if rows}


def _stage_rows(model: Mapping[str, Any], stage: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    """File and row for each number of a model as it is now, or as it was at step 0."""
    reasons = {**model["reasons"], **dict.fromkeys(model["unknown"], UNKNOWN)} if stage is model else {}
    facts = {key: model[key] for key in ("norm", "folder", "tokens", "tokens_sha")}
    yield "models", {**facts, "loss": stage["loss"], "reasons": _joined(reasons)}
    for site, cells in stage["sites"].items():
        yield "sites", {"site": site, **_flat(cells)}
        for name in (m.name for m in all_measures().values() if m.bins and cells.get(m.name)):
            edges = [None, *cells[name]["edges"], None]
            counts = [cells[name]["below"], *cells[name]["counts"], cells[name]["above"]]
            for low, high, count in zip(edges, edges[1:], counts, strict=False):
                yield name, {"site": site, "low": low, "high": high, "rows": count}
    for site, places in (stage["normality"] or {}).items():
        for place in PLACES:
            for file, row in _normality_rows(places[place]):
                yield file, {"site": site, "place": place, **row}
    for site, pairs in (stage["likelihood"] or {}).items():
        yield "likelihood", {"site": site, **_flat(pairs)}
        for newton, likelihood in zip(pairs["newton"] or (), pairs["likelihood"] or (), strict=True):
            yield "likelihood_rows", {"site": site, "newton": newton, "likelihood": likelihood}


def _flat(cells: Mapping[str, Any], prefix: str = "") -> Row:
    """Nested numbers in one row, as `before_mean` and `before_quantile_0.5`; the reasons for empty cells at its end.

    Lists are left out: they have files of their own.
    """
    row: Row = {}
    groups = (*PLACES, *(each.name for each in all_measures().values() if each.spread))
    for name, cell in cells.items():
        if isinstance(cell, Mapping) and name != "reasons":
            row |= _flat(cell, f"{prefix}{name.replace('quantiles', 'quantile')}_")
        elif not isinstance(cell, Mapping | list) and not (cell is None and name in groups):
            row[prefix + name] = cell
    return {**row, "reasons": _joined(cells["reasons"])} if "reasons" in cells else row


def _joined(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())


def _normality_rows(sample: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    """File and row of a sample as a whole, of its channels, of pairs of them, and of its Q-Q data."""
    yield "normality", _flat({name: cell for name, cell in sample.items() if cell is not None})
    for file, keys, names in (
        ("channels", [{"channel": channel} for channel in sample["channels"]], OF_CHANNELS),
        ("pairs", [{"first": first, "second": second} for first, second in sample["pairs"]], OF_PAIRS),
    ):
        columns = {name: sample[name]["each"] for name in names if sample[name] is not None}
        for i, key in enumerate(keys if columns else ()):
            yield file, {**key, **{name: values[i] for name, values in columns.items()}}
    for channel in sample["qq"]:
        for theoretical, ordered in zip(channel["theoretical"], channel["ordered"], strict=True):
            yield "qq", {"channel": channel["channel"], "theoretical": theoretical, "ordered": ordered}


def _plane_row(point: Mapping[str, Any]) -> Row:
    row: Row = {name: point[name] for name in ("step", "site", "estimator", "beta")}
    for name, estimate in (("i_xt", point["input"]), ("i_ty", point["output"]), ("ib", point["ib"])):
        low, high = estimate["interval"] or (None, None)
        row |= {name: estimate["value"], f"{name}_low": low, f"{name}_high": high, f"{name}_chance": estimate["chance"]}
    return {**row, "n": point["ib"]["n"], "reason": point["ib"]["reason"]}


def median_table(record: Mapping[str, Any]) -> Table:
    """A column for each model: medians over its norms."""
    models = record["models"].values()
    table = Table(["median over the norms", *record["models"]])
    table.rows.append(["norm", *(model["norm"] for model in models)])
    table.rows.append(["loss, nats a token", *(f"{model['loss']:.4f}" for model in models)])
    for title, (form, part, *keys) in MEDIANS.items():
        columns = [[cell_at(site, *keys) for site in (model[part] or {}).values()] for model in models]
        table.rows.append([title, *(_average(median, column, form) for column in columns)])
    zeta = [[line[-1] for line in cell_at(model, "noise", "zeta") or ()] for model in models]
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
        cells = (number_cell(cell_at(site, *keys), ".4g") for keys in columns.values())
        table.rows.append([name, site["norm"], str(site["rows"]), *cells])
    return table


def normality_table(stage: Mapping[str, Any]) -> Table:
    """Two rows for each norm: its input and its output."""
    columns = {f"Q-Q R², {key}": (".4f", "r_squared", key) for key in ("mean", "least")}
    columns |= {f"{title} rejects": (".0%", name, "rejected") for title, name in TESTS.items()}
    columns |= {f"mean {title}": (".4f", name, "mean") for title, name in DEPENDENCE.items()}
    table = Table(["site", "", "rows", *columns], text=2)
    for site, places in stage["normality"].items():
        for place in PLACES:
            cells = (number_cell(cell_at(places[place], *keys), form) for form, *keys in columns.values())
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
