"""Scores from answers: the published figure, chance levels, ties, clusters, and results that are not whole."""

import dataclasses
import math
import statistics

import numpy as np
import pytest
from scipy.stats import binom

from eval.scoring import ScoringError, Stratum, check_answers, normalized, p_of_chance, score_benchmark, score_suite
from eval.suites import SUITES, Benchmark

CHOICE = Benchmark("task", "Task", ("task",), "acc")
V1, V2 = ({each.name: each for each in SUITES[name]} for name in ("v1", "v2"))


def item(i, values, gold, **fields):
    """A multiple-choice item as a result file has it."""
    right = float(values.index(max(values)) == gold)
    metrics = {"acc,none": right, "acc_norm,none": right}
    more = {"lengths": [1] * len(values), "chance": 1 / len(values), "gold": gold}
    return {"doc_id": i, "doc_hash": str(i), "metrics": metrics, "choices": values, **more, **fields}


def result_of(**tasks):
    return {"tasks": {name: {"items": items, "overlong": 0, "hash": "h"} for name, items in tasks.items()}}


def score(choices, gold, clusters=None):
    items = [item(i, values, right) for i, (values, right) in enumerate(zip(choices, gold, strict=True))]
    for each, cluster in zip(items, clusters or [], strict=False):
        each["cluster"] = cluster
    return score_benchmark(CHOICE, result_of(task=items))


def test_accuracy_stderr_and_chance_of_independent_items():
    choices = [[-1.0, -2.0], [-1.0, -2.0], [-3.0, -2.0, -9.0, -9.0], [-2.0, -1.0]]
    row = score(choices, [0, 1, 1, 1])
    assert row["raw"] == 0.75
    assert row["chance"] == pytest.approx((0.5 + 0.5 + 0.25 + 0.5) / 4)
    assert row["stderr"] == pytest.approx(statistics.stdev([1, 0, 1, 1]) / 2)
    assert row["normalized"] == pytest.approx(100 * (0.75 - 0.4375) / (1 - 0.4375))
    assert row["n"] == 4
    assert row["details"]["ties"] == 0


def test_items_of_one_cluster_are_not_independent():
    values = [[0.0, -1.0]] * 10 + [[-1.0, 0.0]] * 10
    apart = score(values, [0] * 20)
    together = score(values, [0] * 20, ["a"] * 10 + ["b"] * 10)
    assert together["raw"] == apart["raw"] == 0.5
    assert together["stderr"] == pytest.approx(statistics.stdev([1.0, 0.0]) / math.sqrt(2))
    assert together["stderr"] > 4 * apart["stderr"]
    assert score(values, [0] * 20, ["a"] * 20)["stderr"] is None


def test_a_tied_best_choice_is_wrong_and_counted():
    row = score([[-1.0, -1.0], [-1.0, -1.0, -5.0], [-1.0, -3.0, -3.0]], [0, 1, 0])
    assert row["raw"] == pytest.approx(1 / 3)
    assert row["details"]["ties"] == 2


def test_ties_are_those_of_the_metric_that_counts():
    by_length = Benchmark("task", "Task", ("task",), "acc_norm")
    by_value = [item(i, [-2.0, -2.0], 0, lengths=[2, 1]) for i in range(3)]
    items = [item(3, [-2.0, -4.0], 0, lengths=[1, 2]), *by_value]
    for benchmark, ties in ((by_length, 1), (CHOICE, 3)):
        row = score_benchmark(benchmark, result_of(task=items))
        assert row["details"]["tasks"]["task"]["ties"] == ties
        assert row["raw"] == 1 - ties / 4


def answered(right, wrong, choices=2):
    """Answers to items with so many choices, so many right and so many wrong."""
    values = [float(-i) for i in range(choices)]
    return [values] * (right + wrong), [0] * right + [1] * wrong


