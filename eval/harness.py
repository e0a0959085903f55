"""lm-evaluation-harness as this program uses it: tasks loaded the same way every time, prompts measured before any is
answered, answers taken down item by item."""

import io
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import wraps
from importlib.util import find_spec
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.base.files import sha256

from .mirror import is_local, sets_of, told_of
from .options import Prompting
from .scoring import ScoringError, check_answers
from .suites import DEFINED, Benchmark, embedded_rows, task_manager

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""lm-eval's own defaults. Every task starts from them, whatever ran before; GPQA shuffles its choices by the first."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of one task, measured in tokens.

    Args:
        tokens: of every answer that will be scored, by item and choice (none where text is generated).
        longest: prompt and answer, or prompt and room for the answer.
        overlong: how many prompts do not fit into the model's context.
        impossible: why no prompt could be short enough; None where it is not so.
    """

    tokens: dict[tuple[int, int], int]
    longest: int
    overlong: int
    impossible: str | None


@contextmanager
def data_from(mirror: Path | None, cache: Path) -> Iterator[None]:
    """Have lm-eval read its data sets from folders of `mirror`, and from nowhere else; from the Hub if that is None.

    Args:
        mirror: folder with the data sets.
        cache: a new folder for what `datasets` prepares, so that nothing of an earlier run is found there.

    Raises:
        UserError: (where a set is loaded) the mirror lacks it.
    """
    import datasets
    from huggingface_hub import constants
    from lm_eval.api.task import ConfigurableTask

    load, enabled = datasets.load_dataset, datasets.is_caching_enabled()
    offline = (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)

    def prepared(path: str, name: str | None = None, **options: Any) -> Any:
        if is_local(path):
            return load(path, name, cache_dir=str(cache), **options)
        if mirror is None and Path(path).exists():
            raise UserError(f"{Path(path).absolute()} would be read for the Hub's data set {path}; run this elsewhere")
        folder = path if mirror is None else str(mirror / path)
        if mirror is not None and not Path(folder).is_dir():
            raise UserError(f"mirror: {folder} is missing (python -m eval mirror fetch --mirror {mirror})")
        return load(folder, name, cache_dir=str(cache), **options)

    def download(task: Any, *arguments: Any, **options: Any) -> None:
        _seed()
        fetch(task, *arguments, **options)
        if callable(task.config.process_docs):  # asked for again and again, and GPQA's draws
            task.config.process_docs = _afresh(task.config.process_docs)

    fetch = ConfigurableTask.download
    ConfigurableTask.download = download
    datasets.load_dataset = prepared
    datasets.enable_caching()
    if mirror is not None:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        ConfigurableTask.download = fetch
        datasets.load_dataset = load
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = offline
        if not enabled:
            datasets.disable_caching()


@contextmanager
def quiet(always: bool = False) -> Iterator[None]:
    """Keep the harness's own words off the terminal; its progress bars are let through to a person who watches."""
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        if always or not sys.stderr.isatty():
            stack.enter_context(redirect_stderr(io.StringIO()))
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


def _afresh(do: Callable[..., Any], task: Any = None) -> Callable[..., Any]:
    """`do`, started every time from the same state of all that draws, `task`'s choice of examples included."""

    @wraps(do)
    def seeded(*arguments: Any, **options: Any) -> Any:
        _seed()
        if task is not None:
            task.set_fewshot_seed(seed=SEEDS["fewshot"])
        return do(*arguments, **options)

    return seeded


