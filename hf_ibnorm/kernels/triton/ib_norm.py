"""Forward and backward of IBNorm in Triton: formulas and names as in `../cpu/norms.cpp`."""

import triton
import triton.language as tl

from .elementary import centre, exponential, load, load_stats, log1p_positive, store, store_stats


@triton.jit
def compress(c, lam, VARIANT: tl.constexpr):
    """f(c) and f'(c)."""
    tiny = lam < 1.1754943508222875e-38  # the limit of L and T at 0 is the identity
    lam = tl.where(tiny, 1.0, lam)
    inverse = 1.0 / lam
    if VARIANT == "S":
        f = c * inverse
        slope = tl.zeros_like(c) + inverse
    elif VARIANT == "L":
        u = tl.abs(c) * lam
        slope = 1.0 / (1.0 + u)
        f = log1p_positive(u) * inverse
        f = tl.where(c < 0, -f, f)
    else:
        v = tl.abs(c) * (2.0 * lam)
        e, _ = exponential(tl.where(v > 40.0, 40.0, v))
        below = 1.0 / (e + 2.0)
        slope = 4.0 * (e + 1.0) * below * below
        f = e * below * inverse
        f = tl.where(c < 0, -f, f)
    return tl.where(tiny, c, f), tl.where(tiny, 1.0, slope)


@triton.jit
def lam_in_unit(c, lam, n, MEAN_ABS: tl.constexpr):
    """lam/a and a = mean|c| where that is the unit (f for lam/a is a·f_lam(c/a)); else lam and 1."""
    a = 1.0
    if MEAN_ABS:
        a = tl.sum(tl.abs(c)) / n
        a = tl.where(a == 0.0, 1.0, a)
        lam = tl.minimum(lam / a, 1e30)
    return lam, a


@triton.jit
def forward(
    x_ptr,
    y_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    lam_ptr,
    x_stride,
    n,
    eps,
    VARIANT: tl.constexpr,
    MEAN_ABS: tl.constexpr,
    RMS: tl.constexpr,
    STANDARDIZE_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    x = load(x_ptr, row, x_stride, at, n)
    lam = tl.load(lam_ptr)
    mean, rest, c = centre(x, inside, n)
    if STANDARDIZE_FIRST:
        h = x if RMS else c
        r = 1.0 / tl.sqrt_rn(tl.sum(h * h) / n + eps)
        shift = -mean * r if RMS else mean * 0.0
        c = c * r
        lam, a = lam_in_unit(c, lam, n, MEAN_ABS)
        f, slope = compress(c, lam, VARIANT)
        z = f - shift
    else:
        lam, a = lam_in_unit(c, lam, n, MEAN_ABS)
        f, slope = compress(c, lam, VARIANT)
        shift = -mean if RMS else tl.sum(f) / n
        z = tl.where(inside, f - shift, 0.0)
        r = 1.0 / tl.sqrt_rn(tl.sum(z * z) / n + eps)
        z = z * r
    store(y_ptr, row, at, n, z, weight_ptr, bias_ptr)
    store_stats(stats_ptr, row, mean, rest, shift, r)


@triton.jit
def backward(
    grad_ptr,
    x_ptr,
    dx_ptr,
    stats_ptr,
    weight_ptr,
    dweight_ptr,
    dbias_ptr,
    lam_ptr,
    grad_stride,
    x_stride,
    rows,
    n,
    VARIANT: tl.constexpr,
    MEAN_ABS: tl.constexpr,
    RMS: tl.constexpr,
    STANDARDIZE_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes consecutive rows, and leaves a row of partial sums for dweight and dbias."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    first = program * rows // programs
    last = (program + 1) * rows // programs
    at = tl.arange(0, BLOCK)
    inside = at < n
    lam_given = tl.load(lam_ptr)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    if weight_ptr is not None:
        weight = load(weight_ptr, 0, n, at, n)
    for row in range(first, last):
        x = load(x_ptr, row, x_stride, at, n)
        u = load(grad_ptr, row, grad_stride, at, n)
        mean, rest, shift, r = load_stats(stats_ptr, row)
        c = tl.where(inside, x - mean - rest, 0.0)
        if STANDARDIZE_FIRST:
            c = c * r
        lam, a = lam_in_unit(c, lam_given, n, MEAN_ABS)
        f, slope = compress(c, lam, VARIANT)
        z = f - shift
        if not STANDARDIZE_FIRST:
            z = z * r
        if dbias_ptr is not None:
            dbias += u
        if dweight_ptr is not None:
            dweight += u * z
        if weight_ptr is not None:
            u = u * weight
        d = u
        if not STANDARDIZE_FIRST:
            d = u - z * (tl.sum(u * z) / n)
            if not RMS:
                d = d - tl.sum(u) / n
            d = tl.where(inside, d * r, 0.0)
        dc = d * slope
        if MEAN_ABS:
            path = tl.sum(d * (f - c * slope)) / (a * n)
            dc += tl.where(c > 0, path, tl.where(c < 0, -path, 0.0))
        dc = dc - tl.sum(dc) / n
        if RMS:
            dc += tl.sum(d) / n
        if STANDARDIZE_FIRST:
            h = tl.where(inside, c - shift, 0.0)
            dc = r * (dc - h * (tl.sum(dc * h) / n))
        store(dx_ptr, row, at, n, dc, None, None)
    store(dweight_ptr, program, at, n, dweight, None, None)
    store(dbias_ptr, program, at, n, dbias, None, None)
