"""A norm added as CONTRIBUTING says, a class and a row of the registry, does all that the others do."""

import pytest
import torch
import torch.nn.functional as F
from helpers import FAMILIES, STOCK_NORM, shake, tokens
from torch import nn
from transformers import AutoModelForCausalLM
from transformers import initialization as init

from hf_ibnorm import NORMS, apply_norm, convert_checkpoint, norm_sites, restore_norm, swapped_norms
from hf_ibnorm.analysis import noise_robustness, watch
from hf_ibnorm.modeling_ibnorm import check_checkpointing
from hf_ibnorm.norms import NormBase, build_norm, register_norm


class FRN(NormBase):
    """Filter response normalization with its thresholded linear unit (arXiv 1911.09737), over the last dimension."""

    _described = ("eps",)

    def __init__(self, normalized_shape, eps=1e-6, elementwise_affine=True, bias=True, device=None, dtype=None):
        super().__init__(normalized_shape, elementwise_affine=elementwise_affine, bias=bias, device=device, dtype=dtype)
        self.eps = float(eps)
        self.tau = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        super().reset_parameters()
        init.constant_(self.tau, -1.0)

    @property
    def draws_noise(self):
        return True

    def forward(self, x):
        y = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        y = y if self.weight is None else y * self.weight
        return torch.maximum(y if self.bias is None else y + self.bias, self.tau)


@pytest.fixture(autouse=True)
def frn():
    register_norm("frn", FRN)
    yield
    del NORMS["frn"]


def logits(model):
    return model.eval()(tokens()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_applied_over_and_over_and_taken_back(stock_model, family):
    model = stock_model(family)
    before = logits(model)
    apply_norm(model, "frn")
    apply_norm(model, "frn", eps=1e-5)
    with swapped_norms(model, "ibnorm_t"):
        assert not any(isinstance(norm, FRN) for norm in norm_sites(model).values())
    apply_norm(model, "frn", sites="*.0.*")
    restore_norm(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


def test_its_trained_parameters_are_named_when_they_are_lost(stock_model, tmp_path):
    model = shake(apply_norm(stock_model("llama"), "frn"))
    model.save_pretrained(tmp_path / "frn")
    record = convert_checkpoint(tmp_path / "frn", tmp_path / "stock", "rmsnorm")
    assert {name.rpartition(".")[2] for name in record["lost"]} == {"tau", "bias"}
    with pytest.warns(UserWarning, match=r"layers\.0\.input_layernorm\.tau"):
        restore_norm(model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_converted_there_and_back(source, tmp_path, family):
    folder = source(family)
    convert_checkpoint(folder, tmp_path / "frn", "frn")
    record = convert_checkpoint(tmp_path / "frn", tmp_path / "back", STOCK_NORM[family])
    assert not record["lost"]
    with torch.no_grad():
        there, back = (logits(AutoModelForCausalLM.from_pretrained(each)) for each in (folder, tmp_path / "back"))
    torch.testing.assert_close(back, there, rtol=0, atol=0)


def test_gains_and_biases_are_fitted_for_it(source, tmp_path):
    folder = source("gpt2")
    record = convert_checkpoint(folder, tmp_path / "frn", "frn", init="calibrate", calibration_tokens=2000)
    assert len(record["calibration"]["sites"]) == 5


def test_diagnostics_see_it_before_gain_and_bias(stock_model):
    model = shake(apply_norm(stock_model("llama"), "frn"))
    with watch(model, sample=0) as watching:
        model(torch.cat([tokens(seed) for seed in range(4)]))
    for site in watching.result().values():
        assert site["norm"] == "FRN"
        assert site["after"]["quantiles"]["0.001"] >= -1.5  # its tau, moved
    with pytest.raises(ValueError, match=r"is a FRN, whose output is no gain times what it computes"):
        noise_robustness(model, tokens(), draws=1)  # its threshold comes after the gain


def test_one_that_draws_random_numbers_is_refused_where_they_would_differ(stock_model):
    model = stock_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    with pytest.raises(ValueError, match="preserve_rng_state"):
        check_checkpointing(model, [build_norm("frn", 32)])
