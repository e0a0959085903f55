"""Measures of normality and dependence: known distributions, SciPy's own numbers, and too little to go on."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

import hf_ibnorm.analysis
from hf_ibnorm import LayerNormalNorm
from hf_ibnorm.analysis import SiteStatistics, lambda_against_likelihood, measure_normality, qq
from hf_ibnorm.analysis.normality import OF_CHANNELS, OF_PAIRS, adjusted_mutual_information, anderson_darling
from hf_ibnorm.base import errors
from hf_ibnorm.sites import contract

ROWS = 2000
MEASURES = (*OF_CHANNELS, *OF_PAIRS)


@pytest.fixture(scope="module")
def measured():
    draw = np.random.default_rng(0)
    shape = (ROWS, 6)
    samples = {
        "gaussian": draw.normal(size=shape),
        "laplace": draw.laplace(size=shape),
        "uniform": draw.uniform(size=shape),
        "bimodal": draw.normal(size=shape) + 3 * draw.choice([-1, 1], shape),
    }
    return {name: measure_normality(sample) for name, sample in samples.items()}


def test_every_measure_of_a_channel_orders_known_distributions(measured):
    r_squared = [each["r_squared"]["mean"] for each in measured.values()]
    assert r_squared == sorted(r_squared, reverse=True)
    assert r_squared[0] > 0.995
    assert r_squared[2] == pytest.approx(3 / np.pi, abs=0.005)  # a uniform one's, exactly
    for test in ("dagostino", "anderson_darling"):
        statistics = [each[test]["statistic"] for each in measured.values()]
        assert statistics == sorted(statistics), test
    for test in ("dagostino", "anderson_darling", "henze_zirkler"):
        rejected = [each[test]["rejected"] for each in measured.values()]
        assert rejected[0] <= 0.2, test
        assert rejected[1:] == [1, 1, 1], test
    pairs = [each["henze_zirkler"]["statistic"] for each in measured.values()]
    assert pairs[0] < min(pairs[1:3]) < max(pairs[1:3]) < pairs[3]


def test_independent_channels_share_nothing_and_copies_everything(measured):
    assert measured["gaussian"]["mutual_information"]["mean"] == pytest.approx(0, abs=0.01)
    assert measured["gaussian"]["correlation"]["mean"] < 0.05
    x = np.random.default_rng(1).normal(size=(ROWS, 1))
    copies = measure_normality(np.hstack([x, 3 * x + 2, -x]))
    assert copies["pairs"] == [[0, 1], [0, 2], [1, 2]]
    assert copies["correlation"]["each"] == pytest.approx([1, -1, -1])
    # A scaled copy falls into the same bins, a mirrored one into mirrored bins but for the values on their edges.
    assert copies["mutual_information"]["each"] == pytest.approx([1, 1, 1], abs=0.01)
    assert copies["reasons"] == {"henze_zirkler": "every channel of a pair is a multiple of the other"}
    assert adjusted_mutual_information(np.hstack([x, x])) == pytest.approx(1)
    curve = measure_normality(np.hstack([x, x**2]))  # dependent, but not correlated
    assert curve["mutual_information"]["mean"] > 0.3
    assert curve["mutual_information_uniform"]["mean"] > 0.3
    assert max(curve["correlation"]["mean"], curve["rank_correlation"]["mean"]) < 0.1


def test_one_row_far_away_neither_hides_nor_feigns_dependence():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(1000, 2))
    x[:, 1] += x[:, 0]
    independent = draw.normal(size=(1000, 2))
    plain, alone = measure_normality(x), measure_normality(independent)
    x[500, 0] = 1000
    independent[500] = 1000
    massive, feigned = measure_normality(x), measure_normality(independent)
    uniform = [each["mutual_information_uniform"]["mean"] for each in (plain, massive, alone, feigned)]
    assert uniform == pytest.approx([0.08, 0, 0, 1], abs=0.02)  # the paper's
    for name in ("mutual_information", "rank_correlation"):
        assert massive[name]["mean"] == pytest.approx(plain[name]["mean"], abs=0.01)
        assert feigned[name]["mean"] == pytest.approx(alone[name]["mean"], abs=0.01)
    assert feigned["correlation"]["mean"] > 0.9


def test_values_that_are_alike_say_nothing_by_the_order_of_rows():
    sparse = np.random.default_rng(0).normal(size=(1000, 2))
    sparse[np.random.default_rng(1).uniform(size=(1000, 2)) < 0.5] = 0
    found = measure_normality(sparse)
    assert found["mutual_information"]["mean"] == pytest.approx(0, abs=0.02)
    assert found["rank_correlation"]["each"][0] == pytest.approx(scipy.stats.spearmanr(sparse).statistic, abs=1e-12)


def test_numbers_are_those_of_scipy(measured):
    x = np.random.default_rng(0).normal(size=(ROWS, 6))
    assert measured["gaussian"]["dagostino"]["each"] == pytest.approx(scipy.stats.normaltest(x).statistic)
    plot = qq(x[:, 0])
    (theoretical, ordered), line = scipy.stats.probplot(x[:, 0])
    assert (plot["slope"], plot["intercept"], plot["r_squared"]) == pytest.approx((line[0], line[1], line[2] ** 2))
    assert len(plot["theoretical"]) == len(plot["ordered"]) == 101
    assert (plot["theoretical"][0], plot["ordered"][-1]) == (theoretical[0], ordered[-1])
    assert len(qq(x[:30, 0])["ordered"]) == 30


@pytest.mark.filterwarnings("ignore")
def test_anderson_darling_is_the_same_with_a_scipy_that_gives_critical_values(monkeypatch):
    if "method" not in scipy.stats.anderson.__doc__:
        pytest.skip("this SciPy gives nothing else")
    draw, current = np.random.default_rng(0), scipy.stats.anderson
    samples = [draw.normal(size=200) for _ in range(30)] + [draw.laplace(size=30) for _ in range(30)]
    found = [anderson_darling(sample) for sample in samples]
    monkeypatch.setattr(scipy.stats, "anderson", lambda x, dist: current(x, dist))
    assert [anderson_darling(sample) for sample in samples] == found
    assert 3 < sum(rejected for _, rejected in found) < 40


def test_samples_are_repeatable_and_bounded():
    x = torch.randn(100, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    one, two, other = (measure_normality(x, channels=8, pairs=5, seed=seed) for seed in (0, 0, 1))
    assert one == two
    assert one["pairs"] != other["pairs"]
    assert (len(one["channels"]), one["channels"][0], one["channels"][-1], len(one["pairs"])) == (8, 0, 39, 5)
    assert measure_normality(x, pairs=0)["reasons"]["henze_zirkler"] == "no two channels to pair"
    json.dumps(one, allow_nan=False)


def test_what_cannot_be_measured_is_empty_and_says_why():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    few = measure_normality(x[:19])
    assert all(few[name] is None and few["reasons"][name] == "19 rows; needs 20" for name in MEASURES)
    x[:20, 1], x[0, 0] = torch.nan, torch.inf
    assert measure_normality(x)["rows"] == 10
    assert measure_normality(torch.zeros(0, 4))["reasons"]["r_squared"] == "0 rows; needs 20"
    constant = torch.ones(30, 4)
    assert measure_normality(constant)["reasons"]["dagostino"] == "every channel is constant"
    constant[:, 2] = torch.arange(30)
    alone = measure_normality(constant)
    assert (alone["channels"], alone["constant"]) == ([2], 3)
    assert alone["dagostino"] is not None
    assert alone["reasons"]["correlation"] == "no two channels to pair"
    with pytest.raises(ValueError, match=r"sample: got shape \(4,\), must be \(rows, channels\)"):
        measure_normality(torch.ones(4))
    with pytest.raises(ValueError, match="channels: got 0, must be"):
        measure_normality(x, channels=0)


def test_channels_of_any_scale_are_measured_alike():
    x = np.random.default_rng(0).normal(size=(100, 3))
    plain, scaled = measure_normality(x), measure_normality(x * [1e200, 1e-200, 1] + [0, 0, 1e6])
    for name in MEASURES:
        assert scaled[name]["each"] == pytest.approx(plain[name]["each"], rel=1e-4, abs=1e-6), name
    coins = np.random.default_rng(0).integers(0, 2, size=(30, 2))
    json.dumps(measure_normality(np.hstack([coins, np.eye(30)[:, :1], coins[:, :1]])), allow_nan=False)


def test_one_newton_step_is_near_the_most_likely_lambda_on_rows_that_are_nearly_normal():
    draw = np.random.default_rng(0)
    normal = lambda_against_likelihood(draw.normal(size=(60, 256)))
    assert normal["correlation"] > 0.999
    assert normal["mean_absolute_error"] < 0.01
    skewed = draw.normal(size=(60, 256)) * 0.3
    skewed = lambda_against_likelihood(np.exp(skewed))
    assert normal["mean_absolute_error"] < skewed["mean_absolute_error"] < 0.1
    assert np.mean(skewed["likelihood"]) < 0.8 < np.mean(normal["likelihood"])
    row = draw.gamma(3, size=(40, 64))
    found = lambda_against_likelihood(row, rows=25)
    h = (row - row.mean(1, keepdims=True)) / np.sqrt(row.var(1, keepdims=True) + 1e-5)
    assert found["rows"] == 25
    assert found["likelihood"] == pytest.approx([scipy.stats.yeojohnson(each)[1] for each in h[:25]], abs=1e-6)
    assert lambda_against_likelihood(row, alpha=0)["reasons"] == {"correlation": "all of them are alike"}
    json.dumps(found, allow_nan=False)


def test_rows_without_a_likelihood_are_left_out():
    x = np.random.default_rng(0).normal(size=(30, 64))
    x[:4] = 1
    x[4] *= 1e-6
    found = lambda_against_likelihood(x)
    assert (found["rows"], found["skipped"]) == (25, 5)
    assert lambda_against_likelihood(x[:22])["reasons"]["newton"] == "17 rows that are not constant; needs 20"
    assert lambda_against_likelihood(x[:, :8])["reasons"]["likelihood"] == "rows of 8; needs 20"


def test_a_watched_sample_goes_straight_in():
    site = SiteStatistics(LayerNormalNorm(32), sample=300)
    site.update(torch.randn(1000, 32, generator=torch.Generator().manual_seed(0)).exp())
    x, z = site.before.sample.rows(), site.after.sample.rows()
    assert measure_normality(x)["r_squared"]["mean"] < 0.8 < measure_normality(z)["r_squared"]["mean"]
    torch.testing.assert_close(z, contract(site.norm).core(x))  # the same rows of both
    assert lambda_against_likelihood(x)["rows"] == 200


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pingouin", None)
    for function in (measure_normality, lambda_against_likelihood, qq):
        with pytest.raises(errors.UserError, match=r"^pingouin not installed: pip install 'hf_ibnorm\[analysis\]'$"):
            function(torch.zeros(30, 30))


def test_only_a_call_imports_the_extra():
    for path in Path(hf_ibnorm.analysis.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"scipy", "sklearn", "pingouin", "matplotlib"} & {name.split(".")[0] for name in names}, path
