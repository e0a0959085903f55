"""`ib_norm` and `normal_norm` of `hf_ibnorm.functional`, by fused kernels where there are any."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import functional
from . import ops
from .available import lacking, warn_once
from .options import IBNormOptions, NormalNormOptions

_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # of the last, which has no values, the ops know the shapes
_DEFAULTS: dict[str, Any] = functional.normal_norm.__kwdefaults__ or {}
_lacking = torch.compiler.assume_constant_result(lacking)


def _by_formula(backend: str, x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether the formulas must run: for what the kernels do not do, or because there are none.

    Raises:
        RuntimeError: there are none, and `backend` is "fused".
    """
    given = [x, *(tensor for tensor in tensors if tensor is not None)]
    if (
        torch.jit.is_tracing()
        or x.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or not x.ndim
        or not x.shape[-1]
        or x.device.type == "meta"
        or torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or any(type(each) not in _PLAIN or each.device != x.device for each in given)
    ):
        return True
    device_type = x.device.type
    reason = _lacking(device_type)
    if reason is None:
        return x.dtype not in ops.library(device_type).dtypes
    if backend == "fused":
        raise RuntimeError(f"backend: got 'fused', but there are no kernels for {device_type}: {reason}")
    if not torch.compiler.is_compiling():
        warn_once(device_type, reason)
    return True


def _misfits(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a parameter is not of shape (N,): the formulas know what to say."""
    return any(each is not None and each.shape != x.shape[-1:] for each in parameters)


def ib_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    variant: str = "L",
    lam: float | Tensor,
    unit: str = "raw",
    standardize: str = "layer",
    order: str = "compress_first",
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """`hf_ibnorm.functional.ib_norm`, by fused kernels where there are any for `x`.

    Args:
        backend: "auto"; "fused", an error where the device has no kernels; "reference", the formulas.

    Raises:
        RuntimeError: `backend` is "fused" and there are no kernels for the device.
        ValueError, TypeError: as the formulas.
    """
    learned = isinstance(lam, Tensor) and (lam.ndim or lam.requires_grad or lam.dtype != torch.float32)
    if (
        backend == "reference"
        or variant not in ("S", "L", "T")
        or learned
        or _by_formula(backend, x, weight, bias, lam if isinstance(lam, Tensor) else None)
        or _misfits(x, weight, bias)
    ):
        return functional.ib_norm(
            x, weight, bias, variant=variant, lam=lam, unit=unit, standardize=standardize, order=order, eps=eps
        )
    functional.check_choice("unit", unit, functional.UNITS)
    functional.check_choice("standardize", standardize, functional.STANDARDIZE)
    functional.check_choice("order", order, functional.ORDERS)
    functional.check_number("eps", eps, 0.0)
    if not isinstance(lam, Tensor):
        functional.check_lam(variant, lam)
        lam = torch.full((), lam, dtype=torch.float32, device=x.device)
    return ops.run(x, weight, bias, IBNormOptions(lam, variant, unit, standardize, order, eps))


def normal_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, backend: str = "auto", **options: Any
) -> Tensor:
    """`hf_ibnorm.functional.normal_norm`, by fused kernels where there are any for `x`.

    The kernels draw their noise from one 64-bit seed, which comes from `generator` or the device's own: it is another
    noise than the formulas', equally distributed, and replayed wherever the generator's state is.

    Args:
        backend: "auto"; "fused", an error where the device has no kernels; "reference", the formulas.
        **options: of `functional.normal_norm`.

    Raises:
        RuntimeError: `backend` is "fused" and there are no kernels for the device.
        ValueError, TypeError: as the formulas.
    """
    if backend == "reference" or _by_formula(backend, x, weight, bias) or _misfits(x, weight, bias):
        return functional.normal_norm(x, weight, bias, **options)
    given = {**_DEFAULTS, **options}
    scale, mode = functional.resolve_noise(*(given[name] for name in ("noise", "noise_mode", "keep_prob", "training")))
    functional.check_number("alpha", given["alpha"], 0.0, 1.0)
    functional.check_number("eps", given["eps"], 0.0)
    seed = None
    if mode != "none":
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device, generator=given["generator"])
    return ops.run(x, weight, bias, NormalNormOptions(seed, None, scale, mode, given["alpha"], given["eps"]))
