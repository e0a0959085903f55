"""Text in files: which files a name stands for, and the documents in them. All text of the house is read here.

A file is .txt (documents of some 64 KiB, cut at empty lines), .jsonl (one document a line) or .parquet (one a row); the
first two may be packed as .gz, .xz or .zst. A document that cannot be read is given in its place as a `BadDocument`, so
that one bad line need not be the end of all the others. A byte order mark at the beginning of a file is no text.
"""

import gzip
import json
import lzma
import os
import re
import sys
import time
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ..base.command import require_extra
from ..base.errors import TryAgain, UserError
from ..base.reading import reading, told

T = TypeVar("T")
KINDS = (".txt", ".jsonl", ".parquet")
PACKINGS = ("", ".gz", ".xz", ".zst")
PIECE = 1 << 16
"""Bytes after which a text file is cut at the next empty line."""
LONGEST_PIECE = 1 << 20
"""Bytes after which it is cut where there is no empty line: at the last line break of them, else the last space."""
READING = f"2 {PIECE} {LONGEST_PIECE}"
"""Changes with every change of what is read from the same bytes: part of every hash that stands for a text."""
WAITS = (1, 2, 4, 8, 16, 32)
"""Seconds between the tries to read what could not be read for a reason that may pass."""

# As the `datasets` library tells splits apart by the names of files and folders.
_OTHER_SPLITS = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing", "eval", "evaluation")}
_MAGIC = re.compile(r"[*?\[]")


class BadDocument(UserError):
    """A document that cannot be read, while those after it can; the message names its place."""


def retried(read: Callable[[], Iterator[T]], pause: Callable[[float], Any] = time.sleep) -> Iterator[T]:
    """What `read()` gives; where that ends with `TryAgain` it is called again, and what was given is passed over.

    Raises:
        TryAgain: after `WAITS` without anything new.
    """
    given, waits = 0, iter(WAITS)
    while True:
        try:
            for item in islice(read(), given, None):
                yield item
                given, waits = given + 1, iter(WAITS)
            return
        except TryAgain as error:
            wait_or_raise(error, waits, pause)


def wait_or_raise(error: TryAgain, waits: Iterator[float], pause: Callable[[float], Any]) -> None:
    """Wait for as long as `waits` says next, with a word; raise `error` where it says nothing more."""
    seconds = next(waits, None)
    if seconds is None:
        raise error
    print(f"{error}; trying again in {seconds:g} s", file=sys.stderr, flush=True)
    pause(seconds)


def kind_of(path: Path, about: str = "corpus") -> str:
    """.txt, .jsonl or .parquet.

    Raises:
        UserError: another kind of file.
    """
    name = path.name.lower()
    for kind in KINDS:
        if any(name.endswith(kind + packing) for packing in (PACKINGS if kind != ".parquet" else ("",))):
            return kind
    raise UserError(
        f"{about}: got {path}, allowed are {', '.join(KINDS)}, alone or followed by {', '.join(PACKINGS[1:])}"
    )


def read_file(path: Path, field: str = "text", about: str = "corpus") -> Iterator[str | BadDocument]:
    """The documents of one file.

    Args:
        path: the file.
        field: where a line or row has its text.
        about: the field that errors name.

    Raises:
        UserError: the file cannot be read, or is damaged.
        TryAgain: it cannot be read for a reason that may pass.
    """
    kind = kind_of(path, about)
    damage: tuple[type[Exception], ...] = (EOFError, ValueError, lzma.LZMAError, zlib.error)  # EOFError: cut off
    if kind == ".parquet" or path.suffix.lower() == ".zst":
        require_extra("train", "pyarrow")
        import pyarrow as pa

        damage = (*damage, pa.ArrowException)
    with reading(about, path, OSError, *damage, retry=True):
        if kind == ".parquet":
            yield from _rows(path, field, about)
            return
        with _open(path) as file:
            if file.peek(len(BOM_UTF8)).startswith(BOM_UTF8):
                file.read(len(BOM_UTF8))
            yield from _pieces(file, path, about) if kind == ".txt" else _lines(file, path, field, about)


