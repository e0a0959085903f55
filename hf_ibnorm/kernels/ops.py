"""The fused norms as torch ops `torch.ops.hf_ibnorm.*`, with gradients for autograd and shapes for torch.compile.

An op runs the kernels of its input's device. It keeps the input and `STATS` numbers a row for its backward, which is an
op too; second derivatives (create_graph) come from the formulas of `hf_ibnorm.functional`.
"""

import math
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import functional
from . import cpu
from .options import STATS, IBNormOptions, NormalNormOptions, Options

_LIBRARIES: dict[str, Any] = {}
"""Kind of device → its kernels, once loaded: an object with `forward`, `backward`, `normals` and `dtypes`."""


def library(device_type: str) -> Any:
    """The kernels for a kind of device ("cpu" or "cuda").

    Raises:
        OSError, AttributeError, ImportError, RuntimeError: there are none; the message says why.
    """
    if device_type not in _LIBRARIES:
        if device_type == "cpu":
            _LIBRARIES["cpu"] = cpu.load()
        elif device_type == "cuda":
            from . import triton

            triton.check_device()
            _LIBRARIES["cuda"] = triton
        else:
            raise RuntimeError(f"there are none for {device_type} devices")
    return _LIBRARIES[device_type]


def forget() -> None:
    """Load kernels anew at their next use."""
    _LIBRARIES.clear()


def _rows(x: Tensor) -> Tensor:
    """`x` as (rows, N), the elements of a row side by side; a copy only where its strides need one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _check(x: Tensor, options: Options, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors have the shapes, dtypes and device that kernels trust in."""
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, must be (..., N) with N >= 1")
    if x.dtype not in library(x.device.type).dtypes:
        raise ValueError(f"x: got {x.dtype}, the kernels compute float32, bfloat16 and float16")
    row, float32 = x.shape[-1:], torch.float32
    wanted = {
        "weight": (row, None),
        "bias": (row, None),
        "lam": ((), float32),
        "seed": ((1,), torch.int64),
        "normals": (x.shape, float32),
        "grad": (x.shape, x.dtype),
        "stats": ((x.numel() // row[0], STATS), float32),
    }
    for name, tensor in {**tensors, **options._asdict()}.items():
        if not isinstance(tensor, Tensor):
            continue
        shape, dtype = wanted[name]
        if tensor.shape != shape or tensor.device != x.device or tensor.dtype != (dtype or tensor.dtype):
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}: got {got}, must be {tuple(shape)} {dtype or ''} on {x.device}")


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    _check(x, options, weight=weight, bias=bias)
    weight, bias = _contiguous(weight), _contiguous(bias)
    y, stats = library(x.device.type).forward(_rows(x), weight, bias, _contiguous_in(options))
    return torch.ops.aten._unsafe_view(y, x.shape), stats  # no view for autograd: y may be changed in place


def _backward(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, needs: tuple[bool, bool], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, options, grad=grad, stats=stats, weight=weight)
    tensors = (_rows(grad), _rows(x), stats.contiguous(), _contiguous(weight))
    grads = library(x.device.type).backward(*tensors, needs, _contiguous_in(options))
    dx, dweight, dbias = (x.new_empty(0, dtype=torch.float32) if tensor is None else tensor for tensor in grads)
    return torch.ops.aten._unsafe_view(dx, x.shape), dweight, dbias


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _contiguous_in(options: Options) -> Options:
    if isinstance(options, NormalNormOptions) and options.normals is not None:
        return options._replace(normals=options.normals.contiguous())
    return options


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])
    return x.new_empty(x.shape), x.new_empty(rows, STATS, dtype=torch.float32)


