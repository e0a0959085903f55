"""A local mirror of the benchmarks' data sets: what belongs into it, fetching it from the Hub, checking it.

A mirror is a folder with one folder `<organization>/<repository>` for each data set, in the Hub's own form: a
`README.md` whose front matter names the configurations and their files, and those files. `mirror.json` holds the
revision and the hash of every file that was fetched; a mirror made by hand has none.
"""

import fnmatch
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import disable_progress_bars

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import atomic_directory, sha256_file, write_json
from hf_ibnorm.base.reading import check_form, parse_yaml, read_json, read_text, reading
from hf_ibnorm.report.tables import Table

from .suites import Benchmark, leaves, task_manager

INDEX = "mirror.json"
GATED = {"Idavidrein/gpqa"}
"""Data sets whose owner asks for terms to be accepted."""
LOCAL = ("json", "csv", "text", "parquet", "arrow", "pandas", "xml", "imagefolder", "audiofolder")
"""Formats of which `datasets` reads local files."""
DATA_FILES = ("*.parquet", "*.json", "*.jsonl", "*.csv", "*.txt", "*.zip", "*.gz", "*.zst")


@dataclass(frozen=True, order=True)
class DataSet:
    """A configuration of a data set on the Hub; None for the one that has no name."""

    repository: str
    config: str | None


def is_local(path: str) -> bool:
    """Whether a `dataset_path` is not on the Hub: it is a format of local files, or a folder."""
    return path in LOCAL or path.startswith(".") or Path(path).is_absolute()


def sets_of(benchmarks: Iterable[Benchmark]) -> set[DataSet]:
    """The data sets that the benchmarks' task files name."""
    sets = set()
    for benchmark in benchmarks:
        index = task_manager(benchmark.folders).task_index if benchmark.folders else {}
        for config in [index[task].cfg or {} for task in leaves(benchmark) if task in index]:
            if "dataset_path" in config and not is_local(config["dataset_path"]):
                sets.add(DataSet(config["dataset_path"], config.get("dataset_name")))
    return sets


def how_to_access(repository: str) -> str:
    """What to do to get access to a gated data set."""
    page = f"https://huggingface.co/datasets/{repository}"
    return f"accept its terms at {page}, then `hf auth login`; or name a --mirror that has it; or --skip its benchmark"


