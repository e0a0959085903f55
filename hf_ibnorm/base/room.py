"""Memory and disk of this machine: sizes beyond them are refused before anything is allocated.

Only the least that a thing takes is counted. A size that passes may still run out of memory, which is then an error.
"""

import os
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import existing_folder

BLOCK = 50_000  # bytes that the Python objects of one block of a model take at least, without its weights
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@cache
def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _LIMITS:
        with suppress(OSError, ValueError):  # no such limit
            sizes.append(int(Path(path).read_text()))
    return min(sizes)


def check_room(field: str, value: Any, needed: float, for_what: str) -> None:
    """Raise UserError where a setting needs more bytes of memory, at least, than the machine has.

    `for_what` is the use of the bytes, such as "for the tokens of a step".
    """
    if needed > machine_memory():
        room = f"this machine has {machine_memory() / 1e9:.0f} GB"
        raise UserError(f"{field}: got {value}, which takes {needed / 1e9:,.0f} GB {for_what}; {room}")


def check_disk(field: str, path: Path, needed: float, for_what: str = "", advice: str = "") -> None:
    """Raise OSError where the disk of `path`, which need not exist yet, has less than `needed` bytes free.

    `for_what` is the use of the bytes, such as " for its checkpoints"; `advice` ends the message.
    """
    free = shutil.disk_usage(existing_folder(path)).free
    if free < needed:
        raise OSError(f"{field}: {path} needs {needed / 1e9:.3g} GB{for_what}, {free / 1e9:.3g} GB are free{advice}")


def check_model(field: str, config: Any, weights: bool = True) -> None:
    """Raise UserError where memory cannot hold a model of this config, before it is built.

    Counted are its modules and, unless `weights` is false, its weights in 16 bits.
    """

    def size(name: str) -> int:
        value = getattr(config, name, None)
        return value if isinstance(value, int) else 0

    layers, width, rows = size("num_hidden_layers"), size("hidden_size"), size("vocab_size")
    inner = size("intermediate_size") or 4 * width
    check_room(f"{field}: num_hidden_layers", layers, BLOCK * layers, "for its blocks")
    if weights:
        needed = 2 * (rows * width + layers * (2 * width * width + 2 * width * inner))
        check_room(field, f"{layers} blocks {width} wide with {rows} tokens", needed, "for its weights")
