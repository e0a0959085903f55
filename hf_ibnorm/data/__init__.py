"""The embedded corpora: real English text that needs no download. Origins and licences are in SOURCES.md."""

import json
import lzma
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

from ..checks import check_choice

SPLITS = ("train", "validation", "test")
# Corpus → the split of one of its rows.
CORPORA: dict[str, Callable[[dict[str, Any]], str]] = {
    "austen": lambda row: {"Northanger Abbey": "validation", "Persuasion": "test"}.get(row["title"], "train"),
    "sotu": lambda row: "train" if row["year"] <= 2000 else "validation" if row["year"] <= 2010 else "test",
}


def load_corpus(name: str, split: str) -> list[str]:
    """The documents of one split of an embedded corpus.

    Args:
        name: "austen" (six novels) or "sotu" (State of the Union addresses, 1790-2021).
        split: "train", "validation" or "test". austen: *Northanger Abbey* validates, *Persuasion* tests, the other
            four train; sotu: up to 2000 train, 2001-2010 validate, 2011-2021 test.

    Returns:
        One string a document, in the order of the corpus.

    Raises:
        ValueError: no such corpus or split.
    """
    check_choice("corpus", name, tuple(CORPORA))
    check_choice("split", split, SPLITS)
    return [row["text"] for row in _rows(name) if CORPORA[name](row) == split]


@cache  # a few megabytes, unpacked in a tenth of a second; every split is read from them
def _rows(name: str) -> tuple[dict[str, Any], ...]:
    packed = resources.files(__package__).joinpath(f"{name}.jsonl.xz").read_bytes()
    return tuple(json.loads(line) for line in lzma.decompress(packed).decode("utf-8").split("\n") if line)
