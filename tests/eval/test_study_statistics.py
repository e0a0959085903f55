"""What a handful of seeds can say: coverage, power, and verdicts that need both."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from eval.statistics import BETTER, SAME, WORSE, detectable, paired, sign_test, t_interval, verdicts

SIMULATED = 20_000


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_interval_covers_the_truth(seeds):
    truth = 0.03
    drawn = np.random.default_rng(seeds).normal(truth, 0.05, size=(SIMULATED, seeds))
    low, high = t_interval(drawn)
    assert 0.93 <= np.mean((low <= truth) & (truth <= high)) <= 0.97


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 50])
def test_what_could_be_seen_is_seen_four_times_in_five(seeds):
    drawn = np.random.default_rng(seeds).normal(0, 1, size=seeds)
    drawn /= drawn.std(ddof=1)  # seeds scatter by 1
    effect = detectable(drawn)
    low, high = t_interval(np.random.default_rng(1).normal(effect, 1, size=(SIMULATED, seeds)))
    assert np.mean((low > 0) | (high < 0)) == pytest.approx(0.8, abs=0.01)


def test_detectable_is_in_the_unit_of_the_differences():
    drawn = np.array([0.1, -0.2, 0.3, 0.05])
    assert detectable(10 * drawn) == pytest.approx(10 * detectable(drawn))


def test_p_is_that_of_the_paired_t_test():
    drawn = np.random.default_rng(0).normal(0.5, 1, size=7)
    assert paired(list(drawn)).p == pytest.approx(ttest_1samp(drawn, 0).pvalue)


def test_interval_and_p_agree_on_five_percent():
    for seed in range(200):
        found = paired(list(np.random.default_rng(seed).normal(0.8, 1, size=5)))
        assert (found.interval[0] > 0 or found.interval[1] < 0) == (found.p < 0.05)


def test_no_difference_at_all():
    """Nothing can be told apart, and no interval from 0 to 0 says how exactly that is known."""
    found = paired([0.0] * 10)
    assert (found.mean, found.interval, found.p) == (0.0, None, 1.0)
    assert (found.detectable, found.sign_p, found.bootstrap) == (None, None, None)
    assert verdicts([found], lower_is_better=True, norms=1) == [(1.0, SAME)]


def test_one_seed_says_nothing():
    found = paired([0.7])
    assert (found.n, found.interval, found.p, found.detectable) == (1, None, None, None)
    assert verdicts([found], lower_is_better=True, norms=1) == [(None, "")]


@pytest.mark.parametrize(
    ("seeds", "sign", "bootstrap"), [(5, False, False), (6, True, False), (9, True, False), (10, True, True)]
)
def test_tests_that_need_many_seeds_wait_for_them(seeds, sign, bootstrap):
    found = paired([0.1 * i for i in range(1, seeds + 1)])
    assert (found.sign_p is not None, found.bootstrap is not None) == (sign, bootstrap)
    if bootstrap:
        low, high = found.bootstrap
        assert 0.1 < low < found.mean < high < 1.0


def test_the_sign_test_counts_signs():
    assert sign_test(np.array([1.0, 2, 3, 4, 5, 6])) == pytest.approx(2 / 2**6)
    assert sign_test(np.array([1.0, 2, 3, -4, -5, -6])) == 1.0
    assert sign_test(np.array([0.0, 0.0, 1.0, 2.0])) == pytest.approx(2 / 2**2)
    assert sign_test(np.zeros(6)) == 1.0


def test_differences_without_scatter_are_no_evidence():
    """Two models that get one item more right than two others: nothing says by how much that could be chance."""
    found = paired([0.25, 0.25])
    assert (found.mean, found.interval, found.p, found.detectable) == (0.25, None, None, None)
    assert verdicts([found], lower_is_better=False, norms=1) == [(None, "")]


def test_norms_that_are_not_there_yet_count():
    """Or a verdict of an unfinished study could be taken back later."""
    close = paired([-0.1, -0.2, -0.2])
    assert verdicts([close], lower_is_better=True, norms=1)[0][1] == BETTER
    assert verdicts([close], lower_is_better=True, norms=2)[0][1] == SAME


def test_what_could_be_seen_allows_for_the_number_of_norms():
    drawn = list(np.random.default_rng(0).normal(0, 1, size=4))
    effect = paired(drawn, norms=7).detectable
    assert effect > 1.5 * paired(drawn).detectable
    spread = np.std(drawn, ddof=1)
    simulated = np.random.default_rng(1).normal(effect, spread, size=(SIMULATED, 4))
    low, high = t_interval(simulated, 0.05 / 7)
    assert np.mean((low > 0) | (high < 0)) == pytest.approx(0.8, abs=0.01)


def test_verdicts_need_the_corrected_p():
    clear, close = paired([-0.30, -0.31, -0.32]), paired([-0.1, -0.2, -0.2])
    assert 0.025 < close.p < 0.05
    assert [verdict for _, verdict in verdicts([close], lower_is_better=True, norms=1)] == [BETTER]
    # The least p comes first and takes the factor 3; of the others one is above 5 % by itself.
    found = verdicts([clear, close, paired([0.1, -0.1, 0.2])], lower_is_better=True, norms=3)
    assert [verdict for _, verdict in found] == [BETTER, SAME, SAME]
    assert found[0][0] == pytest.approx(3 * clear.p)
    assert found[1][0] == pytest.approx(2 * close.p)


@pytest.mark.parametrize(("lower", "verdict"), [(True, WORSE), (False, BETTER)])
def test_a_verdict_knows_which_way_is_up(lower, verdict):
    assert verdicts([paired([0.30, 0.31, 0.32])], lower, norms=1)[0][1] == verdict


def test_false_verdicts_are_rare_over_many_norms():
    """Seven norms that are the baseline under other names, three seeds: some verdict in at most one study of twenty."""
    generator, wrong, studies = np.random.default_rng(0), 0, 400
    for _ in range(studies):
        found = [paired(list(generator.normal(0, 1, size=3))) for _ in range(7)]
        wrong += any(verdict != SAME for _, verdict in verdicts(found, lower_is_better=True, norms=7))
    assert wrong / studies < 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)
