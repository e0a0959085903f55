"""`python -m train_lm.plot RUN... --output FILE.png`: runs in one picture, while they run or afterwards."""

from pathlib import Path
from typing import NoReturn

from hf_ibnorm.base.command import OneLineParser, require_extra, run_command
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.report.plots import plot_runs
from hf_ibnorm.report.runs import Run


def _main() -> None:
    parser = OneLineParser(
        prog="train_lm.plot",
        description="Draw losses, gradient norm, movement of the gains and speed of several runs in one picture.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory of train_lm, finished or not")
    parser.add_argument("--output", default="runs.png", help="PNG file to write (default: %(default)s)")
    arguments = parser.parse_args()
    require_extra("train", "matplotlib")
    output = Path(arguments.output)
    if output.suffix.lower() != ".png":
        raise UserError(f"output: got {arguments.output!r}, must end in .png")
    with bad_input():
        runs = [Run.read(Path(path), finished=False) for path in arguments.runs]
    with bad_input(OSError, about="output: "):
        output.parent.mkdir(parents=True, exist_ok=True)
        plot_runs(runs, output)
    print(output)


def main() -> NoReturn:
    """Draw several runs in one picture."""
    run_command(_main, lower="the number of runs")


if __name__ == "__main__":
    main()
