"""The errors of every command, and the codes that a command exits with.

Exit codes: 0 done, 2 bad input (one line on stderr, no traceback), 1 a fault of ours (with its traceback), 75
stopped by a signal, or by what may pass by itself, and resumable.
"""

from collections.abc import Iterator
from contextlib import contextmanager

BAD_INPUT = 2
STOPPED = 75  # EX_TEMPFAIL: the same command can go on later


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
