"""What this machine can hold: sizes that it cannot are refused before anything is allocated.

What is counted is the least that a thing takes. Whatever passes may still run out of memory, and is told so then.
"""

import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import existing_folder

BLOCK = 50_000
"""Bytes that the Python objects of one block of a model take at least, without its weights."""
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@cache
def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or what its container is allowed."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _LIMITS:
        try:
            found.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such limit
            continue
    return min(found)


def check_room(field: str, value: Any, needed: float, for_what: str) -> None:
    """Raise UserError where `needed` bytes are more than the machine has.

    Args:
        field, value: what was given, and makes it so many.
        needed: bytes, at least.
        for_what: what they are for, such as "for the tokens of a step".
    """
    if needed > machine_memory():
        raise UserError(
            f"{field}: got {value}, which takes {needed / 1e9:,.0f} GB {for_what}; this machine has "
            f"{machine_memory() / 1e9:.0f} GB"
        )


def check_disk(field: str, path: Path, needed: float, for_what: str = "", advice: str = "") -> None:
    """Raise OSError where the disk that `path` is on, or will be, has less than `needed` bytes free.

    Args:
        field: what the path was given as.
        path: need not exist yet.
        needed: bytes, at least.
        for_what: what they are for, such as " for its checkpoints".
        advice: ends the message, such as "; make room".
    """
    free = shutil.disk_usage(existing_folder(path)).free
    if free < needed:
        raise OSError(f"{field}: {path} needs {needed / 1e9:.3g} GB{for_what}, {free / 1e9:.3g} GB are free{advice}")


def check_model(field: str, config: Any, weights: bool = True) -> None:
    """Raise UserError where a model cannot be held, before it is built.

    Args:
        field: what the model was given as.
        config: its Transformers config.
        weights: whether they will be in memory, in 16 bits at least; otherwise only the model without values will.
    """
    sizes = {name: _size(config, name) for name in ("num_hidden_layers", "hidden_size", "intermediate_size")}
    layers, width = sizes["num_hidden_layers"], sizes["hidden_size"]
    inner, rows = sizes["intermediate_size"] or 4 * width, _size(config, "vocab_size")
    check_room(f"{field}: num_hidden_layers", layers, BLOCK * layers, "for its blocks")
    if weights:
        needed = 2 * (rows * width + layers * (2 * width * width + 2 * width * inner))
        check_room(field, f"{layers} blocks {width} wide with {rows} tokens", needed, "for its weights")


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: the machine's or a GPU's."""
    said = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)  # torch.OutOfMemoryError is one, too
        and any(words in said for words in ("out of memory", "not enough memory", "can't allocate memory"))
    )
