"""The CSV files of a survey: every number of its record that belongs to a norm."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from ...norms import all_measures
from ..model import PLACES
from ..normality import OF_CHANNELS, OF_PAIRS

UNKNOWN = "a norm of an unknown kind"
"""Why a module that has the name of a norm is not measured."""
Row = dict[str, Any]


def cell(cells: Any, *keys: str) -> Any:
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
        files["noise"] += ({"model": name, **row} for row in _noise_rows(model["noise"] or {"sites": ()}))
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
    row = {"rows": sample["rows"], "constant": sample["constant"]}
    for name in (*OF_CHANNELS, *OF_PAIRS):
        row |= {f"{name}_{key}": cell for key, cell in (sample[name] or {}).items() if key != "each"}
    yield "normality", {**row, "reasons": _joined(sample["reasons"])}
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


def _noise_rows(noise: Mapping[str, Any]) -> Iterator[Row]:
    for (i, noisy), (j, measured) in combinations(enumerate(noise["sites"]), 2):
        numbers = {name: noise[name][i][j] for name in ("zeta", "spread")}
        yield {"noise_at": noisy, "measured_at": measured, **numbers}


def _plane_row(point: Mapping[str, Any]) -> Row:
    row: Row = {name: point[name] for name in ("step", "site", "estimator", "beta")}
    for name, estimate in (("i_xt", point["input"]), ("i_ty", point["output"]), ("ib", point["ib"])):
        low, high = estimate["interval"] or (None, None)
        row |= {name: estimate["value"], f"{name}_low": low, f"{name}_high": high, f"{name}_chance": estimate["chance"]}
    return {**row, "n": point["ib"]["n"], "reason": point["ib"]["reason"]}
