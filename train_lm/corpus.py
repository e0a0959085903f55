"""Where text comes from: the embedded corpora, local files, and any dataset of the `datasets` library.

All of them are `Documents`: read from the beginning again and again, or streamed in the part that belongs to one
process.
"""

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hf_ibnorm.checks import nearest
from hf_ibnorm.cli import UserError, bad_input
from hf_ibnorm.data import CORPORA, load_corpus
from hf_ibnorm.files import sha256, sha256_file

if TYPE_CHECKING:
    from datasets import IterableDataset

KINDS = (".txt", ".jsonl", ".parquet")
PACKINGS = ("", ".gz", ".xz", ".zst")
PIECE = 1 << 16
"""Characters after which a text file is cut at the next empty line, so that long ones need not fit into memory."""

# As the `datasets` library tells splits apart by the names of files and folders.
_OTHER_SPLITS = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing", "eval", "evaluation")}


class Documents:
    """The documents of one split, in a fixed order.

    Attributes:
        fingerprint: hash of the text and its order; None where only reading everything would tell.
    """

    fingerprint: str | None = None
    field = "text"

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError

    def stream(self, process: int, processes: int, seed: tuple[int, int]) -> "IterableDataset":
        """This process's part, with the position in it as `state_dict()`; `seed` draws the order of files."""
        raise NotImplementedError

    def rows(self, dataset: "IterableDataset") -> Iterator[dict[str, Any]]:
        """The rows of a `stream`, from where it stands.

        Raises:
            UserError: they cannot be read.
        """
        return iter(dataset)

    def text(self, row: dict[str, Any]) -> str:
        """The text of a row of `stream`."""
        return _text(row, self.field, "corpus")


