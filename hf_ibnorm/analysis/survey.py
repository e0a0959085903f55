"""Several models measured side by side: numbers as JSON and CSV, pictures, and one page."""

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..base import layout
from ..base.errors import UserError, bad_input
from ..base.files import atomic_directory, check_new_directory, sha256, write_json, write_text
from ..checks import LARGEST, MOST_TOKENS, check_number
from ..data import CORPORA
from ..data.text import SEQUENCE, Text, draw_text
from ..report.environment import environment_record
from ..report.runs import Run
from ..report.tables import csv_text
from ..sites import context_of
from ..swap.loading import checkpoints_of, find_model, load_tokenizer, load_whole
from .model import PARTS, Measuring, analyze_model, plane_options
from .normality import require_analysis, spaced
from .places import known_norms, matching, unknown_norms
from .plane import information_plane
from .show.describe import describe, draw_pictures
from .show.tables import csv_rows

DATA, TOKENS = "sotu", 16384
"""The default text that models are measured on, and how much of it."""
CHECKPOINTS = 5
"""Checkpoints of a run at which the information plane is estimated, at most."""


@dataclass(frozen=True)
class Subject:
    """A model to be measured: the folder and the step of the finished model, and those of its checkpoints.

    Without a training run there are no checkpoints, and the step is None. The training text, for the scale of the
    noise, is None where the data has no training split.
    """

    folder: Path
    checkpoints: dict[int, Path]
    step: int | None
    text: Text
    training_text: Text | None


