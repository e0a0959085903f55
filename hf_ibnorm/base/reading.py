"""Files that may be damaged or wrong, whoever wrote them: every error is one line that names the file.

Imports nothing but the standard library and PyYAML, so that a command can read its files before it loads torch.
"""

import errno
import json
import math
import numbers
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .errors import TryAgain, UserError, is_out_of_memory

NODES = 100_000  # values that a YAML file may have, aliases written out: a few lines of aliases can stand for 10⁹
TOLD = 300  # characters of another library's message that are shown

_NETWORK = ("requests", "urllib3", "httpx", "httpcore", "aiohttp")
"""Packages whose exceptions mean that the network failed, unless they carry a server's answer."""
# Reasons that stay until somebody mends them. All others, such as EIO, ESTALE or ETIMEDOUT, may pass.
_LASTING = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Form = Any
"""The form of a value: a type or a tuple of types (`float` is any finite number, `int` a whole one, neither takes a
bool); `[form]`, a list; `{"name": form}`, a mapping with these names, in which "name?" may be missing, and "*" stands
for all other names."""
_WORDS: dict[Any, str] = {
    **{int: "a whole number", float: "a finite number", str: "text", bool: "true or false"},
    **{dict: "a mapping", list: "a list", type(None): "null"},
}


@contextmanager
def reading(field: str, path: Path | str, *kinds: type[Exception], retry: bool = False) -> Iterator[None]:
    """Around code that reads and parses a file, and nothing else: an exception in it is the file's fault.

    Args:
        field: the setting that named the file, such as "config".
        path: the file, as the message calls it.
        *kinds: the exceptions that are the file's fault; all by default.
        retry: whether a reason that may pass is a `TryAgain`.

    Raises:
        UserError: for such an exception. A UserError from inside goes on as it is.
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
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", getattr(cause, "status", None))
        if isinstance(status, int):
            return status in (408, 425, 429) or status >= 500
        if isinstance(cause, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
            return False
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno not in _LASTING
        if isinstance(cause, ConnectionError | TimeoutError) or type(cause).__module__.startswith(_NETWORK):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


def told(error: BaseException) -> str:
    """The message of an exception, in one line of `TOLD` characters at most."""
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
    """The text of a UTF-8 file, without a byte order mark at its beginning; UserError where it cannot be read."""
    with reading(field, path):
        return path.read_text(encoding="utf-8-sig")


def read_json(field: str, path: Path, form: Form = dict) -> Any:
    """The content of a JSON file; UserError where it cannot be read, is no JSON, or is not of this form."""
    return _parsed(field, path, form, partial(json.loads, parse_constant=_no_number))


def _no_number(constant: str) -> None:
    """Python takes NaN and Infinity for numbers of JSON, which has none."""
    raise ValueError(f"it has a number {constant}")


def read_yaml(field: str, path: Path, form: Form = dict) -> Any:
    """The content of a YAML file; UserError where it cannot be read, `parse_yaml` fails, or it is not of this form."""
    return _parsed(field, path, form, parse_yaml)


def _parsed(field: str, path: Path, form: Form, parse: Callable[[str], Any]) -> Any:
    text = read_text(field, path)
    with reading(field, path):
        content = parse(text)
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
    """The number of values that a YAML node stands for; `known` holds those of nodes counted before, by id."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = NODES + 1  # while it is counted: a node that holds itself has no end
    children: list[Any] = []
    if node.id == "sequence":
        children = node.value
    elif node.id == "mapping":
        names = set[str]()
        for key in (key for key, _ in node.value if key.id == "scalar"):
            if key.value in names:
                raise ValueError(f"{key.value} stands there twice, the second time in line {key.start_mark.line + 1}")
            names.add(key.value)
        children = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]


def check_form(where: str, value: Any, form: Form) -> None:
    """Raise UserError, naming the place in `value`, unless it is of a `Form`; `where` opens the message."""
    if isinstance(form, dict):
        _check_type(where, value, dict)
        for name in value.keys() - form.keys() if "*" in form else ():
            check_form(f"{where}: {name}", value[name], form["*"])
        for name, part in form.items():
            optional, name = name.endswith("?") or name == "*", name.removesuffix("?")
            if name in value:
                check_form(f"{where}: {name}", value[name], part)
            elif not optional:
                raise UserError(f"{where} has no {name}")
    elif isinstance(form, list):
        _check_type(where, value, list)
        for i, item in enumerate(value):
            check_form(f"{where}: item {i}", item, form[0])
    else:
        _check_type(where, value, *(form if isinstance(form, tuple) else (form,)))


def _check_type(where: str, value: Any, *kinds: type) -> None:
    if not any(_is(value, kind) for kind in kinds):
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise UserError(f"{where}: got {shown}, must be {' or '.join(_WORDS[kind] for kind in kinds)}")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
