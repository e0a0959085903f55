"""Settings of a conversion and its report, for the command's help and for the code that carries it out.

Imports no torch: the help is printed without it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.files import check_new_directory
from ..checks import MOST_TOKENS, check_choice, check_number

INITS = ("keep", "identity", "calibrate")
DTYPES = ("float32", "bfloat16", "float16")
DATA, TOKENS = "sotu", 8192  # the text of a report, and how many tokens of it, by default
SOURCE = "source"  # the stage of a report that all others are compared with


@dataclass(frozen=True)
class Conversion:
    """The arguments of `convert_checkpoint`, without source and target."""

    norm: str
    norm_kwargs: Mapping[str, Any] | None = None
    sites: str | Collection[str] | None = None
    init: str = "keep"
    data: str = "sotu"
    calibration_tokens: int = 16_384
    dtype: str | None = None
    remote_code: bool = False

    def check(self, target: Path) -> None:
        """Raise ValueError, TypeError or OSError for a bad argument, as far as it can be told without the source."""
        from ..data.text import LEAST

        check_choice("init", self.init, INITS)
        if self.dtype is not None:
            check_choice("dtype", self.dtype, DTYPES)
        check_number("calibration_tokens", self.calibration_tokens, LEAST, MOST_TOKENS)
        check_new_directory("target", target)
