"""What every command shares: one-line errors, exit codes, quiet libraries; and the `hf-ibnorm` command itself.

Exit codes: 0 done, 2 bad input (one line on stderr, no traceback), 1 a fault of ours (with its traceback), 75
stopped by a signal, or by what may pass by itself, and resumable.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from .checks import nearest
from .version import __version__

BAD_INPUT = 2
STOPPED = 75  # EX_TEMPFAIL: the same command can go on later
PATIENCE = 5.0
"""Seconds that the other ranks of a launch wait with an error: the launcher ends all when one has ended, and rank 0 may
not have spoken yet."""


class UserError(ValueError):
    """Something the user can mend: its message is one line that names the field, the value and what is allowed."""

    exit_code = BAD_INPUT


class TryAgain(UserError):
    """Something that may pass by itself, such as a network that is down: the same command may succeed later."""

    exit_code = STOPPED


class Stopped(BaseException):
    """A signal ended the program in order; its message says where it stands.

    No Exception, like KeyboardInterrupt: it may come anywhere, and code that catches errors must not take it for one.
    """


@contextmanager
def bad_input(*kinds: type[Exception], about: str = "") -> Iterator[None]:
    """Turn the errors that validation raises inside the block into a `UserError`.

    Only for code that checks what the user gave: elsewhere a ValueError is a fault of ours and keeps its traceback.

    Args:
        *kinds: the errors to turn; by default ValueError, TypeError, OSError and those of Transformers' strict configs.
        about: opens the message, for errors of libraries that do not know what they were asked for.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not isinstance(error, kinds or _of_validation()):
            raise
        raise UserError(about + str(error)) from error


def _of_validation() -> tuple[type[Exception], ...]:
    """What validation raises; the last kind is imported late, for most commands never need it."""
    from huggingface_hub.errors import StrictDataclassError

    return ValueError, TypeError, OSError, StrictDataclassError


@contextmanager
def alone_in(folder: Path, complaint: str, timeout: float = 0.0) -> Iterator[None]:
    """Keep other processes that ask for the same out of a directory, which would take this one's files for leftovers.

    Args:
        folder: the directory; it gets a file `.lock`, which stays.
        complaint: what is said where another process is at work in it.
        timeout: seconds to wait for that to end.

    Raises:
        UserError: another process is at work in it.
    """
    from filelock import FileLock, Timeout

    held = FileLock(folder / ".lock", timeout=timeout)
    try:
        held.acquire()
    except Timeout:
        raise UserError(complaint) from None
    try:
        yield
    finally:
        held.release()


def run_command(main: Callable[[], None], lower: str) -> NoReturn:
    """Run `main` and exit with the code its ending asks for; only rank 0 of a launch speaks.

    Args:
        main: the command.
        lower: what to lower where its memory does not suffice.
    """
    try:
        for word in sys.argv:
            check_text(word)
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            time.sleep(PATIENCE)
        _leave(error.exit_code)
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {stop}", file=sys.stderr)
        _leave(STOPPED)
    except KeyboardInterrupt:
        _leave(130)
    except BrokenPipeError:  # `... | head` closed our output; point it elsewhere, or Python complains at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MemoryError, RuntimeError) as error:
        from .room import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory: {' '.join(str(error).split())[:200]}; lower {lower}", file=sys.stderr)
        _leave(BAD_INPUT)
    _leave(0)


def _leave(code: int) -> NoReturn:
    """Exit; as one of several processes without taking the interpreter down in order.

    There, torch's process group may wait for a thread of its own that waits for the interpreter: for ever.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def check_text(word: str) -> None:
    """Raise UserError for a word of the command line that is no UTF-8: no file could hold it, and all are noted."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise UserError(f"command line: got {word.encode(errors='surrogateescape')!r}, must be UTF-8") from None


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, with the nearest flag where one is close.

    Flags must be whole: a shortened one would change its meaning when another flag is added.
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
            flags += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for parser in action.choices.values() for flag in parser._flags()]
        return flags


def require_extra(extra: str, *modules: str) -> None:
    """Raise `UserError` with the pip command unless every module of an optional extra is installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'hf_ibnorm[{extra}]'")


@contextmanager
def stopping_in_order() -> Iterator[None]:
    """While inside, SIGTERM ends this process as an exception does, so that what was half written is removed."""

    def stop(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet_libraries() -> None:
    """Leave the terminal to this program: no progress bars or advice from the libraries beneath it."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    hub.set_verbosity_error()  # it tells of every try to reach the network
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _env(arguments: argparse.Namespace) -> None:
    from .files import environment_record

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
    from .convert.cli import add_verbs, take_norm_options

    parser = OneLineParser(prog="hf-ibnorm", description="IBNorm and normality normalization for Transformers.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=OneLineParser)
    env = verbs.add_parser("env", help="versions, device, backends, git revision: what a bug report needs")
    env.add_argument("--json", action="store_true", help="print JSON (default: a line each)")
    env.set_defaults(run=_env)
    build = verbs.add_parser(
        "build_kernels",
        help="compile the CPU's fused norms (needs a C++ compiler: $CXX, c++, g++ or clang++)",
        description="Compile the CPU's fused norms for this torch and processor into $HF_IBNORM_KERNELS, or else "
        "hf_ibnorm/kernels in the user's cache directory. A GPU's are compiled by Triton when they are first used.",
    )
    build.add_argument("--force", action="store_true", help="compile even where they are built (default: not)")
    build.set_defaults(run=_build_kernels)
    add_verbs(verbs)
    add_verb(verbs)
    words, options = take_norm_options(sys.argv[1:])
    arguments = parser.parse_args(words)
    if options and not hasattr(arguments, "norm_kwargs"):
        raise UserError(f"--norm_kwargs.{next(iter(options))}: only convert takes options of a norm")
    arguments.norm_kwargs = options
    with stopping_in_order():
        arguments.run(arguments)


def main() -> NoReturn:
    """The `hf-ibnorm` command."""
    run_command(_main, lower="--tokens, --samples, --calibration_tokens, or use a smaller model")


if __name__ == "__main__":
    from hf_ibnorm.cli import main as same  # whose UserError is the one that the verbs' modules raise

    same()
