"""What `--suite` names: a suite of ours, tasks of lm-eval, tasks of the user's own."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.base.files import sha256_file
from hf_ibnorm.checks import nearest

from .suites import DEFINED, SUITES, Benchmark, leaves, task_manager, tasks_root

VERSION = "0.4.13"
"""The release of lm-eval whose tasks, prompts and metrics the suites are defined by."""
NO_TASKS = ("openllm", "leaderboard")
"""Groups of lm-eval that are no benchmarks: the first recurses until it dies, the second mixes chance levels."""
_DEFINED = r"""(?m)^{}:[ \t]*["']?([\w.+-]+)["']?[ \t]*$"""


def choose(names: str, include: str | None = None) -> tuple[str, list[Benchmark]]:
    """The suite of a name, or the tasks, groups and tags of several names, divided by commas.

    Args:
        names: what `--suite` says.
        include: folder with task files of the user's own, in lm-eval's form.

    Raises:
        UserError: a name is unknown, a task of the user's has the name of one of a suite, or none of theirs is named.
    """
    own = []
    if include is not None:
        if not Path(include).is_dir():
            raise UserError(f"include_path: {include} is no directory")
        include = str(Path(include).absolute())
        own = _own_tasks(include)
    if names in SUITES:
        chosen = list(SUITES[names])
    else:
        asked = names.split(",")
        if alone := [name for name in asked if name in SUITES or not name]:
            why = f"{alone[0]!r} stands alone, or is no name"
            raise UserError(f"suite: got {names!r}, {why}; tasks are divided by commas")
        if twice := sorted({name for name in asked if asked.count(name) > 1}):
            raise UserError(f"suite: got {twice[0]!r} more than once")
        chosen = [DEFINED[name] if name in DEFINED else _named(name, include, own) for name in asked]
    if include and not any(include in each.folders for each in chosen):
        raise UserError(f"include_path: {include} has none of {names}, but {', '.join(own[:10])}")
    return names, chosen


def _own_tasks(include: str) -> list[str]:
    """Names of the tasks, groups and tags in a folder of the user's."""
    _check_files(include)
    own = task_manager((include,)).all_tasks
    if not own:
        raise UserError(f"include_path: {include} has no task; there must be a file *.yaml with `task: NAME`")
    ours = {name for each in DEFINED.values() for name in (each.name, *each.tasks)}
    if taken := sorted(ours.intersection(own)):
        raise UserError(f"include_path: {include} has a task {taken[0]!r}, which is the name of one of a suite's")
    return own


def _check_files(include: str) -> None:
    """Raise UserError for a task file that lm-eval would pass over without a word."""
    from lm_eval.tasks._yaml_loader import load_yaml

    seen: dict[str, Path] = {}
    for path in sorted(Path(include).rglob("*.yaml")):
        try:
            content = load_yaml(path, resolve_func=False)
        except Exception as error:  # a user's file: YAML may raise anything
            line = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"include_path: {path} cannot be read: {line}") from error
        name = content.get("group") or content.get("task")
        if isinstance(name, str) and name in seen:
            raise UserError(f"include_path: {name!r} is in {seen[name]} and in {path}")
        if isinstance(name, str):
            seen[name] = path


def _named(name: str, include: str | None, own: list[str]) -> Benchmark:
    """The benchmark of a name that is in no suite."""
    if name in own:
        return _from(name, str(include))
    word = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])")
    files = {path: text for path, text in _task_files().items() if word.search(text)}
    if files and name not in NO_TASKS:
        # The index of all of lm-eval takes half a minute, that of one folder is there at once. A task has one place;
        # a group or a tag is gathered from all files that say its name.
        places = [path for path, text in files.items() if name in re.findall(_DEFINED.format("task"), text)] or files
        homes = {path.relative_to(tasks_root()).parts[0] for path in places}
        benchmark = _from(name, homes.pop() if len(homes) == 1 else ".")
        if name in task_manager(benchmark.folders).all_tasks:
            return benchmark
    hint = " (use v1 and v2 for the leaderboards)" if name in NO_TASKS else nearest(name, [*SUITES, *DEFINED, *own])
    if not hint:
        defined = re.compile(_DEFINED.format("(?:task|group)"))
        known = {each for text in _task_files().values() for each in defined.findall(text)}
        hint = nearest(name, sorted(known.difference(NO_TASKS)))
    more = f", or of {include} ({', '.join(own[:10])})" if include else ""
    raise UserError(f"suite: got {name!r}, allowed are {', '.join(SUITES)} and tasks of lm-eval {VERSION}{more}{hint}")


def _from(name: str, folder: str) -> Benchmark:
    """A benchmark that is only a name yet, with the folders where all of its tasks are found."""
    index = task_manager((folder,)).task_index
    alone = Benchmark(name, name, (), "", folders=(folder,))
    whole = name in index and leaves(alone) <= index.keys()
    return alone if whole or folder == "." else replace(alone, folders=(".", folder))


@cache
def _task_files() -> dict[Path, str]:
    """The text of every task file of lm-eval."""
    return {path: path.read_text(encoding="utf-8", errors="replace") for path in sorted(tasks_root().rglob("*.yaml"))}


def own_files(include: str) -> dict[str, str]:
    """sha256 of the task files in a folder of the user's, and of the Python files that they may call."""
    files = (file for kind in ("*.yaml", "*.py") for file in Path(include).rglob(kind))
    return {str(file.relative_to(include)): sha256_file(file) for file in sorted(files)}
