"""The page that shows what was found in some models: pictures, tables, and what the numbers are."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..report.page import Page
from ..report.tables import Table
from . import pictures
from .information import Estimate
from .model import PLACES
from .noise import NoiseRobustness
from .plane import PlanePoint, plane_table

UNKNOWN = "a norm of an unknown kind"
"""Why a module that is called a norm is not looked at."""


def points_of(model: Mapping[str, Any]) -> list[PlanePoint]:
    """The information plane of a model of a record, as it was before it became JSON."""
    return [
        PlanePoint(**{**point, **{name: Estimate(**point[name]) for name in ("input", "output", "ib")}})
        for point in model["plane"] or ()
    ]


def noise_of(model: Mapping[str, Any]) -> NoiseRobustness:
    """Robustness to noise of a model of a record; likewise."""
    noise = {name: tuple(map(tuple, cell)) for name, cell in model["noise"].items() if name in ("zeta", "spread")}
    return NoiseRobustness(**{**model["noise"], **noise, "sites": tuple(model["noise"]["sites"])})


def draw(record: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draw the pictures that there are numbers for: file name → what it shows."""
    models = record["models"]
    sites = {name: model["sites"] for name, model in models.items()}
    noise = {name: noise_of(model) for name, model in models.items() if model["noise"] is not None}
    planes = {name: points_of(model) for name, model in models.items() if model["plane"]}
    likelihood = {name: model["likelihood"] for name, model in models.items() if model["likelihood"]}
    drawn = {
        "profiles.png": pictures.draw_profiles(sites, folder / "profiles.png"),
        "norms.png": pictures.draw_norm_profiles(sites, folder / "norms.png"),
        "lam_hat.png": pictures.draw_lam_hat(sites, folder / "lam_hat.png"),
        "likelihood.png": pictures.draw_likelihood(likelihood, folder / "likelihood.png"),
        "qq.png": pictures.draw_qq(qq_panels(models), folder / "qq.png"),
        "zeta.png": bool(noise) and pictures.draw_zeta(noise, folder / "zeta.png"),
        "plane.png": bool(planes) and pictures.draw_plane(planes, folder / "plane.png"),
        "ib.png": bool(planes) and pictures.draw_ib(planes, folder / "ib.png"),
    }
    return {file: PICTURES[file] for file, is_there in drawn.items() if is_there}


