"""Quantized models: their norms are not, and are swapped like others."""

import json
from dataclasses import dataclass

import pytest
import torch
from helpers import tokens
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_ibnorm import apply_norm, norm_sites, restore_norm

pytestmark = pytest.mark.oldest


@torch.no_grad()
def logits(model):
    return model.eval()(tokens()).logits


class Rounded(nn.Module):
    """A linear layer in whole numbers, as quantized layers are: under its own names, in its own dtypes."""

    def __init__(self, width, size):
        super().__init__()
        self.register_buffer("weight", torch.zeros(size, width, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(size, 1))

    def forward(self, x):
        return x @ (self.weight * self.scale).T


@register_quantization_config("rounding")
@dataclass
class RoundingConfig(QuantizationConfigMixin):
    quant_method: str = "rounding"


@register_quantizer("rounding")
class Rounding(HfQuantizer):
    """Loads the layers of MLPs that were saved as `Rounded`."""

    requires_calibration = True
    is_trainable = False

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **{**kwargs, "pre_quantized": True})

    def is_serializable(self):
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        for block in model.base_model.layers:
            for name, layer in [*block.mlp.named_children()]:
                if isinstance(layer, nn.Linear):
                    setattr(block.mlp, name, Rounded(layer.in_features, layer.out_features))


def rounded_copy(model, folder):
    """`model` loaded from a checkpoint whose MLPs are quantized."""
    state = model.state_dict()
    for name in [name for name in state if ".mlp." in name]:
        scale = state[name].abs().amax(1, keepdim=True) / 127
        state[name] = (state[name] / scale).round().to(torch.int8)
        state[name.removesuffix("weight") + "scale"] = scale
    model.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": "rounding"}}))
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_quantized_model_is_patched_saved_and_restored_like_another(stock_model, tmp_path):
    model = rounded_copy(stock_model("llama"), tmp_path / "rounded")
    assert isinstance(model.model.layers[0].mlp.up_proj, Rounded)
    expected = logits(model)
    apply_norm(model, "ibnorm_t", lam=0.3)
    assert not torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "patched")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert isinstance(loaded.model.layers[0].mlp.up_proj, Rounded)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(restore_norm(model)), expected)

    model.model.extra = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"in 2 tensors \(model.extra.bias, model.extra.weight\).* was it changed\?"):
        apply_norm(model, "ibnorm_t")


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_models_are_patched_saved_and_trained(stock_model, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    stock_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "stock")
    options = {"quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True})}
    model = apply_norm(AutoModelForCausalLM.from_pretrained(tmp_path / "stock", **options), "ibnorm_t", lam=0.3)
    model.save_pretrained(tmp_path / "patched")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert torch.equal(logits(loaded), logits(model))
    gain = norm_sites(loaded).popitem()[1].weight
    loaded(tokens(), labels=tokens()).loss.backward()
    assert gain.grad.abs().sum() > 0
