"""From the answers of a run to its scores: pure functions, and the checks that keep a broken model from looking able.

lm-eval takes the first best choice: a model whose scores are all NaN, or all equal, would get every item right whose
answer is listed first. Here such a model is an error, and an item whose best choice is tied counts as wrong.
"""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .statistics import LEVEL, p_of_guessing, p_of_no_difference, summed
from .suites import AVERAGED, SUITES, Benchmark


class ScoringError(ValueError):
    """The answers cannot be scored; the message names the task."""


DAMAGE = (ScoringError, KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)
"""What scoring raises where a result file is not as it was written."""


def check_items(tasks: Mapping[str, Any], limit: int | None = None) -> None:
    """Raise unless every task of a result file has each of its items once, and all of those that were asked for.

    Args:
        tasks: of the result file.
        limit: of the run; None: all items.

    Raises:
        ScoringError: an item is there twice, or missing.
    """
    for name, task in tasks.items():
        numbers = [item["doc_id"] for item in task["items"]]
        if twice := [number for number, count in Counter(numbers).items() if count > 1]:
            raise ScoringError(f"{name}: item {twice[0]} is there {numbers.count(twice[0])} times")
        size = task.get("size", len(numbers))
        wanted = size if limit is None else min(limit, size)
        if missing := sorted(set(range(max(wanted, len(numbers)))) - set(numbers)):
            raise ScoringError(f"{name}: item {missing[0]} is missing, {len(missing)} of {wanted} in all")
        if len(numbers) > wanted:
            raise ScoringError(f"{name}: it has {len(numbers)} items, {wanted} were asked for")


def _number(task: str, item: Mapping[str, Any], what: str, value: Any, low: float, high: float) -> float:
    """A number of an item as it must be; ScoringError where it is none, not finite or out of its range."""
    if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        allowed = f"must be a number from {low:g} to {high:g}"
        raise ScoringError(f"{task}: item {item['doc_id']} has a {what} of {value!r}, {allowed}")
    return float(value)


def check_answers(task: str, loglikelihoods: Sequence[float], tokens: Sequence[int], uniform: float) -> None:
    """Raise unless the answers come from a model that tells tokens apart.

    Args:
        task: named in the error.
        loglikelihoods: summed over the tokens of each answer, in nats.
        tokens: number of tokens of each answer.
        uniform: log-likelihood of a token under the uniform distribution, -log(vocabulary).

    Raises:
        ScoringError: a score is not finite, or every token got the same score.
    """
    for value in loglikelihoods:
        if not math.isfinite(value):
            raise ScoringError(f"{task}: the model gives a log-likelihood of {value}, scores must be finite")
    each = [value / count for value, count in zip(loglikelihoods, tokens, strict=True) if count]
    # One long text has a single mean: a constant model shows itself where that is the uniform distribution's.
    reference = each[0] if len(each) > 1 else uniform
    if all(math.isclose(value, reference, rel_tol=1e-5) for value in each):
        same = f"the same score ({reference:.4f})"
        raise ScoringError(f"{task}: the model gives every token {same}, it tells nothing apart")


def normalized(value: float, bound: float) -> float:
    """`value` between guessing and perfect on a scale of 0 to 100: max(0, value - bound) / (1 - bound) * 100."""
    return 100 * max(0.0, value - bound) / (1 - bound)


@dataclass(frozen=True)
class Stratum:
    """One task of a benchmark: the benchmark's score is the sum of weight x mean(values) over its strata.

    Args:
        task: lm-eval's name.
        values: one number for each item; their mean is the score.
        spread: the same, but where the score is a ratio of sums linearized, so that their spread is the ratio's.
        items: what identifies each item, to pair it with the same item of another run.
        clusters: items of one cluster share their sentence and are not independent.
        weight: of this task in the benchmark.
        bound: its score by guessing; None where nothing can be guessed.
        ties: items whose best choice was tied; they count as wrong.
        guesses: the score of each item by guessing; empty where nothing can be guessed.
    """

    task: str
    values: list[float]
    spread: list[float]
    items: list[str]
    clusters: list[str]
    weight: float
    bound: float | None
    ties: int
    guesses: list[float] = field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / self.n

    @property
    def stderr(self) -> float | None:
        """Robust to clusters (with one item in each the usual sample standard error); None for a single cluster."""
        mean, residuals = self.mean, defaultdict[str, float](float)
        for cluster, value in zip(self.clusters, self.spread, strict=True):
            residuals[cluster] += value - mean
        m = len(residuals)
        if m < 2:
            return None
        return math.sqrt(math.fsum(value**2 for value in residuals.values()) / self.n**2 * m / (m - 1))


