"""`python -m hf_ibnorm.report RUN... --output DIR`: finished runs side by side, one table and one plot."""

import shlex
import sys
from pathlib import Path
from typing import NoReturn

from ..base.command import OneLineParser, require_extra, run_command
from ..base.errors import bad_input
from .document import Document, machine
from .plots import plot_losses
from .runs import Run, comparison, fairness


def _main() -> None:
    parser = OneLineParser(
        prog="hf_ibnorm.report",
        description="Set finished training runs side by side: report.md and loss.png. "
        "Scores are read from RUN/scores, where `python -m eval run --output RUN/scores` puts them.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory of train_lm")
    parser.add_argument("--output", required=True, help="directory to write into; a report in it is replaced")
    arguments = parser.parse_args()
    require_extra("train", "matplotlib")
    output = Path(arguments.output)
    report, picture = output / "report.md", output / "loss.png"
    with bad_input():
        runs = [Run.read(Path(path)) for path in arguments.runs]
    table, lines = comparison(runs), fairness(runs)
    command = shlex.join(["python", "-m", "hf_ibnorm.report", *sys.argv[1:]])
    document = Document(made=[f"Made by `{command}` from runs on {machine(runs[0].environment)}."])
    document.table(table)
    document.bullets(lines)
    document.picture(picture, "loss")
    with bad_input(OSError, about="output: "):
        output.mkdir(parents=True, exist_ok=True)
        plot_losses(runs, picture)
        document.write(report)
    table.print()
    print("", *lines, f"Table and plot: {report}, {picture}", sep="\n")


def main() -> NoReturn:
    """Report on finished runs."""
    run_command(_main, lower="the number of runs")


if __name__ == "__main__":
    main()
