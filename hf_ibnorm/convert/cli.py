"""The verbs `convert` and `convert_report` of the `hf-ibnorm` command."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.command import OneLineParser, quiet_libraries
from ..base.errors import UserError, bad_input
from ..base.layout import CONVERSION_REPORT
from .settings import DATA, DTYPES, INITS, SOURCE, TOKENS, Conversion

_OPTION = "norm_kwargs."


def _convert(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    idle: dict[str, str] = {}
    if arguments.init != "calibrate":
        idle = dict.fromkeys(("data", "calibration_tokens"), "without --init calibrate")
    if arguments.no_report:
        idle |= dict.fromkeys(("report_data", "report_tokens", "report_scores"), "with --no_report")
    for name, why in idle.items():
        if name in given:
            raise UserError(f"{name}: got {given[name]!r}, of no effect {why}")
    from .checkpoint import convert_checkpoint, lost_text
    from .cost import convert_and_report

    quiet_libraries()
    wanted = {name: value for name, value in given.items() if name in Conversion.__dataclass_fields__}
    wanted["norm_kwargs"] = {
        name.removeprefix(_OPTION): value for name, value in given.items() if name.startswith(_OPTION)
    }
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
        print(f"lost: {lost_text(record['lost'])}")
    if left := record["files_left"]:
        print(f"not copied: {', '.join(left[:10])}{f' and {len(left) - 10} more' if len(left) > 10 else ''}")
    if report is not None:
        _print_report(report, target / CONVERSION_REPORT)


def _measuring(arguments: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """The flags of `_add_measuring` that were given."""
    names = (f"{prefix}data", f"{prefix}tokens", f"{prefix}scores")
    return {name.removeprefix(prefix): value for name, value in vars(arguments).items() if name in names}


def _report(arguments: argparse.Namespace) -> None:
    stages: dict[str, str] = {}
    for word in arguments.stages:
        name, _, folder = word.partition("=")
        if not name or not folder or name in (*stages, SOURCE):
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


def _json_or_text(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


def add_verbs(verbs: Any, words: Sequence[str]) -> None:
    """Add both to the command's parser.

    Args:
        verbs: argparse's subparsers.
        words: the command line; each option of a norm in it becomes a flag of `convert`.
    """
    convert = verbs.add_parser(
        "convert",
        argument_default=argparse.SUPPRESS,
        help="a checkpoint on disk with other norms",
        description="Write the checkpoint SRC with other norms as DST, weights streaming from file to file, and report "
        f"the cost in DST/{CONVERSION_REPORT}. Options of the norm are flags --norm_kwargs.NAME VALUE, such as "
        "--norm_kwargs.lam 4.",
    )
    add = convert.add_argument
    add("source", metavar="SRC", help="model of Transformers: directory, name on the Hub, or .gguf file")
    add("target", metavar="DST", help="new directory")
    add("--norm", required=True, help="the new norm: a norm_type")
    add("--sites", action="append", metavar="GLOB", help="only there; may be given again (default: all)")
    add(
        "--init",
        choices=INITS,
        default="keep",
        help="keep: gains stay, and the new norm is at full strength; identity: options that make it the old norm, for "
        "lam to be ramped up in training; calibrate: gains and biases fitted to the old norm's outputs on some text "
        "(default: %(default)s)",
    )
    defaults = Conversion.data, Conversion.calibration_tokens
    _add_text(convert, "--data", "--calibration_tokens", "calibrate", "training", *defaults)
    add("--dtype", choices=DTYPES, help="of all weights (default: theirs)")
    add("--remote_code", action="store_true", help="put the model's code beside it (default: not)")
    add("--no_report", action="store_true", help="only convert: a report loads source and DST (default: report)")
    _add_measuring(convert, "report_")
    convert.set_defaults(go=_convert, remote_code=False, no_report=False)
    for flag in {word.partition("=")[0] for word in words if word.startswith(f"--{_OPTION}")}:
        add(flag, type=_json_or_text, help=argparse.SUPPRESS)
    report = verbs.add_parser(
        "convert_report",
        argument_default=argparse.SUPPRESS,
        help="the cost of a conversion, and how much of it healing won back",
        description="Measure models beside the model they were made of: bits per byte, KL, agreement, error and width "
        "of every norm's output, embedded scores; table and plot.",
    )
    add = report.add_argument
    add("source", metavar="SRC", help="the model before its conversion, as in convert")
    add("stages", nargs="+", metavar="NAME=DIR", help="models made of it, such as healed=runs/heal/final")
    add("--output", required=True, metavar="DIR", help="new directory for the report")
    _add_measuring(report, "")
    report.set_defaults(go=_report)


def _add_measuring(parser: OneLineParser, prefix: str) -> None:
    _add_text(parser, f"--{prefix}data", f"--{prefix}tokens", "measure", "test", DATA, TOKENS)
    parser.add_argument(
        f"--{prefix}scores",
        type=int,
        metavar="N",
        help="score N items of each embedded task; 0: none (default: 50, none without hf_ibnorm[eval])",
    )


def _add_text(
    parser: OneLineParser, data_flag: str, tokens_flag: str, use: str, split: str, data: str, tokens: int
) -> None:
    """The flags of a text and of its length; `data` and `tokens` are their defaults."""
    parser.add_argument(
        data_flag,
        metavar="FILE|CORPUS",
        help=f"text to {use} on: austen, sotu (their {split} splits) or a .txt, .jsonl or .parquet (default: {data})",
    )
    parser.add_argument(tokens_flag, type=int, help=f"how much of it, about (default: {tokens})")
