"""Text files: the files that a name stands for, and the documents in them. All text files are read here.

A file is .txt (documents of some 64 KiB, cut at empty lines), .jsonl (one document a line) or .parquet (one a row); the
first two may be packed as .gz, .xz or .zst. A byte order mark at the beginning of a file is no text. In the place of a
document that cannot be read comes a `BadDocument`, so that one bad line does not end the reading.
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
PIECE = 1 << 16  # bytes after which a text file is cut at the next empty line
LONGEST_PIECE = 1 << 20  # bytes after which it is cut without one: at their last line break, else their last space
READING = f"2 {PIECE} {LONGEST_PIECE}"  # changes when the same bytes give other documents: part of every text's hash
WAITS = (1, 2, 4, 8, 16, 32)  # seconds between tries after an error that may pass

# The words by which the `datasets` library tells splits apart in names of files and folders.
_OTHER_SPLITS = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing", "eval", "evaluation")}
_MAGIC = re.compile(r"[*?\[]")


class BadDocument(UserError):
    """A document that cannot be read, while those after it can; the message names its place."""


def retried(read: Callable[[], Iterator[T]], pause: Callable[[float], Any] = time.sleep) -> Iterator[T]:
    """The items of `read()`; after a `TryAgain` it is called again, and items given before are passed over.

    The `TryAgain` goes on after `WAITS` without a new item.
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
    """Wait for the next of `waits`, with a word on stderr; raise `error` after the last."""
    seconds = next(waits, None)
    if seconds is None:
        raise error
    print(f"{error}; trying again in {seconds:g} s", file=sys.stderr, flush=True)
    pause(seconds)


def kind_of(path: Path, about: str = "corpus") -> str:
    """.txt, .jsonl or .parquet; UserError for another kind of file, beginning with `about`."""
    name = path.name.lower()
    for kind in KINDS:
        if name.endswith(tuple(kind + packing for packing in (PACKINGS if kind != ".parquet" else ("",)))):
            return kind
    raise UserError(
        f"{about}: got {path}, allowed are {', '.join(KINDS)}, alone or followed by {', '.join(PACKINGS[1:])}"
    )


def read_file(path: Path, field: str = "text", about: str = "corpus") -> Iterator[str | BadDocument]:
    """The documents of one file.

    A line or row has its text under the name `field`; `about` is the setting that errors name.

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
            parts = _pieces(file) if kind == ".txt" else ((f"line {i}", line) for i, line in enumerate(file, 1))
            for place, raw in parts:
                document = _document(raw, kind, field, f"{path}, {place},", about)
                if document is not None:
                    yield document


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


def _document(raw: bytes, kind: str, field: str, where: str, about: str) -> str | BadDocument | None:
    """The text in a piece or line of a file; None for an empty line of JSON."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadDocument(f"{about}: {where} cannot be read: {error}")
    if kind == ".txt":
        return text
    try:
        return text_of(json.loads(text), field, where, about) if text.strip() else None
    except (ValueError, RecursionError) as error:
        return BadDocument(f"{about}: {where} is no JSON: {told(error)}")


def _pieces(file: Any) -> Iterator[tuple[str, bytes]]:
    """The pieces that make up a text file, each with its place in it."""
    piece, start = bytearray(), 0
    while line := file.readline(LONGEST_PIECE - len(piece)):
        piece += line
        if len(piece) >= LONGEST_PIECE:
            length = _cut(piece)
        elif len(piece) >= PIECE and line.endswith(b"\n") and not line.strip():
            length = len(piece)
        else:
            continue
        yield f"bytes {start:,} to {start + length:,}", bytes(piece[:length])
        start += length
        del piece[:length]
    if piece:
        yield f"from byte {start:,} on", bytes(piece)


