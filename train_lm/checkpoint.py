"""Checkpoints: everything a run needs to go on to the bit, in a directory that is whole or not there.

    step-40/
        model/                  weights in float32, config, tokenizer, for `from_pretrained`
        training.safetensors    AdamW's moments by parameter; the norms' gains at the start; adapters, and the
                                weights that they are merged into in model/
        process-00000.jsonl.gz  random states and data position, one file a process
        metrics.jsonl.gz        the run's metrics so far
        norms.jsonl.gz          the run's statistics of its norms so far, where it took any (`watch_norms`)
        state.json              step, settings, hashes, versions and device
        manifest.json           size and SHA-256 of every other file (`hf_ibnorm.base.manifest`)

A checkpoint is copied in memory while training waits, and written by a thread while training goes on: into a temporary
directory, flushed, renamed, and only then named in `latest`; older ones are pruned last. No file here is a pickle.
"""

import base64
import copy
import gzip
import json
import os
import random
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ibnorm.base import layout
from hf_ibnorm.base.errors import bad_input
from hf_ibnorm.base.files import atomic_directory, remove, set_aside, write_json, write_text
from hf_ibnorm.base.manifest import damage, write_manifest

FORMAT = 1
STATE, TENSORS, PROCESS = "state.json", "training.safetensors", "process-{:05}.jsonl.gz"
METRICS, NORMS = f"{layout.METRICS}.gz", f"{layout.NORMS}.gz"


@dataclass
class Snapshot:
    """A copy in memory of everything that goes into a checkpoint; training may go on at once."""

    step: int
    model: PreTrainedModel  # on the CPU, as all tensors here
    processor: Any  # the tokenizer, saved beside the model
    tensors: dict[str, Tensor]  # contents of `training.safetensors`
    processes: list[dict[str, Any]]  # `process_state` of each process
    state: dict[str, Any]  # contents of `state.json`
    metrics: Callable[[], bytes]  # reads `metrics.jsonl` as it was
    norms: Callable[[], bytes] = lambda: b""  # the same of `norms.jsonl`


