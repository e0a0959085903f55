"""A model's prompts, counted in tokens before any is answered, and its answers, item by item."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from typing import Any
from unittest.mock import patch

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.base.files import sha256

from .harness import quiet, seeded, task_errors
from .options import Prompting
from .scoring import ScoringError, check_answers
from .suites import Benchmark, embedded_rows


@dataclass(frozen=True)
class Prompts:
    """The prompts of one task, counted in tokens."""

    tokens: dict[tuple[int, int], int]  # (item, choice) → tokens of the answer to score; empty where text is generated
    longest: int  # prompt and answer, or prompt and room for the answer
    overlong: int  # how many prompts do not fit into the model's context
    impossible: str | None  # why no prompt could be short enough; None where one could


def _task_by_task(write: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """`generate_until` of a model, started for each task from the same state: sampled answers do not depend on other
    tasks."""

    def generate_until(requests: list[Any], **options: Any) -> list[Any]:
        parts = groupby(requests, key=lambda request: request.task_name)  # requests come task after task
        return [answer for _, part in parts for answer in seeded(write)(list(part), **options)]

    return generate_until


def _bos_for(lm: Any, benchmark: Benchmark) -> AbstractContextManager[Any]:
    """No BOS while a rolling text is encoded: the harness puts one before the text, and would score a second one."""
    return patch.object(lm, "add_bos_token", False if benchmark.rolling else lm.add_bos_token)


def prompts_of(lm: Any, benchmark: Benchmark, tasks: dict[str, Any], prompting: Prompting) -> dict[str, Prompts]:
    """The prompts of each task in tokens, exactly as the harness will hand them to the model."""
    prompts = {}
    with _bos_for(lm, benchmark), quiet(), task_errors(benchmark, "its prompts cannot be made"):
        for name, task in tasks.items():
            template = lm.apply_chat_template if prompting.chat_template else None
            task.build_all_requests(chat_template=template, **prompting.for_harness())
            prompts[name] = count_tokens(lm, task.instances, prompting)
            task._instances = None  # a few thousand prompts with many examples fill the memory
    return prompts


def count_tokens(lm: Any, instances: list[Any], prompting: Prompting) -> Prompts:
    """The prompts of one task in tokens, from lm-eval's requests; UserError for a token that the model has not."""
    vocabulary = lm.model.config.vocab_size

    @lru_cache(maxsize=2)  # a context is encoded once for all of its choices
    def length(text: str, **options: Any) -> int:
        ids: list[int] = lm.tok_encode(text, **options)
        if ids and max(ids) >= vocabulary:
            token = f"{lm.tokenizer.convert_ids_to_tokens(max(ids))!r} with id {max(ids)}"
            name = instances[0].task_name
            raise UserError(f"{name}: a prompt has the token {token}, the model's vocab_size is {vocabulary}")
        return len(ids)

    tokens: dict[tuple[int, int], int] = {}
    totals, room = [], 0
    for instance in instances:
        if instance.request_type == "generate_until":
            context, options = instance.args
            room = max(room, (options | (prompting.generation or {})).get("max_gen_toks", lm.max_gen_toks))
            totals.append(length(context))
        elif instance.request_type == "loglikelihood_rolling":
            tokens[instance.doc_id, 0] = length(*instance.args)
        else:
            context, continuation = instance.args
            if context:
                whole, before = length(context + continuation), length(context.rstrip())
            else:  # the harness puts one token before the answer
                whole, before = length(continuation, add_special_tokens=False) + 1, 1
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
        benchmark: to answer; its tasks are `loaded` by `load_tasks`, their prompts counted by `prompts_of`.
        prompting: with which the prompts were counted.
        kept: puts a cache around the model.

    Raises:
        ScoringError: the answers are not finite, or the same for every token.
    """
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        if prompting.generation and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=prompting.generation, update=True)
    with (
        patch.object(lm, "generate_until", _task_by_task(lm.generate_until)),
        _bos_for(lm, benchmark),
        kept(lm) as model,
        quiet(always=benchmark.rolling),  # the harness draws a bar for every batch of a novel
    ):
        results = evaluate(model, loaded, bootstrap_iters=0, **prompting.for_harness())
    tasks = {
        name: _task_result(benchmark, name, task, results["samples"][name], prompts[name])
        for name, task in loaded["tasks"].items()
    }
    # All tasks together: in a task of two items, equal log-likelihoods may be chance.
    scored = [item for task in tasks.values() for item in task["items"] if "choices" in item]
    if scored:
        values, tokens = (list(chain(*(item[field] for item in scored))) for field in ("choices", "tokens"))
        check_answers(benchmark.name, values, tokens, -math.log(lm.model.config.vocab_size))
    harness = {
        name: {
            key: float(value)
            for key, value in metrics.items()
            if "," in key and not isinstance(value, str) and math.isfinite(value)
        }
        for name, metrics in results["results"].items()
    }
    return {"benchmark": benchmark.name, "metric": benchmark.key, "tasks": tasks, "harness": harness}


def _task_result(
    benchmark: Benchmark, name: str, task: Any, samples: list[dict[str, Any]], prompts: Prompts
) -> dict[str, Any]:
    """One task of a result file, the answers and the metrics of all filters item by item."""
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
        item |= _reply(task, sample, prompts.tokens)
        if name == "truthfulqa_mc2":  # several right answers, scored by their share of probability
            labels = document["mc2_targets"]["labels"]
            item["chance"] = math.fsum(labels) / len(item["choices"])
            item["metrics"]["acc,none"] = _share(item["choices"], labels)
    generation = {"generation": task.config.generation_kwargs} if task.OUTPUT_TYPE == "generate_until" else {}
    return {
        "version": task.VERSION,
        "shots": task.get_config("num_fewshot"),
        "hash": task_hash(samples),
        "size": len(task.eval_docs),
        "overlong": prompts.overlong,
        "items": list(items.values()),
        **generation,
    }


def task_hash(samples: list[dict[str, Any]]) -> str:
    """Hash of documents, prompts and targets, as lm-eval's own result files have it under `task_hashes`."""
    from lm_eval.utils import hash_string

    return hash_string("".join(each["doc_hash"] + each["prompt_hash"] + each["target_hash"] for each in samples))


