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

from .checkpoint import Checkpoint, checkpoint_name, clear_leftovers, read_checkpoint, steps_in
from .final import flaw
from .settings import TrainConfig

T = TypeVar("T")
CHUNK = 1 << 26  # bytes of a checkpoint that are sent to other machines at a time


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    path: Path | None = None  # the checkpoint to go on from; None for step 0
    saved: dict[str, Any] | None = None  # settings the run began with, as a recipe; None for a new run
    finished: bool = False  # whether there is nothing left to do
    messages: list[str] = field(default_factory=list)  # what the user should know
    damaged: list[int] = field(default_factory=list)  # steps of checkpoints that were skipped
    locked: bool = False  # whether the first process holds the lock of the directory already

    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint, which `find_start` has verified."""
        if self.path is None:
            return None
        return Checkpoint(self.path, json.loads((self.path / "state.json").read_text(encoding="utf-8")))


_SAVED = {
    "model": {"vocab_size": int, "norm_type": str, "norm_kwargs": dict, "norm_overrides": list},
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), int),
}
"""Form of a run's settings, as far as a resume needs them before they are compared."""


def alone_in_run(run_dir: Path) -> AbstractContextManager[None]:
    """Keep other runs out of a run directory; UserError where one is at work in it."""
    return alone_in(run_dir, f"run_dir: {run_dir} is in use by another run")


def find_start(config: TrainConfig, run_dir: Path, stack: ExitStack) -> Start:
    """Where the run in `run_dir` begins: at step 0, or after the newest whole checkpoint. Locks a run that is there.

    Raises:
        UserError: the directory is not new and not to be resumed, holds something else, cannot be read or written, or
            another run is at work in it; what is in `final`, or every checkpoint after step 0, is damaged.
    """
    begun = run_dir.is_dir() and any(each.name[0] != "." for each in run_dir.iterdir())
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
    if os.path.lexists(run_dir / layout.FINAL):
        if problem := flaw(run_dir / layout.FINAL):
            raise UserError(
                f"run_dir: {run_dir / 'final'} {problem}; to have it made anew from the last checkpoint, remove all of "
                "it, and then --resume auto"
            )
        return Start(None, saved, finished=True, messages=[f"already finished: {run_dir / 'final'}"])
    with bad_input(OSError, about=f"run_dir: {run_dir} cannot be written: "):
        stack.enter_context(alone_in_run(run_dir))
        clear_leftovers(run_dir)
    return _newest_whole(run_dir, saved)


def _newest_whole(run_dir: Path, saved: dict[str, Any] | None) -> Start:
    """After the newest checkpoint that is whole; at step 0 where there is none at all."""
    problems: dict[int, str] = {}
    for step in reversed(steps_in(run_dir / layout.CHECKPOINTS)):
        path = run_dir / layout.CHECKPOINTS / checkpoint_name(step)
        try:
            checkpoint = read_checkpoint(path)
        except ValueError as error:
            problems[step] = f"{path.name}: {error}"
            continue
        if step == 0 and problems:
            break  # it is kept to look back at, not to train for days again without a word
        messages = [f"resume: skipped {problem}" for problem in problems.values()]
        messages.append(f"resume: going on after {path.name}")
        return Start(path, checkpoint.state["config"], False, messages, list(problems), locked=True)
    if problems:
        some = [*list(problems.values())[:3], *["..."] * (len(problems) > 3)]
        raise UserError(
            f"resume: in {run_dir / 'checkpoints'} none after step 0 is whole ({'; '.join(some)}); put a whole one "
            "there, or remove the damaged ones to start over"
        )
    return Start(None, saved, False, ["resume: no whole checkpoint, starting at step 0"], locked=True)


def raise_together(problem: str | UserError | None, accelerator: Accelerator) -> None:
    """Raise UserError on every process if any of them has a `problem`, or the others would wait for it for ever."""
    own = TryAgain if isinstance(problem, TryAgain) else UserError
    for kind, message in gather_object([(own, str(problem or ""))]):
        if message:
            raise kind(message)


