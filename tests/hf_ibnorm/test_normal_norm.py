"""LayerNormalNorm's formulas against SciPy and the numbers of the published implementation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import yeojohnson
from torch.autograd import gradcheck

from hf_ibnorm import LayerNormalNorm
from hf_ibnorm.functional import newton_lambda, normal_norm, power_transform

CASES = ("gaussian", "heavy_tail", "skewed", "bimodal", "one_outlier", "tiny_scale", "three_d", "constant_row")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("lam", [-3.0, -1e-9, 0.0, 1e-12, 1e-6, 0.3, 1.0, 1.7, 2.0 - 1e-9, 2.0, 2.5, 4.0])
def test_power_transform_agrees_with_scipy(lam):
    h = np.concatenate([np.linspace(-8, 8, 401), [0.0, 1e-12, -1e-12]])
    ours = power_transform(torch.from_numpy(h), lam).numpy()
    # SciPy divides expm1 by lam too, so near 0 both are exact; it switches to log1p within one spacing of 0.
    np.testing.assert_allclose(ours, yeojohnson(h, lmbda=lam), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("lam", [0.0, 1e-9, 0.3, 1.0, 2.0, 3.0])
def test_power_transform_gradients(lam):
    h = torch.cat([randn(20) * 2, torch.zeros(1, dtype=torch.float64)]).requires_grad_()
    parameter = torch.tensor(lam, dtype=torch.float64, requires_grad=True)
    assert gradcheck(power_transform, (h, parameter))


@pytest.mark.parametrize("offset", [0.0, 1e-7, 1e-5, 1e-3, 1e-1])
def test_power_transform_gradient_keeps_its_digits_near_the_singular_points(offset):
    h = randn(200).abs()
    for sign, singular in ((1, 0.0), (-1, 2.0)):
        gradients = {}
        for dtype in (torch.float32, torch.float64):
            lam = torch.full((200,), singular + offset, dtype=dtype, requires_grad=True)
            power_transform((sign * h).to(dtype), lam).sum().backward()
            gradients[dtype] = lam.grad.double()
        torch.testing.assert_close(gradients[torch.float32], gradients[torch.float64], rtol=2e-5, atol=1e-9)


def test_power_transform_has_slope_one_at_zero():
    for lam in (-1.0, 0.0, 0.7, 2.0):
        h = torch.zeros(1, requires_grad=True)
        power_transform(h, lam).backward()
        assert h.grad.item() == 1.0


@pytest.mark.parametrize("case", CASES)
def test_published_implementation_is_reproduced(case, fixtures):
    tensors = load_file(fixtures / "normalnorm_reference.safetensors")
    reference = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"layer.{case}.")}
    x = reference["x"].requires_grad_()
    weight, bias = reference["weight"].requires_grad_(), reference["bias"].requires_grad_()
    h = F.layer_norm(x, x.shape[-1:], eps=1e-5)
    torch.testing.assert_close(newton_lambda(h), reference["lam"], rtol=1e-9, atol=1e-9)
    y = normal_norm(x, weight, bias)
    y.backward(reference["grad_y"])
    # The published code adds ±sqrt(eps) to η, hence 1e-2; on constant rows its gradient is 0 where ours is LayerNorm's.
    kept = slice(2, None) if case == "constant_row" else slice(None)
    for ours, theirs in (
        (y, reference["y"]),
        (x.grad[kept], reference["grad_x"][kept]),
        (weight.grad, reference["grad_weight"]),
        (bias.grad, reference["grad_bias"]),
    ):
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_gradients_agree_with_finite_differences(alpha):
    x, weight, bias = randn(3, 8).requires_grad_(), randn(8, seed=1).requires_grad_(), randn(8, seed=2).requires_grad_()
    assert gradcheck(lambda *tensors: normal_norm(*tensors, alpha=alpha), (x, weight, bias))


def test_alpha_zero_is_layer_norm():
    x, weight, bias = randn(5, 30), randn(30, seed=1), randn(30, seed=2)
    expected = F.layer_norm(x, (30,), weight, bias, 1e-5)
    torch.testing.assert_close(normal_norm(x, weight, bias, alpha=0.0), expected, rtol=1e-12, atol=1e-12)


def test_skewed_rows_come_out_more_gaussian():
    x = randn(300, 512).exp()
    before = F.layer_norm(x, (512,))
    after = normal_norm(x)

    def skewness(z):
        return ((z - z.mean(-1, keepdim=True)).pow(3).mean(-1) / z.var(-1).pow(1.5)).abs().mean()

    assert skewness(after) < 0.25 * skewness(before)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_constant_rows_give_bias_and_finite_gradients(value):
    x = torch.full((2, 64), value, requires_grad=True)
    y = normal_norm(x, torch.ones(64), torch.full((64,), 0.5))
    torch.testing.assert_close(y.detach(), torch.full((2, 64), 0.5), rtol=0, atol=1e-6)
    y.square().sum().backward()
    assert x.grad.isfinite().all()


def test_extreme_inputs_stay_finite():
    outlier = randn(4, 4096).float()
    outlier[:, 0] = 1e4
    for x in (
        outlier,
        1e-6 * randn(4, 50).float(),
        randn(3, 1).float(),
        torch.empty(0, 8),
        randn(9, 7, 41)[::2, :, ::3],
    ):
        x = x.clone().requires_grad_()
        y = normal_norm(x)
        y.sum().backward()
        assert y.isfinite().all()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_never_reaches_another(bad):
    clean = randn(5, 24).float()
    dirty = clean.clone()
    dirty[2, 7] = bad
    others = [0, 1, 3, 4]
    assert torch.equal(normal_norm(dirty)[others], normal_norm(clean)[others])


def test_permuting_features_permutes_the_output():
    x, order = randn(4, 30), torch.randperm(30, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(normal_norm(x[:, order]), normal_norm(x)[:, order], rtol=1e-12, atol=1e-12)


def test_scaled_noise_has_the_size_the_formula_says_and_no_gradient_of_its_own():
    x = randn(64, 4096)
    clean = normal_norm(x)
    noisy = normal_norm(x, noise=0.7, training=True, generator=torch.Generator().manual_seed(1))
    mad = (clean - clean.mean(-1, keepdim=True)).abs().mean(-1)
    torch.testing.assert_close((noisy - clean).std(-1), 0.7 * mad, rtol=0.1, atol=0)
    gradients = []
    for noise in (0.0, 0.7):
        leaf = x.clone().requires_grad_()
        normal_norm(leaf, noise=noise, training=True).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"noise_mode": "unscaled", "noise": 0.5}, 0.5 * math.sqrt(2 / math.pi)), ({"noise": 0.0}, 0.0)],
)
def test_other_noise_settings(options, expected):
    x = randn(16, 4096)
    difference = normal_norm(x, training=True, **options) - normal_norm(x)
    assert difference.std().item() == pytest.approx(expected, rel=0.05)


def test_dropout_noise_multiplies():
    x = randn(16, 4096)
    clean = normal_norm(x)
    noisy = normal_norm(x, noise_mode="dropout", keep_prob=0.8, training=True)
    assert (noisy / clean - 1).std().item() == pytest.approx(0.5, rel=0.05)


def test_noise_is_drawn_in_training_mode_only():
    norm = LayerNormalNorm(32, noise=1.0)
    x = randn(4, 32).float()
    assert not torch.equal(norm(x), norm(x))
    norm.eval()
    assert torch.equal(norm(x), norm(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -1.0}, "noise: got -1.0"),
        ({"noise_mode": "loud"}, "noise_mode: got 'loud', allowed are scaled, unscaled, dropout"),
        ({"noise_mode": "dropout"}, "keep_prob: got None"),
        ({"noise_mode": "dropout", "keep_prob": 0.0}, "keep_prob: got 0"),
        ({"keep_prob": 0.5}, "keep_prob: got 0.5 with noise_mode 'scaled'"),
        ({"alpha": 1.5}, "alpha: got 1.5"),
        ({"eps": -1.0}, "eps: got -1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        normal_norm(torch.zeros(2, 3), **options)
    with pytest.raises((ValueError, TypeError), match=message):
        LayerNormalNorm(3, **options)
