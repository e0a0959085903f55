"""The directory of a run: its options (`manifest.json`), the answers to each benchmark (`results/`), its scores.

A result file is written whole as its benchmark ends, and the scores are a function of these files.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_ibnorm.base import layout
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import atomic_directory, check_new_directory, write_json, write_text
from hf_ibnorm.base.reading import read_json
from hf_ibnorm.report.document import Document, readings
from hf_ibnorm.report.environment import environment_record
from hf_ibnorm.report.tables import Table, csv_text, number_cell, score_cell

from .options import SMOKE, Prompting
from .scoring import DAMAGE, check_items, score_suite
from .suites import AVERAGED, DEFINED, SUITES, Benchmark

READING = Path(__file__).with_name("reading.md")


def is_begun(directory: Path) -> bool:
    return (directory / layout.MANIFEST).is_file()


def create(directory: Path, manifest: dict[str, Any]) -> None:
    """Begin a run; UserError where the directory cannot be made."""
    with bad_input(OSError, about="output: "):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(directory) as folder:
            (folder / layout.RESULTS).mkdir()
            write_json(folder / layout.ENVIRONMENT, environment_record())
            write_json(folder / layout.MANIFEST, manifest)


def still_missing(directory: Path, identity: dict[str, Any]) -> list[str]:
    """The benchmarks that a stopped run has not finished; UserError where the run in `directory` is another one."""
    if different := _difference(read_manifest(directory)["identity"], identity):
        raise UserError(f"output: {directory} holds a run with another {different}; name a new directory")
    for left_behind in (directory / layout.RESULTS).glob(".*"):  # written in part when the run was killed
        left_behind.unlink(missing_ok=True)
    return [name for name in identity["benchmarks"] if not _result_file(directory, name).is_file()]


def _difference(before: Any, now: Any, field: str = "") -> str:
    """The first field in which two JSON values differ, with both values; "" where they are equal."""
    now = json.loads(json.dumps(now))
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return "" if before == now else f"{field}: {str(before)[:40]}, now {str(now)[:40]}"
    for name in sorted({*before, *now}):
        if inner := _difference(before.get(name), now.get(name), f"{field}.{name}" if field else name):
            return inner
    return ""


def _result_file(directory: Path, benchmark: str) -> Path:
    return directory / layout.RESULTS / f"{benchmark}.json"


def _result_files(directory: Path) -> list[Path]:
    """All result files, without those that are being written."""
    return sorted((directory / layout.RESULTS).glob("[!.]*.json"))


def write_result(directory: Path, benchmark: Benchmark, result: dict[str, Any], stamp: str) -> None:
    """Write the result file of a benchmark, with the benchmark's definition."""
    definition = {name: value for name, value in asdict(benchmark).items() if name not in ("config", "folders")}
    with bad_input(OSError, about="output: "):
        write_json(_result_file(directory, benchmark.name), {"stamp": stamp, **result, "definition": definition})


def _add_to_manifest(directory: Path, **more: Any) -> None:
    """Set further fields of a run's manifest."""
    manifest = read_manifest(directory)
    if manifest != {**manifest, **more}:
        with bad_input(OSError, about="output: "):
            write_json(directory / layout.MANIFEST, {**manifest, **more})


def add_notes(directory: Path, notes: Sequence[str]) -> None:
    """Add notes, which stand beside the scores, to the manifest."""
    _add_to_manifest(directory, notes=list(dict.fromkeys([*read_manifest(directory)["notes"], *notes])))


def record_hashes(directory: Path) -> None:
    """Write the hashes of the questions that were answered, task by task, into the manifest."""
    tasks = [task for result in _read_results(directory).values() for task in result.get("tasks", {}).items()]
    _add_to_manifest(directory, task_hashes={name: task["hash"] for name, task in tasks})


def read_manifest(directory: Path) -> dict[str, Any]:
    """`manifest.json` of a run; UserError where it is missing or damaged."""
    manifest: dict[str, Any] = read_json("run", directory / layout.MANIFEST, layout.MANIFEST_FORM)
    return manifest


def _read_results(directory: Path) -> dict[str, dict[str, Any]]:
    """The result files of a run by benchmark."""
    results = {path.stem: read_json("run", path, layout.RESULT_FORM) for path in _result_files(directory)}
    for name, result in results.items():
        if not {"tasks", "skipped"} & result.keys():
            raise UserError(f"run: {_result_file(directory, name)} has no tasks or skipped")
    return results


