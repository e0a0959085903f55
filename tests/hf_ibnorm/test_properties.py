"""Every fact about the norms as a property over random rows and options.

`ib_norm_by_hand` and `normal_norm_by_hand` write out the formulas and their gradients without autograd; what the
package computes is held against them in float64. Rows are made from a drawn seed, which keeps examples small.
"""

import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import yeojohnson, yeojohnson_llf
from torch.autograd import gradcheck

from hf_ibnorm import NORMS, DynamicTanh, IBNorm, LayerNormalNorm, build_norm
from hf_ibnorm.functional import (
    ORDERS,
    STANDARDIZE,
    UNITS,
    VARIANTS,
    compress,
    ib_norm,
    newton_lambda,
    normal_norm,
    power_transform,
)

pytestmark = pytest.mark.random
PROPERTY = examples(60)
OURS = [name for name in NORMS if name not in ("layernorm", "rmsnorm")]
HALF = (torch.bfloat16, torch.float16)
# For two ways to the same number. Statistics of float32 rows lose up to two of seven digits to cancellation; half
# types compute in float32 and may then round to the neighbouring number.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5} | {dtype: torch.finfo(dtype).eps for dtype in HALF}


def normal(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def random_rows(seed, count, width, scale, offset, dtype):
    return (scale * normal(seed, count, width) + offset).to(dtype)


def integer_rows(seed, count, width, dtype):
    """Integers in [-50, 50]: shifted by up to 64 and scaled by a power of two, every dtype still holds them exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-50, 51, (count, width), generator=generator).to(dtype)


def affine_and_upstream(seed, x):
    """Weight, bias and a gradient of the output, for rows `x`."""
    width = x.shape[-1]
    weight, bias = normal(seed, width, dtype=x.dtype), normal(seed + 1, width, dtype=x.dtype)
    return weight, bias, normal(seed + 2, *x.shape, dtype=x.dtype)


def with_gradients(norm, tensors, upstream):
    """norm(*tensors), and autograd's gradient of each of `tensors`."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = norm(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, upstream)


def assert_near(actual, expected, tolerance):
    """No error is larger than `tolerance` of the largest number, or of 1."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * (1 + expected.abs().max())


def mean(x):
    return x.mean(-1, keepdim=True)


SEEDS = st.integers(0, 2**32 - 1)
COUNTS, WIDTHS, OFFSETS = st.integers(1, 4), st.integers(1, 40), st.floats(-5, 5)
DTYPES, FLOAT32, FLOAT64 = st.sampled_from(list(TOLERANCE)), st.just(torch.float32), st.just(torch.float64)


def rows(dtype=FLOAT64, count=COUNTS, width=WIDTHS, offset=OFFSETS):
    return st.builds(random_rows, SEEDS, count, width, st.floats(0.1, 10), offset, dtype)


def powers_of_ten(low, high):
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


SMALL = powers_of_ten(-30, -2)
LAM = {
    "S": st.floats(1, 50),
    "L": st.just(0.0) | SMALL | powers_of_ten(-2, 1.7),
    "T": st.just(0.0) | SMALL | powers_of_ten(-2, 1.3),
    "shrink": st.just(0.0) | st.floats(0.01, 0.95),
}
LAM_FORMS = {
    "number": float,
    "buffer": lambda lam: torch.tensor(lam, dtype=torch.float64),
    "learned": lambda lam: torch.tensor([lam], dtype=torch.float64),
}
FORMS = st.sampled_from(list(LAM_FORMS))


def in_form(options, form):
    return {**options, "lam": LAM_FORMS[form](options["lam"])}


@st.composite
def compressions(draw, variants=VARIANTS, units=UNITS, lam=None):
    """Options of `compress`."""
    variant = draw(st.sampled_from(variants))
    return {"variant": variant, "lam": draw(LAM[variant] if lam is None else lam), "unit": draw(st.sampled_from(units))}


@st.composite
def ib_options(draw, standardize=STANDARDIZE, order=ORDERS, eps=(1e-12, 1e-6, 1e-3), **compression):
    """Options of `ib_norm`."""
    choices = {"standardize": standardize, "order": order, "eps": eps}
    chosen = {field: draw(st.sampled_from(values)) for field, values in choices.items()}
    return draw(compressions(**compression)) | chosen


@st.composite
def norms(draw):
    """What makes one of this project's norms once the width is known."""
    name = draw(st.sampled_from(OURS))
    if name == "dyt":
        options = {"init_alpha": draw(st.floats(0, 3))}
    elif name == "layernormalnorm":
        noises = ({}, {"noise_mode": "unscaled"}, {"noise_mode": "dropout", "keep_prob": 0.7})
        options = {"alpha": draw(st.floats(0, 1)), **draw(st.sampled_from(noises))}
    else:
        options = draw(ib_options(variants=[NORMS[name].fixed["variant"]], eps=(1e-6, 1e-3)))
        options["learn_lam"] = options.pop("variant") != "S" and options["lam"] > 0 and draw(st.booleans())
    return partial(build_norm, name, **options)


def run(norm, x, upstream=None, seed=0):
    """Output and gradient at `x`; noise is drawn from `seed`."""
    x = x.detach().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        y = norm(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y) if upstream is None else upstream)[0]


