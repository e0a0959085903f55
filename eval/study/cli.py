"""The verbs of `python -m eval study`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ibnorm.base.command import OneLineParser, add_verb
from hf_ibnorm.base.errors import Stopped, UserError
from hf_ibnorm.base.layout import CELL_RUN
from hf_ibnorm.base.signals import StopSignals

from ..options import positive
from .plan import shipped_studies

if TYPE_CHECKING:
    from .folder import Folder


def _begin(arguments: argparse.Namespace, command: Sequence[str]) -> "Folder":
    """The directory of the study that a command names; its file is read before anything slow is imported."""
    from .file import read_study

    study = read_study(arguments.study)
    from .folder import Folder

    return Folder.begin(study, Path(arguments.output or Path("studies", study.name)), command)


def _run(arguments: argparse.Namespace) -> None:
    folder = _begin(arguments, ["python", "-m", "eval", *sys.argv[1:]])
    study = folder.study
    from .jobs import executor_for
    from .run import run_study, stopped_in_order
    from .writing import write_report

    try:
        with (
            folder.lock(),
            executor_for(arguments.jobs, arguments.ray, study.threads, study.gpus) as executor,
            _first_signal_only(),  # last: Ray sets a handler of its own when it starts
        ):
            failures = run_study(folder, executor, partial(print, flush=True))
    except Stopped:
        raise stopped_in_order(folder) from None
    failed = f"{len(failures)} failed and are missing from the report; {failures[0]}" if failures else ""
    try:
        write_report(folder, folder.path / "report")
    except UserError as error:
        raise UserError(failed or str(error)) from error
    if failed:
        raise UserError(failed)


def _first_signal_only() -> StopSignals:
    """A signal raises `Stopped`, once: a second one must not disturb what ends the trainings in order."""
    return StopSignals(lambda number: Stopped(number.name), insist=False)


def _status(arguments: argparse.Namespace) -> None:
    from .folder import Folder
    from .status import print_status

    print_status(Folder.open(Path(arguments.study)))


def _report(arguments: argparse.Namespace) -> None:
    from .folder import Folder
    from .writing import write_report

    folder = Folder.open(Path(arguments.study))
    write_report(folder, Path(arguments.output or folder.path / "report"))


def _commands(arguments: argparse.Namespace) -> None:
    folder = _begin(arguments, [])
    place = folder.path.absolute()
    for job in folder.to_do():
        words = ["python", "-m", "eval", "study", "cell", str(place), str(job.folder.relative_to(place))]
        print(f"cd {shlex.quote(str(job.directory))} && {shlex.join(words)}")
    for search in folder.study.searches:
        if folder.winner(search.name) is None:
            print(f"# {search.name}: a search is made by `study run` alone")


def _cell(arguments: argparse.Namespace) -> None:
    from .folder import Folder
    from .jobs import work
    from .run import result_line

    folder = Folder.open(Path(arguments.study))
    jobs = {str(job.folder.relative_to(folder.path.absolute())): job for job in folder.to_do()}
    if arguments.cell not in jobs:
        if not (folder.path / arguments.cell / CELL_RUN).is_dir():
            raise UserError(f"cell: got {arguments.cell!r}, must be one of those that `study commands` prints")
        print("nothing is left to be done")
        return
    job = jobs[arguments.cell]
    with _first_signal_only():
        ending = work(job)
    line = result_line(folder, job, ending)
    if line.startswith("failed"):
        raise UserError(f"{job.name}: {line}")
    print(f"{job.name}: {line}")


def add_study_verbs(parser: argparse.ArgumentParser) -> None:
    """Add the verbs to the parser of `study`."""
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=OneLineParser)
    shipped = ", ".join(shipped_studies())

    verb = partial(add_verb, verbs)

    def of_file(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("study", metavar="STUDY", help=f"a study's YAML file, or a shipped study: {shipped}")
        parser.add_argument("--output", help="directory of the study (default: studies/NAME)")

    run = verb("run", _run, "carry out a study; one that was stopped goes on, what is finished is never repeated")
    of_file(run)
    run.add_argument("--jobs", type=positive, default=1, help="trainings at once on this machine (default: 1)")
    run.add_argument(
        "--ray", metavar="ADDRESS", help="on a Ray cluster: its address, or auto, or local (default: on this machine)"
    )
    of_file(verb("commands", _commands, "print what can be run now, a line a training, for another scheduler"))
    cell = verb("cell", _cell, "carry out one training of a study and its scores: what `commands` prints")
    cell.add_argument("study", metavar="DIR", help="directory of the study")
    cell.add_argument("cell", metavar="CELL", help="folder of the training in it")
    status = verb("status", _status, "how far a study is")
    status.add_argument("study", metavar="DIR", help="directory of the study")
    report = verb("report", _report, "write the report on what has ended")
    report.add_argument("study", metavar="DIR", help="directory of the study")
    report.add_argument("--output", help="directory for the report; one in it is replaced (default: DIR/report)")
