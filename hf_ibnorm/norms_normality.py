"""Normality normalization (arXiv 2505.00685): standardize, gaussianize with a power transform, add training noise."""

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_number
from .functional import centre, check_noise, newton_lambda, normal_norm, power_transform
from .norm_base import Affine, Measure
from .norm_fused import FusedNorm

_PAPER = "arXiv 2505.00685"
_BINS = (-4.0, 6.0, 100)


class LayerNormalNorm(FusedNorm):
    """Normality normalization over the last dimension: LayerNorm, power transform, noise (arXiv 2505.00685).

    The formulas are in `hf_ibnorm.functional.normal_norm`. Noise is drawn from the device's default generator, in
    training mode only; gradient checkpointing must keep its `preserve_rng_state`, or gradients are silently wrong.

    Args:
        normalized_shape: N, the width of the last dimension.
        noise: ξ >= 0, strength of the training noise.
        noise_mode: "scaled", "unscaled" or "dropout".
        keep_prob: in (0, 1], with `noise_mode="dropout"` only.
        alpha: Newton step length in [0, 1].
        eps: in the standardization and, as sqrt(eps), in the Newton step: change it only with a reason.
        backend: "auto", "reference" or "fused".
        **affine: `elementwise_affine`, `bias`, `gain`, `area`, `device`, `dtype`, as in `NormBase`.

    Shape: (..., N) → (..., N), in the dtype of the input; computed in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the field, the value and what is allowed.
    """

    formula = staticmethod(normal_norm)
    takes_model_eps = False  # for eps sits in the Newton step, too
    named_options = ("noise", "alpha")
    measures = (
        Measure("lam_hat", "λ̂, mean of the rows", _PAPER, symbol="λ̂", spread=True, bins=_BINS, neutral=1.0),
        Measure("lam_hat.outside", "rows with λ̂ outside [0, 2]", _PAPER, symbol="λ̂ outside [0, 2]", percent=True),
        Measure("p_std", "std after power transform", _PAPER, symbol="std p", spread=True, neutral=1.0),
    )
    _described = ("noise", "noise_mode", "keep_prob", "alpha", "eps", "backend")

    def __init__(
        self,
        normalized_shape: int | tuple[int],
        noise: float = 1.0,
        noise_mode: str = "scaled",
        keep_prob: float | None = None,
        alpha: float = 1.0,
        eps: float = 1e-5,
        backend: str = "auto",
        **affine: Unpack[Affine],
    ) -> None:
        super().__init__(normalized_shape, eps=eps, backend=backend, **affine)
        check_noise(noise, noise_mode, keep_prob)
        check_number("alpha", alpha, 0.0, 1.0)
        self.noise, self.noise_mode, self.keep_prob = float(noise), noise_mode, keep_prob
        self.alpha = float(alpha)
        self.reset_parameters()

    @property
    def draws_noise(self) -> bool:
        return self.noise > 0 or self.noise_mode == "dropout"

    @property
    def newton(self) -> dict[str, float]:
        return {"alpha": self.alpha, "eps": self.eps}

    @classmethod
    def identity_for(cls, stock: str, **fixed: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        # Noise 0 is advised, or in training it would differ from the stock norm.
        return ({"alpha": 0.0}, {"noise": 0.0}) if stock == "layernorm" else None

    def measured(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = F.layer_norm(centre(rows)[1], rows.shape[-1:], eps=self.eps)
        lam = newton_lambda(h, alpha=self.alpha, eps=self.eps)
        outside = torch.where(lam.isnan(), torch.nan, ((lam < 0) | (lam > 2)).to(h.dtype))
        p = power_transform(h, lam)
        return p, {"lam_hat": lam[:, 0], "lam_hat.outside": outside[:, 0], "p_std": p.std(-1, correction=0)}

    def formula_options(self) -> dict[str, Any]:
        return {
            "noise": self.noise,
            "noise_mode": self.noise_mode,
            "keep_prob": self.keep_prob,
            "alpha": self.alpha,
            "eps": self.eps,
            "training": self.training,
        }
