"""Text as tokens, everywhere the same: what looks like a special token in a text is text, whatever its length."""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

PART = 1 << 16  # characters of a document in one part, about: until it is a number, a token takes a hundred bytes
AT_ONCE = 1 << 18  # characters of several documents that are encoded in one call
_UNREACHABLE = "\U0010ffff\U0010fffe"  # two noncharacters of Unicode, which no text interchanges
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


class Encoder:
    """Turns texts into ids, and what looks like a special token into ids of its characters.

    A tokenizer takes the characters of a special token, such as `</s>`, for that token: a document that quotes it would
    end there. `encode_special_tokens` of the `tokenizers` library does not help where the model's own vocabulary has
    the token as well, as T5's and every model of whole words do, and the next call through Transformers resets it. So
    this encodes with a copy of the tokenizer in which special tokens have names that no text can have.

    `bos` and `eos` are the ids of the tokens that begin and end a text, None for none.

    Args:
        tokenizer: a fast tokenizer of Transformers; ValueError for another one.
        add_bos: whether texts begin with its beginning-of-text token; "auto": where the tokenizer begins them with it,
            unless it is also the end-of-text token, which stands before each text anyway.
    """

    def __init__(self, tokenizer: Any, add_bos: bool | str = "auto") -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"tokenizer: got a {type(tokenizer).__name__}, must be a fast one")
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id
        if add_bos is True and tokenizer.bos_token_id is None:
            raise ValueError("add_bos: got true, the tokenizer has no bos_token; must be auto or false")
        wanted = begins_texts(tokenizer) and tokenizer.bos_token_id != self.eos if add_bos == "auto" else add_bos
        self.bos: int | None = tokenizer.bos_token_id if wanted else None

    @cached_property
    def backend(self) -> Tokenizer:
        """The copy that encodes: without truncation and padding, and with special tokens that no text holds."""
        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        special = {str(token) for token in self.tokenizer.all_special_tokens}
        special |= {token["content"] for token in content["added_tokens"] if token["special"]}
        # A token of one character keeps its name: where "!" is the padding token, only "!" spells that word.
        hidden = {token: _UNREACHABLE + token for token in special if len(token) > 1}
        for token in content["added_tokens"]:
            token["content"] = hidden.get(token["content"], token["content"])
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {hidden.get(token, token): index for token, index in model["vocab"].items()}
        else:  # Unigram's pieces with their scores
            model["vocab"] = [[hidden.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not hidden.keys() & {*pair, "".join(pair)}]
        content["truncation"] = content["padding"] = None
        copy = Tokenizer.from_str(json.dumps(content))
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def drops_space(self) -> bool:
        """Whether a space between words is part of neither word: then "a b" has the tokens of "a" and of "b"."""
        whole, *sides = (self.backend.encode(text, add_special_tokens=False).ids for text in ("a b", "a", "b"))
        return bool(whole == sides[0] + sides[1])

    @property
    def key(self) -> list[str]:
        """Strings that change with the ids of any text."""
        return [self.tokenizer.backend_tokenizer.to_str(), f"bos {self.bos} eos {self.eos} text 2"]

    def documents(self, texts: list[str]) -> np.ndarray:
        """`texts` as one array of ids, uint32 of shape (n,), each text between `bos`, if any, and `eos`.

        The backend is called directly: Transformers would warn of a novel's length. It does not hold the interpreter's
        lock, so that threads encode side by side.
        """
        begin, end = ([] if token is None else [np.array([token], np.uint32)] for token in (self.bos, self.eos))
        arrays: list[list[np.ndarray]] = [[*begin] for _ in texts]
        for parts in self._calls(texts):
            encoded = self.backend.encode_batch_fast([part for _, part in parts], add_special_tokens=False)
            for (i, _), encoding in zip(parts, encoded, strict=True):
                arrays[i].append(np.array(encoding.ids, np.uint32))
        return np.concatenate([array for of_text in arrays for array in (*of_text, *end)])

    def _calls(self, texts: list[str]) -> Iterator[list[tuple[int, str]]]:
        """(number of its text, part), in lists that are encoded in one call each."""
        parts, size = list[tuple[int, str]](), 0
        for i, text in enumerate(texts):
            for part in self._parts(text):
                parts.append((i, part))
                size += len(part)
                if size >= AT_ONCE:
                    yield parts
                    parts, size = [], 0
        if parts:
            yield parts

    def _parts(self, text: str) -> Iterator[str]:
        """A text, cut between two words where it is long, so that the tokens of the parts are those of the whole."""
        start = 0
        while len(text) - start > PART + PART // 8:
            between = _BETWEEN_WORDS.search(text, start + PART, start + PART + PART // 8)
            end = start + PART if between is None else between.start()
            yield text[start:end]
            start = end + (between is not None and self.drops_space)
        yield text[start:] if start else text


def begins_texts(tokenizer: Any) -> bool:
    """Whether a tokenizer begins every text with its beginning-of-text token, as `eval` then does, too."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]
