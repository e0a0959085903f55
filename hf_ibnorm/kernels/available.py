"""Whether there are kernels for a kind of device, and why not.

Apart from the norms, which are marked for torch.compile: to mark a function imports torch._dynamo, as long as torch.
"""

from . import ops

_REASONS: dict[str, str | None] = {}


def lacking(device_type: str) -> str | None:
    """Why there are no kernels for a kind of device ("cpu", "cuda"), or None where there are."""
    if device_type not in _REASONS:
        _REASONS[device_type] = _reason(device_type)
    return _REASONS[device_type]


def _reason(device_type: str) -> str | None:
    try:
        ops.library(device_type)
    except FileNotFoundError as error:
        return f"{error}; run `hf-ibnorm build_kernels`"
    except (OSError, AttributeError, ImportError, RuntimeError) as error:
        return " ".join(str(error).split())
    return None


def describe(device_type: str) -> str:
    """What runs the norms on a kind of device, in a line: the kernels and their build, or "reference" and why."""
    reason = lacking(device_type)
    return f"fused ({ops.library(device_type).build_name()})" if reason is None else f"reference ({reason})"


def forget() -> None:
    """Look for kernels again at the next use: after they have been built."""
    ops.forget()
    _REASONS.clear()
