"""Signals that end a run in order: SIGTERM and SIGINT; SIGHUP of a terminal that closes, SIGUSR1 of a scheduler."""

import os
import signal
import time
from threading import current_thread, main_thread
from types import FrameType, TracebackType
from typing import Any

from hf_ibnorm.base.errors import Stopped

_ORDERS = (signal.SIGTERM, signal.SIGINT)
_WARNINGS = (signal.SIGHUP, signal.SIGUSR1)
"""What says that the end is near: it may come again and again, and an order after it."""
_ECHO = 2.0
"""Seconds in which a launcher may pass on a signal that the whole process group had got already."""


class StopSignals:
    """While entered, these signals end the program in order, but for warnings that it was started to ignore (`nohup`).

    Before `finish_steps` is set they raise `Stopped`, since there is nothing to save yet. Afterwards the first one sets
    `name`, for the loop to see at the end of its step. A second SIGTERM or SIGINT ends the process at once, with 128 +
    its number as exit code; other signals than these two are not insisted on by coming again.
    """

    def __init__(self) -> None:
        self.finish_steps = False
        self.name = ""
        self._ordered: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if current_thread() is main_thread():  # elsewhere Python allows no handlers
            for each in (*_ORDERS, *_WARNINGS):
                if each in _ORDERS or signal.getsignal(each) is not signal.SIG_IGN:
                    self._before[each] = signal.signal(each, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in _ORDERS:
            if self._ordered is None:
                self._ordered = time.monotonic()
            # torchrun answers a Ctrl-C, which every process has got from the terminal, by signalling them again.
            elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._ordered > _ECHO:
                os._exit(128 + number)
        if self.name:
            return
        self.name = signal.Signals(number).name
        if not self.finish_steps:
            raise Stopped(f"{self.name} before the first step")
