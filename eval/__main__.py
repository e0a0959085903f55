"""The command `python -m eval` (installed as `hf-ibnorm-eval`)."""

import argparse
from typing import NoReturn

from hf_ibnorm.cli import OneLineParser, require_extra, run_command

from .suites import SUITES


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be a whole number >= 1")
    return value


def _run(arguments: argparse.Namespace) -> None:
    require_extra("eval", "lm_eval", "datasets")
    from .runner import run

    run(
        arguments.model,
        arguments.suite,
        arguments.output,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        device=arguments.device,
        dtype=arguments.dtype,
    )


def _main() -> None:
    parser = OneLineParser(prog="eval", description="Score a causal language model of Transformers.")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=OneLineParser)
    run = verbs.add_parser("run", help="score one model on a suite")
    run.add_argument(
        "--model", required=True, help="directory of a checkpoint with its tokenizer, or of a training run"
    )
    run.add_argument("--suite", required=True, help=f"one of: {', '.join(SUITES)}")
    run.add_argument("--output", required=True, help="new directory for scores.json, scores.md and environment.json")
    run.add_argument("--limit", type=_positive, help="only the first N items a benchmark, a smoke test (default: all)")
    run.add_argument("--batch_size", type=_positive, default=8, help="sequences at a time (default: 8)")
    run.add_argument("--device", help="device of torch (default: cuda if there is one, else cpu)")
    run.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the weights (default: auto, the checkpoint's)",
    )
    run.set_defaults(run=_run)
    arguments = parser.parse_args()
    arguments.run(arguments)


def main() -> NoReturn:
    """Score models: `run --model DIR --suite embedded --output DIR`."""
    run_command(_main)


if __name__ == "__main__":
    main()
