"""Text to calibrate a model on, or to measure it on, as tokens."""

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

SEQUENCE = 512  # tokens a sequence, at most
LEAST = 256  # tokens that a text must have
MOST = 1 << 26  # characters of a file that are read: memory has to hold them all, for parts of them all are drawn


@dataclass(frozen=True)
class Text:
    """Sequences of equal length: int64 `ids` of shape (rows, length), from a text called `name`.

    `bytes` are those of the text in UTF-8, without the first token of each row.
    """

    name: str
    ids: Tensor
    bytes: int


def draw_text(field: str, data: str, split: str, tokenizer: Any, tokens: int, context: int | None) -> Text:
    """Sequences from all over a text; each begins with BOS where the tokenizer begins texts with it.

    Args:
        field: the setting that errors name.
        data: an embedded corpus, of which `split` is used; or a file, of which the first `MOST` characters are.
        tokenizer: the model's.
        tokens: how many in all, about.
        context: the longest sequence that the model takes; None where it has no limit.

    Raises:
        ValueError: there is no such text, or it has less than `LEAST` tokens.
        TryAgain: it cannot be read for a reason that may pass.
    """
    if data in CORPORA:
        documents, name = load_corpus(data, split), f"the {split} split of {data}"
    else:
        documents, name = _documents(field, data), Path(data).name
    encode = Encoder(tokenizer).backend.encode
    length = min(SEQUENCE, context or SEQUENCE)
    rows = max(1, tokens // length)
    step = max(1, len(documents) // rows)
    wanted = -(-rows * length // max(1, len(documents[::step])))  # tokens of each document
    ids: list[int] = []
    sizes: list[int] = []
    # Every `step`-th document; where their tokens do not suffice, the documents after them follow, and so on.
    for document in (document for i in range(step) for document in documents[i::step]):
        # From a third of a long document on, for many begin alike; a text without spaces is taken from its beginning.
        start = max(0, document.find(" ", len(document) // 3)) if len(document) > 40 * wanted else 0
        piece = document[start : start + 20 * wanted]
        encoded = encode(piece, add_special_tokens=False)
        ids += encoded.ids[:wanted]
        # The byte at which each token ends: tokens that share a character have the same end, and its bytes count once.
        byte_at = [0, *accumulate(len(letter.encode()) for letter in piece)]
        ends = [0, *(byte_at[end] for _, end in encoded.offsets[:wanted])]
        sizes += [end - begin for begin, end in pairwise(ends)]
        if len(ids) >= rows * length:
            break
    if len(ids) < LEAST:
        raise ValueError(f"{field}: got {data!r}, which has {len(ids)} tokens; must have at least {LEAST}")
    length = min(length, len(ids))
    whole = min(len(ids), rows * length) // length * length
    sizes_by_row, ids_by_row = (torch.tensor(numbers[:whole]).view(-1, length) for numbers in (sizes, ids))
    if begins_texts(tokenizer):  # then the model has never seen a text without BOS
        ids_by_row[:, 0] = tokenizer.bos_token_id
    return Text(name, ids_by_row, int(sizes_by_row[:, 1:].sum()))


def _documents(field: str, data: str) -> list[str]:
    """The documents of a file, up to `MOST` characters."""
    documents: list[str] = []
    left = MOST
    try:
        if not Path(data).is_file():
            raise UserError("no such file")
        for document in retried(lambda: read_file(Path(data), about=field)):
            if isinstance(document, BadDocument):
                raise document
            documents.append(document)
            left -= len(document)
            if left <= 0:
                break
    except (TryAgain, BadDocument):
        raise
    except (ValueError, OSError) as error:  # a name may be too long for a path, or have a zero byte
        known, why = ", ".join(CORPORA), str(error).removeprefix(f"{field}: ")
        raise ValueError(f"{field}: got {data[:200]!r}, neither a corpus ({known}) nor a text file: {why}") from error
    return documents
