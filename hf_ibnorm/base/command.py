"""What every command shares: one-line errors, a parser of the command line, quiet libraries."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NoReturn

from ..checks import nearest, own_norm_files
from .errors import BAD_INPUT, Stopped, UserError, is_out_of_memory

PATIENCE = 5.0
"""Seconds that the other ranks of a launch wait with an error: the launcher ends all ranks when one has ended, and rank
0 may not have printed its error yet."""


def run_command(main: Callable[[], None], lower: str) -> NoReturn:
    """Run `main` and exit with the code of its ending; `lower` names the settings to lower where memory runs out.

    In a launch, only rank 0 prints, or a rank without memory.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        for word in sys.argv:  # files note the command line, in UTF-8
            if (raw := word.encode(errors="surrogateescape")) != word.encode(errors="replace"):
                raise UserError(f"command line: got {raw!r}, must be UTF-8")
        for file in own_norm_files():
            if not os.path.isfile(file):
                raise UserError(f"HF_IBNORM_NORMS: got {file!r}, no such file")
        main()
    except (UserError, Stopped) as ending:
        if is_first:
            kind = "stopped" if isinstance(ending, Stopped) else "error"
            print(f"{kind}: {' '.join(str(ending).split())}", file=sys.stderr)
        elif isinstance(ending, UserError):
            time.sleep(PATIENCE)
        _leave(ending.exit_code)
    except KeyboardInterrupt:
        _leave(130)
    except BrokenPipeError:  # `... | head` closed our output; point it elsewhere, or Python complains at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory: {' '.join(str(error).split())[:200]}; lower {lower}", file=sys.stderr)
        _leave(BAD_INPUT)
    _leave(0)


def _leave(code: int) -> NoReturn:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # An ending in order may hang: torch's process group waits for a thread that waits for the interpreter.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, with the nearest flag where one is close.

    Flags must be whole: a shortened flag would change its meaning when another flag is added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        if unknown:
            message += nearest(unknown[0].partition("=")[0], self._flags())
        raise UserError(f"{message} (see {self.prog} --help)")

    def _flags(self) -> list[str]:
        """Every flag of this parser and of its verbs: argparse leaves a verb's unknown flags to the parser above."""
        flags: list[str] = []
        for action in self._actions:
            flags += action.option_strings if action.help != argparse.SUPPRESS else []
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for parser in action.choices.values() for flag in parser._flags()]
        return flags


def add_verb(verbs: Any, name: str, go: Callable[[Any], None] | None, about: str) -> OneLineParser:
    """The parser of a new verb among argparse's subparsers `verbs`, whose `parser_class` is `OneLineParser`.

    Args:
        go: function of the arguments, kept as their attribute `go`; None for a verb that has verbs itself.
        about: the help, without a capital and a full stop.
    """
    parser: OneLineParser = verbs.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
    parser.set_defaults(go=go)
    return parser


def require_extra(extra: str, *modules: str) -> None:
    """Raise `UserError` with the pip command unless every module of an optional extra is installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'hf_ibnorm[{extra}]'")


def quiet_libraries() -> None:
    """Leave the terminal to this program: no progress bars or advice from the libraries beneath it."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    hub.set_verbosity_error()  # it warns of every try to reach the network
    logging.set_verbosity_error()
    logging.disable_progress_bar()
