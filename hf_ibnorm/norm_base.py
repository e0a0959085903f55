"""What a norm is: the contract that every norm answers.

The rest of the package asks a norm itself: `NormBase` defines the questions and the answers of an ordinary norm, which
subclasses override.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import initialization as init

from .checks import check_bool, check_choice, check_number
from .grouping import AREAS, LAYER

GAINS = ("w", "1+w")


def width_of(normalized_shape: Any) -> tuple[int]:
    """`normalized_shape` as a 1-tuple: a norm here normalizes one dimension, of one width."""
    shape = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    if len(shape) != 1 or type(shape[0]) is not int or shape[0] < 1:
        raise ValueError(f"normalized_shape: got {normalized_shape!r}, must be one width >= 1")
    return shape


def rounded(value: float, dtype: torch.dtype = torch.float32) -> float:
    """`value` as a tensor of `dtype` holds it."""
    return torch.tensor(value, dtype=dtype, device="cpu").item()


def shortest(value: float) -> float:
    """The shortest decimal that float32 rounds to the same number as `value`."""
    digits = (float(f"{value:.{count}g}") for count in range(6, 10))
    return next((short for short in digits if rounded(short) == rounded(value)), value)


@dataclass(frozen=True)
class Measure:
    """A diagnostic that a norm brings: one number for each row that the norm is given.

    Args:
        name: its key in what `norm.measured` returns, and in the results of `hf-ibnorm analyze`, where "a.b" is stored
            as "b" in the entry of the measure "a", which needs `spread`.
        title: what tables and pictures call it.
        reference: where it is defined.
        missing: the reason that results give where no row has a value.
        symbol: its heading in tables; `name` by default.
        spread: whether results keep its least and greatest row beside the mean.
        bins: (low, high, count) of a histogram of the rows that results keep; None for none.
        percent: whether pictures show it in percent.
        log: whether pictures show it on a logarithmic axis, where it goes over a decade.
        neutral: its value for a norm that transforms nothing, marked in pictures; None for no mark.
    """

    name: str
    title: str
    reference: str
    missing: str = "no row has a finite one"
    symbol: str = ""
    spread: bool = False
    bins: tuple[float, float, int] | None = None
    percent: bool = False
    log: bool = False
    neutral: float | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Path to its mean in the results."""
        return (self.name, "mean") if self.spread else tuple(self.name.split("."))


class Affine(TypedDict, total=False):
    """Arguments of `NormBase` that a norm hands on to it."""

    elementwise_affine: bool
    bias: bool
    gain: str
    area: str
    device: torch.device | str | None
    dtype: torch.dtype | None


