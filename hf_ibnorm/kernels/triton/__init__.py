"""The GPU kernels: Triton, one program a row forward, one a block of rows backward.

Imported at their first use only: Triton takes its time, and a machine without a GPU never needs it.
"""

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..options import STATS, IBNormOptions, Kept, NormalNormOptions, Options

dtypes = {torch.float32, torch.bfloat16, torch.float16}


def check_device() -> None:
    """Raise unless Triton is installed and this GPU is one it compiles for.

    Raises:
        ImportError, RuntimeError: naming what is missing.
    """
    import triton  # noqa: F401

    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        raise RuntimeError(f"Triton needs compute capability 8.0, {torch.cuda.get_device_name()} has less")


def build_name() -> str:
    """What is compiled, for records of what a result depends on."""
    import triton

    source = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    return f"Triton {triton.__version__}, source {source.hexdigest()[:16]}"


def block_of(n: int) -> int:
    """Elements a program holds: the power of 2 that a row of width `n` fits into."""
    return max(16, 1 << (n - 1).bit_length())


def warps_of(block: int, each: int) -> int:
    """Warps of a program whose threads hold `each` elements.

    8 forward and 4 backward: more elements do not fit into a thread's registers (what the compiler spills is seen
    without a GPU, `tests/hf_ibnorm/test_kernels_triton.py`).
    """
    return max(4, min(32, block // (32 * each)))


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _ib_flags(options: IBNormOptions) -> dict[str, Any]:
    return {
        "VARIANT": options.variant,
        "MEAN_ABS": options.unit == "mean_abs" and options.variant != "S",  # a linear f is the same in every unit
        "RMS": options.standardize == "rms",
        "STANDARDIZE_FIRST": options.order == "standardize_first",
    }


def _noise(options: NormalNormOptions, stand_in: Tensor) -> tuple[Tensor, Tensor]:
    """Seed and normals; `stand_in`, which is not read, for what there is none of: a kernel takes no null pointer."""
    return (
        stand_in if options.seed is None else options.seed,
        stand_in if options.normals is None else options.normals,
    )


def _normal_flags(options: NormalNormOptions) -> dict[str, Any]:
    return {"MODE": options.noise_mode, "GIVEN": options.normals is not None}


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """y, and what is kept of each row: (rows, 4) float32. As `cpu.Library.forward`."""
    from . import ib_norm, normal_norm

    rows, n = x.shape
    y, stats = x.new_empty(x.shape), x.new_empty(rows, STATS, dtype=torch.float32)
    block = block_of(n)
    shared: dict[str, Any] = {"BLOCK": block, "num_warps": warps_of(block, 8)}
    shared |= {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    pointers = (x, y, stats, x if weight is None else weight, x if bias is None else bias)
    if not rows:
        return y, stats
    with _on(x):
        if isinstance(options, IBNormOptions):
            launch = ib_norm.forward[(rows,)]
            launch(*pointers, options.lam, x.stride(0), n, options.eps, **_ib_flags(options), **shared)
        else:
            numbers = (options.noise, options.alpha, options.eps)
            launch = normal_norm.forward[(rows,)]
            launch(*pointers, *_noise(options, x), x.stride(0), n, *numbers, **_normal_flags(options), **shared)
    return y, stats


def backward(grad: Tensor, kept: Kept, options: Options) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of `x`, and float32 ones of weight and bias where they are asked for. As `cpu.Library.backward`."""
    from . import ib_norm, normal_norm

    x, stats, weight, needs_weight, needs_bias = kept
    rows, n = x.shape
    block, dx = block_of(n), x.new_empty(x.shape)
    warps = warps_of(block, 4)
    # As many programs as run at once: each ends with a row of partial sums.
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = min(rows, processors * 32 // warps)
    # A sum over partials in a fixed order: atomic additions would not be the same twice.
    needs = (needs_weight, needs_bias)
    dweight, dbias = (x.new_empty(programs, n, dtype=torch.float32) if each else None for each in needs)
    shared: dict[str, Any] = {"BLOCK": block, "num_warps": warps, "HAS_WEIGHT": weight is not None}
    shared |= {"NEEDS_WEIGHT": needs_weight, "NEEDS_BIAS": needs_bias}
    pointers = (grad, x, dx, stats, *(stats if each is None else each for each in (weight, dweight, dbias)))
    sizes = (grad.stride(0), x.stride(0), rows, n)
    if rows:
        with _on(x):
            if isinstance(options, IBNormOptions):
                ib_norm.backward[(programs,)](*pointers, options.lam, *sizes, **_ib_flags(options), **shared)
            else:
                numbers = (options.noise, options.alpha, options.eps)
                launch = normal_norm.backward[(programs,)]
                launch(*pointers, *_noise(options, x), *sizes, *numbers, **_normal_flags(options), **shared)
    return dx, *(None if each is None else each.sum(0) for each in (dweight, dbias))  # type: ignore[return-value]


def normals(seed: Tensor, rows: int, n: int) -> Tensor:
    """The standard normals that `seed` stands for: (rows, N) float32."""
    from . import normal_norm

    out = seed.new_empty(rows, n, dtype=torch.float32)
    if rows:
        with _on(seed):
            normal_norm.draw[(rows,)](out, seed, n, BLOCK=block_of(n), num_warps=4)
    return out
