"""Files and what goes into them: atomic writes, hashes, locks. Imports torch where it must."""

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# os.umask sets the mask of the whole process while it reads it: so it is read once, before there are threads.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all: a temporary file beside it, flushed, then renamed."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` whole or not at all: a temporary file beside it, flushed, then renamed."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a rename inside `folder` to the disk, where the system can open folders at all."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; NaN and infinities are refused, JSON has none."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(parts: Iterable[bytes | str]) -> str:
    """Hex digest of `parts`, each preceded by its length, so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tensors(tensors: Iterable[tuple[str, "Tensor"]]) -> str:
    """Hex digest of named tensors: names, dtypes, shapes and bits."""
    import torch

    def parts() -> Iterator[bytes | str]:
        for name, tensor in tensors:  # one at a time: together they may fill the memory
            value = tensor.detach().cpu().contiguous()
            yield from (name, str(value.dtype), str(tuple(value.shape)))
            yield value.reshape(-1).view(torch.uint8).numpy().tobytes()

    return sha256(parts())


@contextmanager
def atomic_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """Fill a directory whole or not at all: yields a temporary one beside `path`, flushed and renamed at the end.

    Unless it may replace one, those of processes that were killed while they filled `path` are removed first.

    Args:
        path: the directory to make.
        replace: whether it may take the place of one that is there.

    Raises:
        FileExistsError: `path` exists and is not empty, and `replace` is false.
    """
    if not replace:
        _remove_abandoned(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    held = _lock(temporary)
    temporary.chmod(0o777 & ~_UMASK)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner may read
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            elif file.is_dir():
                sync_folder(file)
        sync_folder(temporary)
        aside = None
        if os.path.lexists(path) and not _is_empty_folder(path):
            if not replace:
                raise FileExistsError(f"{path} is not empty")
            aside = set_aside(path)
        os.rename(temporary, path)
        if aside is not None:
            remove(aside)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if held is not None:
            os.close(held)
    sync_folder(path.parent)


def set_aside(path: Path) -> Path:
    """Rename `path`, whatever it is, at once to a new hidden name beside it, which is returned."""
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")) / path.name
    os.rename(path, aside)
    return aside.parent


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _lock(folder: Path) -> int | None:
    """A handle that holds `folder` locked until it is closed or the process ends; None where that cannot be had."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # not on Windows
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed have left of `path`: temporary directories that nobody holds locked."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.{'[a-z0-9_]' * 8}"):
        if folder.is_dir() and not folder.is_symlink() and (held := _lock(folder)) is not None:
            with suppress(OSError):  # another's, or another process removes it as well
                shutil.rmtree(folder)
            os.close(held)


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def check_new_directory(field: str, path: Path, hint: str = "") -> None:
    """Raise OSError unless `path` can become a new directory: absent or empty, and something can be written there.

    Nothing is left behind; `field` opens the message, `hint` ends that about a directory that is not empty.
    """
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{field}: {path} is not empty; name a new directory{hint}")
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise NotADirectoryError(f"{field}: {path} is no directory; name a new one")
    above = existing_folder(path)
    try:  # permissions alone do not tell: root, read-only and virtual file systems
        os.rmdir(tempfile.mkdtemp(dir=above))
    except OSError as error:
        raise type(error)(f"{field}: {path} cannot be written, {above}: {error.strerror}") from None


@contextmanager
def alone_in(folder: Path, complaint: str, timeout: float = 0.0) -> Iterator[None]:
    """Keep other processes that ask for the same out of a directory, which would take this one's files for leftovers.

    Args:
        folder: the directory; it gets a file `.lock`, which stays.
        complaint: what is said where another process is at work in it.
        timeout: seconds to wait for that to end.

    Raises:
        UserError: another process is at work in it.
    """
    from filelock import FileLock, Timeout

    held = FileLock(folder / ".lock", timeout=timeout)
    try:
        held.acquire()
    except Timeout:
        raise UserError(complaint) from None
    try:
        yield
    finally:
        held.release()
