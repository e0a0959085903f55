"""The command `python -m eval` (installed as `hf-ibnorm-eval`)."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from hf_ibnorm.base.command import OneLineParser, add_verb, require_extra, run_command
from hf_ibnorm.base.errors import Stopped, UserError
from hf_ibnorm.base.signals import StopSignals

from .options import add_settings
from .study.cli import add_study_verbs
from .suites import SUITES, choose, suites_table


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags of `run` and `doctor` as fields of `Settings`."""
    return {name: value for name, value in vars(arguments).items() if name not in ("go", "model", "output")}


def _run(arguments: argparse.Namespace) -> None:
    from .runner import run

    place = f"benchmarks that ended are in {arguments.output}, the same command goes on from there"
    with StopSignals(lambda number: Stopped(f"{number.name}; {place}")) as signals:
        run(arguments.model, output=arguments.output, check_stop=signals.check, **_settings(arguments))


def _doctor(arguments: argparse.Namespace) -> None:
    from .doctor import failures, outcome
    from .runner import diagnose

    checks = diagnose(arguments.model, **_settings(arguments))
    for check in checks:
        print(outcome(check, arguments.ignore))
    if failed := [check.name for check in failures(checks, arguments.ignore)]:
        raise UserError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(dict.fromkeys(failed))}")


def _score(arguments: argparse.Namespace) -> None:
    from .store import merge, write_scores

    if len(arguments.runs) == 1:
        write_scores(arguments.runs[0], arguments.output)
    elif arguments.output:
        merge(arguments.runs, arguments.output)
        write_scores(arguments.output)
    else:
        raise UserError("output: name a new directory for the shards of a run together")


def _compare(arguments: argparse.Namespace) -> None:
    from .compare import write_comparison

    write_comparison(arguments.runs, arguments.output)


def _suites(_: argparse.Namespace) -> None:
    for name in SUITES:
        print(f"{name}\n")
        suites_table(name).print()
        print()


def _mirror(arguments: argparse.Namespace) -> None:
    from .mirror import carry_out

    benchmarks = [benchmark for name in arguments.suite.split(",") for benchmark in choose(name)]
    carry_out(arguments.step, arguments.mirror, benchmarks)


def _main() -> None:
    parser = OneLineParser(prog="eval", description="Score causal language models of Transformers, and compare them.")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=OneLineParser)

    verb = partial(add_verb, verbs)
    run = verb("run", _run, "score one model on a suite; a run that was stopped goes on")
    add_settings(run)
    run.add_argument("--output", required=True, help="new directory for scores and answers, or that of a stopped run")

    add_settings(verb("doctor", _doctor, "look for what would spoil a run, without running it"))

    score = verb("score", _score, "scores from the answers on disk; of several shards of a run together")
    score.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output directory of `run`")
    score.add_argument("--output", type=Path, help="directory for the scores (default: the run's own); new for shards")

    compare = verb("compare", _compare, "whether models differ from the first, item by item")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output directories of `run`, two or more")
    compare.add_argument("--output", type=Path, required=True, help="folder for the comparison; one in it is replaced")

    mirror = verb("mirror", _mirror, "a local copy of the benchmarks' data sets")
    mirror.add_argument("step", choices=("plan", "fetch", "check"), help="list sets and sizes, download, verify")
    mirror.add_argument("--mirror", type=Path, help="folder of the mirror (plan needs none)")
    mirror.add_argument("--suite", default="v1,v2", help="suites or tasks, divided by commas (default: v1,v2)")

    verb("suites", _suites, "what each suite consists of")

    add_study_verbs(verb("study", None, "whether norms differ: many trainings, paired over seeds, with a verdict"))
    arguments = parser.parse_args()
    require_extra("eval", "lm_eval", "datasets", "scipy", "matplotlib")
    arguments.go(arguments)


def main() -> NoReturn:
    """Score models: `run --model DIR --suite embedded --output DIR`."""
    run_command(_main, lower="--batch_size")


if __name__ == "__main__":
    main()
