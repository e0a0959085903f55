"""Functions that the Triton kernels share: rows read and written, log and exp in float32 to a few last digits.

Triton's own log and exp are the GPU's approximations, whose error is absolute near 1: `log(1 + u)` would have no digits
left for small u, where most activations are. Polynomials and reductions are those of `../cpu/norms.cpp`.
"""

import triton
import triton.language as tl


@triton.jit
def log1p_positive(u):
    """log(1 + u), u >= 0, as k·log(2) + log(1 + m) with 1 + m in [0.75, 1.5]."""
    k = ((u + 1.0).to(tl.int32, bitcast=True) - 0x3F400000) & -8388608
    scale = (0x40800000 - k).to(tl.float32, bitcast=True) * 0.25
    m = (u.to(tl.int32, bitcast=True) - k).to(tl.float32, bitcast=True) + (scale - 1.0)
    p = 0.05413243919610977
    p = p * m - 0.12067364156246185
    p = p * m + 0.14983916282653809
    p = p * m - 0.1682281196117401
    p = p * m + 0.19977077841758728
    p = p * m - 0.24993441998958588
    p = p * m + 0.3333354890346527
    p = p * m - 0.5000005960464478
    # the last term keeps NaN, and makes it of infinity, as the norms do anyway
    return (k >> 23).to(tl.float32) * 0.6931471805599453 + (m * m * p + m) + u * 0.0


@triton.jit
def exponential(q):
    """exp(q) - 1 and exp(q), as 2^j·exp(f) with |f| <= log(2)/2."""
    q = tl.where(q > 89.0, 89.0, q)
    q = tl.where(q < -87.0, -87.0, q)
    shifted = q * 1.4426950408889634 + 12582912.0  # 1.5·2^23: adding it rounds to an integer
    j = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    whole = shifted - 12582912.0
    f = q - whole * 0.693145751953125 - whole * 1.428606765330187e-06
    p = 0.0001984588598133996
    p = p * f + 0.0013940727803856134
    p = p * f + 0.008333389647305012
    p = p * f + 0.04166635870933533
    p = p * f + 0.1666666567325592
    p = p * f + 0.5
    p = f * f * p + f
    half = ((j + 126) << 23).to(tl.float32, bitcast=True)  # 2^(j-1): 2^128 is no float32
    value = half * p + half
    minus_one = half * p + (half - 0.5)
    return minus_one + minus_one, value + value


@triton.jit
def load(ptr, row, stride, at, n):
    """A row in float32, with zeros beyond its end."""
    return tl.load(ptr + row * stride + at, mask=at < n, other=0.0).to(tl.float32)


@triton.jit
def centre(x, inside, n):
    """mean(x), the mean that rounding leaves, and x less both: exactly 0 for a constant row."""
    mean = tl.sum(x) / n
    c = tl.where(inside, x - mean, 0.0)
    rest = tl.sum(c) / n
    return mean, rest, tl.where(inside, c - rest, 0.0)


@triton.jit
def store(ptr, row, at, n, z, weight_ptr, bias_ptr):
    """Write a row of weight·z + bias in the dtype of `ptr`; each of the three pointers may be None."""
    if weight_ptr is not None:
        z *= load(weight_ptr, 0, n, at, n)
    if bias_ptr is not None:
        z += load(bias_ptr, 0, n, at, n)
    if ptr is not None:
        tl.store(ptr + row * n + at, z.to(ptr.dtype.element_ty), mask=at < n)


@triton.jit
def store_stats(ptr, row, first, second, third, fourth):
    """Keep four numbers of a row for backward."""
    tl.store(ptr + row * 4, first)
    tl.store(ptr + row * 4 + 1, second)
    tl.store(ptr + row * 4 + 2, third)
    tl.store(ptr + row * 4 + 3, fourth)


@triton.jit
def load_stats(ptr, row):
    """The numbers that `store_stats` kept."""
    return tl.load(ptr + row * 4), tl.load(ptr + row * 4 + 1), tl.load(ptr + row * 4 + 2), tl.load(ptr + row * 4 + 3)
