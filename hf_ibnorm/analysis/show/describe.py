"""The report of a survey: pictures, tables, and what the numbers are, from its record."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...report.document import Document, machine
from ..information import Estimate
from ..noise import NoiseRobustness
from ..plane import PlanePoint
from . import pictures, plane_pictures
from .tables import median_table, normality_table, plane_table, reasons_table, sites_table


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


def qq_grid(models: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Q-Q data of what comes out of a norm in the middle and the last, at step 0 and now; of the first, too, where
    there is no step 0."""
    started = any(model["start"] for model in models.values())
    grid: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        sites = list(model["normality"] or ())
        places = {"first norm": 0, "middle norm": len(sites) // 2, "last norm": -1} if sites else {}
        for title, i in list(places.items())[started:]:
            for step, stage in ((", step 0", model["start"]), ("", model)):
                if stage:
                    grid.setdefault(name, {})[title + step] = stage["normality"][sites[i]]["after"]["qq"]
    return grid


def draw_pictures(record: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draw the pictures that there are numbers for: file → what it shows."""
    models = record["models"]
    sites = {name: model["sites"] for name, model in models.items()}
    likelihood = {name: model["likelihood"] for name, model in models.items() if model["likelihood"]}
    noise = {name: noise_of(model) for name, model in models.items() if model["noise"]}
    planes = {name: points_of(model) for name, model in models.items() if model["plane"]}
    channels = "Quantiles of four channels, standardized, against those of the normal distribution; R² is their mean."
    every = "Every norm, from the first to the last: what goes in and what comes out."
    distance = "How far λ̂ of one Newton step is from the λ of the largest likelihood."
    drawings: dict[str, tuple[Callable[..., bool], Any, str]] = {
        "profiles.png": (pictures.draw_profiles, sites, every),
        "norms.png": (pictures.draw_norm_profiles, sites, "What belongs to one kind of norm."),
        "lam_hat.png": (pictures.draw_lam_hat, sites, "λ̂ of all rows."),
        "likelihood.png": (pictures.draw_likelihood, likelihood, distance),
        "qq.png": (pictures.draw_qq, qq_grid(models), channels),
        "zeta.png": (pictures.draw_zeta, noise, "ζ: noise added at a row's norm, relative change at a column's."),
        "plane.png": (plane_pictures.draw_plane, planes, "The information plane."),
        "ib.png": (plane_pictures.draw_ib, planes, "The IB value of every norm."),
    }
    return {file: title for file, (draw, numbers, title) in drawings.items() if draw(numbers, folder / file)}


READING = (
    "Before: what a norm is given; after: what it makes of it before gain and bias. "
    "Excess kurtosis is that of all elements together, 0 for a Gaussian; near zero is the share of elements below "
    "a tenth of their row's mean absolute value, 6.4 % for a Gaussian; Hoyer's sparsity is 0 where all elements of "
    "a row are alike and 1 for a single one, 0.2 for a Gaussian; largest / median size is that of a row's elements "
    "(massive in the tables); the effective rank is the exponential of the entropy of the covariance's eigenvalues."
)
OF_A_NORM = (
    "contraction: variance of a row after the compression over that before it; saturation: share of elements where "
    "the compression's slope is below 0.1; slope: its mean. λ̂: of a LayerNormalNorm's Newton step; std p: standard "
    "deviation of a row after the power transform, which nothing standardizes again."
)
NORMALITY = (
    "A sample of {rows:,} rows at most; up to 64 channels and 32 pairs of them. R² is that of the "
    "line through a channel's Q-Q plot. A test rejects at 5 %, and the more rows there are, the smaller the "
    "departure that it rejects. |r| and the adjusted mutual information (AMI, in floor(√rows) bins of equally "
    "many rows, or of equal width as in arXiv 2505.00685) are of pairs of channels: 0 where they are "
    "independent. One massive activation decides r and the uniform bins; ranks and equal counts do not mind."
)
NOISE = (
    "Definition 5.1 of arXiv 2505.00685: normal noise of {delta:g} times each unit's mean absolute "
    "deviation over tokens of {scale} is added to what one norm computes "
    "before gain and bias, at all its units at once. ζ is how much the same values of a later norm change, as "
    "a fraction of their size (both in l1 over its units), mean over tokens and {draws} draws. The "
    "residual stream carries undisturbed values past the norm."
)
PLANE = (
    "X is the token read at a position, T the norm's output there, Y the next token; nats. Two estimators, "
    "neither of which is the mutual information itself: renyi is the matrix-based entropy of order 2 (compare "
    "its values with each other only), ksg counts neighbours in a projection to 4 dimensions, and is too low "
    "where much is shared. chance: the same samples, shuffled. Intervals, 95 %, are from random halves of the "
    "samples and say nothing of bias. The IB value is I(T;Y) - {beta:g}·I(X;T)."
)


def describe(record: Mapping[str, Any], drawn: Mapping[str, str], folder: Path) -> Document:
    """The report on a record, with the pictures that `draw_pictures` drew into `folder`."""
    models, options = record["models"], record["options"]
    scale = record["noise_scale"] or "this text"
    stages = [each for name, model in models.items() for each in ((f"{name} at step 0", model["start"]), (name, model))]
    sections = (
        (
            *("From norm to norm", ["profiles.png", "norms.png", "lam_hat.png"], OF_A_NORM),
            {f"Every norm of {name}": sites_table(model["sites"]) for name, model in models.items()},
        ),
        (
            *("How normal channels are", ["qq.png", "likelihood.png"], NORMALITY.format(**options)),
            {f"Every norm of {name}": normality_table(stage) for name, stage in stages if stage and stage["normality"]},
        ),
        (
            *("How robust to noise", ["zeta.png"], NOISE.format(**options, scale=scale)),
            {f"ζ of {name}": noise_of(model).table() for name, model in models.items() if model["noise"]},
        ),
        (
            *("The information plane", ["plane.png", "ib.png"], PLANE.format(**options)),
            {f"Every estimate of {name}": plane_table(points_of(m)) for name, m in models.items() if m["plane"]},
        ),
    )
    document = Document("What the norms do to the representation")
    document.lead(f"{', '.join(models)} on {record['text']}.")
    document.table(median_table(record))
    document.paragraph(READING)
    if len({model["tokens_sha"] for model in models.values()}) > 1:
        document.paragraph("The models did not read the same tokens: their tokenizers or contexts differ.")
    for title, files, reading, tables in sections:
        if tables:
            document.heading(title)
            for file in files:
                if file in drawn:
                    document.picture(folder / file, drawn[file])
            for summary, table in tables.items():
                document.folded(table, summary)
            document.paragraph(reading)
    if (empty := reasons_table(record)).rows:
        document.heading("What is empty, and why")
        document.folded(empty, "Cells without a number")
    tokens = sorted({model["tokens"] for model in models.values()})
    document.made.append(
        f"{' to '.join(f'{each:,}' for each in dict.fromkeys((tokens[0], tokens[-1])))} tokens a model, float32, eval "
        f"mode, seed {options['seed']}; {machine(record['environment'])}. analysis.json and the CSV files have all "
        "numbers."
    )
    return document
