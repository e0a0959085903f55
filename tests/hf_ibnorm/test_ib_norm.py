"""IBNorm's formulas against an independent float64 NumPy form, and the facts that follow from them."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from hf_ibnorm.functional import ORDERS, STANDARDIZE, UNITS, VARIANTS, compress, ib_norm

LAM = {"S": 3.0, "L": 4.0, "T": 2.0, "shrink": 0.4}
COMBINATIONS = list(itertools.product(VARIANTS, UNITS, STANDARDIZE, ORDERS))


def numpy_compress(c, variant, lam, unit):
    a = np.abs(c).mean(-1, keepdims=True)
    scale = a if unit == "mean_abs" else np.ones_like(a)
    t = c / scale
    if variant == "S":
        f = t / lam
    elif variant == "L":
        f = np.sign(t) * np.log(1 + lam * np.abs(t)) / lam
    elif variant == "T":
        f = np.tanh(lam * t) / lam
    else:
        f = np.sign(t) * np.maximum(np.abs(t) - lam * np.abs(t).mean(-1, keepdims=True), 0)
    return scale * f


def numpy_standardize(s, standardize, eps):
    if standardize == "layer":
        s = s - s.mean(-1, keepdims=True)
    return s / np.sqrt((s**2).mean(-1, keepdims=True) + eps)


def numpy_ib_norm(x, weight, bias, variant, lam, unit, standardize, order, eps):
    if order == "compress_first":
        mean = x.mean(-1, keepdims=True)
        z = numpy_standardize(mean + numpy_compress(x - mean, variant, lam, unit), standardize, eps)
    else:
        h = numpy_standardize(x, standardize, eps)
        mean = h.mean(-1, keepdims=True)
        z = mean + numpy_compress(h - mean, variant, lam, unit)
    return weight * z + bias


def rows(*shape, dtype=torch.float64, seed=0, shift=0.3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).add(shift).to(dtype)


@pytest.mark.parametrize(("variant", "unit", "standardize", "order"), COMBINATIONS)
def test_values_agree_with_numpy(variant, unit, standardize, order):
    x, weight, bias = rows(3, 5, 40), rows(40, seed=1), rows(40, seed=2)
    options = {"variant": variant, "lam": LAM[variant], "unit": unit, "standardize": standardize, "order": order}
    expected = numpy_ib_norm(x.numpy(), weight.numpy(), bias.numpy(), **options, eps=1e-5)
    np.testing.assert_allclose(ib_norm(x, weight, bias, **options, eps=1e-5).numpy(), expected, rtol=1e-12, atol=1e-12)
    single = ib_norm(x.float(), weight.float(), bias.float(), **options, eps=1e-5)
    np.testing.assert_allclose(single.numpy(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("variant", "unit", "standardize", "order"), COMBINATIONS)
def test_gradients_agree_with_finite_differences(variant, unit, standardize, order):
    x = rows(2, 7).requires_grad_()
    weight, bias = rows(7, seed=1).requires_grad_(), rows(7, seed=2).requires_grad_()
    lam = torch.tensor(LAM[variant], dtype=torch.float64, requires_grad=True)

    def norm(x, weight, bias, lam):
        return ib_norm(x, weight, bias, variant=variant, lam=lam, unit=unit, standardize=standardize, order=order)

    assert gradcheck(norm, (x, weight, bias, lam))


@pytest.mark.parametrize("variant", VARIANTS)
def test_double_backward_agrees_with_finite_differences(variant):
    assert gradgradcheck(lambda x: ib_norm(x, variant=variant, lam=LAM[variant]), (rows(1, 5).requires_grad_(),))


@pytest.mark.parametrize("variant", ["S", "L", "T"])
@pytest.mark.parametrize("unit", UNITS)
def test_slope_at_zero_is_that_of_the_formula(variant, unit):
    c = torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    compress(c, variant=variant, lam=LAM[variant], unit=unit)[0, 1].backward()
    assert c.grad[0, 1].item() == pytest.approx(1 / LAM["S"] if variant == "S" else 1.0, rel=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.5, 4.0, 100.0])
@pytest.mark.parametrize("variant", ["L", "T"])
def test_compression_is_odd_monotone_and_a_contraction(variant, lam):
    c = torch.linspace(-50, 50, 1001, dtype=torch.float64)
    f = compress(c, variant=variant, lam=lam)
    torch.testing.assert_close(f, -compress(-c, variant=variant, lam=lam), rtol=0, atol=0)
    assert (f.diff() >= 0).all()
    assert (f.abs() <= c.abs()).all()


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("variant", ["L", "T"])
@pytest.mark.parametrize("order", ORDERS)
def test_lam_zero_is_layer_norm_or_rms_norm(variant, order, as_tensor):
    x, weight, bias = (rows(6, 33, dtype=torch.float32), *rows(2, 33, dtype=torch.float32, seed=1))
    lam = torch.tensor(0.0) if as_tensor else 0.0
    ours = ib_norm(x, weight, bias, variant=variant, lam=lam, standardize="layer", order=order)
    torch.testing.assert_close(ours, F.layer_norm(x, (33,), weight, bias, 1e-6), rtol=1e-5, atol=1e-5)
    ours = ib_norm(x, weight, bias, variant=variant, lam=lam, standardize="rms", order=order)
    torch.testing.assert_close(ours, F.rms_norm(x, (33,), weight, 1e-6) + bias, rtol=1e-5, atol=1e-5)


def test_linear_variant_is_layer_norm_with_eps_times_lam_squared():
    x, lam = rows(6, 33), 3.0
    ours = ib_norm(x, variant="S", lam=lam, eps=1e-3)
    torch.testing.assert_close(ours, F.layer_norm(x, (33,), eps=1e-3 * lam**2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "scale", "shift"),
    [
        ({"standardize": "layer", "unit": "mean_abs"}, 7.0, -2.0),
        ({"standardize": "layer", "unit": "raw", "order": "standardize_first"}, 7.0, -2.0),
        ({"standardize": "layer", "unit": "raw"}, 1.0, -2.0),
        ({"standardize": "rms", "unit": "mean_abs"}, 7.0, 0.0),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_invariances(variant, options, scale, shift):
    x = rows(6, 33)
    norm = {"variant": variant, "lam": LAM[variant], "eps": 1e-14, **options}
    torch.testing.assert_close(ib_norm(scale * x + shift, **norm), ib_norm(x, **norm), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("variant", "unit", "standardize", "order"), COMBINATIONS)
@pytest.mark.parametrize("value", [0.1, -1e4, 3.7e3])
def test_constant_rows_give_bias_and_finite_gradients(variant, unit, standardize, order, value):
    x = torch.full((2, 96), value, requires_grad=True)
    weight, bias = torch.full((96,), 1.5), torch.linspace(-1, 1, 96)
    options = {"variant": variant, "lam": LAM[variant], "unit": unit, "standardize": standardize, "order": order}
    y = ib_norm(x, weight, bias, **options, eps=1e-12)
    expected = bias if standardize == "layer" else math.copysign(1, value) * weight + bias
    torch.testing.assert_close(y.detach(), expected.expand(2, -1), rtol=1e-6, atol=2e-6)
    y.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("width", [96, 768, 1000])
@pytest.mark.parametrize("value", [0.1, -1e4, 3.7e3])
def test_a_constant_row_has_deviations_of_exactly_zero_and_the_slope_that_goes_with_them(value, width):
    # The mean of equal float32 numbers is not always that number; a leftover of 1e-9 would be a whole mean|c|.
    upstream = rows(width, dtype=torch.float32)
    gradients = []
    for options in ({"lam": 0.0}, {"lam": 4.0, "unit": "mean_abs"}):
        x = torch.full((width,), value, requires_grad=True)
        ib_norm(x, variant="T", **options).backward(upstream)
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("variant", "unit", "standardize", "order"), COMBINATIONS)
def test_extreme_and_odd_inputs_stay_finite(variant, unit, standardize, order):
    options = {"variant": variant, "lam": LAM[variant], "unit": unit, "standardize": standardize, "order": order}
    outlier = rows(4, 50, dtype=torch.float32)
    outlier[:, 3] = torch.tensor([1e4, -1e4, 1e4, -1e4])
    odd = rows(9, 7, 41, dtype=torch.float32)
    inputs = [outlier, 1e-6 * rows(4, 50, dtype=torch.float32), rows(5, 1, dtype=torch.float32)]
    inputs += [torch.empty(0, 8), odd, odd.transpose(0, 1), odd[::2, :, 1::3]]
    for x in inputs:
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = ib_norm(x, **options)
        assert y.shape == x.shape
        y.backward(torch.ones_like(y).expand_as(y))
        assert y.isfinite().all()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("variant", "unit", "standardize", "order"), COMBINATIONS)
def test_a_bad_row_never_reaches_another(variant, unit, standardize, order, bad):
    options = {"variant": variant, "lam": LAM[variant], "unit": unit, "standardize": standardize, "order": order}
    clean = rows(5, 24, dtype=torch.float32)
    dirty = clean.clone()
    dirty[2, 7] = bad
    others = [0, 1, 3, 4]
    assert torch.equal(ib_norm(dirty, **options)[others], ib_norm(clean, **options)[others])


@pytest.mark.parametrize("variant", VARIANTS)
def test_permuting_features_permutes_the_output(variant):
    x, order = rows(4, 30), torch.randperm(30, generator=torch.Generator().manual_seed(3))
    norm = {"variant": variant, "lam": LAM[variant]}
    torch.testing.assert_close(ib_norm(x[:, order], **norm), ib_norm(x, **norm)[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_float32_inside(variant, dtype):
    x = rows(4, 64, dtype=dtype)
    norm = {"variant": variant, "lam": LAM[variant]}
    y = ib_norm(x, **norm)
    assert y.dtype == dtype
    assert torch.equal(y, ib_norm(x.float(), **norm).to(dtype))


@pytest.mark.parametrize(("variant", "expected"), [("L", 1.59), ("T", 1.15)])
def test_kurtosis_of_gaussian_input_goes_down(variant, expected):
    z = ib_norm(rows(200, 5000, shift=0), variant=variant, lam=4.0)
    kurtosis = z.pow(4).mean() / z.square().mean().square()
    assert kurtosis.item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "Q", "lam": 1}, "variant: got 'Q', allowed are L, S, T, shrink"),
        ({"variant": "L", "lam": -1}, "lam: got -1, must be a finite number >= 0"),
        ({"variant": "S", "lam": 0.5}, "lam: got 0.5, must be a finite number >= 1"),
        ({"variant": "T", "lam": math.nan}, "lam: got nan"),
        ({"variant": "shrink", "lam": 1.0}, "lam: got 1.0, must be a finite number >= 0 and < 1"),
        ({"variant": "L", "lam": "nan"}, "lam: got 'nan', must be a finite number"),
        ({"lam": 1, "unit": "std"}, "unit: got 'std', allowed are raw, mean_abs"),
        ({"lam": 1, "standardize": "batch"}, "standardize: got 'batch'"),
        ({"lam": 1, "order": "last"}, "order: got 'last'"),
        ({"lam": 1, "eps": math.nan}, "eps: got nan"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ib_norm(torch.zeros(2, 3), **options)


@pytest.mark.parametrize("variant", ["L", "T"])
@pytest.mark.parametrize("lam", [1e-46, 1e-45, 1e-38, 1e-30, 1e30])
def test_any_lam_a_number_can_be_stays_finite_in_float32(variant, lam):
    c = torch.tensor([-3.0, 0.0, 1e-3, 1e4])
    for given in (lam, torch.tensor(lam), torch.tensor([lam])):
        f = compress(c, variant=variant, lam=given)
        torch.testing.assert_close(f, c if lam < 1 else torch.zeros(4))
