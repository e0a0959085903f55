"""The norms as modules, and the one registry that names them.

`NormBase` is what the norms of this project share: parameters of width N, a `reset_parameters` that
Transformers' loading respects, a description in `print(model)`. `NORMS` maps a norm's name to its class and default
options, the controls (torch's LayerNorm and RMSNorm, Dynamic Tanh) included; `build_norm` builds one by name.
"""

import copy
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import initialization as init

from .checks import check_choice, check_number, nearest
from .functional import (
    ORDERS,
    STANDARDIZE,
    UNITS,
    VARIANTS,
    affine,
    check_lam,
    check_noise,
    ib_norm,
    normal_norm,
)

BACKENDS = ("auto", "reference", "fused")


def _width(normalized_shape: Any) -> tuple[int]:
    """`normalized_shape` as a 1-tuple: every norm here works over the last dimension only."""
    shape = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    if len(shape) != 1 or type(shape[0]) is not int or shape[0] < 1:
        raise ValueError(f"normalized_shape: got {normalized_shape!r}, must be one width >= 1 (the last dimension)")
    return shape


def _check_bool(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{field}: got {value!r}, must be true or false")


def rounded(value: float, dtype: torch.dtype = torch.float32) -> float:
    """`value` as a tensor of `dtype` holds it."""
    return torch.tensor(value, dtype=dtype, device="cpu").item()


def shortest(value: float) -> float:
    """Of the numbers that float32 rounds as it does `value` the one with the fewest digits."""
    digits = (float(f"{value:.{count}g}") for count in range(6, 10))
    return next((short for short in digits if rounded(short) == rounded(value)), value)


def _fused(name: str, backend: Any) -> Callable[..., Tensor] | None:
    """The form of `functional.<name>` that runs kernels where it can; None where `backend` is "reference".

    By name, for this file travels with checkpoints: where nobody has imported the package the formulas run.

    Raises:
        ValueError: no such backend, or "fused" without the package.
    """
    check_choice("backend", backend, BACKENDS)
    package = sys.modules.get("hf_ibnorm")
    if package is None and backend == "fused":
        raise ValueError("backend: got 'fused', which needs the package: import hf_ibnorm first, or use 'auto'")
    return None if package is None or backend == "reference" else getattr(import_module("hf_ibnorm.kernels"), name)


class NormBase(nn.Module):
    """What the norms of this project share: `weight` and `bias` of shape (N,), each None when switched off.

    Args:
        normalized_shape: N, the width of the last dimension (an int or a 1-tuple).
        elementwise_affine: learn `weight` (and `bias`).
        bias: learn `bias`; without effect if `elementwise_affine` is False.
        device, dtype: of the parameters.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    _described: tuple[str, ...] = ()
    """Attributes that `print(model)` shows."""

    def __init__(
        self,
        normalized_shape: int | tuple[int],
        *,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_bool("elementwise_affine", elementwise_affine)
        _check_bool("bias", bias)
        self.normalized_shape = _width(normalized_shape)
        self.elementwise_affine = elementwise_affine
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            tensor = torch.empty(self.normalized_shape, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    def reset_parameters(self) -> None:
        """Set every parameter and buffer to its initial value, except those a checkpoint has just filled."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    @property
    def draws_noise(self) -> bool:
        """Whether training mode draws random numbers."""
        return False

    def normalized(self, x: Tensor) -> Tensor:
        """`forward` before gain and bias, and as in eval mode.

        Args:
            x: shape (..., N), float32 or float64.

        Returns:
            z of the shape and dtype of `x`.
        """
        cls: type[NormBase] = type(self).__bases__[0] if is_parametrized(self) else type(self)
        bare = cls.__new__(cls)
        bare.__dict__.update(self.__dict__)
        # In the instance itself: pruned ones have them there, parametrized ones in their class.
        bare.__dict__.update(training=False, weight=None, bias=None)
        return bare.forward(x)

    def extra_repr(self) -> str:
        options = ", ".join(f"{name.removesuffix('_shown')}={getattr(self, name)}" for name in self._described)
        affine = f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        return f"{self.normalized_shape}, {options}, {affine}"


class IBNorm(NormBase):
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
        elementwise_affine, bias: as in torch.nn.LayerNorm.
        backend: "auto" (fused kernels where there are any), "reference" (the formulas in plain PyTorch) or "fused".
        device, dtype: of the parameters.

    Shape: (..., N) → (..., N), in the dtype of the input; statistics are computed in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the field, the value and what is allowed.
    """

    _described = ("variant", "lam_shown", "learn_lam", "unit", "standardize", "order", "eps", "backend")
    lam: Tensor | None
    theta: nn.Parameter | None
    initial_lam: float
    """lam of `reset_parameters`: the one the norm was made with, or was last set to."""

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
        elementwise_affine: bool = True,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine=elementwise_affine, bias=bias, device=device, dtype=dtype)
        check_choice("variant", variant, VARIANTS)
        check_choice("unit", unit, UNITS)
        check_choice("standardize", standardize, STANDARDIZE)
        check_choice("order", order, ORDERS)
        self._fused = _fused("ib_norm", backend)
        check_number("eps", eps, 0.0)
        _check_bool("learn_lam", learn_lam)
        if learn_lam and variant == "S":
            raise ValueError("learn_lam: got True with variant 'S'; only L, T and shrink can learn lam")
        self.variant, self.unit, self.standardize, self.order = variant, unit, standardize, order
        self.learn_lam, self.eps, self.backend = learn_lam, float(eps), backend
        self.initial_lam = self.checked_lam(DEFAULT_LAM[variant] if lam is None else lam)
        # float32 whatever the default dtype: bfloat16 could not hold lam = 0.3
        buffer = None if learn_lam else torch.empty((), device=device, dtype=torch.float32)
        self.register_buffer("lam", buffer)
        theta = nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if learn_lam else None
        self.register_parameter("theta", theta)
        self.reset_parameters()

    def checked_lam(self, value: Any) -> float:
        """`value` as a float, if it can be this norm's lam.

        Raises:
            ValueError, TypeError: naming the value and what is allowed.
        """
        check_lam(self.variant, value)
        if self.learn_lam and value == 0:
            raise ValueError("lam: got 0, must be > 0 with learn_lam")
        return float(value)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.lam is not None:
            init.constant_(self.lam, self.initial_lam)
        if self.theta is not None:
            init.constant_(self.theta, self.initial_theta())

    def initial_theta(self) -> float:
        """The theta that learning starts from, the one that gives `initial_lam`."""
        lam = self.initial_lam
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
    def lam_value(self) -> float:
        """lam as a number, read from the buffer; of a learned one where learning started.

        Of the numbers that float32 rounds alike it is the one that was given, or else the shortest.
        """
        if self.lam is None or self.lam.is_meta:
            return self.initial_lam
        held = self.lam.item()
        return self.initial_lam if rounded(self.initial_lam) == held else shortest(held)

    @property
    def lam_shown(self) -> float:
        """λ for `print(model)`: a learned one as it is now."""
        learned = self.theta is not None and not self.theta.is_meta
        return round(self.current_lam().item(), 4) if learned else self.lam_value

    def set_lam(self, value: float) -> None:
        """Set lam in place; `hf_ibnorm.set_lam` does so for a whole model and its config."""
        self.initial_lam = self.checked_lam(value)
        with torch.no_grad():
            if self.lam is not None:
                self.lam.fill_(self.initial_lam)
            if self.theta is not None:
                self.theta.fill_(self.initial_theta())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IBNorm":
        # A cast rounds lam, `to_empty` and the meta device forget it. Written anew it survives them.
        self.initial_lam = self.lam_value
        super()._apply(fn, recurse)
        if self.lam is not None:
            self.lam = torch.full_like(self.lam, self.initial_lam, dtype=torch.float32)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Accelerate fills a model that FSDP2 has sharded on the meta device from its state dict, and takes each tensor
        # there for sharded. lam is not; it comes back by itself, as below.
        if self.lam is not None and self.lam.is_meta and type(self.weight).__name__ == "DTensor":
            del destination[f"{prefix}lam"]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine, other = (f"{prefix}{name}" for name in (("theta", "lam") if self.learn_lam else ("lam", "theta")))
        if other in state_dict and mine not in state_dict:
            kind, kept = ("fixed", "learned") if self.learn_lam else ("learned", "fixed")
            error_msgs.append(f"{other}: the state dict has a {kind} lam, the norm here a {kept} one")
            return
        lam, given = self.lam_value, state_dict.get(f"{prefix}lam")
        if isinstance(given, Tensor) and given.numel() == 1 and not given.is_meta:
            try:
                lam = self.checked_lam(shortest(given.item()))
            except ValueError as error:
                error_msgs.append(f"{prefix}{error} (variant {self.variant})")
                return
        super()._load_from_state_dict(
            state_dict,  # type: ignore[arg-type]
            prefix,
            local_metadata,  # type: ignore[arg-type]
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if self.lam is None:
            return
        if mine in missing_keys:
            missing_keys.remove(mine)  # of a stock model, or older than the buffer
        if self.lam.is_meta and self.weight is not None and not self.weight.is_meta:
            self.lam = torch.empty((), dtype=torch.float32, device=self.weight.device)
        if self.lam.dtype != torch.float32:  # assigned, not copied
            self.lam = self.lam.float()
        self.set_lam(lam)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` of shape (..., N) over its last dimension."""
        options: dict[str, Any] = {
            "variant": self.variant,
            "lam": self.current_lam(),
            "unit": self.unit,
            "standardize": self.standardize,
            "order": self.order,
            "eps": self.eps,
        }
        if self._fused is None:
            return ib_norm(x, self.weight, self.bias, **options)
        return self._fused(x, self.weight, self.bias, **options, backend=self.backend)


class LayerNormalNorm(NormBase):
    """Normality normalization over the last dimension: LayerNorm, power transform, noise (arXiv 2505.00685).

    The formulas are in `hf_ibnorm.functional.normal_norm`. Noise is drawn from the device's default generator, in
    training mode only; gradient checkpointing must keep its `preserve_rng_state`, or gradients are silently wrong.

    Args:
        normalized_shape: N, the width of the last dimension.
        noise: ξ >= 0, strength of the training noise.
        noise_mode: "scaled", "unscaled" or "dropout".
        keep_prob: in (0, 1], with `noise_mode="dropout"` only.
        alpha: Newton step length in [0, 1].
        eps: in the standardization and, as sqrt(eps), in the Newton step: keep 1e-5 unless you know why.
        elementwise_affine, bias: as in torch.nn.LayerNorm.
        backend: "auto", "reference" or "fused".
        device, dtype: of the parameters.

    Shape: (..., N) → (..., N), in the dtype of the input; computed in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the field, the value and what is allowed.
    """

    _described = ("noise", "noise_mode", "keep_prob", "alpha", "eps", "backend")

    def __init__(
        self,
        normalized_shape: int | tuple[int],
        noise: float = 1.0,
        noise_mode: str = "scaled",
        keep_prob: float | None = None,
        alpha: float = 1.0,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, elementwise_affine=elementwise_affine, bias=bias, device=device, dtype=dtype)
        check_noise(noise, noise_mode, keep_prob)
        check_number("alpha", alpha, 0.0, 1.0)
        check_number("eps", eps, 0.0)
        self._fused = _fused("normal_norm", backend)
        self.noise, self.noise_mode, self.keep_prob = float(noise), noise_mode, keep_prob
        self.alpha, self.eps, self.backend = float(alpha), float(eps), backend
        self.reset_parameters()

    @property
    def draws_noise(self) -> bool:
        return self.noise > 0 or self.noise_mode == "dropout"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` of shape (..., N) over its last dimension; noisy in training mode."""
        options: dict[str, Any] = {
            "noise": self.noise,
            "noise_mode": self.noise_mode,
            "keep_prob": self.keep_prob,
            "alpha": self.alpha,
            "eps": self.eps,
            "training": self.training,
        }
        if self._fused is None:
            return normal_norm(x, self.weight, self.bias, **options)
        return self._fused(x, self.weight, self.bias, **options, backend=self.backend)


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


def initial_parameters(norm: nn.Module) -> dict[str, Tensor]:
    """What the parameters of `norm` itself are before training, by name.

    Args:
        norm: one of ours, torch's LayerNorm or RMSNorm, or a Llama's RMSNorm; on any device, "meta" too.

    Returns:
        Tensors on the CPU, of each parameter's shape and dtype.
    """
    fresh = copy.copy(norm)
    fresh._parameters = {
        name: None if value is None else nn.Parameter(torch.ones_like(value, device="cpu"))
        for name, value in norm._parameters.items()
    }
    fresh._buffers = {
        name: None if value is None else torch.zeros_like(value, device="cpu") for name, value in norm._buffers.items()
    }
    reset: Callable[[], None] | None = getattr(fresh, "reset_parameters", None)
    if reset is not None:  # a Llama's RMSNorm has a gain only, and no such method
        reset()
    return {name: value.detach() for name, value in fresh.named_parameters(recurse=False)}


@dataclass(frozen=True)
class NormEntry:
    """One row of the registry: the class, what the name itself fixes, and every option with its default."""

    cls: type[nn.Module]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    model_eps: bool = True
    """Inside a model, `eps` defaults to the model's own (False: the norm's own default stays)."""


# From the study in docs/results/lambda, with a margin from where they break: T learns as well at 4, is worse than
# RMSNorm at 8, and at twice the learning rate 4 has lost half a nat and 2 a sixth; L loses from 16 on; S is LayerNorm
# whatever its lam. The study had no shrink.
DEFAULT_LAM = {"L": 4.0, "S": 4.0, "T": 2.0, "shrink": 0.5}

# With this lam nothing is compressed: the norm only standardizes, and a ramp begins here.
IDENTITY_LAM = {"L": 0.0, "S": 1.0, "T": 0.0, "shrink": 0.0}


def _options(cls: type[nn.Module], *fixed: str) -> dict[str, Any]:
    """The options of one of our norms with their defaults, as its signature has them."""
    parameters = inspect.signature(cls).parameters
    left_out = ("normalized_shape", "device", "dtype", *fixed)
    return {name: parameter.default for name, parameter in parameters.items() if name not in left_out}


def _ibnorm(variant: str) -> NormEntry:
    return NormEntry(IBNorm, {"variant": variant}, {**_options(IBNorm, "variant"), "lam": DEFAULT_LAM[variant]})


NORMS: dict[str, NormEntry] = {
    "ibnorm_s": _ibnorm("S"),
    "ibnorm_l": _ibnorm("L"),
    "ibnorm_t": _ibnorm("T"),
    "ibnorm_shrink": _ibnorm("shrink"),
    # Its eps sits in the Newton step too: 1e-5 whatever the model's.
    "layernormalnorm": NormEntry(LayerNormalNorm, {}, _options(LayerNormalNorm), model_eps=False),
    "layernorm": NormEntry(nn.LayerNorm, {}, {"eps": 1e-5, "elementwise_affine": True, "bias": True}),
    "rmsnorm": NormEntry(nn.RMSNorm, {}, {"eps": 1e-6, "elementwise_affine": True}),
    "dyt": NormEntry(DynamicTanh, {}, _options(DynamicTanh)),
}


def norm_name(name: str, field: str = "norm_type") -> str:
    """The registry's spelling of `name`; case, "-" and "_" do not matter. `field` is what errors call it.

    Raises:
        ValueError: no such norm; the message gives the nearest name and all of them.
    """
    if not isinstance(name, str):
        raise ValueError(f"{field}: got a {type(name).__name__}, must be the name of a norm: {', '.join(NORMS)}")
    names = {known.replace("_", ""): known for known in NORMS}
    key = name.lower().replace("-", "").replace("_", "")
    if key not in names:
        hint = nearest(name.lower().replace("-", "_"), list(NORMS))
        raise ValueError(f"{field}: unknown norm {name!r}{hint}; known are {', '.join(NORMS)}")
    return names[key]


def resolve_norm_kwargs(
    name: str, kwargs: Mapping[str, Any] | None, model_eps: float | None = None, field: str = "norm_kwargs"
) -> dict[str, Any]:
    """Every option of norm `name` with its value: `kwargs` over the model's eps over the registry's defaults.

    An option that is None is one left out. `field` is what errors call the options.

    Raises:
        ValueError, TypeError: an unknown option (with the nearest name), or a value that is not allowed.
    """
    name = norm_name(name)
    entry = NORMS[name]
    if not isinstance(kwargs, Mapping | None):
        raise TypeError(f"{field}: got {kwargs!r}, must be a dict of options of {name}")
    for key in kwargs or {}:
        if key not in entry.defaults:
            options = list(entry.defaults)
            hint = nearest(str(key), options)
            raise ValueError(f"{field}.{key}: {name} has no such option{hint}; it has {', '.join(options)}")
    given = {key: value for key, value in (kwargs or {}).items() if value is not None}
    resolved = {**entry.defaults, **given}
    if model_eps is not None and entry.model_eps and "eps" in resolved and "eps" not in given:
        resolved["eps"] = model_eps
    # Numbers as floats, so that a config reads the same whether 4, 4.0 or numpy's 4 was given.
    for key, value in resolved.items():
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            resolved[key] = float(value)
    try:
        _build(entry, 1, resolved, device="meta")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{field}.{error} (norm {name})") from None
    return resolved


def _build(entry: NormEntry, normalized_shape: Any, kwargs: Mapping[str, Any], **factory: Any) -> nn.Module:
    for key, default in entry.defaults.items():  # torch's own modules do not check theirs
        if isinstance(default, bool):
            _check_bool(key, kwargs[key])
        elif key == "eps":
            check_number("eps", kwargs[key], 0.0)
    return entry.cls(_width(normalized_shape), **entry.fixed, **kwargs, **factory)


def build_norm(
    name: str,
    normalized_shape: int | tuple[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the norm `name` over a last dimension of width `normalized_shape`.

    Args:
        name: a key of `NORMS`; case, "-" and "_" do not matter.
        normalized_shape: N, an int or a 1-tuple.
        device, dtype: of the parameters.
        **kwargs: options of that norm; those left out take the registry's defaults.

    Returns:
        The module: `IBNorm`, `LayerNormalNorm`, `DynamicTanh`, or torch's own `LayerNorm` or `RMSNorm`.

    Raises:
        ValueError, TypeError: unknown name or option (with the nearest), or a value that is not allowed.
    """
    name = norm_name(name)
    return _build(NORMS[name], normalized_shape, resolve_norm_kwargs(name, kwargs), device=device, dtype=dtype)
