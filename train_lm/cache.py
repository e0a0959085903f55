"""What does not change between runs is kept between runs: trained tokenizers, tokens, hashes of files.

Every entry is named by a hash of all that it was made from, so that nothing in the cache is ever out of date; it is
written to a temporary place and renamed, so that it is whole or not there; and a lock lets concurrent runs wait for
the one that makes it instead of making it twice.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from hf_ibnorm.cli import UserError, bad_input
from hf_ibnorm.files import atomic_directory, sha256, sha256_file, write_text

from .tokenizer import encode

CHUNK = 1 << 18
"""Characters that are tokenized at a time, more only where one document has more."""
VERIFIED = 1 << 30
"""Bytes of tokens up to which every start checks their hash; of more, it checks their number."""


DTYPES = ("<u2", "<u4")


class Cache:
    """A folder of entries that any number of runs share.

    Args:
        folder: made if it is not there; None for $HF_IBNORM_CACHE, else hf_ibnorm in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | None) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.folder = Path(folder or os.environ.get("HF_IBNORM_CACHE") or f"{home}/hf_ibnorm").expanduser()
        with self._errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError("no permission to write")

    def _errors(self) -> Any:
        return bad_input(OSError, about=f"cache_dir: {self.folder} cannot be used: ")

    def text(self, kind: str, key: Iterable[str], make: Callable[[], str]) -> str:
        """The text kept under `key`, made now if it is not there or damaged."""
        path = self.folder / f"{kind}-{sha256(key)}.json"
        with self._errors(), FileLock(f"{path}.lock"):
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                if sha256([kept["text"]]) == kept["sha256"]:
                    return str(kept["text"])
            except (OSError, ValueError, KeyError, TypeError):
                pass
            with bad_input(OSError, about="corpus: it cannot be read: "):
                text = make()
            write_text(path, json.dumps({"text": text, "sha256": sha256([text])}))
            return text

    def file_sha(self, path: Path) -> str:
        """Hash of a file's content, read again only where its size or time of change is another."""
        with bad_input(OSError, about="corpus: "):
            stat = path.stat()
        key = [str(path.resolve()), str(stat.st_size), str(stat.st_mtime_ns), str(stat.st_ino)]
        return self.text("file", key, lambda: sha256_file(path))

    def tokens(
        self, fingerprint: str, tokenizer: PreTrainedTokenizerFast, documents: Iterable[str], threads: int
    ) -> np.ndarray:
        """`documents` as one memory-mapped array of token ids, each document followed by the end-of-text token.

        Args:
            fingerprint: hash of `documents`, which are read only where there is no such entry yet.
            tokenizer: a fast tokenizer with an end-of-text token.
            documents: texts.
            threads: that tokenize side by side.

        Raises:
            UserError: there is no text, or no room for its tokens.
        """
        key = [fingerprint, tokenizer.backend_tokenizer.to_str(), str(tokenizer.eos_token_id)]
        path = self.folder / f"tokens-{sha256(key)}"
        if (tokens := _open_tokens(path)) is not None:  # whole or not there: that needs no lock
            return tokens
        with self._errors(), FileLock(f"{path}.lock"):
            if (tokens := _open_tokens(path)) is None:
                # What a killed run left, or what is damaged; a run that has that open keeps its own.
                for old in (path, *self.folder.glob(f".{path.name}.*")):
                    shutil.rmtree(old, ignore_errors=True)
                with atomic_directory(path) as folder:
                    _write_tokens(folder, tokenizer, documents, threads)
                tokens = _open_tokens(path)
        assert tokens is not None
        return tokens


def _write_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast, documents: Iterable[str], threads: int) -> None:
    dtype = np.dtype(DTYPES[max(tokenizer.get_vocab().values()) >= 1 << 16])
    digest, count = hashlib.sha256(), 0
    with (folder / "tokens.bin").open("wb") as file:
        for ids in encode_all(tokenizer, _readable(documents), threads):
            raw = ids.astype(dtype).tobytes()
            file.write(raw)
            digest.update(raw)
            count += len(ids)
    if not count:
        raise UserError(
            "corpus: its training or its validation split has no document (of very few, all may be held out: name a "
            "validation_corpus)"
        )
    meta = {"dtype": dtype.str, "tokens": count, "sha256": digest.hexdigest()}
    write_text(folder / "meta.json", json.dumps(meta))


def _readable(documents: Iterable[str]) -> Iterator[str]:
    """`documents`, whose errors are theirs and not the cache's."""
    with bad_input(OSError, about="corpus: it cannot be read: "):
        yield from documents


def _open_tokens(path: Path) -> np.ndarray | None:
    """The tokens in an entry; None where it is missing or damaged."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        if meta["dtype"] not in DTYPES:
            return None
        file, dtype = path / "tokens.bin", np.dtype(meta["dtype"])
        size = file.stat().st_size
        if size != meta["tokens"] * dtype.itemsize or (size <= VERIFIED and sha256_file(file) != meta["sha256"]):
            return None
        return np.memmap(file, dtype=dtype, mode="r")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def take_chunk(texts: Iterator[str]) -> list[str]:
    """The next of `texts`, up to `CHUNK` characters or a little more; empty at their end."""
    chunk: list[str] = []
    size = 0
    while size < CHUNK and (text := next(texts, None)) is not None:
        chunk.append(text)
        size += len(text) + 1  # so that empty ones count too
    return chunk


def encode_all(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str], threads: int) -> Iterator[np.ndarray]:
    """Token ids of `documents`, in their order, some at a time; `threads` tokenize ahead of what is read."""
    texts = iter(documents)
    ahead: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        while True:
            while len(ahead) < 2 * threads and (chunk := take_chunk(texts)):
                ahead.append(pool.submit(encode, tokenizer, chunk))
            if not ahead:
                return
            yield ahead.popleft().result()