def cause_of(error: BaseException, *repositories: str) -> str:
    """The first line of an error, with what to do if a gated data set was refused."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{line} - {how_to_access(repositories[0])}" if repositories and "gated" in str(error).lower() else line


def _card(folder: Path) -> dict[str, Any]:
    """The front matter of a data set's README.md; empty where there is none."""
    path = folder / "README.md"
    if not path.exists():
        return {}
    parts = read_text("mirror", path).split("---\n", 2)
    with reading("mirror", path):
        card = parse_yaml(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    check_form(f"mirror: {path}", card or {}, {"configs?": [{"config_name": str}]})
    return card or {}


def patterns(card: dict[str, Any], configs: Sequence[str | None]) -> list[str]:
    """Globs of the files that the named configurations consist of; those of all data files where the card has none.

    Raises:
        KeyError: the card lacks a configuration.
    """
    known = {entry["config_name"]: entry for entry in card.get("configs", []) if "data_files" in entry}
    if not known:
        return list(DATA_FILES)
    default = next((name for name, entry in known.items() if entry.get("default")), None)
    globs: list[str] = []
    for config in configs:
        name = config or default or ("default" if "default" in known else next(iter(known)))
        files = known[name]["data_files"]
        for entry in files if isinstance(files, list) else [files]:
            path = entry["path"] if isinstance(entry, dict) else entry
            globs += [path] if isinstance(path, str) else path
    return sorted(set(globs))


def problems(mirror: Path, sets: Iterable[DataSet]) -> list[str]:
    """What keeps a mirror from being used for `sets`: missing or changed files, one sentence each."""
    wrong, recorded = [], _index(mirror)
    for repository, configs in sorted(_by_repository(sets).items()):
        folder = mirror / repository
        if not folder.is_dir():
            wrong.append(f"{folder} is missing")
            continue
        for config in configs:
            try:
                globs = patterns(_card(folder), [config])
            except (KeyError, TypeError, yaml.YAMLError):
                wrong.append(f"{folder / 'README.md'} names no configuration {config}")
                continue
            # Every glob of a configuration is a split; where the card names none, any file will do.
            absent = [glob for glob in globs if not any(folder.glob(glob))]
            if absent and (globs != list(DATA_FILES) or len(absent) == len(globs)):
                wrong.append(f"{folder / absent[0]} is missing")
        for name, digest in recorded.get(repository, {}).get("files", {}).items():
            if not (folder / name).is_file():
                wrong.append(f"{folder / name} is missing")
            elif sha256_file(folder / name) != digest:
                wrong.append(f"{folder / name} has changed since it was fetched")
    return wrong


def hashes(mirror: Path, sets: Iterable[DataSet]) -> dict[str, str]:
    """sha256 of every file of the data sets' folders, by path inside the mirror."""
    files = (file for repository in sorted(_by_repository(sets)) for file in sorted((mirror / repository).rglob("*")))
    return {str(file.relative_to(mirror)): sha256_file(file) for file in files if file.is_file()}


def _by_repository(sets: Iterable[DataSet]) -> dict[str, list[str | None]]:
    ordered = sorted(sets, key=lambda each: (each.repository, each.config or ""))
    groups = groupby(ordered, key=lambda each: each.repository)
    return {repository: [each.config for each in group] for repository, group in groups}


def _index(mirror: Path) -> dict[str, Any]:
    path = mirror / INDEX
    return dict(read_json("mirror", path, {"*": {"files": {"*": str}}})) if path.exists() else {}


@dataclass(frozen=True)
class Remote:
    """What the Hub has of one repository that a mirror needs."""

    repository: str
    configs: list[str | None]
    revision: str
    files: dict[str, int]
    gated: bool


def plan(sets: Iterable[DataSet]) -> Iterator[Remote]:
    """Ask the Hub for the files and sizes (in bytes) of each data set; UserError where the Hub does not answer, or
    refuses a gated set."""
    from huggingface_hub import HfApi, hf_hub_download

    for repository, configs in sorted(_by_repository(sets).items()):
        with _from_hub(repository):
            info = HfApi().dataset_info(repository, files_metadata=True)
            names = {each.rfilename: each.size or 0 for each in info.siblings or []}
            card: dict[str, Any] = {}
            if "README.md" in names:
                options: Any = {"repo_type": "dataset", "revision": info.sha}
                card = _card(Path(hf_hub_download(repository, "README.md", **options)).parent)
            globs = [*patterns(card, configs), "README.md"]
            files = {name: size for name, size in names.items() if any(fnmatch.fnmatch(name, glob) for glob in globs)}
        yield Remote(repository, configs, str(info.sha), files, bool(info.gated))


@contextmanager
def _from_hub(repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the network, the Hub and its answers raise too many kinds to name
        raise UserError(f"mirror: the Hub does not give {repository}: {cause_of(error, repository)}") from error


def fetch(mirror: Path, sets: Iterable[DataSet]) -> Iterator[Remote]:
    """Download data sets into a mirror, each whole or not at all; one that is there already, whole, is left alone;
    UserError where the Hub does not answer or refuses, or the mirror cannot be written."""
    from huggingface_hub import snapshot_download

    wanted = set(sets)
    for remote in plan(wanted):
        index = _index(mirror)
        mine = {each for each in wanted if each.repository == remote.repository}
        before = index.get(remote.repository, {})
        if before.get("revision") == remote.revision and not problems(mirror, mine):
            yield remote
            continue
        with _from_hub(remote.repository):
            options: Any = {"revision": remote.revision, "allow_patterns": list(remote.files)}
            source = Path(snapshot_download(remote.repository, repo_type="dataset", **options))
        with bad_input(OSError, about="mirror: "):
            target = mirror / remote.repository
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_directory(target, replace=True) as folder:
                for name in remote.files:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / name, folder / name)
            files = {name: sha256_file(target / name) for name in remote.files}
            index[remote.repository] = {"revision": remote.revision, "files": files}
            write_json(mirror / INDEX, index)
        yield remote


def carry_out(what: str, mirror: Path | None, benchmarks: Iterable[Benchmark]) -> None:
    """The verbs of the command: `plan`, `fetch` and `check`; UserError where bad input, the Hub refuses, or the mirror
    is not whole."""
    if mirror is None and what != "plan":
        raise UserError(f"mirror: `mirror {what}` needs --mirror DIR")
    sets = sets_of(benchmarks)
    if what == "check" and mirror:
        wrong = problems(mirror, sets)
        for problem in wrong:
            print(problem)
        if wrong:
            raise UserError(f"mirror: {len(wrong)} problems; `mirror fetch --mirror {mirror}` mends them")
        recorded = sum(len(entry["files"]) for entry in _index(mirror).values())
        print(f"{mirror} is whole: {len(_by_repository(sets))} data sets; hashes of {recorded} files agree")
        return
    if not sys.stderr.isatty():
        disable_progress_bars()
    table = Table(["data set", "configurations", "files", "MB", "revision", "gated"])
    for remote in fetch(mirror, sets) if what == "fetch" and mirror else plan(sets):
        size, gated = sum(remote.files.values()) / 1e6, "yes" if remote.gated else ""
        counts = (str(len(remote.configs)), str(len(remote.files)), f"{size:.1f}", remote.revision[:8], gated)
        table.rows.append([remote.repository, *counts])
    table.print()