class _TaskByTask:
    """A model that writes the answers to each task from the same state: sampled ones do not depend on other tasks."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        write = _afresh(self._lm.generate_until)
        parts = groupby(requests, key=lambda request: request.task_name)  # which come task after task
        return [answer for _, part in parts for answer in write(list(part))]


PREFERRED = ("acc_norm", "acc", "exact_match", "bits_per_byte")


def load_tasks(benchmark: Benchmark) -> tuple[Benchmark, dict[str, Any]]:
    """The benchmark's tasks as lm-eval has them, with their data.

    Returns:
        The benchmark, complete now if it was only a name, and lm-eval's tasks and groups.

    Raises:
        UserError: the data cannot be had, or the installed harness defines the benchmark differently.
    """
    spec: Any = benchmark.config or benchmark.name
    manager = task_manager(benchmark.folders)
    _seed()
    with quiet():
        try:
            loaded = manager.load([spec])
        except UserError:
            raise
        except Exception as error:  # whatever data sets, the network and task files may raise
            cause = told_of(error, *sorted(each.repository for each in sets_of([benchmark])))
            raise UserError(f"{benchmark.name}: its data cannot be loaded: {cause}") from error
    if not benchmark.tasks:
        benchmark = _complete(benchmark, loaded["tasks"])
    tasks = loaded["tasks"]
    if set(tasks) != set(benchmark.tasks):
        odd = sorted(set(tasks) ^ set(benchmark.tasks))
        raise UserError(f"{benchmark.name}: lm-eval's tasks differ from this suite's: {', '.join(odd[:3])}")
    for name, task in tasks.items():
        shots = task.get_config("num_fewshot")
        if benchmark.set_shots:
            if benchmark.rolling and benchmark.shots:
                raise UserError(
                    f"num_fewshot: got {benchmark.shots}, {name} scores whole documents and has no examples"
                )
            if benchmark.shots and benchmark.shots >= (there := len(list(task.fewshot_docs()))):
                raise UserError(f"num_fewshot: got {benchmark.shots}, {name} has {there} examples to draw from")
            task.set_config(key="num_fewshot", value=benchmark.shots)
        elif (shots or 0) != benchmark.shots:
            raise UserError(f"{name}: lm-eval gives {shots} examples, this suite asks for {benchmark.shots}")
        elif shots is None:
            task.set_config(key="num_fewshot", value=0)
        for step in ("build_all_requests", "apply_filters"):  # the second comes before its scores
            setattr(task, step, _afresh(getattr(task, step), task))
        metrics = set(task._metric_fn_list) | {"ifeval"} & {benchmark.metric}
        if benchmark.metric not in metrics:
            raise UserError(f"{name}: lm-eval has no {benchmark.metric} for it, only {', '.join(sorted(metrics))}")
        choices = task.config.doc_to_choice
        fixed = isinstance(benchmark.bounds, Mapping) and isinstance(choices, list)
        if fixed and len(choices) != round(1 / benchmark.bounds[name]):
            raise UserError(f"{name}: lm-eval has {len(choices)} choices, its chance level says otherwise")
    return benchmark, loaded


def _complete(benchmark: Benchmark, tasks: dict[str, Any]) -> Benchmark:
    """The benchmark that a bare name of lm-eval's stands for, as its task files have it."""
    first = next(iter(tasks.values()))
    known = set.intersection(*(set(task._metric_fn_list) for task in tasks.values()))
    metric = next((name for name in PREFERRED if name in known), None)
    if metric is None:
        raise UserError(f"suite: {benchmark.name} has none of the metrics {', '.join(PREFERRED)}")
    filters = [each.name for each in first._filters]
    shots = {task.get_config("num_fewshot") or 0 for task in tasks.values()}
    if benchmark.set_shots:
        shots = {benchmark.shots}
    if len(shots) > 1:
        raise UserError(f"suite: the tasks of {benchmark.name} have different numbers of examples; name them singly")
    return replace(benchmark, tasks=tuple(tasks), metric=metric, filter=filters[0], shots=shots.pop())


@contextmanager
def of_its_files(benchmark: Benchmark, what: str) -> Iterator[None]:
    """Turn what the files of a task raise that no suite has, and that a user may have written, into a `UserError`."""
    kinds = () if benchmark.name in DEFINED else (Exception,)
    try:
        yield
    except (UserError, ScoringError):
        raise
    except kinds as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{benchmark.name}: {what}: {type(error).__name__}: {line}") from error


@contextmanager
def bos_for(lm: Any, benchmark: Benchmark) -> Iterator[None]:
    """Without BOS while a rolling text is encoded: the harness puts one before it, a second would be scored."""
    before = lm.add_bos_token
    lm.add_bos_token = False if benchmark.rolling else before
    try:
        yield
    finally:
        lm.add_bos_token = before


