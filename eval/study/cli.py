"""The verbs of `python -m eval study`."""

import argparse
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_ibnorm.cli import OneLineParser, Stopped, UserError

from .plan import shipped_studies


def _run(arguments: argparse.Namespace) -> None:
    from .folder import Folder
    from .plan import read_study
    from .report import write_report
    from .run import executor_for, run_study, stopped_in_order

    study = read_study(arguments.study)
    folder = Folder.begin(study, Path(arguments.output or Path("studies", study.name)))

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
    write_report(folder, folder.path / "report")
    if failures:
        raise UserError(f"{len(failures)} trainings failed and are missing from the report; {failures[0]}")


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
    from .report import write_report

    folder = Folder.open(Path(arguments.study))
    write_report(folder, Path(arguments.output or folder.path / "report"))


def _commands(arguments: argparse.Namespace) -> None:
    from .folder import Folder
    from .plan import read_study

    study = read_study(arguments.study)
    folder = Folder.begin(study, Path(arguments.output or Path("studies", study.name)))
    for job in folder.to_do():
        steps = [shlex.join(command.words) for command in job.commands if not command.done.exists()]
        print(" && ".join(f"{' '.join(f'{k}={v}' for k, v in job.environment.items())} {step}" for step in steps))


def add_study_verbs(parser: argparse.ArgumentParser) -> None:
    """Add `run`, `status`, `report` and `commands` to the parser of `study`."""
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
    status = verb("status", _status, "how far a study is")
    status.add_argument("study", metavar="DIR", help="directory of the study")
    report = verb("report", _report, "write the report on what has ended")
    report.add_argument("study", metavar="DIR", help="directory of the study")
    report.add_argument("--output", help="directory for the report; one in it is replaced (default: DIR/report)")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a whole number >= 1")
    return value