@dataclass
class Texts(Documents):
    """Documents in memory."""

    texts: list[str]

    def __post_init__(self) -> None:
        self.fingerprint = sha256(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def stream(self, process: int, processes: int, seed: tuple[int, int]) -> "IterableDataset":
        return _split(_generated(_rows_of_texts, list(self.texts), None), process, processes)


@dataclass
class Files(Documents):
    """Documents in local files, in the order of `paths`.

    Args:
        paths: .txt (a document, cut into pieces of some 64 KiB at empty lines), .jsonl (one document a line) or
            .parquet (one a row); the first two also packed as .gz, .xz or .zst.
        field: where a line or row has its text.
        hash_file: content hash of a file, possibly remembered from an earlier run.
    """

    paths: list[Path]
    field: str
    hash_file: Callable[[Path], str] = sha256_file

    def __post_init__(self) -> None:
        kinds = [_kind(path) for path in self.paths]
        self.fingerprint = sha256([self.field, str(PIECE), *kinds, *(self.hash_file(path) for path in self.paths)])

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            yield from read_file(path, self.field)

    def stream(self, process: int, processes: int, seed: tuple[int, int]) -> "IterableDataset":
        import numpy as np

        shuffled = [str(self.paths[i]) for i in np.random.default_rng(seed).permutation(len(self.paths))]
        return _split(_generated(_rows_of_files, shuffled, self.field), process, processes)


@dataclass
class Named(Documents):
    """A split of a dataset of the `datasets` library, loaded or streamed."""

    dataset: Any
    field: str

    def __post_init__(self) -> None:
        columns = self.dataset.column_names
        if columns is not None and self.field not in columns:
            raise UserError(f"text_field: got {self.field!r}, the dataset has {', '.join(columns)}")
        fingerprint = getattr(self.dataset, "_fingerprint", None)  # only a loaded dataset has one
        self.fingerprint = fingerprint and sha256([self.field, fingerprint])

    def __iter__(self) -> Iterator[str]:
        return (self.text(row) for row in self.rows(self.dataset))

    def rows(self, dataset: "IterableDataset") -> Iterator[dict[str, Any]]:
        try:
            yield from dataset
        except Exception as error:  # of many kinds: a file that is gone or damaged, a network that is down
            raise UserError(f"corpus: the dataset cannot be read: {_short(error)}") from error

    def stream(self, process: int, processes: int, seed: tuple[int, int]) -> "IterableDataset":
        return _split(self.dataset, process, processes)


@dataclass
class HeldOut(Documents):
    """Every `every`-th of some documents, beginning with the first; with `rest`, all the others."""

    documents: Documents
    every: int
    rest: bool

    def __post_init__(self) -> None:
        inner = self.documents.fingerprint
        self.fingerprint = inner and sha256([inner, str(self.every), str(self.rest)])

    def __iter__(self) -> Iterator[str]:
        return (text for i, text in enumerate(self.documents) if bool(i % self.every) == self.rest)


def _generated(rows: Callable[..., Iterator[dict[str, str]]], items: list[str], field: str | None) -> "IterableDataset":
    """Rows as an IterableDataset whose shards are `items`."""
    from datasets import IterableDataset

    return IterableDataset.from_generator(rows, gen_kwargs={"items": items, "field": field})


def _rows_of_texts(items: list[str], field: None) -> Iterator[dict[str, str]]:
    return ({"text": text} for text in items)


def _rows_of_files(items: list[str], field: str) -> Iterator[dict[str, str]]:
    for path in items:
        for text in read_file(Path(path), field):
            yield {field: text}


def _split(dataset: "IterableDataset", process: int, processes: int) -> "IterableDataset":
    """This process's shards where they can be dealt out evenly, else one of every `processes` documents."""
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(dataset, process, processes)


def _kind(path: Path) -> str:
    """.txt, .jsonl or .parquet.

    Raises:
        UserError: another kind of file.
    """
    name = path.name.lower()
    for kind in KINDS:
        if any(name.endswith(kind + packing) for packing in (PACKINGS if kind != ".parquet" else ("",))):
            return kind
    raise UserError(
        f"corpus: got {path}, allowed are {', '.join(KINDS)}, alone or followed by {', '.join(PACKINGS[1:])}"
    )


def _open(path: Path) -> IO[str]:
    options: Any = {"mode": "rt", "encoding": "utf-8", "newline": "\n"}
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, **options)
        case ".xz":
            return lzma.open(path, **options)
        case ".zst":
            import pyarrow as pa

            # Python's own binding takes a file that was cut off for one that has ended.
            return TextIOWrapper(pa.input_stream(str(path), compression="zstd"), encoding="utf-8", newline="\n")
    return path.open(**options)


def read_file(path: Path, field: str) -> Iterator[str]:
    """The documents of one file.

    Raises:
        UserError: the file cannot be read, is damaged, or has no text where `field` says; the message names the place.
    """
    import pyarrow as pa

    kind = _kind(path)
    try:
        if kind == ".parquet":
            yield from _parquet(path, field)
            return
        with _open(path) as file:
            yield from _pieces(file) if kind == ".txt" else _lines(file, path, field)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:  # EOFError: cut off
        raise UserError(f"corpus: {path} cannot be read: {_short(error)}") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _pieces(file: IO[str]) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in file:
        piece.append(line)
        size += len(line)
        if size >= PIECE and not line.strip():
            yield "".join(piece)
            piece, size = [], 0
    if text := "".join(piece):
        yield text


def _lines(file: IO[str], path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"corpus: {where} is no JSON: {_short(error)}") from error
            yield _text(row, field, where)


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if field not in (columns := file.schema_arrow.names):
            raise UserError(f"text_field: got {field!r}, {path} has {', '.join(columns)}")
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for row in batch.to_pylist():
                yield _text(row, field, str(path))


def _text(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape
            raise UserError(f"corpus: {where} is no text: {error}") from None
    else:
        has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"text_field: got {field!r}, {where} has no string there (it has {has})")
    return text