def measure(lm: Any, benchmark: Benchmark, tasks: dict[str, Any], prompting: Prompting) -> dict[str, Prompts]:
    """The prompts of each task in tokens, exactly as the harness will hand them to the model."""
    measured = {}
    with bos_for(lm, benchmark), quiet(), of_its_files(benchmark, "its prompts cannot be made"):
        for name, task in tasks.items():
            task.build_all_requests(rank=0, world_size=1, **_manner(lm, prompting))
            measured[name] = _measure(lm, task.instances, prompting)
            task._instances = None  # a few thousand prompts with many examples fill the memory
    return measured


def _manner(lm: Any, prompting: Prompting) -> dict[str, Any]:
    """How to prompt, for lm-eval's `build_all_requests`."""
    template = {"chat_template": lm.apply_chat_template, "tokenizer_name": lm.tokenizer_name}
    return {
        "limit": prompting.limit,
        "apply_chat_template": prompting.chat_template,
        "fewshot_as_multiturn": prompting.multiturn,
        **(template if prompting.chat_template else {}),
    }


def _measure(lm: Any, instances: list[Any], prompting: Prompting) -> Prompts:
    def encode(text: str, **how: Any) -> list[int]:
        ids: list[int] = lm.tok_encode(text, **how)
        if ids and max(ids) >= lm.model.config.vocab_size:
            token = lm.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"{instances[0].task_name}: a prompt has the token {token!r} with id {max(ids)}, "
                f"the model's vocab_size is {lm.model.config.vocab_size}"
            )
        return ids

    tokens: dict[tuple[int, int], int] = {}
    totals, room = [], 0
    last: tuple[str | None, int] = (None, 0)
    for instance in instances:
        if instance.request_type == "generate_until":
            context, options = instance.args
            room = max(room, (options | (prompting.generation or {})).get("max_gen_toks", lm.max_gen_toks))
            totals.append(len(encode(context)))
        elif instance.request_type == "loglikelihood_rolling":
            tokens[instance.doc_id, 0] = len(encode(*instance.args))
        else:
            context, answer = instance.args
            if not context:  # the harness puts one token before it
                whole, before = len(encode(answer, add_special_tokens=False)) + 1, 1
            else:
                if context.rstrip() != last[0]:
                    last = context.rstrip(), len(encode(context.rstrip()))
                whole, before = len(encode(context + answer)), last[1]
            tokens[instance.doc_id, instance.idx] = whole - before
            totals.append(whole - 1)  # the last token is only predicted, never read
    impossible = None
    if room and room >= lm.max_length:
        impossible = f"it generates up to {room} tokens, the model's context is {lm.max_length}"
    elif totals and not room and max(tokens.values()) > lm.max_length:
        impossible = f"its longest answer has {max(tokens.values())} tokens, the model's context is {lm.max_length}"
    overlong = sum(total > lm.max_length - room for total in totals)
    return Prompts(tokens, max(totals, default=0) + room, overlong, impossible)