def strata(benchmark: Benchmark, result: dict[str, Any]) -> list[Stratum]:
    """A stratum for each task of a result file; ScoringError where the file has other tasks than the benchmark, or no
    items."""
    tasks = result["tasks"]
    if set(tasks) != set(benchmark.tasks):
        missing = sorted(set(benchmark.tasks) - set(tasks))
        extra = sorted(set(tasks) - set(benchmark.tasks))
        what = f"{len(missing)} of its tasks missing: {', '.join(missing[:3])}" if missing else f"unknown: {extra[0]}"
        raise ScoringError(f"{benchmark.name}: {what}")
    check_items(tasks, max(len(task["items"]) for task in tasks.values()))  # the run's limit is not known here
    size = sum(len(task["items"]) for task in tasks.values())
    return [_stratum(benchmark, task, tasks[task]["items"], size) for task in benchmark.tasks]


def _stratum(benchmark: Benchmark, task: str, items: list[dict[str, Any]], size: int) -> Stratum:
    """One task of a benchmark that has `size` items in all."""
    if not items:
        raise ScoringError(f"{task}: no items were answered")
    values, spread, ties = _values(task, benchmark, items)
    bound = benchmark.bounds[task] if isinstance(benchmark.bounds, Mapping) else benchmark.bounds
    guesses = [] if bound is None else [bound] * len(items)
    if bound is None and "chance" in items[0]:
        guesses = [_number(task, item, "chance", item["chance"], 0, 1) for item in items]
        bound = math.fsum(guesses) / len(items)
    return Stratum(
        task,
        values,
        spread,
        items=[f"{item['doc_id']} {item['doc_hash']}" for item in items],
        clusters=[item.get("cluster", f"{task} {item['doc_id']}") for item in items],
        weight=1 / len(benchmark.tasks) if benchmark.mean == "task" else len(items) / size,
        bound=bound,
        ties=ties,
        guesses=guesses,
    )


def independent(parts: Sequence[Stratum]) -> list[Stratum]:
    """The strata, or all of them as one where they share clusters: GPQA's sets hold each other.

    Strata whose items do not all weigh the same are returned as they are.
    """
    seen: Counter[str] = Counter(cluster for part in parts for cluster in set(part.clusters))
    size = sum(part.n for part in parts)
    alike = all(math.isclose(part.weight, part.n / size) for part in parts)
    if not alike or max(seen.values()) < 2:
        return list(parts)
    lists = ("values", "spread", "items", "clusters", "guesses")
    together: dict[str, Any] = {name: [each for part in parts for each in getattr(part, name)] for name in lists}
    return [Stratum(task=parts[0].task, weight=1.0, bound=None, ties=sum(part.ties for part in parts), **together)]


def p_of_chance(parts: Sequence[Stratum]) -> float:
    """p of the hypothesis that a score comes from guessing (two-sided).

    Of answers that are right or wrong by `p_of_guessing`, a guess for each item, or where items share a sentence one
    for all of them: as if they came out alike. Where items share a sentence and are guessed half of the time, or are
    not just right or wrong, by flips of the signs of what each cluster has beyond its chance.

    Args:
        parts: strata with `guesses`.
    """
    apart, generator = independent(parts), np.random.default_rng(0)
    items = [item for part in apart for item in zip(part.values, part.guesses, strict=True)]
    if any(value > 0 and guess == 0 for value, guess in items):
        return 0.0
    alone = all(len(set(part.clusters)) == part.n for part in apart)
    even = all(guess == 0.5 for _, guess in items)
    if (alone or not even) and all(value in (0.0, 1.0) for value, _ in items):
        return p_of_guessing(_right(apart), generator)
    beyond = [summed(np.subtract(part.values, part.guesses), part.clusters, part.weight) for part in apart]
    return p_of_no_difference(beyond, generator)


