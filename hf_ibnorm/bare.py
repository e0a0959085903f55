"""A norm without its gain and bias: what conversions fit them to, and what diagnostics look at."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import NormBase


def is_known(norm: nn.Module) -> bool:
    """Whether `without_affine` takes this module."""
    ours = isinstance(norm, NormBase | nn.LayerNorm | nn.RMSNorm)
    return ours or (type(norm).__name__.endswith("RMSNorm") and _eps(norm) is not None)


def _eps(norm: nn.Module) -> float | None:
    """That of one of Transformers' RMSNorms, which have two names for it."""
    eps: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps


def without_affine(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm makes of `x` before gain and bias, and without training noise.

    Args:
        norm: one of ours, torch's LayerNorm or RMSNorm, or one that Transformers calls ...RMSNorm.
        x: shape (..., N).

    Returns:
        z of the shape of `x`, float32 (float64 for float64 inputs).

    Raises:
        TypeError: another norm.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if isinstance(norm, NormBase):
        return norm.normalized(x)
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], eps=norm.eps)
    if isinstance(norm, nn.RMSNorm):
        return F.rms_norm(x, x.shape[-1:], eps=norm.eps)
    if is_known(norm):
        return F.rms_norm(x, x.shape[-1:], eps=_eps(norm))
    raise TypeError(f"norm: got {type(norm).__name__}, must be a norm of hf_ibnorm, a LayerNorm or an RMSNorm")