def shape_by_hand(t, variant, lam):
    """f(t), df/dt and df/dlam, t in the unit in which mean|t| = 1 for shrink."""
    sign, a = t.sign(), t.abs()
    u = lam * a
    if variant == "S":
        return t / lam, torch.full_like(t, 1 / lam), -t / lam**2
    if variant == "shrink":
        beyond = (a > lam).to(t.dtype)
        return sign * (a - lam).relu(), beyond, -sign * beyond
    # The closed form of df/dlam is a difference of near equals where u is small.
    if variant == "L":
        f, slope = sign * torch.log1p(u) / lam if lam else t, 1 / (1 + u)
        series = sign * a**2 * (-1 / 2 + 2 * u / 3 - 3 * u**2 / 4 + 4 * u**3 / 5 - 5 * u**4 / 6)
        closed = sign * (a / (lam * (1 + u)) - torch.log1p(u) / lam**2) if lam > 1e-9 else series
        return f, slope, torch.where(u < 1e-3, series, closed)
    f, slope = torch.tanh(lam * t) / lam if lam else t, 1 - torch.tanh(u) ** 2
    series = sign * a**2 * (-2 * u / 3 + 8 * u**3 / 15 - 34 * u**5 / 105 + 496 * u**7 / 2835)
    closed = t * slope / lam - torch.tanh(lam * t) / lam**2 if lam > 1e-9 else series
    return f, slope, torch.where(u < 0.03, series, closed)


def compress_by_hand(c, variant, lam, unit):
    """f(c), and what turns the gradient of f into those of c and lam."""
    measured = unit == "mean_abs" or variant == "shrink"
    a = mean(c.abs()) if measured else torch.ones_like(mean(c))
    a = torch.where(a == 0, 1.0, a)
    t = c / a
    h, slope, by_lam = shape_by_hand(t, variant, lam)

    def backward(df):
        through_a = (df * (h - t * slope)).sum(-1, keepdim=True) * c.sign() / c.shape[-1]
        return df * slope + (through_a if measured else 0), (df * a * by_lam).sum()

    return a * h, backward


def standardize_by_hand(s, eps, *, centre=True):
    """The standardized rows, and what they were multiplied with."""
    s = s - mean(s) if centre else s
    r = torch.rsqrt(mean(s**2) + eps)
    return r * s, r


def ib_norm_by_hand(x, weight, bias, upstream, *, variant, lam, unit, standardize, order, eps):
    """The output and the gradients of x, weight, bias and lam."""
    layer = standardize == "layer"
    u = upstream * weight
    if order == "compress_first":
        m, c = mean(x), x - mean(x)
        f, backward = compress_by_hand(c - mean(c), variant, lam, unit)
        z, r = standardize_by_hand(m + f, eps, centre=layer)
        df = r * (u - (mean(u) if layer else 0) - z * mean(u * z))
        dc, dlam = backward(df)
        dx = dc - mean(dc) + (0 if layer else mean(df))
    else:
        h, r = standardize_by_hand(x, eps, centre=layer)
        f, backward = compress_by_hand(h - mean(h), variant, lam, unit)
        z = mean(h) + f
        dc, dlam = backward(u)
        dh = dc - mean(dc) + mean(u)
        dx = r * (dh - (mean(dh) if layer else 0) - h * mean(dh * h))
    return weight * z + bias, dx, (upstream * z).sum(0), upstream.sum(0), dlam


def newton_by_hand(h, alpha, eps):
    """λ̂ of each row, and its derivative by each element."""
    sign, a = h.sign(), h.abs()
    ell = a.log1p()
    d, slope = (1 + a) * ell - a, sign * ell
    dvar = 2 * mean(h * d)
    d2 = sign * ((1 + a) * ell**2 - 2 * d)
    first = dvar / 2 - mean(sign * ell)
    second = -(dvar**2) / 2 + mean(h * d2 + (d - mean(d)) ** 2) + math.sqrt(eps)
    first_by_h = d + h * slope - 1 / (1 + a)
    second_by_h = -2 * dvar * (d + h * slope) + d2 + h * ell**2 + 2 * (d - mean(d)) * slope
    by_h = -alpha * (first_by_h * second - first * second_by_h) / second**2 / h.shape[-1]
    return 1 - alpha * first / second, by_h


def power_by_hand(h, lam, radius=0.01):
    """ψ, dψ/dh and dψ/dlam; the latter by its series where |q| < `radius`."""
    sign, a = h.sign(), h.abs()
    ell, eta = a.log1p(), 1 + sign * (lam - 1)
    q = eta * ell
    psi = sign * torch.where(eta == 0, ell, torch.expm1(q) / eta)
    series = ell**2 * (1 / 2 + q / 3 + q**2 / 8 + q**3 / 30 + q**4 / 144 + q**5 / 840)
    by_lam = torch.where(q.abs() < radius, series, (q * q.exp() - torch.expm1(q)) / eta**2)
    return psi, (1 + a) ** (eta - 1), by_lam


def add_noise_by_hand(p, n, noise, noise_mode, keep_prob):
    """The noisy p, and its derivative by p."""
    if noise_mode == "dropout":
        factor = 1 + n * math.sqrt((1 - keep_prob) / keep_prob)
        return p * factor, factor
    size = mean((p - mean(p)).abs()) if noise_mode == "scaled" else math.sqrt(2 / math.pi)
    return p + noise * size * n, 1


def normal_norm_by_hand(x, weight, bias, upstream, *, n, alpha, eps, **noise):
    """The output with noise from `n`, and the gradients of x, weight and bias."""
    h, r = standardize_by_hand(x, eps)
    lam, lam_by_h = newton_by_hand(h, alpha, eps)
    p, p_by_h, p_by_lam = power_by_hand(h, lam)
    q, q_by_p = add_noise_by_hand(p, n, **noise)
    u = upstream * weight * q_by_p
    dh = u * p_by_h + (u * p_by_lam).sum(-1, keepdim=True) * lam_by_h
    return weight * q + bias, r * (dh - mean(dh) - h * mean(dh * h)), (upstream * q).sum(0), upstream.sum(0)


