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
from hypothesis import assume, given, settings
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

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
OURS = [name for name in NORMS if name not in ("layernorm", "rmsnorm")]
# For two ways to the same number. Statistics of float32 rows lose some two digits of seven to cancellation; half
# types compute in float32 and may then round to the neighbouring number.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5} | {dtype: torch.finfo(dtype).eps for dtype in HALF}


def normal(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def random_rows(seed, count, width, scale, offset, dtype):
    return (scale * normal(seed, count, width) + offset).to(dtype)


def integer_rows(seed, count, width, dtype):
    """Integers in [-50, 50]: shifted by up to 64 and scaled by powers of two, every dtype still holds them exactly."""
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
    """The largest error is at most `tolerance` of the largest number, or of 1."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * (1 + expected.abs().max())


def mean(x):
    return x.mean(-1, keepdim=True)


SEEDS = st.integers(0, 2**32 - 1)
COUNTS, WIDTHS = st.integers(1, 4), st.integers(1, 40)
SOME_DTYPE = st.sampled_from(DTYPES)


def rows(dtype=st.just(torch.float64), count=COUNTS, width=WIDTHS):
    return st.builds(random_rows, SEEDS, count, width, st.floats(0.1, 10), st.floats(-5, 5), dtype)


SMALL = st.floats(-30, -2).map(lambda exponent: 10.0**exponent)
LAM = {
    "S": st.floats(1, 50),
    "L": st.just(0.0) | SMALL | st.floats(0.01, 50),
    "T": st.just(0.0) | SMALL | st.floats(0.01, 20),
    "shrink": st.just(0.0) | st.floats(0.01, 0.95),
}
LAM_FORMS = {
    "number": float,
    "buffer": lambda lam: torch.tensor(lam, dtype=torch.float64),
    "learned": lambda lam: torch.tensor([lam], dtype=torch.float64),
}
A_LAM_FORM = st.sampled_from(list(LAM_FORMS))


@st.composite
def shapes(draw, variants=VARIANTS, units=UNITS, lams=LAM):
    """Options of `compress`, lam a number."""
    variant = draw(st.sampled_from(variants))
    return {"variant": variant, "lam": draw(lams[variant]), "unit": draw(st.sampled_from(units))}


def in_form(options, form):
    return {**options, "lam": LAM_FORMS[form](options["lam"])}


@st.composite
def ib_options(draw, standardize=STANDARDIZE, order=ORDERS, eps=(1e-12, 1e-6, 1e-3), **shape):
    """Options of `ib_norm`, lam a number."""
    choices = {"standardize": standardize, "order": order, "eps": eps}
    return draw(shapes(**shape)) | {field: draw(st.sampled_from(values)) for field, values in choices.items()}


@st.composite
def norms(draw):
    """What makes one of this project's norms, given the width."""
    name = draw(st.sampled_from(OURS))
    if name == "dyt":
        return partial(build_norm, name, init_alpha=draw(st.floats(0, 3)))
    if name == "layernormalnorm":
        noise = draw(st.sampled_from(({}, {"noise_mode": "unscaled"}, {"noise_mode": "dropout", "keep_prob": 0.7})))
        return partial(build_norm, name, alpha=draw(st.floats(0, 1)), **noise)
    variant = NORMS[name].fixed["variant"]
    options = draw(ib_options(variants=(variant,), eps=(1e-6, 1e-3)))
    learn_lam = variant != "S" and options["lam"] > 0 and draw(st.booleans())
    return partial(build_norm, name, **{**options, "learn_lam": learn_lam} | {}) if False else partial(
        build_norm, name, learn_lam=learn_lam, **{key: value for key, value in options.items() if key != "variant"}
    )
