"""Dynamic Tanh, a control without statistics; the other controls, LayerNorm and RMSNorm, are torch's own modules."""

from typing import Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .checks import check_number
from .functional import affine
from .norm_base import Affine, NormBase


class DynamicTanh(NormBase):
    """Dynamic Tanh, a control without statistics: y = weight·tanh(alpha·x) + bias (arXiv 2503.10622).

    Args:
        normalized_shape: N, the width of the last dimension.
        init_alpha: initial value of the learned scalar `alpha`, of shape (1,).
        **affine: `elementwise_affine`, `bias`, `device`, `dtype`, as in torch.nn.LayerNorm.

    Shape: (..., N) → (..., N), in the dtype of the input; computed in float32 (float64 for float64).
    """

    _described = ("init_alpha",)

    def __init__(
        self,
        normalized_shape: int | tuple[int],
        init_alpha: float = 0.5,
        **affine: Unpack[Affine],
    ) -> None:
        super().__init__(normalized_shape, **affine)
        check_number("init_alpha", init_alpha, 0.0)
        self.init_alpha = float(init_alpha)
        self.alpha = nn.Parameter(torch.empty(1, device=affine.get("device"), dtype=affine.get("dtype")))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.constant_(self.alpha, self.init_alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Squash `x` of shape (..., N) element by element."""
        wide = x if x.dtype == torch.float64 else x.float()
        y = affine(torch.tanh(self.alpha.to(wide.dtype) * wide), self.weight, self.bias)
        return y.to(x.dtype)
