"""docs/insight.md: what the norms of five small models do, from what `hf-ibnorm analyze` wrote.

    python benchmarks/insight.py [REPORT]

With the folder of a report its CSV files are copied to docs/results/insight first, with what the pictures need beside
them; without, the tables of the page and the pictures are made from those that are there. `make insight` trains the
models, looks at them and does both.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from page import fill

from hf_ibnorm.analysis.information import Estimate
from hf_ibnorm.analysis.noise import NoiseRobustness
from hf_ibnorm.analysis.plane import PlanePoint
from hf_ibnorm.analysis.show import pictures, plane_pictures
from hf_ibnorm.analysis.show.axes import short_site
from hf_ibnorm.analysis.show.describe import qq_grid
from hf_ibnorm.base.files import write_json, write_text
from hf_ibnorm.report.tables import Table

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs/insight.md", ROOT / "docs/results/insight"
DRAWN = RESULTS / "pictures.json"
"""Numbers of pictures that no table has: histograms, pairs and quantiles."""
TABLES = ("sites", "normality", "likelihood", "noise", "plane")
PLACES = ("before", "after")


def adopt(report: Path) -> None:
    """Copy what the page is made of."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        shutil.copyfile(report / f"{name}.csv", RESULTS / f"{name}.csv")
    record = json.loads((report / "analysis.json").read_text(encoding="utf-8"))
    models = record["models"].items()
    of_models = {name: {key: model[key] for key in ("norm", "step", "tokens", "loss")} for name, model in models}
    write_json(RESULTS / "facts.json", {**record, "models": of_models})
    lam_hat = {
        name: {site: cells["lam_hat"] for site, cells in model["sites"].items() if cells["lam_hat"]}
        for name, model in models
    }
    likelihood = {name: model["likelihood"] for name, model in models if model["likelihood"]}
    kept = {"lam_hat": lam_hat, "likelihood": likelihood, "qq": qq_grid(record["models"])}
    # Five digits are more than a picture shows.
    write_text(DRAWN, json.dumps(json.loads(json.dumps(kept), parse_float=lambda text: float(f"{float(text):.5g}"))))


def read(name: str) -> pd.DataFrame:
    """A table of the report; its `step` is that of a checkpoint."""
    return pd.read_csv(RESULTS / f"{name}.csv")


def facts() -> dict[str, Any]:
    """What was measured on what."""
    record: dict[str, Any] = json.loads((RESULTS / "facts.json").read_text(encoding="utf-8"))
    return record


