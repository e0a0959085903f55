"""The options of kernels: those of `hf_ibnorm.functional`, resolved."""

from typing import NamedTuple

from torch import Tensor

STATS = 4  # float32 numbers of each row that are kept for backward, beside the input


class IBNormOptions(NamedTuple):
    """As in `functional.ib_norm`; `lam` is a float32 tensor without dimensions, `variant` one of S, L and T."""

    lam: Tensor
    variant: str
    unit: str
    standardize: str
    order: str
    eps: float


class NormalNormOptions(NamedTuple):
    """As in `functional.normal_norm`, with noise as `resolve_noise` gives it.

    Normals are drawn from `seed`, int64 of shape (1,), or given as `normals`, float32 of the input's shape.
    """

    seed: Tensor | None
    normals: Tensor | None
    noise: float
    noise_mode: str
    alpha: float
    eps: float


Options = IBNormOptions | NormalNormOptions
