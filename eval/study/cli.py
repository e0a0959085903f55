"""The verbs of `python -m eval study`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ibnorm.base.command import OneLineParser, add_verb
from hf_ibnorm.base.errors import Stopped, UserError
from hf_ibnorm.base.layout import CELL_RUN
from hf_ibnorm.base.signals import StopSignals

from ..options import positive
from . import shipped_studies

if TYPE_CHECKING:
    from .folder import Folder


def _begin(arguments: argparse.Namespace, command: Sequence[str]) -> "Folder":
    """The directory of the study that a command names; its file is read before anything slow is imported."""
    from .plan import read_study

    study = read_study(arguments.study)
    from .folder import Folder

    return Folder.begin(study, Path(arguments.output or Path("studies", study.name)), command)


def _run(arguments: argparse.Namespace) -> None:
    folder = _begin(arguments, ["python", "-m", "eval", *sys.argv[1:]])
    from .jobs import LocalExecutor, RayExecutor
    from .run import run_study
    from .writing import write_report

    address, gpus = arguments.ray, folder.study.gpus
    here = partial(LocalExecutor, arguments.jobs, gpus)
    start = here if address is None else partial(RayExecutor, address, folder.study.threads, gpus)
    try:
        # The signals come last, for Ray sets a handler of its own when it starts.
        with folder.lock(), closing(start()) as executor, _first_signal_only():
            failures = run_study(folder, executor, partial(print, flush=True))
    except Stopped:
        ended, total = folder.counts()
        raise Stopped(f"{ended} of {total} trainings have ended; the same command goes on from there") from None
    failed = f"{len(failures)} failed and are missing from the report; {failures[0]}" if failures else ""
    try:
        write_report(folder, folder.path / "report")
    except UserError as error:
        raise UserError(failed or str(error)) from error
    if failed:
        raise UserError(failed)


def _first_signal_only() -> StopSignals:
    """A signal raises `Stopped`, once: a second signal must not disturb the trainings that end in order."""
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
    for cell, job in folder.to_do().items():
        words = ["python", "-m", "eval", "study", "cell", str(folder.path.absolute()), cell]
        print(f"cd {shlex.quote(str(job.directory))} && {shlex.join(words)}")
    for search in folder.study.searches:
        if folder.winner(search.name) is None:
            print(f"# {search.name}: a search is made by `study run` alone")


def _cell(arguments: argparse.Namespace) -> None:
    from .folder import Folder
    from .jobs import work
    from .run import result_line

    folder = Folder.open(Path(arguments.study))
    job = folder.to_do().get(arguments.cell)
    if job is None:
        if not (folder.path / arguments.cell / CELL_RUN).is_dir():
            raise UserError(f"cell: got {arguments.cell!r}, must be one of those that `study commands` prints")
        print("nothing is left to be done")
        return
    with _first_signal_only():
        ending = work(job)
    line = result_line(folder, job, ending)
    if line.startswith("failed"):
        raise UserError(f"{job.name}: {line}")
    print(f"{job.name}: {line}")


def add_study_verbs(parser: argparse.ArgumentParser) -> None:
    """Add the verbs to the parser of `study`."""
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=OneLineParser)
    verb = partial(add_verb, verbs)
    run = verb("run", _run, "carry out a study; one that was stopped goes on, what is finished is never repeated")
    commands = verb("commands", _commands, "print what can be run now, a line a training, for another scheduler")
    cell = verb("cell", _cell, "carry out one training of a study and its scores: what `commands` prints")
    status = verb("status", _status, "how far a study is")
    report = verb("report", _report, "write the report on what has ended")
    about = f"a study's YAML file, or a shipped study: {', '.join(shipped_studies())}"
    for of_file in (run, commands):
        of_file.add_argument("study", metavar="STUDY", help=about)
        of_file.add_argument("--output", help="directory of the study (default: studies/NAME)")
    for of_directory in (cell, status, report):
        of_directory.add_argument("study", metavar="DIR", help="directory of the study")
    run.add_argument("--jobs", type=positive, default=1, help="trainings at once on this machine (default: 1)")
    run.add_argument(
        "--ray", metavar="ADDRESS", help="on a Ray cluster: its address, or auto, or local (default: on this machine)"
    )
    cell.add_argument("cell", metavar="CELL", help="folder of the training in it")
    report.add_argument("--output", help="directory for the report; one in it is replaced (default: DIR/report)")
