"""Forward and backward of LayerNormalNorm in Triton: formulas and names as in `../cpu/norms.cpp`."""

import triton
import triton.language as tl

from .elementary import centre, exponential, load, load_stats, log1p_positive, store, store_stats


@triton.jit
def box_muller(radius_bits, angle_bits):
    """Two independent standard normals from two independent, uniform 32-bit integers."""
    uniform = ((radius_bits >> 1).to(tl.int32) & 0x7FFFFFFF).to(tl.float32) * 4.656612873077393e-10  # 2^-31
    radius = tl.sqrt(-2.0 * tl.log(uniform + 2.3283064365386963e-10))
    turn = (angle_bits.to(tl.int32, bitcast=True) >> 8).to(tl.float32) * 5.960464477539063e-08  # [-1/2, 1/2)
    shifted = turn * 4.0 + 12582912.0  # 1.5·2^23: adding it rounds to an integer
    quadrant = shifted.to(tl.int32, bitcast=True)
    rest = turn - (shifted - 12582912.0) * 0.25  # |rest| <= 1/8 of a turn
    square = rest * rest
    s = ((-75.39356231689453 * square + 81.59235382080078) * square - 41.3416633605957) * square + 6.2831854820251465
    s = s * rest
    t = (59.202796936035156 * square - 85.44229888916016) * square + 64.9393081665039
    t = (t * square - 19.739208221435547) * square + 1.0
    odd = (quadrant & 1) != 0
    sine = tl.where(odd, t, s)
    cosine = tl.where(odd, s, t)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    return radius * cosine, radius * sine


