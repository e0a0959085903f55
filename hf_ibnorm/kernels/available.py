"""Whether there are kernels for a kind of device, and why not.

Apart from `fused`, which imports torch._dynamo to mark a function for torch.compile: as long as importing torch.
"""

import functools
import logging
import os

from . import ops

_log = logging.getLogger(__name__)


@functools.cache
def lacking(device_type: str) -> str | None:
    """Why there are no kernels for a kind of device ("cpu", "cuda"), or None where there are."""
    try:
        ops.library(device_type)
    except FileNotFoundError as error:
        return f"{error}; run `hf-ibnorm build_kernels`"
    except (OSError, AttributeError, ImportError, RuntimeError) as error:
        return " ".join(str(error).split())
    return None


def describe(device_type: str) -> str:
    """The norms' backend on a kind of device, in a line: the kernels and their build, or "reference" and why."""
    reason = lacking(device_type)
    return f"fused ({ops.library(device_type).build_name()})" if reason is None else f"reference ({reason})"


@functools.cache
def warn_once(device_type: str, reason: str) -> None:
    """Log that a kind of device has no kernels; of several processes only the first one does."""
    if os.environ.get("RANK", "0") == "0":
        _log.warning("hf_ibnorm: norms run as plain PyTorch, no fused kernels for %s: %s", device_type, reason)


def forget() -> None:
    """Look for kernels again at the next use, and warn again where there are none: after they have been built."""
    ops.forget()
    lacking.cache_clear()
    warn_once.cache_clear()
