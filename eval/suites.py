"""The suites: tasks, examples, metric, aggregation and chance level of each benchmark, and where its items are."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from hf_ibnorm.data import load_corpus

MULTIPLE_CHOICE = (
    *("sva_simple", "sva_nounpp", "sva_linzen"),
    *("cause_and_effect", "phrase_relatedness", "human_organs_senses"),
)
ROLLING = {"austen_test": "austen"}


@dataclass(frozen=True)
class Benchmark:
    """One row of a score table.

    Args:
        name: the task or group of lm-eval, and the key in `scores.json`.
        title: how a leaderboard heads its column.
        tasks: the tasks it must consist of; any other set is an error.
        metric: of lm-eval's metrics the one that counts; "ifeval" is the mean of the strict accuracies of prompts and
            of instructions, "bits_per_byte" is better when lower.
        filter: of lm-eval's filters the one that counts.
        mean: "size" lets every item count the same, "task" every task.
        bounds: the score of guessing, subtracted when normalizing: one for the benchmark, or one for each task (each
            task is normalized first then, and the average taken); None is the mean of 1/choices over its items.
        items: how many the leaderboard has; with another number a score is not the leaderboard's.
        shots: examples in the prompt; asserted.
        set_shots: whether lm-eval has to be told; otherwise its own task files say so.
        also: further scores for `details`, as lm-eval names them: "metric,filter".
        folders: where the task files are: below lm-eval's own, or an absolute path.
        config: tasks of our own, which lm-eval takes as a dictionary.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    metric: str
    filter: str = "none"
    mean: str = "size"
    bounds: float | Mapping[str, float] | None = None
    items: int | None = None
    shots: int = 0
    set_shots: bool = False
    also: tuple[str, ...] = ()
    folders: tuple[str, ...] = field(default=(), repr=False)
    config: dict[str, Any] | None = field(default=None, repr=False)

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
    text = resources.files("eval.tasks").joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def passages(text: str, words: int = 300) -> list[str]:
    """A text in pieces of whole paragraphs, each as short as it can be with so many words; together they are the text.

    Each is an item of its own: a novel as one item would have no standard error, and nothing to pair.
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

    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "metadata": {"version": 2.0 if name in ROLLING else 1.0},  # version 1 had the novel as one item
    }
    if name in ROLLING:
        metric = "bits_per_byte"
        config |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
        config["metric_list"] = [{"metric": metric, "aggregation": metric, "higher_is_better": False}]
    else:
        metric = "acc"
        config |= {"output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}"}
        config |= {"doc_to_target": "gold", "target_delimiter": " "}
        config["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
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


def _leaderboards() -> dict[str, tuple[Benchmark, ...]]:
    text = resources.files("eval.tasks").joinpath("leaderboards.yaml").read_text(encoding="utf-8")
    # In C, where PyYAML has it, ten times as fast.
    content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {name: tuple(map(_leaderboard, entries)) for name, entries in content.items()}


SUITES: dict[str, tuple[Benchmark, ...]] = {
    "embedded": tuple(_embedded(name) for name in (*ROLLING, *MULTIPLE_CHOICE)),
    **_leaderboards(),
}
DEFINED = {each.name: each for benchmarks in SUITES.values() for each in benchmarks}
AVERAGED = ("v1", "v2")
"""Suites whose benchmarks have a common mean; bits per byte and accuracies have none."""


def tasks_root() -> Path:
    """The folder of lm-eval's task files."""
    (root,) = find_spec("lm_eval").submodule_search_locations  # type: ignore[union-attr, misc]
    return Path(root) / "tasks"


@cache
def task_manager(folders: tuple[str, ...]) -> Any:
    """lm-eval's index of the tasks in `folders`, its own or, absolute, a user's; that of all its own, ".", is slow.

    Where two have a task of one name the later one counts.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[tasks_root() / each for each in folders], include_defaults=False)


def leaves(benchmark: Benchmark) -> set[str]:
    """Names of the tasks behind a benchmark: its own, or those of the group or tag of lm-eval that it only names."""
    if benchmark.tasks or not benchmark.folders:
        return set(benchmark.tasks)
    index = task_manager(benchmark.folders).task_index
    tasks, left, seen = set(), [benchmark.name], set()
    while left:
        name = left.pop()
        if name in seen:  # lm-eval has groups that hold themselves
            continue
        seen.add(name)
        entry = index.get(name)
        if entry is None or entry.kind.name in ("TASK", "PY_TASK"):
            tasks.add(name)
            continue
        below = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
        left += [each if isinstance(each, str) else each.get("task", "") for each in below or []]
        left += [each for each, other in index.items() if name in other.tags]
    return tasks
