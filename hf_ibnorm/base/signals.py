"""Signals that end a program in order: SIGTERM and SIGINT; SIGHUP of a terminal that closes, SIGUSR1 of a scheduler."""

import os
import signal
import time
from collections.abc import Callable
from threading import current_thread, main_thread
from typing import Any

_ORDERS = (signal.SIGTERM, signal.SIGINT)
_WARNINGS = (signal.SIGHUP, signal.SIGUSR1)  # that the end is near; may come repeatedly, and an order after them
_ECHO = 2.0  # seconds in which a launcher may pass on a signal that the whole process group has got already


class StopSignals:
    """While entered, the first signal ends the program in order: its name is in `name`, and `ending` is raised.

    With `deferred` set nothing is raised: the program looks at `name` where it can stop. A warning that the program was
    started to ignore (`nohup`) is ignored.

    Args:
        ending: makes the exception that ends the program.
        insist: whether a second SIGTERM or SIGINT ends the process at once, with 128 + its number as exit code. If not,
            all signals after the first are ignored, also after leaving this.
    """

    def __init__(self, ending: Callable[[signal.Signals], BaseException], insist: bool = True) -> None:
        self.ending, self.insist = ending, insist
        self.deferred = False
        self.name = ""
        self._first: signal.Signals | None = None
        self._ordered: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if current_thread() is main_thread():  # elsewhere Python allows no handlers
            for number in (*_ORDERS, *_WARNINGS):
                if number in _ORDERS or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self.insist or not self.name:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raise `ending` again after a signal: other people's code may have caught the first exception."""
        if self._first is not None:
            raise self.ending(self._first)

    def _handle(self, number: int, _: object) -> None:
        if self.insist and number in _ORDERS:
            if self._ordered is None:
                self._ordered = time.monotonic()
            # torchrun answers a Ctrl-C, which every process has got from the terminal, by signalling them again.
            elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._ordered > _ECHO:
                os._exit(128 + number)
        if self._first is None:
            self._first = signal.Signals(number)
            self.name = self._first.name
            if not self.deferred:
                self.check()