def trained(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of the finished models."""
    steps = {name: model["step"] for name, model in facts()["models"].items()}
    return rows[rows["step"] == rows["model"].map(steps)]


def draw() -> None:
    """Draw every picture that there are numbers for; one without numbers stays as it is."""
    kept = json.loads(DRAWN.read_text(encoding="utf-8")) if DRAWN.is_file() else {"lam_hat": {}}
    sites: dict[str, dict[str, Any]] = {name: {} for name in facts()["models"]}
    for row in trained(read("sites")).to_dict("records"):
        site = sites[row["model"]][row["site"]] = _statistics(row)
        site["lam_hat"] = kept["lam_hat"].get(row["model"], {}).get(row["site"], site["lam_hat"])
    points = {
        name: [_point(row) for row in rows.to_dict("records")]
        for name, rows in read("plane").groupby("model", sort=False)
    }
    pictures.draw_profiles(sites, RESULTS / "profiles.png")
    pictures.draw_norm_profiles(sites, RESULTS / "norms.png")
    pictures.draw_lam_hat(sites, RESULTS / "lam_hat.png")
    noise = {name: _noise(rows) for name, rows in read("noise").groupby("model", sort=False)}
    pictures.draw_zeta(noise, RESULTS / "zeta.png")
    plane_pictures.draw_plane(points, RESULTS / "plane.png")
    plane_pictures.draw_ib(points, RESULTS / "ib.png")
    if DRAWN.is_file():
        pictures.draw_likelihood(kept["likelihood"], RESULTS / "likelihood.png")
        pictures.draw_qq(kept["qq"], RESULTS / "qq.png")


def _statistics(row: dict[str, Any]) -> dict[str, Any]:
    """A site's statistics from their row, without its empty cells."""
    cells = {key: cell for key, cell in row.items() if not pd.isna(cell)}
    parts = {
        part: {key.removeprefix(f"{part}_"): cell for key, cell in cells.items() if key.startswith(f"{part}_")} or None
        for part in (*PLACES, "lam_hat", "p_std")
    }
    return {**cells, **parts}


def _noise(rows: pd.DataFrame) -> NoiseRobustness:
    sites = tuple(dict.fromkeys([*rows["noise_at"], *rows["measured_at"]]))

    def grid(values: str) -> tuple[tuple[float | None, ...], ...]:
        cells = rows.pivot(index="noise_at", columns="measured_at", values=values).reindex(index=sites, columns=sites)
        return tuple(tuple(None if pd.isna(cell) else cell for cell in line) for line in cells.to_numpy())

    options = facts()["options"]
    return NoiseRobustness(options["delta"], options["draws"], sites, grid("zeta"), grid("spread"), 0)


def _point(row: dict[str, Any]) -> PlanePoint:
    known = {key: None if pd.isna(cell) else cell for key, cell in row.items()}

    def estimate(key: str) -> Estimate:
        ends = known[f"{key}_low"], known[f"{key}_high"]
        reason = known["reason"] or ""
        return Estimate(known[key], None if None in ends else ends, known[f"{key}_chance"], row["n"], reason)

    estimates = map(estimate, ("i_xt", "i_ty", "ib"))
    return PlanePoint(known["step"], row["site"], row["estimator"], *estimates, row["beta"])


def from_to(row: pd.Series, column: str, form: str) -> str:
    """What goes in, and what comes out."""
    return " → ".join(f"{row[f'{place}_{column}']:{form}}" for place in PLACES)


def dashed(value: float, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if pd.isna(value) else format(value, form)


def shape_table() -> Table:
    """What the norms make of a row: medians over the norms."""
    columns = ["model", "row's excess kurtosis", "near zero", "Hoyer", "largest / median size"]
    table = Table([*columns, "var(s) / var(x)", "saturated", "mean slope", "effective rank, out"])
    own = {"contraction": ".3g", "saturation": ".1%", "slope": ".3f", "after_effective_rank": ".1f"}
    for name, row in trained(read("sites")).groupby("model", sort=False).median(numeric_only=True).iterrows():
        cells = [from_to(row, column, ".3f") for column in ("row_excess_kurtosis", "near_zero", "hoyer")]
        cells += [from_to(row, "massive", ".1f"), *(dashed(row[column], form) for column, form in own.items())]
        table.rows.append([str(name), *cells])
    return table


def normality_table() -> Table:
    """How normal channels are, at the start and at the end: medians over the norms."""
    columns = {
        "Q-Q R², in → out": ("r_squared_mean", ".4f"),
        "D'Agostino rejects": ("dagostino_rejected", ".0%"),
        "Henze-Zirkler rejects": ("henze_zirkler_rejected", ".0%"),
        "mean abs. r": ("correlation_mean", ".3f"),
        "of ranks": ("rank_correlation_mean", ".3f"),
        "AMI": ("mutual_information_mean", ".3f"),
        "AMI, uniform bins": ("mutual_information_uniform_mean", ".3f"),
    }
    medians = read("normality").groupby(["model", "step", "place"], sort=False).median(numeric_only=True)
    table = Table(["model", "step", *columns])
    for name, step in dict.fromkeys(key[:2] for key in medians.index):
        by_place = [medians.loc[name, step, place] for place in PLACES]
        cells = (" → ".join(dashed(each[column], form) for each in by_place) for column, form in columns.values())
        table.rows.append([name, str(step), *cells])
    return table


def lam_table() -> Table:
    """λ̂ and the width of a row after the power transform, norm by norm."""
    columns = {"lam_hat_mean": ".2f", "lam_hat_least": ".2f", "lam_hat_most": ".2f", "lam_hat_outside": ".2%"}
    columns |= {"p_std_mean": ".3f", "p_std_least": ".3f", "correlation": ".3f"}
    table = Table(["norm", "λ̂, mean", "least", "most", "outside [0, 2]", "std p, mean", "least", "r with likelihood"])
    keys = ["model", "step", "site"]
    sites = trained(read("sites")).dropna(subset="lam_hat_mean")
    for row in sites.merge(read("likelihood")[[*keys, "correlation"]], on=keys).to_dict("records"):
        table.rows.append([row["site"], *(format(row[column], form) for column, form in columns.items())])
    return table


def noise_table() -> Table:
    """ζ from every norm to the last, and its mean."""
    rows = read("noise")
    rows = rows[rows["measured_at"] == rows["measured_at"].iloc[-1]]
    table = Table(["model", *map(short_site, dict.fromkeys(rows["noise_at"])), "mean"])
    for name, zeta in rows.groupby("model", sort=False)["zeta"]:
        table.rows.append([str(name), *(f"{value:.3f}" for value in (*zeta, zeta.mean()))])
    return table


def plane_table() -> Table:
    """The information plane of the last norm and over all norms, at the end of training."""
    columns = ["model", "estimator", "I(X;T)", "I(T;Y)", "IB value", "mean over the norms: I(X;T)", "I(T;Y)"]
    table = Table([*columns, "IB value"])
    for (name, estimator), rows in trained(read("plane")).groupby(["model", "estimator"], sort=False):
        last = rows.iloc[-1]
        cells = [f"{last[key]:.2f} ({last[f'{key}_low']:.2f} to {last[f'{key}_high']:.2f})" for key in KEYS]
        table.rows.append([name, estimator, *cells, *(f"{rows[key].mean():.3f}" for key in KEYS)])
    return table


KEYS = ("i_xt", "i_ty", "ib")


def made_with() -> str:
    """What was measured on what, in a line."""
    record = facts()
    environment, models = record["environment"], record["models"]
    tokens = min(model["tokens"] for model in models.values())
    losses = ", ".join(f"{name} {model['loss']:.3f}" for name, model in models.items())
    torch = environment["versions"]["torch"].partition("+")[0]
    where = f"{environment['cpu_count']} cores of an {environment['device']}, torch {torch}"
    return f"{tokens:,} tokens of {record['text']}; {where}, {environment['date'][:10]}. Loss there, nats: {losses}.\n"


def tables() -> dict[str, str]:
    """What the page shows of the results."""
    made = {"shape": shape_table, "normality": normality_table, "lam": lam_table, "noise": noise_table}
    made |= {"plane": plane_table}
    return {**{name: table().markdown() for name, table in made.items()}, "made": made_with()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, nargs="?", help="folder that hf-ibnorm analyze wrote (default: none)")
    report = parser.parse_args().report
    if report is not None:
        adopt(report)
    draw()
    made = tables()
    fill(PAGE, made)
    print(*made.values(), sep="\n")


if __name__ == "__main__":
    main()
