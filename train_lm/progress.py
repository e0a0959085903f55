"""What one sees while a run trains: a live bar on a terminal, a line a validation elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Step, loss, tokens per second and time left of one run; silent unless `enabled`."""

    def __init__(self, steps: int, enabled: bool) -> None:
        self.enabled = enabled
        self.console = Console()
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
        if "eval_loss" in row:
            self.say(f"step {row['step']:>6}  loss {loss}  validation {row['eval_loss']:.4f}  {speed} tokens/s")


def silent(text: str) -> None:
    """Say nothing."""


class Told:
    """Says now and then how far something is that reads text.

    Args:
        say: is told, in a line.
        what: what is being done.
        first: seconds until there is a word.
        every: seconds from then to the next.
    """

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
