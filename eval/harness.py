"""lm-evaluation-harness as this program uses it: data from one place, and tasks loaded in the same way every time."""

import io
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hf_ibnorm.base.errors import UserError

from .mirror import cause_of, is_local, sets_of
from .scoring import ScoringError
from .suites import DEFINED, Benchmark, task_manager

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""lm-eval's own defaults. Every task starts from them, whatever ran before; GPQA shuffles its choices by the first."""


@contextmanager
def data_from(mirror: Path | None, cache: Path) -> Iterator[None]:
    """Have lm-eval read its data sets from folders of `mirror` alone, or from the Hub where no mirror is given.

    Loading a set that the mirror lacks is a UserError. `cache` is a new folder for the files of `datasets`, so that it
    finds none of an earlier run.
    """
    import datasets
    from huggingface_hub import constants
    from lm_eval.api.task import ConfigurableTask

    load, fetch = datasets.load_dataset, ConfigurableTask.download

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        if not is_local(path):
            if mirror is not None:
                path = str(mirror / path)
                if not Path(path).is_dir():
                    raise UserError(f"mirror: {path} is missing (python -m eval mirror fetch --mirror {mirror})")
            elif Path(path).exists():
                place = f"{Path(path).absolute()} would be read for the Hub's data set {path}"
                raise UserError(f"{place}; run this elsewhere")
        return load(path, name, cache_dir=str(cache), **options)

    def download(task: Any, *arguments: Any, **options: Any) -> None:
        _seed()
        fetch(task, *arguments, **options)
        if callable(task.config.process_docs):  # called for every access to the documents; GPQA's draws at random
            task.config.process_docs = seeded(task.config.process_docs)

    with (
        patch.object(datasets, "load_dataset", load_dataset),
        patch.object(ConfigurableTask, "download", download),
        patch.object(datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE or mirror is not None),
        patch.object(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE or mirror is not None),
        patch.object(datasets.fingerprint, "_CACHING_ENABLED", True),
    ):
        yield


@contextmanager
def quiet(always: bool = False) -> Iterator[None]:
    """Keep the harness's own words off the terminal, and its progress bars, too, where nobody watches or `always`."""
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    watched = sys.stderr.isatty() and not always
    with redirect_stdout(io.StringIO()), nullcontext() if watched else redirect_stderr(io.StringIO()):
        yield


def _seed() -> None:
    import numpy as np
    import torch

    random.seed(SEEDS["random"])
    if find_spec("langdetect"):  # IFEval asks it for the language of an answer, which it finds by drawing
        from langdetect import DetectorFactory

        DetectorFactory.seed = SEEDS["random"]
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])


def seeded(function: Callable[..., Any], task: Any = None) -> Callable[..., Any]:
    """`function`, every call of which starts from the same seeds, that of `task`'s choice of examples included."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        _seed()
        if task is not None:
            task.set_fewshot_seed(seed=SEEDS["fewshot"])
        return function(*arguments, **options)

    return call


PREFERRED = ("acc_norm", "acc", "exact_match", "bits_per_byte")


def load_tasks(benchmark: Benchmark) -> tuple[Benchmark, dict[str, Any]]:
    """The benchmark, complete now if it was only a name, and its tasks and groups as lm-eval has them, with their data;
    UserError where the data cannot be had, or the installed harness defines the benchmark differently."""
    manager = task_manager(benchmark.folders)
    _seed()
    with quiet():
        try:
            loaded = manager.load([benchmark.config or benchmark.name])
        except UserError:
            raise
        except Exception as error:  # whatever data sets, the network and task files may raise
            cause = cause_of(error, *sorted(each.repository for each in sets_of([benchmark])))
            raise UserError(f"{benchmark.name}: its data cannot be loaded: {cause}") from error
    tasks = loaded["tasks"]
    if not benchmark.tasks:
        benchmark = _complete(benchmark, tasks)
    if odd := sorted(set(tasks) ^ set(benchmark.tasks)):
        raise UserError(f"{benchmark.name}: lm-eval's tasks differ from this suite's: {', '.join(odd[:3])}")
    for name, task in tasks.items():
        _set_shots(benchmark, name, task)
        for step in ("build_all_requests", "apply_filters"):  # filters run just before a task is scored
            setattr(task, step, seeded(getattr(task, step), task))
        if benchmark.metric not in ("ifeval", *task._metric_fn_list):
            known = ", ".join(sorted(task._metric_fn_list))
            raise UserError(f"{name}: lm-eval has no {benchmark.metric} for it, only {known}")
        choices, bounds = task.config.doc_to_choice, benchmark.bounds
        if isinstance(bounds, Mapping) and isinstance(choices, list) and len(choices) != round(1 / bounds[name]):
            raise UserError(f"{name}: lm-eval has {len(choices)} choices, its chance level says otherwise")
    return benchmark, loaded


def _set_shots(benchmark: Benchmark, name: str, task: Any) -> None:
    """Give a task the number of examples in its prompts; UserError where it cannot have them, or has others."""
    shots = task.get_config("num_fewshot")
    if not benchmark.set_shots:
        if (shots or 0) != benchmark.shots:
            raise UserError(f"{name}: lm-eval gives {shots} examples, this suite asks for {benchmark.shots}")
    elif benchmark.rolling and benchmark.shots:
        raise UserError(f"num_fewshot: got {benchmark.shots}, {name} scores whole documents and has no examples")
    elif benchmark.shots and benchmark.shots >= (count := len(list(task.fewshot_docs()))):
        raise UserError(f"num_fewshot: got {benchmark.shots}, {name} has {count} examples to draw from")
    task.set_config(key="num_fewshot", value=benchmark.shots)


def _complete(benchmark: Benchmark, tasks: dict[str, Any]) -> Benchmark:
    """The benchmark that a bare name of lm-eval's stands for, as its task files have it."""
    known = set.intersection(*(set(task._metric_fn_list) for task in tasks.values()))
    metric = next((name for name in PREFERRED if name in known), None)
    if metric is None:
        raise UserError(f"suite: {benchmark.name} has none of the metrics {', '.join(PREFERRED)}")
    shots = {benchmark.shots if benchmark.set_shots else task.get_config("num_fewshot") or 0 for task in tasks.values()}
    if len(shots) > 1:
        raise UserError(f"suite: the tasks of {benchmark.name} have different numbers of examples; name them singly")
    first_filter = next(iter(tasks.values()))._filters[0].name
    return replace(benchmark, tasks=tuple(tasks), metric=metric, filter=first_filter, shots=shots.pop())


@contextmanager
def task_errors(benchmark: Benchmark, problem: str) -> Iterator[None]:
    """Turn errors of a task's files, which a user may have written, into a `UserError`; not those of a suite."""
    try:
        yield
    except Exception as error:
        if benchmark.name in DEFINED or isinstance(error, UserError | ScoringError):
            raise
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{benchmark.name}: {problem}: {type(error).__name__}: {line}") from error
