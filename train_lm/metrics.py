"""What a run writes as it goes: `metrics.jsonl` and `norms.jsonl`, an object a step, and Accelerate's trackers."""

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from hf_ibnorm.cli import UserError
from hf_ibnorm.files import write_bytes
from hf_ibnorm.report.runs import flat_settings

MEASURED = ("tokens_per_second", "mfu", "memory_gb")
"""Fields that differ between two runs of the same settings: time and memory."""


class MetricsFile:
    """`metrics.jsonl` or `norms.jsonl`, which begins with what it had at the checkpoint that training goes on from.

    Args:
        path: the file; replaced.
        content: what it begins with.
    """

    def __init__(self, path: Path, content: bytes = b"") -> None:
        write_bytes(path, content)
        # Unbuffered: what a full disk does not take must not be tried again when the file is closed.
        self._file = path.open("r+b", buffering=0)
        self._bytes = self._file.seek(0, os.SEEK_END)

    def append(self, row: dict[str, Any]) -> None:
        """Add one line; a number that is not finite becomes null, JSON has no infinity."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = (json.dumps(clean, allow_nan=False) + "\n").encode()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._bytes += len(line)

    def so_far(self) -> Callable[[], bytes]:
        """A function that reads what is in the file now, even after more was added, or the file was removed."""
        length = self._bytes
        return lambda: os.pread(self._file.fileno(), length, 0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def check_trackers(names: list[str]) -> None:
    """Raise UserError for a tracker that is not installed: Accelerate would leave it out without a word."""
    available = {str(each) for each in get_available_trackers()}
    for name in names:
        if name not in available:
            raise UserError(f"log_with: got {name!r}, which is not installed: pip install {name.replace('_', '-')}")


def start_trackers(accelerator: Accelerator, config: dict[str, Any], step: int) -> None:
    """Begin to log; what TensorBoard was told after `step` before a resume is hidden."""
    if not accelerator.log_with:
        return
    others = [each for each in accelerator.log_with if str(each) != "tensorboard"]
    settings = flat_settings(config).items()
    plain = {name: value if isinstance(value, int | float | str) else json.dumps(value) for name, value in settings}
    # TensorBoard's own form of settings is a second run beside the first; they are in config.yaml anyway.
    accelerator.init_trackers(
        "tensorboard" if not others else "hf_ibnorm",
        config=plain if others else None,
        init_kwargs={"tensorboard": {"purge_step": step + 1}},
    )
