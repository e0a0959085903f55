"""What `watch_norms` costs: steps of the recipe `demo` that are watched beside the steps before them, which are not.

python benchmarks/watching.py [--rounds N] [--output FILE.csv]

Every second step of a training is watched; its logging and the line in norms.jsonl are part of it. A run that looks
every 50 steps takes longer by (watched - plain) / (50 · plain).
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from results_file import write_rows

NORMS = ("rmsnorm", "ibnorm_l", "layernormalnorm")
EVERY = 50
SKIPPED = 4
"""First steps, which allocate memory and warm caches up."""


def step_ends(recipe: str, norm: str, pairs: int, folder: Path) -> list[float]:
    """Moments at which steps of one training end, logging included."""
    from accelerate import Accelerator

    from train_lm.config import read_command_line
    from train_lm.train import train

    ends, log = [], Accelerator.log

    def noting(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        log(self, *args, **kwargs)
        ends.append(time.perf_counter())

    flags = ["--config", recipe, "--run_dir", str(folder / "run"), "--model.norm_type", norm, "--watch_norms", "2"]
    flags += ["--max_steps", str(SKIPPED + 2 * pairs + 1), "--warmup_steps", "2", "--checkpoint_every", "0"]
    Accelerator.log = noting  # type: ignore[method-assign]
    try:
        with redirect_stdout(io.StringIO()):
            train(read_command_line([*flags, "--max_eval_blocks", "1", "--eval_every", "1000"]))
    finally:
        Accelerator.log = log  # type: ignore[method-assign]
    return ends


def overheads(rounds: int, pairs: int = 8, recipe: str = "demo", norms: tuple[str, ...] = NORMS) -> Iterator[Any]:
    """A row of figures for each norm, from `rounds` trainings of each in turns; the least and most are of trainings."""
    plain: dict[str, list[float]] = {norm: [] for norm in norms}
    watched: dict[str, list[float]] = {norm: [] for norm in norms}
    for _ in range(rounds):
        for norm in norms:
            with tempfile.TemporaryDirectory() as folder:
                ends = step_ends(recipe, norm, pairs, Path(folder))
            # From step SKIPPED + 1 on, by turns plain and watched; without the last one, which validates.
            seconds = [b - a for a, b in zip(ends[SKIPPED - 1 : -2], ends[SKIPPED:-1], strict=True)]
            plain[norm].append(statistics.median(seconds[::2]))
            watched[norm].append(statistics.median(seconds[1::2]))
    for norm in norms:
        ratios = [b / a for a, b in zip(plain[norm], watched[norm], strict=True)]
        costs = [(ratio - 1) / EVERY for ratio in ratios]
        yield {
            "norm": norm,
            "plain_seconds": f"{statistics.median(plain[norm]):.4f}",
            "watched_seconds": f"{statistics.median(watched[norm]):.4f}",
            "watched_to_plain": f"{statistics.median(ratios):.3f}",
            f"overhead_at_{EVERY}": f"{statistics.median(costs):.4f}",
            "overhead_least": f"{min(costs):.4f}",
            "overhead_most": f"{max(costs):.4f}",
        }


def main() -> None:
    from hf_ibnorm.base.command import quiet_libraries

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="trainings with each norm (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="CSV file to write (default: none)")
    arguments = parser.parse_args()
    quiet_libraries()
    packages = ("torch", "transformers", "accelerate", "hf_ibnorm")
    write_rows(overheads(arguments.rounds), packages, arguments.rounds, arguments.output, "cpu")


if __name__ == "__main__":
    main()
