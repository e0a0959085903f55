"""The CPU kernels: C++ behind a C interface (`norms.cpp`), built by `hf-ibnorm build_kernels` (`build.py`)."""

from .build import load as load