def qq_panels(models: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Q-Q data of what comes out of a norm in the middle and the last, at step 0 and now; of the first, too, where
    there is no step 0."""
    started = any(model["start"] for model in models.values())
    panels: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        sites = list(model["normality"] or ())
        places = {"first norm": 0, "middle norm": len(sites) // 2, "last norm": -1} if sites else {}
        for title, i in list(places.items())[started:]:
            for step, stage in ((", step 0", model["start"]), ("", model)):
                if stage:
                    panels.setdefault(name, {})[title + step] = stage["normality"][sites[i]]["after"]["qq"]
    return panels


PICTURES = {
    "profiles.png": "Every norm, from the first to the last: what goes in and what comes out.",
    "norms.png": "What belongs to one kind of norm.",
    "lam_hat.png": "λ̂ of all rows.",
    "likelihood.png": "How far λ̂ of one Newton step is from the λ of the largest likelihood.",
    "qq.png": "Quantiles of four channels, standardized, against those of the normal distribution; R² is their mean.",
    "zeta.png": "ζ: noise added at a row's norm, relative change at a column's.",
    "plane.png": "The information plane.",
    "ib.png": "The IB value of every norm.",
}


def summary(record: Mapping[str, Any]) -> Table:
    """A column for each model: medians over its norms."""
    models = record["models"]
    table = Table(["median over the norms", *models])

    def row(title: str, cells: Iterable[str]) -> None:
        table.rows.append([title, *cells])

    def of_sites(title: str, place: str, cell: str, form: str = ".3f") -> None:
        row(
            f"{title}, {place}",
            (
                _median((site[place] and site[place][cell] for site in model["sites"].values()), form)
                for model in models.values()
            ),
        )

    row("norm", (model["norm"] for model in models.values()))
    row("loss, nats a token", (f"{model['loss']:.4f}" for model in models.values()))
    for place in PLACES:
        of_sites("excess kurtosis", place, "excess_kurtosis")
    of_sites("near zero", "after", "near_zero")
    of_sites("Hoyer sparsity", "after", "hoyer")
    of_sites("largest / median size", "before", "massive", ".1f")
    of_sites("effective rank", "after", "effective_rank", ".1f")
    for title, measure in (("Q-Q R²", "r_squared"), *OF_PAIRS):
        found = ([each["after"][measure] for each in (model["normality"] or {}).values()] for model in models.values())
        row(f"{title}, after", (_median((each and each["mean"] for each in cells), ".4f") for cells in found))
    last = ([line[-1] for line in model["noise"]["zeta"]] if model["noise"] else [] for model in models.values())
    known = ([value for value in values if value is not None] for values in last)
    row("ζ to the last norm, mean", (f"{fmean(values):.3f}" if values else "-" for values in known))
    return table


def _median(values: Iterable[float | None], form: str = ".3f") -> str:
    known = [value for value in values if value is not None]
    return format(median(known), form) if known else "-"


def _sites_table(sites: Mapping[str, Any]) -> Table:
    """A row for each norm: the numbers that most is said with; the CSV file has all."""
    cells = ("mean", "variance", "skewness", "excess_kurtosis", "near_zero", "hoyer", "massive", "effective_rank")
    own = ("contraction", "saturation", "slope")
    columns = [f"{cell.replace('_', ' ')}, {place}" for cell in cells for place in PLACES]
    columns += [*own, "λ̂, mean", "λ̂ outside [0, 2]", "std p, mean", "std p, least"]
    table = Table(["site", "norm", "rows", *columns], text=2)
    for name, site in sites.items():
        row = [site[place] and site[place][cell] for cell in cells for place in PLACES] + [site[cell] for cell in own]
        row += [site["lam_hat"] and site["lam_hat"][cell] for cell in ("mean", "outside")]
        row += [site["p_std"] and site["p_std"][cell] for cell in ("mean", "least")]
        table.rows.append([name, site["norm"], str(site["rows"]), *("-" if v is None else f"{v:.4g}" for v in row)])
    return table


OF_PAIRS = (
    ("|r|", "correlation"),
    ("|r| of ranks", "rank_correlation"),
    ("AMI", "mutual_information"),
    ("AMI, uniform bins", "mutual_information_uniform"),
)
TESTS = ("dagostino", "anderson_darling", "henze_zirkler")


def _normality_table(stage: Mapping[str, Any]) -> Table:
    """Two rows for each norm: what goes in and what comes out."""
    names = ["Q-Q R², mean", "Q-Q R², least", "D'Agostino rejects", "Anderson-Darling rejects", "Henze-Zirkler rejects"]
    table = Table(["site", "", "rows", *names, *(f"mean {title}" for title, _ in OF_PAIRS)], text=2)
    for site, places in stage["normality"].items():
        for place in PLACES:
            found = places[place]
            row = [_cell(found["r_squared"], key, ".4f") for key in ("mean", "least")]
            row += [_cell(found[test], "rejected", ".0%") for test in TESTS]
            row += [_cell(found[name], "mean", ".4f") for _, name in OF_PAIRS]
            table.rows.append([site, place, str(found["rows"]), *row])
    return table


def _cell(found: Mapping[str, Any] | None, key: str, form: str) -> str:
    return "-" if found is None or found[key] is None else format(found[key], form)


def _reasons(record: Mapping[str, Any]) -> Table:
    """What is empty anywhere, and why."""
    table = Table(["model", "site", "empty", "because"], text=4)
    for name, model in record["models"].items():
        for part, why in model["reasons"].items():
            table.rows.append([name, "", part, why])
        table.rows += [[name, site, "everything", UNKNOWN] for site in model["unknown"]]
        for site, cells in model["sites"].items():
            by_reason: dict[str, list[str]] = {}
            for cell, why in cells["reasons"].items():
                if not why.startswith("only a"):  # of another kind of norm
                    by_reason.setdefault(why, []).append(cell)
            table.rows += [[name, site, ", ".join(empty), why] for why, empty in by_reason.items()]
        for site, places in (model["normality"] or {}).items():
            for place in PLACES:
                table.rows += [[name, site, f"{place}: {cell}", why] for cell, why in places[place]["reasons"].items()]
        for site, each in (model["likelihood"] or {}).items():
            table.rows += [[name, site, f"λ: {cell}", why] for cell, why in each["reasons"].items()]
        for point in model["plane"] or ():
            if point["ib"]["reason"]:
                table.rows.append([name, point["site"], f"information, {point['estimator']}", point["ib"]["reason"]])
    return table


def page(record: Mapping[str, Any], drawn: Mapping[str, str], folder: Path) -> str:
    """`report.html`; the pictures are in `folder`."""
    models, options = record["models"], record["options"]
    made = Page(
        "What the norms do to the representation",
        f"{', '.join(models)} on {record['text']}.",
    )

    def show(*files: str) -> None:
        for file in files:
            if file in drawn:
                made.image(folder / file, drawn[file])

    made.table(summary(record))
    made.paragraph(
        "Before: what a norm is given; after: what it makes of it before gain and bias. "
        "Excess kurtosis is that of all elements together, 0 for a Gaussian; near zero is the share of elements below "
        "a tenth of their row's mean absolute value, 6.4 % for a Gaussian; Hoyer's sparsity is 0 where all elements of "
        "a row are alike and 1 for a single one, 0.2 for a Gaussian; largest / median size is that of a row's elements "
        "(massive in the tables); the effective rank is the exponential of the entropy of the covariance's eigenvalues."
    )
    tokens = sorted({model["tokens"] for model in models.values()})
    if len({model["tokens_sha"] for model in models.values()}) > 1:
        made.paragraph("The models did not read the same tokens: their tokenizers or contexts differ.")
    made.heading("From norm to norm")
    show("profiles.png", "norms.png", "lam_hat.png")
    for name, model in models.items():
        made.table(_sites_table(model["sites"]), f"Every norm of {name}")
    made.paragraph(
        "contraction: variance of a row after the compression over that before it; saturation: share of elements where "
        "the compression's slope is below 0.1; slope: its mean. λ̂: of a LayerNormalNorm's Newton step; std p: standard "
        "deviation of a row after the power transform, which nothing standardizes again."
    )
    if any(model["normality"] for model in models.values()):
        made.heading("How normal channels are")
        show("qq.png", "likelihood.png")
        for name, model in models.items():
            for title, stage in ((f"{name} at step 0", model["start"]), (name, model)):
                if stage and stage["normality"]:
                    made.table(_normality_table(stage), f"Every norm of {title}")
        made.paragraph(
            f"A sample of {options['rows']:,} rows at most; up to 64 channels and 32 pairs of them. R² is that of the "
            "line through a channel's Q-Q plot. A test rejects at 5 %, and the more rows there are, the smaller the "
            "departure that it rejects. |r| and the adjusted mutual information (AMI, in floor(√rows) bins of equally "
            "many rows, or of equal width as in arXiv 2505.00685) are of pairs of channels: 0 where they are "
            "independent. One massive activation decides r and the uniform bins; ranks and equal counts do not mind."
        )
    if any(model["noise"] for model in models.values()):
        made.heading("How robust to noise")
        show("zeta.png")
        for name, model in models.items():
            if model["noise"]:
                made.table(noise_of(model).table(), f"ζ of {name}")
        made.paragraph(
            f"Definition 5.1 of arXiv 2505.00685: normal noise of {options['delta']:g} times each unit's mean absolute "
            f"deviation over tokens of {record['noise_scale'] or 'this text'} is added to what one norm computes "
            "before gain and bias, at all its units at once. ζ is how much the same values of a later norm change, as "
            f"a fraction of their size (both in l1 over its units), mean over tokens and {options['draws']} draws. The "
            "residual stream carries undisturbed values past the norm."
        )
    if any(model["plane"] for model in models.values()):
        made.heading("The information plane")
        show("plane.png", "ib.png")
        for name, model in models.items():
            if model["plane"]:
                made.table(plane_table(points_of(model)), f"Every estimate of {name}")
        made.paragraph(
            "X is the token read at a position, T the norm's output there, Y the next token; nats. Two estimators, "
            "neither of which is the mutual information itself: renyi is the matrix-based entropy of order 2 (compare "
            "its values with each other only), ksg counts neighbours in a projection to 4 dimensions, and is too low "
            "where much is shared. chance: the same samples, shuffled. Intervals, 95 %, are from random halves of the "
            f"samples and say nothing of bias. The IB value is I(T;Y) - {options['beta']:g}·I(X;T)."
        )
    if (empty := _reasons(record)).rows:
        made.heading("What is empty, and why")
        made.table(empty, "Cells without a number")
    environment = record["environment"]
    read = " to ".join(f"{each:,}" for each in dict.fromkeys((tokens[0], tokens[-1])))
    machine = f"{environment['device']}, {environment['cpu_count']} cores, torch {environment['versions']['torch']}"
    return made.html(
        f"{read} tokens a model, float32, eval mode, seed {options['seed']}; {machine}, {environment['date'][:10]}. "
        "analysis.json and the CSV files have all numbers."
    )
