"""A cache that runs share: trained tokenizers, tokens, hashes of files.

Every entry is named by a hash of everything it was made from, so that no entry is ever out of date; it is written to a
temporary place and renamed, so that it is whole or not there; and concurrent runs wait, by a lock, for the run that
makes it.
"""

import hashlib
import json
import os
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import atomic_directory, sha256, sha256_file, write_text
from hf_ibnorm.base.reading import reading
from hf_ibnorm.data.files import BadDocument, retried
from hf_ibnorm.data.tokens import Encoder

from .progress import with_progress

CHUNK = 1 << 18  # characters that are tokenized at a time, more only where one document has more
VERIFIED = 1 << 30  # bytes of tokens up to which every start checks their hash; of more, only their number
LARGE = 1 << 33  # bytes of a file whose hash takes so long that it is announced
SETTLED = 3 * 10**9
"""Nanoseconds after which two changes of a file have different times: some systems count in steps of 2 s."""
WAITED = 1.0, 60.0
"""Seconds until the first line about waiting for a lock, and between two such lines."""
DTYPES = ("<u2", "<u4")


class Cache:
    """A folder of entries that any number of runs share; `say` gets a line about whatever takes long.

    Without a name it is $HF_IBNORM_CACHE, or else hf_ibnorm in $XDG_CACHE_HOME or ~/.cache; it is made if it is not
    there. UserError where it cannot be made or written.
    """

    def __init__(self, folder: str | None, say: Callable[[str], object] = lambda line: None) -> None:
        self.say = say
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        wanted = folder or os.environ.get("HF_IBNORM_CACHE") or f"{home}/hf_ibnorm"
        self.folder = Path(os.path.expanduser(wanted))
        with self._errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError("no permission to write")

    def _errors(self) -> Any:
        return bad_input(OSError, about=f"cache_dir: {self.folder} cannot be used: ")

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Keep other processes from making the entry `path`; a process that waits says for whom."""
        lock, owner = FileLock(f"{path}.lock"), path.with_name(f".{path.name}.owner")
        for wait in chain(WAITED, repeat(WAITED[-1])):
            try:
                lock.acquire(timeout=wait)
                break
            except Timeout:
                try:
                    who = owner.read_text(encoding="utf-8")
                except (OSError, ValueError):
                    who = "another process"
                self.say(f"cache_dir: waiting for {who}, which makes {path}")
        try:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            with suppress(OSError):  # a full disk may have every entry that this run needs
                owner.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {now}", encoding="utf-8")
            yield
        finally:
            with suppress(OSError):
                owner.unlink()
            lock.release()

    def text(self, kind: str, key: Iterable[str], make: Callable[[], str]) -> str:
        """The text kept under `key`, made now if it is not there or damaged."""
        path = self.folder / f"{kind}-{sha256(key)}.json"
        with self._errors(), self._locked(path):
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                if sha256([kept["text"]]) == kept["sha256"]:
                    return str(kept["text"])
            except (OSError, ValueError, KeyError, TypeError):
                pass
            with reading("corpus", "it", OSError, retry=True):
                text = make()
            write_text(path, json.dumps({"text": text, "sha256": sha256([text])}))
            return text

    def file_sha(self, path: Path) -> str:
        """Hash of a file's content, read again only where the file has been touched in any way since.

        A program can put the time of a change back, not the time of the last change to the file's entry. A file that
        has changed just now may change again within the same tick of the clock: its hash is not kept.
        """

        def read() -> Iterator[str]:
            if stat.st_size >= LARGE:
                self.say(f"hashing {path}: {stat.st_size / 1e9:,.0f} GB")
            with reading("corpus", path, OSError, retry=True):
                yield sha256_file(path)

        with reading("corpus", path, OSError, retry=True):
            stat, key = path.stat(), [str(path.resolve()), *map(str, identity(path))]
        if any(abs(time.time_ns() - then) < SETTLED for then in (stat.st_mtime_ns, stat.st_ctime_ns)):
            return next(retried(read))
        return self.text("file", key, lambda: next(retried(read)))

    def tokens(self, fingerprint: str, encoder: Encoder, documents: Iterable[str], threads: int) -> np.ndarray:
        """`documents` as one memory-mapped array of token ids, each document followed by the end-of-text token.

        They are read only where there is no entry for their hash `fingerprint` yet. Of `Documents`, as many bad ones as
        they allow are left out; `bad` then says how many, whether they were read now or by an earlier run.

        Raises:
            UserError: there is no document, one cannot be read, the text has changed meanwhile, or there is no room
                for its tokens.
        """
        path = self.folder / f"tokens-{sha256([fingerprint, *encoder.key])}"
        entry = _open_tokens(path)  # an entry is whole or not there: that needs no lock
        if entry is None:
            with self._errors(), self._locked(path):
                entry = _open_tokens(path)
                if entry is None:
                    shutil.rmtree(path, ignore_errors=True)  # damaged; a run that has it open keeps its own
                    with atomic_directory(path) as folder:
                        self._write_tokens(folder, encoder, documents, threads)
                    entry = _open_tokens(path)
        assert entry is not None
        (tokens, bad), allowed = entry, getattr(documents, "allowed", 0)
        if bad["count"] > allowed:
            raise too_many(bad["first"], allowed)
        if hasattr(documents, "bad"):
            documents.bad = bad
        return tokens

    def _write_tokens(self, folder: Path, encoder: Encoder, documents: Iterable[str], threads: int) -> None:
        def readable() -> Iterator[str]:
            with reading("corpus", "it", OSError, retry=True):  # such an error is the source's and not the cache's
                yield from documents

        texts = with_progress(readable(), self.say, "tokenizing")
        dtype = np.dtype(DTYPES[max(encoder.tokenizer.get_vocab().values()) >= 1 << 16])
        digest, count = hashlib.sha256(), 0
        with (folder / "tokens.bin").open("wb") as file:
            for ids in encode_all(encoder, texts, threads):
                raw = ids.astype(dtype).tobytes()
                file.write(raw)
                digest.update(raw)
                count += len(ids)
        if not count:
            raise UserError(
                "corpus: its training or its validation split has no document (of very few, all may be held out: name "
                "a validation_corpus)"
            )
        if confirm := getattr(documents, "confirm", None):
            confirm()
        bad = getattr(documents, "bad", {"count": 0, "first": ""})
        meta = {"dtype": dtype.str, "tokens": count, "sha256": digest.hexdigest(), "bad": bad}
        write_text(folder / "meta.json", json.dumps({**meta, "self": _sha_of(meta)}))


def too_many(document: BadDocument | str, allowed: int) -> BadDocument:
    """The error about a document that cannot be read, after `allowed` others."""
    rule = "max_bad_documents, which says how many such documents may be left out, is"
    return BadDocument(f"{document}; {rule} {allowed}")


def identity(path: Path) -> tuple[int, ...]:
    """Device, inode, size and both times of change: one changes with the file, or where another takes its place."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _open_tokens(path: Path) -> tuple[np.ndarray, dict[str, Any]] | None:
    """The tokens of an entry, and the record of its bad documents; None where the entry is missing or damaged."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("self") != _sha_of(meta):
            return None
        file, dtype = path / "tokens.bin", np.dtype(meta["dtype"])
        size = file.stat().st_size
        if size != meta["tokens"] * dtype.itemsize or (size <= VERIFIED and sha256_file(file) != meta["sha256"]):
            return None
        return np.memmap(file, dtype=dtype, mode="r"), meta["bad"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _sha_of(meta: dict[str, Any]) -> str:
    return sha256([json.dumps(meta)])[:8]


def take_chunk(texts: Iterator[str]) -> list[str]:
    """The next of `texts`, up to `CHUNK` characters or a little more; empty at their end."""
    chunk: list[str] = []
    size = 0
    while size < CHUNK and (text := next(texts, None)) is not None:
        chunk.append(text)
        size += len(text) + 1  # so that empty ones count too
    return chunk


def encode_all(encoder: Encoder, documents: Iterable[str], threads: int) -> Iterator[np.ndarray]:
    """Token ids of `documents`, in their order, a chunk at a time; `threads` tokenize ahead of the caller."""
    texts = iter(documents)
    ahead: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        while True:
            while len(ahead) < 2 * threads and (chunk := take_chunk(texts)):
                ahead.append(pool.submit(encoder.documents, chunk))
            if not ahead:
                return
            yield ahead.popleft().result()
