"""The CSV files of a survey: every number of its record that belongs to a norm."""

from collections.abc import Iterator, Mapping
from typing import Any

from ...norms import all_measures
from ..model import PLACES
from ..normality import OF_CHANNELS, OF_PAIRS

FILES = (
    *("models", "sites", "normality", "channels", "pairs", "qq"),
    *("likelihood", "likelihood_rows", "noise", "plane"),
)
"""One without a row is not written. A diagnostic of a norm that keeps a histogram has one more, of its own name."""
UNKNOWN = "a norm of an unknown kind"
"""Why a module that has the name of a norm is not measured."""
Row = dict[str, Any]


def csv_rows(record: Mapping[str, Any]) -> dict[str, list[Row]]:
    """CSV file → its rows."""
    files: dict[str, list[Row]] = {name: [] for name in FILES}
    for name, model in record["models"].items():
        for step, stage in (*([(0, model["start"])] if model["start"] else []), (model["step"], model)):
            for file, row in _stage_rows({"model": name, "step": step}, model, stage):
                files.setdefault(file, []).append(row)
        files["noise"] += ({"model": name, **row} for row in _noise_rows(model["noise"]))
        files["plane"] += ({"model": name, **_plane_row(point)} for point in model["plane"] or ())
    return {f"{name}.csv": rows for name, rows in files.items()}


def _stage_rows(at: Row, model: Mapping[str, Any], stage: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    """File and row for each number of a model as it is now, or as it was at step 0."""
    reasons = {**model["reasons"], **dict.fromkeys(model["unknown"], UNKNOWN)} if stage is model else {}
    facts = {key: model[key] for key in ("norm", "folder", "tokens", "tokens_sha")}
    yield "models", {**at, **facts, "loss": stage["loss"], "reasons": _joined(reasons)}
    for site, cells in stage["sites"].items():
        yield "sites", {**at, "site": site, **_flat(cells)}
        for name in (m.name for m in all_measures().values() if m.bins and cells.get(m.name)):
            edges = [None, *cells[name]["edges"], None]
            counts = [cells[name]["below"], *cells[name]["counts"], cells[name]["above"]]
            for low, high, count in zip(edges, edges[1:], counts, strict=False):
                yield name, {**at, "site": site, "low": low, "high": high, "rows": count}
    for site, places in (stage["normality"] or {}).items():
        for place in PLACES:
            yield from _normality_rows({**at, "site": site, "place": place}, places[place])
    for site, pairs in (stage["likelihood"] or {}).items():
        yield "likelihood", {**at, "site": site, **_flat(pairs)}
        for newton, likelihood in zip(pairs["newton"] or (), pairs["likelihood"] or (), strict=True):
            yield "likelihood_rows", {**at, "site": site, "newton": newton, "likelihood": likelihood}


def _flat(cells: Mapping[str, Any], prefix: str = "") -> Row:
    """Nested numbers in one row, as `before_mean` and `before_quantile_0.5`; why a cell is empty at its end.

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


def _normality_rows(at: Row, sample: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    """File and row of a sample as a whole, of its channels, of pairs of them, and of its Q-Q data."""
    row = {**at, "rows": sample["rows"], "constant": sample["constant"]}
    for name in (*OF_CHANNELS, *OF_PAIRS):
        row |= {f"{name}_{key}": cell for key, cell in (sample[name] or {}).items() if key != "each"}
    yield "normality", {**row, "reasons": _joined(sample["reasons"])}
    for file, keys, names in (
        ("channels", [{"channel": channel} for channel in sample["channels"]], OF_CHANNELS),
        ("pairs", [dict(zip(("first", "second"), pair, strict=True)) for pair in sample["pairs"]], OF_PAIRS),
    ):
        columns = {name: sample[name]["each"] for name in names if sample[name] is not None}
        for i, key in enumerate(keys if columns else ()):
            yield file, {**at, **key, **{name: values[i] for name, values in columns.items()}}
    for channel in sample["qq"]:
        for theoretical, ordered in zip(channel["theoretical"], channel["ordered"], strict=True):
            yield "qq", {**at, "channel": channel["channel"], "theoretical": theoretical, "ordered": ordered}


def _noise_rows(noise: Mapping[str, Any] | None) -> Iterator[Row]:
    sites = noise["sites"] if noise else ()
    for i, noisy in enumerate(sites):
        for j, measured in list(enumerate(sites))[i + 1 :]:
            cell = {name: noise[name][i][j] for name in ("zeta", "spread")} if noise else {}
            yield {"noise_at": noisy, "measured_at": measured, **cell}


def _plane_row(point: Mapping[str, Any]) -> Row:
    row: Row = {name: point[name] for name in ("step", "site", "estimator", "beta")}
    for name, estimate in (("i_xt", point["input"]), ("i_ty", point["output"]), ("ib", point["ib"])):
        low, high = estimate["interval"] or (None, None)
        row |= {name: estimate["value"], f"{name}_low": low, f"{name}_high": high, f"{name}_chance": estimate["chance"]}
    return {**row, "n": point["ib"]["n"], "reason": point["ib"]["reason"]}