@PROPERTY
@given(rows(), compressions(), FORMS)
def test_compression_is_its_formula(c, options, form):
    expected, _ = compress_by_hand(c, **options)
    assert_near(compress(c, **in_form(options, form)), expected, 1e-13)


@PROPERTY
@given(rows(DTYPES), compressions(), FORMS)
def test_compression_is_odd_and_zero_at_zero(c, options, form):
    c[:, 0] = 0
    options = in_form(options, form)
    f = compress(c, **options)
    assert torch.equal(compress(-c, **options), -f)
    assert not f[:, 0].any()


@PROPERTY
@given(rows(DTYPES), compressions(), FORMS)
def test_compression_never_decreases_and_never_expands(c, options, form):
    c = c.sort(-1).values
    f = compress(c, **in_form(options, form))
    rounding = 4 * torch.finfo(c.dtype).eps
    assert (f.diff() >= -rounding * f[:, 1:].abs()).all()
    assert (f.abs() <= (1 + rounding) * c.abs()).all()


@PROPERTY
@given(rows(DTYPES), compressions(["L", "T"], lam=st.just(0.0)), FORMS)
def test_compression_with_lam_zero_is_the_identity(c, options, form):
    torch.testing.assert_close(compress(c, **in_form(options, form)), c)


@PROPERTY
@given(rows(st.sampled_from([torch.float32, torch.float64])), compressions(["L", "T"], ["raw"], lam=SMALL), FORMS)
def test_compression_tends_to_the_identity_as_lam_tends_to_zero(c, options, form):
    lam, rounding = options["lam"], 4 * torch.finfo(c.dtype).eps
    difference = (compress(c, **in_form(options, form)) - c).abs()
    bound = lam * c**2 / 2 if options["variant"] == "L" else lam**2 * c.abs() ** 3 / 3
    assert (difference <= bound + rounding * c.abs()).all()


@PROPERTY
@given(rows(DTYPES), compressions(variants=["S", "L", "T"]), FORMS)
def test_slope_of_compression_at_zero_is_that_of_the_formula(c, options, form):
    c[:, 0] = 0
    c.requires_grad_()
    compress(c, **in_form(options, form))[:, 0].sum().backward()
    expected = torch.full_like(c[:, 0], 1 / options["lam"] if options["variant"] == "S" else 1.0)
    torch.testing.assert_close(c.grad[:, 0], expected)


@PROPERTY
@given(COUNTS, WIDTHS, DTYPES, compressions(variants=["S", "L", "T"]), FORMS)
def test_compression_of_all_zeros_is_zero_with_the_slope_at_zero(count, width, dtype, options, form):
    c, upstream = torch.zeros(count, width, dtype=dtype), normal(0, count, width, dtype=dtype)
    f, gradient = run(partial(compress, **in_form(options, form)), c, upstream)
    assert not f.any()
    torch.testing.assert_close(gradient, upstream / options["lam"] if options["variant"] == "S" else upstream)


@PROPERTY
@given(rows(), ib_options(), SEEDS)
def test_lam_may_be_a_number_a_buffer_or_learned(x, options, seed):
    *_, upstream = affine_and_upstream(seed, x)
    y, gradient = run(partial(ib_norm, **options), x, upstream)
    for form in ("buffer", "learned"):
        other_y, other_gradient = run(partial(ib_norm, **in_form(options, form)), x, upstream)
        assert_near(other_y, y, 1e-10)
        assert_near(other_gradient, gradient, 1e-10)


@pytest.mark.parametrize("standardize", STANDARDIZE)
@pytest.mark.parametrize("order", ORDERS)
@PROPERTY
@given(x=rows(), options=ib_options(), seed=SEEDS, with_weight=st.booleans(), with_bias=st.booleans())
def test_ib_norm_is_its_formula(x, options, seed, with_weight, with_bias, standardize, order):
    options |= {"standardize": standardize, "order": order}
    weight, bias, upstream = affine_and_upstream(seed, x)
    weight = weight if with_weight else torch.ones_like(weight)
    bias = bias if with_bias else torch.zeros_like(bias)
    expected, *_ = ib_norm_by_hand(x, weight, bias, upstream, **options)
    y = ib_norm(x, weight if with_weight else None, bias if with_bias else None, **options)
    assert_near(y, expected, 1e-10)


@pytest.mark.parametrize("standardize", STANDARDIZE)
@pytest.mark.parametrize("order", ORDERS)
@PROPERTY
@given(x=rows(), options=ib_options(), seed=SEEDS)
def test_gradients_of_ib_norm_are_their_formulas(x, options, seed, standardize, order):
    options |= {"standardize": standardize, "order": order}
    weight, bias, upstream = affine_and_upstream(seed, x)
    _, *expected, _ = ib_norm_by_hand(x, weight, bias, upstream, **options)
    _, *gradients = with_gradients(partial(ib_norm, **options), (x, weight, bias), upstream)
    for gradient, by_hand in zip(gradients, expected, strict=True):
        assert_near(gradient, by_hand, 1e-9)


