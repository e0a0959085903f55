"""The directory of a run: what it was asked (`manifest.json`), the answers to each benchmark (`results/`), its scores.

A result file is written whole as its benchmark ends, and the scores are a function of these files.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import atomic_directory, check_new_directory, write_json, write_text
from hf_ibnorm.base.reading import read_json
from hf_ibnorm.report.environment import environment_record
from hf_ibnorm.report.tables import csv_text

from .harness import Prompting
from .scoring import DAMAGE, check_items, score_suite
from .suites import DEFINED, SUITES, Benchmark
from .tables import SMOKE, describe, score_table

MANIFEST = "manifest.json"
RESULTS = "results"


def is_begun(directory: Path) -> bool:
    """Whether a run was begun in `directory`."""
    return (directory / MANIFEST).is_file()


def create(directory: Path, identity: dict[str, Any], about: dict[str, Any]) -> None:
    """Begin a run: `identity` is all that its scores depend on, `about` what else is worth keeping.

    Raises:
        UserError: the directory cannot be made.
    """
    with bad_input(OSError, about="output: "):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(directory) as folder:
            (folder / RESULTS).mkdir()
            write_json(folder / "environment.json", environment_record())
            write_json(folder / MANIFEST, {**about, "identity": identity})


def still_missing(directory: Path, identity: dict[str, Any]) -> list[str]:
    """The benchmarks that a stopped run has not finished.

    Raises:
        UserError: the run in `directory` is another one.
    """
    before = read_manifest(directory)["identity"]
    if different := _difference(before, identity):
        raise UserError(f"output: {directory} holds a run with another {different}; name a new directory")
    for left_behind in (directory / RESULTS).glob(".*"):  # written in part when the run was killed
        left_behind.unlink(missing_ok=True)
    return [name for name in identity["benchmarks"] if not (directory / RESULTS / f"{name}.json").is_file()]


def _difference(before: Any, now: Any, field: str = "") -> str:
    """Where two JSON values differ, "" if nowhere."""
    now = json.loads(json.dumps(now))
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return "" if before == now else f"{field}: {str(before)[:40]}, now {str(now)[:40]}"
    for name in sorted({*before, *now}):
        if found := _difference(before.get(name), now.get(name), f"{field}.{name}" if field else name):
            return found
    return ""


def write_result(directory: Path, benchmark: Benchmark, result: dict[str, Any], stamp: str) -> None:
    """Write the result file of a benchmark, with what its score is made of."""
    definition = {name: value for name, value in asdict(benchmark).items() if name not in ("config", "folders")}
    with bad_input(OSError, about="output: "):
        content = {"stamp": stamp, **result, "definition": definition}
        write_json(directory / RESULTS / f"{benchmark.name}.json", content)


def add_notes(directory: Path, notes: Sequence[str]) -> None:
    """Keep what is worth knowing beside the scores."""
    manifest = read_manifest(directory)
    if more := [note for note in notes if note not in manifest["notes"]]:
        with bad_input(OSError, about="output: "):
            write_json(directory / MANIFEST, {**manifest, "notes": manifest["notes"] + more})


def record_hashes(directory: Path) -> None:
    """Write the hashes of the questions that were answered, task by task, into the manifest."""
    hashes = {
        name: task["hash"]
        for result in read_results(directory).values()
        for name, task in result.get("tasks", {}).items()
    }
    with bad_input(OSError, about="output: "):
        write_json(directory / MANIFEST, {**read_manifest(directory), "task_hashes": hashes})


def read_manifest(directory: Path) -> dict[str, Any]:
    """`manifest.json` of a run.

    Raises:
        UserError: it is missing or damaged.
    """
    manifest: dict[str, Any] = read_json("run", directory / MANIFEST, _MANIFEST)
    return manifest


_IDENTITY = {
    **{"suite": str, "benchmarks": [str], "overlong": str, "versions": dict},
    "model": {"weights": str, "config": str, "tokenizer": str, "dtype": str, "max_length": int},
    **{"prompting": {"limit": (int, type(None))}, "mirror?": (dict, type(None))},
}
_MANIFEST = {"identity": _IDENTITY, "model": str, "notes": [str]}
_TASK = {"items": [dict], "hash": str, "size": int}
_RESULT = {"tasks?": {"*": _TASK}, "skipped?": str, "definition?": {"tasks": [str]}}
"""Forms of what a run has on disk, as far as every reader needs it."""


def read_results(directory: Path) -> dict[str, dict[str, Any]]:
    """The result files of a run by benchmark."""
    found = {path.stem: read_json("run", path, _RESULT) for path in sorted((directory / RESULTS).glob("[!.]*.json"))}
    for name, result in found.items():
        if not {"tasks", "skipped"} & result.keys():
            raise UserError(f"run: {directory / RESULTS / name}.json has no tasks or skipped")
    return found


def read_run(directory: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The manifest and the result files of a run, each with as many items as it must have.

    Raises:
        UserError: a file is missing or damaged, or items are.
    """
    manifest, results = read_manifest(directory), read_results(directory)
    with bad_input(*DAMAGE, about=f"run: {directory} holds a damaged result: "):
        limit = Prompting(**manifest["identity"]["prompting"]).limit
        for result in results.values():
            check_items(result.get("tasks", {}), limit)
    return manifest, results


