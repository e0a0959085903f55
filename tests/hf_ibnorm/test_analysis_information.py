"""Estimates of information: known answers, what must not change them, and no number where there is none."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.special import digamma

from hf_ibnorm.analysis import ksg_information, renyi_information

RHO = (0.0, 0.5, 0.9, 0.99)
FEW = {"resamples": 20, "shuffles": 1}


def gaussians(rho, n=2000, d=1, seed=0):
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, d))
    return x, rho * x + math.sqrt(1 - rho**2) * random.standard_normal((n, d))


def mixture(classes, sigma, n=2000, d=1, seed=0):
    """Labels, and points around a mean for each label."""
    random = np.random.default_rng(seed)
    means, labels = random.standard_normal((classes, d)), random.integers(classes, size=n)
    return labels, means[labels] + sigma * random.standard_normal((n, d)), means


@pytest.mark.parametrize("rho", RHO)
def test_ksg_of_correlated_gaussians_is_within_its_tolerance(rho):
    found = ksg_information(*gaussians(rho), **FEW)
    assert found.value == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.05)
    assert found.interval[0] < found.value < found.interval[1]
    assert abs(found.chance) < 0.05


@pytest.mark.parametrize(("rho", "bias"), zip(RHO, (0.01, -0.08, -0.64, -2.84), strict=True))
def test_ksg_in_four_dimensions_has_the_bias_that_is_stated(rho, bias):
    found = ksg_information(*gaussians(rho, d=4), **FEW)
    assert found.value - (-2 * math.log(1 - rho**2)) == pytest.approx(bias, abs=0.08)


@pytest.mark.parametrize(("estimate", "n"), [(ksg_information, 2000), (renyi_information, 600)])
def test_intervals_are_as_wide_as_estimates_from_new_samples_scatter(estimate, n):
    found = [estimate(*gaussians(0.5, n, seed=seed), resamples=30, shuffles=1) for seed in range(20)]
    implied = np.mean([high - low for low, high in (each.interval for each in found)]) / (2 * 1.96)
    assert 0.6 < implied / np.std([each.value for each in found], ddof=1) < 1.7


def test_ksg_projects_onto_the_directions_that_vary_most():
    x, y = gaussians(0.9, d=2)
    wide = np.hstack([x, 1e-3 * np.random.default_rng(1).standard_normal((2000, 30))]) @ rotation(32)
    assert ksg_information(wide[:, :], y, **FEW).value > 0.5


def rotation(d):
    return np.linalg.qr(np.random.default_rng(2).standard_normal((d, d)))[0]


@pytest.mark.parametrize("sigma", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("d", [1, 4])
def test_ksg_of_labels_is_that_of_the_mixture(sigma, d):
    labels, points, means = mixture(4, sigma, d=d)
    # I = mean of log p(t|y) / p(t) over many draws of the mixture itself
    many, t, _ = mixture(4, sigma, n=100_000, d=d)
    log = -((t[:, None] - means) ** 2).sum(-1) / (2 * sigma**2)
    truth = np.mean(log[np.arange(len(t)), many] - np.logaddexp.reduce(log, axis=1) + math.log(4))
    found = ksg_information(points, labels, **FEW)
    assert found.value == pytest.approx(truth, abs=0.06)
    assert ksg_information(labels, points, **FEW) == found


def test_ksg_of_points_that_are_the_label_is_its_entropy():
    labels = np.random.default_rng(0).integers(8, size=4000)
    found = ksg_information(rotation(8)[labels], labels, **FEW)
    assert found.value == pytest.approx(math.log(8), abs=0.01)


def test_ksg_takes_rare_labels_for_one_and_so_stays_below_the_truth():
    labels, points, _ = mixture(1500, 0.01, d=4)
    assert 0 < ksg_information(points, labels, **FEW).value < math.log(1500)


def test_renyi_grows_with_correlation_from_nearly_nothing():
    values = [renyi_information(*gaussians(rho, n=1000), **FEW) for rho in RHO]
    assert values[0].value == pytest.approx(0, abs=0.01)
    assert values[0].chance == pytest.approx(0, abs=0.01)
    assert [each.value for each in values] == sorted(each.value for each in values)
    assert all(later.interval[0] > earlier.interval[1] for earlier, later in pairwise(values))


def test_renyi_of_labels_with_themselves_is_their_collision_entropy():
    labels = np.random.default_rng(0).choice(3, p=[0.5, 0.3, 0.2], size=1000)
    shares = np.bincount(labels) / 1000
    found = renyi_information(labels, labels, **FEW)
    assert found.value == pytest.approx(-math.log((shares**2).sum()), abs=1e-9)


def test_renyi_is_the_definition_computed_slowly():
    x, y = gaussians(0.7, n=200, d=3)
    labels = (y[:, 0] > 0).astype(int)
    squares = ((x[:, None] - x) ** 2).sum(-1)
    sigma = np.sqrt(np.sort(squares, axis=None)[200 * 200 // 2])
    a = np.exp(-squares / (2 * sigma**2)) / 200
    b = (labels[:, None] == labels) / 200

    def entropy(matrix):
        return -math.log((np.linalg.eigvalsh(matrix) ** 2).sum())

    joint = a * b / np.trace(a * b)
    expected = entropy(a) + entropy(b) - entropy(joint)
    assert renyi_information(x, labels, **FEW).value == pytest.approx(expected, rel=1e-5)


def test_ksg_is_the_formula_computed_from_all_distances():
    x, y = gaussians(0.7, d=2)
    apart = [abs(each[:, None] - each).max(-1) for each in (x / x.std(0), y / y.std(0))]
    radii = np.sort(np.maximum(*apart))[:, [3]]
    n_x, n_y = ((each < radii).sum(1) - 1 for each in apart)
    expected = digamma(3) + digamma(2000) - (digamma(n_x + 1) + digamma(n_y + 1)).mean()
    assert ksg_information(x, y, **FEW).value == pytest.approx(expected, rel=1e-9)


def test_ksg_of_labels_is_the_formula_computed_label_by_label():
    labels, points, means = mixture(300, 0.1, d=3)
    points[labels == 0] = means[0]  # equal samples
    points /= points.std(0)
    counts = np.bincount(labels)[labels]
    merged, tree = np.where(counts > 3, labels, -1), cKDTree(points)
    terms = []
    for point, label in zip(points, merged, strict=True):
        alike = cKDTree(points[merged == label])
        radius = alike.query(point, 4, p=np.inf)[0][-1]
        near, around = (len(each.query_ball_point(point, radius, p=np.inf)) - 1 for each in (alike, tree))
        terms.append(digamma(2000) - digamma(alike.n) + digamma(near) - digamma(around))
    assert ksg_information(points, labels, **FEW).value == pytest.approx(np.mean(terms), rel=1e-9)


def test_renyi_finds_what_labels_and_points_share_and_little_where_there_is_nothing():
    near, nothing = (renyi_information(*mixture(20, sigma, d=16)[:2], **FEW) for sigma in (0.2, 1e6))
    assert near.value > 0.5
    assert nothing.value == pytest.approx(nothing.chance, abs=0.01)
    assert nothing.interval[0] < nothing.value < nothing.interval[1]  # which a bootstrap's would not


@pytest.mark.parametrize("estimate", [ksg_information, renyi_information])
def test_order_of_samples_scale_and_place_do_not_matter(estimate):
    x, y = gaussians(0.8, d=2)
    value = estimate(x, y, **FEW).value
    order = np.random.default_rng(3).permutation(len(x))
    assert estimate(x[order], y[order], **FEW).value == pytest.approx(value, abs=1e-6)
    assert estimate(1e3 * x - 5, -y / 7, **FEW).value == pytest.approx(value, abs=1e-6)
    assert estimate(y, x, **FEW).value == pytest.approx(value, abs=1e-6)


def test_ksg_does_not_depend_on_the_scale_of_single_columns():
    x, y = gaussians(0.8, d=3)
    scaled = ksg_information(x * [1.0, 50.0, 0.02], y, **FEW)
    assert scaled.value == pytest.approx(ksg_information(x, y, **FEW).value, abs=1e-9)


@pytest.mark.parametrize("estimate", [ksg_information, renyi_information])
def test_the_same_seed_gives_the_same_interval(estimate):
    x, y = gaussians(0.5)
    assert estimate(x, y, **FEW) == estimate(x, y, **FEW)
    assert estimate(x, y, seed=1, **FEW).interval != estimate(x, y, **FEW).interval


@pytest.mark.parametrize(
    ("estimate", "x", "y", "reason"),
    [
        (ksg_information, *gaussians(0.9, n=1999), "1999 samples, at least 2000 are needed"),
        (renyi_information, *gaussians(0.9, n=3), "3 samples, at least 200 are needed"),
        (renyi_information, np.zeros((0, 2)), np.zeros((0, 2)), "0 samples"),
        (ksg_information, np.ones((2000, 6)), gaussians(0)[1], "does not vary"),
        (renyi_information, np.full((2000, 6), 0.1), gaussians(0)[1], "does not vary"),
        (renyi_information, gaussians(0)[0], np.ones(2000, int), "does not vary"),
        (ksg_information, gaussians(0)[0], np.arange(2000), "no two labels that occur more than 3 times"),
        (ksg_information, *(np.repeat(each, 5, 0) for each in gaussians(0.5)), "occurs more than 3 times"),
        (ksg_information, gaussians(0)[0], np.full((2000, 1), np.nan), "not finite"),
    ],
)
def test_where_there_is_nothing_to_go_by_there_is_no_number_but_a_reason(estimate, x, y, reason):
    found = estimate(x, y, **FEW)
    assert (found.value, found.interval, found.chance, found.n) == (None, None, None, len(x))
    assert reason in found.reason
    assert str(found) == ""


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (np.zeros((9, 2)), np.zeros((8, 2)), {}, "y: got float64 of shape \\(8, 2\\)"),
        (np.zeros((9, 2, 1)), np.zeros(9), {}, "x: got float64 of shape \\(9, 2, 1\\)"),
        (np.zeros(9, int), np.zeros(9, int), {}, "labels on both sides"),
        (*gaussians(0), {"resamples": 5}, "resamples: got 5, must be a finite number >= 20"),
    ],
)
def test_bad_input_is_named(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        ksg_information(x, y, **options)