class NormBase(nn.Module):
    """What every norm answers, with the answers of an ordinary one: `weight` and `bias` of shape (N,), or None.

    A subclass calls `super().__init__`, makes its own parameters and buffers, calls `reset_parameters`, and has a
    `forward`. Everything else it inherits, or answers in its own way:

    * `reset_parameters`: initial values; also called after a checkpoint has filled some tensors, which
      `transformers.initialization` skips
    * `core`: the output before gain, bias and training noise; `initial_values`: of its parameters
    * `ramp`, `ramp_start`, `checked_ramped`: the option that training can ramp, where a ramp of it begins, and which
      values it may have; such a norm calls `hold` in its `__init__`
    * `identity_for`: options with which it computes what a stock norm does
    * `draws_noise`, `updates_state`: whether it draws random numbers, or changes buffers, in training
    * `follows_place`: whether it can be where the gain is 1+w, or channels are normalized
    * `measures`, `measured`: its diagnostics; `newton`: of a norm with a power transform
    * `option_defaults`, `takes_model_eps`: defaults of its options; `named_options`: those that reports name;
      `variant_shown`: what errors call its kind

    Args:
        normalized_shape: N, the width of the last dimension (an int or a 1-tuple).
        elementwise_affine: learn `weight` (and `bias`).
        bias: learn `bias`; without effect if `elementwise_affine` is False.
        gain: what multiplies: "w", the weight, which starts at 1; or "1+w", one more than it, which starts at 0, as in
            Gemma. A fact of the place that the norm is for, no option.
        area: what is normalized: "layer", the last dimension; or "channels", dimension 1 of a channels-first image at
            each position, as in ConvNeXt. A fact of the place, too.
        device, dtype: of the parameters.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    _described: tuple[str, ...] = ()
    """Attributes that `print(model)` shows."""

    ramp: ClassVar[str | None] = None
    """The option that training can ramp, such as "lam"; `hold` keeps it in a buffer of that name. None for none."""
    measures: ClassVar[tuple[Measure, ...]] = ()
    """The diagnostics that `measured` computes."""
    named_options: ClassVar[tuple[str, ...]] = ()
    """The options that the report of a conversion names with the norm."""
    follows_place: ClassVar[bool] = False
    """Whether `forward` scales by `multiplier` and normalizes `grouping.to_rows(x, self.area)`. Else the norm cannot
    be at places where the gain is 1+w, or channels are normalized."""
    takes_model_eps: ClassVar[bool] = True
    """Inside a model, `eps` defaults to the model's own (False: the norm's own default stays)."""

    def __init__(
        self,
        normalized_shape: int | tuple[int],
        *,
        elementwise_affine: bool = True,
        bias: bool = True,
        gain: str = "w",
        area: str = LAYER,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_bool("elementwise_affine", elementwise_affine)
        check_bool("bias", bias)
        check_choice("gain", gain, GAINS)
        check_choice("area", area, AREAS)
        self.normalized_shape = width_of(normalized_shape)
        self.elementwise_affine, self.gain, self.area = elementwise_affine, gain, area
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            tensor = torch.empty(self.normalized_shape, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    def reset_parameters(self) -> None:
        """Set every parameter and buffer to its initial value, except those a checkpoint has just filled."""
        if self.weight is not None:
            init.constant_(self.weight, 1.0 if self.gain == "w" else 0.0)
        if self.bias is not None:
            init.zeros_(self.bias)
        if self.held is not None:
            init.constant_(self.held, self.initial_ramped)

    @property
    def multiplier(self) -> Tensor | None:
        """What z is multiplied by, shape (N,); None for nothing."""
        return self.weight if self.weight is None or self.gain == "w" else 1 + self.weight

    def initial_values(self) -> dict[str, Tensor]:
        """Initial value of each parameter, by name: on the CPU, of its shape and dtype."""
        return initial_values(self)

    def core(self, x: Tensor) -> Tensor:
        """`forward` before gain and bias, and as in eval mode.

        Args:
            x: shape (..., N).

        Returns:
            z of the shape of `x`, float32 (float64 for float64).
        """
        cls: type[NormBase] = type(self).__bases__[0] if is_parametrized(self) else type(self)
        bare = cls.__new__(cls)
        bare.__dict__.update(self.__dict__)
        # Set on the instance: pruned norms keep weight there; parametrized ones have it as a property of their class.
        bare.__dict__.update(training=False, weight=None, bias=None)
        return bare.forward(x if x.dtype == torch.float64 else x.float())

    @property
    def draws_noise(self) -> bool:
        """Whether training mode draws random numbers."""
        return False

    @property
    def updates_state(self) -> bool:
        """Whether training mode changes buffers, such as running statistics."""
        return False

    @property
    def newton(self) -> dict[str, float] | None:
        """Options of `functional.newton_lambda`, of a norm with a power transform for each row; None for others."""
        return None

    def measured(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The norm's own diagnostics of what it is given.

        Args:
            rows: shape (R, N), float32 or float64; a row that is not finite is NaN throughout.

        Returns:
            What `core` makes of the rows; and name of each of `measures` → a number for each row, shape (R,), NaN where
            a row has none.
        """
        return self.core(rows), {}

    @classmethod
    def identity_for(cls, stock: str, **fixed: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Options with which this norm computes what a stock norm does.

        Args:
            stock: the stock norm's name in the registry, "layernorm" or "rmsnorm".
            **fixed: what the norm's own name in the registry fixes.

        Returns:
            Two dicts: options that it takes to equal the stock norm, and options that are advised beside them; None
            where no options do it. `eps` is the stock norm's, and need not be named.
        """
        return None

    @classmethod
    def option_defaults(cls, **fixed: Any) -> dict[str, Any]:
        """Options with their defaults, as the signatures have them; `fixed` is what a name in the registry fixes.

        A constructor with `**kwargs` hands these on, so that its base class has options of the norm, too.
        """
        options: dict[str, Any] = {}
        for base in cls.__mro__:
            if "__init__" not in vars(base):
                continue
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            for parameter in parameters:
                if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                    options.setdefault(parameter.name, parameter.default)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                break
        left_out = {"self", "normalized_shape", "gain", "area", "device", "dtype", *fixed}
        return {name: default for name, default in options.items() if name not in left_out}

    # The life of the ramped option. It is held in a float32 buffer of shape (), which no cast touches and state dicts
    # hold, so that weights and option travel together; a state dict without it, of a stock model or an older one, loads
    # too. The norm has the value that counts. `set_ramped`, `hf_ibnorm.set_lam`, a ramp in training and a loaded state
    # dict change it there; `modeling_ibnorm.record_ramped` copies it into the config; after `from_pretrained`,
    # `settle_ramped` compares the two. A learned option is a parameter of the norm.

    initial_ramped: float
    """The ramped option as `reset_parameters` sets it: as the norm was made with, or was last set to."""

    def hold(self, value: float, device: torch.device | str | None = None) -> None:
        """Keep the ramped option in a buffer; for the `__init__` of a norm with a `ramp`, before `reset_parameters`."""
        assert self.ramp is not None
        self.initial_ramped = self.checked_ramped(value)
        # float32 whatever the default dtype: bfloat16 could not hold 0.3
        self.register_buffer(self.ramp, torch.empty((), device=device, dtype=torch.float32))

    @property
    def held(self) -> Tensor | None:
        """The buffer with the ramped option; None for a norm that has none, or learns it."""
        return None if self.ramp is None else self._buffers.get(self.ramp)

    @property
    def ramp_start(self) -> float:
        """Where a ramp begins: the value with which the norm is as near to a stock one as it can be."""
        return 0.0

    def checked_ramped(self, value: Any) -> float:
        """`value` as a float, if it can be this norm's ramped option; it must be a finite number.

        Raises:
            ValueError, TypeError: naming the value and what is allowed.
        """
        check_number(str(self.ramp), value, -float("inf"))
        return float(value)

    @property
    def ramped(self) -> float:
        """The ramped option as a number, read from the buffer; for a learned option, the value learning started from.

        Of all decimals with the same float32 it is the one that was given, or else the shortest.
        """
        if self.held is None or self.held.is_meta:
            return self.initial_ramped
        held = self.held.item()
        return self.initial_ramped if rounded(self.initial_ramped) == held else shortest(held)

    def set_ramped(self, value: float) -> None:
        """Set the ramped option in place.

        Raises:
            ValueError, TypeError: as `checked_ramped`.
        """
        self.initial_ramped = self.checked_ramped(value)
        if self.held is not None:
            with torch.no_grad():
                self.held.fill_(self.initial_ramped)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.ramp is None:
            return super()._apply(fn, recurse)
        # `fn` may round the option (a cast) or lose it (`to_empty`, meta): it is read before and written after.
        self.initial_ramped = self.ramped
        super()._apply(fn, recurse)
        if self.held is not None:
            self._buffers[self.ramp] = torch.full_like(self.held, self.initial_ramped, dtype=torch.float32)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Accelerate fills a model that FSDP2 has sharded on the meta device from its state dict, and assumes that every
        # tensor there is sharded. The option is not; `_load_from_state_dict` restores it.
        if self.held is not None and self.held.is_meta and type(self.weight).__name__ == "DTensor":
            del destination[f"{prefix}{self.ramp}"]

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
        value = None if self.ramp is None else self.ramped
        given = state_dict.get(f"{prefix}{self.ramp}")
        if self.ramp is not None and isinstance(given, Tensor) and given.numel() == 1 and not given.is_meta:
            try:
                value = self.checked_ramped(shortest(given.item()))
            except ValueError as error:
                error_msgs.append(f"{prefix}{error} ({self.variant_shown})")
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
        if self.held is None or self.ramp is None or value is None:
            return
        if (key := f"{prefix}{self.ramp}") in missing_keys:
            missing_keys.remove(key)  # a stock or an older state dict lacks it
        if self.held.is_meta and self.weight is not None and not self.weight.is_meta:
            self._buffers[self.ramp] = torch.empty((), dtype=torch.float32, device=self.weight.device)
        if self.held.dtype != torch.float32:  # assigned, not copied
            self._buffers[self.ramp] = self.held.float()
        self.set_ramped(value)

    @property
    def variant_shown(self) -> str:
        """What errors call this kind of norm."""
        return type(self).__name__

    def extra_repr(self) -> str:
        options = ", ".join(f"{name.removesuffix('_shown')}={getattr(self, name)}" for name in self._described)
        affine = f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        place = f"{'' if self.gain == 'w' else ', gain=1+w'}{'' if self.area == LAYER else f', area={self.area}'}"
        return f"{self.normalized_shape}, {options}, {affine}{place}"


def copy_with(norm: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a norm whose own parameters are what `make` makes of them; all else is the norm's."""
    fresh = copy.copy(norm)
    fresh._parameters = {
        name: None if value is None else nn.Parameter(make(value)) for name, value in norm._parameters.items()
    }
    return fresh


def initial_values(norm: nn.Module) -> dict[str, Tensor]:
    """Initial value of each parameter that a norm itself has, by name.

    Args:
        norm: on any device, "meta" too; one without `reset_parameters` begins with ones.

    Returns:
        Tensors on the CPU, of each parameter's shape and dtype.
    """
    fresh = copy_with(norm, partial(torch.ones_like, device="cpu"))
    fresh._buffers = {
        name: None if value is None else torch.zeros_like(value, device="cpu") for name, value in norm._buffers.items()
    }
    reset: Callable[[], None] | None = getattr(fresh, "reset_parameters", None)
    if reset is not None:
        reset()
    return {name: value.detach() for name, value in fresh.named_parameters(recurse=False)}
