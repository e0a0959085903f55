"""Safetensors files rewritten piece by piece: some tensors left out, some added, all others as they are.

The library of that name has no writer that streams; the format is a length, a JSON header and the tensors' bytes
(https://github.com/huggingface/safetensors#format). Whatever is written here is read by the library alone.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX
from transformers.utils import SAFE_WEIGHTS_NAME as SINGLE

from ..base.reading import read_json, reading

PIECE = 1 << 20  # bytes that are copied at a time; with 16 times as many, writing took several times as long
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
STORED = {name: dtype for dtype, name in _NAMES.items()}  # floating point dtypes by their names in the format


@dataclass(frozen=True)
class Shard:
    """One safetensors file, whose tensors' bytes begin at `start`.

    `tensors` is name → entry of the header: `dtype`, `shape`, `data_offsets`.
    """

    path: Path
    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int

    @classmethod
    def read(cls, path: Path) -> "Shard":
        """Read the header of `path`; ValueError where it is no whole safetensors file."""
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
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor


def read_shards(folder: Path, named: str | None = None) -> list[Shard]:
    """The weights of a model directory, in the files that Transformers would read.

    These are named by the config, if `named`, or else `model.safetensors`, or those of the index.

    Raises:
        ValueError: there are none as safetensors, a part is missing, damaged or outside the folder, or two parts have a
            tensor of one name.
    """
    first = named or (SINGLE if (folder / SINGLE).is_file() or not (folder / INDEX).is_file() else INDEX)
    parts = [first]
    if first.endswith(".json"):
        index = folder / first
        parts = sorted(set(read_json("source", index, {"weight_map": {"*": str}})["weight_map"].values()))
        if not parts:
            raise ValueError(f"source: {index}: weight_map is empty, must give each tensor the name of a file")
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


def cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`; errors call it `name`.

    Raises:
        ValueError: it has numbers that are not finite, or that `dtype` cannot hold.
    """
    if not value.isfinite().all():
        raise ValueError(f"source: {name} has numbers that are not finite")
    result = value.to(dtype)
    if result.dtype != value.dtype and not result.isfinite().all():
        kind, most, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max, float(value.abs().max())
        raise ValueError(f"dtype: the largest number of {kind} is {most:g}, but {name} has {largest:g}")
    return result


def rewrite(
    shard: Shard, target: Path, dropped: set[str], added: Mapping[str, Tensor], dtype: torch.dtype | None
) -> int:
    """Write `shard` to `target`; returns the bytes of its tensors. At most a piece of a tensor is in memory at a time.

    Args:
        dropped: names of tensors to leave out.
        added: tensors to put in as they are, in place of any of the same name.
        dtype: of the copied floating point tensors; None to keep theirs.

    Raises:
        ValueError: as `cast`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **shard.metadata}}
    contents: list[Iterable[bytes | bytearray]] = []
    total = 0

    def put(name: str, kind: str, shape: list[int], size: int, content: Iterable[bytes | bytearray]) -> None:
        nonlocal total
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [total, total + size]}
        contents.append(content)
        total += size

    for name, entry in shard.tensors.items():
        if name in dropped or name in added:
            continue
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        pieces = _pieces(shard, begin, end)
        if kind not in STORED:
            put(name, kind, shape, end - begin, pieces)
        else:
            old, new = STORED[kind], dtype or STORED[kind]
            put(name, _NAMES[new], shape, (end - begin) // old.itemsize * new.itemsize, _cast(name, pieces, old, new))
    for name, value in added.items():
        put(name, _NAMES[value.dtype], list(value.shape), value.nbytes, map(_bytes_of, [value]))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at a multiple of 8, as the library has it
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for content in contents:
            file.writelines(content)
    return total


def _pieces(shard: Shard, begin: int, end: int) -> Iterator[bytearray]:
    """The bytes from `begin` to `end`, in pieces that divide no number."""
    with shard.path.open("rb") as file:
        file.seek(shard.start + begin)
        while begin < end:
            piece = bytearray(file.read(min(PIECE, end - begin)))
            yield piece
            begin += len(piece)


def _cast(name: str, pieces: Iterable[bytearray], old: torch.dtype, new: torch.dtype) -> Iterator[bytes | bytearray]:
    for piece in pieces:
        value = cast(name, torch.frombuffer(piece, dtype=old), new)
        yield piece if new == old else _bytes_of(value)


def _bytes_of(tensor: Tensor) -> bytes:
    """A tensor's bytes as the format has them: little-endian, row by row."""
    file = save({"x": tensor.contiguous()})
    return file[8 + int.from_bytes(file[:8], "little") :]
