"""Dynamic Tanh, a control without statistics; the other controls, LayerNorm and RMSNorm, are torch's own modules."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .checks import check_number
from .functional import affine
from .norm_base import NormBase


class DynamicTanh(NormBase):
    """Dynamic Tanh, a control without statistics: y = weight·tanh(alpha·x) + bias (arXiv 2503.10622).

    Args:
        normalized_shape: N, the width of the last dimension.
        init_alpha: initial value of the learned scalar `alpha`, of shape (1,).
        elementwise_affine, bias: as in torch.nn.LayerNorm.
        device, dtype: of the parameters.

    Shape: (..., N) → (..., N), in the dtype of the input; computed in float32 (float64 for float64).
    """

    _described = ("init_alpha",)

    def __init__(
        self,
        normalized_shape: int | tuple[int],
        init_alpha: float = 0.5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine=elementwise_affine, bias=bias, device=device, dtype=dtype)
        check_number("init_alpha", init_alpha, 0.0)
        self.init_alpha = float(init_alpha)
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.constant_(self.alpha, self.init_alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Squash `x` of shape (..., N) element by element."""
        wide = x if x.dtype == torch.float64 else x.float()
        y = affine(torch.tanh(self.alpha.to(wide.dtype) * wide), self.weight, self.bias)
        return y.to(x.dtype)
