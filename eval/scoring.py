"""From the answers of a run to its scores: pure functions, and the checks that keep a broken model from looking able.

lm-eval takes the first best choice: a model whose scores are all NaN, or all equal, would get every item right whose
answer is listed first. Here such a model is an error, and an item whose best choice is tied counts as wrong.
"""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from .statistics import LEVEL, Pairs, p_of_guessing, p_of_no_difference
from .suites import AVERAGED, SUITES, Benchmark


class ScoringError(ValueError):
    """The answers cannot be scored; the message names the task."""


DAMAGE = (ScoringError, KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)
"""The errors that scoring a damaged result file may raise."""


def check_items(tasks: Mapping[str, Any], limit: int | None = None) -> None:
    """Raise ScoringError for an item that is missing from the tasks of a result file, or stands there twice; `limit` is
    how many items of each task the run was asked for, None for all."""
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


def _number(name: str, item: Mapping[str, Any], field: str, value: Any, low: float, high: float) -> float:
    """`value`, a field of an item of the task `name`; ScoringError unless it is a number from `low` to `high`."""
    if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        allowed = f"must be a number from {low:g} to {high:g}"
        raise ScoringError(f"{name}: item {item['doc_id']} has a {field} of {value!r}, {allowed}")
    return float(value)


def check_answers(name: str, loglikelihoods: Sequence[float], tokens: Sequence[int], uniform: float) -> None:
    """Raise ScoringError where a log-likelihood is not finite, or the model gave every token the same score.

    The log-likelihood of an answer, in nats, is summed over its number of tokens; `uniform` is that of one token under
    the uniform distribution, -log(vocabulary).
    """
    for value in loglikelihoods:
        if not math.isfinite(value):
            raise ScoringError(f"{name}: the model gives a log-likelihood of {value}, scores must be finite")
    means = [value / count for value, count in zip(loglikelihoods, tokens, strict=True) if count]
    # One long text has a single mean: a constant model shows itself where that is the uniform distribution's.
    reference = means[0] if len(means) > 1 else uniform
    if all(math.isclose(mean, reference, rel_tol=1e-5) for mean in means):
        same = f"the same score ({reference:.4f})"
        raise ScoringError(f"{name}: the model gives every token {same}, it tells nothing apart")


def normalized(value: float, bound: float) -> float:
    """`value` between guessing and perfect on a scale of 0 to 100: max(0, value - bound) / (1 - bound) * 100."""
    return 100 * max(0.0, value - bound) / (1 - bound)


@dataclass(frozen=True)
class Stratum:
    """One task of a benchmark: the benchmark's score is the sum of weight x mean(values) over its strata."""

    task: str  # lm-eval's name
    values: list[float]  # one for each item; their mean is the score
    spread: list[float]  # numbers whose spread is the score's: `values`, linearized where the score is a ratio of sums
    items: list[str]  # what identifies each item, to pair it with the same item of another run
    clusters: list[str]  # of each item; items of one cluster share their sentence and are not independent
    weight: float  # of the task in the benchmark
    bound: float | None  # the score of guessing; None where nothing can be guessed
    ties: int  # items whose best choice was tied, which count as wrong
    guesses: list[float] = field(default_factory=list)  # of each item, the score of guessing; empty as above

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def stderr(self) -> float:
        """Robust to clusters (with one item in each the usual sample standard error); NaN for a single cluster."""
        residuals = Pairs.summed(np.subtract(self.spread, self.mean), self.clusters, self.weight).sums
        m = residuals.size
        return math.sqrt(math.fsum(residuals**2) / self.n**2 * m / (m - 1)) if m > 1 else math.nan


def strata(benchmark: Benchmark, result: dict[str, Any]) -> list[Stratum]:
    """A stratum for each task of a result file; ScoringError where the file has other tasks than the benchmark, or no
    items."""
    tasks = result["tasks"]
    if missing := sorted(set(benchmark.tasks) - set(tasks)):
        raise ScoringError(f"{benchmark.name}: {len(missing)} of its tasks missing: {', '.join(missing[:3])}")
    if unknown := sorted(set(tasks) - set(benchmark.tasks)):
        raise ScoringError(f"{benchmark.name}: unknown: {unknown[0]}")
    check_items(tasks, max(len(task["items"]) for task in tasks.values()))  # the run's limit is not known here
    size, parts = sum(len(task["items"]) for task in tasks.values()), []
    for name in benchmark.tasks:
        items = tasks[name]["items"]
        if not items:
            raise ScoringError(f"{name}: no items were answered")
        values, spread, ties = _values(name, benchmark, items)
        bound = benchmark.bounds[name] if isinstance(benchmark.bounds, Mapping) else benchmark.bounds
        guesses = [] if bound is None else [bound] * len(items)
        if bound is None and "chance" in items[0]:
            guesses = [_number(name, item, "chance", item["chance"], 0, 1) for item in items]
            bound = fmean(guesses)
        keys = [f"{item['doc_id']} {item['doc_hash']}" for item in items]
        clusters = [item.get("cluster", f"{name} {item['doc_id']}") for item in items]
        weight = 1 / len(benchmark.tasks) if benchmark.mean == "task" else len(items) / size
        parts.append(Stratum(name, values, spread, keys, clusters, weight, bound, ties, guesses))
    return parts