def _fake_backward(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, needs_weight: bool, needs_bias: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[-1]
    dweight, dbias = (x.new_empty(n if needed else 0, dtype=torch.float32) for needed in (needs_weight, needs_bias))
    return x.new_empty(x.shape), dweight, dbias


_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", float: "float"}


def _ops_of(name: str, kind: type[Options]) -> tuple[Any, Any]:
    """`torch.ops.hf_ibnorm.NAME`, which gives the norm's output and `STATS` numbers of each row, and its backward.

    Both take the fields of `kind` after their tensors. The backward gives the gradients of x, and in float32 of weight
    and bias, empty where they are not needed.
    """
    fields = ", ".join(f"{_SCHEMA[type_]} {field}" for field, type_ in get_type_hints(kind).items())

    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        return _forward(x, weight, bias, kind(*options))

    def backward(grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        return _backward(grad, x, stats, weight, rest[:2], kind(*rest[2:]))

    schema = f"(Tensor x, Tensor? weight, Tensor? bias, {fields}) -> (Tensor, Tensor)"
    op = torch.library.custom_op(f"hf_ibnorm::{name}", forward, mutates_args=(), schema=schema)
    schema = "(Tensor grad, Tensor x, Tensor stats, Tensor? weight, bool needs_weight, bool needs_bias, "
    schema += f"{fields}) -> (Tensor, Tensor, Tensor)"
    op_backward = torch.library.custom_op(f"hf_ibnorm::{name}_backward", backward, mutates_args=(), schema=schema)
    op.register_fake(_fake_forward)
    op_backward.register_fake(_fake_backward)
    op.register_autograd(partial(_gradients, kind=kind), setup_context=_setup)
    return op, op_backward


def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
    """The output of an op by the formula, differentiable to any order."""
    if isinstance(options, IBNormOptions):
        return functional.ib_norm(x, weight, bias, **options._asdict())
    normals = options.normals
    if normals is None and options.seed is not None:
        rows = math.prod(x.shape[:-1])
        normals = library(x.device.type).normals(options.seed, rows, x.shape[-1]).view(x.shape)
    _, _, noise, mode, alpha, eps = options
    return functional.normal_norm_with(x, weight, bias, normals, noise, mode, alpha, eps)


def _keep(ctx: Any, stats: Tensor, inputs: tuple[Any, ...]) -> None:
    """Save x, weight, bias and options of an op for the backward pass, and `stats` of each row."""
    x, weight, bias, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, stats, *(value if isinstance(value, Tensor) else None for value in options))
    ctx.values = [None if isinstance(value, Tensor) else value for value in options]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _keep(ctx, output[1], inputs)


def _gradients(ctx: Any, grad: Tensor | None, grad_stats: None, *, kind: type[Options]) -> tuple[Tensor | None, ...]:
    none = (None,) * (3 + len(ctx.values))
    if grad is None:
        return none
    x, weight, bias, stats, *tensors = ctx.saved_tensors
    given = [value if tensor is None else tensor for value, tensor in zip(ctx.values, tensors, strict=True)]
    needs = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        inputs = [tensor for tensor, needed in zip((x, weight, bias), needs, strict=True) if needed]
        y = formula(x, weight, bias, kind(*given))
        grads = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
        return (*(next(grads) if needed else None for needed in needs), *none[3:])
    if _is_watched(grad) or torch._C._functorch.is_legacy_batchedtensor(grad):  # from grad(is_grads_batched=True)
        dx, dweight, dbias = _OPS[kind][1](grad, x, stats, weight, needs[1], needs[2], *given)
    else:
        dx, dweight, dbias = _backward(grad, x, stats, weight, needs[1:], kind(*given))
    dweight = dweight.to(weight.dtype) if needs[1] else None
    return (dx if needs[0] else None, dweight, dbias.to(bias.dtype) if needs[2] else None, *none[3:])


ib_norm, ib_norm_backward = _ops_of("ib_norm", IBNormOptions)
normal_norm, normal_norm_backward = _ops_of("normal_norm", NormalNormOptions)
_OPS: dict[type[Options], Any] = {
    IBNormOptions: (ib_norm, ib_norm_backward),
    NormalNormOptions: (normal_norm, normal_norm_backward),
}


def _is_watched(x: Tensor) -> bool:
    """Whether torch must see an op: for torch.compile, a dispatch mode (selective checkpointing's), vmap, or an `x`
    without values."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or isinstance(x, FakeTensor)
    )


class _Direct(torch.autograd.Function):
    """An op without torch's dispatcher, which takes longer than a small norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: type[Options], *given: Any
    ) -> Any:
        y, stats = _forward(x, weight, bias, kind(*given))
        _keep(ctx, stats, (x, weight, bias, *given))
        ctx.kind = kind
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*_gradients(ctx, grad, None, kind=ctx.kind), None)


def run(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
    """y: by the op where torch must see it, else directly by the same kernels and gradients."""
    if _is_watched(x):
        return _OPS[type(options)][0](x, weight, bias, *options)[0]
    return _Direct.apply(x, weight, bias, type(options), *options)