@pytest.mark.parametrize(("right", "level"), [(14, "at"), (16, "at"), (20, "above"), (3, "below")])
def test_at_chance_is_what_guessing_may_well_bring(right, level):
    row = score(*answered(right, 26 - right))
    assert row["details"]["at_chance"] == (level == "at")
    assert (row["normalized"] == 0) == (level == "below")


@pytest.mark.parametrize("choices", [2, 4])
@pytest.mark.parametrize("n", [2, 10, 26, 42])
def test_a_guesser_is_at_chance_nineteen_times_in_twenty(n, choices):
    told = sum(
        binom.pmf(right, n, 1 / choices)
        for right in range(n + 1)
        if not score(*answered(right, n - right, choices))["details"]["at_chance"]
    )
    assert told <= 0.05


def test_a_guesser_at_items_of_several_tasks_and_with_clusters_is_at_chance_as_often():
    generator, told, draws = np.random.default_rng(0), {"musr": 0, "clusters": 0}, 200
    musr, clusters = V2["leaderboard_musr"], [str(i // 3) for i in range(60)]
    for _ in range(draws):
        tasks = {}
        for name, bound in musr.bounds.items():
            right = generator.random(20) < bound
            tasks[name] = [item(i, [0.0, -1.0], 0 if each else 1) for i, each in enumerate(right)]
        told["musr"] += not score_benchmark(musr, result_of(**tasks))["details"]["at_chance"]
        # Who guesses one item of a sentence right may do so at all of them.
        right = np.repeat(generator.random(20) < 0.5, 3)
        row = score([[0.0, -1.0]] * 60, [0 if each else 1 for each in right], clusters)
        told["clusters"] += not row["details"]["at_chance"]
    assert 0.01 * draws <= told["musr"] <= 0.09 * draws
    assert told["clusters"] <= 0.09 * draws


@pytest.mark.parametrize(("count", "chance"), [(6, 0.25), (8, 0.25), (6, 0.1)])
def test_a_guesser_at_few_sentences_is_at_chance_as_often(count, chance):
    generator, told, draws = np.random.default_rng(0), 0, 200
    for _ in range(draws):
        values = np.repeat(generator.random(count) < chance, 2).astype(float)
        clusters = [str(i // 2) for i in range(2 * count)]
        part = Stratum("task", list(values), list(values), clusters, clusters, 1.0, chance, 0, [chance] * (2 * count))
        told += p_of_chance([part]) < 0.05
    assert told <= 0.09 * draws


def test_what_cannot_be_guessed_is_above_chance_with_one_right_answer():
    written = Benchmark("task", "Task", ("task",), "exact_match", bounds=0.0)
    for right in (0, 1):
        items = [{"doc_id": i, "doc_hash": "", "metrics": {"exact_match,none": i < right}} for i in range(50)]
        assert score_benchmark(written, result_of(task=items))["details"]["at_chance"] == (right == 0)


def test_answers_that_are_all_right_have_no_standard_error():
    assert score(*answered(2, 0))["stderr"] is None
    assert score(*answered(2, 1))["stderr"] > 0


SPOILT = {
    "twice": (lambda items: items.append(dict(items[3])), "item 3 is there 2 times"),
    "missing": (lambda items: items.pop(3), "item 3 is missing"),
    "NaN": (lambda items: items[3]["metrics"].update({"acc,none": math.nan}), "item 3 has a acc of nan"),
    "too much": (lambda items: items[3]["metrics"].update({"acc,none": 7}), "item 3 has a acc of 7, must be a number"),
    "text": (lambda items: items[3]["metrics"].update({"acc,none": "1"}), "item 3 has a acc of '1'"),
    "likelihood": (lambda items: items[3].update(choices=[-1.0, -math.inf]), "item 3 has a log-likelihood of -inf"),
    "chance": (lambda items: items[3].update(chance=None), "item 3 has a chance of None"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_items_that_are_not_as_they_were_answered_are_no_score(name):
    spoil, message = SPOILT[name]
    items = [item(i, [-1.0, -2.0], i % 2) for i in range(8)]
    spoil(items)
    with pytest.raises(ScoringError, match=f"task: {message}"):
        score_benchmark(CHOICE, result_of(task=items))


def test_bits_per_byte_counts_bytes():
    rolling = Benchmark("task", "Task", ("task",), "bits_per_byte")
    texts = ["é", "abc"]
    items = [
        {"doc_id": i, "doc_hash": "", "metrics": {}, "choices": [-3 * math.log(2)], "tokens": [n], "bytes": size}
        for i, (n, size) in enumerate((n, len(text.encode())) for n, text in zip((2, 3), texts, strict=True))
    ]
    row = score_benchmark(rolling, result_of(task=items))
    assert row["raw"] == pytest.approx(6 / 5)
    assert row["details"]["bytes"] == row["details"]["tokens"] == 5
    assert row["chance"] is None
    assert row["normalized"] is None
    assert score_benchmark(rolling, result_of(task=items[:1]))["stderr"] is None


def test_the_published_figure_of_mmlu_pro():
    assert round(normalized(0.53092, V2["leaderboard_mmlu_pro"].bounds), 2) == 47.88


def test_the_table_of_chance_levels():
    expected = {
        2: "boolean_expressions causal_judgement formal_fallacies hyperbaton navigate snarks sports_understanding "
        "web_of_lies",
        3: "disambiguation_qa logical_deduction_three_objects tracking_shuffled_objects_three_objects",
        4: "temporal_sequences",
        5: "logical_deduction_five_objects penguins_in_a_table tracking_shuffled_objects_five_objects",
        6: "date_understanding movie_recommendation ruin_names salient_translation_error_detection",
        7: "logical_deduction_seven_objects tracking_shuffled_objects_seven_objects",
        11: "geometric_shapes",
        18: "reasoning_about_colored_objects",
        19: "object_counting",
    }
    bbh = {f"leaderboard_bbh_{name}": 1 / n for n, names in expected.items() for name in names.split()}
    assert V2["leaderboard_bbh"].bounds == bbh
    assert len(bbh) == len(V2["leaderboard_bbh"].tasks) == 24
    assert V2["leaderboard_musr"].bounds == {
        "leaderboard_musr_murder_mysteries": 1 / 2,
        "leaderboard_musr_object_placements": 1 / 5,
        "leaderboard_musr_team_allocation": 1 / 3,
    }
    assert [V2[f"leaderboard_{name}"].bounds for name in ("gpqa", "mmlu_pro", "ifeval", "math_hard")] == [
        0.25,
        0.1,
        0,
        0,
    ]


def test_tasks_of_bbh_are_normalized_one_by_one_and_their_mean_taken():
    benchmark = V2["leaderboard_bbh"]
    tasks = {}
    for k, (name, bound) in enumerate(benchmark.bounds.items()):
        n = round(1 / bound)
        tasks[name] = [item(i, [-float(j != i % 2) for j in range(n)], 0) for i in range(4 + 2 * (k % 3))]
    row = score_benchmark(benchmark, result_of(**tasks))
    assert row["raw"] == pytest.approx(0.5)  # every other item right
    assert row["normalized"] == pytest.approx(sum(100 * (0.5 - b) / (1 - b) for b in benchmark.bounds.values()) / 24)
    assert row["chance"] == pytest.approx(sum(benchmark.bounds.values()) / 24)


def test_below_its_own_chance_a_task_of_musr_counts_zero_and_not_less():
    benchmark = V2["leaderboard_musr"]
    tasks = {
        name: [item(i, [0.0] + [-1.0] * (round(1 / bound) - 1), 0 if k else 1) for i in range(6)]
        for k, (name, bound) in enumerate(benchmark.bounds.items())
    }
    assert score_benchmark(benchmark, result_of(**tasks))["normalized"] == pytest.approx(100 * 2 / 3)


def test_mmlu_counts_subjects_alike_and_reports_the_other_mean_too():
    benchmark = V1["mmlu"]
    tasks = {
        name: [item(i, [-float(j != 0) for j in range(4)], 0 if k < 19 else 1) for i in range(2 + k)]
        for k, name in enumerate(benchmark.tasks)
    }
    row = score_benchmark(benchmark, result_of(**tasks))
    assert row["raw"] == pytest.approx(19 / 57)
    assert row["details"]["size_weighted"] == pytest.approx(
        sum(2 + k for k in range(19)) / sum(2 + k for k in range(57))
    )
    assert row["normalized"] == pytest.approx(100 * (19 / 57 - 0.25) / 0.75)


def test_ifeval_is_the_mean_of_two_accuracies_with_the_spread_of_both():
    rows = [(True, [True, True]), (False, [True, False, False]), (False, [False]), (True, [True])] * 10
    items = [
        {
            "doc_id": i,
            "doc_hash": str(i),
            "metrics": {"prompt_level_strict_acc,none": prompt, "inst_level_strict_acc,none": followed},
        }
        for i, (prompt, followed) in enumerate(rows)
    ]
    row = score_benchmark(V2["leaderboard_ifeval"], result_of(leaderboard_ifeval=items))
    assert row["raw"] == pytest.approx((1 / 2 + 4 / 7) / 2)
    assert row["normalized"] == pytest.approx(100 * row["raw"])
    assert row["details"]["prompt_level_strict_acc,none"] == 0.5
    assert row["details"]["inst_level_strict_acc,none"] == pytest.approx(4 / 7)
    # The jackknife knows nothing of the linearization that the scorer uses.
    left = [
        (
            sum(p for k, (p, _) in enumerate(rows) if k != i) / 39
            + sum(sum(f) for k, (_, f) in enumerate(rows) if k != i)
            / sum(len(f) for k, (_, f) in enumerate(rows) if k != i)
        )
        / 2
        for i in range(40)
    ]
    jackknife = math.sqrt(39 / 40 * sum((value - sum(left) / 40) ** 2 for value in left))
    assert row["stderr"] == pytest.approx(jackknife, rel=0.02)


def test_a_missing_task_is_an_error_that_names_it():
    tasks = {name: [item(0, [0.0, -1.0], 0)] for name in V2["leaderboard_musr"].tasks[1:]}
    with pytest.raises(ScoringError, match="leaderboard_musr: 1 of its tasks missing: leaderboard_musr_murder"):
        score_benchmark(V2["leaderboard_musr"], result_of(**tasks))


ANY_SIZE = [dataclasses.replace(each, items=None) for each in SUITES["v2"]]
"""The second leaderboard, for however many items."""


def whole_v2():
    """Result files of all six benchmarks, each right on every other item."""
    results = {}
    for benchmark in SUITES["v2"]:
        tasks = {}
        for name in benchmark.tasks:
            bound = benchmark.bounds[name] if isinstance(benchmark.bounds, dict) else benchmark.bounds
            n = round(1 / bound) if bound else 2
            items = [item(i, [-float(j != i % 2) for j in range(n)], 0) for i in range(8)]
            for each in items:
                right = each["metrics"]["acc,none"]
                each["metrics"] |= {"exact_match,none": right, "prompt_level_strict_acc,none": right}
                each["metrics"]["inst_level_strict_acc,none"] = [right]
            tasks[name] = items
        results[benchmark.name] = result_of(**tasks)
    return results


def test_the_average_is_given_only_for_what_is_whole():
    results = whole_v2()
    scores = score_suite("v2", ANY_SIZE, results, model="m", smoke=[])
    expected = statistics.fmean(row["normalized"] for row in scores["benchmarks"].values())
    assert scores["average"] == pytest.approx(expected)
    assert scores["notes"] == []

    skipped = score_suite("v2", ANY_SIZE, {**results, "leaderboard_gpqa": {"skipped": "why"}}, model="m", smoke=[])
    assert skipped["average"] is None
    assert skipped["notes"] == ["GPQA: why", "no average: not all columns are there"]
    assert skipped["benchmarks"]["leaderboard_gpqa"]["raw"] is None

    del results["leaderboard_ifeval"]
    unfinished = score_suite("v2", ANY_SIZE, results, model="m", smoke=[])
    assert unfinished["average"] is None
    assert unfinished["notes"] == ["IFEval: not run", "no average: not all columns are there"]
    part = score_suite("v2", ANY_SIZE[1:], results, model="m", smoke=[])
    assert part["notes"] == ["no average: IFEval is not part of this run"]


def test_other_items_than_the_leaderboards_have_no_average():
    scores = score_suite("v2", SUITES["v2"], whole_v2(), model="m", smoke=[])
    assert scores["average"] is None
    assert "IFEval has 8 items here, 541 on the leaderboard" in scores["notes"]
    assert scores["notes"][-1] == "no average: other items"


def test_gpqa_counts_a_question_once_however_many_of_its_sets_hold_it():
    benchmark = V2["leaderboard_gpqa"]
    values = [[0.0, -1.0, -2.0, -3.0]] * 10 + [[-1.0, 0.0, -2.0, -3.0]] * 20
    questions = [item(i, each, 0, cluster=f"q{i}") for i, each in enumerate(values)]
    sets = {name: [dict(each) for each in questions] for name in benchmark.tasks}
    three = score_benchmark(benchmark, result_of(**sets))
    one = score(values, [0] * 30)
    assert three["raw"] == pytest.approx(one["raw"])
    assert three["n"] == 90
    assert three["details"]["clusters"] == 30
    assert three["stderr"] == pytest.approx(one["stderr"])


def test_an_item_of_musr_may_have_fewer_choices_than_its_chance_level_says():
    benchmark = V2["leaderboard_musr"]
    tasks = {name: [item(i, [0.0, -1.0, -2.0], 0) for i in range(4)] for name in benchmark.tasks}
    row = score_benchmark(benchmark, result_of(**tasks))
    assert row["raw"] == 1.0
    assert row["chance"] == pytest.approx((1 / 2 + 1 / 5 + 1 / 3) / 3)


def test_a_limit_is_stamped_and_has_no_average():
    scores = score_suite("v2", ANY_SIZE, whole_v2(), model="m", smoke=["--limit 8"])
    assert scores["smoke"] is True
    assert scores["average"] is None
    assert scores["notes"] == ["no average: --limit 8"]


def test_truncated_prompts_are_counted_beside_the_score():
    results = whole_v2()
    results["leaderboard_bbh"]["tasks"]["leaderboard_bbh_snarks"]["overlong"] = 3
    scores = score_suite("v2", ANY_SIZE, results, model="m", smoke=[])
    assert scores["benchmarks"]["leaderboard_bbh"]["details"]["truncated"] == 3
    assert scores["benchmarks"]["leaderboard_bbh"]["details"]["tasks"]["leaderboard_bbh_snarks"]["truncated"] == 3
    assert scores["notes"] == ["BBH: 3 prompts were cut to the model's context (leaderboard_bbh_snarks 3)"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_an_error_naming_the_task(value):
    with pytest.raises(ScoringError, match="sva: .* must be finite"):
        check_answers("sva", [-1.0, value], [1, 1], -5.0)


def test_a_model_that_scores_every_token_alike_is_an_error():
    with pytest.raises(ScoringError, match="sva: .* every token the same score"):
        check_answers("sva", [-5.0, -10.0, -5.0], [1, 2, 1], -9.0)
    with pytest.raises(ScoringError, match="novel: .* every token the same score"):
        check_answers("novel", [-900.0], [100], -9.0)
    check_answers("sva", [-5.0, -10.0, -5.1], [1, 2, 1], -9.0)
    check_answers("novel", [-800.0], [100], -9.0)
