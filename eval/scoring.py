"""From log-likelihoods to scores: pure functions, and the checks that keep a broken model from looking able.

lm-eval takes the first best choice: a model whose scores are all NaN, or all equal, would get every item right whose
answer is listed first. Here such a model is an error, and an item whose best choice is tied counts as wrong.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

AT_CHANCE = 1.96
"""A score within this many standard errors of chance (or without a standard error) counts as being at chance."""


class ScoringError(ValueError):
    """The model's answers cannot be scored; the message names the task."""


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
    # One long text has a single mean; equal to the uniform distribution's it betrays a constant model all the same.
    reference = each[0] if len(each) > 1 else uniform
    if all(math.isclose(value, reference, rel_tol=1e-5) for value in each):
        raise ScoringError(
            f"{task}: the model gives every token the same score ({reference:.4f}), it tells nothing apart"
        )


def score_multiple_choice(
    choices: Sequence[Sequence[float]], gold: Sequence[int], clusters: Sequence[str]
) -> dict[str, Any]:
    """Accuracy of the choices with the highest log-likelihood.

    Args:
        choices: log-likelihoods of each item's choices.
        gold: index of each item's right choice.
        clusters: items of one cluster share their sentence and are not independent.

    Returns:
        {"raw", "stderr", "normalized", "chance", "n", "details"} of the score table: raw and stderr are fractions,
        stderr is robust to clusters (with one item each it is the usual sample standard error; null for a single
        cluster), chance is the mean of 1/choices, normalized puts chance at 0 and a perfect score at 100, details
        says whether the score is at chance and counts tied items, which are wrong.
    """
    right, ties = [], 0
    for values, answer in zip(choices, gold, strict=True):
        best = max(values)
        tied = sum(value == best for value in values) > 1
        ties += tied
        right.append(not tied and values[answer] == best)
    n = len(right)
    raw = sum(right) / n
    residuals: dict[str, float] = defaultdict(float)
    for cluster, value in zip(clusters, right, strict=True):
        residuals[cluster] += value - raw
    m = len(residuals)
    variance = sum(value**2 for value in residuals.values()) / n**2 * m / (m - 1) if m > 1 else None
    stderr = None if variance is None else math.sqrt(variance)
    chance = sum(1 / len(values) for values in choices) / n
    at_chance = stderr is None or abs(raw - chance) <= AT_CHANCE * stderr
    return {
        "raw": raw,
        "stderr": stderr,
        "normalized": 100 * max(0.0, raw - chance) / (1 - chance),
        "chance": chance,
        "n": n,
        "details": {"metric": "acc", "at_chance": at_chance, "ties": ties, "clusters": m},
    }


def score_rolling(loglikelihoods: Sequence[float], tokens: Sequence[int], texts: Sequence[str]) -> dict[str, Any]:
    """Bits per byte of whole texts.

    Args:
        loglikelihoods: of each text, in nats.
        tokens: number of tokens of each text.
        texts: the texts; their length counts in UTF-8 bytes.

    Returns:
        A row of the score table with raw in bits per byte; it has no chance level and no standard error.
    """
    size = sum(len(text.encode()) for text in texts)
    return {
        "raw": -sum(loglikelihoods) / math.log(2) / size,
        "stderr": None,
        "normalized": None,
        "chance": None,
        "n": len(texts),
        "details": {"metric": "bits_per_byte", "at_chance": False, "bytes": size, "tokens": sum(tokens)},
    }