def _cut(piece: bytearray) -> int:
    """The length at which a piece without an empty line is cut: after its last line break, before its last space, or at
    its end, but never within a character."""
    for length in (piece.rfind(b"\n") + 1, piece.rfind(b" ")):
        if length >= PIECE:
            return length
    end = len(piece)
    while end > len(piece) - 4 and piece[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if piece[end - 1] >= 0xC0 else len(piece)


def _rows(path: Path, field: str, about: str) -> Iterator[str | BadDocument]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if field not in (columns := file.schema_arrow.names):
            raise UserError(f"text_field: got {field!r}, {path} has {', '.join(columns)}")
        cells = (cell for batch in file.iter_batches(batch_size=128, columns=[field]) for cell in batch.column(0))
        for number, cell in enumerate(cells, 1):
            try:
                row = {field: cell.as_py()}
            except UnicodeDecodeError as error:
                yield BadDocument(f"{about}: {path}, row {number}, cannot be read: {error}")
            else:
                yield text_of(row, field, f"{path}, row {number},", about)


def text_of(row: Any, field: str, where: str, about: str = "corpus") -> str | BadDocument:
    """The text of a line or row; `where` is the place that a `BadDocument` names."""
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        return BadDocument(f"text_field: got {field!r}, {where} has no string there (it has {has})")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape
        return BadDocument(f"{about}: {where} is no text: {error}")
    return text


def find_files(name: str) -> dict[str, list[Path]]:
    """The text files that a name stands for, by split: "train", "validation", "test".

    A single file belongs to "train", whatever its name. Files of a folder, and files that a glob matches, are told
    apart as `datasets` does, by the words in their paths below the folder, or below the part of the glob without stars.
    Links are followed; a name that begins with a dot is matched only by a pattern that does.

    Returns:
        Split → its files, ordered by name; empty where there is no such file or folder, or no glob matches.

    Raises:
        UserError: a folder cannot be read, a link leads nowhere or round in a circle.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return {"train": [path]}
    root, pattern = path, tuple[str, ...](("**", "*"))
    if not path.is_dir():
        first = next((i for i, part in enumerate(path.parts) if _MAGIC.search(part)), len(path.parts))
        root, pattern = Path(*path.parts[:first]), path.parts[first:]
        if not pattern or not root.is_dir():
            return {}
        if pattern[-1] == "**":
            pattern = (*pattern, "*")
    splits: dict[str, list[Path]] = {}
    for file in sorted(set(_matched(root, pattern, ()))):
        if path.is_dir():
            try:
                kind_of(file)
            except UserError:
                continue
        splits.setdefault(split_of(str(file.relative_to(root))), []).append(file)
    return splits


def split_of(name: str) -> str:
    """The split that the words in a file's name stand for; "train" where they stand for none."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return next((split for split, marks in _OTHER_SPLITS.items() if words & set(marks)), "train")


def _matched(folder: Path, pattern: tuple[str, ...], above: tuple[str, ...]) -> Iterator[Path]:
    """The files below `folder` that match `pattern`: a glob for each level of folders, `**` for any number of levels.

    `above` holds the real paths of the folders that the same `**` has matched.
    """
    first, rest = pattern[0], pattern[1:]
    with reading("corpus", folder, OSError, retry=True):
        real = os.path.realpath(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    if first == "**":
        if real in above:
            raise UserError(f"corpus: {folder} leads back to a folder that it is in")
        if rest:
            yield from _matched(folder, rest, ())
    for entry in entries:
        if not fnmatchcase(entry.name, "*" if first == "**" else first):
            continue
        if entry.name.startswith(".") and not first.startswith("."):
            continue
        path = folder / entry.name
        with reading("corpus", path, OSError, retry=True):
            is_folder, exists = entry.is_dir(), path.exists()
        if not exists:
            raise UserError(f"corpus: {path} is a link that leads nowhere; remove it, or mend it")
        if is_folder and first == "**":
            yield from _matched(path, pattern, (*above, real))
        elif is_folder and rest:
            yield from _matched(path, rest, ())
        elif not rest and first != "**" and entry.is_file():
            yield path
