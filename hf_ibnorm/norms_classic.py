"""The controls: Dynamic Tanh, and LayerNorm and RMSNorm where torch's own modules do not fit."""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .checks import check_number
from .functional import affine
from .grouping import from_rows, to_rows
from .norm_base import Affine, NormBase


class DynamicTanh(NormBase):
    """Dynamic Tanh, a control without statistics: y = weight·tanh(alpha·x) + bias (arXiv 2503.10622).

    Args:
        normalized_shape: N, the width of the last dimension.
        init_alpha: initial value of the learned scalar `alpha`, of shape (1,).
        **affine: `elementwise_affine`, `bias`, `gain`, `area`, `device`, `dtype`, as in `NormBase`.

    Shape: (..., N) → (..., N), in the dtype of the input; computed in float32 (float64 for float64).
    """

    follows_place = True
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
        rows = to_rows(x if x.dtype == torch.float64 else x.float(), self.area)
        y = affine(torch.tanh(self.alpha.to(rows.dtype) * rows), self.multiplier, self.bias)
        return from_rows(y, self.area).to(x.dtype)


class PlacedNorm(NormBase):
    """LayerNorm or RMSNorm in places that torch's own modules cannot take: with the gain 1+w, or over channels.

    Args:
        normalized_shape: N, the width of the normalized dimension.
        computes: "layernorm" or "rmsnorm".
        eps: added to the variance or mean square.
        **affine: as in `NormBase`.

    Shape: (..., N) or (B, N, *spatial), in the dtype of the input; computed in float32 (float64 for float64).
    """

    follows_place = True
    _described = ("computes", "eps")

    def __init__(
        self, normalized_shape: int | tuple[int], computes: str, eps: float = 1e-6, **affine: Unpack[Affine]
    ) -> None:
        super().__init__(normalized_shape, **affine)
        self.computes, self.eps = computes, float(eps)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`."""
        rows = to_rows(x if x.dtype == torch.float64 else x.float(), self.area)
        normalize = F.layer_norm if self.computes == "layernorm" else F.rms_norm
        y = affine(normalize(rows, self.normalized_shape, eps=self.eps), self.multiplier, self.bias)
        return from_rows(y, self.area).to(x.dtype)