def independent(parts: Sequence[Stratum]) -> list[Stratum]:
    """The strata, or all of them as one where they share clusters: GPQA's sets hold each other.

    Strata whose items do not all weigh the same are returned as they are.
    """
    seen = Counter(cluster for part in parts for cluster in set(part.clusters))
    size = sum(part.n for part in parts)
    alike = all(math.isclose(part.weight, part.n / size) for part in parts)
    if not alike or max(seen.values()) < 2:
        return list(parts)
    lists = ("values", "spread", "items", "clusters", "guesses")
    together: dict[str, Any] = {name: [each for part in parts for each in getattr(part, name)] for name in lists}
    return [Stratum(task=parts[0].task, weight=1.0, bound=None, ties=sum(part.ties for part in parts), **together)]


def p_of_chance(parts: Sequence[Stratum]) -> float:
    """p of the hypothesis that the score of strata with `guesses` comes from guessing (two-sided).

    Answers that are right or wrong are tested by `p_of_guessing`: each item is guessed by itself, and items that share
    a sentence are guessed together, as if all came out alike. Where items share a sentence and every guess is right
    half of the time, or where answers are not just right or wrong, the signs of (value - chance) are flipped, a cluster
    at a time.
    """
    apart, generator = independent(parts), np.random.default_rng(0)
    items = [item for part in apart for item in zip(part.values, part.guesses, strict=True)]
    if any(value > 0 and guess == 0 for value, guess in items):
        return 0.0
    alone = all(len(set(part.clusters)) == part.n for part in apart)
    even = all(guess == 0.5 for _, guess in items)
    if (alone or not even) and all(value in (0.0, 1.0) for value, _ in items):
        return p_of_guessing(_right(apart), generator)
    beyond = [Pairs.summed(np.subtract(part.values, part.guesses), part.clusters, part.weight) for part in apart]
    return p_of_no_difference(beyond, generator)


def _right(parts: Sequence[Stratum]) -> dict[tuple[float, float], tuple[int, float]]:
    """Counts for `p_of_guessing`; items of one cluster with the same chance count as one item."""
    right: dict[tuple[float, float], tuple[int, float]] = {}
    for part in parts:
        groups = defaultdict[tuple[str, float], list[float]](list)
        for value, guess, cluster in zip(part.values, part.guesses, part.clusters, strict=True):
            groups[cluster, guess].append(value)
        for (_, guess), values in groups.items():
            key = len(values) * part.weight / part.n, guess
            count, hits = right.get(key, (0, 0.0))
            right[key] = count + 1, hits + fmean(values)
    return right


