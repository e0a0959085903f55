"""Text to calibrate or to measure a model on, as tokens."""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import CORPORA, load_corpus

SEQUENCE = 512
"""Tokens a sequence, at most."""
LEAST = 256
"""Tokens that a text must have."""


@dataclass(frozen=True)
class Text:
    """Sequences of equal length.

    Args:
        name: where they are from, in words.
        ids: tokens, int64 of shape (rows, length).
        bytes: how much text is behind them, in UTF-8, without the first token of each row.
    """

    name: str
    ids: Tensor
    bytes: int


def draw_text(field: str, data: str, split: str, tokenizer: Any, tokens: int, context: int) -> Text:
    """Sequences from all over a corpus, or from one place in a file.

    Args:
        field: what an error names.
        data: an embedded corpus, or a text file.
        split: the corpus's; of a file, all is used.
        tokenizer: the model's.
        tokens: how many in all, about.
        context: the longest sequence that the model takes.

    Raises:
        ValueError: there is no such text, or not enough of it.
    """
    if data in CORPORA:
        documents, name = load_corpus(data, split), f"the {split} split of {data}"
    else:
        try:
            documents, name = [Path(data).read_text(encoding="utf-8")], Path(data).name
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(CORPORA)
            raise ValueError(f"{field}: got {data!r}, neither a corpus ({known}) nor a text file: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: got a {type(tokenizer).__name__}, must be a fast one, which knows offsets")
    length = min(SEQUENCE, context)
    rows = max(1, tokens // length)
    step = max(1, len(documents) // rows)
    wanted = -(-rows * length // len(documents[::step]))  # of each document
    ids: list[int] = []
    sizes: list[int] = []
    for document in documents[::step]:
        # Many begin alike; a text without spaces begins where it begins.
        start = max(0, document.find(" ", len(document) // 3)) if len(document) > 40 * wanted else 0
        piece = document[start : start + 20 * wanted]
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        ids += encoded.input_ids[:wanted]
        # Where a token ends in bytes: tokens that share a character have the same end, and the bytes count once.
        to_here = [0, *accumulate(len(letter.encode()) for letter in piece)]
        ends = [0, *(to_here[end] for _, end in encoded.offset_mapping[:wanted])]
        sizes += [end - begin for begin, end in pairwise(ends)]
        if len(ids) >= rows * length:
            break
    if len(ids) < LEAST:
        raise ValueError(f"{field}: got {data!r}, which has {len(ids)} tokens; must have at least {LEAST}")
    length = min(length, len(ids))
    whole = min(len(ids), rows * length) // length * length
    by_row = torch.tensor(sizes[:whole]).view(-1, length)
    return Text(name, torch.tensor(ids[:whole]).view(-1, length), int(by_row[:, 1:].sum()))
