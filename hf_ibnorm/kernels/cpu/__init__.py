"""The CPU kernels: C++ behind a C interface (`norms.cpp`), built by `hf-ibnorm build_kernels` (`build.py`)."""

import ctypes

import torch

from . import build
from .library import Library


def load() -> Library:
    """The built kernels.

    Raises:
        FileNotFoundError: they are not built for this source, torch and processor.
        OSError, AttributeError: the file is no such library.
    """
    path = build.library_path()
    if not path.exists():
        capability = torch.backends.cpu.get_cpu_capability()
        raise FileNotFoundError(f"not built for torch {torch.__version__} and {capability}")
    return Library(ctypes.CDLL(str(path)), build.key())
