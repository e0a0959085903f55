"""Streaming statistics: against NumPy over all the data at once, however it is cut, and without a look at a value."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch

from hf_ibnorm.analysis import Covariance, Histogram, Moments, QuantileSketch, RowSample, RowStatistics


@pytest.fixture(scope="module")
def million():
    """A million rows of three channels, skewed, heavy-tailed and uniform, their means far from 0."""
    draw = np.random.default_rng(0)
    return np.stack([draw.exponential(size=10**6), draw.laplace(5, size=10**6), draw.uniform(4, 6, 10**6)], 1)


def uneven(rows):
    """Chunks of very different sizes, two of one row and one of none among them."""
    cuts = [0, 1, 1, 2, 700, 701, 20_000, 500_000, len(rows)]
    return [rows[a:b] for a, b in pairwise(cuts)]


def streamed(statistics, rows):
    for chunk in uneven(torch.as_tensor(rows)):
        statistics.update(chunk)
    return statistics


def expected_moments(x):
    return [x.mean(0), x.var(0), scipy.stats.skew(x), scipy.stats.kurtosis(x)]


def found_moments(moments):
    return [moments.mean, moments.variance, moments.skewness, moments.excess_kurtosis]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_moments_of_a_million_samples_in_uneven_chunks_are_those_of_numpy(million, dtype, error):
    moments = streamed(Moments(3, dtype=dtype), million)
    assert moments.count == len(million)
    for found, expected in zip(found_moments(moments), expected_moments(million), strict=True):
        np.testing.assert_allclose(found.double(), expected, rtol=error, atol=error)
    for found, expected in zip(found_moments(moments.pooled()), expected_moments(million.reshape(-1)), strict=True):
        np.testing.assert_allclose(found.double().item(), expected, rtol=error, atol=error)


def test_merged_moments_are_those_of_the_whole(million):
    whole, parts = Moments(3), [Moments(3) for _ in range(3)]
    whole.update(torch.as_tensor(million))
    for part, rows in zip(parts, np.split(million, [10, 400_000]), strict=True):
        part.update(torch.as_tensor(rows))
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    parts[0].merge(Moments(3))
    for found, expected in zip(found_moments(parts[0]), found_moments(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_a_large_mean_costs_no_digits():
    x = torch.randn(10_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    here, away = streamed(Moments(2), x), streamed(Moments(2), x + 1e6)
    for found, expected in zip(found_moments(away)[1:], found_moments(here)[1:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_left_out_and_counted(bad):
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    spoiled = torch.cat([x, x[:3]])
    spoiled[50:, 1] = bad
    clean, found = Moments(4), Moments(4)
    clean.update(x)
    found.update(spoiled)
    assert (found.count, found.skipped) == (50, 3)
    torch.testing.assert_close(found_moments(found), found_moments(clean))
    covariance, sample = Covariance(4), RowSample(60, 4)
    covariance.update(spoiled)
    sample.update(spoiled)
    assert covariance.scatter.isfinite().all()
    assert len(sample.rows()) == 50
    sketch = QuantileSketch()
    sketch.update(spoiled)
    assert sketch.skipped == 3


def test_what_cannot_be_known_is_nan():
    nothing, constant = Moments(2), Moments(2)
    constant.update(torch.ones(9, 2))
    assert nothing.variance.isnan().all()
    assert constant.variance.eq(0).all()
    assert constant.excess_kurtosis.isnan().all()
    assert QuantileSketch().quantile(0.5).isnan()
    assert Covariance(3).effective_rank().isnan()


def test_another_width_is_refused():
    with pytest.raises(ValueError, match=r"x: got shape \(5, 3\), the last dimension must be 4"):
        Moments(4).update(torch.zeros(5, 3))


def test_covariance_and_effective_rank_are_those_of_numpy(million):
    rows = million[:20_000] @ np.array([[1.0, 0.5, 0.1], [0.0, 1.0, 0.2], [0.0, 0.0, 3.0]])
    covariance, half = Covariance(3), Covariance(3)
    covariance.update(torch.as_tensor(rows[:7]))
    half.update(torch.as_tensor(rows[7:]))
    covariance.merge(half)
    np.testing.assert_allclose(covariance.scatter / len(rows), np.cov(rows.T, bias=True), rtol=1e-4)
    shares = np.linalg.eigvalsh(np.cov(rows.T))
    shares /= shares.sum()
    assert float(covariance.effective_rank()) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


def test_effective_rank_of_known_data():
    x = torch.randn(50_000, 8, generator=torch.Generator().manual_seed(0))
    white, line = Covariance(8), Covariance(8)
    white.update(x + 100)
    line.update(x[:, :1].expand(-1, 8))
    assert float(white.effective_rank()) == pytest.approx(8, abs=0.01)
    assert float(line.effective_rank()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("error", [0.01, 0.05])
def test_quantiles_are_within_the_stated_error(million, error):
    values = np.concatenate([million[:100_000, 0] ** 9, -million[:50_000, 1] * 1e-6, np.zeros(1000)])
    shares = [0.0, 0.001, 0.1, 0.25, 0.33, 0.5, 0.75, 0.99, 0.9999, 1.0]
    found = streamed(QuantileSketch(error), values.astype(np.float32)).quantile(shares)
    expected = np.quantile(values.astype(np.float32), shares, method="inverted_cdf")
    np.testing.assert_allclose(found, expected, rtol=error + 1e-5, atol=1e-12)


def test_a_sketch_clamps_what_is_beyond_its_range():
    sketch = QuantileSketch()
    sketch.update(torch.tensor([-1e30, 1e-30, 1e30]))
    np.testing.assert_allclose(sketch.quantile([0.1, 0.5, 1.0]), [-1e12, 0.0, 1e12], rtol=0.02)


def test_a_merged_sketch_is_that_of_the_whole(million):
    whole, one, two = QuantileSketch(), QuantileSketch(), QuantileSketch()
    whole.update(torch.as_tensor(million))
    one.update(torch.as_tensor(million[:7]))
    two.update(torch.as_tensor(million[7:]))
    one.merge(two)
    assert torch.equal(one.counts, whole.counts)


def test_a_histogram_is_that_of_numpy():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x[:2] = torch.tensor([-1.0, 1.0])  # on the ends
    histogram = Histogram(-1, 1, 8)
    histogram.update(torch.cat([x, torch.tensor([torch.nan])]))
    counts, edges = np.histogram(x.numpy(), 8, (-1, 1))
    assert histogram.inside.tolist() == counts.tolist()
    assert histogram.edges == pytest.approx(edges)
    assert (histogram.below, histogram.above, histogram.skipped) == ((x < -1).sum(), (x > 1).sum(), 1)


def test_row_statistics_leave_out_what_a_row_does_not_have():
    one, two = RowStatistics(("a", "b")), RowStatistics(("a", "b"))
    one.update(a=torch.tensor([1.0, torch.nan, 5.0]), b=torch.full((3,), torch.nan))
    two.update(a=torch.tensor([-3.0]), b=torch.tensor([torch.nan]))
    two.update(a=torch.zeros(0), b=torch.zeros(0))
    one.merge(two)
    read = one.read()
    assert read["a"] == {"rows": 3, "mean": 1, "least": -3, "most": 5}
    assert read["b"]["rows"] == 0
    assert np.isnan([read["b"]["mean"], read["b"]["least"], read["b"]["most"]]).all()


def test_a_sample_is_uniform_whatever_the_chunks():
    rows = torch.arange(50_000.0)[:, None]
    sample, cut = RowSample(1000, 1), RowSample(1000, 1)
    sample.update(rows)
    for chunk in rows.split(333):
        cut.update(chunk)
    assert torch.equal(sample.rows(), cut.rows())
    kept = sample.rows()[:, 0].long()
    assert len(kept.unique()) == 1000
    # By place in the text, and by place in a block of it: uniform as far as a chi-squared test can see.
    for parts in (kept // 5000, kept % 16, kept % 10):
        assert scipy.stats.chisquare(parts.bincount()).pvalue > 0.01
    other = RowSample(1000, 1, seed=1)
    other.update(rows)
    assert len(np.intersect1d(other.rows(), sample.rows())) < 50
    other.merge(sample)
    assert other.seen == 100_000
    assert len(other.rows()) == 1000


def test_a_sample_of_fewer_rows_holds_them_all():
    sample = RowSample(100, 2)
    sample.update(torch.arange(10.0).view(5, 2))
    assert sorted(sample.rows()[:, 0].tolist()) == [0, 2, 4, 6, 8]


def every_kind(width=6, device="cpu"):
    kinds = [Moments, Covariance, lambda width, device: RowSample(10, width, device)]
    return [
        *(kind(width, device) for kind in kinds),
        QuantileSketch(device=device),
        Histogram(-1, 1, 5, device),
    ]


def tensors(statistics):
    return {name: value for name, value in vars(statistics).items() if isinstance(value, torch.Tensor)}


def test_memory_is_flat():
    for statistics in every_kind():
        statistics.update(torch.randn(3, 6))
        before = {name: value.shape for name, value in tensors(statistics).items()}
        for _ in range(20):
            statistics.update(torch.randn(2, 50, 6))
        assert {name: value.shape for name, value in tensors(statistics).items()} == before


def test_nothing_looks_at_a_value():
    """On the meta device there are no values: whatever needs one fails there as it would wait on a GPU."""
    for statistics, other in zip(every_kind(device="meta"), every_kind(device="meta"), strict=True):
        statistics.update(torch.empty(2, 50, 6, device="meta", dtype=torch.bfloat16))
        statistics.merge(other)
        assert all(value.is_meta for value in tensors(statistics).values())
    rows = RowStatistics(("a",), "meta")
    rows.update(a=torch.empty(4, device="meta"))
    rows.merge(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_a_gpu():
    states, x = every_kind(device="cuda"), torch.randn(2, 50, 6, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for statistics in states:
            statistics.update(x)
            statistics.merge(statistics)
    finally:
        torch.cuda.set_sync_debug_mode("default")
