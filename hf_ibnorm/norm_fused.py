"""Norms that have a formula in `functional` and fused kernels of the same name."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar, Unpack

from torch import Tensor

from .checks import check_choice, check_number
from .grouping import from_rows, to_rows
from .norm_base import Affine, NormBase

BACKENDS = ("auto", "reference", "fused")


class FusedNorm(NormBase):
    """A norm whose forward is a formula of `functional`, or the formula's fused form in `hf_ibnorm.kernels`.

    A subclass sets `formula` and defines `formula_options`.

    Args:
        normalized_shape: N, the width of the last dimension.
        eps: a finite number >= 0.
        backend: "auto" (fused kernels where there are any), "reference" (the formula in plain PyTorch) or "fused".
        **affine: as in `NormBase`.

    Raises:
        ValueError, TypeError: naming the field, the value and what is allowed; "fused" without the package.
    """

    follows_place = True
    formula: ClassVar[Callable[..., Tensor]]
    """A function of `functional`; the fused form in `hf_ibnorm.kernels` has its name."""

    def __init__(
        self, normalized_shape: int | tuple[int], *, eps: float, backend: str = "auto", **affine: Unpack[Affine]
    ) -> None:
        super().__init__(normalized_shape, **affine)
        check_number("eps", eps, 0.0)
        check_choice("backend", backend, BACKENDS)
        self.eps, self.backend = float(eps), backend
        self._kernel = self._fused()

    def _fused(self) -> Callable[..., Tensor] | None:
        """The fused form, which itself falls back to the formula; None for "reference"."""
        # By name, for this file travels with checkpoints: where nobody has imported the package the formula runs.
        package = sys.modules.get("hf_ibnorm")
        if package is None and self.backend == "fused":
            raise ValueError("backend: got 'fused', which needs the package: import hf_ibnorm first, or use 'auto'")
        if package is None or self.backend == "reference":
            return None
        return getattr(import_module("hf_ibnorm.kernels"), self.formula.__name__)

    def formula_options(self) -> dict[str, Any]:
        """What the formula takes besides input, gain and bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` of shape (..., N), or (B, N, *spatial) with area "channels"; in the dtype of `x`."""
        rows, options = to_rows(x, self.area), self.formula_options()
        if self._kernel is None:
            y = self.formula(rows, self.multiplier, self.bias, **options)
        else:
            y = self._kernel(rows, self.multiplier, self.bias, **options, backend=self.backend)
        return from_rows(y, self.area)
