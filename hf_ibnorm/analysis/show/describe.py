"""The report of a survey: pictures, tables, and how to read the numbers, from its record."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...report.document import Document, machine, readings
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
    """Q-Q data of the output of two norms, the middle and the last, at step 0 and now; without a step 0, of the first
    norm as well."""
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
    """Draw every picture whose numbers are in the record: file → caption."""
    models = record["models"]
    sites = {name: model["sites"] for name, model in models.items()}
    likelihood = {name: model["likelihood"] for name, model in models.items() if model["likelihood"]}
    noise = {name: noise_of(model) for name, model in models.items() if model["noise"]}
    planes = {name: points_of(model) for name, model in models.items() if model["plane"]}
    channels = "Quantiles of four channels, standardized, against those of the normal distribution; R² is their mean."
    every = "Every norm, from the first to the last: its input (before) and its output (after)."
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


def describe(record: Mapping[str, Any], drawn: Mapping[str, str], folder: Path) -> Document:
    """The report on a record, with the pictures that `draw_pictures` drew into `folder`."""
    models, options = record["models"], record["options"]
    texts = readings(Path(__file__).with_name("reading.md"), **options, scale=record["noise_scale"] or "this text")
    stages = [each for name, model in models.items() for each in ((f"{name} at step 0", model["start"]), (name, model))]
    normality = {name: normality_table(stage) for name, stage in stages if stage and stage["normality"]}
    zeta = {name: noise_of(model).table() for name, model in models.items() if model["noise"]}
    estimates = {name: plane_table(points_of(model)) for name, model in models.items() if model["plane"]}
    sites = {name: sites_table(model["sites"]) for name, model in models.items()}
    sections = (
        ("From norm to norm", ("profiles.png", "norms.png", "lam_hat.png"), "Every norm of", sites),
        ("How normal channels are", ("qq.png", "likelihood.png"), "Every norm of", normality),
        ("How robust to noise", ("zeta.png",), "ζ of", zeta),
        ("The information plane", ("plane.png", "ib.png"), "Every estimate of", estimates),
    )
    document = Document("What the norms do to the representation")
    document.lead(f"{', '.join(models)} on {record['text']}.")
    document.table(median_table(record))
    document.paragraph(texts["Summary"])
    if len({model["tokens_sha"] for model in models.values()}) > 1:
        document.paragraph("The models did not read the same tokens: their tokenizers or contexts differ.")
    for title, files, summary, tables in sections:
        if tables:
            document.heading(title)
            for file in files:
                if file in drawn:
                    document.picture(folder / file, drawn[file])
            for name, table in tables.items():
                document.folded(table, f"{summary} {name}")
            document.paragraph(texts[title])
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
