"""λ as a schedule changes it (`set_lam`) and as a model learns it (`learn_lam`)."""

import math

import numpy as np
import peft
import pytest
import torch
from helpers import FAMILIES, FINAL, build, shake, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from hf_ibnorm import IBNorm, apply_norm, build_norm, no_decay_parameter_names, norm_sites, set_lam
from hf_ibnorm.functional import compress


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("learned", [False, True])
def test_a_checkpoint_in_the_middle_of_a_ramp_reloads_right(tiny_config, family, learned, tmp_path):
    options = {"lam": 4.0, "learn_lam": learned}
    model = shake(
        build(
            tiny_config(
                family,
                norm_type="ibnorm_l",
                norm_kwargs=options,
                norm_overrides=[["*.1.*", "dyt"], [FINAL[family], {"type": "ibnorm_t", "kwargs": options}]],
            )
        )
    )
    before = model(tokens()).logits
    set_lam(model, 0.7)
    assert not torch.equal(model(tokens()).logits, before)
    assert model.config.norm_kwargs["lam"] == model.config.norm_overrides[1][1]["kwargs"]["lam"] == 0.7
    assert "lam" not in model.config.norm_overrides[0][1]["kwargs"]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    lams = [norm.current_lam().item() for norm in loaded.modules() if isinstance(norm, IBNorm)]
    assert lams == pytest.approx([0.7] * 3, rel=1e-6)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_set_lam_reaches_through_wrappers_and_patched_models(stock_model):
    model = apply_norm(stock_model("llama"), "ibnorm_t")
    for wrapped in (peft.get_peft_model(model, peft.LoraConfig()), nn.DataParallel(model), torch.compile(model)):
        set_lam(wrapped, 0.25)
        assert {norm.lam.item() for norm in norm_sites(model).values()} == {0.25}
        assert model.config.norm_kwargs["lam"] == 0.25
        set_lam(wrapped, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_lam_of_a_part_is_saved_with_that_part(tiny_config, family, tmp_path):
    model = shake(build(tiny_config(family)))
    first, *_, last = norm_sites(model).values()
    first.set_lam(1.0)
    set_lam(last, 2.0)
    assert model.config.norm_kwargs["lam"] == 4.0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [norm.lam.item() for norm in norm_sites(loaded).values()] == [1.0, 4.0, 4.0, 4.0, 2.0]
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_set_lam_works_on_a_module_without_config():
    layers = nn.Sequential(IBNorm(4), nn.Linear(4, 4), IBNorm(4, variant="T"))
    set_lam(layers, np.float32(3))
    assert [layers[0].lam.item(), layers[2].lam.item()] == [3.0, 3.0]
    assert "lam=3.0" in repr(layers[0])
    set_lam(layers[0], 0)
    torch.testing.assert_close(layers[0](torch.eye(4)), nn.LayerNorm(4, eps=1e-6)(torch.eye(4)))


@pytest.mark.parametrize(
    ("value", "message"), [(0.5, r"lam: got 0.5.*>= 1 and .*\(variant S, 1\)"), (-1, "-1"), ("2", "'2'")]
)
def test_a_value_that_one_norm_cannot_take_changes_none(value, message):
    layers = nn.Sequential(IBNorm(4), IBNorm(4, variant="S"))
    with pytest.raises((ValueError, TypeError), match=message):
        set_lam(layers, value)
    assert [layer.lam.item() for layer in layers] == [4.0, 4.0]


def test_a_model_without_ibnorm_has_no_lam_to_set(tiny_config):
    with pytest.raises(ValueError, match="model: IBNormLlamaForCausalLM has no IBNorm"):
        set_lam(build(tiny_config("llama", norm_type="dyt")), 1.0)


@pytest.mark.parametrize("name", ["ibnorm_l", "ibnorm_t", "ibnorm_shrink"])
def test_a_learned_lam_starts_at_lam_gets_gradients_and_stays_allowed(name):
    norm = build_norm(name, 8, lam=0.5, learn_lam=True)
    assert norm.theta.shape == (1,)
    assert norm.current_lam().item() == pytest.approx(0.5, rel=1e-6)
    fixed = build_norm(name, 8, lam=0.5)
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    torch.testing.assert_close(norm(x), fixed(x))
    optimizer = torch.optim.SGD([norm.theta], lr=100.0)
    for sign in (1, -1):
        for _ in range(20):
            optimizer.zero_grad()
            (sign * norm(x).pow(4).mean()).backward()
            optimizer.step()
            assert 0 <= norm.current_lam().item() < (1.0001 if name == "ibnorm_shrink" else math.inf)
        assert torch.isfinite(norm(x)).all()
    assert abs(norm.current_lam().item() - 0.5) > 0.01
    assert f"lam={norm.lam_shown}," in repr(norm)
    assert norm.lam_shown == pytest.approx(norm.current_lam().item(), abs=1e-4)


@pytest.mark.parametrize("lam", [1e-4, 0.01, 1.0, 30.0, 2000.0])
def test_any_lam_can_be_the_start_of_learning(lam):
    assert build_norm("ibnorm_l", 8, lam=lam, learn_lam=True).current_lam().item() == pytest.approx(lam, rel=1e-4)


@pytest.mark.parametrize("variant", ["L", "T"])
@pytest.mark.parametrize("lam", [1e-6, 1e-4, 1e-2, 0.3, 4.0])
def test_the_derivative_in_lam_keeps_its_digits_in_float32(variant, lam):
    torch.manual_seed(0)
    c = torch.randn(500)

    def derivative(dtype):
        value = torch.tensor([lam], dtype=dtype)
        return torch.autograd.functional.jacobian(lambda v: compress(c.to(dtype), variant=variant, lam=v), value)[:, 0]

    wide = derivative(torch.float64)
    assert (derivative(torch.float32) - wide).norm() < 3e-6 * wide.norm()
    u = lam * c.double()
    if lam >= 1e-2:  # below, the closed forms lose their digits even in float64
        closed = (
            c.sign() * (c.abs() / (lam * (1 + u.abs())) - torch.log1p(u.abs()) / lam**2)
            if variant == "L"
            else c * (1 - torch.tanh(u) ** 2) / lam - torch.tanh(u) / lam**2
        )
        torch.testing.assert_close(wide, closed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["L", "T"])
def test_learned_and_fixed_lam_give_the_same_compression(variant):
    c = torch.linspace(-30, 30, 2001, dtype=torch.float64)
    for lam in (1e-3, 0.5, 4.0, 50.0):
        learned = compress(c, variant=variant, lam=torch.tensor([lam], dtype=torch.float64))
        torch.testing.assert_close(learned, compress(c, variant=variant, lam=lam), rtol=1e-14, atol=1e-15)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert torch.equal(compress(c, variant=variant, lam=zero), c)
    (slope,) = torch.autograd.grad(compress(c, variant=variant, lam=zero).sum(), zero)
    assert torch.isfinite(slope)


def test_learn_lam_is_refused_where_it_means_nothing():
    with pytest.raises(ValueError, match="learn_lam: got True with variant 'S'"):
        IBNorm(4, variant="S", learn_lam=True)
    with pytest.raises(ValueError, match="lam: got 0, must be > 0 with learn_lam"):
        IBNorm(4, lam=0, learn_lam=True)
    norm = IBNorm(4, learn_lam=True)
    with pytest.raises(ValueError, match="must be > 0"):
        set_lam(norm, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_learned_lam_is_trained_saved_and_spared_from_decay(tiny_config, family, tmp_path):
    model = build(tiny_config(family, norm_type="ibnorm_l", norm_kwargs={"learn_lam": True, "lam": 2.0}))
    thetas = [name for name, _ in model.named_parameters() if name.endswith("theta")]
    assert len(thetas) == 5
    assert set(thetas) <= set(no_decay_parameter_names(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    learned = [norm.current_lam().item() for norm in norm_sites(model).values()]
    assert max(abs(lam - 2.0) for lam in learned) > 1e-2
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [norm.current_lam().item() for norm in norm_sites(loaded).values()] == learned
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