def _open(path: Path) -> Any:
    """The file as a buffered stream of bytes, unpacked."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
            import pyarrow as pa

            # Python's own binding takes a file that was cut off for one that has ended.
            return BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _pieces(file: Any, path: Path, about: str) -> Iterator[str | BadDocument]:
    """The pieces of a text file; together they are all of it."""
    piece, place = bytearray(), 0
    while line := file.readline(LONGEST_PIECE - len(piece)):
        piece += line
        if len(piece) >= LONGEST_PIECE:
            end = _cut(piece)
        elif len(piece) >= PIECE and line.endswith(b"\n") and not line.strip():
            end = len(piece)
        else:
            continue
        yield _decoded(bytes(piece[:end]), f"{path}, bytes {place:,} to {place + end:,},", about)
        place += end
        del piece[:end]
    if piece:
        yield _decoded(bytes(piece), f"{path}, from byte {place:,} on,", about)


def _cut(piece: bytearray) -> int:
    """Where a piece without an empty line is cut: after its last line break, before its last space, or at its end, but
    never within a character."""
    if (end := piece.rfind(b"\n") + 1) >= PIECE:
        return end
    if (end := piece.rfind(b" ")) >= PIECE:
        return end
    end = len(piece)
    while end > len(piece) - 4 and piece[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if piece[end - 1] >= 0xC0 else len(piece)


def _decoded(raw: bytes, where: str, about: str) -> str | BadDocument:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadDocument(f"{about}: {where} cannot be read: {error}")


def _lines(file: Any, path: Path, field: str, about: str) -> Iterator[str | BadDocument]:
    for number, raw in enumerate(file, 1):
        where = f"{path}, line {number},"
        line = _decoded(raw, where, about)
        if isinstance(line, BadDocument):
            yield line
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield BadDocument(f"{about}: {where} is no JSON: {told(error)}")
            else:
                yield text_of(row, field, where, about)


def _rows(path: Path, field: str, about: str) -> Iterator[str | BadDocument]:
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if field not in (columns := file.schema_arrow.names):
            raise UserError(f"text_field: got {field!r}, {path} has {', '.join(columns)}")
        for batch in file.iter_batches(batch_size=128, columns=[field]):
            for cell in batch.column(0):
                number += 1
                try:
                    row = {field: cell.as_py()}
                except UnicodeDecodeError as error:
                    yield BadDocument(f"{about}: {path}, row {number}, cannot be read: {error}")
                else:
                    yield text_of(row, field, f"{path}, row {number},", about)


def text_of(row: Any, field: str, where: str, about: str = "corpus") -> str | BadDocument:
    """The text of a line or row; `where` it stands is what a `BadDocument` says."""
    text = row.get(field) if isinstance(row, dict) else None
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape
            return BadDocument(f"{about}: {where} is no text: {error}")
        return text
    has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    return BadDocument(f"text_field: got {field!r}, {where} has no string there (it has {has})")


def find_files(name: str, about: str = "corpus") -> dict[str, list[Path]]:
    """The text files that a name stands for, by split: "train", "validation", "test".

    A file is a file of "train", whatever it is called. Those of a folder, and those that a glob matches, are told apart
    by the words in their names below the folder, or below what no star stands in, as `datasets` does. Links are
    followed; names that begin with a dot are matched by such patterns only.

    Returns:
        Split → its files, ordered by name; empty where there is no such file or folder, or no glob matches.

    Raises:
        UserError: a folder cannot be read, a link leads nowhere or round in a circle.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return {"train": [path]}
    if path.is_dir():
        root, pattern = path, tuple[str, ...](("**", "*"))
    elif _MAGIC.search(str(path)):
        parts = path.parts
        first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
        root, pattern = Path(*parts[:first]), parts[first:]
        if pattern[-1] == "**":
            pattern = (*pattern, "*")
        if not root.is_dir():
            return {}
    else:
        return {}
    found: dict[str, list[Path]] = {}
    for each in sorted(set(_matched(root, pattern, (), about))):
        if path.is_dir():
            try:
                kind_of(each)
            except UserError:
                continue
        found.setdefault(split_of(str(each.relative_to(root))), []).append(each)
    return found


def split_of(name: str) -> str:
    """The split that the words in a file's name say: "train" where they say nothing."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return next((split for split, marks in _OTHER_SPLITS.items() if words & set(marks)), "train")


def _matched(folder: Path, pattern: tuple[str, ...], above: tuple[str, ...], about: str) -> Iterator[Path]:
    """The files below `folder` whose names match `pattern`, a glob for each folder on the way; `**` for any number."""
    first, rest = pattern[0], pattern[1:]
    with reading(about, folder, OSError, retry=True):
        real = os.path.realpath(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    if first == "**":
        if real in above:
            raise UserError(f"{about}: {folder} leads back to a folder that it is in")
        if rest:
            yield from _matched(folder, rest, (), about)
    for entry in entries:
        if not fnmatchcase(entry.name, "*" if first == "**" else first):
            continue
        if entry.name.startswith(".") and not first.startswith("."):
            continue
        path = folder / entry.name
        with reading(about, path, OSError, retry=True):
            is_folder, is_there = entry.is_dir(), path.exists()
        if not is_there:
            raise UserError(f"{about}: {path} is a link that leads nowhere; remove it, or mend it")
        if is_folder and first == "**":
            yield from _matched(path, pattern, (*above, real), about)
        elif is_folder and rest:
            yield from _matched(path, rest, (), about)
        elif not rest and first != "**" and entry.is_file():
            yield path
