"""Jobs of a study as processes: on this machine, one or several at once, or on a Ray cluster."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from hf_ibnorm.base.command import require_extra
from hf_ibnorm.base.errors import STOPPED, UserError, bad_input
from hf_ibnorm.base.files import write_json
from hf_ibnorm.base.layout import FAILURE, LOG

from .folder import Job
from .training import DIVERGED, read_training

POLL = 0.2
"""Seconds between two looks at a process."""


@dataclass(frozen=True)
class Ending:
    """How a job ended: 0, or the exit code of the command that did not and the last line it said."""

    code: int
    line: str
    seconds: float


class Executor(Protocol):
    """Something that carries out jobs."""

    def room(self) -> bool:
        """Whether one more job would start at once."""

    def submit(self, job: Job) -> "Future[Ending]":
        """Begin a job."""

    def cancel(self, future: "Future[Ending]") -> None:
        """End a job in order: its training writes a checkpoint."""

    def close(self) -> None:
        """End all of them."""


def work(job: Job, stopping: Callable[[], bool] = lambda: False) -> Ending:
    """Carry out a job: its commands one after the other, their output in the cell's `log.txt`.

    Args:
        job: what is to be done; commands that are done are passed over.
        stopping: asked again and again; once it is true, the command gets SIGTERM.
    """
    started = time.monotonic()

    def ending(code: int, line: str) -> Ending:
        return Ending(code, line, time.monotonic() - started)

    job.folder.mkdir(parents=True, exist_ok=True)
    for command in job.commands:
        _wait_for_earlier(command.done.parent, stopping)
        if stopping():
            return ending(STOPPED, "stopped")
        if command.done.exists():
            continue
        if read_training(job.folder, job.expected).state == DIVERGED:  # another process may have trained it meanwhile
            break
        (job.folder / FAILURE).unlink(missing_ok=True)
        try:
            code, line = call(command.words, job, stopping)
        except OSError as error:
            code, line = 1, f"{command.words[0]}: {error.strerror}"
        if not command.done.exists():
            if code != STOPPED and not stopping():
                note_failure(job, line, code)
            return ending(code or 1, line)
    return ending(0, "")


def note_failure(job: Job, line: str, code: int) -> None:
    """Write down why the first unfinished command of a job failed."""
    command = next((each for each in job.commands if not each.done.exists()), None)
    if command:
        failure = {"problem": line, "code": code, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        done = str(command.done.relative_to(job.folder))
        job.folder.mkdir(parents=True, exist_ok=True)
        write_json(job.folder / FAILURE, {**failure, "done": done, "command": list(command.words)})


def outcome_of(future: "Future[Ending]", job: Job) -> Ending:
    """How a job ended; where what carried it out was lost, such as a machine of a cluster, it has failed; UserError
    where that cannot be written down."""
    try:
        return future.result()
    except Exception as error:
        line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        with bad_input(OSError, about="output: "):
            note_failure(job, line, 1)
        return Ending(1, line, 0.0)


def _wait_for_earlier(place: Path, stopping: Callable[[], bool]) -> None:
    """Wait for a process that outlived a `study run` that was killed: it holds the lock of what it writes."""
    while place.is_dir() and not stopping():
        try:
            with FileLock(place / ".lock", timeout=0):
                return
        except Timeout:
            time.sleep(POLL)


def call(words: tuple[str, ...], job: Job, stopping: Callable[[], bool]) -> tuple[int, str]:
    """Run one command to its end; its exit code and the last line it said."""
    log = job.folder / LOG
    with log.open("ab") as output:
        start = output.tell()
        # In a session of its own the process gets no Ctrl-C: this program ends it in order.
        process = subprocess.Popen(
            words,
            stdout=output,
            stderr=output,
            cwd=job.directory,
            env={**os.environ, **job.environment},
            start_new_session=True,
        )
        asked = False
        try:
            while process.poll() is None:
                if stopping() and not asked:
                    process.terminate()
                    asked = True
                time.sleep(POLL)
        except BaseException:  # a Ray task that is cancelled is interrupted like this
            process.terminate()
            process.wait()
            raise
    lines = [line.strip() for line in log.read_bytes()[start:].decode(errors="replace").split("\n") if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = (errors or lines or ["nothing was said"])[-1]
    if process.returncode < 0:
        last = f"killed by {signal.Signals(-process.returncode).name}; {last}"
    return process.returncode, last


class LocalExecutor:
    """Up to `jobs` processes at once on this machine; each has `gpus` of its GPUs to itself, if that is not 0."""

    def __init__(self, jobs: int, gpus: int = 0) -> None:
        self._pool = ThreadPoolExecutor(jobs)
        self._stops: dict[Future[Ending], threading.Event] = {}
        self._free = list(range(jobs))
        self._gpus = gpus
        self._devices = _gpus() if gpus else []
        if jobs * gpus > len(self._devices):
            raise UserError(
                f"jobs: got {jobs}, each with {gpus} GPUs, but there are {len(self._devices)}; "
                "must be fewer, or `gpus` in the study's file 0"
            )

    def room(self) -> bool:
        return bool(self._free)

    def submit(self, job: Job) -> "Future[Ending]":
        slot, stop = self._free.pop(), threading.Event()
        devices = ",".join(self._devices[slot * self._gpus : (slot + 1) * self._gpus])
        environment = {**job.environment, **({"CUDA_VISIBLE_DEVICES": devices} if devices else {})}
        future = self._pool.submit(self._work, replace(job, environment=environment), stop, slot)
        self._stops[future] = stop
        return future

    def _work(self, job: Job, stop: threading.Event, slot: int) -> Ending:
        try:
            return work(job, stop.is_set)
        finally:  # before the future is done: whoever waits for that asks for room next
            self._free.append(slot)

    def cancel(self, future: "Future[Ending]") -> None:
        self._stops[future].set()

    def close(self) -> None:
        for stop in self._stops.values():
            stop.set()
        self._pool.shutdown()


def _gpus() -> list[str]:
    """The GPUs that this program may use, as CUDA_VISIBLE_DEVICES calls them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