@pytest.mark.parametrize("variant", ["L", "T", "shrink"])
@PROPERTY
@given(x=rows(), options=ib_options(), seed=SEEDS, data=st.data())
def test_gradient_of_a_learned_lam_is_its_formula(x, options, seed, data, variant):
    # The sigmoid is never 0; softplus may come as close to it as float32 does.
    lam = data.draw(st.floats(0.01, 0.95) if variant == "shrink" else LAM[variant])
    options |= {"variant": variant, "lam": lam}
    weight, bias, upstream = affine_and_upstream(seed, x)
    *_, expected = ib_norm_by_hand(x, weight, bias, upstream, **options)
    learned = torch.tensor([options.pop("lam")], dtype=x.dtype)
    _, gradient = with_gradients(lambda lam: ib_norm(x, weight, bias, lam=lam, **options), [learned], upstream)
    assert_near(gradient, expected.reshape(1), 1e-9)


@examples(15)
@given(rows(count=st.just(1), width=st.integers(2, 6)), ib_options(eps=[1e-3]), SEEDS)
def test_gradients_of_ib_norm_agree_with_finite_differences(x, options, seed):
    weight, bias, _ = affine_and_upstream(seed, x)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert gradcheck(partial(ib_norm, **options), tensors)


@PROPERTY
@given(rows(FLOAT32), SEEDS, st.sampled_from(["L", "T"]), st.sampled_from(UNITS), powers_of_ten(-12, 1))
def test_gradient_of_a_learned_lam_keeps_its_digits_in_float32(c, seed, variant, unit, lam):
    lam = torch.tensor([lam])
    *_, upstream = affine_and_upstream(seed, c)
    _, gradient = with_gradients(lambda lam: compress(c, variant=variant, lam=lam, unit=unit), [lam], upstream)
    _, backward = compress_by_hand(c.double(), variant, lam.item(), unit)
    terms = torch.stack([backward(g)[1] for g in torch.diag_embed(upstream.double().flatten()).view(-1, *c.shape)])
    assert (gradient - terms.sum()).abs() <= 1e-5 * terms.abs().sum()


@PROPERTY
@given(rows(DTYPES), st.floats(1, 50), st.sampled_from(UNITS), st.sampled_from([1e-6, 1e-3, 1.0]), SEEDS)
def test_linear_compression_is_layer_norm_with_eps_times_lam_squared(x, lam, unit, eps, seed):
    weight, bias, _ = affine_and_upstream(seed, x)
    expected = F.layer_norm(x.double(), x.shape[-1:], weight.double(), bias.double(), eps * lam**2).to(x.dtype)
    y = ib_norm(x, weight, bias, variant="S", lam=lam, unit=unit, eps=eps)
    assert_near(y, expected, TOLERANCE[x.dtype])


@PROPERTY
@given(
    rows(DTYPES, offset=st.floats(2, 5) | st.floats(-5, -2)),
    compressions(variants=["S", "L", "T"], lam=powers_of_ten(3, 8)),
)
def test_rms_of_strongly_compressed_rows_is_the_sign_of_their_mean(x, options):
    z = ib_norm(x, standardize="rms", eps=1e-12, **options).double()
    m, lam, largest = mean(x.double()), options["lam"], (x.double() - mean(x.double())).abs().amax(-1, keepdim=True)
    # Up to a factor, this bounds |f| of every variant in either unit, over |mean|.
    bound = 4 * (1 + largest) * torch.log1p(lam * (1 + largest)) / lam / m.abs()
    assert ((z - m.sign()).abs() <= bound + TOLERANCE[x.dtype]).all()


@PROPERTY
@given(rows(DTYPES), ib_options(variants=["L", "T"], lam=st.just(0.0), eps=[1e-6, 1e-3]), FORMS, SEEDS)
def test_lam_zero_is_layer_norm_or_rms_norm_plus_bias(x, options, form, seed):
    weight, bias, _ = affine_and_upstream(seed, x)
    y = ib_norm(x, weight, bias, **in_form(options, form))
    (wide, gamma, beta), shape, eps = (tensor.double() for tensor in (x, weight, bias)), x.shape[-1:], options["eps"]
    if options["standardize"] == "layer":
        expected = F.layer_norm(wide, shape, gamma, beta, eps)
    else:
        expected = F.rms_norm(wide, shape, gamma, eps) + beta
    assert_near(y, expected.to(x.dtype), TOLERANCE[x.dtype])


@pytest.mark.parametrize(
    ("options", "scales", "shifts"),
    [
        ({"standardize": "layer", "unit": "mean_abs", "order": "compress_first"}, True, True),
        ({"standardize": "layer", "unit": "mean_abs", "order": "standardize_first"}, True, True),
        ({"standardize": "layer", "unit": "raw", "order": "standardize_first"}, True, True),
        ({"standardize": "layer", "unit": "raw", "order": "compress_first"}, False, True),
        ({"standardize": "rms", "unit": "mean_abs", "order": "compress_first"}, True, False),
        ({"standardize": "rms", "unit": "mean_abs", "order": "standardize_first"}, True, False),
    ],
)
@PROPERTY
@given(
    x=st.builds(integer_rows, SEEDS, COUNTS, WIDTHS, DTYPES),
    compression=compressions(),
    k=st.sampled_from([0.125, 0.5, 2.0, 64.0]),
    b=st.integers(-64, 64),
)
def test_invariances(x, compression, k, b, options, scales, shifts):
    options = {**compression, **options, "eps": 1e-18}
    moved = (k if scales else 1) * (x + (b if shifts else 0))
    assert_near(ib_norm(moved, **options), ib_norm(x, **options), TOLERANCE[x.dtype])


