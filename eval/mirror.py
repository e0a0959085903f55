"""A local mirror of the benchmarks' data sets: planned, fetched from the Hub, checked.

A mirror is a folder with one folder `<organization>/<repository>` for each data set, in the Hub's own form: a
`README.md` whose front matter names the configurations and their files, and those files. `mirror.json` holds the
revision and the hash of every file that was fetched; a mirror made by hand has none.
"""

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetInfo
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects

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
    """A configuration of a data set on the Hub; None for the default one."""

    repository: str
    config: str | None


def is_local(path: str) -> bool:
    """Whether a `dataset_path` is a format of local files, or a folder, and no data set on the Hub."""
    return path in LOCAL or path.startswith(".") or Path(path).is_absolute()


def sets_of(benchmarks: Iterable[Benchmark]) -> set[DataSet]:
    """The data sets that the benchmarks' task files name."""
    sets = set()
    for benchmark in benchmarks:
        index = task_manager(benchmark.folders).task_index if benchmark.folders else {}
        for task in leaves(benchmark) & index.keys():
            config = index[task].cfg or {}
            if "dataset_path" in config and not is_local(config["dataset_path"]):
                sets.add(DataSet(config["dataset_path"], config.get("dataset_name")))
    return sets


def how_to_access(repository: str) -> str:
    """How to get access to a gated data set."""
    page = f"https://huggingface.co/datasets/{repository}"
    return f"accept its terms at {page}, then `hf auth login`; or name a --mirror that has it; or --skip its benchmark"


def cause_of(error: BaseException, *repositories: str) -> str:
    """The first line of an error, with the way to get access if a gated data set was refused."""
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
    marked = [name for name, entry in known.items() if entry.get("default")]
    default = [*marked, *({"default"} & known.keys()), *known][0]
    globs: set[str] = set()
    for config in configs:
        files = known[config or default]["data_files"]
        for entry in files if isinstance(files, list) else [files]:
            path = entry["path"] if isinstance(entry, dict) else entry
            globs.update([path] if isinstance(path, str) else path)
    return sorted(globs)


def problems(mirror: Path, sets: Iterable[DataSet]) -> list[str]:
    """Sentences on the files of `sets` that a mirror lacks, or that have changed since they were fetched."""
    wrong, recorded = [], _index(mirror)
    for repository, configs in _by_repository(sets).items():
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
    files = (file for repository in _by_repository(sets) for file in sorted((mirror / repository).rglob("*")))
    return {str(file.relative_to(mirror)): sha256_file(file) for file in files if file.is_file()}


def _by_repository(sets: Iterable[DataSet]) -> dict[str, list[str | None]]:
    """Repository → the configurations that are needed of it, in order."""
    ordered = sorted(sets, key=lambda each: (each.repository, each.config or ""))
    groups = groupby(ordered, key=lambda each: each.repository)
    return {repository: [each.config for each in group] for repository, group in groups}


def _index(mirror: Path) -> dict[str, Any]:
    path = mirror / INDEX
    return dict(read_json("mirror", path, {"*": {"files": {"*": str}}})) if path.exists() else {}


def plan(sets: Iterable[DataSet]) -> Iterator[tuple[DatasetInfo, list[str | None]]]:
    """Each repository as the Hub has it, with no other files (`siblings`) than a mirror needs, and the configurations
    that are needed of it; UserError where the Hub does not answer, or refuses a gated set."""
    from huggingface_hub import HfApi, hf_hub_download

    for repository, configs in _by_repository(sets).items():
        with _from_hub(repository):
            info, card = HfApi().dataset_info(repository, files_metadata=True), {}
            files = info.siblings or []
            if any(file.rfilename == "README.md" for file in files):
                path = hf_hub_download(repository, "README.md", repo_type="dataset", revision=info.sha)
                card = _card(Path(path).parent)
            globs = [*patterns(card, configs), "README.md"]
            info.siblings = list(filter_repo_objects(files, allow_patterns=globs, key=lambda file: file.rfilename))
        yield info, configs


@contextmanager
def _from_hub(repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the network, the Hub and its answers raise too many kinds to name
        raise UserError(f"mirror: the Hub does not give {repository}: {cause_of(error, repository)}") from error


def fetch(mirror: Path, info: DatasetInfo, configs: Iterable[str | None]) -> None:
    """Download the files of `plan` into a mirror, all or none, unless they are there already; UserError where the Hub
    does not answer or refuses, or the mirror cannot be written."""
    from huggingface_hub import snapshot_download

    index, names = _index(mirror), [file.rfilename for file in info.siblings or []]
    same = index.get(info.id, {}).get("revision") == info.sha
    if same and not problems(mirror, [DataSet(info.id, config) for config in configs]):
        return
    with _from_hub(info.id):
        source = Path(snapshot_download(info.id, repo_type="dataset", revision=info.sha, allow_patterns=names))
    with bad_input(OSError, about="mirror: "):
        target = mirror / info.id
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(target, replace=True) as folder:
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / name)
        digests = {name: sha256_file(target / name) for name in names}
        write_json(mirror / INDEX, {**index, info.id: {"revision": info.sha, "files": digests}})


def carry_out(step: str, mirror: Path | None, benchmarks: Iterable[Benchmark]) -> None:
    """The steps of the command, `plan`, `fetch` and `check`; UserError where the mirror is not named, or not whole, or
    the Hub refuses."""
    if mirror is None and step != "plan":
        raise UserError(f"mirror: `mirror {step}` needs --mirror DIR")
    sets = sets_of(benchmarks)
    if step == "check" and mirror:
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
    for info, configs in plan(sets):
        if step == "fetch" and mirror:
            fetch(mirror, info, configs)
        sizes = [file.size or 0 for file in info.siblings or []]
        numbers = (str(len(configs)), str(len(sizes)), f"{sum(sizes) / 1e6:.1f}")
        table.rows.append([info.id, *numbers, str(info.sha)[:8], "yes" if info.gated else ""])
    table.print()
