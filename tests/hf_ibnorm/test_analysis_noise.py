"""Noise robustness: exact where it can be computed by hand, the same noise for every model, and nothing left behind."""

import copy
from itertools import pairwise

import pytest
import torch
from helpers import FAMILIES, FINAL, FIRST_BLOCK, tokens
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM

from hf_ibnorm import apply_norm, norm_sites
from hf_ibnorm.analysis.noise import mean_deviations, noise_robustness, relative_change
from hf_ibnorm.sites import contract


def chain(*widths):
    """Linear layers, each followed by an RMSNorm with a gain; and those norms by name."""
    torch.manual_seed(3)
    pairs = [(nn.Linear(a, b, bias=False), nn.RMSNorm(b, eps=1e-6)) for a, b in pairwise(widths)]
    model = nn.Sequential(*(layer for pair in pairs for layer in pair)).double()
    for _, norm in pairs:
        nn.init.uniform_(norm.weight, -2, 2)
    return model, {f"norm{i}": norm for i, (_, norm) in enumerate(pairs)}


def standardized(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_zeta_is_that_of_definition_5_1():
    (model, norms), x = chain(5, 7, 4, 6), torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).double()
    found = relative_change(lambda: model(x), norms, delta=0.3, draws=3, seed=4)
    a, g, b, h, c, _ = (module.weight for module in model)

    def after(z, first):  # z of the norm before `first`
        z = standardized((z * g) @ b.T) if first == 1 else z
        return [z, standardized((z * h) @ c.T)]

    z0 = standardized(x @ a.T)
    clean = [z0, *after(z0, 1)]
    for k in (0, 1):
        generator = torch.Generator().manual_seed(4)
        n = torch.stack([torch.randn(clean[k].shape, generator=generator) for _ in range(3)]).double()
        deviation = (clean[k] - clean[k].mean(0)).abs().mean(0)  # of each unit, over all rows
        noisy = after(clean[k] + 0.3 * deviation * n, k + 1)
        for site, z in list(enumerate(noisy, 1))[k:]:
            by_draw = ((z - clean[site]).abs().sum(-1) / clean[site].abs().sum(-1)).mean(-1)
            assert found.zeta[k][site] == pytest.approx(by_draw.mean().item(), rel=1e-9)
            assert found.spread[k][site] == pytest.approx(by_draw.std().item(), rel=1e-9)
    assert [row.count(None) for row in found.zeta] == [1, 2, 3]
    assert found.scale_rows == 9


def test_moving_a_gain_into_the_weights_behind_it_changes_no_zeta(stock_model):
    model, twin = stock_model("llama"), stock_model("llama")
    for block in twin.model.layers:
        for norm, readers in (
            (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
            (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
        ):
            by = torch.linspace(0.2, 20, len(norm.weight))
            norm.weight.data *= by
            for reader in readers:
                reader.weight.data /= by
    torch.testing.assert_close(twin(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5)
    first, second = (noise_robustness(each, tokens(), draws=2).zeta for each in (model, twin))
    for ours, theirs in zip(first, second, strict=True):
        assert [each for each in ours if each] == pytest.approx([each for each in theirs if each], rel=1e-3)


def test_a_gain_of_one_more_than_the_weight_is_no_other_gain():
    config = GemmaConfig(
        **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
    )
    torch.manual_seed(0)
    model = GemmaForCausalLM(config).eval()
    found = []
    for weight in (0.0, 1.0):  # gains 1 and 2, with the weights behind them halved
        twin = copy.deepcopy(model)
        for block in twin.model.layers:
            nn.init.constant_(block.input_layernorm.weight, weight)
            for reader in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                reader.weight.data /= 1 + weight
        found.append(noise_robustness(twin, tokens(), draws=1).zeta)
    assert found[0][0][-1] > 0.01
    for ours, theirs in zip(*found, strict=True):
        assert [each for each in ours if each] == pytest.approx([each for each in theirs if each], rel=1e-3)


def test_a_site_that_does_not_run_is_left_out(stock_model):
    found = noise_robustness(stock_model("gpt2", add_cross_attention=True), tokens(), draws=1)
    assert not any("ln_cross_attn" in site for site in found.sites)
    assert len(found.sites) == 5


def test_the_scale_is_that_of_the_training_text(stock_model):
    model = stock_model("gpt2")
    own, train = noise_robustness(model, tokens(), draws=1), tokens(7)
    other = noise_robustness(model, tokens(), draws=1, scale_ids=torch.cat([train, tokens(8), train]))
    assert (own.scale_rows, other.scale_rows) == (32, 96)
    assert other.zeta != own.zeta
    site, norm = next(iter(norm_sites(model).items()))
    seen = []
    handle = norm.register_forward_hook(lambda _, args, __: seen.append(contract(norm).core(args[0]).flatten(0, 1)))
    model(train)
    handle.remove()
    expected = (seen[0] - seen[0].mean(0)).abs().mean(0)
    measured = mean_deviations([lambda: model(train[:1]), lambda: model(train[1:])], {site: norm})[site]
    torch.testing.assert_close(measured.deviation, expected.double(), rtol=1e-5, atol=1e-7)


def test_noise_of_half_a_deviation_has_the_size_that_follows():
    model, norms = chain(400, 400, 400)
    for layer in model:
        nn.init.eye_(layer.weight) if isinstance(layer, nn.Linear) else nn.init.ones_(layer.weight)
    x = torch.randn(200, 400, generator=torch.Generator().manual_seed(2)).double()
    found = relative_change(lambda: model(x), norms, delta=0.01, draws=4)
    # E|s·n| = s·sqrt(2/π), and of Gaussian units the mean absolute deviation is the mean absolute value.
    assert found.zeta[0][1] == pytest.approx(0.01 * (2 / torch.pi) ** 0.5, rel=0.02)


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_where_the_values_are_zero_or_not_finite_there_is_no_relative_change(weight):
    model, norms = chain(4, 4, 4)
    nn.init.constant_(model[2].weight, weight)
    found = relative_change(lambda: model(torch.randn(3, 4).double()), norms, delta=1, draws=2)
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