def read_run(directory: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The manifest and the result files of a run, with as many items as it must have; UserError where a file or an item
    is missing or damaged."""
    manifest, results = read_manifest(directory), _read_results(directory)
    with bad_input(*DAMAGE, about=f"run: {directory} holds a damaged result: "):
        limit = Prompting(**manifest["identity"]["prompting"]).limit
        for result in results.values():
            check_items(result.get("tasks", {}), limit)
    return manifest, results


def benchmarks_of(suite: str, results: dict[str, dict[str, Any]], names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of a run: those of its suite, in order, or as their result files define them."""
    if suite in SUITES:
        return [each for each in SUITES[suite] if each.name in names]
    benchmarks = []
    for name in names:
        if name in DEFINED or name not in results:
            benchmarks.append(DEFINED.get(name, Benchmark(name, name, (), "")))
        else:
            definition = results[name]["definition"]
            benchmarks.append(Benchmark(**{**definition, "tasks": tuple(definition["tasks"])}))
    return benchmarks


def merge(shards: Sequence[Path], output: Path) -> None:
    """Put the shards of one run together, as if it had been run in `output`, a new directory; UserError where they are
    not shards of one run, or the directory cannot be made."""
    with bad_input():
        check_new_directory("output", output)
    manifests = [read_manifest(shard) for shard in shards]
    identities = [manifest["identity"] for manifest in manifests]
    first = identities[0]
    shared = {name: value for name, value in first.items() if name not in ("benchmarks", "mirror")}
    for shard, identity in zip(shards, identities, strict=True):
        if different := _difference(shared, {name: identity.get(name) for name in shared}):
            raise UserError(f"run: {shard} is no part of the run in {shards[0]}, it has another {different}")
    names = [name for identity in identities for name in identity["benchmarks"]]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"run: {repeated[0]} is in more than one of the directories")
    order = [each.name for each in SUITES.get(first["suite"], ())] or first["suite"].split(",")
    files = [file for identity in identities for file in (identity["mirror"] or {}).items()]
    identity = {**first, "benchmarks": sorted(names, key=order.index), "mirror": dict(sorted(files)) or None}
    notes = [note for manifest in manifests for note in manifest["notes"]]
    create(output, {**manifests[0], "identity": identity, "notes": list(dict.fromkeys(notes))})
    with bad_input(OSError, about="output: "):
        for path in [path for shard in shards for path in _result_files(shard)]:
            write_text(_result_file(output, path.stem), path.read_text(encoding="utf-8"))
    record_hashes(output)


def score_table(scores: dict[str, Any]) -> Table:
    """Raw ± stderr and whether that is chance, normalized, chance, n, ties, truncated prompts; the average last."""
    table = Table(["benchmark", "raw", "normalized", "chance", "n", "ties", "truncated"])
    for name, row in scores["benchmarks"].items():
        details = row["details"]
        title = DEFINED[name].title if name in DEFINED else name
        unit = " bits per byte" if details["metric"] == "bits_per_byte" else ""
        numbers = [(row["normalized"], ".2f"), (row["chance"], ".3f"), (row["n"], "d")]
        numbers += [(details.get(field), "d") for field in ("ties", "truncated")]
        table.rows.append([title, score_cell(row) + unit, *(number_cell(*each, missing="") for each in numbers)])
        seconds = {key.removesuffix(",none"): value for key, value in details.items() if "," in key}
        if "size_weighted" in details:
            seconds["size-weighted"] = details["size_weighted"]
        table.rows += [[f"  {key}", f"{value:.3f}", *[""] * 5] for key, value in seconds.items()]
    if scores["suite"] in AVERAGED:
        raw = normalized = "-"
        if scores["average"] is not None:
            average = f"{scores['average']:.2f}"
            raw, normalized = (average, "") if scores["suite"] == "v1" else ("", average)
        table.rows.append(["Average", raw, normalized, *[""] * 4])
    return table


def scores_document(scores: dict[str, Any]) -> Document:
    """The report on the scores of a run."""
    document = Document(f"{scores['suite']}: {scores['model']}")
    caption = f"{scores['model']} on suite {scores['suite']}."
    if scores["smoke"]:
        document.strong(SMOKE)
        caption += f" {SMOKE}."
    document.table(score_table(scores), latex_caption=caption)
    document.bullets(scores["notes"])
    for heading, text in readings(READING).items():
        if heading in ("Scores", scores["suite"]):
            document.paragraph(text)
    return document


def write_scores(directory: Path, output: Path | None = None) -> dict[str, Any]:
    """Score a run from its files, print the table and write `scores.json`, `.md`, `.csv` and `.tex` into `output` (by
    default its own directory); UserError where a file is missing or damaged, or cannot be written."""
    manifest, results = read_run(directory)
    identity, target = manifest["identity"], output or directory
    suite, prompting = identity["suite"], Prompting(**identity["prompting"])
    with bad_input(*DAMAGE, about=f"run: {directory} holds a damaged result: "):
        benchmarks = benchmarks_of(suite, results, identity["benchmarks"])
        scores = score_suite(suite, benchmarks, results, model=manifest["model"], smoke=prompting.smoke(suite))
    stamp = SMOKE if scores["smoke"] else ""
    scores["notes"] = [*([stamp] if stamp else []), *prompting.notes(), *scores["notes"], *manifest["notes"]]
    fields = ("raw", "stderr", "normalized", "chance", "n")
    about = {"suite": suite, "model": manifest["model"], "stamp": stamp}
    rows = [
        {**about, "benchmark": name, **{field: row[field] for field in fields}}
        for name, row in scores["benchmarks"].items()
    ]
    with bad_input(OSError, about="output: "):
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / layout.SCORES, scores)
        write_text(target / "scores.csv", csv_text([*about, "benchmark", *fields], rows))
        scores_document(scores).write(target / "scores.md", target / "scores.tex")
    for note in scores["notes"]:
        print(note)
    score_table(scores).print()
    return scores
