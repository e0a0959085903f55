"""The display of a run: a live bar on a terminal; elsewhere a line now and then, and one a validation."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class _Console(Console):
    """A console that goes silent when nobody reads it any more: `| head`, a terminal that was closed, a full disk."""

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            self.go_silent()

    def on_broken_pipe(self) -> None:
        self.go_silent()

    def go_silent(self) -> None:
        """Write no more; Python's own buffer, flushed at the end, must not fail either."""
        self.quiet = True
        with suppress(OSError, ValueError):  # a standard output that is no file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


class Progress:
    """Step, loss, tokens per second and time left of a run of so many steps; silent where not `enabled`.

    Where the output is no terminal there is a line every so many `seconds`; with 0, only one a validation.
    """

    def __init__(self, steps: int, enabled: bool, seconds: float = 0.0) -> None:
        self.steps, self.enabled, self.seconds = steps, enabled, seconds
        self.console = _Console()
        self._first: tuple[int, float] | None = None
        self._said = time.monotonic()
        self.bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self.task = self.bar.add_task("train", total=steps, loss="-", speed="-")

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, *lines: str) -> None:
        """Print lines above the bar."""
        for text in lines if self.enabled else ():
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, row: dict[str, Any]) -> None:
        """Show the metrics of a finished step."""
        loss, speed = f"{row['loss']:.4f}", f"{row['tokens_per_second']:,.0f}"
        self.bar.update(self.task, completed=row["step"], loss=loss, speed=speed)
        now = time.monotonic()
        self._first = self._first or (row["step"], now)
        due = self.seconds and now - self._said >= self.seconds and not self.console.is_terminal
        if "eval_loss" in row or due:
            self._said = now
            validation = f"  validation {row['eval_loss']:.4f}" if "eval_loss" in row else ""
            self.say(f"step {row['step']:>6}  loss {loss}{validation}  {speed} tokens/s{self._left(row['step'], now)}")

    def _left(self, step: int, now: float) -> str:
        """How long the rest takes, if it goes on as since the first step seen here."""
        assert self._first is not None
        first, then = self._first
        if step in (first, self.steps):
            return ""
        return f"  left {timedelta(seconds=round((now - then) / (step - first) * (self.steps - step)))}"


def silent(text: str) -> None:
    """Say nothing."""


class ReadingProgress:
    """Says after `first` seconds, and then every so many, how far `what` has come that reads text."""

    def __init__(self, say: Callable[[str], None], what: str, first: float = 10.0, every: float = 60.0) -> None:
        self.say, self.what, self.every = say, what, every
        self._start = time.monotonic()
        self._next = self._start + first

    def each(self, documents: Iterable[str]) -> Iterator[str]:
        """`documents`, counted as they are taken."""
        characters = 0
        for count, text in enumerate(documents, 1):
            yield text
            characters += len(text)
            now = time.monotonic()
            if now >= self._next:
                self._next = now + self.every
                size, speed = characters / 1e6, characters / 1e6 / (now - self._start)
                self.say(f"{self.what}: {count:,} documents, {size:,.0f} MB of text, {speed:.1f} MB/s")