def _values(name: str, benchmark: Benchmark, items: list[dict[str, Any]]) -> tuple[list[float], list[float], int]:
    """The value of each item, its linearized value, and the number of items with a tie."""
    if benchmark.metric == "ifeval":
        keys = ("prompt_level_strict_acc,none", "inst_level_strict_acc,none")
        prompts = [_number(name, item, keys[0], item["metrics"][keys[0]], 0, 1) for item in items]
        followed = [[_number(name, item, keys[1], each, 0, 1) for each in item["metrics"][keys[1]]] for item in items]
        ratios = _ratio([sum(each) for each in followed], [len(each) for each in followed])
        values, spread = ([(a + b) / 2 for a, b in zip(prompts, each, strict=True)] for each in ratios)
        return values, spread, 0
    for item in items:
        for value in item.get("choices", ()):
            _number(name, item, "log-likelihood", value, -sys.float_info.max, sys.float_info.max)
    if benchmark.rolling:
        sizes = [_number(name, item, "number of bytes", item["bytes"], 1, sys.maxsize) for item in items]
        return *_ratio([-item["choices"][0] / math.log(2) for item in items], sizes), 0
    values, ties = [], 0
    for item in items:
        if benchmark.key not in item["metrics"]:
            raise ScoringError(f"{name}: an item has no {benchmark.key}")
        value = _number(name, item, benchmark.metric, item["metrics"][benchmark.key], 0, 1)
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

    Two runs over the same items have equal numbers of the first kind where their answers are equal.
    """
    ratio, mean = math.fsum(above) / math.fsum(below), fmean(below)
    linear = [ratio + (a - ratio * b) / mean for a, b in zip(above, below, strict=True)]
    return [a / mean for a in above], linear


def score_benchmark(benchmark: Benchmark, result: dict[str, Any]) -> dict[str, Any]:
    """A row of the score table from a result file.

    Returns:
        {"raw", "stderr", "normalized", "chance", "n", "details"}: raw and stderr are fractions (or bits per byte);
        stderr is null where it cannot be estimated: from a single cluster, or items that all came out the same;
        normalized is 0 at chance and 100 when perfect; details holds the metric, whether the score is at chance, tied
        items, truncated requests, the tasks, and second scores.

    Raises:
        ScoringError: the file's tasks or items are not the benchmark's.
    """
    parts = strata(benchmark, result)
    raw, n = math.fsum(part.weight * part.mean for part in parts), sum(part.n for part in parts)
    rows = [_task_row(part, result["tasks"][part.task]) for part in parts]
    chance = level = None
    if all(row["chance"] is not None for row in rows):
        chance = math.fsum(part.weight * row["chance"] for part, row in zip(parts, rows, strict=True))
        level = normalized(raw, chance)
        if isinstance(benchmark.bounds, Mapping):
            level = math.fsum(part.weight * row["normalized"] for part, row in zip(parts, rows, strict=True))
    details: dict[str, Any] = {
        "metric": benchmark.metric,
        "at_chance": chance is not None and p_of_chance(parts) >= LEVEL,
        "ties": sum(part.ties for part in parts),
        "clusters": len({cluster for part in parts for cluster in part.clusters}),
        "truncated": sum(row["truncated"] for row in rows),
    }
    if benchmark.rolling:
        items = result["tasks"][benchmark.name]["items"]
        details |= {"bytes": sum(item["bytes"] for item in items), "tokens": sum(item["tokens"][0] for item in items)}
    if len(parts) > 1:
        details["size_weighted"] = math.fsum(part.mean * part.n for part in parts) / n
    for key in benchmark.also:
        metrics = [item["metrics"][key] for task in result["tasks"].values() for item in task["items"]]
        details[key] = fmean(each for value in metrics for each in (value if isinstance(value, list) else [value]))
    details["tasks"] = dict(zip(benchmark.tasks, rows, strict=True))
    stderr = math.sqrt(sum((part.weight * part.stderr) ** 2 for part in independent(parts)))
    row = {"raw": raw, "stderr": stderr if stderr > 0 else None, "normalized": level, "chance": chance, "n": n}
    return {**row, "details": details}


def _task_row(part: Stratum, task: dict[str, Any]) -> dict[str, Any]:
    return {
        "raw": part.mean,
        "stderr": part.stderr if part.stderr > 0 else None,
        "normalized": None if part.bound is None else normalized(part.mean, part.bound),
        "chance": part.bound,
        "n": part.n,
        "ties": part.ties,
        "truncated": task["overlong"],
        "hash": task["hash"],
    }


def score_suite(
    suite: str, benchmarks: Sequence[Benchmark], results: Mapping[str, dict[str, Any]], *, model: str, smoke: list[str]
) -> dict[str, Any]:
    """The content of `scores.json` from the result files of a run, which are {"skipped": reason} for benchmarks that
    were left out; ScoringError where one does not fit its benchmark.

    The average (0 to 100) is the mean of the raw scores in version 1 of the leaderboard, of the normalized ones in
    version 2. It is null, and notes says why, unless every benchmark of a leaderboard is whole, and `smoke`, the
    settings that make this no leaderboard score, is empty.
    """
    rows: dict[str, dict[str, Any]] = {}
    absent, other, cut = [], [], []
    for benchmark in benchmarks:
        name, title = benchmark.name, benchmark.title
        result = results.get(name, {"skipped": "not run"})
        if reason := result.get("skipped"):
            empty = dict.fromkeys(("raw", "stderr", "normalized", "chance", "n"))
            rows[name] = {**empty, "details": {"metric": benchmark.metric, "at_chance": False, "reason": reason}}
            absent.append(f"{title}: {reason}")
            continue
        rows[name] = row = score_benchmark(benchmark, result)
        if not smoke and benchmark.items not in (None, row["n"]):
            other.append(f"{title} has {row['n']} items here, {benchmark.items} on the leaderboard")
        if count := row["details"]["truncated"]:
            tasks = [
                f"{task} {each['truncated']}" for task, each in row["details"]["tasks"].items() if each["truncated"]
            ]
            where = f" ({', '.join(tasks)})" if len(benchmark.tasks) > 1 else ""
            cut.append(f"{title}: {count} prompts were cut to the model's context{where}")
    average, notes = None, [*absent, *other]
    if suite in AVERAGED:
        why = [f"{each.title} is not part of this run" for each in SUITES[suite] if each.name not in rows]
        why += ["not all columns are there"] if absent else []
        why += [*smoke, "other items"] if other else smoke
        if why:
            notes.append(f"no average: {', '.join(why)}")
        else:
            average = fmean(100 * row["raw"] if suite == "v1" else row["normalized"] for row in rows.values())
    scores = {"suite": suite, "smoke": bool(smoke), "model": model, "average": average, "benchmarks": rows}
    return {**scores, "notes": [*notes, *cut]}