def analyze(
    models: Sequence[str | Path] | Mapping[str, str | Path],
    output: str | Path,
    *,
    data: str = DATA,
    tokens: int = TOKENS,
    checkpoints: int = CHECKPOINTS,
    measuring: Measuring | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every norm of some models, one after the other, and write the results into a new directory.

    It gets `report.html` (one page that needs nothing else), `analysis.json`, a CSV file of every kind of number, and
    the pictures. Models are in float32, on the GPU where there is one, and only one of them is in memory.

    Args:
        models: directories of causal language models, names on the Hub, or run directories of train_lm; by name, or
            named after their directories. Of a run the information plane is estimated at some checkpoints, too, and
            normality at step 0; of a run that is not finished, the newest checkpoint is measured.
        output: a new directory.
        data: text to measure on: an embedded corpus, of which the test split is used, or a file as training takes it:
            .txt, .jsonl with a field "text", .parquet. Where the tokenizer begins texts with a BOS token, every row
            of tokens does, too.
        tokens: how much of it, about; at least a block, which is the model's context or 512.
        checkpoints: of a run, how many at most, evenly spaced, the finished model among them.
        measuring: which parts are measured, and how. A glob of its `sites` has to match in one of the models.
        say: called with a line about each model and checkpoint before it is measured.

    Returns:
        The content of `analysis.json`: `text`, `noise_scale` (the text behind the noise's scale, None for the text
        itself), `options`, `environment`, and for each of `models` the result of `analyze_model`, with the points of
        all checkpoints in `plane`, `step`, and `start`: normality at step 0, None where there is none.

    Raises:
        UserError: an argument that is not allowed, named; a model that cannot be read, runs no known norm or gives
            numbers that are not finite; a package is missing. Nothing is written.
        OSError: the output cannot be written.
    """
    require_analysis("matplotlib")
    measuring, folder = measuring or Measuring(), Path(output)
    with bad_input():
        measuring.check()
        check_number("tokens", tokens, 2, MOST_TOKENS)
        check_number("checkpoints", checkpoints, 1, LARGEST)
        check_new_directory("output", folder)
        named = models if isinstance(models, Mapping) else dict(zip(_names(models), models, strict=True))
        for name in named:
            if name.startswith("_"):  # matplotlib would leave it out of the legends
                raise ValueError(f"model: got the name {name!r}, must not begin with _; NAME=DIR chooses another")
        noise = "noise" not in measuring.skip
        subjects = {name: _subject(str(path), data, int(tokens), noise) for name, path in named.items()}
    chosen = _chosen_sites(subjects, measuring)
    measured: dict[str, Any] = {}
    for name, subject in subjects.items():
        measured[name] = _measured(name, subject, replace(measuring, sites=chosen[name]), int(checkpoints), say)
        gc.collect()  # before the next model is loaded
    first, environment = next(iter(subjects.values())), environment_record()
    record = {
        "text": first.text.name,
        "noise_scale": first.training_text.name if first.training_text else None,
        "options": {"data": data, "tokens": tokens, "checkpoints": checkpoints, **asdict(measuring)},
        "models": measured,
        "environment": {
            name: environment[name] for name in ("date", "device", "cpu_count", "versions", "git_revision")
        },
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(folder) as inside:
        write_json(inside / "analysis.json", record)
        for file, rows in csv_rows(record).items():
            write_text(inside / file, csv_text(list(dict.fromkeys(key for row in rows for key in row)), rows))
        describe(record, draw_pictures(record, inside), inside).write(inside / "report.html")
    return record


def _names(models: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    if not models:
        raise ValueError("model: got none, must be one or more")
    parts = [Path(model).absolute().parts for model in models]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"model: got {', '.join(map(str, models))}, must be different ones")


def _subject(model: str, data: str, tokens: int, noise: bool) -> Subject:
    """Find a model, and read the text with its tokenizer, for `noise` the training split as well."""
    run, step = Path(model), None
    checkpoints = {} if (run / "config.json").exists() else checkpoints_of(run)
    if checkpoints and not (run / layout.FINAL).exists():  # it trains still, or was stopped
        step = max(checkpoints)
        folder = checkpoints[step]
    else:
        folder = find_model(model)
        if folder == run / layout.FINAL:
            step = int(Run.read(run).metrics[-1]["step"])
    config, tokenizer = load_tokenizer(folder)
    context = context_of(config)
    block = min(SEQUENCE, context or SEQUENCE)
    if tokens < block:
        raise ValueError(f"tokens: got {tokens}, must be at least a block of {model}: {block}")
    text = draw_text("data", data, "test", tokenizer, tokens, context)
    training = draw_text("data", data, "train", tokenizer, tokens, context) if noise and data in CORPORA else None
    highest = max(int(each.ids.max()) for each in (text, training) if each is not None)
    if highest >= config.vocab_size:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise ValueError(f"data: got {data!r}, which has the token {token!r}; {model} has no embedding for that")
    if text.ids.shape[1] < block:
        raise ValueError(
            f"data: got {data!r}, which has {text.ids.numel()} tokens for {model}; must have a block of {block}"
        )
    return Subject(folder, checkpoints, step, text, training)


def _loaded(folder: Path) -> Any:
    """The model there in float32, on the GPU where there is one; raises UserError where it cannot be loaded whole."""
    return load_whole(folder, None, torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")


def _chosen_sites(subjects: Mapping[str, Subject], measuring: Measuring) -> dict[str, tuple[str, ...]]:
    """Name of a model → its sites that are measured, before any model is.

    Raises UserError where a model runs no known norm or cannot be loaded whole, or a glob matches no norm of any model.
    """
    norms = {}
    for name, subject in subjects.items():
        with bad_input(ValueError, RuntimeError, about=f"{name}: "):
            norms[name] = list(known_norms(_loaded(subject.folder).base_model))
    with bad_input():
        wanted = matching(dict.fromkeys(site for sites in norms.values() for site in sites), measuring.sites)
    for name, sites in norms.items():
        if not set(wanted) & set(sites):
            raise UserError(f"sites: got {', '.join(measuring.sites or ())}, which matches no norm of {name}")
    return {name: tuple(site for site in sites if site in wanted) for name, sites in norms.items()}


def _measured(
    name: str, subject: Subject, measuring: Measuring, checkpoints: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """The result of `analyze_model` for the finished model, with the measurements of its checkpoints."""
    ids, training = subject.text.ids, subject.training_text.ids if subject.training_text else None
    model = _loaded(subject.folder)
    say(f"{name}: {ids.numel():,} tokens of {subject.text.name}")
    measured: dict[str, Any] = {"folder": str(subject.folder), "norm": _norm_of(model), "step": subject.step}
    measured |= {"tokens": ids.numel(), "tokens_sha": sha256([str(ids.shape), ids.numpy().tobytes()])[:16]}
    measured |= {"unknown": unknown_norms(model.base_model)}
    with bad_input(FloatingPointError, about=f"{name}: "):
        measured |= analyze_model(model, ids, measuring, training)
    del model
    earlier = [step for step in subject.checkpoints if step != subject.step]
    if measured["plane"] is not None:
        points: list[dict[str, Any]] = []
        for step in (earlier[i] for i in spaced(len(earlier), checkpoints - 1)):
            say(f"{name}: the information plane at step {step}")
            options = {"step": step, **plane_options(measuring)}
            points += map(asdict, information_plane(_loaded(subject.checkpoints[step]), ids, **options))
        measured["plane"] = points + [{**point, "step": subject.step} for point in measured["plane"]]
    measured["start"] = None
    if measured["normality"] is not None and earlier[:1] == [0]:
        say(f"{name}: normality at step 0")
        skip = tuple(set(PARTS) - {"normality"})
        with bad_input(FloatingPointError, about=f"{name}, step 0: "):
            start = analyze_model(_loaded(subject.checkpoints[0]), ids, replace(measuring, skip=skip))
        measured["start"] = {part: start[part] for part in ("loss", "sites", "normality", "likelihood")}
    return measured


def _norm_of(model: Any) -> str:
    """The name of a model's norms: a norm_type, or the class of most of them."""
    name = getattr(model.config, "norm_type", None)
    if name is None:
        return Counter(type(norm).__name__ for norm in known_norms(model).values()).most_common(1)[0][0]
    return f"{name}{' (with overrides)' if model.config.norm_overrides else ''}"
