"""Safetensors files rewritten piece by piece: some tensors left out, some added, all others as they are.

The library of that name has no writer that streams; the format is a length, a JSON header and the tensors' bytes
(https://github.com/huggingface/safetensors#format). What is written here is read by it alone.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..base.reading import read_json, reading

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE = 1 << 20
"""Bytes that are copied at a time; with 16 times as many, writing took several times as long."""
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
STORED = {name: dtype for dtype, name in _NAMES.items()}
"""Floating point dtypes by their names in the format."""


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Args:
        path: where it is.
        tensors: name → entry of the header: `dtype`, `shape`, `data_offsets`.
        metadata: what the header says besides.
        start: where the tensors' bytes begin.
    """

    path: Path
    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int

    @classmethod
    def read(cls, path: Path) -> "Shard":
        """Read the header of `path`.

        Raises:
            ValueError: it is no whole safetensors file.
        """
        with reading("source", path):
            with safe_open(path, framework="pt"):  # checks that header and size agree
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        return cls(path, header, metadata, 8 + length)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        with safe_open(self.path, framework="pt") as file:
            found: Tensor = file.get_tensor(name).clone()
        return found


def read_shards(folder: Path, named: str | None = None) -> list[Shard]:
    """The weights of a model directory, in the files that Transformers would read.

    Args:
        folder: the directory.
        named: the file or index that the config names, if any; else `model.safetensors`, else the index.

    Raises:
        ValueError: there are none as safetensors, a part is missing, damaged or outside the folder, or two parts have a
            tensor of one name.
    """
    first = named or (SINGLE if (folder / SINGLE).is_file() or not (folder / INDEX).is_file() else INDEX)
    parts = _parts_of(folder / first) if first.endswith(".json") else [first]
    for name in parts:
        if Path(name).is_absolute() or ".." in Path(name).parts or not name.endswith(".safetensors"):
            raise ValueError(f"source: {folder / first} names {name!r}, must be a safetensors file inside {folder}")
    missing = [name for name in parts if not (folder / name).is_file()]
    if missing == [SINGLE]:
        others = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
        hint = f" but {others}, which may run code when it is read: save the model anew with save_pretrained"
        raise ValueError(f"source: {folder} has no {SINGLE}{hint if others else ''}; must have safetensors")
    if missing:
        raise ValueError(f"source: {folder} lacks {', '.join(missing)}: {len(missing)} of {len(parts)} parts")
    shards = [Shard.read(folder / name) for name in parts]
    places: dict[str, Path] = {}
    for shard in shards:
        for name in shard.tensors:
            if places.setdefault(name, shard.path) != shard.path:
                raise ValueError(f"source: {name} is in two parts, {places[name]} and {shard.path}")
    return shards


def _parts_of(index: Path) -> list[str]:
    parts = sorted(set(read_json("source", index, {"weight_map": {"*": str}})["weight_map"].values()))
    if not parts:
        raise ValueError(f"source: {index}: weight_map is empty, must give each tensor the name of a file")
    return parts


def cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`; `name` is what errors call it.

    Raises:
        ValueError: it has numbers that are not finite, or that `dtype` cannot hold.
    """
    if not value.isfinite().all():
        raise ValueError(f"source: {name} has numbers that are not finite")
    result = value.to(dtype)
    if result.dtype != value.dtype and not result.isfinite().all():
        raise ValueError(
            f"dtype: the largest number of {str(dtype).removeprefix('torch.')} is {torch.finfo(dtype).max:g}, "
            f"but {name} has {float(value.abs().max()):g}"
        )
    return result


def rewrite(
    shard: Shard,
    target: Path,
    dropped: set[str],
    added: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> int:
    """Write `shard` to `target`; returns the bytes of its tensors.

    No more than a piece of a tensor is in memory at a time.

    Args:
        shard: what to copy.
        target: a new file.
        dropped: names of tensors to leave out.
        added: tensors to put in as they are, taking the place of those of the same name.
        dtype: of the floating point tensors that are copied; None for what they have.

    Raises:
        ValueError: a tensor has numbers that are not finite, or that `dtype` cannot hold.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **shard.metadata}}
    writes: list[Callable[[BinaryIO], object]] = []
    place = 0

    def put(name: str, kind: str, shape: list[int], size: int, write: Callable[[BinaryIO], object]) -> None:
        nonlocal place
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [place, place + size]}
        writes.append(write)
        place += size

    for name, entry in shard.tensors.items():
        if name in dropped or name in added:
            continue
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if kind not in STORED:
            put(name, kind, shape, end - begin, partial(_copy, shard, begin, end))
        else:
            old, new = STORED[kind], dtype or STORED[kind]
            size = (end - begin) // old.itemsize * new.itemsize
            put(name, _NAMES[new], shape, size, partial(_cast, shard, begin, end, name, old, new))
    for name, value in added.items():
        put(name, _NAMES[value.dtype], list(value.shape), value.nbytes, partial(_store, value))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at a multiple of 8, as the library has it
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for write in writes:
            write(file)
    return place


def _copy(shard: Shard, begin: int, end: int, into: BinaryIO) -> None:
    for piece in _pieces(shard, begin, end):
        into.write(piece)


def _cast(shard: Shard, begin: int, end: int, name: str, old: torch.dtype, new: torch.dtype, into: BinaryIO) -> None:
    for piece in _pieces(shard, begin, end):
        value = cast(name, torch.frombuffer(piece, dtype=old), new)
        if new == old:
            into.write(piece)
        else:
            _store(value, into)


def _pieces(shard: Shard, begin: int, end: int) -> Iterator[bytearray]:
    """The bytes from `begin` to `end`, so many at a time that no number is divided."""
    with shard.path.open("rb") as file:
        file.seek(shard.start + begin)
        while begin < end:
            piece = bytearray(file.read(min(PIECE, end - begin)))
            yield piece
            begin += len(piece)


def _store(tensor: Tensor, into: BinaryIO) -> None:
    """A tensor's bytes as the format has them: little-endian, row by row."""
    whole = save({"x": tensor.contiguous()})
    into.write(whole[8 + int.from_bytes(whole[:8], "little") :])
