"""The benchmarks: tasks, examples, metric, aggregation and chance level of each; suites of them, and the benchmarks of
lm-eval and of a user's folder that `--suite` names."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.base.files import sha256_file
from hf_ibnorm.base.reading import reading
from hf_ibnorm.checks import nearest
from hf_ibnorm.data import load_corpus

VERSION = "0.4.13"
"""The release of lm-eval whose tasks, prompts and metrics the suites are defined by."""
NO_TASKS = ("openllm", "leaderboard")
"""Groups of lm-eval that are no benchmarks: the first recurses until it dies, the second mixes chance levels."""
_DEFINED = r"""(?m)^{}:[ \t]*["']?([\w.+-]+)["']?[ \t]*$"""
MULTIPLE_CHOICE = (
    *("sva_simple", "sva_nounpp", "sva_linzen"),
    *("cause_and_effect", "phrase_relatedness", "human_organs_senses"),
)
ROLLING = {"austen_test": "austen"}
_TASKS = resources.files("eval.tasks")


@dataclass(frozen=True)
class Benchmark:
    """One row of a score table."""

    name: str  # the task or group of lm-eval, and the key in `scores.json`
    title: str  # how a leaderboard heads its column
    tasks: tuple[str, ...]  # the tasks it must consist of; any other set is an error
    # The metric of lm-eval's that counts; "ifeval" is the mean of the strict accuracies of prompts and of instructions,
    # "bits_per_byte" is better when lower.
    metric: str
    filter: str = "none"  # the filter of lm-eval's that counts
    mean: str = "size"  # "size" lets every item count the same, "task" every task
    # The score of guessing, subtracted when normalizing: one for the benchmark, or one for each task (then each task is
    # normalized, and the average taken); None is the mean of 1/choices over its items.
    bounds: float | Mapping[str, float] | None = None
    items: int | None = None  # how many the leaderboard has; with another number a score is not the leaderboard's
    shots: int = 0  # examples in the prompt; checked when tasks are loaded
    set_shots: bool = False  # whether lm-eval is given `shots`; otherwise its task files have the number
    also: tuple[str, ...] = ()  # further scores for `details`, as lm-eval names them: "metric,filter"
    folders: tuple[str, ...] = ()  # of the task files: below lm-eval's own, or absolute
    config: dict[str, Any] | None = None  # of a task of ours, which lm-eval takes as it is

    @property
    def rolling(self) -> bool:
        """Whether whole documents are scored, in bits per byte."""
        return self.metric == "bits_per_byte"

    @property
    def key(self) -> str:
        """The metric as lm-eval's results name it."""
        return f"{self.metric},{self.filter}"


def embedded_rows(name: str) -> list[dict[str, Any]]:
    """The items of an embedded task: {"query", "choices", "gold", "cluster"}, or {"text"} for rolling ones."""
    if name in ROLLING:
        return [{"text": each} for text in load_corpus(ROLLING[name], "test") for each in passages(text)]
    return [json.loads(line) for line in (_TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def passages(text: str, words: int = 300) -> list[str]:
    """A text cut between paragraphs, wherever a piece has so many words.

    Each piece is an item of its own: a novel as one item would have no standard error, and nothing to pair.
    """
    pieces = [""]
    for paragraph in re.split(r"(?<=\n\n)(?!\n)", text):
        if len(pieces[-1].split()) >= words:
            pieces.append("")
        pieces[-1] += paragraph
    if len(pieces) > 1 and len(pieces[-1].split()) < words:  # the end of the text
        pieces[-2:] = ["".join(pieces[-2:])]
    return pieces


def _embedded(name: str) -> Benchmark:
    """A task whose items are handed to lm-eval in memory, so that no dataset cache is involved."""

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(embedded_rows(name))}

    config: dict[str, Any] = {"task": name, "custom_dataset": dataset, "test_split": "test"}
    if name in ROLLING:
        metric, aggregation, version = "bits_per_byte", "bits_per_byte", 2.0  # version 1 had the novel as one item
        config |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    else:
        metric, aggregation, version = "acc", "mean", 1.0
        config |= {"output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}"}
        config |= {"doc_to_target": "gold", "target_delimiter": " "}
    config["metadata"] = {"version": version}
    config["metric_list"] = [{"metric": metric, "aggregation": aggregation, "higher_is_better": metric == "acc"}]
    return Benchmark(name, name, (name,), metric, config=config)


def _leaderboard(entry: dict[str, Any]) -> Benchmark:
    """A benchmark as `tasks/leaderboards.yaml` describes it."""
    pattern, choices = entry.pop("pattern", "{}"), entry.pop("choices", None)
    tasks = tuple(pattern.format(task) for task in entry.pop("tasks", entry["name"]).split())
    if isinstance(choices, dict):
        bounds = {pattern.format(task): 1 / n for n, names in choices.items() for task in names.split()}
        tasks, entry["bounds"] = tuple(bounds), bounds
    elif choices:
        entry["bounds"] = 1 / choices
    lists: dict[str, Any] = {name: tuple(entry.pop(name, ())) for name in ("also", "folders")}
    return Benchmark(tasks=tasks, **entry, **lists)


def _suites() -> dict[str, tuple[Benchmark, ...]]:
    text = (_TASKS / "leaderboards.yaml").read_text(encoding="utf-8")
    # In C, where PyYAML has it, ten times as fast.
    leaderboards = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    embedded = tuple(_embedded(name) for name in (*ROLLING, *MULTIPLE_CHOICE))
    return {"embedded": embedded, **{name: tuple(map(_leaderboard, entries)) for name, entries in leaderboards.items()}}


SUITES = _suites()
DEFINED = {each.name: each for benchmarks in SUITES.values() for each in benchmarks}
AVERAGED = ("v1", "v2")
"""Suites whose benchmarks have a common mean; bits per byte and accuracies have none."""


def suites_table(suite: str) -> Any:
    """A table of a suite's benchmarks: tasks, shots, metric, aggregation, chance."""
    from hf_ibnorm.report.tables import Table

    table = Table(["benchmark", "lm-eval", "tasks", "shots", "metric", "mean over", "chance"])
    for each in SUITES[suite]:
        if each.rolling:
            chance = ""
        elif each.bounds is None:
            chance = "right/choices" if each.name == "truthfulqa_mc2" else "1/choices"
        elif isinstance(each.bounds, float):
            chance = f"{each.bounds:.2f}"
        else:
            chance = f"{min(each.bounds.values()):.3f} to {max(each.bounds.values()):.2f} by task"
        metric = each.metric if each.filter == "none" else f"{each.metric}, {each.filter}"
        words = [each.title, each.name, str(len(each.tasks)), str(each.shots), metric]
        table.rows.append([*words, {"size": "items", "task": "tasks"}[each.mean], chance])
    return table


def tasks_root() -> Path:
    """The folder of lm-eval's task files."""
    (root,) = find_spec("lm_eval").submodule_search_locations  # type: ignore[union-attr, misc]
    return Path(root) / "tasks"


@cache
def task_manager(folders: tuple[str, ...]) -> Any:
    """lm-eval's index of the tasks in `folders`: its own, "." for all of them (slow), or, absolute, a user's.

    Where two folders have a task of one name, the later folder counts.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[tasks_root() / each for each in folders], include_defaults=False)


def leaves(benchmark: Benchmark) -> set[str]:
    """Names of the tasks behind a benchmark: its own, or those of the group or tag of lm-eval that it only names."""
    if benchmark.tasks or not benchmark.folders:
        return set(benchmark.tasks)
    index = task_manager(benchmark.folders).task_index
    tasks, names = set(), [benchmark.name]
    for name in names:  # which grows while it is read
        entry = index.get(name)
        if entry is None or entry.kind.name in ("TASK", "PY_TASK"):
            tasks.add(name)
            continue
        members = ((entry.cfg or {}).get("task") or []) if entry.kind.name == "GROUP" else []
        below = [member if isinstance(member, str) else member.get("task", "") for member in members]
        below += [each for each, other in index.items() if name in other.tags]
        names += [each for each in below if each not in names]  # lm-eval has groups that hold themselves
    return tasks


def choose(names: str, include: str | None = None) -> list[Benchmark]:
    """The benchmarks of a suite, or those of several tasks, groups and tags, divided by commas.

    `include` is a folder with task files of the user's own, in lm-eval's form. UserError where a name is unknown, a
    task of the folder has the name of a suite's, or none of the folder is named.
    """
    if include is not None:
        if not Path(include).is_dir():
            raise UserError(f"include_path: {include} is no directory")
        include = str(Path(include).absolute())
    own = [] if include is None else _own_tasks(include)
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
    return chosen


def _own_tasks(include: str) -> list[str]:
    """Names of the tasks, groups and tags in a folder of the user's; UserError for a task file that lm-eval would pass
    over without a word."""
    from lm_eval.tasks._yaml_loader import load_yaml

    files: dict[str, Path] = {}
    for path in sorted(Path(include).rglob("*.yaml")):
        with reading("include_path", path):
            content = load_yaml(path, resolve_func=False)
        name = content.get("group") or content.get("task")
        if isinstance(name, str) and files.setdefault(name, path) != path:
            raise UserError(f"include_path: {name!r} is in {files[name]} and in {path}")
    own = task_manager((include,)).all_tasks
    if not own:
        raise UserError(f"include_path: {include} has no task; there must be a file *.yaml with `task: NAME`")
    ours = {name for each in DEFINED.values() for name in (each.name, *each.tasks)}
    if taken := sorted(ours.intersection(own)):
        raise UserError(f"include_path: {include} has a task {taken[0]!r}, which is the name of one of a suite's")
    return own


def _named(name: str, include: str | None, own: list[str]) -> Benchmark:
    """The benchmark of a name that is in no suite."""
    if name in own:
        return _bare(name, str(include))
    word = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])")
    files = {path: text for path, text in _task_files().items() if word.search(text)}
    if files and name not in NO_TASKS:
        # The index of all of lm-eval takes half a minute, that of one folder is there at once. A task has one place;
        # a group or a tag is gathered from all files that say its name.
        places = [path for path, text in files.items() if name in re.findall(_DEFINED.format("task"), text)] or files
        homes = {path.relative_to(tasks_root()).parts[0] for path in places}
        benchmark = _bare(name, homes.pop() if len(homes) == 1 else ".")
        if name in task_manager(benchmark.folders).all_tasks:
            return benchmark
    hint = " (use v1 and v2 for the leaderboards)" if name in NO_TASKS else nearest(name, [*SUITES, *DEFINED, *own])
    if not hint:
        defined = re.compile(_DEFINED.format("(?:task|group)"))
        known = {each for text in _task_files().values() for each in defined.findall(text)}
        hint = nearest(name, sorted(known.difference(NO_TASKS)))
    more = f", or of {include} ({', '.join(own[:10])})" if include else ""
    raise UserError(f"suite: got {name!r}, allowed are {', '.join(SUITES)} and tasks of lm-eval {VERSION}{more}{hint}")


def _bare(name: str, folder: str) -> Benchmark:
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