def together(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` gives on this process, once it is done on all; where it raised UserError on one, all raise it."""
    problem, result = None, None
    try:
        result = work()
    except UserError as error:
        problem = error
    raise_together(problem, accelerator)
    return cast(T, result)


def agree(tensors: Iterable[tuple[str, Tensor]], what: str, accelerator: Accelerator) -> None:
    """Raise UserError, which begins with `what`, on every process where the named tensors are not alike on all.

    Replicas would drift apart without a word.
    """
    if accelerator.num_processes == 1:
        return
    shas: list[str] = gather_object([sha256_tensors(tensors)])
    if others := [str(i) for i, sha in enumerate(shas) if sha != shas[0]]:
        raise UserError(f"{what} on process {', '.join(others)} are not those of process 0; they must be the same")


def agree_on_start(config: TrainConfig, run_dir: Path, accelerator: Accelerator, stack: ExitStack) -> Start:
    """`find_start` on the first process; every other one learns its result, and gets the checkpoint if it has none."""

    def start_here() -> Start:
        with bad_input(OSError, about=f"run_dir: {run_dir} cannot be read: "):
            return find_start(config, run_dir, stack) if accelerator.is_main_process else Start()

    start: Start = broadcast_object_list([together(accelerator, start_here)])[0]
    if start.path is not None:
        send_checkpoint(start.path, accelerator)
    return start


def send_checkpoint(path: Path, accelerator: Accelerator) -> None:
    """Bring the first machine's checkpoint to those that have it not, or not whole; where all have it, nothing is sent.

    Each machine verifies its own copy: what `find_start` has verified is the first one's. Raises UserError on every
    process where a copy cannot be read or written.
    """
    manifest, main = path / MANIFEST, accelerator.is_main_process

    def content_here() -> bytes:
        with bad_input(OSError, about=f"run_dir: {path} cannot be read: "):
            return manifest.read_bytes() if main else b""

    content = broadcast_object_list([together(accelerator, content_here)])[0]

    def is_here() -> bool:
        with bad_input(OSError, about=f"run_dir: {path} cannot be read: "):
            first = main or not accelerator.is_local_main_process
            return first or (damage(path) is None and manifest.read_bytes() == content)

    has_it = together(accelerator, is_here)
    if all(gather_object([has_it])):
        return
    pieces = _sent(path, [*json.loads(content)["files"], manifest.name], main)

    def receive() -> None:
        with bad_input(OSError, about=f"run_dir: {path} cannot be brought to every machine: "):
            if has_it:
                for _ in pieces:
                    pass
            else:
                _write_pieces(path, pieces)

    together(accelerator, receive)


def _write_pieces(path: Path, pieces: Iterator[tuple[str, bytes]]) -> None:
    """Write a checkpoint that comes in pieces. Who cannot write still takes them, or the others would wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parents[1])
        with atomic_directory(path, replace=True) as folder:
            for name, piece in pieces:
                (folder / name).parent.mkdir(exist_ok=True)
                with (folder / name).open("ab") as file:
                    file.write(piece)
            if harm := damage(folder):
                raise OSError(f"of what was sent {harm}")
    finally:
        for _ in pieces:
            pass


def _sent(path: Path, names: list[str], sends: bool) -> Iterator[tuple[str, bytes]]:
    """Name and piece after piece of the files in `path` of the process that `sends`, to all of them.

    Where it cannot read them, OSError is raised on all processes, at the same place.
    """
    for name in names:
        place = 0
        while True:
            piece: bytes | str = b""
            if sends:
                try:
                    with (path / name).open("rb") as file:
                        file.seek(place)
                        piece = file.read(CHUNK)
                except OSError as error:
                    piece = str(error)
            piece = broadcast_object_list([piece])[0]
            if isinstance(piece, str):
                raise OSError(piece)
            if not piece:
                break
            place += len(piece)
            yield name, piece