@PROPERTY
@given(
    rows(width=st.integers(16, 40)),
    ib_options(["layer"], ["compress_first"], [1e-12], variants=["L", "T"], units=["raw"], lam=st.floats(1, 4)),
)
def test_raw_layer_compress_first_is_not_scale_invariant(x, options):
    x = (x - mean(x)) / mean((x - mean(x)).abs())
    assert (ib_norm(3 * x, **options) - ib_norm(x, **options)).abs().max() > 1e-3


@PROPERTY
@given(rows(width=st.integers(16, 40)), ib_options(["rms"], eps=[1e-12], units=["mean_abs"]))
def test_rms_is_not_shift_invariant(x, options):
    x = standardize_by_hand(x, 0)[0]
    assert (ib_norm(x + 2, **options) - ib_norm(x, **options)).abs().max() > 1e-3


@PROPERTY
@given(st.floats(-1e4, 1e4), st.integers(1, 1000), DTYPES, ib_options(["layer"], eps=[1e-6, 1e-3]), FORMS, SEEDS)
def test_layer_gives_the_bias_on_constant_rows(value, width, dtype, options, form, seed):
    x = torch.full((2, width), value, dtype=dtype)
    weight, bias, upstream = affine_and_upstream(seed, x)
    y, gradient = run(lambda x: ib_norm(x, weight, bias, **in_form(options, form)), x, upstream)
    torch.testing.assert_close(y, bias.expand(2, -1), rtol=0, atol=1e-6)
    assert gradient.isfinite().all()


@PROPERTY
@given(
    st.floats(0.01, 1e4),
    st.sampled_from([-1, 1]),
    st.integers(1, 1000),
    DTYPES,
    ib_options(["rms"], eps=[1e-12]),
    FORMS,
    SEEDS,
)
def test_rms_gives_the_sign_times_the_weight_plus_the_bias_on_constant_rows(
    size, sign, width, dtype, options, form, seed
):
    x = torch.full((2, width), sign * size, dtype=dtype)
    weight, bias, upstream = affine_and_upstream(seed, x)
    y, gradient = run(lambda x: ib_norm(x, weight, bias, **in_form(options, form)), x, upstream)
    expected = (sign * weight.double() + bias.double()).to(dtype)
    assert_near(y, expected.expand(2, -1), max(1e-6, TOLERANCE[dtype] if dtype in HALF else 0))
    assert gradient.isfinite().all()


@PROPERTY
@given(
    st.floats(-1e4, 1e4),
    st.integers(1, 1000),
    st.sampled_from([torch.float32, torch.float64]),
    ib_options(["layer"], variants=["L", "T"], eps=[1e-6]),
    SEEDS,
)
def test_deviations_of_constant_rows_are_exactly_zero(value, width, dtype, options, seed):
    x = torch.full((2, width), value, dtype=dtype)
    *_, upstream = affine_and_upstream(seed, x)
    _, gradient = run(partial(ib_norm, **options), x, upstream)
    # LayerNorm's own gradient: leftovers of the mean would be a whole mean|c|, with the slope that belongs to it.
    assert_near(gradient, (upstream - mean(upstream)) / math.sqrt(1e-6), 1e-6)


def outliers(seed, dtype):
    x = normal(seed, 4, 33, dtype=dtype)
    x[[0, 1, 2, 2], [0, 5, 7, 32]] = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype)
    return x


EXTREMES = {
    "outliers of 1e4": outliers,
    "rows of 1e-6": lambda seed, dtype: (1e-6 * normal(seed, 4, 33)).to(dtype),
    "width 1": lambda seed, dtype: normal(seed, 5, 1, dtype=dtype),
    "empty batch": lambda seed, dtype: torch.empty(0, 8, dtype=dtype),
    "empty batch of sequences": lambda seed, dtype: torch.empty(2, 0, 8, dtype=dtype),
}


@pytest.mark.parametrize("kind", EXTREMES)
@PROPERTY
@given(make=norms(), seed=SEEDS, dtype=DTYPES, training=st.booleans())
def test_extremes_stay_finite(kind, make, seed, dtype, training):
    x = EXTREMES[kind](seed, dtype).requires_grad_()
    norm = make(x.shape[-1]).train(training)
    y = norm(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    gradients = torch.autograd.grad(y, [x, *norm.parameters()], normal(seed, *y.shape, dtype=dtype))
    assert all(tensor.isfinite().all() for tensor in (y, *gradients))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1),
    "strided rows": lambda x: x[::2],
    "strided features": lambda x: x[:, 1::3],
    "expanded": lambda x: x[:1].expand_as(x),
    "transposed batch of sequences": lambda x: x.view(2, 2, -1).transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@examples(25)
@given(make=norms(), x=rows(DTYPES, st.just(4), st.integers(4, 40)), seed=SEEDS)
def test_non_contiguous_inputs_give_what_contiguous_ones_give(layout, make, x, seed):
    upstream = LAYOUTS[layout](normal(seed, *x.shape, dtype=x.dtype))
    x = LAYOUTS[layout](x)
    norm = make(x.shape[-1])
    expected = run(norm, x.contiguous(), upstream.contiguous())
    for actual, contiguous in zip(run(norm, x, upstream), expected, strict=True):
        assert_near(actual, contiguous, TOLERANCE[x.dtype])


@PROPERTY
@given(norms(), rows(DTYPES, st.integers(2, 4)), st.sampled_from([math.nan, math.inf, -math.inf]), SEEDS)
def test_a_bad_row_never_reaches_another(make, x, bad, seed):
    norm, upstream = make(x.shape[-1]), normal(seed, *x.shape, dtype=x.dtype)
    row, dirty = seed % len(x), x.clone()
    dirty[row, seed % x.shape[-1]] = bad
    others = torch.arange(len(x)) != row
    for actual, expected in zip(run(norm, dirty, upstream), run(norm, x, upstream), strict=True):
        assert torch.equal(actual[others], expected[others])


