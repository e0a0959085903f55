"""The formulas of every norm in plain PyTorch: the definition that all else is tested against.

Each function works over the last dimension, computes in float32 (float64 for float64 inputs) and returns the
dtype of its input. Nothing here holds state or knows about modules; autograd gives exact derivatives, also at 0,
where a naive `sign(c) * ...` would give slope 0.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_choice, check_number

VARIANTS = ("L", "S", "T", "shrink")
UNITS = ("raw", "mean_abs")
STANDARDIZE = ("layer", "rms")
ORDERS = ("compress_first", "standardize_first")
NOISE_MODES = ("scaled", "unscaled", "dropout")

# A smaller lam is 0: float32 could not divide by it. A larger one than _HUGE would overflow.
_TINY, _HUGE = torch.finfo(torch.float32).tiny, 1e30
# Below these |u| the quotients expm1(u)/u, log1p(u)/u and tanh(u)/u are replaced by their Taylor series, whose
# derivatives keep all their digits. The first terms left out are below 1e-15.
_EXPM1_RADIUS, _EXPM1 = 0.25, tuple(1.0 / math.factorial(k + 1) for k in range(11))
_LOG1P_RADIUS, _LOG1P = 0.0625, tuple((-1.0) ** k / (k + 1) for k in range(13))
_TANH_RADIUS = 0.25
_TANH: tuple[float, ...] = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835)  # in u²
_TANH += (-1382 / 155925, 21844 / 6081075, -929569 / 638512875, 6404582 / 10854718875, -443861162 / 1856156927625)


def check_lam(variant: str, lam: object) -> None:
    """Raise unless `lam` suits `variant`: S takes lam >= 1, L and T lam >= 0 (up to 1e30), shrink 0 <= lam < 1."""
    if variant == "shrink":
        check_number("lam", lam, 0.0, 1.0, high_allowed=False)
    else:
        check_number("lam", lam, 1.0 if variant == "S" else 0.0, _HUGE)


def _compute(x: Tensor) -> Tensor:
    """`x` in the dtype the statistics are computed in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def _sign(x: Tensor) -> Tensor:
    """±1 with +1 at 0, so that sign·g(sign·x) has slope g'(0) at 0 under autograd."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the last dimension and deviation from it; the second subtraction makes constant rows exactly 0."""
    mean = x.mean(-1, keepdim=True)
    c = x - mean
    return mean, c - c.mean(-1, keepdim=True)


