"""The display of a run: a live bar on a terminal; elsewhere a line now and then, and one for each validation."""

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
    """A console that goes silent when its output fails: `| head`, a terminal that was closed, a full disk."""

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # Python's own buffer, flushed at the end, must not fail either.
        with suppress(OSError, ValueError):  # a standard output that is no file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


class Progress:
    """Step, loss, tokens per second and time left of a run of so many steps; silent where not `enabled`.

    While its `bar` is entered, a terminal shows them live. Elsewhere there is a line every so many `seconds`; with 0,
    only one for each validation.
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
        self._training = self.bar.add_task("train", total=steps, loss="-", speed="-")

    def say(self, *lines: str) -> None:
        """Print lines above the bar."""
        for line in lines if self.enabled else ():
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def update(self, row: dict[str, Any]) -> None:
        """Show the metrics of a finished step; the time left is at the mean speed since the first step seen here."""
        step, loss, speed = row["step"], f"{row['loss']:.4f}", f"{row['tokens_per_second']:,.0f}"
        self.bar.update(self._training, completed=step, loss=loss, speed=speed)
        now = time.monotonic()
        self._first = self._first or (step, now)
        due = self.seconds and now - self._said >= self.seconds and not self.console.is_terminal
        if "eval_loss" in row or due:
            self._said = now
            validation = f"  validation {row['eval_loss']:.4f}" if "eval_loss" in row else ""
            (first, then), left = self._first, ""
            if step not in (first, self.steps):
                left = f"  left {timedelta(seconds=round((now - then) / (step - first) * (self.steps - step)))}"
            self.say(f"step {step:>6}  loss {loss}{validation}  {speed} tokens/s{left}")


def with_progress(
    documents: Iterable[str], say: Callable[[str], object], work: str, first: float = 10.0, every: float = 60.0
) -> Iterator[str]:
    """`documents`; after `first` seconds, and then every so many, a line says how far the `work` on them has come."""
    start = time.monotonic()
    due, characters = start + first, 0
    for count, text in enumerate(documents, 1):
        yield text
        characters += len(text)
        now = time.monotonic()
        if now >= due:
            due = now + every
            size = characters / 1e6
            say(f"{work}: {count:,} documents, {size:,.0f} MB of text, {size / (now - start):.1f} MB/s")
