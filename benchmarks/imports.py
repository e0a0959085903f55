"""How long commands take to answer, and imports to end: whole processes, interleaved, each beside `import torch`.

python benchmarks/imports.py [--repeats 5] [--output benchmarks/results/imports.csv]

`times_torch` is the median over rounds of a process's time divided by that of `python -c "import torch"` in the same
round; so is `times_configs`, beside the configs of Transformers that this package's stand for.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from results_file import write_rows

TORCH = "import torch"
CONFIGS = "from transformers import AutoConfig, LlamaConfig, GPT2Config"
STATEMENTS = (
    TORCH,
    CONFIGS,
    "import hf_ibnorm",
    "from hf_ibnorm import IBNorm",
    "from transformers import LlamaForCausalLM",
    "from hf_ibnorm import IBNormLlamaForCausalLM",
)
COMMANDS = {  # arguments of `python -m` → exit code
    "hf_ibnorm.cli --help": 0,
    "train_lm --help": 0,
    "eval --help": 0,
    "hf_ibnorm.cli enw": 2,
    "train_lm --max_step 3": 2,
    "eval run --limt 3": 2,
    "train_lm --config dmeo": 2,
    "hf_ibnorm.report --help": 0,
    "train_lm.plan --help": 0,
    "train_lm.plot --help": 0,
    "train_lm.push --help": 0,
    "hf_ibnorm.cli env": 0,
}
STEP = "train_lm --config tiny --max_steps 1 --warmup_steps 0"
SCORE = "eval run --suite embedded --skip austen_test --limit 1"


def seconds(words: list[str], code: int = 0) -> float:
    """Seconds that a process takes, from its start to its end.

    Raises:
        RuntimeError: it ends with another exit code than `code`.
    """
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr[-500:]}")
    return taken


def once(run: int, folder: Path) -> dict[str, float]:
    """One round: what is timed → seconds."""
    found = {statement: seconds(["-c", statement]) for statement in STATEMENTS}
    found |= {command: seconds(["-m", *command.split()], code) for command, code in COMMANDS.items()}
    trained = str(folder / f"run{run}")
    found[STEP] = seconds(["-m", *STEP.split(), "--run_dir", trained])
    found[SCORE] = seconds(["-m", *SCORE.split(), "--model", trained, "--output", str(folder / f"scores{run}")])
    return found


def rows(repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each command and statement; the first round fills caches, and is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_IBNORM_CACHE"] = str(Path(folder) / "cache")
        rounds = [once(run, Path(folder)) for run in range(repeats + 1)][1:]
    for what in rounds[0]:
        yield {
            "what": what,
            "seconds": f"{median(each[what] for each in rounds):.2f}",
            "times_torch": f"{median(each[what] / each[TORCH] for each in rounds):.2f}",
            "times_configs": f"{median(each[what] / each[CONFIGS] for each in rounds):.2f}",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time what is imported before anything happens.")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="CSV file to write (default: none)")
    arguments = parser.parse_args()
    packages = ("torch", "transformers", "hf_ibnorm")
    write_rows(rows(arguments.repeats), packages, arguments.repeats, arguments.output, "cpu")


if __name__ == "__main__":
    main()