def _right(parts: Sequence[Stratum]) -> dict[tuple[float, float], tuple[int, float]]:
    """Counts for `p_of_guessing`; items of one cluster with the same chance count as one item."""
    right: dict[tuple[float, float], tuple[int, float]] = {}
    for part in parts:
        groups: dict[tuple[str, float], list[float]] = {}
        for value, guess, cluster in zip(part.values, part.guesses, part.clusters, strict=True):
            groups.setdefault((cluster, guess), []).append(value)
        for (_, guess), values in groups.items():
            key = len(values) * part.weight / part.n, guess
            count, hits = right.get(key, (0, 0.0))
            right[key] = count + 1, hits + math.fsum(values) / len(values)
    return right


def _values(task: str, benchmark: Benchmark, items: list[dict[str, Any]]) -> tuple[list[float], list[float], int]:
    """The value of each item, its linearized value, and the number of items with a tie."""
    if benchmark.metric == "ifeval":
        keys = ("prompt_level_strict_acc,none", "inst_level_strict_acc,none")
        prompts = [_number(task, item, keys[0], item["metrics"][keys[0]], 0, 1) for item in items]
        followed = [[_number(task, item, keys[1], each, 0, 1) for each in item["metrics"][keys[1]]] for item in items]
        ratios = _ratio([sum(each) for each in followed], [len(each) for each in followed])
        values, spread = ([(a + b) / 2 for a, b in zip(prompts, each, strict=True)] for each in ratios)
        return values, spread, 0
    for item in items:
        for value in item.get("choices", ()):
            _number(task, item, "log-likelihood", value, -sys.float_info.max, sys.float_info.max)
    if benchmark.rolling:
        sizes = [_number(task, item, "number of bytes", item["bytes"], 1, sys.maxsize) for item in items]
        return *_ratio([-item["choices"][0] / math.log(2) for item in items], sizes), 0
    values, ties = [], 0
    for item in items:
        if benchmark.key not in item["metrics"]:
            raise ScoringError(f"{task}: an item has no {benchmark.key}")
        value = _number(task, item, benchmark.metric, item["metrics"][benchmark.key], 0, 1)
        if benchmark.metric in ("acc", "acc_norm") and item.get("gold") is not None:
            scores = item["choices"]
            if benchmark.metric == "acc_norm":
                scores = [score / length for score, length in zip(scores, item["lengths"], strict=True)]
            if scores.count(max(scores)) > 1:
                ties, value = ties + 1, 0.0
        values.append(value)
    return values, values, ties


def _ratio(above: Sequence[float], below: Sequence[float]) -> tuple[list[float], list[float]]:
    """Numbers whose mean is sum(above)/sum(below), and linearized ones whose spread is the ratio's to first order.

    Of two runs over the same items the first are equal where the answers are.
    """
    ratio, mean = math.fsum(above) / math.fsum(below), math.fsum(below) / len(below)
    linear = [ratio + (a - ratio * b) / mean for a, b in zip(above, below, strict=True)]
    return [a / mean for a in above], linear


def score_benchmark(benchmark: Benchmark, result: dict[str, Any]) -> dict[str, Any]:
    """A row of the score table from a result file.

    Returns:
        {"raw", "stderr", "normalized", "chance", "n", "details"}: raw and stderr are fractions (or bits per byte),
        stderr is null where there is none; normalized is 0 at chance and 100 when perfect; details holds the metric,
        whether the score is at chance, tied items, truncated requests, the tasks, and second scores.

    Raises:
        ScoringError: the file's items are not the benchmark's.
    """
    parts = strata(benchmark, result)
    raw, n = math.fsum(part.weight * part.mean for part in parts), sum(part.n for part in parts)
    errors = [(part.weight, part.stderr) for part in independent(parts)]
    stderr = None
    if all(error is not None for _, error in errors):
        # 0 where all items came out the same: such items say nothing about the error, and None is returned.
        stderr = math.sqrt(sum((weight * error) ** 2 for weight, error in errors if error is not None)) or None
    bounds = [(part, part.bound) for part in parts if part.bound is not None]
    chance = level = None
    if len(bounds) == len(parts):
        chance = math.fsum(part.weight * bound for part, bound in bounds)
        level = normalized(raw, chance)
        if isinstance(benchmark.bounds, Mapping):
            level = math.fsum(part.weight * normalized(part.mean, bound) for part, bound in bounds)
    details: dict[str, Any] = {
        "metric": benchmark.metric,
        "at_chance": chance is not None and p_of_chance(parts) >= LEVEL,
        "ties": sum(part.ties for part in parts),
        "clusters": len({cluster for part in parts for cluster in part.clusters}),
        "truncated": sum(task["overlong"] for task in result["tasks"].values()),
    }
    if benchmark.rolling:
        items = result["tasks"][benchmark.name]["items"]
        details |= {"bytes": sum(item["bytes"] for item in items), "tokens": sum(item["tokens"][0] for item in items)}
    if len(parts) > 1:
        details["size_weighted"] = math.fsum(part.mean * part.n for part in parts) / n
    details |= {key: _second(key, result) for key in benchmark.also}
    details["tasks"] = {part.task: _task_row(part, result["tasks"][part.task]) for part in parts}
    return {"raw": raw, "stderr": stderr, "normalized": level, "chance": chance, "n": n, "details": details}


