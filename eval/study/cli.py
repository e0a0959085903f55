"""The verbs of `python -m eval study`."""

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_ibnorm.base.command import OneLineParser
from hf_ibnorm.base.errors import Stopped, UserError

from ..options import positive
from .plan import shipped_studies


def _run(arguments: argparse.Namespace) -> None:
    from .folder import Folder
    from .jobs import executor_for
    from .plan import read_study
    from .run import run_study, stopped_in_order
    from .writing import write_report

    study = read_study(arguments.study)
    output = Path(arguments.output or Path("studies", study.name))
    folder = Folder.begin(study, output, ["python", "-m", "eval", *sys.argv[1:]])

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        with (
            folder.lock(),
            executor_for(arguments.jobs, arguments.ray, study.threads, study.gpus) as executor,
            _stop_by_signal(),  # last: Ray sets a handler of its own when it starts
        ):
            failures = run_study(folder, executor, say)
    except Stopped:
        raise stopped_in_order(folder) from None
    failed = f"{len(failures)} failed and are missing from the report; {failures[0]}" if failures else ""
    try:
        write_report(folder, folder.path / "report")
    except UserError as error:
        raise UserError(failed or str(error)) from error
    if failed:
        raise UserError(failed)


@contextmanager
def _stop_by_signal() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Stopped`, once; what ends the trainings in order is not disturbed by a second one."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(_: int, __: Any) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise Stopped("")

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is stop:
            for number, handler in before.items():
                signal.signal(number, handler)


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
    from .folder import Folder
    from .plan import read_study

    study = read_study(arguments.study)
    folder = Folder.begin(study, Path(arguments.output or Path("studies", study.name)), [])
    place = folder.path.absolute()
    for job in folder.to_do():
        words = ["python", "-m", "eval", "study", "cell", str(place), str(job.folder.relative_to(place))]
        print(f"cd {shlex.quote(str(job.directory))} && {shlex.join(words)}")
    for search in study.searches:
        if folder.winner(search.name) is None:
            print(f"# {search.name}: a search is made by `study run` alone")


def _cell(arguments: argparse.Namespace) -> None:
    from .folder import Folder
    from .jobs import work
    from .run import told_of

    folder = Folder.open(Path(arguments.study))
    jobs = {str(job.folder.relative_to(folder.path.absolute())): job for job in folder.to_do()}
    if arguments.cell not in jobs:
        if not (folder.path / arguments.cell / "run").is_dir():
            raise UserError(f"cell: got {arguments.cell!r}, must be one of those that `study commands` prints")
        print("nothing is left to be done")
        return
    job = jobs[arguments.cell]
    with _stop_by_signal():
        ending = work(job)
    line = told_of(folder, job, ending)
    if line.startswith("failed"):
        raise UserError(f"{job.name}: {line}")
    print(f"{job.name}: {line}")


def add_study_verbs(parser: argparse.ArgumentParser) -> None:
    """Add the verbs to the parser of `study`."""
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=OneLineParser)
    shipped = ", ".join(shipped_studies())

    def verb(name: str, go: Any, about: str) -> argparse.ArgumentParser:
        found = verbs.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        found.set_defaults(go=go)
        return found

    def of_file(found: argparse.ArgumentParser) -> None:
        found.add_argument("study", metavar="STUDY", help=f"a study's YAML file, or a shipped study: {shipped}")
        found.add_argument("--output", help="directory of the study (default: studies/NAME)")

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
