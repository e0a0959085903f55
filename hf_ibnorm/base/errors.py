"""The errors of every command, and the codes that a command exits with.

Exit codes: 0 done; 2 bad input (one line on stderr); 1 a fault of ours (with its traceback); 75 stopped, by a signal or
an error that may pass by itself, and resumable.
"""

from collections.abc import Iterator
from contextlib import contextmanager

BAD_INPUT = 2
STOPPED = 75  # EX_TEMPFAIL: the same command can go on later


class UserError(ValueError):
    """An error that the user can mend: the message is one line that names the field, the value and what is allowed."""

    exit_code = BAD_INPUT


class TryAgain(UserError):
    """An error that may pass by itself, such as a network that is down: the same command may succeed later."""

    exit_code = STOPPED


class Stopped(BaseException):
    """A signal ended the program in order; the message says where the program stands.

    No Exception, like KeyboardInterrupt: it may come anywhere, and code that catches errors must let it through.
    """

    exit_code = STOPPED


@contextmanager
def bad_input(*kinds: type[Exception], about: str = "") -> Iterator[None]:
    """Turn the errors that validation raises inside the block into a `UserError`.

    Only for code that checks input of the user: elsewhere a ValueError is a fault of ours and keeps its traceback. An
    error that says that memory ran out stays as it is.

    Args:
        *kinds: the errors to turn; by default ValueError, TypeError, OSError and those of Transformers' strict configs.
        about: opens the message, for errors of libraries that do not name the input.
    """
    try:
        yield
    except Exception as error:
        if not kinds:
            from huggingface_hub.errors import StrictDataclassError  # late: most commands never need it

            kinds = (ValueError, TypeError, OSError, StrictDataclassError)
        if isinstance(error, UserError) or not isinstance(error, kinds) or is_out_of_memory(error):
            raise
        raise UserError(about + str(error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: the machine's or a GPU's."""
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one, too
        reasons = ("out of memory", "not enough memory", "can't allocate memory")
        return any(reason in str(error) for reason in reasons)
    return isinstance(error, MemoryError)
