"""Fused kernels for the norms: as fast as the layer they replace, where there are any, and the formulas where not.

`ib_norm` and `normal_norm` are `hf_ibnorm.functional`'s with one more argument, `backend`. They run the ops
`torch.ops.hf_ibnorm.*` (`ops.py`) on the CPU's kernels (`cpu/`, built once by `hf-ibnorm build_kernels`) or a GPU's
(`triton/`), for float32, bfloat16 and float16. All that the kernels do not do is left to the formulas: float64, lam
being learned, the shrink variant, functorch's transforms, forward-mode differentiation, export, tensor subclasses other
than torch's fake tensors. Nothing above this package knows which one ran.
"""

from typing import TYPE_CHECKING

from ..base.lazy import on_demand

if TYPE_CHECKING:
    from .available import describe as describe
    from .available import forget as forget
    from .available import lacking as lacking
    from .fused import ib_norm as ib_norm
    from .fused import normal_norm as normal_norm

_HOMES = {"available": ("describe", "forget", "lacking"), "fused": ("ib_norm", "normal_norm")}
if not TYPE_CHECKING:
    __getattr__, __dir__ = on_demand(__name__, _HOMES)
