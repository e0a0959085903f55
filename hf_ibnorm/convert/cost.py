"""The cost of a conversion: the stages of a model beside their source, as numbers, table and plot."""

import math
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..base.errors import bad_input
from ..base.files import atomic_directory, check_new_directory, write_json, write_text
from ..base.layout import CONVERSION_REPORT
from ..checks import MOST_TOKENS, check_number
from ..data.text import LEAST, Text, draw_text
from ..norms import NORMS
from ..report.document import Document, machine, readings
from ..report.environment import environment_record
from ..report.runs import read_scores
from ..report.tables import Table, csv_text, number_cell, score_cell
from ..sites import context_of
from ..swap.loading import load
from .checkpoint import card_text, convert_source
from .measure import measure
from .settings import DATA, SOURCE, TOKENS, Conversion
from .source import Source, read_source

STAGES = {"keep": "swapped", "identity": "identity", "calibrate": "calibrated"}
"""Init of a conversion → name of its result in the report."""
NOVEL = "austen_test"  # benchmark of the embedded suite that is left out: a whole novel


def report_conversion(
    source: str | Path, stages: Mapping[str, str | Path], output: str | Path, **measuring: Any
) -> dict[str, Any]:
    """Measure stages of a model, and write `report.md`, `report.json`, `sites.csv` and `report.png`.

    Each stage is loaded in float32 beside the source, on the GPU where there is one, and runs on held-out text; scores
    of the embedded suite come from a process of `python -m eval` each.

    Args:
        source: the model before its conversion, as `convert_checkpoint` takes it.
        stages: name → directory of a model made of it, in the order of the report.
        output: a new directory.
        **measuring: `data`, `tokens` and `scores`, as `_text_and_items` takes them.

    Returns:
        The content of `report.json`.

    Raises:
        ValueError, TypeError, OSError: an argument, named; nothing is written.
        RuntimeError: the suite cannot be run.
    """
    check_new_directory("output", Path(output))
    with ExitStack() as stack:
        original = read_source(source, stack)
        text, items = _text_and_items(original, "", **measuring)
        return _report(original, {name: Path(path) for name, path in stages.items()}, Path(output), text, items)


