"""Files that users wrote, other programs wrote, or something damaged: whatever is wrong with one is said in one line.

Imports nothing but the standard library and PyYAML, so that a command can read its files before it loads torch.
"""

import errno
import json
import math
import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import TryAgain, UserError
from .room import is_out_of_memory

NODES = 100_000
"""Values that a YAML file may have, with every alias written out: a few lines of aliases can stand for 10⁹."""
TOLD = 300
"""Characters of another library's message that are shown."""

_NETWORK = ("requests", "urllib3", "httpx", "httpcore", "aiohttp")
"""What the modules of libraries begin with whose errors, a server's answer apart, are of the network."""
# Reasons that stay until somebody mends them. All others, such as EIO, ESTALE or ETIMEDOUT, may pass.
_LASTING = {
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS),
}

Form = Any
"""What a value has to be: a type or a tuple of them (`float` is any finite number, `int` a whole one, and a bool is
neither); `[form]`, a list; `{"name": form}`, a mapping that has these, of which names with a `?` at their end may be
missing, and of which "*" stands for all others."""
_WORDS: dict[Any, str] = {
    **{int: "a whole number", float: "a finite number", str: "text", bool: "true or false"},
    **{dict: "a mapping", list: "a list", type(None): "null"},
}


@contextmanager
def reading(field: str, path: Path | str, *kinds: type[Exception], retry: bool = False) -> Iterator[None]:
    """Around code that reads and parses a file, and nothing else: whatever it raises is the file's fault.

    Args:
        field: what the file was given as, such as "config".
        path: the file, as the message calls it.
        *kinds: the exceptions that are; all where none is named.
        retry: whether the same command may succeed later, where the reason may pass by itself.

    Raises:
        TryAgain: with `retry`, for a reason that may pass.
        UserError: for any other. One from inside goes on as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (kinds and not isinstance(error, kinds)) or is_out_of_memory(error):
            raise
        kind = TryAgain if retry and may_pass(error) else UserError
        raise kind(f"{field}: {path} cannot be read: {told(error).removesuffix(f': {path}')}") from error


def may_pass(error: BaseException) -> bool:
    """Whether the same read may succeed later: a network or a disk failed; not: a file is missing, locked, damaged."""
    found: BaseException | None = error
    while found is not None:
        status = getattr(getattr(found, "response", None), "status_code", getattr(found, "status", None))
        if isinstance(status, int):
            return status in (408, 425, 429) or status >= 500
        if isinstance(found, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
            return False
        if isinstance(found, OSError) and found.errno is not None:
            return found.errno not in _LASTING
        if isinstance(found, ConnectionError | TimeoutError):
            return True
        if type(found).__module__.startswith(_NETWORK):
            return True
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return False


def told(error: BaseException) -> str:
    """What an exception says, in one line of a length to read."""
    match error:
        case RecursionError():
            return "it is nested too deeply"
        case KeyError():
            return f"it has no {error}"
        case UnicodeDecodeError():
            return f"it is no UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x})"
        case OSError() if error.strerror:
            return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split())[:TOLD] or type(error).__name__


def read_text(field: str, path: Path) -> str:
    """A file of UTF-8, without the byte order mark that it may begin with.

    Raises:
        UserError: it cannot be read.
    """
    with reading(field, path):
        return path.read_text(encoding="utf-8-sig")


def read_json(field: str, path: Path, form: Form = dict) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read, is no JSON, or is not of this form.
    """
    text = read_text(field, path)
    with reading(field, path):
        content = json.loads(text, parse_constant=_no_number)
    check_form(f"{field}: {path}", content, form)
    return content


def _no_number(constant: str) -> None:
    """Python takes NaN and Infinity for numbers of JSON, which has none."""
    raise ValueError(f"it has a number {constant}")


def read_yaml(field: str, path: Path, form: Form = dict) -> Any:
    """The content of a YAML file, in YAML's safe subset.

    Raises:
        UserError: it cannot be read, is no YAML, has a name twice in one mapping, has too many values with its aliases
            written out, or is not of this form.
    """
    text = read_text(field, path)
    with reading(field, path):
        content = parse_yaml(text)
    check_form(f"{field}: {path}", content, form)
    return content


def parse_yaml(text: str) -> Any:
    """The content of some YAML, in its safe subset.

    Raises:
        ValueError: a name stands twice in one mapping, or there are too many values with every alias written out.
        yaml.YAMLError: it is no YAML.
    """
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > NODES:
            raise ValueError(f"it has more than {NODES:,} values, aliases written out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _values(node: Any, known: dict[int, int]) -> int:
    """How many values a YAML node stands for."""
    import yaml

    if id(node) in known:
        return known[id(node)]
    known[id(node)] = NODES + 1  # of one that holds itself, which has no end
    children: list[Any] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(
                        f"{key.value} stands there twice, the second time in line {key.start_mark.line + 1}"
                    )
                seen.add(key.value)
        children = [value for pair in node.value for value in pair]
    known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]


def check_form(where: str, value: Any, form: Form) -> None:
    """Raise UserError, naming the place in `value`, unless it is of a `Form`; `where` opens the message."""
    if isinstance(form, dict):
        _check_type(where, value, dict)
        for name in value.keys() - form.keys() if "*" in form else ():
            check_form(f"{where}: {name}", value[name], form["*"])
        for name, each in form.items():
            optional, name = name.endswith("?") or name == "*", name.removesuffix("?")
            if name in value:
                check_form(f"{where}: {name}", value[name], each)
            elif not optional:
                raise UserError(f"{where} has no {name}")
    elif isinstance(form, list):
        _check_type(where, value, list)
        for i, each in enumerate(value):
            check_form(f"{where}: item {i}", each, form[0])
    else:
        _check_type(where, value, *(form if isinstance(form, tuple) else (form,)))


def _check_type(where: str, value: Any, *kinds: type) -> None:
    if not any(_is(value, kind) for kind in kinds):
        got = repr(value)
        shown = got if len(got) <= 60 else f"{got[:60]}..."
        raise UserError(f"{where}: got {shown}, must be {' or '.join(_WORDS[kind] for kind in kinds)}")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
