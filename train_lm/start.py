"""Where a run begins: at step 0, or after the newest whole checkpoint; agreed on by every process of it."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from hf_ibnorm.base import layout
from hf_ibnorm.base.errors import TryAgain, UserError, bad_input
from hf_ibnorm.base.files import alone_in, atomic_directory, check_new_directory, sha256_tensors
from hf_ibnorm.base.manifest import MANIFEST, damage
from hf_ibnorm.base.reading import read_yaml

from .checkpoint import Checkpoint, clear_leftovers, read_checkpoint, steps_in
from .final import flaw
from .settings import TrainConfig

T = TypeVar("T")
CHUNK = 1 << 26  # bytes of a checkpoint that are sent to other machines at a time


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: Checkpoint | None = None  # to go on from, verified; None for step 0
    saved: dict[str, Any] | None = None  # settings that the run began with, as a recipe; None for a new run
    finished: bool = False  # whether there is nothing left to do
    messages: list[str] = field(default_factory=list)  # for the user
    damaged: list[int] = field(default_factory=list)  # steps of the checkpoints that were skipped
    locked: bool = False  # whether the first process holds the lock of the directory already


_SAVED = {
    "model": {"vocab_size": int, "norm_type": str, "norm_kwargs": dict, "norm_overrides": list},
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), int),
}
"""Form of a run's settings, as far as a resume needs them before they are compared."""


def alone_in_run(run_dir: Path) -> AbstractContextManager[None]:
    """Keep other runs out of a run directory; UserError where one is at work in it."""
    return alone_in(run_dir, f"run_dir: {run_dir} is in use by another run")


def find_start(config: TrainConfig, run_dir: Path, stack: ExitStack) -> Start:
    """Where the run in `run_dir` begins. A run that is there is locked until `stack` closes.

    UserError where the directory is not new and not to be resumed, holds something else, cannot be read or written, or
    another run is at work in it; and where `final`, or every checkpoint after step 0, is damaged.
    """
    final = run_dir / layout.FINAL
    begun = run_dir.is_dir() and any(path.name[0] != "." for path in run_dir.iterdir())
    if config.resume == "no" or not begun:
        hint = "; or go on with it: --resume auto" if (run_dir / layout.CONFIG).exists() else ""
        with bad_input(OSError):
            if config.resume == "no" or not run_dir.is_dir():
                check_new_directory("run_dir", run_dir, hint)
        return Start(messages=[f"resume: no run in {run_dir}, starting at step 0"] * (config.resume != "no"))
    if not (run_dir / layout.CONFIG).exists():
        raise UserError(f"run_dir: {run_dir} is not empty and holds no run to resume; name a new directory")
    try:
        saved = read_yaml("run_dir", run_dir / layout.CONFIG, _SAVED)
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise
        saved = None  # damaged; a checkpoint has the settings, too
    if os.path.lexists(final):
        if problem := flaw(final):
            raise UserError(
                f"run_dir: {final} {problem}; to have it made anew from the last checkpoint, remove all of it, and "
                "then --resume auto"
            )
        return Start(None, saved, finished=True, messages=[f"already finished: {final}"])
    with bad_input(OSError, about=f"run_dir: {run_dir} cannot be written: "):
        stack.enter_context(alone_in_run(run_dir))
        clear_leftovers(run_dir)
    return _newest_whole(run_dir / layout.CHECKPOINTS, saved)


def _newest_whole(folder: Path, saved: dict[str, Any] | None) -> Start:
    """After the newest checkpoint in `folder` that is whole; at step 0 where there is none at all."""
    problems: dict[int, str] = {}
    for step in reversed(steps_in(folder)):
        name = layout.checkpoint_name(step)
        try:
            checkpoint = read_checkpoint(folder / name)
        except ValueError as error:
            problems[step] = f"{name}: {error}"
            continue
        if step == 0 and problems:
            break  # step 0 is kept to look back at, not to train for days again without a word
        messages = [*(f"resume: skipped {problem}" for problem in problems.values()), f"resume: going on after {name}"]
        return Start(checkpoint, checkpoint.state["config"], False, messages, list(problems), locked=True)
    if problems:
        shown = [*list(problems.values())[:3], *["..."] * (len(problems) > 3)]
        raise UserError(
            f"resume: in {folder} none after step 0 is whole ({'; '.join(shown)}); put a whole one there, or remove "
            "the damaged ones to start over"
        )
    return Start(None, saved, False, ["resume: no whole checkpoint, starting at step 0"], locked=True)