@PROPERTY
@given(norms(), rows(DTYPES, st.integers(2, 4)))
def test_each_row_is_a_group_of_its_own(make, x):
    norm = make(x.shape[-1]).eval()
    one_by_one = torch.stack([norm(row) for row in x]).detach()
    assert_near(norm(x).detach(), one_by_one, TOLERANCE[x.dtype])


@PROPERTY
@given(norms(), rows(DTYPES), SEEDS)
def test_permuting_features_permutes_the_output(make, x, seed):
    norm = make(x.shape[-1]).eval()
    order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(seed))
    assert_near(norm(x[:, order]).detach(), norm(x)[:, order].detach(), TOLERANCE[x.dtype])


def with_affine(norm, seed):
    """`norm` with random weight and bias."""
    with torch.no_grad():
        for parameter in (norm.weight, norm.bias):
            parameter.copy_(normal(seed, *parameter.shape))
    return norm


@PROPERTY
@given(norms(), rows(st.sampled_from(HALF)), st.sampled_from([torch.float32, *HALF]), SEEDS)
def test_half_types_are_computed_in_float32_and_cast_back(make, x, parameter_dtype, seed):
    norm = with_affine(make(x.shape[-1], dtype=parameter_dtype), seed)
    upstream = normal(seed, *x.shape, dtype=x.dtype)
    y, gradient = run(norm, x, upstream)
    wide_y, wide_gradient = run(norm.float(), x.float(), upstream.float())
    assert y.dtype == x.dtype
    assert torch.equal(y, wide_y.to(x.dtype))
    assert torch.equal(gradient, wide_gradient.to(x.dtype))


@PROPERTY
@given(rows(), ib_options(), SEEDS)
def test_ib_norm_module_is_its_function_in_float64_too(x, options, seed):
    norm = with_affine(IBNorm(x.shape[-1], **options, dtype=x.dtype), seed)
    options["lam"] = torch.tensor(options["lam"], dtype=torch.float32)  # as the module's buffer holds it
    assert torch.equal(norm(x), ib_norm(x, norm.weight, norm.bias, **options))


@PROPERTY
@given(st.sampled_from(["L", "T"]), powers_of_ten(-8, 4))
def test_learned_lam_is_the_softplus_of_theta_and_starts_at_lam(variant, lam):
    norm = IBNorm(8, variant=variant, lam=lam, learn_lam=True)
    assert norm.theta.shape == (1,)
    theta = norm.theta.double()
    torch.testing.assert_close(norm.current_lam().double(), F.softplus(theta), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.current_lam().double(), torch.full_like(theta, lam), rtol=2e-6, atol=0)


@PROPERTY
@given(st.floats(1e-6, 1 - 1e-6))
def test_learned_lam_of_shrink_is_the_sigmoid_of_theta_and_starts_at_lam(lam):
    norm = IBNorm(8, variant="shrink", lam=lam, learn_lam=True)
    assert norm.theta.shape == (1,)
    theta = norm.theta.double()
    torch.testing.assert_close(norm.current_lam().double(), torch.sigmoid(theta), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.current_lam().double(), torch.full_like(theta, lam), rtol=2e-6, atol=0)


@PROPERTY
@given(rows(), ib_options(variants=["L", "T", "shrink"], lam=st.floats(0.01, 0.95)), SEEDS)
def test_theta_learns_by_the_gradient_of_lam(x, options, seed):
    *_, upstream = affine_and_upstream(seed, x)
    norm = with_affine(IBNorm(x.shape[-1], learn_lam=True, **options, dtype=x.dtype), seed)
    y = norm(x)
    (gradient,) = torch.autograd.grad(y, norm.theta, upstream)
    *_, dlam = ib_norm_by_hand(x, norm.weight.detach(), norm.bias.detach(), upstream, **options)
    lam = options["lam"]
    by_theta = lam * (1 - lam) if options["variant"] == "shrink" else -math.expm1(-lam)
    assert_near(gradient, (dlam * by_theta).reshape(1), 1e-9)


@PROPERTY
@given(st.floats(1, 50))
def test_linear_compression_cannot_learn_lam(lam):
    with pytest.raises(ValueError, match="learn_lam: got True with variant 'S'"):
        IBNorm(8, variant="S", lam=lam, learn_lam=True)


@pytest.mark.parametrize("variant", ["L", "T", "shrink"])
def test_learning_cannot_start_at_lam_zero(variant):
    with pytest.raises(ValueError, match="lam: got 0"):
        IBNorm(8, variant=variant, lam=0, learn_lam=True)


@PROPERTY
@given(st.sampled_from(["L", "T", "shrink"]), st.floats(1, 8), SEEDS)
def test_only_shrink_raises_kurtosis_and_sparsity_of_gaussian_rows(variant, strength, seed):
    x = normal(seed, 8, 4096)
    z = ib_norm(x, variant=variant, lam=strength / 10 if variant == "shrink" else strength)
    kurtosis = [(rows**4).mean() / (rows**2).mean() ** 2 for rows in (x, z)]
    near_zero = [(rows.abs() < 0.1).double().mean() for rows in (x, z)]
    assert (kurtosis[1] > kurtosis[0]) == (variant == "shrink")
    assert (near_zero[1] > near_zero[0]) == (variant == "shrink")