def _task_row(part: Stratum, task: dict[str, Any]) -> dict[str, Any]:
    return {
        "raw": part.mean,
        "stderr": part.stderr or None,
        "normalized": None if part.bound is None else normalized(part.mean, part.bound),
        "chance": part.bound,
        "n": part.n,
        "ties": part.ties,
        "truncated": task["overlong"],
        "hash": task["hash"],
    }


def _second(key: str, result: dict[str, Any]) -> float:
    values = [item["metrics"][key] for task in result["tasks"].values() for item in task["items"]]
    flat = [float(each) for value in values for each in (value if isinstance(value, list) else [value])]
    return math.fsum(flat) / len(flat)


def no_score(benchmark: Benchmark, reason: str) -> dict[str, Any]:
    """The row of a benchmark that has no score, and why."""
    empty = dict.fromkeys(("raw", "stderr", "normalized", "chance", "n"))
    return {**empty, "details": {"metric": benchmark.metric, "at_chance": False, "reason": reason}}


def score_suite(
    suite: str, benchmarks: Sequence[Benchmark], results: Mapping[str, dict[str, Any]], *, model: str, smoke: list[str]
) -> dict[str, Any]:
    """The content of `scores.json` from the result files of a run.

    Args:
        suite: name of the suite.
        benchmarks: its benchmarks, in the order of the table.
        results: content of the result files by benchmark; {"skipped": reason} where one was left out.
        model: what was scored.
        smoke: settings that make this no leaderboard score.

    Returns:
        {"suite", "smoke", "model", "average", "benchmarks", "notes"}. The average (0 to 100) is null, and notes says
        why, unless every benchmark of a leaderboard is whole: version 1 is the mean of the raw scores, version 2 that
        of the normalized ones.

    Raises:
        ScoringError: a result file does not fit its benchmark.
    """
    rows, absent, other, cut = {}, [], [], []
    for benchmark in benchmarks:
        result = results.get(benchmark.name, {"skipped": "not run"})
        if reason := result.get("skipped"):
            rows[benchmark.name] = no_score(benchmark, reason)
            absent.append(f"{benchmark.title}: {reason}")
            continue
        rows[benchmark.name] = row = score_benchmark(benchmark, result)
        if not smoke and benchmark.items not in (None, row["n"]):
            other.append(f"{benchmark.title} has {row['n']} items here, {benchmark.items} on the leaderboard")
        if count := row["details"]["truncated"]:
            cut.append(f"{benchmark.title}: {count} prompts were cut to the model's context{_where_cut(row)}")
    average, notes = None, [*absent, *other]
    if suite in AVERAGED:
        missing = [f"{each.title} is not part of this run" for each in SUITES[suite] if each.name not in rows]
        why = [
            *missing,
            *(["not all columns are there"] if absent else []),
            *smoke,
            *(["other items"] if other else []),
        ]
        if why:
            notes.append(f"no average: {', '.join(why)}")
        else:
            values = [100 * row["raw"] if suite == "v1" else row["normalized"] for row in rows.values()]
            average = math.fsum(values) / len(values)
    scores = {"suite": suite, "smoke": bool(smoke), "model": model, "average": average, "benchmarks": rows}
    return {**scores, "notes": [*notes, *cut]}


def _where_cut(row: dict[str, Any]) -> str:
    """In which of a benchmark's tasks prompts were cut; nothing where it has a single one."""
    tasks = row["details"]["tasks"]
    cut = [f"{name} {task['truncated']}" for name, task in tasks.items() if task["truncated"]]
    return f" ({', '.join(cut)})" if len(tasks) > 1 else ""
