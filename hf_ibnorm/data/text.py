"""Text to calibrate or to measure a model on, as tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import TryAgain, UserError
from . import CORPORA, load_corpus
from .files import BadDocument, read_file, retried
from .tokens import Encoder, begins_texts

SEQUENCE = 512
"""Tokens a sequence, at most."""
LEAST = 256
"""Tokens that a text must have."""
MOST = 1 << 26
"""Characters of a file that are looked at: a part of them is drawn, and memory has to hold them all."""


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
    """Sequences from all over a text; where the tokenizer begins texts with a BOS token, every sequence does, too.

    Args:
        field: what an error names.
        data: an embedded corpus, or a file as `read_file` takes it, of which the beginning is used where it is long.
        split: the corpus's; of a file, all is used.
        tokenizer: the model's.
        tokens: how many in all, about.
        context: the longest sequence that the model takes.

    Raises:
        ValueError: there is no such text, or not enough of it.
        TryAgain: it cannot be read for a reason that may pass.
    """
    if data in CORPORA:
        documents, name = load_corpus(data, split), f"the {split} split of {data}"
    else:
        documents, name = list(_documents(field, data)), Path(data).name
    encode = Encoder(tokenizer).backend.encode
    length = min(SEQUENCE, context)
    rows = max(1, tokens // length)
    step = max(1, len(documents) // rows)
    wanted = -(-rows * length // max(1, len(documents[::step])))  # of each document
    ids: list[int] = []
    sizes: list[int] = []
    # Where those of one pass are too short together, those between them follow.
    for document in (document for i in range(step) for document in documents[i::step]):
        # Many begin alike; a text without spaces begins where it begins.
        start = max(0, document.find(" ", len(document) // 3)) if len(document) > 40 * wanted else 0
        piece = document[start : start + 20 * wanted]
        encoded = encode(piece, add_special_tokens=False)
        ids += encoded.ids[:wanted]
        # Where a token ends in bytes: tokens that share a character have the same end, and the bytes count once.
        to_here = [0, *accumulate(len(letter.encode()) for letter in piece)]
        ends = [0, *(to_here[end] for _, end in encoded.offsets[:wanted])]
        sizes += [end - begin for begin, end in pairwise(ends)]
        if len(ids) >= rows * length:
            break
    if len(ids) < LEAST:
        raise ValueError(f"{field}: got {data!r}, which has {len(ids)} tokens; must have at least {LEAST}")
    length = min(length, len(ids))
    whole = min(len(ids), rows * length) // length * length
    by_row, drawn = (torch.tensor(each[:whole]).view(-1, length) for each in (sizes, ids))
    if begins_texts(tokenizer):  # then the model has never seen a text without it
        drawn[:, 0] = tokenizer.bos_token_id
    return Text(name, drawn, int(by_row[:, 1:].sum()))


def _documents(field: str, data: str) -> Iterator[str]:
    """The documents of a file, up to `MOST` characters."""
    size = 0
    try:
        if not Path(data).is_file():
            raise UserError("no such file")
        for document in retried(lambda: read_file(Path(data), about=field)):
            if isinstance(document, BadDocument):
                raise document
            yield document
            size += len(document)
            if size >= MOST:
                return
    except (TryAgain, BadDocument):
        raise
    except (UserError, ValueError, OSError) as error:  # a name may be too long for a path, or have a zero byte
        known, why = ", ".join(CORPORA), str(error).removeprefix(f"{field}: ")
        raise ValueError(f"{field}: got {data[:200]!r}, neither a corpus ({known}) nor a text file: {why}") from error
