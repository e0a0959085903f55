"""Jobs of a study as processes: on this machine, one or several at once, or on a Ray cluster."""

import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
    """How a job ended: with exit code 0, or that of the command that failed, and the last line that it wrote."""

    code: int
    line: str
    seconds: float


def work(job: Job, stopping: Callable[[], bool] = lambda: False) -> Ending:
    """Carry out the commands of a job that have not run, one after the other; their output goes to `log.txt`.

    `stopping` is called again and again; once it returns True, the running command gets SIGTERM.
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
    command = next((command for command in job.commands if not command.done.exists()), None)
    if command:
        failure = {"problem": line, "code": code, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        done = str(command.done.relative_to(job.folder))
        job.folder.mkdir(parents=True, exist_ok=True)
        write_json(job.folder / FAILURE, {**failure, "done": done, "command": list(command.words)})


def outcome_of(future: "Future[Ending]", job: Job) -> Ending:
    """How a job ended: as failed, where its worker was lost, such as with a machine of a cluster.

    Raises:
        UserError: the failure cannot be written down.
    """
    try:
        return future.result()
    except Exception as error:
        line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        with bad_input(OSError, about="output: "):
            note_failure(job, line, 1)
        return Ending(1, line, 0.0)


def _wait_for_earlier(place: Path, stopping: Callable[[], bool]) -> None:
    """Wait for a process that outlived a `study run` that was killed: it holds the lock of the folder it writes."""
    while place.is_dir() and not stopping():
        try:
            with FileLock(place / ".lock", timeout=0):
                return
        except Timeout:
            time.sleep(POLL)


def call(words: tuple[str, ...], job: Job, stopping: Callable[[], bool]) -> tuple[int, str]:
    """Run one command to its end; its exit code and the last line it wrote, or the last error."""
    log = job.folder / LOG
    with log.open("ab") as output:
        start = output.tell()
        environment = {**os.environ, **job.environment}
        # In a session of its own the process gets no Ctrl-C: this program ends it in order.
        process = subprocess.Popen(
            words, stdout=output, stderr=output, cwd=job.directory, env=environment, start_new_session=True
        )
        try:
            while process.poll() is None and not stopping():
                time.sleep(POLL)
        finally:  # a cancelled Ray task is interrupted, and comes here, too
            process.terminate()  # nothing is sent to a process that has ended
            process.wait()
    lines = [line.strip() for line in log.read_bytes()[start:].decode(errors="replace").split("\n") if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = (errors or lines or ["nothing was said"])[-1]
    if process.returncode < 0:
        last = f"killed by {signal.Signals(-process.returncode).name}; {last}"
    return process.returncode, last


class LocalExecutor:
    """Up to `jobs` processes at once on this machine; each has `gpus` of its GPUs to itself, if that is not 0."""

    def __init__(self, jobs: int, gpus: int = 0) -> None:
        devices: list[str] = []
        if gpus:
            import torch

            given = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
        if jobs * gpus > len(devices):
            raise UserError(
                f"jobs: got {jobs}, each with {gpus} GPUs, but there are {len(devices)}; "
                "must be fewer, or `gpus` in the study's file 0"
            )
        self._pool = ThreadPoolExecutor(jobs)
        self._stops: dict[Future[Ending], threading.Event] = {}
        self._free = [devices[i * gpus : (i + 1) * gpus] for i in range(jobs)]

    def room(self) -> bool:
        """Whether one more job would start at once."""
        return bool(self._free)

    def submit(self, job: Job) -> "Future[Ending]":
        """Begin a job."""
        devices, stop = self._free.pop(), threading.Event()
        future = self._pool.submit(self._work, job, stop, devices)
        self._stops[future] = stop
        return future

    def _work(self, job: Job, stop: threading.Event, devices: list[str]) -> Ending:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
        try:
            return work(replace(job, environment={**job.environment, **visible}), stop.is_set)
        finally:  # before the future is done: whoever waits for that asks for room next
            self._free.append(devices)

    def cancel(self, future: "Future[Ending]") -> None:
        """End a job in order: its training writes a checkpoint."""
        self._stops[future].set()

    def close(self) -> None:
        """End all jobs in order."""
        for stop in self._stops.values():
            stop.set()
        self._pool.shutdown()


class RayExecutor:
    """The same on a Ray cluster, whose machines share the study's directory; a job takes `threads` CPUs, and `gpus`.

    `address` is the cluster's, "auto" for the one this machine is part of, "local" for one on this machine alone.
    """

    def __init__(self, address: str, threads: int, gpus: int) -> None:
        require_extra("study", "ray")
        import ray

        host, colon, port = address.removeprefix("ray://").rpartition(":")
        try:
            if colon and port.isdecimal():  # Ray itself would try for minutes where nobody listens
                socket.create_connection((host, int(port)), timeout=10).close()
            dashboard = False if address == "local" else None
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=dashboard)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"ray: got {address!r}, no cluster there: {error}") from error
        if address == "local":  # a cluster may grow, this machine does not
            for name, wanted in {"CPU": threads, "GPU": gpus}.items():
                if wanted > (has := ray.cluster_resources().get(name, 0)):
                    raise UserError(f"ray: a training takes {wanted} {name}s, this machine has {has:g}")
        self._ray = ray
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
        self._ray.cancel(self._tasks[future])

    def close(self) -> None:
        running = [future for future in self._tasks if not future.done()]
        for future in running:
            self.cancel(future)
        wait(running)
        self._ray.shutdown()


Executor = LocalExecutor | RayExecutor
