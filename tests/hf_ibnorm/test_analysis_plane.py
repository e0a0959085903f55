"""The information plane of models: the right tokens at each site, and an empty cell where there is no estimate."""

import math

import numpy as np
import pytest
import torch
from helpers import FAMILIES, FINAL

from hf_ibnorm import apply_norm, norm_sites
from hf_ibnorm.analysis import information_plane, run_information_plane
from hf_ibnorm.analysis.show.tables import plane_table

FEW = {"resamples": 20, "shuffles": 1}


def text(rows=60, length=64, vocabulary=61):
    """Tokens of which each says something about the next."""
    random = np.random.default_rng(0)
    ids = np.zeros((rows, length), int)
    for i in range(1, length):
        ids[:, i] = (ids[:, i - 1] * 3 + random.integers(6, size=rows)) % vocabulary
    return torch.tensor(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_the_information_plane(stock_model, family):
    model = apply_norm(stock_model(family), "ibnorm_l").train()
    sites = list(norm_sites(model.base_model))
    found = information_plane(model, text(), sites=[sites[0], FINAL[family]], beta=0.5, **FEW)
    assert [(p.site, p.estimator) for p in found] == [(s, e) for s in (sites[0], sites[-1]) for e in ("renyi", "ksg")]
    for point in found:
        assert point.input.n == 2000
        assert point.ib.value == pytest.approx(point.output.value - 0.5 * point.input.value)
        assert point.ib.chance == pytest.approx(point.output.chance - 0.5 * point.input.chance)
        assert point.ib.interval[0] < point.ib.value < point.ib.interval[1]
        assert point.input.value > point.input.chance + 0.1
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    table = plane_table(found)
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_first_norm_of_a_llama_says_all_about_the_token_it_reads(stock_model):
    (point,) = information_plane(
        stock_model("llama"), text(), sites="layers.0.input_layernorm", estimators=["ksg"], **FEW
    )
    shares = np.unique(text()[:, 1:-1], return_counts=True)[1] / text()[:, 1:-1].numel()
    assert point.input.value == pytest.approx(-(shares * np.log(shares)).sum(), abs=0.05)
    # Token and next token are all there is at this site, and their information is known: log 61 - log 6 at most.
    assert 1.0 < point.output.value < math.log(61 / 6) + 0.1


def test_too_short_a_text_leaves_the_cells_empty(stock_model):
    for ids in (text(10, 30), text(2, 2)):
        points = information_plane(stock_model("gpt2"), ids, sites="ln_f", **FEW)
        ksg = next(point for point in points if point.estimator == "ksg")
        assert ksg.ib.value is None
        assert plane_table([ksg]).rows[0][-1] == f"{ksg.ib.n} samples, at least 2000 are needed"
    assert ksg.ib.n == 0


def test_the_same_positions_are_taken_from_every_model(stock_model):
    model = stock_model("llama")
    options = {"sites": "norm", "estimators": ["renyi"], "samples": 300, **FEW}
    first = information_plane(model, text(), **options)
    assert information_plane(stock_model("llama"), text(), **options) == first
    assert information_plane(model, text(), seed=1, **options) != first


def test_checkpoints_of_a_run_in_order_of_steps(stock_model, tmp_path):
    for step in (100, 0, 20):
        stock_model("llama").save_pretrained(tmp_path / f"checkpoints/step-{step}/model")
    options = {"sites": "norm", "estimators": ["renyi"], "samples": 300, **FEW}
    points = list(run_information_plane(tmp_path, text(), **options))
    assert [point.step for point in points] == [0, 20, 100]
    assert list(run_information_plane(tmp_path, text(), steps=[100, 0], **options)) == [points[0], points[2]]
    with pytest.raises(ValueError, match="steps: got 7, 30, of which there is no checkpoint; there are 0, 20, 100"):
        next(run_information_plane(tmp_path, text(), steps=[30, 20, 7]))
    with pytest.raises(ValueError, match="has no checkpoints/step-N/model"):
        next(run_information_plane(tmp_path / "checkpoints", text()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimators": ["mine"]}, "estimators: got mine, allowed are renyi, ksg"),
        ({"beta": -1.0}, "beta: got -1.0"),
        ({"samples": 0}, "samples: got 0"),
        ({"sites": "layers.9.*"}, "sites: got 'layers.9.\\*', which matches none"),
    ],
)
def test_options_that_cannot_be_are_named(stock_model, options, message):
    with pytest.raises(ValueError, match=message):
        information_plane(stock_model("llama"), text(), **options)


def test_first_and_last_positions_are_left_out(stock_model):
    model, ids = stock_model("llama"), text(30, 20)
    site = "layers.0.input_layernorm"  # what it gives at a position depends on the token there alone

    def point(ids):
        return information_plane(model, ids, sites=site, estimators=["renyi"], samples=10**6, **FEW)[0]

    with_other_first, with_other_last = ids.clone(), ids.clone()
    with_other_first[:, 0], with_other_last[:, -1] = 59, 60
    expected = point(ids)
    assert expected.input.n == expected.output.n == 30 * 18
    assert point(with_other_first) == expected
    assert point(with_other_last).input == expected.input
    assert point(with_other_last).output.value != expected.output.value  # it is what comes after the one before