@dataclass(frozen=True)
class CorpusOptions:
    """How to read a corpus.

    Args:
        subset: configuration of a dataset.
        field: where a row has its text.
        streaming: read a dataset as it is needed, do not load it first.
        hash_file: content hash of a file.
    """

    subset: str | None
    field: str
    streaming: bool
    hash_file: Callable[[Path], str]


def open_corpus(name: str, role: str, split: str, options: CorpusOptions) -> Documents | None:
    """One split of a corpus; None where it has nothing to validate on.

    Args:
        name: an embedded corpus; a file, glob or folder of files; a dataset saved by `datasets`; or a dataset's name.
        role: "train" or "validation".
        split: what a dataset calls that.
        options: how to read it.

    Raises:
        UserError: there is no such corpus, or it cannot be read.
    """
    if name in CORPORA:
        return Texts(load_corpus(name, role))
    path = Path(name).expanduser()
    with bad_input(
        OSError, ValueError, about=f"corpus: got {name[:100]!r}, "
    ):  # too long for a path, or with a zero byte
        if not name.strip():
            raise ValueError("must name a corpus")
        path.exists()
    if (path / "dataset_dict.json").is_file() or all((path / f).is_file() for f in ("state.json", "dataset_info.json")):
        return _saved(path, role, split, options)
    if path.is_dir():
        paths = _of_split(path, role)
    else:
        paths = [path] if path.is_file() else _glob(path)
        if paths and role != "train":
            return None
    if paths:
        return Files(paths, options.field, options.hash_file)
    if path.is_dir():
        return None
    endings = tuple(kind + packing for kind in KINDS for packing in PACKINGS)
    if name.startswith(("/", "./", "../", "~")) or name.endswith(endings):
        raise UserError(f"corpus: got {name!r}, no such file")
    return _hub(name, role, split, options)


def _glob(path: Path) -> list[Path]:
    if not re.search(r"[*?\[]", str(path)):
        return []
    root = Path(path.anchor) if path.anchor else Path()
    return sorted(found for found in root.glob(str(path.relative_to(path.anchor))) if found.is_file())


def _of_split(folder: Path, split: str) -> list[Path]:
    """The text files of a folder that belong to `split`, told apart by words in their names as `datasets` does."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            try:
                _kind(path)
            except UserError:
                continue
            words = set(re.split(r"[^a-z]+", str(relative).lower()))
            other = next((name for name, marks in _OTHER_SPLITS.items() if words & set(marks)), "train")
            found.setdefault(other, []).append(path)
    if not found.get("train"):
        raise UserError(f"corpus: got {str(folder)!r}, it has no {', '.join(KINDS)} to train on")
    return found.get(split, [])


def _saved(path: Path, role: str, split: str, options: CorpusOptions) -> Documents | None:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"corpus: {path} cannot be read: {_short(error)}") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            return _missing(role, split, list(dataset))
        dataset = dataset[split]
    elif role != "train":
        return None
    return Named(dataset.to_iterable_dataset() if options.streaming else dataset, options.field)


def _hub(name: str, role: str, split: str, options: CorpusOptions) -> Documents | None:
    from datasets import get_dataset_split_names, load_dataset

    try:
        splits = get_dataset_split_names(name, options.subset)
        if split.partition("[")[0] not in splits:
            return _missing(role, split, splits)
        dataset = load_dataset(name, options.subset, split=split, streaming=options.streaming)
    except UserError:
        raise
    except Exception as error:  # of many kinds: not found, offline, gated, a configuration that is not there
        raise UserError(
            f"corpus: got {name!r}, no embedded corpus ({', '.join(CORPORA)}), no file or folder, and no dataset that "
            f"could be loaded{nearest(name, [*CORPORA])}: {_short(error)}"
        ) from error
    return Named(dataset, options.field)


def _missing(role: str, split: str, splits: list[str]) -> None:
    if role == "train":
        raise UserError(f"train_split: got {split!r}, the dataset has {', '.join(splits)}")
