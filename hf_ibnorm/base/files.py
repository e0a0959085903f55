"""Files and their content: atomic writes, hashes, locks. Imports torch only where tensors are hashed."""

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

# os.umask sets the mask of the whole process while it reads the old one: so it is called before there are threads.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_text(path: Path, text: str) -> None:
    """Write `text` as `write_bytes` does, in UTF-8."""
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
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Flush a rename inside `folder` to the disk, on a system that can open folders."""
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

    Folders above `path` are made. An old directory there is replaced if `replace`; otherwise temporary directories of
    processes that were killed while they filled `path` are removed first.

    Raises:
        FileExistsError: `path` exists and is not empty, and `replace` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not replace:
        _remove_abandoned(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    lock = _lock(temporary)
    temporary.chmod(0o777 & ~_UMASK)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner may read
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            elif file.is_dir():
                _sync(file)
        _sync(temporary)
        aside = None
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
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
        if lock is not None:
            os.close(lock)
    _sync(path.parent)


def set_aside(path: Path) -> Path:
    """Move a file, folder or link in one step into a new hidden folder beside it, which is returned."""
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.rename(path, aside / path.name)
    return aside


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link, without the link's target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _lock(folder: Path) -> int | None:
    """A handle that locks `folder` until it is closed or the process ends; None where the lock cannot be had."""
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
    """Remove the temporary directories of `path` that no living process has locked."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.{'[a-z0-9_]' * 8}"):
        if folder.is_dir() and not folder.is_symlink() and (lock := _lock(folder)) is not None:
            with suppress(OSError):  # another user's, or another process removes it as well
                shutil.rmtree(folder)
            os.close(lock)


def existing_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def check_new_directory(field: str, path: Path, hint: str = "") -> None:
    """Raise OSError unless `path` can become a new directory: absent or empty, and something can be written there.

    Nothing is left behind; `field` opens the message, `hint` ends the message about a directory that is not empty.
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
    """Lock a directory, by a file `.lock` that stays, against processes that would take our files for leftovers.

    UserError with the message `complaint` where another process has the lock for `timeout` seconds.
    """
    from filelock import FileLock, Timeout

    try:
        lock = FileLock(folder / ".lock", timeout=timeout).acquire()
    except Timeout:
        raise UserError(complaint) from None
    with lock:
        yield
