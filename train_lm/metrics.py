"""What a run writes as it goes: `metrics.jsonl`, one object a step, and the trackers of Accelerate."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from hf_ibnorm.cli import UserError

MEASURED = ("tokens_per_second", "mfu", "memory_gb")
"""Fields that differ between two runs of the same settings: time and memory."""


class MetricsFile:
    """`metrics.jsonl`. A checkpoint notes how long the file was and its hash, so that a resumed run can cut it there.

    Args:
        path: the file; appended to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        self._digest, self._bytes = hashlib.sha256(content), len(content)
        self._file = path.open("ab")

    def append(self, row: dict[str, Any]) -> None:
        """Add one line; a number that is not finite becomes null, JSON has no infinity."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = (json.dumps(clean, allow_nan=False) + "\n").encode()
        self._file.write(line)
        self._file.flush()
        self._digest.update(line)
        self._bytes += len(line)

    def mark(self) -> dict[str, Any]:
        """Length and hash of what is in the file, which is on the disk when this returns."""
        os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def metrics_damage(path: Path, mark: dict[str, Any]) -> str | None:
    """What keeps the file from being cut at `mark`; None where it begins with what was there then."""
    content = path.read_bytes() if path.exists() else b""
    if len(content) < mark["bytes"]:
        return f"{path.name} has {len(content)} bytes, not the {mark['bytes']} of that step"
    if hashlib.sha256(content[: mark["bytes"]]).hexdigest() != mark["sha256"]:
        return f"{path.name} is not what it was at that step"
    return None


def truncate_metrics(path: Path, mark: dict[str, Any]) -> None:
    """Cut the file at `mark`: what was written after it will be written again."""
    with path.open("ab") as file:
        file.truncate(mark["bytes"])
        os.fsync(file.fileno())


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
    settings = {**config, **{f"model.{name}": value for name, value in config["model"].items()}}
    del settings["model"]
    plain = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in settings.items()}
    # TensorBoard's own form of settings is a second run beside the first; they are in config.yaml anyway.
    accelerator.init_trackers(
        "tensorboard" if not others else "hf_ibnorm",
        config=plain if others else None,
        init_kwargs={"tensorboard": {"purge_step": step + 1}},
    )