def convert_and_report(
    source: str | Path, target: Path, wanted: Conversion, **measuring: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert a checkpoint, put a report into it, and the report's table into its card.

    Beside a calibrated target, a target of `init` keep is made, measured and removed. Results and errors are those of
    `convert_checkpoint` and `report_conversion`; RuntimeError where only the report failed.
    """
    wanted.check(target)
    with ExitStack() as stack:
        original = read_source(source, stack)
        text, items = _text_and_items(original, "report_", **measuring)
        record = convert_source(original, target, wanted)
        stages = {STAGES[wanted.init]: target}
        try:
            if wanted.init == "calibrate":
                kept = Path(stack.enter_context(TemporaryDirectory(prefix="hf_ibnorm_"))) / "kept"
                convert_source(original, kept, replace(wanted, init="keep"))
                stages = {STAGES["keep"]: kept, **stages}
            report = _report(original, stages, target / CONVERSION_REPORT, text, items)
            cost = f"## What it cost\n\n{stage_table(report).markdown()}\n`{CONVERSION_REPORT}/` has more.\n"
            write_text(target / "README.md", f"{card_text(record)}\n{cost}")
        except (OSError, ValueError, RuntimeError) as error:
            raise RuntimeError(f"{target} is whole, its report is not: {error}") from error
    return record, report


def _text_and_items(
    source: Source, prefix: str, data: str = DATA, tokens: int = TOKENS, scores: int | None = None
) -> tuple[Text, int]:
    """The text of a report, and the number of items of each embedded task that are scored (the novel is left out).

    Args:
        prefix: stands before argument names in errors.
        data: an embedded corpus, of which the test split is used, or a file (.txt, .jsonl, .parquet).
        tokens: length of the text in tokens, about.
        scores: the number of items; None for 50 where `hf_ibnorm[eval]` is installed, and 0 elsewhere.
    """
    check_number(f"{prefix}tokens", tokens, LEAST, MOST_TOKENS)
    able = find_spec("lm_eval") is not None
    if scores is None:
        scores = 50 if able else 0
    check_number(f"{prefix}scores", scores, 0, MOST_TOKENS)
    if scores and not able:
        raise ValueError(f"{prefix}scores: got {scores}, which needs lm-eval: pip install 'hf_ibnorm[eval]'")
    _check_language_model("source", source)
    if source.tokenizer is None:
        raise ValueError(f"source: {source.folder} has no tokenizer to measure with (--no_report)")
    context = context_of(source.config)
    return draw_text(f"{prefix}data", data, "test", source.tokenizer, tokens, context), scores


def _check_language_model(field: str, model: Source) -> None:
    kind = model.architecture.__name__
    if not kind.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(f"{field}: got a {kind}; only a language model can be measured (--no_report)")


def _report(source: Source, stages: Mapping[str, Path], output: Path, text: Text, items: int) -> dict[str, Any]:
    """`report_conversion` for a source that was read, on a text that was drawn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with ExitStack() as stack:
        for name, folder in stages.items():
            try:
                stage = read_source(folder, stack)
            except ValueError as error:
                raise ValueError(f"stages: {name}: {str(error).removeprefix('source: ')}") from error
            _check_stage(name, stage, source, text.ids.shape[1])
    folders = {SOURCE: source.folder, **stages}
    old = _loaded(source.folder, device)
    measured: dict[str, Any] = {}
    for name, folder in folders.items():
        model = old if name == SOURCE else _loaded(folder, device)
        with bad_input(ValueError, about=f"{name}: "):
            measured[name] = {"norm": _norm_of(model), **asdict(measure(old, model, text))}
    del old, model
    for name, folder in folders.items():
        measured[name]["scores"] = _embedded_scores(folder, items) if items else None
    made = environment_record()
    record = {
        "source": source.title,
        "text": text.name,
        "tokens": text.ids.numel(),
        "bytes": text.bytes,
        "scored": items,
        "stages": measured,
        "environment": {name: made[name] for name in ("date", "device", "cpu_count", "versions", "git_revision")},
    }
    with atomic_directory(output) as folder:
        write_json(folder / "report.json", record)
        stage_sites = [(name, *item) for name, stage in measured.items() for item in stage["sites"].items()]
        rows = [{"stage": name, "site": site, **cost} for name, site, cost in stage_sites]
        write_text(folder / "sites.csv", csv_text(list(rows[0]), rows))
        picture = folder / "report.png" if find_spec("matplotlib") else None
        if picture:
            draw_sites(record, picture)
        _document(record, picture).write(folder / "report.md")
    return record


def _check_stage(name: str, stage: Source, source: Source, length: int) -> None:
    """Raise ValueError where a stage cannot have been made of the source, or takes no sequence of `length` tokens."""
    if stage.family != source.family:
        kinds = stage.architecture.__name__, source.architecture.__name__
        raise ValueError(f"stages: {name} is a {kinds[0]}, the source a {kinds[1]}")
    _check_language_model(f"stages: {name}", stage)
    for fact in ("vocab_size", "hidden_size", "num_hidden_layers"):
        values = getattr(stage.config, fact), getattr(source.config, fact)
        if values[0] != values[1]:
            raise ValueError(f"stages: {name} has {fact} {values[0]}, the source {values[1]}")
    if (context := context_of(stage.config) or length) < length:
        raise ValueError(f"stages: {name} has a context of {context} tokens, the text's sequences have {length}")


def _loaded(folder: Path, device: torch.device) -> PreTrainedModel:
    model: PreTrainedModel = load("model", AutoModelForCausalLM, folder, dtype=torch.float32)
    return model.eval().to(device)


def _norm_of(model: PreTrainedModel) -> str:
    """The norm of a model in words."""
    if (name := getattr(model.config, "norm_type", None)) is None:
        return "the architecture's own"
    named = NORMS[name].contract.named_options
    options = "".join(f", {key} {value}" for key, value in model.config.norm_kwargs.items() if key in named)
    return f"{name}{options}{' (with overrides)' if model.config.norm_overrides else ''}"


def _embedded_scores(model: Path, limit: int) -> dict[str, Any]:
    """Scores in the embedded suite, without the novel, on `limit` items a task; RuntimeError where eval fails."""
    with TemporaryDirectory(prefix="hf_ibnorm_") as folder:
        # --overlong: a short context is no reason for no report.
        flags = f"--suite embedded --skip {NOVEL} --overlong skip --limit {limit} --batch_size 32".split()
        flags += ["--model", str(model), "--output", f"{folder}/scores"]
        # -P: an eval.py in the user's folder is not ours.
        done = subprocess.run([sys.executable, "-P", "-m", "eval", "run", *flags], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"scores: {(done.stderr.strip().splitlines() or ['eval failed'])[-1]}")
        benchmarks: dict[str, Any] = read_scores(Path(folder) / "scores")["benchmarks"]
    return benchmarks


def stage_table(record: Mapping[str, Any]) -> Table:
    """A row for each stage of a report."""
    columns = ["stage", "norm", "bits per byte", "KL to source, nats", "same top token", "output error, median"]
    columns += ["worst", "narrowest row, median", "least"]
    table = Table(columns + ["embedded, mean"] * bool(record["scored"]))
    for name, stage in record["stages"].items():
        errors = [site["error"] for site in stage["sites"].values() if site["error"] is not None] or [math.nan]
        widths = [site["least_row_std"] for site in stage["sites"].values()]
        cells = [f"{stage['bits_per_byte']:.4f}", f"{stage['kl']:.4g}", f"{stage['top1']:.1%}"]
        cells += [f"{value:.3g}" for value in (median(errors), max(errors), median(widths), min(widths))]
        if record["scored"]:
            cells.append(number_cell(mean_score(stage["scores"]), ".2f"))
        table.rows.append([name, stage["norm"], *cells])
    return table


def mean_score(scores: Mapping[str, Any]) -> float | None:
    """Mean of the normalized scores, 0 to 100, over the tasks that have one; None where none has."""
    normalized = [row["normalized"] for row in scores.values() if row["normalized"] is not None]
    return fmean(normalized) if normalized else None


def _document(record: Mapping[str, Any], picture: Path | None) -> Document:
    """The report in words, with the picture of `draw_sites`, if any."""
    document = Document(f"What became of {record['source']}", made=[f"Made on {machine(record['environment'])}."])
    document.table(stage_table(record))
    document.paragraph(
        f"Measured in float32 on {record['tokens']:,} tokens ({record['bytes']:,} bytes) of {record['text']}."
    )
    document.paragraph(readings(Path(__file__).with_name("reading.md"))["How to read it"])
    if picture:
        document.picture(picture, "output error and narrowest row of every site")
    if record["scored"]:
        scores = {name: stage["scores"] for name, stage in record["stages"].items()}
        tasks = [name for name in scores[SOURCE] if name != NOVEL]
        rows = [[name, *(score_cell(row[task]) for task in tasks)] for name, row in scores.items()]
        document.table(Table(["stage", *tasks], rows))
        document.paragraph(
            f"The first {record['scored']} items of each task of the embedded suite, by `python -m eval run`; the "
            "novel is left out. Means are over normalized scores, 0 for guessing and 100 for no mistake."
        )
    return document


def draw_sites(record: Mapping[str, Any], path: Path) -> None:
    """Draw output error and narrowest row of every site, a curve for each stage of a report."""
    from ..report.plots import above, draw_curve, panels

    with panels(path, 2, 2, 3.2) as (errors, widths):
        for i, (name, stage) in enumerate(record["stages"].items()):
            sites = list(enumerate(stage["sites"].values()))
            if name != SOURCE:
                # An error of 0 has no place on a logarithmic axis.
                draw_curve(errors, i, [(site, cost["error"] or math.nan) for site, cost in sites], name)
            draw_curve(widths, i, [(site, cost["least_row_std"]) for site, cost in sites], name)
        if any(math.isfinite(value) for line in errors.lines for value in line.get_ydata()):
            errors.set_yscale("log")
        errors.set_title("output error, fraction of the source's variance")
        widths.set_yscale("log")
        # An axis of more than a decade, on which curves as good as equal to the source's look equal.
        widths.set_ylim(min(0.1, widths.get_ylim()[0]), max(2.0, widths.get_ylim()[1]))
        widths.set_title("standard deviation of the narrowest row")
        errors.figure.supxlabel("norm, from the embedding to the output")
        above([widths])
