"""The compiled `norms.cpp`, called with tensors."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..options import STATS, IBNormOptions, Options

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
VARIANTS = {"S": 0, "L": 1, "T": 2}
NOISE_MODES = {"none": 0, "scaled": 1, "unscaled": 2, "dropout": 3}
MEAN_ABS, RMS, STANDARDIZE_FIRST = 1, 2, 4
SERIAL = 1 << 14  # elements up to which one thread is faster than several

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class _Common(ctypes.Structure):
    """`Common` of norms.cpp, field by field."""

    _fields_ = (
        *(("x", _POINTER), ("x_stride", _INT64), ("grad", _POINTER), ("grad_stride", _INT64)),
        *((name, _POINTER) for name in ("out", "stats", "weight", "bias", "dweight", "dbias")),
        *(("rows", _INT64), ("n", _INT64), ("eps", _FLOAT), ("dtype", _INT), ("threads", _INT)),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


class Library:
    """Calls a compiled `norms.cpp` with tensors; OSError or AttributeError at construction where `path` is none.

    `x` and `grad` are (rows, N) with the elements of a row side by side; `weight` and `bias` are (N,), contiguous, or
    None.
    """

    def __init__(self, path: Path, key: str) -> None:
        library, self._key = ctypes.CDLL(str(path)), key
        self._ib_norm, self._normal_norm = library.hf_ibnorm_ib_norm, library.hf_ibnorm_normal_norm
        self._normals, self.elementary = library.hf_ibnorm_normals, library.hf_ibnorm_elementary
        common = ctypes.POINTER(_Common)
        self._ib_norm.argtypes = [common, _INT, _INT, _POINTER, _INT]
        self._normal_norm.argtypes = [common, _FLOAT, _INT, _FLOAT, _POINTER, _POINTER, _INT]
        self._normals.argtypes = [_POINTER, _POINTER, _INT64, _INT64]
        self.elementary.argtypes = [_INT, _POINTER, _POINTER, _INT64]  # for tests alone
        self.elementary.restype = None
        self.dtypes = DTYPES.keys() if library.hf_ibnorm_has_float16() else DTYPES.keys() - {torch.float16}

    def build_name(self) -> str:
        """The build, for records of the environment of a result."""
        return f"C++, {torch.backends.cpu.get_cpu_capability()}, build {self._key}"

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
        """y, and the numbers of each row that backward needs: (rows, `STATS`) float32."""
        y, stats = x.new_empty(x.shape), x.new_empty(x.shape[0], STATS, dtype=torch.float32)
        self._call(options, True, x, {"out": y, "stats": stats, "weight": _float(weight), "bias": _float(bias)})
        return y, stats

    def backward(
        self, grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, needs: tuple[bool, bool], options: Options
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradient of `x`, and float32 gradients of weight and bias where `needs` says so."""
        dx = x.new_empty(x.shape)
        dweight, dbias = (x.new_empty(x.shape[1], dtype=torch.float32) if needed else None for needed in needs)
        tensors = {"grad": grad, "stats": stats, "weight": _float(weight), "out": dx, "dweight": dweight}
        self._call(options, False, x, {**tensors, "dbias": dbias})
        return dx, dweight, dbias

    def _call(self, options: Options, forward: bool, x: Tensor, tensors: dict[str, Tensor | None]) -> None:
        rows, n = x.shape
        grad = tensors.get("grad")
        common = _Common(
            x=x.data_ptr(),
            x_stride=x.stride(0),
            grad_stride=0 if grad is None else grad.stride(0),
            rows=rows,
            n=n,
            eps=options.eps,
            dtype=DTYPES[x.dtype],
            threads=1 if rows * n <= SERIAL else torch.get_num_threads(),
            **{name: _pointer(tensor) for name, tensor in tensors.items()},
        )
        # Pointers keep no tensor alive; `tensors` does, until the call is over.
        if isinstance(options, IBNormOptions):
            flags = MEAN_ABS * (options.unit == "mean_abs") | RMS * (options.standardize == "rms")
            flags |= STANDARDIZE_FIRST * (options.order == "standardize_first")
            lam = options.lam.data_ptr()
            failed = self._ib_norm(ctypes.byref(common), VARIANTS[options.variant], flags, lam, forward)
        else:
            mode, seed, normals = NOISE_MODES[options.noise_mode], _pointer(options.seed), _pointer(options.normals)
            noise = options.noise
            failed = self._normal_norm(ctypes.byref(common), options.alpha, mode, noise, seed, normals, forward)
        if failed:
            raise MemoryError(f"hf_ibnorm: no memory for the row buffers of a norm of width {n}")

    def normals(self, seed: Tensor, rows: int, n: int) -> Tensor:
        """The standard normals drawn from `seed`: (rows, N) float32."""
        out = torch.empty(rows, n, dtype=torch.float32)
        if self._normals(out.data_ptr(), seed.data_ptr(), rows, n):
            raise MemoryError(f"hf_ibnorm: no memory for a row of width {n}")
        return out
