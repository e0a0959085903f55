"""Which norms of a model are looked at, and in which order."""

import pytest
import torch
import transformers
from architectures import inputs_of, output_of, small_config
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_ibnorm import norm_sites
from hf_ibnorm.analysis import watch
from hf_ibnorm.analysis.noise import noise_robustness
from hf_ibnorm.analysis.places import chosen_norms, known_norms
from hf_ibnorm.analysis.sites import LEAST_ROWS
from hf_ibnorm.grouping import to_rows
from hf_ibnorm.sites import contract, is_norm

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def qwen():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **heads))


def neox():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_attention_heads=2))


def run_order(model, names):
    """Names of the norms as they ran, told by their outputs' hooks."""
    seen, modules = [], dict(model.named_modules())
    handles = [modules[name].register_forward_hook(lambda *_, name=name: seen.append(name)) for name in names]
    model(input_ids=torch.zeros(1, 3, dtype=torch.int64))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_the_families_that_are_ours_they_are_the_norm_sites(stock_model, family):
    model = stock_model(family)
    assert known_norms(model) == norm_sites(model)


@pytest.mark.parametrize("make", [qwen, neox])
def test_of_other_models_they_are_all_norms_in_the_order_they_run(make):
    model = make()
    norms = known_norms(model)
    expected = [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]
    assert sorted(norms) == sorted(expected)
    assert list(norms) == run_order(model, norms)
    assert model.training


def test_names_are_relative_to_the_base_model():
    assert list(chosen_norms(qwen(), "layers.1.*")) == [
        f"layers.1.{name}"
        for name in ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")
    ]


def test_a_norm_that_never_runs_is_left_out():
    model = qwen()
    model.model.spare = nn.LayerNorm(32)
    assert "model.spare" not in known_norms(model)


@pytest.mark.parametrize("make", [qwen, neox])
def test_another_model_can_be_watched_and_disturbed(make):
    model, ids = make().eval(), torch.randint(50, (2, 40))
    with watch(model.base_model) as statistics:
        model(input_ids=ids)
    found = statistics.result()
    for name, norm in known_norms(model.base_model).items():
        assert found[name]["rows"] == (160 if "_norm" in name and "self_attn" in name else 80)
        assert found[name]["after"]["variance"] == pytest.approx(1.0, abs=0.1), type(norm)
    zeta = noise_robustness(model, ids, delta=0.1, draws=1).zeta
    assert zeta[0][-1] > 0


def test_a_model_without_norms_is_refused():
    with pytest.raises(ValueError, match=r"^model: got Linear, which runs no known norm"):
        known_norms(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"^model: got Sequential"):
        known_norms(nn.Sequential(nn.GroupNorm(1, 3)))


@pytest.mark.parametrize(
    ("model_type", "name", "fields"),
    [
        ("vit", "ViTForImageClassification", {}),
        ("convnext", "ConvNextForImageClassification", {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 32, 64]}),
        ("t5", "T5ForConditionalGeneration", {}),
    ],
)
def test_norms_of_images_and_of_encoders_are_watched(model_type, name, fields):
    torch.manual_seed(0)
    model = getattr(transformers, name)(small_config(model_type, **fields)).eval()
    norms, seen = known_norms(model), {}
    assert set(norms) == {site for site, module in model.named_modules() if is_norm(module)}
    with watch(model) as statistics:
        for site, norm in norms.items():
            norm.register_forward_hook(lambda _, args, __, site=site: seen.setdefault(site, args[0]))
        output_of(model, inputs_of(model))
    for site, of_site in statistics.sites.items():
        x = to_rows(seen[site].detach(), contract(of_site.norm).area)
        found = of_site.result()
        assert found["width"] == x.shape[-1]
        assert found["rows"] == x[..., 0].numel()
        if found["rows"] >= LEAST_ROWS:
            assert found["before"]["mean"] == pytest.approx(x.mean().item(), abs=1e-5)
            assert found["after"]["variance"] == pytest.approx(
                contract(of_site.norm).core(seen[site]).detach().var(correction=0).item(), rel=1e-3
            )
