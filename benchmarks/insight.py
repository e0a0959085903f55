"""docs/insight.md: what the norms of five small models do, from what `hf-ibnorm analyze` wrote.

    python benchmarks/insight.py [REPORT]

With the folder of a report its CSV files are copied to docs/results/insight first, with what the pictures need beside
them; without, the tables of the page and the pictures are made from those that are there. `make insight` trains the
models, looks at them and does both.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from statistics import fmean, median
from typing import Any

from page import Row, fill, read_rows

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


def draw() -> None:
    """Draw every picture that there are numbers for; one without numbers stays as it is."""
    shown = facts()["models"]
    found = json.loads(DRAWN.read_text(encoding="utf-8")) if DRAWN.is_file() else {"lam_hat": {}}
    sites: dict[str, dict[str, Any]] = {name: {} for name in shown}
    for row in read("sites"):
        if row["step"] == str(shown[row["model"]]["step"]):
            sites[row["model"]][row["site"]] = _statistics(row)
    for name, each in found["lam_hat"].items():
        for site, histogram in each.items():
            sites[name][site]["lam_hat"] = histogram
    pictures.draw_profiles(sites, RESULTS / "profiles.png")
    pictures.draw_norm_profiles(sites, RESULTS / "norms.png")
    pictures.draw_lam_hat(sites, RESULTS / "lam_hat.png")
    pictures.draw_zeta({name: _noise(of_model(read("noise"), name, None)) for name in shown}, RESULTS / "zeta.png")
    points = {name: [_point(row) for row in of_model(read("plane"), name, None)] for name in shown}
    plane_pictures.draw_plane(points, RESULTS / "plane.png")
    plane_pictures.draw_ib(points, RESULTS / "ib.png")
    if DRAWN.is_file():
        pictures.draw_likelihood(found["likelihood"], RESULTS / "likelihood.png")
        pictures.draw_qq(found["qq"], RESULTS / "qq.png")


def _statistics(row: Row) -> dict[str, Any]:
    """A site's statistics from their row."""
    numbers = {key: float(cell) for key, cell in row.items() if re.fullmatch(r"-?[\d.]+(e-?\d+)?", cell)}
    site: dict[str, Any] = {key: value for key, value in numbers.items() if "_" not in key}
    for part in (*PLACES, "lam_hat", "p_std"):
        cells = {key.removeprefix(f"{part}_"): value for key, value in numbers.items() if key.startswith(f"{part}_")}
        site[part] = cells or None
    return {**site, "width": int(row["width"])}


def _noise(rows: list[Row]) -> NoiseRobustness:
    sites = tuple(dict.fromkeys(row[key] for key in ("noise_at", "measured_at") for row in rows))
    found = {(row["noise_at"], row["measured_at"]): row for row in rows}

    def grid(key: str) -> tuple[tuple[float | None, ...], ...]:
        cells = [[found.get((a, b), {}).get(key) for b in sites] for a in sites]
        return tuple(tuple(float(cell) if cell else None for cell in line) for line in cells)

    options = facts()["options"]
    return NoiseRobustness(options["delta"], options["draws"], sites, grid("zeta"), grid("spread"), 0)


def _point(row: Row) -> PlanePoint:
    def estimate(key: str) -> Estimate:
        value, *ends, chance = (
            float(row[name]) if row[name] else None for name in (key, f"{key}_low", f"{key}_high", f"{key}_chance")
        )
        interval = None if None in ends else (ends[0], ends[1])
        return Estimate(value, interval, chance, int(row["n"]), row["reason"])

    step = int(row["step"]) if row["step"] else None
    return PlanePoint(step, row["site"], row["estimator"], *map(estimate, KEYS), float(row["beta"]))


def read(name: str) -> list[Row]:
    return read_rows(RESULTS / f"{name}.csv")


def facts() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "facts.json").read_text(encoding="utf-8"))
    return found


def of_model(rows: list[Row], model: str, step: int | None) -> list[Row]:
    return [row for row in rows if row["model"] == model and (step is None or row["step"] == str(step))]


def middle(rows: list[Row], column: str, form: str) -> str:
    """Median over the norms; a dash where none has a number."""
    values = [float(row[column]) for row in rows if row[column]]
    return format(median(values), form) if values else "-"


def from_to(rows: list[Row], column: str, form: str) -> str:
    return " → ".join(middle(rows, f"{place}_{column}", form) for place in PLACES)