def raise_together(problem: str | UserError | None, accelerator: Accelerator) -> None:
    """Raise UserError on every process if any of them has a `problem`: the others would wait for it for ever."""
    own = TryAgain if isinstance(problem, TryAgain) else UserError
    for kind, message in gather_object([(own, str(problem or ""))]):
        if message:
            raise kind(message)


def together(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """The result of `work` on this process, once all have done theirs; a UserError on one is raised on all."""
    problem, result = None, None
    try:
        result = work()
    except UserError as error:
        problem = error
    raise_together(problem, accelerator)
    return cast(T, result)


def check_same(tensors: Iterable[tuple[str, Tensor]], subject: str, accelerator: Accelerator) -> None:
    """Raise UserError about the `subject` on every process unless the named tensors are the same on all.

    Replicas would drift apart without a word.
    """
    if accelerator.num_processes == 1:
        return
    shas: list[str] = gather_object([sha256_tensors(tensors)])
    if others := [str(i) for i, sha in enumerate(shas) if sha != shas[0]]:
        raise UserError(f"{subject} on process {', '.join(others)} are not those of process 0; they must be the same")


def agree_on_start(config: TrainConfig, run_dir: Path, accelerator: Accelerator, stack: ExitStack) -> Start:
    """`find_start` on the first process, for all of them: other machines get the checkpoint where they lack it."""

    def start_here() -> Start:
        with bad_input(OSError, about=f"run_dir: {run_dir} cannot be read: "):
            return find_start(config, run_dir, stack) if accelerator.is_main_process else Start()

    start: Start = broadcast_object_list([together(accelerator, start_here)])[0]
    if start.checkpoint is not None:
        send_checkpoint(start.checkpoint.path, accelerator)
    return start


def send_checkpoint(path: Path, accelerator: Accelerator) -> None:
    """Bring the first machine's checkpoint to the machines that have none or a damaged one.

    Each machine verifies its own copy: `find_start` has verified the first one's. Raises UserError on every process
    where a copy cannot be read or written.
    """
    main, verifies = accelerator.is_main_process, accelerator.is_local_main_process

    def manifest_here() -> bytes | None:
        with bad_input(OSError, about=f"run_dir: {path} cannot be read: "):
            return (path / MANIFEST).read_bytes() if main or (verifies and damage(path) is None) else None

    manifests = gather_object([(verifies, together(accelerator, manifest_here))])
    content = manifests[0][1]
    lacking = [verifies and manifest != content for verifies, manifest in manifests]
    if not any(lacking):
        return
    pieces = _broadcast(_pieces_of(path, [*json.loads(content)["files"], MANIFEST]) if main else iter(()))

    def receive() -> None:
        with bad_input(OSError, about=f"run_dir: {path} cannot be brought to every machine: "):
            try:
                if lacking[accelerator.process_index]:
                    _write_pieces(path, pieces)
            finally:  # a process that does not write takes the pieces all the same, or the others would wait for it
                for _ in pieces:
                    pass

    together(accelerator, receive)


def _pieces_of(path: Path, names: list[str]) -> Iterator[tuple[str, bytes] | OSError]:
    """Name and piece after piece of the files `names` in `path`; in the end an error where one cannot be read."""
    try:
        for name in names:
            with (path / name).open("rb") as file:
                while piece := file.read(CHUNK):
                    yield name, piece
    except OSError as error:
        yield error


def _broadcast(items: Iterator[tuple[str, bytes] | OSError]) -> Iterator[tuple[str, bytes]]:
    """The first process's `items` on all processes, each of which must take them all; an error is raised."""
    while (item := broadcast_object_list([next(items, None)])[0]) is not None:
        if isinstance(item, OSError):
            raise item
        yield item


def _write_pieces(path: Path, pieces: Iterator[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parents[1])
    with atomic_directory(path, replace=True) as folder:
        for name, piece in pieces:
            (folder / name).parent.mkdir(exist_ok=True)
            with (folder / name).open("ab") as file:
                file.write(piece)
        if harm := damage(folder):
            raise OSError(f"the copy is not whole: {harm}")
