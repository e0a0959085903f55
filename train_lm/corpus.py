"""Where text comes from: the embedded corpora, local files, and any dataset of the `datasets` library.

All of them are `Documents`: read from the beginning again and again, or streamed.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_ibnorm.base.errors import TryAgain, UserError
from hf_ibnorm.base.files import sha256, sha256_file
from hf_ibnorm.base.reading import may_pass, reading, told
from hf_ibnorm.checks import nearest
from hf_ibnorm.data import CORPORA, load_corpus
from hf_ibnorm.data.files import (
    KINDS,
    PACKINGS,
    READING,
    BadDocument,
    find_files,
    kind_of,
    read_file,
    retried,
    split_of,
    text_of,
)

from .cache import identity, too_many

if TYPE_CHECKING:
    from datasets import IterableDataset

_BAD = "\0bad"  # key of a row of a stream that has no text: its value says why
NO_BAD: Mapping[str, Any] = {"count": 0, "first": ""}  # `Documents.bad` where every document can be read


class Documents:
    """The documents of one split, in a fixed order; where they cannot be read, a method raises UserError, or TryAgain
    for a reason that may pass."""

    fingerprint: str | None = None  # hash of the text and its order; None where only reading everything would tell
    field = "text"  # the field of a row that has the text
    allowed = 0  # how many documents of a pass may be left out because they cannot be read
    bad = NO_BAD  # number of documents left out of the last pass, and the error of the first

    def read(self) -> Iterator[str | BadDocument]:
        """Every document from the beginning."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        """The texts from the beginning; reads are tried again, and up to `allowed` bad documents left out."""
        self.bad = NO_BAD
        for document in retried(self.read):
            if not isinstance(document, BadDocument):
                yield document
            elif self.bad["count"] >= self.allowed:
                raise too_many(document, self.allowed)
            else:
                self.bad = {"count": self.bad["count"] + 1, "first": self.bad["first"] or str(document)}

    def confirm(self) -> None:
        """Raise UserError where the source has changed since `fingerprint` was computed."""

    def stream(self, seed: tuple[int, int]) -> "IterableDataset":
        """The documents as rows, with the position among them as `state_dict()`; `seed` draws the order of files."""
        raise NotImplementedError

    def rows(self, dataset: "IterableDataset") -> Iterator[dict[str, Any]]:
        """The rows of a `stream`, or of a part of it, from its position on."""
        return iter(dataset)

    def text(self, row: dict[str, Any]) -> str | BadDocument:
        """The text of a row of `stream`."""
        return BadDocument(row[_BAD]) if _BAD in row else text_of(row, self.field, "the dataset")


@dataclass
class Texts(Documents):
    """Documents in memory."""

    texts: list[str]

    def __post_init__(self) -> None:
        self.fingerprint = sha256(self.texts)

    def read(self) -> Iterator[str | BadDocument]:
        return iter(self.texts)

    def stream(self, seed: tuple[int, int]) -> "IterableDataset":
        return _generated(_rows_of_texts, list(self.texts), "text")


@dataclass
class Files(Documents):
    """Documents in local files, in the order of `paths`."""

    paths: list[Path]
    field: str
    hash_file: Callable[[Path], str] = sha256_file  # may remember the hash from an earlier run
    allowed: int = 0
    shas: list[str] = dataclasses.field(init=False, repr=False)  # hashes of the files' contents

    def __post_init__(self) -> None:
        kinds = [kind_of(path) for path in self.paths]
        self._identities = self._identify()
        self.shas = [self.hash_file(path) for path in self.paths]
        self.fingerprint = sha256([self.field, READING, *kinds, *self.shas])

    def _identify(self) -> dict[Path, tuple[int, ...]]:
        identities = {}
        for path in self.paths:
            with reading("corpus", path, OSError, retry=True):
                identities[path] = identity(path)
        return identities

    def read(self) -> Iterator[str | BadDocument]:
        for path in self.paths:
            yield from read_file(path, self.field)

    def confirm(self) -> None:
        for path, now in self._identify().items():
            if now != self._identities[path]:
                raise UserError(f"corpus: {path} has changed while it was read; start again when it no longer does")

    def stream(self, seed: tuple[int, int]) -> "IterableDataset":
        shuffled = [str(self.paths[i]) for i in np.random.default_rng(seed).permutation(len(self.paths))]
        return _generated(_rows_of_files, shuffled, self.field)


@dataclass
class Named(Documents):
    """A split of a dataset of the `datasets` library, loaded or streamed."""

    dataset: Any
    field: str
    allowed: int = 0
    content: str | None = None  # hash of the content of its files; without it the library's own fingerprint stands in

    def __post_init__(self) -> None:
        columns = self.dataset.column_names
        if columns is not None and self.field not in columns:
            raise UserError(f"text_field: got {self.field!r}, the dataset has {', '.join(columns)}")
        fingerprint = getattr(self.dataset, "_fingerprint", None)  # only a loaded dataset has one
        self.fingerprint = fingerprint and sha256([self.field, self.content or fingerprint])

    def read(self) -> Iterator[str | BadDocument]:
        return (self.text(row) for row in self.rows(self.dataset))

    def rows(self, dataset: "IterableDataset") -> Iterator[dict[str, Any]]:
        try:
            yield from dataset
        except Exception as error:  # of many kinds: a file that is gone or damaged, a network that is down
            kind = TryAgain if may_pass(error) else UserError
            raise kind(f"corpus: the dataset cannot be read: {told(error)}") from error

    def stream(self, seed: tuple[int, int]) -> "IterableDataset":
        return self.dataset


@dataclass
class HeldOut(Documents):
    """Every `every`-th of some documents, beginning with the first; with `rest`, all the others."""

    documents: Documents
    every: int
    rest: bool

    def __post_init__(self) -> None:
        inner = self.documents.fingerprint
        self.fingerprint = inner and sha256([inner, str(self.every), str(self.rest)])
        self.allowed = self.documents.allowed

    def __iter__(self) -> Iterator[str]:
        yield from (text for i, text in enumerate(self.documents) if bool(i % self.every) == self.rest)
        self.bad = self.documents.bad

    def confirm(self) -> None:
        self.documents.confirm()


def _generated(rows: Callable[..., Iterator[dict[str, str]]], items: list[str], field: str) -> "IterableDataset":
    """The `rows` of all `items` as an IterableDataset, in which an item is a shard."""
    from datasets import IterableDataset

    return IterableDataset.from_generator(rows, gen_kwargs={"items": items, "field": field})


def _rows_of_texts(items: list[str], field: str) -> Iterator[dict[str, str]]:
    return ({field: text} for text in items)


def _rows_of_files(items: list[str], field: str) -> Iterator[dict[str, str]]:
    for path in items:
        for text in read_file(Path(path), field):
            yield {_BAD: str(text)} if isinstance(text, BadDocument) else {field: text}


@dataclass(frozen=True)
class CorpusOptions:
    """How to read a corpus."""

    subset: str | None  # configuration of a dataset
    field: str  # the field of a row that has the text
    streaming: bool  # whether a dataset is read while it is used, and not loaded first
    hash_file: Callable[[Path], str]  # content hash of a file
    allowed: int = 0  # how many documents of a pass may be left out because they cannot be read
    say: Callable[[str], object] = lambda line: None  # gets a line about files that are left out


def open_corpus(name: str, role: str, split: str, options: CorpusOptions) -> Documents | None:
    """One split of a corpus; None where the corpus has nothing to validate on, UserError where it cannot be read.

    Args:
        name: an embedded corpus; a file, glob or folder of files; a dataset saved by `datasets`; or a dataset's name.
        role: "train"; "validation", the split of a corpus that has others too; or "alone", of a validation corpus.
        split: the dataset's own name of the split.
        options: how to read the corpus.
    """
    if name in CORPORA:
        return Texts(load_corpus(name, "train" if role == "train" else "validation"))
    path = Path(os.path.expanduser(name))
    if not name.strip():
        raise UserError(f"corpus: got {name!r}, must name a corpus")
    with reading("corpus", name[:100]):  # a name may be too long for a path, hold a zero byte, or be closed to us
        notes = [(path / file).is_file() for file in ("dataset_dict.json", "state.json", "dataset_info.json")]
    if notes[0] or all(notes[1:]):
        return _saved(path, role, split, options)
    if files := find_files(name):
        if options.subset is not None:
            raise UserError(f"corpus_config: got {options.subset!r}, which files have none of; leave it out")
        paths = _of_split(name, files, role, options.say)
        return Files(paths, options.field, options.hash_file, options.allowed) if paths else None
    if path.is_dir():
        raise UserError(f"corpus: got {name!r}, it has no {', '.join(KINDS)} to train on")
    endings = tuple(kind + packing for kind in KINDS for packing in PACKINGS)
    if name.startswith(("/", "./", "../", "~")) or name.endswith(endings):
        raise UserError(f"corpus: got {name!r}, no such file")
    return open_dataset(name, role, split, options)


def _of_split(name: str, files: dict[str, list[Path]], role: str, say: Callable[[str], object]) -> list[Path]:
    """The files for `role`; `say` gets a line about files that are not trained on."""
    if role == "alone":  # files that were named to be validated on, whatever their names say
        return next(filter(None, (files.get(split) for split in ("validation", "train", "test"))), [])
    others = {split: files[split] for split in ("validation", "test") if files.get(split)}
    named = "; ".join(f"{split}: {_listed(paths)}" for split, paths in others.items())
    if not files.get("train") and not files.get(role):
        raise UserError(
            f"corpus: got {name!r}, it has no {', '.join(KINDS)} to train on, by their names they are for {named}; "
            "name a single file to train on it all the same"
        )
    if role == "train" and named:
        say(f"corpus: by their names these files of {name} are not trained on: {named}")
    split = split_of(Path(name).name)
    if role == "train" and split != "train" and files["train"] == [Path(os.path.expanduser(name))]:
        say(f"WARNING: corpus: {name} is trained on, while its name says {split}")
    return files.get(role, [])


def _listed(paths: list[Path]) -> str:
    shown = ", ".join(str(path) for path in paths[:5])
    return shown if len(paths) <= 5 else f"{shown} and {len(paths) - 5} more"


def overlap(train: Documents, validation: Documents) -> str:
    """The validation text that is training text too, in words for a warning; "" where none is known."""
    if train.fingerprint is not None and train.fingerprint == validation.fingerprint:
        return "all of it"
    if isinstance(train, Files) and isinstance(validation, Files):
        return _listed([path for path, sha in zip(validation.paths, validation.shas, strict=True) if sha in train.shas])
    return ""


def _saved(path: Path, role: str, split: str, options: CorpusOptions) -> Documents | None:
    from datasets import DatasetDict, load_from_disk

    with reading("corpus", path, retry=True):
        dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            return _missing(role, split, list(dataset))
        dataset = dataset[split]
    elif role != "train":
        return None
    # The library's own fingerprint is a note beside the files, which stays when they are replaced.
    content = dataset.cache_files and sha256(options.hash_file(Path(file["filename"])) for file in dataset.cache_files)
    if options.streaming:
        dataset = dataset.to_iterable_dataset()
    return Named(dataset, options.field, options.allowed, content)


def open_dataset(name: str, role: str, split: str, options: CorpusOptions) -> Documents | None:
    """`open_corpus` for the name of a dataset on the Hub, or of one that `datasets` finds otherwise."""
    from datasets import get_dataset_split_names, load_dataset
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        splits = get_dataset_split_names(name, options.subset)
        if split.partition("[")[0] not in splits:
            return _missing(role, split, splits)
        dataset = load_dataset(name, options.subset, split=split, streaming=options.streaming)
    except UserError:
        raise
    except Exception as error:  # of many kinds: not found, offline, gated, an unknown configuration
        again = may_pass(error) and not isinstance(error, OfflineModeIsEnabled)
        raise (TryAgain if again else UserError)(
            f"corpus: got {name!r}, no embedded corpus ({', '.join(CORPORA)}), no file or folder, and no dataset that "
            f"could be loaded{nearest(name, [*CORPORA])}: {told(error)}"
        ) from error
    return Named(dataset, options.field, options.allowed)


def _missing(role: str, split: str, splits: list[str]) -> Documents | None:
    """None, for a dataset without the split to validate on; without the split to train on, UserError."""
    if role == "train":
        raise UserError(f"train_split: got {split!r}, the dataset has {', '.join(splits)}")
    return None