def shape_table() -> str:
    """What the norms make of a row."""
    columns = ["model", "row's excess kurtosis", "near zero", "Hoyer", "largest / median size"]
    table = Table([*columns, "var(s) / var(x)", "saturated", "mean slope", "effective rank, out"])
    sites = read("sites")
    for name, model in facts()["models"].items():
        rows = of_model(sites, name, model["step"])
        cells = [from_to(rows, column, ".3f") for column in ("row_excess_kurtosis", "near_zero", "hoyer")]
        cells += [from_to(rows, "massive", ".1f"), middle(rows, "contraction", ".3g")]
        cells += [middle(rows, "saturation", ".1%"), middle(rows, "slope", ".3f")]
        table.rows.append([name, *cells, middle(rows, "after_effective_rank", ".1f")])
    return table.markdown()


def normality_table() -> str:
    """How normal channels are, at the start and at the end."""
    columns = ["model", "step", "Q-Q R², in → out", "D'Agostino rejects", "Henze-Zirkler rejects", "mean abs. r"]
    table = Table([*columns, "of ranks", "AMI", "AMI, uniform bins"])
    rows = read("normality")
    for name, model in facts()["models"].items():
        for step in (0, model["step"]):
            here = of_model(rows, name, step)
            by_place = [[row for row in here if row["place"] == place] for place in PLACES]
            cells = [
                " → ".join(middle(each, column, form) for each in by_place)
                for column, form in (
                    ("r_squared_mean", ".4f"),
                    ("dagostino_rejected", ".0%"),
                    ("henze_zirkler_rejected", ".0%"),
                    ("correlation_mean", ".3f"),
                    ("rank_correlation_mean", ".3f"),
                    ("mutual_information_mean", ".3f"),
                    ("mutual_information_uniform_mean", ".3f"),
                )
            ]
            table.rows.append([name, str(step), *cells])
    return table.markdown()


def lam_table() -> str:
    """λ̂ and the width of a row after the power transform, norm by norm."""
    table = Table(["norm", "λ̂, mean", "least", "most", "outside [0, 2]", "std p, mean", "least", "r with likelihood"])
    sites, pairs = read("sites"), read("likelihood")
    for name, model in facts()["models"].items():
        for row in of_model(sites, name, model["step"]):
            if not row["lam_hat_mean"]:
                continue
            (found,) = (each for each in of_model(pairs, name, model["step"]) if each["site"] == row["site"])
            cells = [f"{float(row[f'lam_hat_{key}']):.2f}" for key in ("mean", "least", "most")]
            cells += [f"{float(row['lam_hat_outside']):.2%}"]
            cells += [f"{float(row[f'p_std_{key}']):.3f}" for key in ("mean", "least")]
            table.rows.append([row["site"], *cells, f"{float(found['correlation']):.3f}"])
    return table.markdown()


def noise_table() -> str:
    """ζ from every norm to the last, and its mean."""
    rows = read("noise")
    last = rows[-1]["measured_at"]
    sites = list(dict.fromkeys(row["noise_at"] for row in rows))
    table = Table(["model", *map(short_site, sites), "mean"])
    for name in facts()["models"]:
        values = [float(row["zeta"]) for row in of_model(rows, name, None) if row["measured_at"] == last]
        table.rows.append([name, *(f"{value:.3f}" for value in values), f"{fmean(values):.3f}"])
    return table.markdown()


def plane_table() -> str:
    """The information plane of the last norm and over all norms, at the end of training."""
    columns = ["model", "estimator", "I(X;T)", "I(T;Y)", "IB value", "mean over the norms: I(X;T)", "I(T;Y)"]
    table = Table([*columns, "IB value"])
    rows = read("plane")
    for name, model in facts()["models"].items():
        for estimator in ("renyi", "ksg"):
            here = [row for row in of_model(rows, name, model["step"]) if row["estimator"] == estimator]
            last = here[-1]
            ends = {key: [float(last[f"{key}{end}"]) for end in ("", "_low", "_high")] for key in KEYS}
            cells = [f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in ends.values()]
            means = [f"{fmean(float(row[key]) for row in here):.3f}" for key in KEYS]
            table.rows.append([name, estimator, *cells, *means])
    return table.markdown()


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
    return {
        "shape": shape_table(),
        "normality": normality_table(),
        "lam": lam_table(),
        "noise": noise_table(),
        "plane": plane_table(),
        "made": made_with(),
    }


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
