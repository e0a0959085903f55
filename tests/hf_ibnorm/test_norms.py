"""The norm modules and their registry."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from hf_ibnorm import NORMS, DynamicTanh, IBNorm, LayerNormalNorm, build_norm
from hf_ibnorm.functional import ib_norm
from hf_ibnorm.norms import resolve_norm_kwargs

OURS = [name for name in NORMS if name not in ("layernorm", "rmsnorm")]


def test_registry_names_are_the_public_ones():
    assert list(NORMS) == [
        "ibnorm_s",
        "ibnorm_l",
        "ibnorm_t",
        "ibnorm_shrink",
        "layernormalnorm",
        "layernorm",
        "rmsnorm",
        "dyt",
    ]


@pytest.mark.parametrize("spelling", ["ibnorm_l", "IBNorm-L", "IBNORM_L", "ibnorml", "ib-norm-l"])
def test_spelling_of_names_does_not_matter(spelling):
    norm = build_norm(spelling, 8)
    assert isinstance(norm, IBNorm)
    assert norm.variant == "L"


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_builds_runs_and_trains(name):
    norm = build_norm(name, 16)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = norm(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in [x, *norm.parameters()])


@pytest.mark.parametrize(("name", "cls"), [("layernorm", nn.LayerNorm), ("rmsnorm", nn.RMSNorm)])
def test_controls_are_torchs_own_modules(name, cls):
    assert type(build_norm(name, 16)) is cls


def test_dyt_is_its_formula():
    norm = DynamicTanh(4, init_alpha=0.7)
    nn.init.constant_(norm.bias, 0.2)
    nn.init.constant_(norm.weight, 3.0)
    x = torch.linspace(-2, 2, 4)
    torch.testing.assert_close(norm(x), 3 * torch.tanh(0.7 * x) + 0.2)
    assert norm.alpha.shape == (1,)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}])
def test_affine_options(name, options):
    norm = build_norm(name, 8, **options)
    assert norm.bias is None
    assert (norm.weight is None) == ("elementwise_affine" in options)
    assert norm(torch.randn(2, 8)).isfinite().all()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_dtype_is_the_inputs_whatever_the_parameters(name, dtype):
    norm = build_norm(name, 8).eval()
    assert norm(torch.randn(2, 8, dtype=dtype)).dtype == dtype
    assert norm.to(torch.bfloat16)(torch.randn(2, 8)).dtype == torch.float32


def test_no_cast_touches_lam():
    norm = IBNorm(8, lam=0.3)
    before = norm.lam.clone()
    for cast in (norm.half, norm.bfloat16, norm.double, lambda: norm.to(torch.bfloat16)):
        cast()
        assert norm.lam.dtype == torch.float32
        assert torch.equal(norm.lam, before)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(IBNorm(8, lam=0.3).lam, before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_lam_is_in_the_state_dict_in_float32_whatever_the_weights_are():
    state = IBNorm(8, lam=0.3).bfloat16().state_dict()
    assert {name: value.dtype for name, value in state.items()} == {
        "weight": torch.bfloat16,
        "bias": torch.bfloat16,
        "lam": torch.float32,
    }
    assert state["lam"] == torch.tensor(0.3)


def test_a_module_materialized_from_meta_is_whole_after_reset():
    norm = IBNorm(8, lam=3.0, device="meta").to_empty(device="cpu")
    norm.reset_parameters()
    assert norm.lam.item() == 3.0
    assert torch.equal(norm.weight, torch.ones(8))
    assert torch.equal(norm.bias, torch.zeros(8))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_copies_compute_the_same(clone):
    norm = IBNorm(8, variant="T", lam=1.5)
    x = torch.randn(2, 8)
    assert torch.equal(clone(norm)(x), norm(x))


def test_module_is_the_function():
    norm = IBNorm(8, variant="T", lam=1.5, unit="mean_abs", standardize="rms", order="standardize_first", eps=1e-4)
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 8)
    options = {"variant": "T", "lam": 1.5, "unit": "mean_abs", "standardize": "rms", "order": "standardize_first"}
    torch.testing.assert_close(norm(x), ib_norm(x, norm.weight, norm.bias, **options, eps=1e-4))


def test_printing_a_norm_documents_the_experiment():
    assert "variant=T, lam=1.5, learn_lam=False, unit=raw" in repr(IBNorm(8, variant="T", lam=1.5))
    assert "noise=0.5, noise_mode=scaled" in repr(LayerNormalNorm(8, noise=0.5))


def test_resolved_options_are_complete_and_take_the_models_eps():
    assert resolve_norm_kwargs("ibnorm_t", {"lam": 1}, 1e-4) == {
        "lam": 1.0,
        "learn_lam": False,
        "unit": "raw",
        "standardize": "layer",
        "order": "compress_first",
        "eps": 1e-4,
        "elementwise_affine": True,
        "bias": True,
        "backend": "auto",
    }
    assert resolve_norm_kwargs("ibnorm_t", {"eps": 1e-3}, 1e-4)["eps"] == 1e-3
    assert resolve_norm_kwargs("ibnorm_t", {"lam": None, "eps": None}, 1e-4) == resolve_norm_kwargs(
        "ibnorm_t", {}, 1e-4
    )
    assert resolve_norm_kwargs("layernormalnorm", {}, 1e-4)["eps"] == 1e-5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ibnrm_l", {}, "unknown norm 'ibnrm_l' \\(did you mean 'ibnorm_l'\\?\\); known are ibnorm_s, "),
        ("ibnorm_l", {"lamm": 1}, "norm_kwargs.lamm: ibnorm_l has no such option \\(did you mean 'lam'\\?\\)"),
        ("ibnorm_l", {"variant": "S"}, "norm_kwargs.variant: ibnorm_l has no such option"),
        ("rmsnorm", {"bias": True}, "norm_kwargs.bias: rmsnorm has no such option"),
        ("ibnorm_l", {"lam": -1}, "norm_kwargs.lam: got -1.0, must be a finite number >= 0"),
        ("ibnorm_s", {"lam": 0.5}, "norm_kwargs.lam: got 0.5, must be a finite number >= 1"),
        ("ibnorm_t", {"lam": math.nan}, "norm_kwargs.lam: got nan"),
        ("ibnorm_t", {"lam": "nan"}, "norm_kwargs.lam: got 'nan'"),
        ("ibnorm_t", {"lam": True}, "norm_kwargs.lam: got True"),
        ("ibnorm_t", {"bias": "no"}, "norm_kwargs.bias: got 'no', must be true or false"),
        ("layernorm", {"eps": "small"}, "norm_kwargs.eps: got 'small'"),
        ("rmsnorm", {"eps": -1.0}, "norm_kwargs.eps: got -1.0"),
        ("ibnorm_l", {"backend": "cuda"}, "norm_kwargs.backend: got 'cuda', allowed are auto, reference, fused"),
    ],
)
def test_bad_options_are_named_with_the_nearest_valid_one(name, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build_norm(name, 8, **options)


@pytest.mark.parametrize("shape", [0, -1, (3, 4), (), 3.7, (3.7,), True, "3", None])
def test_only_one_positive_width_is_accepted(shape):
    with pytest.raises(ValueError, match="normalized_shape: got"):
        build_norm("ibnorm_l", shape)
