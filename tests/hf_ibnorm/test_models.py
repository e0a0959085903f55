"""The registered models: initialization, saving and loading, and parity with the stock models they replace."""

import copy

import pytest
import torch
from helpers import FAMILIES, FAMILY, STOCK_NORM, build, shake, stock_config, stock_of, tokens
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2LMHeadModel,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_ibnorm import NORMS, IBNormGPT2Config, IBNormLlamaConfig, IBNormLlamaModel, no_decay_parameter_names
from hf_ibnorm.norms import NormBase
from hf_ibnorm.sites import is_norm

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NORMS)
def test_saved_and_loaded_is_the_same_model_to_the_bit(tiny_config, family, name, tmp_path):
    model = shake(build(tiny_config(family, norm_type=name)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cls", [AutoModel, AutoModelForSequenceClassification])
def test_the_other_auto_classes_round_trip_too(tiny_config, family, cls, tmp_path):
    model = shake(build(tiny_config(family, pad_token_id=0), cls=cls))
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path).eval()
    assert torch.equal(model(tokens())[0], loaded(tokens())[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_loads_from_a_causal_lm_checkpoint(tiny_config, family, tmp_path):
    model = shake(build(tiny_config(family)))
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(base(tokens())[0], model.base_model(tokens())[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_lam_survives_loading_on_the_meta_device_and_in_bfloat16(tiny_config, family, tmp_path):
    build(tiny_config(family, norm_type="ibnorm_t", norm_kwargs={"lam": 0.3})).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        lams = [module.lam for module in loaded.modules() if isinstance(module, NormBase)]
        assert len(lams) == 5
        assert all(lam.dtype == torch.float32 and lam.item() == torch.tensor(0.3).item() for lam in lams)
        assert loaded(tokens()).logits.dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_norm_parameters_are_initialized_not_left_as_found(tiny_config, stock_model, family, tmp_path):
    stock_model(family).save_pretrained(tmp_path)
    model = type(build(tiny_config(family))).from_pretrained(tmp_path, config=tiny_config(family, norm_type="dyt"))
    norms = [module for module in model.modules() if isinstance(module, NormBase)]
    assert all(torch.equal(norm.alpha, torch.tensor([0.5])) for norm in norms)
    if family == "llama":  # a stock GPT-2 has biases, which carry over
        assert all(torch.equal(norm.bias, torch.zeros(32)) for norm in norms)


@pytest.mark.parametrize("name", NORMS)
def test_gpt2_residual_projections_keep_their_scaled_initialization(tiny_config, name):
    model = build(tiny_config("gpt2", norm_type=name, n_layer=8, n_embd=64))
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(stock_config(model.config))  # 0.02 / 4; older releases of Transformers scale nothing
    for block, theirs in zip(model.transformer.h, stock.transformer.h, strict=True):
        assert torch.equal(block.attn.c_proj.weight, theirs.attn.c_proj.weight)
        assert torch.equal(block.mlp.c_proj.weight, theirs.mlp.c_proj.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_seed_gives_every_norm_the_same_shared_weights(tiny_config, family):
    states = [build(tiny_config(family, norm_type=name)).state_dict() for name in NORMS]
    shared = set.intersection(*(set(state) for state in states)) - {
        key for key in states[0] if "norm" in key or "ln_" in key
    }
    assert len(shared) > 8
    assert all(torch.equal(state[key], states[0][key]) for state in states for key in shared)


@pytest.mark.parametrize(("family", "name"), STOCK_NORM.items())
def test_initial_weights_are_the_stock_models(tiny_config, family, name):
    config = tiny_config(family, norm_type=name)
    torch.manual_seed(0)
    stock = stock_of(FAMILY[family].causal_lm)(stock_config(config))
    ours = build(config).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in stock.state_dict().items())


@pytest.mark.parametrize(("family", "name"), STOCK_NORM.items())
def test_with_the_stock_norm_training_follows_the_stock_model(tiny_config, family, name):
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    config = tiny_config(family, norm_type=name, **no_dropout)
    ours = build(config)
    stock = stock_of(FAMILY[family].causal_lm)(stock_config(config))
    stock.load_state_dict(ours.state_dict())
    losses = []
    for model in (ours, stock):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for step in range(50):
            loss = model(tokens(step), labels=tokens(step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-5)
    for (key, a), b in zip(ours.state_dict().items(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_holds_the_configured_norm(tiny_config, family):
    model = build(tiny_config(family, norm_type="layernormalnorm", norm_kwargs={"noise": 0.25}))
    norms = [module for module in model.modules() if is_norm(module)]
    assert len(norms) == 2 * 2 + 1
    assert all(norm.noise == 0.25 for norm in norms)


def test_gpt2_with_cross_attention_has_three_norms_a_block(tiny_config):
    model = build(tiny_config("gpt2", add_cross_attention=True, norm_type="ibnorm_t"))
    assert sum(is_norm(module) for module in model.modules()) == 3 * 2 + 1
    assert model.transformer.h[1].ln_cross_attn.variant == "T"


def test_an_unexpected_norm_site_raises(tiny_config, monkeypatch):
    original = LlamaRMSNorm

    class Changed(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.q_norm = original(config.hidden_size)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRotaryEmbedding", Changed)
    with pytest.raises(RuntimeError, match="expected 5 norms, found 6 .*rotary_emb.q_norm"):
        IBNormLlamaModel(tiny_config("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_with_noise_evaluation_is_bit_identical_twice_in_a_row(tiny_config, family):
    model = build(tiny_config(family, norm_type="layernormalnorm", norm_kwargs={"noise": 1.0}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(3):
        model(tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model(tokens()).logits, model(tokens()).logits)
    model.eval()
    assert torch.equal(model(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NORMS)
def test_no_decay_names_are_the_norms_and_the_biases(tiny_config, family, name):
    model = build(tiny_config(family, norm_type=name))
    names = set(no_decay_parameter_names(model))
    in_norms = {
        key for key, _ in model.named_parameters() if any(site in key for site in ("norm.", "layernorm.", "ln_"))
    }
    assert in_norms
    assert in_norms <= names
    assert all(("bias" in key) or key in in_norms for key in names)
    assert list(no_decay_parameter_names(model)) == sorted(names)


def test_config_resolves_every_option_and_keeps_it_through_json(tiny_config, tmp_path):
    config = tiny_config("llama", norm_type="IBNorm-T", norm_kwargs={"lam": 3}, rms_norm_eps=1e-4)
    assert config.norm_type == "ibnorm_t"
    assert config.norm_kwargs["lam"] == 3.0
    assert config.norm_kwargs["eps"] == 1e-4
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is IBNormLlamaConfig
    assert loaded.norm_kwargs == config.norm_kwargs
    assert copy.deepcopy(config).norm_kwargs == config.norm_kwargs


def test_default_norm_is_ibnorm_l():
    assert IBNormLlamaConfig().norm_type == IBNormGPT2Config().norm_type == "ibnorm_l"
    assert IBNormGPT2Config().norm_kwargs["eps"] == 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_type": "ibnrm"}, "unknown norm 'ibnrm'"),
        ({"norm_kwargs": {"lam": -2.0}}, "norm_kwargs.lam: got -2.0"),
        ({"norm_kwargs": {"lamda": 2.0}}, "did you mean 'lam'"),
        ({"norm_kind": "ibnorm_l"}, "norm_kind: no such config field"),
        ({"norm": "ibnorm_l"}, "norm: no such config field; norm fields are norm_type"),
        ({"variant": "T"}, "variant: no such config field"),
        ({"lam": 4.0}, "write norm_kwargs={'lam': ...}"),
        ({"norm_kwargs": 4.0}, "norm_kwargs"),
    ],
)
def test_bad_config_fields_are_errors_that_name_them(tiny_config, family, fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config(family, **fields)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"elementwise_affine": False}, {"bias": False}], ids=str)
def test_torch_s_norms_need_no_gain_and_no_bias(tiny_config, family, options, tmp_path):
    model = shake(build(tiny_config(family, norm_type="layernorm", norm_kwargs=options)))
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, model(tokens()).logits)
