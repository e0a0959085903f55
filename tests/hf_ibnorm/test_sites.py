"""Norms are found in a model and identified by what they compute; one mixin serves architectures of any shape."""

import sys

import pytest
import torch
from helpers import shake, tokens
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.opt.modeling_opt import OPTDecoder, OPTModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hf_ibnorm.configuration_ibnorm import DEFAULT_NORM, NormConfigMixin
from hf_ibnorm.modeling_ibnorm import NormModelMixin, site_kinds
from hf_ibnorm.norms import build_norm
from hf_ibnorm.sites import PINS, Formula, contract, discover, identify

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}
QWEN3 = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("make", "formula"),
    [
        (lambda: nn.LayerNorm(8, eps=1e-3), Formula("layernorm", "w", 1e-3)),
        (lambda: nn.LayerNorm(8, bias=False), Formula("layernorm", "w", 1e-5)),
        (lambda: nn.LayerNorm(8, elementwise_affine=False), Formula("layernorm", "", 1e-5)),
        (lambda: nn.RMSNorm(8), Formula("rmsnorm", "w", torch.finfo(torch.float32).eps)),
        (lambda: LlamaRMSNorm(8, eps=1e-4), Formula("rmsnorm", "w", 1e-4)),
        (lambda: GemmaRMSNorm(8, eps=1e-4), Formula("rmsnorm", "1+w", 1e-4)),
        (lambda: T5LayerNorm(8), Formula("rmsnorm", "w", 1e-6)),
        (lambda: CohereLayerNorm(8), Formula("layernorm", "w", 1e-5)),
        (lambda: NemotronLayerNorm1P(8), Formula("layernorm", "1+w", 1e-5)),
    ],
)
def test_a_norm_is_identified_by_what_it_computes(device, make, formula):
    with torch.device(device):
        norm = make()
    assert identify(norm) == formula


@pytest.mark.parametrize(
    ("make", "formula"),
    [
        (lambda: nn.BatchNorm1d(8), Formula("batchnorm", "w", 1e-5, "batch")),
        (lambda: nn.BatchNorm2d(8, eps=1e-3), Formula("batchnorm", "w", 1e-3, "batch")),
        (lambda: nn.GroupNorm(2, 8), Formula("groupnorm", "w", 1e-5, "group")),
        (lambda: ConvNextLayerNorm(8, data_format="channels_first"), Formula("layernorm", "w", 1e-6, "channels")),
        (lambda: ConvNextLayerNorm(8), Formula("layernorm", "w", 1e-6)),
        (lambda: OlmoLayerNorm(8), Formula("layernorm", "", 1e-5)),
    ],
)
def test_an_area_is_identified_too(make, formula):
    assert identify(make()) == formula


@pytest.mark.parametrize(
    "make", [lambda: Qwen3NextRMSNormGated(8), lambda: nn.BatchNorm1d(8), lambda: nn.GroupNorm(2, 8)]
)
def test_a_norm_of_another_formula_is_named_and_left_alone(make):
    with pytest.raises(TypeError, match=r"^norm: got \w+, must be a norm of hf_ibnorm, a LayerNorm or an RMSNorm"):
        contract(make())


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(8), lambda: LlamaRMSNorm(8), lambda: GemmaRMSNorm(8)])
def test_a_stock_norm_answers_as_one_of_ours(make):
    norm, x = shake(make()), torch.randn(3, 5, 8)
    answers = contract(norm)
    gain = 1 + norm.weight if answers.formula.gain == "1+w" else norm.weight
    bias = getattr(norm, "bias", None)
    torch.testing.assert_close(answers.core(x) * gain + (0 if bias is None else bias), norm(x), rtol=1e-5, atol=1e-6)
    for name, value in answers.initial_values().items():
        assert torch.equal(value, dict(make().named_parameters())[name])
    assert not answers.draws_noise
    assert answers.ramp is None


def test_looking_at_a_norm_changes_nothing(stock_model):
    model = stock_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    discover(model.base_model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sites_have_a_kind_and_a_width():
    with torch.device("meta"):
        sites = {site.name: site for site in discover(Qwen3Model(Qwen3Config(**QWEN3)))}
    assert len(sites) == 2 * 4 + 1
    assert {(site.kind, site.width) for site in sites.values()} == {("stream", 32), ("qk", 8)}
    assert sites["layers.1.self_attn.k_norm"].kind == "qk"
    with torch.device("meta"):
        gemma = discover(Gemma3ForCausalLM(Gemma3TextConfig(**QWEN3)).base_model)
    assert {site.gain for site in gemma} == {"1+w"}


def test_a_model_of_a_billion_weights_is_looked_at_without_them():
    with torch.device("meta"):
        sizes = {**QWEN3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128}
        model = Qwen3Model(Qwen3Config(**sizes))
    assert len(discover(model)) == 28 * 4 + 1


def classes(stock_config, *stock):
    """A config and models with our norms for stock classes, as `configuration_ibnorm` and a family's file have them."""

    class Fields:
        norm_type: str = DEFAULT_NORM
        norm_kwargs: dict | None = None
        norm_overrides: list | dict | None = None

    name = f"IBNorm{stock_config.__name__}"
    body = {**{k: v for k, v in vars(Fields).items() if k[0] != "_"}, "__annotations__": Fields.__annotations__}
    body |= {"model_type": f"ibnorm_{stock_config.model_type}", "__module__": __name__}
    config = strict(type(name, (NormConfigMixin, stock_config), body))
    setattr(sys.modules[__name__], name, config)
    models = [
        type(f"IBNorm{each.__name__}", (NormModelMixin, each), {"config_class": config, "__module__": __name__})
        for each in stock
    ]
    return config, models


SHAPES = {
    "nested decoder": (OPTConfig, OPT, OPTDecoder, OPTModel, OPTForCausalLM),
    "norms of queries": (Qwen3Config, QWEN3, Qwen3Model, Qwen3ForCausalLM),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_mixin_serves_an_architecture_that_nobody_pinned(shape, tmp_path):
    stock_config, sizes, *stock = SHAPES[shape]
    config_class, models = classes(stock_config, *stock)
    assert stock_config.model_type not in PINS
    torch.manual_seed(0)
    theirs = stock[-1](stock_config(**sizes))
    torch.manual_seed(0)
    model = models[-1](config_class(norm_type="ibnorm_t", norm_overrides=[["*.1.*", "rmsnorm"]], **sizes))
    norms = [site for site, kind in site_kinds(model, None).items() if kind == "stream"]
    assert len(norms) == 5
    assert [type(model.base_model.get_submodule(site)).__name__ for site in norms].count("IBNorm") >= 2
    ours = dict(model.named_parameters())
    assert all(torch.equal(ours[name], value) for name, value in theirs.named_parameters() if "norm" not in name)
    assert {type(module) for module in model.modules()} & set(stock) == set()
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = models[-1].from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens()).logits, model.eval()(tokens()).logits)


def test_a_glob_that_matches_no_site_is_refused_where_the_model_is_built():
    config_class, models = classes(Qwen3Config, Qwen3Model)
    with pytest.raises(ValueError, match=r"norm_overrides\['h\.\*'\]: matches no site; sites are layers\.0\.self"):
        models[0](config_class(norm_overrides=[["h.*", "dyt"]], **QWEN3))


def test_our_own_norms_are_sites_too():
    base = nn.Sequential(build_norm("dyt", 8), nn.Linear(8, 8), build_norm("layernorm", 8))
    first, last = discover(base)
    assert (first.name, first.computes, last.name, last.computes) == ("0", None, "2", "layernorm")
