"""IBNorm (arXiv 2510.25262): compress towards the mean, then standardize."""

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .checks import check_bool, check_choice
from .functional import ORDERS, STANDARDIZE, UNITS, VARIANTS, centre, check_lam, compress, ib_norm, slope
from .norm_base import Affine, Measure
from .norm_fused import FusedNorm

# From the study in docs/results/lambda, with a margin from where they break: T learns as well at 4, is worse than
# RMSNorm at 8, and at twice the learning rate 4 has lost half a nat and 2 a sixth; L loses from 16 on; S is LayerNorm
# whatever its lam. The study had no shrink.
DEFAULT_LAM = {"L": 4.0, "S": 4.0, "T": 2.0, "shrink": 0.5}

# With this lam nothing is compressed: the norm only standardizes, and a ramp begins here.
IDENTITY_LAM = {"L": 0.0, "S": 1.0, "T": 0.0, "shrink": 0.0}
_PAPER = "arXiv 2510.25262"
_CONSTANT = "all rows are constant"
SATURATED = 0.1
"""An element is saturated when the slope of the compression there is below this."""


class IBNorm(FusedNorm):
    """IBNorm over the last dimension: compress towards the mean, then standardize (arXiv 2510.25262).

    The formulas are in `hf_ibnorm.functional.ib_norm`, which takes the same options. Variant S with
    `standardize="layer"` and `order="compress_first"` is LayerNorm with eps·lam² in place of eps. (Not the
    Instance-Batch normalization of IBN-Net.)

    lam lives in a float32 buffer of shape () that `.to(dtype)`, `.half()` and the like leave alone and that state dicts
    hold, so that weights and lam travel together. A state dict without it, a stock model's or an older one's, loads
    too and changes no lam. Change it with `hf_ibnorm.set_lam`. With `learn_lam` it is a parameter instead, `theta` of
    shape (1,), cast and saved like any other: lam = softplus(theta), for shrink sigmoid(theta).

    Args:
        normalized_shape: N, the width of the last dimension.
        variant: "L" (logarithmic), "S" (linear), "T" (tanh) or "shrink" (soft threshold, experimental).
        lam: compression strength; by default 4 for L and S, 2 for T, 0.5 for shrink.
            L, T: lam >= 0; S: lam >= 1; shrink: 0 <= lam < 1.
        learn_lam: learn lam, starting from `lam`, which must be > 0; not for S.
        unit: "raw" or "mean_abs".
        standardize: "layer" or "rms".
        order: "compress_first" or "standardize_first".
        eps: added to the variance or mean square.
        backend: "auto" (fused kernels where there are any), "reference" (the formulas in plain PyTorch) or "fused".
        **affine: `elementwise_affine`, `bias`, `gain`, `area`, `device`, `dtype`, as in `NormBase`.

    Shape: (..., N) → (..., N), in the dtype of the input; statistics are computed in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the field, the value and what is allowed.
    """

    _described = ("variant", "lam_shown", "learn_lam", "unit", "standardize", "order", "eps", "backend")
    lam: Tensor | None
    theta: nn.Parameter | None
    formula = staticmethod(ib_norm)
    ramp = "lam"
    named_options = ("lam", "unit", "standardize")
    measures = (
        Measure("contraction", "variance left by compression", _PAPER, _CONSTANT, percent=True, log=True),
        Measure("saturation", "saturated elements", _PAPER, _CONSTANT, percent=True),
        Measure("slope", "mean slope of compression", _PAPER, _CONSTANT),
    )

    def __init__(
        self,
        normalized_shape: int | tuple[int],
        variant: str = "L",
        lam: float | None = None,
        learn_lam: bool = False,
        unit: str = "raw",
        standardize: str = "layer",
        order: str = "compress_first",
        eps: float = 1e-6,
        backend: str = "auto",
        **affine: Unpack[Affine],
    ) -> None:
        super().__init__(normalized_shape, eps=eps, backend=backend, **affine)
        check_choice("variant", variant, VARIANTS)
        check_choice("unit", unit, UNITS)
        check_choice("standardize", standardize, STANDARDIZE)
        check_choice("order", order, ORDERS)
        check_bool("learn_lam", learn_lam)
        if learn_lam and variant == "S":
            raise ValueError("learn_lam: got True with variant 'S'; only L, T and shrink can learn lam")
        self.variant, self.unit, self.standardize, self.order = variant, unit, standardize, order
        self.learn_lam = learn_lam
        lam = DEFAULT_LAM[variant] if lam is None else lam
        if learn_lam:
            self.initial_ramped = self.checked_ramped(lam)
            self.register_buffer("lam", None)
        else:
            self.hold(lam, affine.get("device"))
        theta = torch.empty(1, device=affine.get("device"), dtype=affine.get("dtype")) if learn_lam else None
        self.register_parameter("theta", None if theta is None else nn.Parameter(theta))
        self.reset_parameters()

    @classmethod
    def option_defaults(cls, **fixed: Any) -> dict[str, Any]:
        return {**super().option_defaults(**fixed), "lam": DEFAULT_LAM[fixed["variant"]]}

    @classmethod
    def identity_for(cls, stock: str, **fixed: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        standardize = {"layernorm": "layer", "rmsnorm": "rms"}.get(stock)
        if standardize is None:
            return None
        # unit and order make no difference as long as nothing is compressed
        return {"lam": IDENTITY_LAM[fixed["variant"]], "standardize": standardize, "learn_lam": False}, {}

    @property
    def ramp_start(self) -> float:
        return IDENTITY_LAM[self.variant]

    @property
    def variant_shown(self) -> str:
        return f"variant {self.variant}"

    def checked_ramped(self, value: Any) -> float:
        check_lam(self.variant, value)
        if self.learn_lam and value == 0:
            raise ValueError("lam: got 0, must be > 0 with learn_lam")
        return float(value)

    def set_ramped(self, value: float) -> None:
        super().set_ramped(value)
        if self.theta is not None:
            with torch.no_grad():
                self.theta.fill_(self.initial_theta())

    @property
    def lam_value(self) -> float:
        """lam as a number: `ramped`."""
        return self.ramped

    def set_lam(self, value: float) -> None:
        """Set lam in place; `hf_ibnorm.set_lam` does so for a whole model and its config."""
        self.set_ramped(value)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.theta is not None:
            init.constant_(self.theta, self.initial_theta())

    def initial_theta(self) -> float:
        """Initial theta, which gives the initial lam."""
        lam = self.initial_ramped
        if self.variant == "shrink":
            return math.log(lam / (1 - lam))
        return lam + math.log(-math.expm1(-lam))  # log(expm1(lam)), which would overflow

    def current_lam(self) -> Tensor:
        """lam as the formula uses it, learned or not: shape (1,) or (), at least float32."""
        if self.theta is None:
            return self.lam  # type: ignore[return-value]
        theta = self.theta if self.theta.dtype == torch.float64 else self.theta.float()
        return torch.sigmoid(theta) if self.variant == "shrink" else F.softplus(theta)

    @property
    def lam_shown(self) -> float:
        """λ for `print(model)`: a learned one as it is now."""
        learned = self.theta is not None and not self.theta.is_meta
        return round(self.current_lam().item(), 4) if learned else self.lam_value

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        mine, other = (f"{prefix}{name}" for name in (("theta", "lam") if self.learn_lam else ("lam", "theta")))
        if other in state_dict and mine not in state_dict:
            kind, kept = ("fixed", "learned") if self.learn_lam else ("learned", "fixed")
            lists[-1].append(f"{other}: the state dict has a {kind} lam, the norm here a {kept} one")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def measured(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.core(rows)
        if self.order == "standardize_first":
            normalize = F.layer_norm if self.standardize == "layer" else F.rms_norm
            rows = normalize(rows, rows.shape[-1:], eps=self.eps)
        _, c = centre(rows)
        options: dict[str, Any] = {"variant": self.variant, "lam": self.current_lam(), "unit": self.unit}
        slopes = slope(c, **options)
        saturated = torch.where(slopes.isnan(), torch.nan, (slopes < SATURATED).to(c.dtype))
        return z, {
            "contraction": compress(c, **options).var(-1, correction=0) / c.var(-1, correction=0),
            "saturation": saturated.mean(-1),
            "slope": slopes.mean(-1),
        }

    def formula_options(self) -> dict[str, Any]:
        return {
            "variant": self.variant,
            "lam": self.current_lam(),
            "unit": self.unit,
            "standardize": self.standardize,
            "order": self.order,
            "eps": self.eps,
        }
