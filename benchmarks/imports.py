"""What `import hf_ibnorm` adds to importing Transformers' Llama, in fresh processes, interleaved.

python benchmarks/imports.py [--repeats 9] [--output benchmarks/results/imports.csv]
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from results_file import report

STATEMENTS = {
    "transformers llama": "import transformers.models.llama.modeling_llama",
    "transformers llama, hf_ibnorm": "import transformers.models.llama.modeling_llama, hf_ibnorm",
}
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    """Seconds that `statement` takes in a fresh interpreter, whose own start is not counted."""
    done = subprocess.run([sys.executable, "-c", TIMED.format(statement)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time `import hf_ibnorm` on top of importing Transformers' Llama.")
    parser.add_argument("--repeats", type=int, default=9, help="processes of each kind (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="CSV file to write (default: none)")
    arguments = parser.parse_args()

    for statement in STATEMENTS.values():  # so that no file is read from disk for the first time below
        seconds(statement)
    times = [{name: seconds(statement) for name, statement in STATEMENTS.items()} for _ in range(arguments.repeats)]
    median = {name: statistics.median(each[name] for each in times) for name in STATEMENTS}
    stock, ours = median.values()
    figures = {
        "llama_seconds": f"{stock:.3f}",
        "with_hf_ibnorm_seconds": f"{ours:.3f}",
        "added_seconds": f"{ours - stock:.3f}",
    }
    report(figures, ("torch", "transformers", "hf_ibnorm"), arguments.repeats, arguments.output)


if __name__ == "__main__":
    main()
