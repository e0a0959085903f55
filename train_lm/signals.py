"""SIGTERM and SIGINT: the first asks for an orderly end, the second ends at once."""

import os
import signal
import time
from threading import current_thread, main_thread
from types import FrameType, TracebackType
from typing import Any

from hf_ibnorm.cli import Stopped

_ECHO = 2.0
"""Seconds in which a launcher may pass on a signal that the whole process group had got already."""


class StopSignals:
    """While entered, SIGTERM and SIGINT end the program in order.

    Before `finish_steps` is set they raise `Stopped`, since there is nothing to save yet. Afterwards the first one sets
    `name`, for the loop to see at the end of its step, and the second one ends the process at once, with 128 + its
    number as exit code.
    """

    def __init__(self) -> None:
        self.finish_steps = False
        self.name = ""
        self._when = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if current_thread() is main_thread():  # elsewhere Python allows no handlers
            for each in (signal.SIGTERM, signal.SIGINT):
                self._before[each] = signal.signal(each, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            # torchrun answers a Ctrl-C, which every process has got from the terminal, by signalling them again.
            if "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._when > _ECHO:
                os._exit(128 + number)
            return
        self.name, self._when = signal.Signals(number).name, time.monotonic()
        if not self.finish_steps:
            raise Stopped(f"{self.name} before the first step")