def benchmarks_of(suite: str, results: dict[str, dict[str, Any]], names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of a run: those of its suite, in order, or as their result files define them."""
    if suite in SUITES:
        return [each for each in SUITES[suite] if each.name in names]
    found = []
    for name in names:
        if name in DEFINED:
            found.append(DEFINED[name])
        elif name in results:
            definition = results[name]["definition"]
            found.append(Benchmark(**{**definition, "tasks": tuple(definition["tasks"])}))
        else:
            found.append(Benchmark(name, name, (), ""))
    return found


def merge(shards: Sequence[Path], output: Path) -> None:
    """Put the shards of one run together, as if it had been run in `output`, a new directory.

    Raises:
        UserError: they are not shards of one run, or the directory cannot be made.
    """
    with bad_input():
        check_new_directory("output", output)
    manifests = [read_manifest(shard) for shard in shards]
    first = manifests[0]["identity"]
    names: list[str] = []
    for shard, manifest in zip(shards, manifests, strict=True):
        shared = {name: value for name, value in first.items() if name not in ("benchmarks", "mirror")}
        if different := _difference(shared, {name: manifest["identity"].get(name) for name in shared}):
            raise UserError(f"run: {shard} is no part of the run in {shards[0]}, it has another {different}")
        names += manifest["identity"]["benchmarks"]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"run: {repeated[0]} is in more than one of the directories")
    order = [each.name for each in SUITES.get(first["suite"], ())] or first["suite"].split(",")
    files = [file for manifest in manifests for file in (manifest["identity"]["mirror"] or {}).items()]
    identity = {**first, "benchmarks": sorted(names, key=order.index), "mirror": dict(sorted(files)) or None}
    notes = [note for manifest in manifests for note in manifest["notes"]]
    create(output, identity, {**manifests[0], "identity": identity, "notes": list(dict.fromkeys(notes))})
    with bad_input(OSError, about="output: "):
        for shard in shards:
            for path in sorted((shard / RESULTS).glob("[!.]*.json")):
                write_text(output / RESULTS / path.name, path.read_text(encoding="utf-8"))
    record_hashes(output)


def score(directory: Path) -> dict[str, Any]:
    """The scores of a run, from its files alone.

    Raises:
        UserError: a file is missing or damaged.
    """
    manifest, results = read_run(directory)
    suite, names = manifest["identity"]["suite"], manifest["identity"]["benchmarks"]
    prompting = Prompting(**manifest["identity"]["prompting"])
    with bad_input(*DAMAGE, about=f"run: {directory} holds a damaged result: "):
        benchmarks = benchmarks_of(suite, results, names)
        scores = score_suite(suite, benchmarks, results, model=manifest["model"], smoke=prompting.smoke(suite))
    stamp = [SMOKE] if scores["smoke"] else []
    scores["notes"] = [*stamp, *prompting.notes(), *scores["notes"], *manifest["notes"]]
    return scores


def write_scores(directory: Path, output: Path | None = None) -> dict[str, Any]:
    """Score a run, print the table and write `scores.json`, `.md`, `.csv` and `.tex` into `output`, or its directory.

    Raises:
        UserError: as `score` does, or the files cannot be written.
    """
    scores = score(directory)
    target = output or directory
    fields = ("raw", "stderr", "normalized", "chance", "n")
    about = {"suite": scores["suite"], "model": scores["model"], "stamp": SMOKE if scores["smoke"] else ""}
    rows = [
        {**about, "benchmark": name, **{field: row[field] for field in fields}}
        for name, row in scores["benchmarks"].items()
    ]
    with bad_input(OSError, about="output: "):
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / "scores.json", scores)
        write_text(target / "scores.csv", csv_text([*about, "benchmark", *fields], rows))
        describe(scores).write(target / "scores.md", target / "scores.tex")
    for note in scores["notes"]:
        print(note)
    score_table(scores).print()
    return scores