ALPHAS, NORMAL_EPS = st.floats(0, 1), st.sampled_from([1e-6, 1e-5, 1e-3])
NOISE = st.fixed_dictionaries(
    {"noise": st.floats(0, 2), "noise_mode": st.sampled_from(["scaled", "unscaled"]), "keep_prob": st.none()}
) | st.fixed_dictionaries({"noise": st.floats(0, 2), "noise_mode": st.just("dropout"), "keep_prob": st.floats(0.05, 1)})
POWERS = st.floats(-4, 6) | st.tuples(st.sampled_from([0, 2]), st.floats(-16, -1), st.sampled_from([-1, 0, 1])).map(
    lambda near: near[0] + near[2] * 10.0 ** near[1]
)


@PROPERTY
@given(rows(), POWERS)
def test_power_transform_is_scipys(h, lam):
    expected = torch.from_numpy(yeojohnson(h.numpy().ravel(), lmbda=lam)).view_as(h)
    torch.testing.assert_close(power_transform(h, lam), expected, rtol=1e-11, atol=1e-13)


@PROPERTY
@given(rows(), POWERS)
def test_slopes_of_the_power_transform_are_their_formulas(h, lam):
    lam = torch.full_like(h, lam)
    psi, by_h, by_lam = power_by_hand(h, lam)
    y, *gradients = with_gradients(power_transform, (h, lam), torch.ones_like(h))
    for actual, expected in zip((y, *gradients), (psi, by_h, by_lam), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)
    _, _, by_series = power_by_hand(h, lam, radius=0.5)
    torch.testing.assert_close(by_series, gradients[1], rtol=1e-5, atol=1e-13)


@PROPERTY
@given(rows(FLOAT32), POWERS)
def test_slope_of_the_power_transform_by_lam_keeps_its_digits_in_float32(h, lam):
    lam = torch.full_like(h, lam)
    _, _, expected = power_by_hand(h.double(), lam.double())
    _, gradient = with_gradients(partial(power_transform, h), (lam,), torch.ones_like(h))
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-5, atol=1e-12)


@PROPERTY
@given(POWERS, DTYPES)
def test_power_transform_has_value_zero_and_slope_one_at_zero(lam, dtype):
    psi, slope = run(partial(power_transform, lam=lam), torch.zeros(1, dtype=dtype))
    assert psi.item() == 0
    assert slope.item() == 1


@PROPERTY
@given(rows(width=st.integers(4, 40)), ALPHAS)
def test_lambda_hat_is_a_newton_step_on_scipys_likelihood(x, alpha):
    h, _ = standardize_by_hand(x, 0)
    step = 1e-3
    for row in h:
        below, here, above = (-yeojohnson_llf(1 + i * step, row.numpy()) / len(row) for i in (-1, 0, 1))
        first, second = (above - below) / (2 * step), (above - 2 * here + below) / step**2
        expected = torch.tensor([1 - alpha * first / (second + math.sqrt(1e-5))], dtype=torch.float64)
        assert_near(newton_lambda(row, alpha=alpha, eps=1e-5), expected, 1e-4)


@PROPERTY
@given(rows(), ALPHAS, NORMAL_EPS)
def test_lambda_hat_and_its_slope_are_their_formulas(x, alpha, eps):
    h, _ = standardize_by_hand(x, eps)
    lam, slope = run(partial(newton_lambda, alpha=alpha, eps=eps), h)
    expected_lam, expected_slope = newton_by_hand(h, alpha, eps)
    assert_near(lam, expected_lam, 1e-10)
    assert_near(slope, expected_slope, 1e-9)


@PROPERTY
@given(rows(), ALPHAS, NORMAL_EPS, NOISE, st.booleans(), SEEDS)
def test_normal_norm_and_its_gradients_are_their_formulas(x, alpha, eps, noise, training, seed):
    weight, bias, upstream = affine_and_upstream(seed, x)
    n = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) if training else 0 * x
    expected = normal_norm_by_hand(x, weight, bias, upstream, n=n, alpha=alpha, eps=eps, **noise)
    generator = torch.Generator().manual_seed(seed)
    norm = partial(normal_norm, alpha=alpha, eps=eps, training=training, generator=generator, **noise)
    for actual, by_hand in zip(with_gradients(norm, (x, weight, bias), upstream), expected, strict=True):
        assert_near(actual, by_hand, 1e-9)


@examples(15)
@given(rows(count=st.just(1), width=st.integers(2, 6)), ALPHAS, SEEDS)
def test_gradients_of_normal_norm_agree_with_finite_differences(x, alpha, seed):
    weight, bias, _ = affine_and_upstream(seed, x)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert gradcheck(partial(normal_norm, alpha=alpha, eps=1e-3), tensors)


@PROPERTY
@given(rows(), ALPHAS, NORMAL_EPS, NOISE, SEEDS)
def test_normal_norm_module_is_its_function_and_draws_from_the_default_generator(x, alpha, eps, noise, seed):
    norm = with_affine(LayerNormalNorm(x.shape[-1], alpha=alpha, eps=eps, dtype=x.dtype, **noise), seed)
    generator = torch.Generator().manual_seed(seed)
    function = partial(normal_norm, alpha=alpha, eps=eps, training=True, generator=generator, **noise)
    assert torch.equal(run(norm, x, seed=seed)[0], function(x, norm.weight, norm.bias))


