"""Noise robustness: exact where it can be computed by hand, the same noise for every model, and nothing left behind."""

from itertools import pairwise

import pytest
import torch
from helpers import FAMILIES, FINAL, FIRST_BLOCK, tokens
from torch import nn

from hf_ibnorm import apply_norm, norm_sites
from hf_ibnorm.analysis.noise import noise_robustness, relative_change


def chain(*widths):
    torch.manual_seed(3)
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    return nn.Sequential(*layers).double()


def test_zeta_of_a_linear_chain_is_that_of_the_noise_times_the_weights():
    model, x = chain(5, 7, 4, 6), torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).double()
    found = relative_change(lambda: model(x), dict(model.named_children()), delta=0.3, draws=3, seed=4)
    a, b, c = (layer.weight for layer in model)
    h = [x @ a.T, x @ a.T @ b.T, x @ a.T @ b.T @ c.T]
    for k, maps in enumerate([[b.T, b.T @ c.T], [c.T]]):
        generator = torch.Generator().manual_seed(4)
        n = torch.stack([torch.randn(h[k].shape, generator=generator) for _ in range(3)]).double()
        deviation = (h[k] - h[k].mean(-1, keepdim=True)).abs().mean(-1, keepdim=True)
        for later, weights in enumerate(maps, k + 1):
            by_draw = (0.3 * deviation * n @ weights).abs().sum((1, 2)) / h[later].abs().sum()
            assert found.zeta[k][later] == pytest.approx(by_draw.mean().item(), rel=1e-12)
            assert found.spread[k][later] == pytest.approx(by_draw.std().item(), rel=1e-10)
    assert [row.count(None) for row in found.zeta] == [1, 2, 3]


def test_zeta_of_scaled_identities_is_the_relative_size_of_the_noise():
    model, x = nn.Sequential(*[nn.Linear(400, 400, bias=False) for _ in range(3)]), torch.randn(50, 400)
    for layer in model:
        nn.init.eye_(layer.weight)
    found = relative_change(lambda: model(x), dict(model.named_children()), delta=0.5, draws=4)
    # E|s·n| = s·sqrt(2/π), and of Gaussian rows the mean absolute deviation is the mean absolute value.
    assert found.zeta[0][2] == pytest.approx(0.5 * (2 / torch.pi) ** 0.5, rel=0.02)
    assert found.zeta[0][1] == found.zeta[0][2] == found.zeta[1][2]


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_where_the_output_is_zero_or_not_finite_there_is_no_relative_change(weight):
    model = chain(4, 4, 4)
    nn.init.constant_(model[1].weight, weight)
    found = relative_change(lambda: model(torch.randn(3, 4).double()), dict(model.named_children()), delta=1, draws=2)
    assert found.zeta == ((None, None), (None, None))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", [None, "ibnorm_l", "layernormalnorm"])
def test_every_later_site_of_a_model_is_reached(stock_model, family, norm):
    model = stock_model(family)
    if norm:
        apply_norm(model, norm)
    found = noise_robustness(model, tokens(), delta=0.1, draws=2)
    assert list(found.sites) == list(norm_sites(model.base_model))
    for i, row in enumerate(found.zeta):
        assert all(value is None for value in row[: i + 1])
        assert all(0 < value < 1 for value in row[i + 1 :])


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_in_the_order_the_model_runs_them(stock_model, family):
    model, seen = stock_model(family), []
    for site, norm in norm_sites(model.base_model).items():
        norm.register_forward_hook(lambda *_, site=site: seen.append(site))
    sites = noise_robustness(model, tokens(), delta=0.1, draws=1).sites
    seen.clear()
    model(tokens())
    assert list(sites) == seen


def test_no_noise_changes_nothing(stock_model):
    found = noise_robustness(stock_model("llama"), tokens(), delta=0.0, draws=2)
    assert {value for row in found.zeta for value in row} == {0.0, None}


def test_the_same_seed_gives_the_same_noise_to_another_model_and_with_fewer_sites(stock_model):
    model, twin = stock_model("gpt2"), stock_model("gpt2")
    torch.rand(5)
    first = noise_robustness(model, tokens(), delta=0.1, draws=2)
    assert noise_robustness(twin, tokens(), delta=0.1, draws=2) == first
    assert noise_robustness(twin, tokens(), delta=0.1, draws=2, seed=1) != first
    two = noise_robustness(model, tokens(), delta=0.1, draws=2, sites=["h.0.ln_1", FINAL["gpt2"]])
    assert two.zeta[0][1] == first.zeta[0][-1]


def test_the_model_is_left_as_it_was(stock_model):
    model = stock_model("gpt2", embd_pdrop=0.5).train()
    model.transformer.h[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state, random = {name: p.clone() for name, p in model.state_dict().items()}, torch.get_rng_state()
    found = noise_robustness(model, tokens(), delta=0.1, draws=2)
    assert found == noise_robustness(model.eval(), tokens(), delta=0.1, draws=2)  # without dropout both times
    model.train().transformer.h[1].eval()
    noise_robustness(model, tokens(), delta=0.1, draws=1)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_hooks_and_mode_are_put_back_after_a_failure(stock_model):
    model = stock_model("llama").train()
    with pytest.raises(IndexError):
        noise_robustness(model, torch.full((1, 4), 10_000), delta=0.1)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_bfloat16_models_stay_in_bfloat16(stock_model):
    found = noise_robustness(stock_model("llama").bfloat16(), tokens(), delta=0.1, draws=2)
    assert 0 < found.zeta[0][-1] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "norm"}, "sites: got norm; must be two or more"),
        ({"sites": "layers.9.*"}, "sites: got 'layers.9.\\*', which matches none of layers.0.input_layernorm"),
        ({"delta": -1.0}, "delta: got -1.0, must be a finite number >= 0"),
        ({"delta": float("nan")}, "delta: got nan"),
        ({"draws": 0}, "draws: got 0, must be a finite number >= 1"),
    ],
)
def test_bad_input_is_named(stock_model, options, message):
    with pytest.raises(ValueError, match=message):
        noise_robustness(stock_model("llama"), tokens(), **{"delta": 0.1, **options})


def test_table(stock_model):
    found = noise_robustness(stock_model("llama"), tokens(), delta=0.1, draws=1, sites=[FIRST_BLOCK["llama"], "norm"])
    table = found.table()
    assert table.columns == ["noise at", *found.sites]
    assert table.rows[0] == [found.sites[0], "", f"{found.zeta[0][1]:.4f}", f"{found.zeta[0][2]:.4f}"]
