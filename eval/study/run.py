"""Carrying a study out: trainings and suites as processes, one after another, several at once, or on a Ray cluster."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from hf_ibnorm.cli import STOPPED as STOPPED_CODE
from hf_ibnorm.cli import Stopped, UserError, bad_input, require_extra
from hf_ibnorm.files import write_json

from .folder import DIVERGED, Folder, Job, read_training, with_scores
from .plan import VALIDATION
from .search import run_search

RUNNING = "running.json"
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
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "failure.json").unlink(missing_ok=True)
    for command in job.commands:
        if command.done.exists():
            continue
        _wait_for_earlier(job.folder / "run", stopping)
        if stopping():
            return Ending(STOPPED_CODE, "stopped", time.monotonic() - started)
        code, line = _call(command.words, job, stopping)
        if code:
            if code != STOPPED_CODE and not stopping():
                failure = {"problem": line, "code": code, "date": datetime.now(UTC).isoformat(timespec="seconds")}
                write_json(job.folder / "failure.json", {**failure, "command": list(command.words)})
            return Ending(code, line, time.monotonic() - started)
    return Ending(0, "", time.monotonic() - started)


def _wait_for_earlier(run_dir: Path, stopping: Callable[[], bool]) -> None:
    """Wait for a training that outlived a `study run` that was killed."""
    while run_dir.is_dir() and not stopping():
        try:
            with FileLock(run_dir / ".lock", timeout=0):
                return
        except Timeout:
            time.sleep(POLL)


def _call(words: tuple[str, ...], job: Job, stopping: Callable[[], bool]) -> tuple[int, str]:
    """Run one command to its end; its exit code and the last line it said."""
    log = job.folder / "log.txt"
    with log.open("ab") as output:
        start = output.tell()
        # A session of its own: Ctrl-C reaches this program alone, which ends the others in order.
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
    said = log.read_bytes()[start:].decode(errors="replace").split("\n")
    lines = [line.strip() for line in said if line.strip()]
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
        if gpus:
            import torch

            if jobs * gpus > torch.cuda.device_count():
                raise UserError(
                    f"jobs: got {jobs}, each with {gpus} GPUs, but there are {torch.cuda.device_count()}; "
                    "must be fewer, or `gpus` in the study's file 0"
                )

    def room(self) -> bool:
        return bool(self._free)

    def submit(self, job: Job) -> "Future[Ending]":
        slot, stop = self._free.pop(), threading.Event()
        devices = ",".join(str(slot * self._gpus + i) for i in range(self._gpus))
        environment = {**job.environment, **({"CUDA_VISIBLE_DEVICES": devices} if self._gpus else {})}
        future = self._pool.submit(self._work, replace(job, environment=environment), stop, slot)
        self._stops[future] = stop
        return future

    def _work(self, job: Job, stop: threading.Event, slot: int) -> Ending:
        try:
            return work(job, stop.is_set)
        finally:  # not when the future is done: who waits for that may ask for room before
            self._free.append(slot)

    def cancel(self, future: "Future[Ending]") -> None:
        self._stops[future].set()

    def close(self) -> None:
        for stop in self._stops.values():
            stop.set()
        self._pool.shutdown()


class RayExecutor:
    """Jobs as tasks of a Ray cluster, whose machines share the study's directory.

    Args:
        address: of the cluster ("auto": the one this machine is part of; "local": one on this machine alone).
        threads: CPUs that a job takes.
        gpus: GPUs that a job takes.
    """

    def __init__(self, address: str, threads: int, gpus: int) -> None:
        require_extra("study", "ray")
        import ray

        try:
            _reach(address)
            dashboard = False if address == "local" else None
            ray.init(address, log_to_driver=False, logging_level="error", include_dashboard=dashboard)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"ray: got {address!r}, no cluster there: {error}") from error
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


def run_study(folder: Folder, executor: Executor, say: Callable[[str], None]) -> list[str]:
    """Carry out all of a study that is not done; what is done stays as it is.

    Args:
        folder: the study's directory, which this process has locked.
        executor: what carries out the jobs.
        say: is told a line whenever a job ends.

    Returns:
        A line for each job that failed; a training that diverged has not: that is a result.

    Raises:
        UserError: a search cannot be made.
    """
    running: dict[Future[Ending], Job] = {}
    tried: set[str] = set()
    failures: list[str] = []
    for search in folder.study.searches:
        run_search(folder, search, executor, say)
    while True:
        for job in folder.to_do():
            if job.name not in tried and executor.room():
                tried.add(job.name)
                running[executor.submit(job)] = job
                _note_running(folder, running)
        if not running:
            return failures
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            job = running.pop(future)
            with bad_input(OSError, about="output: "):
                ending = future.result()
            _note_running(folder, running)
            line = _outcome(folder, job, ending)
            if not line.startswith("failed"):
                # A job of the tuning may be asked for again, to be scored.
                tried.discard(job.name)
            else:
                failures.append(f"{job.name}: {line}")
            ended, total = folder.counts()
            say(f"[{ended}/{total}] {job.name}: {line}")


def _outcome(folder: Folder, job: Job, ending: Ending) -> str:
    """What became of a job, in a few words."""
    training = with_scores(read_training(job.folder), job.folder, folder.study.suites)
    if training.state == DIVERGED:
        return f"diverged: {training.problem}"
    if ending.code or training.validation is None:
        return f"failed: {ending.line or training.problem}"
    value = training.value(folder.study.metric)
    told = f"validation {training.validation:.4f}"
    if folder.study.metric != VALIDATION and value is not None:
        told += f", {folder.study.metric} {value:.4f}"
    return f"{told} ({_duration(ending.seconds)})"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _note_running(folder: Folder, running: dict["Future[Ending]", Job]) -> None:
    write_json(folder.path / RUNNING, [job.name for job in running.values()])


def stopped_in_order(folder: Folder) -> Stopped:
    """What a signal makes of a run."""
    ended, total = folder.counts()
    return Stopped(f"{ended} of {total} trainings have ended; the same command goes on from there")
