"""The `hf-ibnorm` command and its verbs."""

import argparse
import json
import sys
import time
from typing import NoReturn

from .base.command import OneLineParser, run_command
from .base.errors import bad_input
from .base.signals import StopSignals
from .version import __version__


def _env(arguments: argparse.Namespace) -> None:
    from .report.environment import environment_record

    record = environment_record()
    if arguments.json:
        print(json.dumps(record, indent=2))
        return
    record.update({f"{name} version": version for name, version in record.pop("versions").items()})
    record.update({f"norm backend on {kind}": text for kind, text in record.pop("norm_backend").items()})
    record["command"] = " ".join(record["command"])
    for key, value in record.items():
        print(f"{key.replace('_', ' ') if 'version' not in key else key}: {'none' if value is None else value}")


def _build_kernels(arguments: argparse.Namespace) -> None:
    from .kernels.cpu.build import BuildError, build, folder

    start = time.perf_counter()
    with bad_input(BuildError), bad_input(OSError, about=f"{folder()} cannot be used: "):
        path, made = build(arguments.force)
    print(f"built {path} in {time.perf_counter() - start:.0f} s" if made else f"{path} is there already")


def _main() -> None:
    from .analysis.cli import add_verb
    from .convert.cli import add_verbs
    from .swap.cli import add_verb as add_sites

    parser = OneLineParser(prog="hf-ibnorm", description="IBNorm and normality normalization for Transformers.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=OneLineParser)
    env = verbs.add_parser("env", help="versions, device, backends, git revision: what a bug report needs")
    env.add_argument("--json", action="store_true", help="print JSON (default: a line each)")
    env.set_defaults(go=_env)
    build = verbs.add_parser(
        "build_kernels",
        help="compile the CPU's fused norms (needs a C++ compiler: $CXX, c++, g++ or clang++)",
        description="Compile the CPU's fused norms for this torch and processor into $HF_IBNORM_KERNELS, or else "
        "hf_ibnorm/kernels in the user's cache directory. A GPU's are compiled by Triton when they are first used.",
    )
    build.add_argument("--force", action="store_true", help="compile even where they are built (default: not)")
    build.set_defaults(go=_build_kernels)
    add_verbs(verbs, sys.argv)
    add_verb(verbs)
    add_sites(verbs)
    arguments = parser.parse_args()
    with StopSignals(lambda number: SystemExit(128 + number)):  # so that what is half written is removed
        arguments.go(arguments)


def main() -> NoReturn:
    """The `hf-ibnorm` command."""
    run_command(_main, lower="--tokens, --samples, --calibration_tokens, or use a smaller model")


if __name__ == "__main__":
    main()
