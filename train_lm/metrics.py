"""The files that a run writes step by step, `metrics.jsonl` and `norms.jsonl` of the norms it watches; and trackers."""

import errno
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, get_available_trackers
from transformers import PreTrainedModel

from hf_ibnorm.analysis import ModelStatistics, watch
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import write_bytes, write_text
from hf_ibnorm.norms import all_measures
from hf_ibnorm.report.runs import flat_settings

from .settings import TrainConfig

MEASURED = ("tokens_per_second", "mfu", "memory_gb")
"""Fields that differ between two runs of the same settings: time and memory."""
_LEFT_OUT = ("reasons", "edges", "counts", "below", "above")
_CURVES = ("skewness", "excess_kurtosis", "near_zero", "massive")  # statistics of the output that trackers get


class MetricsFile:
    """`metrics.jsonl` or `norms.jsonl`, made anew with its content at the checkpoint that training goes on from."""

    def __init__(self, path: Path, content: bytes = b"") -> None:
        write_bytes(path, content)
        # Unbuffered: bytes that a full disk refuses must not be written again when the file is closed.
        self._file = path.open("r+b", buffering=0)
        self._bytes = self._file.seek(0, os.SEEK_END)
        self.close = self._file.close

    def append(self, row: dict[str, Any]) -> None:
        """Add one line; a number that is not finite becomes null, JSON has no infinity."""
        line = (json.dumps(finite_or_none(row), allow_nan=False) + "\n").encode()
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._bytes += len(line)

    def so_far(self) -> Callable[[], bytes]:
        """A function that reads the present content, even after more was added, or the file was removed."""
        length = self._bytes
        return lambda: os.pread(self._file.fileno(), length, 0)


def finite_or_none(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with None for numbers that are not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def check_trackers(names: list[str]) -> None:
    """Raise UserError for a tracker that is not installed: Accelerate would leave it out without a word."""
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in available:
            raise UserError(f"log_with: got {name!r}, which is not installed: pip install {name.replace('_', '-')}")


def start_trackers(accelerator: Accelerator, run_dir: Path, config: TrainConfig, step: int) -> None:
    """Begin to log; after a resume TensorBoard hides its curves after `step`, and W&B goes on with the same run."""
    if not accelerator.log_with:
        return
    settings = flat_settings(config.as_recipe()).items()
    plain = {name: value if isinstance(value, int | float | str) else json.dumps(value) for name, value in settings}
    options: dict[str, dict[str, Any]] = {}
    with bad_input(Exception, about="log_with: a tracker cannot start: "):
        # Made here: Accelerate would name its folder after the project.
        board = TensorBoardTracker("tensorboard", str(run_dir), purge_step=step + 1)
        accelerator.log_with = [board if str(name) == "tensorboard" else name for name in accelerator.log_with]
        if "wandb" in map(str, accelerator.log_with) and accelerator.is_main_process:
            # W&B keeps its curves after `step`, and takes no step twice; a resumed run logs the same numbers again.
            options["wandb"] = {"id": wandb_id(run_dir), "resume": "allow"}
        try:
            accelerator.init_trackers(config.tracker_project, init_kwargs=options)
        except Exception:
            accelerator.trackers.clear()  # a tracker that has not begun cannot be ended
            raise
        for tracker in accelerator.trackers:
            # TensorBoard's own form of settings is a second run beside the first; they are in config.yaml anyway.
            if tracker.name != "tensorboard":
                tracker.store_init_configuration(plain)


def wandb_id(run_dir: Path) -> str:
    """The id that this run has at W&B, made at the first call."""
    path = run_dir / "wandb_id"
    try:
        name = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        name = secrets.token_hex(8)
        write_text(path, name + "\n")
    if not re.fullmatch(r"[\w-]{1,64}", name, re.ASCII):
        raise ValueError(f"{path} holds no id of a run: {name[:80]!r}; remove it to begin another one")
    return name


@contextmanager
def watched(model: PreTrainedModel, step: int, config: TrainConfig) -> Iterator[ModelStatistics | None]:
    """Around the forward passes of `step`: yields the statistics that they fill, None for a step that is not watched.

    Names of sites are relative to the base model, as in `norm_overrides`. The effective rank is left out: its matrices
    would have to be sent and decomposed.
    """
    every = config.watch_norms
    if not every or (step % every and step not in (1, config.max_steps)):
        yield None
        return
    with watch(model.base_model, ModelStatistics(model.base_model, rank_width=0)) as statistics:
        yield statistics


def gather_norms(statistics: ModelStatistics, accelerator: Accelerator) -> dict[str, Any]:
    """Site → its cells in `norms.jsonl`, over the rows of all processes. Waits for the device.

    Every process must call this; the first one gets the cells, the others nothing.
    """
    if accelerator.num_processes > 1:
        for site in statistics.sites.values():  # one by one: together they would take as much memory as a small model
            packed = site.packed()
            if packed is None:  # of a norm that did not run, on any process
                continue
            of_all = accelerator.gather(packed[None])
            if accelerator.is_main_process:
                for other in of_all[1:]:
                    site.merge(site.unpacked(other))
    if not accelerator.is_main_process:
        return {}
    return {name: _short(cells) for name, cells in statistics.result().items()}


def _short(cell: Any) -> Any:
    """A cell without entries that are long, empty or not finite, which JSON does not know; numbers to 6 digits."""
    if isinstance(cell, dict):
        short = {key: _short(value) for key, value in cell.items() if key not in _LEFT_OUT}
        return {key: value for key, value in short.items() if value is not None}
    if isinstance(cell, float):
        return float(f"{cell:.6g}") if math.isfinite(cell) else None
    return cell


def curves(sites: dict[str, Any]) -> dict[str, float]:
    """The few numbers of each site that trackers get, by name, from the cells of `gather_norms`."""
    numbers: dict[str, float] = {}
    for site, cells in sites.items():
        values = {name: cells.get("after", {}).get(name) for name in _CURVES}
        for name in all_measures():
            if "." not in name:
                cell = cells.get(name)
                values[name] = cell.get("mean") if isinstance(cell, dict) else cell
        numbers |= {f"norms/{site}/{name}": value for name, value in values.items() if value is not None}
    return numbers