class RayExecutor:
    """Jobs as tasks of a Ray cluster, whose machines share the study's directory.

    Args:
        address: of the cluster ("auto": the one this machine is part of; "local": one on this machine alone).
        threads: CPUs that a job takes.
        gpus: GPUs that a job takes.
    """

    def __init__(self, address: str, threads: int, gpus: int) -> None:
        require_extra("study", "ray")
        import logging

        import ray

        try:
            _reach(address)
            dashboard = False if address == "local" else None
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=dashboard)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"ray: got {address!r}, no cluster there: {error}") from error
        if address == "local":  # a cluster may grow, this machine does not
            for name, wanted in {"CPU": threads, "GPU": gpus}.items():
                if wanted > (has := ray.cluster_resources().get(name, 0)):
                    raise UserError(f"ray: a training takes {wanted} {name}s, this machine has {has:g}")
        self._task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(work)
        self._tasks: dict[Future[Ending], Any] = {}

    def room(self) -> bool:
        return True

    def submit(self, job: Job) -> "Future[Ending]":
        task = self._task.remote(job)
        future: Future[Ending] = task.future()
        self._tasks[future] = task
        return future

    def cancel(self, future: "Future[Ending]") -> None:
        import ray

        ray.cancel(self._tasks[future])

    def close(self) -> None:
        import ray

        for future in [each for each in self._tasks if not each.done()]:
            self.cancel(future)
        wait([each for each in self._tasks if not each.done()])
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


@contextmanager
def executor_for(jobs: int, ray: str | None, threads: int, gpus: int) -> Iterator[Executor]:
    """What carries out the jobs; whatever still runs at the end is stopped in order."""
    executor: Executor = LocalExecutor(jobs, gpus) if ray is None else RayExecutor(ray, threads, gpus)
    try:
        yield executor
    finally:
        executor.close()
