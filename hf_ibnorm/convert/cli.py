"""The verbs `convert` and `convert_report` of the `hf-ibnorm` command."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.command import OneLineParser, quiet_libraries
from ..base.errors import UserError, bad_input
from .settings import DATA, DTYPES, INITS, NAME, SOURCE, TOKENS, Conversion

_OPTION = "--norm_kwargs."


def _convert(arguments: argparse.Namespace) -> None:
    _check_flags(arguments)
    from .checkpoint import convert_checkpoint, lost_text
    from .cost import convert_and_report

    quiet_libraries()
    names = Conversion.__dataclass_fields__
    wanted = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    target, report = Path(arguments.target), None
    with bad_input(), bad_input(RuntimeError):
        if arguments.no_report:
            record = convert_checkpoint(arguments.source, target, **wanted)
        else:
            measuring = _measuring(arguments, "report_")
            record, report = convert_and_report(arguments.source, target, Conversion(**wanted), **measuring)
    norm = record["norm"]
    where = f" at {', '.join(norm['sites'])}" if norm["sites"] else ""
    print(f"{target}: {record['architecture']} with {norm['type']} {json.dumps(norm['kwargs'])}{where}")
    if record["lost"]:
        print(f"lost: {lost_text(record)}")
    if left := record["files_left"]:
        print(f"not copied: {', '.join(left[:10])}{f' and {len(left) - 10} more' if len(left) > 10 else ''}")
    if report is not None:
        _print_report(report, target / NAME)


def _check_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that would do nothing."""
    for name in ("data", "calibration_tokens"):
        if arguments.init != "calibrate" and getattr(arguments, name) is not None:
            raise UserError(f"{name}: got {getattr(arguments, name)!r}, of no effect without --init calibrate")
    for name in ("report_data", "report_tokens", "report_scores"):
        if arguments.no_report and getattr(arguments, name) is not None:
            raise UserError(f"{name}: got {getattr(arguments, name)!r}, of no effect with --no_report")


def _measuring(arguments: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """On what a report is to be measured, as far as it was said."""
    found = {name: getattr(arguments, f"{prefix}{name}") for name in ("data", "tokens", "scores")}
    return {name: value for name, value in found.items() if value is not None}


def _report(arguments: argparse.Namespace) -> None:
    stages: dict[str, str] = {}
    for word in arguments.stages:
        name, equals, folder = word.partition("=")
        if not equals or not name or not folder or name in (*stages, SOURCE):
            raise UserError(f"stages: got {word!r}, must be NAME=DIR, each name once, none of them {SOURCE}")
        stages[name] = folder
    from .cost import report_conversion

    quiet_libraries()
    with bad_input(), bad_input(RuntimeError):
        report = report_conversion(arguments.source, stages, arguments.output, **_measuring(arguments, ""))
    _print_report(report, Path(arguments.output))


def _print_report(report: dict[str, Any], folder: Path) -> None:
    from .cost import stage_table

    stage_table(report).print()
    print(f"report: {folder / 'report.md'}")


class _NormOption(argparse.Action):
    """`--norm_kwargs.NAME VALUE`: puts VALUE, as JSON or else as text, under NAME into the mapping `norm_kwargs`."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        try:
            value = json.loads(values)
        except ValueError:
            value = values
        name = self.option_strings[0].removeprefix(_OPTION)
        namespace.norm_kwargs = {**namespace.norm_kwargs, name: value}


def add_verbs(verbs: Any, words: Sequence[str]) -> None:
    """Add both to the command's parser.

    Args:
        verbs: argparse's subparsers.
        words: the command line; each option of a norm that it names becomes a flag of `convert`.
    """
    convert = verbs.add_parser(
        "convert",
        help="a checkpoint on disk with other norms",
        description="Write the checkpoint SRC with other norms as DST, weights streaming from file to file, and report "
        f"what that cost in DST/{NAME}. Options of the norm are flags --norm_kwargs.NAME VALUE, such as "
        "--norm_kwargs.lam 4.",
    )
    convert.add_argument("source", metavar="SRC", help="Llama or GPT-2: directory, name on the Hub, or .gguf file")
    convert.add_argument("target", metavar="DST", help="new directory")
    convert.add_argument("--norm", required=True, help="norm that it gets: a norm_type")
    convert.add_argument(
        "--sites", action="append", metavar="GLOB", help="only there; may be given again (default: all)"
    )
    convert.add_argument(
        "--init",
        choices=INITS,
        default="keep",
        help="keep: gains stay and the norm does what it does at once; identity: options that make it the old norm, "
        "for lam to be ramped up in training; calibrate: gains and biases fitted to what the old norm gives on "
        "some text (default: %(default)s)",
    )
    convert.add_argument(
        "--data",
        metavar="FILE|CORPUS",
        help="text to calibrate on: austen, sotu (their training splits) or a .txt, .jsonl or .parquet "
        f"(default: {Conversion.data})",
    )
    convert.add_argument(
        "--calibration_tokens", type=int, help=f"how much of it, about (default: {Conversion.calibration_tokens})"
    )
    convert.add_argument("--dtype", choices=DTYPES, help="of all weights (default: what they have)")
    convert.add_argument("--remote_code", action="store_true", help="put the model's code beside it (default: not)")
    convert.add_argument(
        "--no_report", action="store_true", help="only convert: a report loads source and DST (default: report)"
    )
    _add_measuring(convert, "report_")
    convert.set_defaults(run=_convert, norm_kwargs={})
    for flag in {word.partition("=")[0] for word in words if word.startswith(_OPTION)}:
        convert.add_argument(flag, action=_NormOption, default={}, dest="norm_kwargs", help=argparse.SUPPRESS)
    report = verbs.add_parser(
        "convert_report",
        help="what a conversion cost, and what healing won back",
        description="Measure models beside the one they were made of: bits per byte, KL, agreement, error and width of "
        "every norm's output, embedded scores; table and plot.",
    )
    report.add_argument("source", metavar="SRC", help="the model before its conversion, as in convert")
    report.add_argument(
        "stages", nargs="+", metavar="NAME=DIR", help="models made of it, such as healed=runs/heal/final"
    )
    report.add_argument("--output", required=True, metavar="DIR", help="new directory for the report")
    _add_measuring(report, "")
    report.set_defaults(run=_report)


def _add_measuring(parser: OneLineParser, prefix: str) -> None:
    """The flags that say on what a report is measured."""
    parser.add_argument(
        f"--{prefix}data",
        metavar="FILE|CORPUS",
        help=f"text to measure on: austen, sotu (their test splits) or a .txt, .jsonl or .parquet (default: {DATA})",
    )
    parser.add_argument(f"--{prefix}tokens", type=int, help=f"how much of it, about (default: {TOKENS})")
    parser.add_argument(
        f"--{prefix}scores",
        type=int,
        metavar="N",
        help="score N items of each embedded task; 0: none (default: 50, none without hf_ibnorm[eval])",
    )