def _polynomial(u: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Σ coefficients[k]·u^k by Horner's rule."""
    total = torch.full_like(u, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * u + coefficient
    return total


def _shape(c: Tensor, variant: str, lam: float | Tensor) -> Tensor:
    """f_lam(c) in the unit of `c`; at lam = 0, L and T are the identity, their limit."""
    if variant == "S":
        return c / lam
    if variant == "shrink":
        t = lam * c.abs().mean(-1, keepdim=True)
        return c - c.clamp(-t, t)
    if not isinstance(lam, Tensor):
        return c if lam < _TINY else _shape_at(c, variant, lam)
    if lam.ndim or lam.requires_grad:  # a learned one
        return _shape_for_learning(c, variant, lam)
    # No branch on the value: that would synchronise the device and break a compiled graph.
    return torch.where(lam < _TINY, c, _shape_at(c, variant, torch.where(lam < _TINY, 1.0, lam)))


def _shape_at(c: Tensor, variant: str, lam: float | Tensor) -> Tensor:
    if variant == "T":
        return torch.tanh(lam * c) / lam
    sign = _sign(c)
    return sign * torch.log1p(lam * (sign * c)) / lam


def _shape_for_learning(c: Tensor, variant: str, lam: Tensor) -> Tensor:
    """The same as c·g(u), with g(u) = log1p(u)/u of u = lam·|c|, or tanh(u)/u of u = lam·c.

    The derivative in lam of f(lam·c)/lam is a difference of two near equals where lam·|c| is small: in float32 it has
    no digits left at lam = 1e-4. That of g has all of them.
    """
    u = lam * (c if variant == "T" else _sign(c) * c)
    small = u.abs() < (_TANH_RADIUS if variant == "T" else _LOG1P_RADIUS)
    near, far = torch.where(small, u, 0.0), torch.where(small, 1.0, u)
    if variant == "T":
        return c * torch.where(small, _polynomial(near * near, _TANH), torch.tanh(far) / far)
    return c * torch.where(small, _polynomial(near, _LOG1P), torch.log1p(far) / far)


def compress(c: Tensor, *, variant: str, lam: float | Tensor, unit: str = "raw") -> Tensor:
    """Bounded compression f_lam of deviations towards 0 (IBNorm, arXiv 2510.25262).

    f is odd, non-decreasing and a contraction, |f(c)| <= |c|, with

    * S: c / lam
    * L: sign(c)·log1p(lam·|c|) / lam
    * T: tanh(lam·c) / lam
    * shrink (this project's, experimental): sign(c)·relu(|c| - lam·mean|c|)

    Args:
        c: deviations from the group mean, shape (..., N), any floating dtype.
        variant: "S", "L", "T" or "shrink".
        lam: strength. S: lam >= 1; L and T: lam >= 0, where 0 is the identity; shrink: 0 <= lam < 1. A tensor
            (broadcastable to (..., 1)) is used as it is, without a check of its value; one that has dimensions or needs
            a gradient goes through a form whose derivative in lam is accurate, for L and T at lam = 0 too.
        unit: "raw" takes `c` as it is; "mean_abs" measures it in the group's own a = mean|c|: f = a·f_lam(c / a).
            Where a = 0, f = 0 with slope f'(0).

    Returns:
        Tensor of the shape and dtype of `c`.

    Raises:
        ValueError, TypeError: an unknown option, or a number for `lam` out of range.
    """
    check_choice("variant", variant, VARIANTS)
    check_choice("unit", unit, UNITS)
    dtype, c = c.dtype, _compute(c)
    if isinstance(lam, Tensor):
        lam = lam.to(c.dtype)
    else:
        check_lam(variant, lam)
    # S and shrink are homogeneous: measuring c in its own unit changes nothing.
    if unit == "raw" or variant in ("S", "shrink"):
        return _shape(c, variant, lam).to(dtype)
    a = c.abs().mean(-1, keepdim=True)
    a = torch.where(a == 0, 1.0, a)
    return (a * _shape(c / a, variant, lam)).to(dtype)


def slope(c: Tensor, *, variant: str, lam: float | Tensor, unit: str = "raw") -> Tensor:
    """The derivative f'(c) of `functional.compress` (arXiv 2510.25262), element by element.

    Args:
        c: deviations, shape (..., N), float32 or float64.
        variant, lam, unit: as in `compress`. For "mean_abs" and shrink, the unit a = mean|c| is held fast.

    Returns:
        Shape and dtype of `c`; from 0 to 1.
    """
    a = c.abs().mean(-1, keepdim=True)
    if variant == "S":
        return torch.ones_like(c) / lam
    if variant == "shrink":
        return (c.abs() > lam * a).to(c.dtype)
    u = lam * (c.abs() / torch.where(a == 0, 1.0, a) if unit == "mean_abs" else c.abs())
    return 1 / (1 + u) if variant == "L" else 1 - torch.tanh(u).square()


def affine(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight·z + bias in the dtype of `z`, either of them left out where it is None."""
    if weight is not None:
        z = z * weight.to(z.dtype)
    return z if bias is None else z + bias.to(z.dtype)


def ib_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    variant: str = "L",
    lam: float | Tensor,
    unit: str = "raw",
    standardize: str = "layer",
    order: str = "compress_first",
    eps: float = 1e-6,
) -> Tensor:
    """IBNorm over the last dimension (arXiv 2510.25262; the closed forms are this project's definition).

    With c = x - mean(x) and s = mean(x) + compress(c)::

        layer:  z = (s - mean(s)) / sqrt(var(s) + eps)      biased variance
        rms:    z = s / sqrt(mean(s²) + eps)
        y = weight·z + bias

    `order="standardize_first"` is the paper's ablation: h = layer or rms of x, y = weight·(m + compress(h - m)) + bias
    with m = mean(h).

    A linear contraction is undone by standardization: variant S with `layer` and `compress_first` IS LayerNorm, with
    eps·lam² in place of eps. With lam = 0, L and T are LayerNorm (`layer`) or RMSNorm (`rms`).

    Args:
        x: shape (..., N), any floating dtype.
        weight, bias: shape (N,) or None.
        variant, lam, unit: as in `compress`.
        standardize: "layer" or "rms".
        order: "compress_first" or "standardize_first".
        eps: added to the variance or mean square.

    Returns:
        Tensor of the shape and dtype of `x`; statistics are computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an unknown option, or a number for `lam` out of range.
    """
    check_choice("standardize", standardize, STANDARDIZE)
    check_choice("order", order, ORDERS)
    check_number("eps", eps, 0.0)
    dtype, x = x.dtype, _compute(x)
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    shape = x.shape[-1:]

    if order == "compress_first":
        mean, c = centre(x)
        f = compress(c, variant=variant, lam=lam, unit=unit)
        if standardize == "layer":  # s - mean(s) = f - mean(f): the mean is left out, it would only cost digits
            return F.layer_norm(f, shape, weight, bias, eps).to(dtype)
        return affine(F.rms_norm(mean + f, shape, eps=eps), weight, bias).to(dtype)

    # layer_norm of the deviation, not of x: exact for constant rows
    h = F.layer_norm(centre(x)[1], shape, eps=eps) if standardize == "layer" else F.rms_norm(x, shape, eps=eps)
    mean, c = centre(h)
    return affine(mean + compress(c, variant=variant, lam=lam, unit=unit), weight, bias).to(dtype)


def power_transform(h: Tensor, lam: float | Tensor) -> Tensor:
    """Yeo-Johnson power transform ψ(h; lam) of arXiv 2505.00685, exact at and near its singular points lam = 0 and 2.

    With s = sign(h), l = log1p(|h|) and η = 1 + s·(lam - 1): ψ = s·expm1(η·l) / η, and s·l at η = 0.

    Args:
        h: any shape and floating dtype.
        lam: a number or a tensor broadcastable to `h`.

    Returns:
        Tensor of the shape and dtype of `h`.
    """
    dtype, h = h.dtype, _compute(h)
    sign = _sign(h)
    ell = torch.log1p(sign * h)
    q = (1 + sign * (lam - 1)) * ell
    # ψ = s·l·φ(q) with φ(q) = expm1(q)/q: no division by η, and autograd stays accurate where q is small.
    small = q.abs() < _EXPM1_RADIUS
    near, far = torch.where(small, q, 0.0), torch.where(small, 1.0, q)
    return (sign * ell * torch.where(small, _polynomial(near, _EXPM1), torch.expm1(far) / far)).to(dtype)


def newton_lambda(h: Tensor, *, alpha: float = 1.0, eps: float = 1e-5) -> Tensor:
    """One Newton step from 1 towards the maximum-likelihood power-transform parameter of each row.

    λ̂ = 1 - alpha·L'(h) / (L''(h) + sqrt(eps)), where L is the profile log-likelihood of the Yeo-Johnson transform
    of a standardized row (arXiv 2505.00685). Differentiable. The sqrt(eps) keeps near-constant rows finite.

    Args:
        h: standardized rows, shape (..., N).
        alpha: step length in [0, 1]; 0 gives λ̂ = 1, the identity transform.
        eps: as in the norm.

    Returns:
        λ̂ of shape (..., 1), float32 (float64 for float64 inputs).
    """
    h = _compute(h)
    sign = _sign(h)
    a = sign * h
    ell = torch.log1p(a)
    d = (1 + a) * ell - a
    dvar = 2 * (h * d).mean(-1, keepdim=True)
    d2 = sign * ((1 + a) * ell.square() - 2 * d)
    first = dvar / 2 - (sign * ell).mean(-1, keepdim=True)
    centred = d - d.mean(-1, keepdim=True)
    second = (h * d2 + centred.square()).mean(-1, keepdim=True) - dvar.square() / 2
    return 1 - alpha * first / (second + math.sqrt(eps))


def normal_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    noise: float = 0.0,
    noise_mode: str = "scaled",
    keep_prob: float | None = None,
    alpha: float = 1.0,
    eps: float = 1e-5,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Normality normalization over the last dimension (LayerNormalNorm, arXiv 2505.00685)::

        h = (x - mean(x)) / sqrt(var(x) + eps)
        p = power_transform(h, newton_lambda(h))
        q = p + noise·s·n,  s = mean|p - mean(p)| detached,  n ~ N(0, 1)      in training only
        y = weight·q + bias

    Args:
        x: shape (..., N), any floating dtype.
        weight, bias: shape (N,) or None.
        noise: ξ >= 0, the strength of the noise; 0 draws none.
        noise_mode: "scaled" as above; "unscaled" fixes s = sqrt(2/π), the value of a standard Gaussian;
            "dropout" is q = p·(1 + n·sqrt((1 - keep_prob) / keep_prob)), with `noise` unused.
        keep_prob: in (0, 1], for `noise_mode="dropout"` only.
        alpha: length of the Newton step in [0, 1]; 0 turns the power transform off.
        eps: sits in the standardization and, as sqrt(eps), in the Newton step.
        training: noise is added only if True.
        generator: source of the noise; the default generator of `x`'s device if None.

    Returns:
        Tensor of the shape and dtype of `x`; computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an option is unknown, out of range or does not go with `noise_mode`.
    """
    scale, mode = resolve_noise(noise, noise_mode, keep_prob, training)
    check_number("alpha", alpha, 0.0, 1.0)
    check_number("eps", eps, 0.0)
    normals = None
    if mode != "none":
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        normals = torch.randn(x.shape, generator=generator, device=x.device, dtype=dtype)
    return normal_norm_with(x, weight, bias, normals, scale, mode, alpha, eps)


def normal_norm_with(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normals: Tensor | None,
    noise: float,
    noise_mode: str,
    alpha: float,
    eps: float,
) -> Tensor:
    """`normal_norm` with its noise given: `normals` of the shape of `x`, the rest as `resolve_noise` returns it."""
    dtype, x = x.dtype, _compute(x)
    h = F.layer_norm(centre(x)[1], x.shape[-1:], eps=eps)
    p = power_transform(h, newton_lambda(h, alpha=alpha, eps=eps))
    if normals is not None and noise_mode != "none":
        if noise_mode == "dropout":
            p = p * (1 + normals * noise)
        elif noise_mode == "scaled":
            centred = p.detach() - p.detach().mean(-1, keepdim=True)
            p = p + noise * centred.abs().mean(-1, keepdim=True) * normals
        else:
            p = p + noise * math.sqrt(2 / math.pi) * normals
    return affine(p, weight, bias).to(dtype)


def resolve_noise(noise: float, noise_mode: str, keep_prob: float | None, training: bool) -> tuple[float, str]:
    """Strength and mode of the noise that `normal_norm` adds; (0.0, "none") outside training, or at strength 0.

    For "dropout" the strength is sqrt((1 - keep_prob)/keep_prob), which multiplies the normals.

    Raises:
        ValueError, TypeError: as `check_noise`.
    """
    check_noise(noise, noise_mode, keep_prob)
    if not training or (noise == 0 and noise_mode != "dropout"):
        return 0.0, "none"
    return (noise, noise_mode) if keep_prob is None else (math.sqrt((1 - keep_prob) / keep_prob), noise_mode)


def check_noise(noise: float, noise_mode: str, keep_prob: float | None) -> None:
    """Raise ValueError or TypeError unless the three noise options of `normal_norm` go together."""
    check_number("noise", noise, 0.0)
    check_choice("noise_mode", noise_mode, NOISE_MODES)
    if noise_mode == "dropout":
        if keep_prob is None or keep_prob == 0:
            raise ValueError(f"keep_prob: got {keep_prob!r}, noise_mode 'dropout' needs one > 0 and <= 1")
        check_number("keep_prob", keep_prob, 0.0, 1.0)
    elif keep_prob is not None:
        raise ValueError(
            f"keep_prob: got {keep_prob!r} with noise_mode {noise_mode!r}; it goes with noise_mode 'dropout'"
        )