def answer(
    lm: Any,
    benchmark: Benchmark,
    loaded: dict[str, Any],
    prompts: dict[str, Prompts],
    prompting: Prompting,
    kept: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Put a benchmark through the harness; the content of its result file.

    Args:
        lm: the model.
        benchmark: what is run.
        loaded: from `load_tasks`.
        prompts: from `measure`.
        prompting: as it was measured.
        kept: puts a cache around the model.

    Raises:
        ScoringError: the answers are not finite, or the same for every token.
    """
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        if prompting.generation and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=prompting.generation, update=True)
    # The harness draws a bar for every batch of a novel.
    with kept(lm) as model, bos_for(lm, benchmark), quiet(always=benchmark.rolling):
        results = evaluate(
            _TaskByTask(model),
            loaded,
            limit=prompting.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=prompting.chat_template,
            fewshot_as_multiturn=prompting.multiturn,
        )
    tasks = {}
    for name, task in loaded["tasks"].items():
        samples = results["samples"][name]
        tasks[name] = {
            "version": task.VERSION,
            "shots": task.get_config("num_fewshot"),
            "hash": _task_hash(samples),
            "size": len(task.eval_docs),
            "overlong": prompts[name].overlong,
            "items": _items(benchmark, name, task, samples, prompts[name].tokens),
        }
        if task.OUTPUT_TYPE == "generate_until":
            tasks[name]["generation"] = task.config.generation_kwargs
    # Over the benchmark: in a task of two items, answers of one probability may be chance.
    scored = [item for task in tasks.values() for item in task["items"] if "choices" in item]
    if scored:
        values, tokens = (list(chain(*(item[field] for item in scored))) for field in ("choices", "tokens"))
        check_answers(benchmark.name, values, tokens, -math.log(lm.model.config.vocab_size))
    theirs = {
        name: {key: float(value) for key, value in metrics.items() if "," in key and not isinstance(value, str)}
        for name, metrics in results["results"].items()
    }
    finite = {name: {key: each for key, each in m.items() if math.isfinite(each)} for name, m in theirs.items()}
    return {"benchmark": benchmark.name, "metric": benchmark.key, "tasks": tasks, "harness": finite}


def _task_hash(samples: list[dict[str, Any]]) -> str:
    """Over documents, prompts and targets, as lm-eval's own result files have it under `task_hashes`."""
    from lm_eval.utils import hash_string

    return hash_string("".join(each["doc_hash"] + each["prompt_hash"] + each["target_hash"] for each in samples))


def _items(
    benchmark: Benchmark, name: str, task: Any, samples: list[dict[str, Any]], tokens: dict[tuple[int, int], int]
) -> list[dict[str, Any]]:
    """The samples of one task, one entry an item: the metrics of all filters, and the answers they are made from."""
    items: dict[int, dict[str, Any]] = {}
    clusters = [row.get("cluster") for row in embedded_rows(name)] if benchmark.config else []
    for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
        number, document = int(sample["doc_id"]), sample["doc"]
        item = items.setdefault(number, {"doc_id": number, "doc_hash": sample["doc_hash"], "metrics": {}})
        for metric in sample["metrics"]:
            value = item["metrics"][f"{metric},{sample['filter']}"] = _plain(sample[metric])
            if isinstance(value, float) and not math.isfinite(value) and name != "truthfulqa_mc2":
                raise ScoringError(f"{name}: item {number} has a {metric} of {value}, scores must be finite")
        if clusters and clusters[number] is not None:
            item["cluster"] = clusters[number]
        elif name.startswith("leaderboard_gpqa"):  # each set holds the next smaller one
            item["cluster"] = sha256([document["Question"]])[:16]
        kind = task.OUTPUT_TYPE
        if kind == "generate_until":
            item["answer"] = sample["resps"][0][0]
        elif kind == "loglikelihood_rolling":
            item["choices"], item["tokens"] = [float(sample["filtered_resps"][0])], [tokens[number, 0]]
            # Of the text as it was published, which a task may score cleaned.
            item["bytes"] = int(sample["bits_per_byte"][1])
        elif kind == "multiple_choice":
            choices = task.doc_to_choice(document)
            item["choices"] = [float(value) for value, _ in sample["filtered_resps"]][: len(choices)]
            item["tokens"] = [tokens[number, i] for i in range(len(choices))]
            item["lengths"] = [len(choice) for choice in choices]
            item["chance"] = 1 / len(choices)
            if name == "truthfulqa_mc2":  # several right answers, scored by their share of probability
                labels = document["mc2_targets"]["labels"]
                item["chance"] = math.fsum(labels) / len(choices)
                item["metrics"]["acc,none"] = _share(item["choices"], labels)
            if not callable(task.config.process_results):  # the best choice decides, and it may be tied
                item["gold"] = sample["target"]
    return list(items.values())


def _share(loglikelihoods: list[float], labels: list[int]) -> float:
    """Probability of the right answers among all; the harness's own exponentials are 0/0 where all are unlikely."""
    best = max(loglikelihoods)
    weights = [math.exp(value - best) for value in loglikelihoods]
    return math.fsum(w for w, label in zip(weights, labels, strict=True) if label) / math.fsum(weights)


def _plain(value: Any) -> Any:
    """A metric of one item as JSON holds it: a number, or a list of numbers."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return bool(value) if isinstance(value, bool) else float(value)
