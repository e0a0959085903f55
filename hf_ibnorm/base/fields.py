"""Dataclasses that declare the fields of a file: jsonargparse checks the types, which carry the bounds of numbers."""

import math
from argparse import ArgumentError
from copy import deepcopy
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type

from ..checks import nearest
from .errors import UserError

if TYPE_CHECKING:
    PositiveNumber = float
    Seed = int
    FromTwo = int
else:
    PositiveNumber = restricted_number_type("PositiveNumber", float, [(">", 0), ("<", math.inf)])
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<=", 2**31)])
    FromTwo = restricted_number_type("FromTwo", int, (">=", 2))

_WORDS: dict[Any, str] = {
    **{str: "text", int: "a whole number", float: "a number", list: "a list", dict: "a mapping"},
    **{PositiveInt: "a whole number >= 1", NonNegativeInt: "a whole number >= 0", FromTwo: "a whole number >= 2"},
    **{PositiveNumber: "a number > 0", Seed: f"a whole number >= 0 and <= {2**31}"},
}

FILLED = {"filled": True}  # metadata of a field whose list or mapping may not be empty

T = TypeVar("T")


def from_mapping(kind: type[T], where: str, content: Any, prefix: str = "") -> T:
    """An instance of a dataclass from the content of a file; fields left out or null have their defaults.

    UserError where a field is unknown, missing, empty, or not of the type that the dataclass annotates; the message
    calls the mapping `where`, and a field `prefix` and its name, such as "norms[0].kwargs".
    """
    if not isinstance(content, dict):
        raise UserError(f"{where}: got {content!r}, must be a mapping")
    declared = fields(kind)  # type: ignore[arg-type]
    check_known(where, content, [field.name for field in declared])
    given = {name: value for name, value in content.items() if value is not None}
    required = [field.name for field in declared if field.default is MISSING and field.default_factory is MISSING]
    if missing := [name for name in required if name not in given]:
        raise UserError(f"{prefix}{missing[0]}: is missing; needed are {', '.join(required)}")
    for field in declared:
        if field.metadata == FILLED:
            check_filled(f"{prefix}{field.name}", given.get(field.name))
    types, values = get_type_hints(kind), {}
    for name, value in given.items():
        if isinstance(value, dict) and (odd := [key for key in value if not isinstance(key, str)]):
            raise UserError(f"{prefix}{name}: got the name {odd[0]!r}, must be text; put it in quotes")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=types[name])
        try:
            values[name] = _plain(parser.parse_object(Namespace(value=deepcopy(value))).value)
        except (ArgumentError, ValueError):
            raise UserError(f"{prefix}{name}: got {value!r}, must be {words(types[name])}") from None
    return kind(**values)


def _plain(value: Any) -> Any:
    """Numbers as Python's own: YAML cannot write jsonargparse's restricted types."""
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def check_known(where: str, names: Any, known: list[str]) -> None:
    """Raise UserError for a name that is none of `known`, with the nearest one."""
    for name in names:
        if name not in known:
            hint = nearest(str(name), known)
            raise UserError(f"{where}: unknown field {name!r}{hint}; known are {', '.join(known)}")


def check_filled(where: str, value: Any) -> None:
    """Raise UserError for an empty list or mapping, and for an empty list inside a mapping."""
    if value in ([], {}):
        kind = "list" if isinstance(value, list) else "mapping"
        raise UserError(f"{where}: got an empty {kind}, must have one or more; leave out a field that is not meant")
    for name, item in value.items() if isinstance(value, dict) else ():
        if isinstance(item, list):
            check_filled(f"{where}.{name}", item)


def words(kind: Any) -> str:
    """A type in the words of messages, such as "a list, each item a number > 0"."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is None:
        return _WORDS[kind]
    if origin is list:
        return f"a list, each item {words(parts[0])}"
    if origin is tuple:
        return f"a list of {len(parts)}, each item {words(parts[0])}"
    if origin is dict:
        return f"a mapping, each value {words(parts[1])}"
    return " or ".join(words(part) for part in parts if part is not type(None))
