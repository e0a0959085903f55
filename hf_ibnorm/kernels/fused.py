"""`ib_norm` and `normal_norm` of `hf_ibnorm.functional`, by fused kernels where there are any."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import functional
from . import ops
from .available import lacking, warn_once
from .options import IBNormOptions, NormalNormOptions

_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # fake tensors have no values, but the ops know their shapes
_IB_NORM: dict[str, Any] = functional.ib_norm.__kwdefaults__ or {}
_NORMAL_NORM: dict[str, Any] = functional.normal_norm.__kwdefaults__ or {}


@torch.compiler.assume_constant_result
def _lacking(device_type: str) -> str | None:
    return lacking(device_type)


def _by_formula(backend: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, lam: float | Tensor = 0.0) -> bool:
    """Whether the formulas must run: because they are asked for, the kernels cannot do it, or there are none.

    RuntimeError where there are none and `backend` is "fused".
    """
    if backend == "reference":
        return True
    parameters = [tensor for tensor in (weight, bias) if tensor is not None]
    given = [x, *parameters, lam] if isinstance(lam, Tensor) else [x, *parameters]
    if (
        torch.jit.is_tracing()
        or x.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or not x.ndim
        or not x.shape[-1]
        or x.device.type == "meta"
        or torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or any(type(tensor) not in _PLAIN or tensor.device != x.device for tensor in given)
    ):
        return True
    device_type = x.device.type
    reason = _lacking(device_type)
    if reason is None:
        misfit = any(tensor.shape != x.shape[-1:] for tensor in parameters)  # the formulas have an error for it
        return misfit or x.dtype not in ops.library(device_type).dtypes
    if backend == "fused":
        raise RuntimeError(f"backend: got 'fused', but there are no kernels for {device_type}: {reason}")
    if not torch.compiler.is_compiling():
        warn_once(device_type, reason)
    return True


def ib_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    lam: float | Tensor,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """`hf_ibnorm.functional.ib_norm`, by fused kernels where there are any for `x`.

    Args:
        x, weight, bias, lam, **options: as the formula's.
        backend: "auto"; "fused", an error where the device has no kernels; "reference", the formula.

    Raises:
        RuntimeError: `backend` is "fused" and there are no kernels for the device.
        ValueError, TypeError: as the formula.
    """
    given = {**_IB_NORM, **options}
    learned = isinstance(lam, Tensor) and (lam.ndim or lam.requires_grad or lam.dtype != torch.float32)
    # An option that the formula does not have is an error there.
    by_formula = given["variant"] not in ("S", "L", "T") or learned or len(given) > len(_IB_NORM)
    if by_formula or _by_formula(backend, x, weight, bias, lam):
        return functional.ib_norm(x, weight, bias, lam=lam, **options)
    functional.check_choice("unit", given["unit"], functional.UNITS)
    functional.check_choice("standardize", given["standardize"], functional.STANDARDIZE)
    functional.check_choice("order", given["order"], functional.ORDERS)
    functional.check_number("eps", given["eps"], 0.0)
    if not isinstance(lam, Tensor):
        functional.check_lam(given["variant"], lam)
        lam = torch.full((), lam, dtype=torch.float32, device=x.device)
    return ops.run(x, weight, bias, IBNormOptions(lam, **given))


def normal_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, backend: str = "auto", **options: Any
) -> Tensor:
    """`hf_ibnorm.functional.normal_norm`, by fused kernels where there are any for `x`; arguments as for `ib_norm`.

    The kernels draw their noise from one 64-bit seed, which comes from `generator` or the device's own: other numbers
    than the formula's, equally distributed, and drawn again whenever the generator's state is restored.
    """
    given = {**_NORMAL_NORM, **options}
    if len(given) > len(_NORMAL_NORM) or _by_formula(backend, x, weight, bias):
        return functional.normal_norm(x, weight, bias, **options)
    scale, mode = functional.resolve_noise(*(given[name] for name in ("noise", "noise_mode", "keep_prob", "training")))
    functional.check_number("alpha", given["alpha"], 0.0, 1.0)
    functional.check_number("eps", given["eps"], 0.0)
    seed = None
    if mode != "none":
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device, generator=given["generator"])
    return ops.run(x, weight, bias, NormalNormOptions(seed, None, scale, mode, given["alpha"], given["eps"]))