def _reply(task: Any, sample: dict[str, Any], tokens: dict[tuple[int, int], int]) -> dict[str, Any]:
    """The model's answer to one item: its text, or the log-likelihoods of the choices."""
    number = int(sample["doc_id"])
    match task.OUTPUT_TYPE:
        case "generate_until":
            return {"answer": sample["resps"][0][0]}
        case "loglikelihood_rolling":
            # The bytes of the published text: a task may score a cleaned one.
            size = int(sample["bits_per_byte"][1])
            return {"choices": [float(sample["filtered_resps"][0])], "tokens": [tokens[number, 0]], "bytes": size}
        case "multiple_choice":
            choices = task.doc_to_choice(sample["doc"])
            values = [float(value) for value, _ in sample["filtered_resps"]][: len(choices)]
            lengths = [len(choice) for choice in choices]
            reply = {"choices": values, "tokens": [tokens[number, i] for i in range(len(choices))], "lengths": lengths}
            # A task with a scoring of its own does not go by the best choice, so that ties do not matter.
            gold = {} if callable(task.config.process_results) else {"gold": sample["target"]}
            return {**reply, "chance": 1 / len(choices), **gold}
    return {}


def _share(loglikelihoods: list[float], labels: list[int]) -> float:
    """Probability of the right answers among all; the harness's own exponentials are 0/0 where all are unlikely."""
    best = max(loglikelihoods)
    weights = [math.exp(value - best) for value in loglikelihoods]
    return math.fsum(w for w, label in zip(weights, labels, strict=True) if label) / math.fsum(weights)


def _plain(value: Any) -> Any:
    """A metric of one item as JSON holds it: a number, true or false, or a list of these."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool) else float(value)
