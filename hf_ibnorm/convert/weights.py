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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

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
        try:
            with safe_open(path, framework="pt"):  # checks that header and size agree
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"source: {path} cannot be read: {error}") from error
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


def read_shards(folder: Path) -> list[Shard]:
    """The weights of a model directory.

    Raises:
        ValueError: there are none as safetensors, or a part of them is missing or damaged.
    """
    if (folder / INDEX).is_file():
        try:
            parts = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in parts if not (folder / name).is_file()]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"source: {folder / INDEX} is damaged: {error}") from error
    else:
        parts = [SINGLE]
        missing = [name for name in parts if not (folder / name).is_file()]
    if missing == [SINGLE]:
        others = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
        hint = f" but {others}, which may run code when it is read: save the model anew with save_pretrained"
        raise ValueError(f"source: {folder} has no {SINGLE}{hint if others else ''}; must have safetensors")
    if missing:
        raise ValueError(f"source: {folder} lacks {', '.join(missing)}: {len(missing)} of {len(parts)} parts")
    return [Shard.read(folder / name) for name in parts]


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
        added: tensors to put in, taking the place of those of the same name.
        dtype: of the floating point tensors; None for what they have.
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
        if dtype is None or kind not in STORED or STORED[kind] == dtype:
            put(name, kind, shape, end - begin, partial(_copy, shard, begin, end))
        else:
            size = (end - begin) // STORED[kind].itemsize * dtype.itemsize
            put(name, _NAMES[dtype], shape, size, partial(_cast, shard, begin, end, STORED[kind], dtype))
    for name, tensor in added.items():
        value = tensor if dtype is None else tensor.to(dtype)
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


def _cast(shard: Shard, begin: int, end: int, old: torch.dtype, new: torch.dtype, into: BinaryIO) -> None:
    for piece in _pieces(shard, begin, end):
        _store(torch.frombuffer(piece, dtype=old).to(new), into)


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