def copy_model(model: PreTrainedModel, value: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """A copy of `model` with ties kept; `value` gives the copy of each of its tensors, and is asked once for each."""
    copies = {id(buffer): value(buffer) for buffer in model.buffers()}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(value(parameter), parameter.requires_grad)
    return copy.deepcopy(model, copies)


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` whose tensors have shapes and no values, to be filled by `copy_model`."""
    return copy_model(model, lambda tensor: torch.empty_like(tensor, device="meta", requires_grad=False))


def process_state(data: dict[str, Any]) -> dict[str, Any]:
    """This process's data position and the state of every random generator it has."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "data": data,
        "python": [version, list(words), gauss],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def restore_random_states(state: dict[str, Any]) -> None:
    """Set every random generator of this process to the state in which `process_state` found it."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = state["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def write_checkpoint(folder: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint into `folder`, whole or not at all; one of the same step is replaced."""
    path = folder / layout.checkpoint_name(snapshot.step)
    with atomic_directory(path, replace=True) as directory:
        snapshot.model.save_pretrained(directory / layout.MODEL)
        snapshot.processor.save_pretrained(directory / layout.MODEL)
        save_file(snapshot.tensors, directory / TENSORS)
        for i, state in enumerate(snapshot.processes):
            data = {key: value for key, value in state["data"].items() if key != "buffer"}
            with gzip.open(directory / PROCESS.format(i), "wt", compresslevel=1, encoding="utf-8") as file:
                file.write(json.dumps({**state, "data": data}) + "\n")
                # One by one: encoding the whole shuffle buffer in one call would not let training go on meanwhile.
                for text in state["data"].get("buffer", ()):
                    file.write(json.dumps(text) + "\n")
        for name, content in ((METRICS, snapshot.metrics()), (NORMS, snapshot.norms())):
            if content or name == METRICS:
                (directory / name).write_bytes(gzip.compress(content, compresslevel=1, mtime=0))
        write_json(directory / STATE, {"format": FORMAT, "step": snapshot.step, **snapshot.state})
        write_manifest(directory)
    write_text(folder / layout.LATEST, f"{path.name}\n")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    state: dict[str, Any] = field(repr=False)

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.state["step"])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Contents of `training.safetensors`; UserError where it cannot be read any more."""
        with bad_input(OSError, SafetensorError, about=f"resume: {self.path / TENSORS} cannot be read: "):
            return load_file(self.path / TENSORS)

    def process(self, process: int) -> dict[str, Any]:
        """`process_state` of one process."""
        with gzip.open(self.path / PROCESS.format(process), "rt", encoding="utf-8") as file:
            content: dict[str, Any] = json.loads(next(file))
            content["data"]["buffer"] = [json.loads(line) for line in file]
        return content

    @property
    def metrics(self) -> bytes:
        """Contents of `metrics.jsonl` as it was."""
        return gzip.decompress((self.path / METRICS).read_bytes())

    @property
    def norms(self) -> bytes:
        """Contents of `norms.jsonl` as it was; nothing where there was none."""
        return gzip.decompress((self.path / NORMS).read_bytes()) if (self.path / NORMS).exists() else b""


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, whole or not, ascending."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    pattern = layout.checkpoint_name(r"(\d+)")
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(pattern, name)))


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in `path`; OSError where a file in it cannot be read.

    ValueError where a file is missing or damaged, or the checkpoint was written by a later release.
    """
    if problem := damage(path):
        raise ValueError(problem)
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise ValueError(f"its format is {state['format']}, this release reads {FORMAT}")
    return Checkpoint(path, state)


class Checkpointer:
    """Writes checkpoints in a thread, one at a time, and prunes old ones.

    `newest` is the step of the newest whole checkpoint; checkpoints of the steps `damaged` do not count until they are
    written again. The last `keep_last` up to the one just written are kept, multiples of `keep_every`, and step 0.
    """

    def __init__(
        self, folder: Path, keep_last: int, keep_every: int, newest: int = 0, damaged: Collection[int] = ()
    ) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.newest, self.damaged = newest, set(damaged)
        self.error: BaseException | None = None
        self._thread: Thread | None = None

    @property
    def problem(self) -> str:
        """Why a checkpoint could not be written; empty where all is well."""
        return "" if self.error is None else f"run_dir: a checkpoint could not be written: {self.error}"

    def write(self, snapshot: Snapshot | None, prune: bool = True) -> None:
        """Begin to write, once the write before has ended; None for nothing. With `prune`, older ones may go then."""
        self.wait()
        if snapshot is not None:
            self._thread = Thread(target=self._write, args=(snapshot, prune), name="checkpoint")
            self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot, prune: bool) -> None:
        try:
            write_checkpoint(self.folder, snapshot)
            self.newest = snapshot.step
            self.damaged.discard(snapshot.step)
            if prune:
                with suppress(OSError):  # a folder that cannot be removed now can be after the next write
                    self._prune(snapshot.step)
        except BaseException as error:
            self.error = error

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of this step stays for good."""
        return step == 0 or (bool(self.keep_every) and step % self.keep_every == 0)

    def _prune(self, step: int) -> None:
        # Checkpoints of later steps stay: a run that went back to this one may need none of them, but must not lose
        # this one to them.
        past = [old for old in steps_in(self.folder) if old <= step and old not in self.damaged]
        for old in past[: -self.keep_last]:
            if not self.keeps(old):
                # Renamed first: a kill in the middle of the removal must not leave half a checkpoint.
                remove(set_aside(self.folder / layout.checkpoint_name(old)))


def clear_leftovers(run_dir: Path) -> None:
    """Remove the temporary files, and the checkpoints half removed, of a run that was killed."""
    names = [layout.CONFIG, layout.ENVIRONMENT, layout.METRICS, layout.NORMS, layout.FINAL]
    patterns = [f".{name}.*" for name in names]
    patterns += [f"{layout.CHECKPOINTS}/.{name}.*" for name in (layout.checkpoint_name("*"), layout.LATEST)]
    for path in [path for pattern in patterns for path in run_dir.glob(pattern)]:
        remove(path)
