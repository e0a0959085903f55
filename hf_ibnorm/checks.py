"""Checks of what users give. Their errors name the field, the value and what is allowed.

Imports nothing but the standard library, so that a command can refuse a word before it has loaded torch.
"""

import difflib
import math
import numbers
import os
import sys

LARGEST = 2**53
"""The largest number of things: those beyond are no longer all floats."""
MOST_TOKENS = 10_000_000
"""The most tokens that a model is measured or calibrated on: more tokens would change the result far less than another
text, and a slip of the keyboard does not run for days."""


def own_norm_files() -> list[str]:
    """Files with norms of the user's own: the environment variable HF_IBNORM_NORMS, separated as PATH is."""
    return [file for file in os.environ.get("HF_IBNORM_NORMS", "").split(os.pathsep) if file]


def check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError naming `field`, `value` and the allowed values unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"{field}: got {value!r}, allowed are {', '.join(allowed)}")


def check_bool(field: str, value: object) -> None:
    """Raise TypeError naming `field` unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{field}: got {value!r}, must be true or false")


def check_number(field: str, value: object, low: float, high: float = math.inf, *, high_allowed: bool = True) -> None:
    """Raise unless `value` is a finite real number in [low, high] (or [low, high) if not `high_allowed`).

    Raises:
        TypeError: `value` is no number (a string such as "nan" from YAML, a bool, None).
        ValueError: `value` is NaN, infinite or outside the range.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        return  # numbers are symbols there; modules checked theirs when they were made
    bound = f">= {low:g}" + ("" if high == math.inf else f" and {'<=' if high_allowed else '<'} {high:g}")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # numpy's numbers too
        raise TypeError(f"{field}: got {value!r}, must be a finite number {bound}")
    if not math.isfinite(value) or not low <= float(value) <= high or (value == high and not high_allowed):
        raise ValueError(f"{field}: got {value!r}, must be a finite number {bound}")


def nearest(value: str, allowed: list[str]) -> str:
    """ " (did you mean 'x'?)" for the closest of `allowed`, or nothing where none is close."""
    close = difflib.get_close_matches(value, allowed, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
