"""Scores from log-likelihoods: known answers, ties, clusters, and models that must not pass."""

import math
import statistics

import pytest

from eval.scoring import ScoringError, check_answers, score_multiple_choice, score_rolling


def test_accuracy_stderr_and_chance_of_independent_items():
    choices = [[-1.0, -2.0], [-1.0, -2.0], [-3.0, -2.0, -9.0, -9.0], [-2.0, -1.0]]
    score = score_multiple_choice(choices, [0, 1, 1, 1], list("abcd"))
    assert score["raw"] == 0.75
    assert score["chance"] == pytest.approx((0.5 + 0.5 + 0.25 + 0.5) / 4)
    assert score["stderr"] == pytest.approx(statistics.stdev([1, 0, 1, 1]) / 2)
    assert score["normalized"] == pytest.approx(100 * (0.75 - 0.4375) / (1 - 0.4375))
    assert score["n"] == 4
    assert score["details"]["ties"] == 0


def test_items_of_one_cluster_are_not_independent():
    values = [[0.0, -1.0]] * 10 + [[-1.0, 0.0]] * 10
    apart = score_multiple_choice(values, [0] * 20, [str(i) for i in range(20)])
    together = score_multiple_choice(values, [0] * 20, ["a"] * 10 + ["b"] * 10)
    assert together["raw"] == apart["raw"] == 0.5
    assert together["stderr"] == pytest.approx(statistics.stdev([1.0, 0.0]) / math.sqrt(2))
    assert together["stderr"] > 4 * apart["stderr"]
    assert score_multiple_choice(values, [0] * 20, ["a"] * 20)["stderr"] is None


def test_a_tied_best_choice_is_wrong_and_counted():
    score = score_multiple_choice([[-1.0, -1.0], [-1.0, -1.0, -5.0], [-1.0, -3.0, -3.0]], [0, 1, 0], list("abc"))
    assert score["raw"] == pytest.approx(1 / 3)
    assert score["details"]["ties"] == 2


def test_a_model_that_scores_everything_alike_gets_nothing_right():
    gold = [0, 1] * 50
    score = score_multiple_choice([[-2.0, -2.0]] * 100, gold, [str(i) for i in range(100)])
    assert score["raw"] == 0.0
    assert score["details"]["ties"] == 100


@pytest.mark.parametrize(("right", "expected"), [(55, True), (75, False), (25, False)])
def test_at_chance_is_within_two_standard_errors(right, expected):
    values = [[0.0, -1.0]] * right + [[-1.0, 0.0]] * (100 - right)
    score = score_multiple_choice(values, [0] * 100, [str(i) for i in range(100)])
    assert score["details"]["at_chance"] is expected


def test_bits_per_byte_counts_utf8_bytes():
    text = "é" * 10
    score = score_rolling([-20 * math.log(2)], [5], [text])
    assert score["raw"] == pytest.approx(1.0)
    assert score["stderr"] is score["chance"] is score["normalized"] is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_are_an_error_naming_the_task(bad):
    with pytest.raises(ScoringError, match="sva_simple: .* must be finite"):
        check_answers("sva_simple", [-1.0, bad, -2.0], [1, 1, 1], -7.0)


def test_constant_per_token_scores_are_an_error_naming_the_task():
    with pytest.raises(ScoringError, match="sva_simple: .*every token the same score"):
        check_answers("sva_simple", [-7.0, -14.0, -21.0], [1, 2, 3], -7.0)
    with pytest.raises(ScoringError, match="austen_test"):
        check_answers("austen_test", [-7000.0], [1000], -7.0)
    check_answers("sva_simple", [-7.0, -14.0, -21.5], [1, 2, 3], -7.0)
    check_answers("austen_test", [-6990.0], [1000], -7.0)