@triton.jit
def normals_of(row, at, n, seed_ptr, normals_ptr, BLOCK: tl.constexpr):
    """Standard normals of a row: those given, or else four from each Philox counter of this row and `seed`."""
    if normals_ptr is not None:
        normals = load(normals_ptr, row, n, at, n)
    else:
        a, b, c, d = tl.randint4x(tl.load(seed_ptr), row * (BLOCK // 4) + tl.arange(0, BLOCK // 4))
        a, b = box_muller(a, b)
        c, d = box_muller(c, d)
        normals = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return normals


@triton.jit
def newton(h, inside, n):
    """l, d, mean(d), dvar, first and second of a row h (see norms.cpp)."""
    a = tl.abs(h)
    ell = log1p_positive(a)
    more = (1.0 + a) * ell
    d = more - a
    mean_d = tl.sum(d) / n
    dvar = 2.0 * tl.sum(h * d) / n
    first = dvar / 2 - tl.sum(tl.where(h < 0, -ell, ell)) / n
    centred = tl.where(inside, d - mean_d, 0.0)
    second = tl.sum(a * (more * ell - 2.0 * d) + centred * centred) / n - dvar * dvar / 2
    return ell, d, mean_d, dvar, first, second


@triton.jit
def eta_of(h, lam):
    """η of each element; a tiny one where it is 0, so that expm1(η·l)/η is its limit l."""
    eta = tl.where(h < 0, 2.0 - lam, lam)
    return tl.where(tl.abs(eta) < 1e-30, 1e-30, eta)


@triton.jit
def noise_scales(p, inside, n, noise, MODE: tl.constexpr):
    """plain and product of q = p + normals·(plain + product·p)."""
    plain = 0.0
    product = 0.0
    if MODE == "scaled":
        mean = tl.sum(p) / n
        plain = noise * tl.sum(tl.where(inside, tl.abs(p - mean), 0.0)) / n
    elif MODE == "unscaled":
        plain = noise * 0.7978845608028654  # sqrt(2/π)
    elif MODE == "dropout":
        product = noise
    return plain, product


@triton.jit
def forward(
    x_ptr,
    y_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    normals_ptr,
    x_stride,
    n,
    noise,
    alpha,
    eps,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    mean, rest, h = centre(load(x_ptr, row, x_stride, at, n), inside, n)
    r = 1.0 / tl.sqrt_rn(tl.sum(h * h) / n + eps)
    h = h * r
    ell, d, mean_d, dvar, first, second = newton(h, inside, n)
    lam = 1.0 - alpha * first / (second + tl.sqrt_rn(eps + tl.zeros_like(second)))
    eta = eta_of(h, lam)
    minus_one, _ = exponential(eta * ell)
    p = minus_one / eta
    p = tl.where(h < 0, -p, p)
    q = p
    if MODE != "none":
        plain, product = noise_scales(p, inside, n, noise, MODE)
        q = p + normals_of(row, at, n, seed_ptr, normals_ptr, BLOCK) * (plain + product * p)
    store(y_ptr, row, at, n, q, weight_ptr, bias_ptr)
    store_stats(stats_ptr, row, mean, rest, r, lam)


@triton.jit
def backward(
    grad_ptr,
    x_ptr,
    dx_ptr,
    stats_ptr,
    weight_ptr,
    dweight_ptr,
    dbias_ptr,
    seed_ptr,
    normals_ptr,
    grad_stride,
    x_stride,
    rows,
    n,
    noise,
    alpha,
    eps,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program takes consecutive rows, and leaves a row of partial sums for dweight and dbias."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    first_row = program * rows // programs
    last_row = (program + 1) * rows // programs
    at = tl.arange(0, BLOCK)
    inside = at < n
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    if weight_ptr is not None:
        weight = load(weight_ptr, 0, n, at, n)
    for row in range(first_row, last_row):
        x = load(x_ptr, row, x_stride, at, n)
        u = load(grad_ptr, row, grad_stride, at, n)
        mean, rest, r, lam = load_stats(stats_ptr, row)
        h = tl.where(inside, x - mean - rest, 0.0) * r
        a = tl.abs(h)
        ell, d, mean_d, dvar, first, second = newton(h, inside, n)
        eta = eta_of(h, lam)
        q = eta * ell
        minus_one, value = exponential(q)
        if dbias_ptr is not None:
            dbias += u
        if (dweight_ptr is not None and MODE != "none") or MODE == "dropout":
            normals = normals_of(row, at, n, seed_ptr, normals_ptr, BLOCK)
        if dweight_ptr is not None:
            p = minus_one / eta
            p = tl.where(h < 0, -p, p)
            noisy = p
            if MODE != "none":
                plain, product = noise_scales(p, inside, n, noise, MODE)
                noisy = p + normals * (plain + product * p)
            dweight += u * noisy
        if weight_ptr is not None:
            u = u * weight
        if MODE == "dropout":
            u = u * (1.0 + noise * normals)
        # ∂ψ/∂λ = (q·e^q - expm1(q))/η²; near q = 0, where that has no digits left, its series
        series = 1.0 / 5760.0
        series = series * q + 1.0 / 840.0
        series = series * q + 1.0 / 144.0
        series = series * q + 1.0 / 30.0
        series = series * q + 0.125
        series = series * q + 1.0 / 3.0
        series = series * q + 0.5
        dlam = tl.where(tl.abs(q) < 0.5, ell * ell * series, (q * value - minus_one) / (eta * eta))
        total = tl.sum(u * dlam)
        denominator = second + tl.sqrt_rn(eps + tl.zeros_like(second))
        A = -alpha * total / (n * denominator)
        B = -A * first / denominator
        below = 1.0 / (1.0 + a)
        both = d + a * ell
        odd = (1.0 + 2.0 * a) * ell * ell - 2.0 * d + 2.0 * ell * (d - mean_d)
        odd = tl.where(h < 0, -odd, odd)
        dh = u * value * below + A * (both - below) + B * (odd - 2.0 * dvar * both)
        dh = tl.where(inside, dh, 0.0)
        dx = r * (dh - tl.sum(dh) / n - h * (tl.sum(dh * h) / n))
        store(dx_ptr, row, at, n, dx, None, None)
    store(dweight_ptr, program, at, n, dweight, None, None)
    store(dbias_ptr, program, at, n, dbias, None, None)


@triton.jit
def draw(out_ptr, seed_ptr, n, BLOCK: tl.constexpr):
    """Write the standard normals of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    store(out_ptr, row, at, n, normals_of(row, at, n, seed_ptr, None, BLOCK), None, None)
