"""A norm without its gain and bias: what conversions fit them to, and what diagnostics look at."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import ib_norm, normal_norm
from .norms import DynamicTanh, IBNorm, LayerNormalNorm


def without_affine(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm makes of `x` before gain and bias, and without training noise.

    Args:
        norm: one of ours, torch's LayerNorm or RMSNorm, or Transformers' LlamaRMSNorm.
        x: shape (..., N).

    Returns:
        z of the shape of `x`, float32 (float64 for float64 inputs).

    Raises:
        TypeError: another norm.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if isinstance(norm, IBNorm):
        return ib_norm(
            x,
            variant=norm.variant,
            lam=norm.current_lam(),
            unit=norm.unit,
            standardize=norm.standardize,
            order=norm.order,
            eps=norm.eps,
        )
    if isinstance(norm, LayerNormalNorm):
        return normal_norm(x, alpha=norm.alpha, eps=norm.eps)
    if isinstance(norm, DynamicTanh):
        return torch.tanh(norm.alpha.to(x.dtype) * x)
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], eps=norm.eps)
    if isinstance(norm, nn.RMSNorm):
        return F.rms_norm(x, x.shape[-1:], eps=norm.eps)
    if hasattr(norm, "variance_epsilon"):
        return F.rms_norm(x, x.shape[-1:], eps=norm.variance_epsilon)  # type: ignore[arg-type]
    raise TypeError(f"norm: got {type(norm).__name__}, must be a norm of hf_ibnorm, a LayerNorm or an RMSNorm")
