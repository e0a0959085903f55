"""The GPU kernels: Triton, one program a row forward, one program for consecutive rows backward.

Imported at their first use only: Triton takes its time, and a machine without a GPU never needs it.
"""

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..options import STATS, IBNormOptions, Options

dtypes = {torch.float32, torch.bfloat16, torch.float16}


def check_device() -> None:
    """Raise ImportError or RuntimeError unless Triton is installed and compiles for this GPU."""
    import triton  # noqa: F401

    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        raise RuntimeError(f"Triton needs compute capability 8.0, {torch.cuda.get_device_name()} has less")


def build_name() -> str:
    """Version and source of the kernels, for records of the environment of a result."""
    import triton

    source = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    return f"Triton {triton.__version__}, source {source.hexdigest()[:16]}"


def block_of(n: int) -> int:
    """Elements of a program: the power of 2 that a row of width `n` fits into."""
    return max(16, 1 << (n - 1).bit_length())


def warps_of(block: int, each: int) -> int:
    """Warps of a program whose threads hold `each` elements.

    8 forward and 4 backward: more elements do not fit into a thread's registers (the compiler reports spilled registers
    without a GPU, too: `tests/hf_ibnorm/test_kernels_triton.py`).
    """
    return max(4, min(32, block // (32 * each)))


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _arguments(options: Options) -> tuple[Any, tuple[Tensor | None, ...], tuple[float, ...], dict[str, Any]]:
    """The module of a norm's kernels, and its tensors, numbers and constants among their arguments."""
    from . import ib_norm, normal_norm

    if isinstance(options, IBNormOptions):
        constants = {
            "VARIANT": options.variant,
            "MEAN_ABS": options.unit == "mean_abs" and options.variant != "S",  # a linear f is the same in every unit
            "RMS": options.standardize == "rms",
            "STANDARDIZE_FIRST": options.order == "standardize_first",
        }
        return ib_norm, (options.lam,), (options.eps,), constants
    numbers = (options.noise, options.alpha, options.eps)
    return normal_norm, (options.seed, options.normals), numbers, {"MODE": options.noise_mode}


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """As `cpu.Library.forward`."""
    rows, n = x.shape
    y, stats = x.new_empty(x.shape), x.new_empty(rows, STATS, dtype=torch.float32)
    module, tensors, numbers, constants = _arguments(options)
    block = block_of(n)
    if rows:
        with _on(x):
            launch = module.forward[(rows,)]
            pointers = (x, y, stats, weight, bias, *tensors)
            launch(*pointers, x.stride(0), n, *numbers, **constants, BLOCK=block, num_warps=warps_of(block, 8))
    return y, stats


def backward(
    grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, needs: tuple[bool, bool], options: Options
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `cpu.Library.backward`."""
    rows, n = x.shape
    block, dx = block_of(n), x.new_empty(x.shape)
    warps = warps_of(block, 4)
    # As many programs as run at once: each ends with a row of partial sums.
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = min(rows, processors * 32 // warps)
    # Partial sums are added up in a fixed order: atomic additions would not give the same twice.
    dweight, dbias = (x.new_empty(programs, n, dtype=torch.float32) if needed else None for needed in needs)
    module, tensors, numbers, constants = _arguments(options)
    if isinstance(options, IBNormOptions):
        numbers = ()  # eps has no part in its backward
    if rows:
        with _on(x):
            launch = module.backward[(programs,)]
            pointers = (grad, x, dx, stats, weight, dweight, dbias, *tensors)
            sizes = (grad.stride(0), x.stride(0), rows, n)
            launch(*pointers, *sizes, *numbers, **constants, BLOCK=block, num_warps=warps)
    return dx, *(None if sums is None else sums.sum(0) for sums in (dweight, dbias))  # type: ignore[return-value]


def normals(seed: Tensor, rows: int, n: int) -> Tensor:
    """As `cpu.Library.normals`."""
    from . import normal_norm

    out = seed.new_empty(rows, n, dtype=torch.float32)
    if rows:
        with _on(seed):
            normal_norm.draw[(rows,)](out, seed, n, BLOCK=block_of(n), num_warps=4)
    return out