@PROPERTY
@given(rows(DTYPES), ALPHAS, NOISE)
def test_no_noise_is_drawn_in_eval_mode(x, alpha, noise):
    norm = LayerNormalNorm(x.shape[-1], alpha=alpha, **noise, backend="reference").eval()
    before = torch.get_rng_state()
    assert torch.equal(norm(x), normal_norm(x, norm.weight, norm.bias, alpha=alpha))
    assert torch.equal(torch.get_rng_state(), before)


@PROPERTY
@given(rows(DTYPES), NORMAL_EPS, SEEDS)
def test_normal_norm_with_alpha_zero_is_layer_norm(x, eps, seed):
    weight, bias, _ = affine_and_upstream(seed, x)
    expected = F.layer_norm(x.double(), x.shape[-1:], weight.double(), bias.double(), eps).to(x.dtype)
    assert_near(normal_norm(x, weight, bias, alpha=0.0, eps=eps), expected, TOLERANCE[x.dtype])


@PROPERTY
@given(st.floats(-1e4, 1e4), st.integers(1, 1000), DTYPES, ALPHAS, SEEDS)
def test_normal_norm_is_layer_norm_on_constant_rows_gradient_included(value, width, dtype, alpha, seed):
    x = torch.full((2, width), value, dtype=dtype)
    weight, bias, upstream = affine_and_upstream(seed, x)
    y, gradient = run(lambda x: normal_norm(x, weight, bias, alpha=alpha), x, upstream)
    torch.testing.assert_close(y, bias.expand(2, -1), rtol=0, atol=1e-6)
    u = (upstream * weight).double()
    expected = ((u - mean(u)) / math.sqrt(1e-5)).to(dtype)
    assert_near(gradient, expected, max(TOLERANCE[dtype], 1e-6))


@PROPERTY
@given(st.floats(-100, 100), st.floats(-12, -2), rows(DTYPES), ALPHAS, st.booleans(), SEEDS)
def test_near_constant_rows_stay_finite_through_normal_norm(value, exponent, x, alpha, training, seed):
    norm = LayerNormalNorm(x.shape[-1], alpha=alpha).train(training)
    near = (value + 10.0**exponent * x.double()).to(x.dtype)
    y, gradient = run(norm, near, normal(seed, *x.shape, dtype=x.dtype))
    assert y.isfinite().all()
    assert gradient.isfinite().all()


@PROPERTY
@given(st.integers(64, 1024), st.sampled_from([-1, 1]), SEEDS)
def test_one_massive_activation_pushes_lambda_hat_out_of_range_and_the_row_together(width, sign, seed):
    x = normal(seed, 1, width)
    x[0, 0] = sign * 1e4
    h, _ = standardize_by_hand(x, 1e-5)
    assert 1 + sign * (newton_lambda(h).item() - 1) == pytest.approx(-3, abs=0.7)
    assert normal_norm(x).std() < 0.1


@PROPERTY
@given(
    st.floats(max_value=0) | st.floats(min_value=1, exclude_min=True) | st.just(math.nan) | st.none(),
    st.floats(0, 1, exclude_min=True),
    st.sampled_from(["scaled", "unscaled"]),
)
def test_keep_prob_goes_with_dropout_and_is_a_probability(wrong, right, other_mode):
    LayerNormalNorm(8, noise_mode="dropout", keep_prob=right)
    with pytest.raises((TypeError, ValueError), match="keep_prob: got"):
        LayerNormalNorm(8, noise_mode="dropout", keep_prob=wrong)
    with pytest.raises((TypeError, ValueError), match="keep_prob: got"):
        normal_norm(torch.zeros(1, 8), noise_mode="dropout", keep_prob=wrong)
    with pytest.raises(ValueError, match="keep_prob: got"):
        LayerNormalNorm(8, noise_mode=other_mode, keep_prob=right)


@PROPERTY
@given(rows(), st.floats(0, 5), SEEDS)
def test_dyt_and_its_gradients_are_their_formulas(x, alpha, seed):
    weight, bias, upstream = affine_and_upstream(seed, x)
    norm = DynamicTanh(x.shape[-1], init_alpha=alpha, dtype=x.dtype)
    assert norm.alpha.shape == (1,)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    x.requires_grad_()
    y = norm(x)
    gradients = torch.autograd.grad(y, [x, norm.weight, norm.bias, norm.alpha], upstream)
    x, y = x.detach(), y.detach()
    tanh = torch.tanh(alpha * x)
    du = upstream * weight * (1 - tanh**2)
    expected = (alpha * du, (upstream * tanh).sum(0), upstream.sum(0), (du * x).sum().reshape(1))
    for actual, by_hand in zip((y, *gradients), (weight * tanh + bias, *expected), strict=True):
        assert_near(actual, by_hand, 1e-12)


def defaults(function):
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def test_defaults_are_the_documented_ones():
    ib_norm_fields = {
        "variant": "L",
        "learn_lam": False,
        "unit": "raw",
        "standardize": "layer",
        "order": "compress_first",
        "eps": 1e-6,
    }
    normal_norm_fields = {"noise_mode": "scaled", "keep_prob": None, "alpha": 1.0, "eps": 1e-5}
    affine = {"elementwise_affine": True, "bias": True}
    assert defaults(IBNorm).items() >= ib_norm_fields.items()
    assert defaults(LayerNormalNorm).items() >= (normal_norm_fields | {"noise": 1.0}).items()
    assert defaults(normal_norm).items() >= (normal_norm_fields | {"noise": 0.0}).items()
    assert defaults(DynamicTanh)["init_alpha"] == 0.5
    assert all(NORMS[name].defaults.items() >= affine.items() for name in ("ibnorm_l", "layernormalnorm", "dyt"))
