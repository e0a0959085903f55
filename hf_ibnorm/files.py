"""Files and what goes into them: atomic writes, hashes, the record of the environment. Imports torch where it must."""

import glob
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Asking for the mask sets it for the whole process: once, before there are threads.
_UMASK = os.umask(0)
os.umask(_UMASK)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of which every tokenizer has that Transformers saves."""

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "datasets",
    "safetensors",
    "lm_eval",
    "jsonargparse",
    "numpy",
    "scipy",
    "triton",
)


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


def git_revision(folder: Path) -> str | None:
    """Commit of the checkout that holds `folder`, with "-dirty" where tracked files differ; None outside one."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed into some other project's checkout, that project's commit would be a lie.
    if git("ls-files", "--error-unmatch", str(Path(__file__))) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return commit and commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def _norm_backends() -> dict[str, str]:
    """What runs the norms on each kind of device there is: fused kernels and their build, or "reference" and why."""
    import torch

    from .kernels import describe

    return {kind: describe(kind) for kind in (("cuda", "cpu") if torch.cuda.is_available() else ("cpu",))}


def package_versions() -> dict[str, str | None]:
    """Versions of this package, Python and `PACKAGES`; None where one is not installed."""
    from .version import __version__

    installed = {package: _version(package) for package in PACKAGES}
    return {"hf_ibnorm": __version__, "python": platform.python_version(), **installed}


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment_record() -> dict[str, Any]:
    """What a result depends on besides its own settings: versions, device, threads, norm backends, git revision."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "device_count": torch.cuda.device_count() if cuda else 1,
        "cuda": torch.version.cuda if cuda else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "norm_backend": _norm_backends(),
        "git_revision": git_revision(Path(__file__).parent),
        "command": sys.argv,
    }


def numerics_record() -> dict[str, Any]:
    """What the bits of a computation depend on besides its input: software, kind of device, threads, norm backend."""
    import torch

    versions = package_versions()
    if torch.cuda.is_available():
        device: dict[str, Any] = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        device = {"device": f"{cpu_name()}, {capability}", "threads": torch.get_num_threads()}
    kept = {name: versions[name] for name in ("hf_ibnorm", "torch", "transformers", "accelerate")}
    # The first is the device that trains. Why there are no kernels does not change what the formulas compute.
    backend = next(iter(_norm_backends().values()))
    return {**kept, **device, "norm_backend": backend if backend.startswith("fused") else "reference"}


def cpu_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


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


def has_tokenizer(folder: Path) -> bool:
    """Whether a model directory has a tokenizer; some releases of Transformers make an empty one otherwise."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def name_tokenizer(folder: Path, name: str | None) -> None:
    """Let the tokenizer in a model directory name its class, where neither it nor the model's config does.

    Transformers would choose by the model type: the stock one's files may rest on that, as the Hub's gpt2 does.

    Args:
        folder: with a `config.json`; one without a tokenizer is left alone.
        name: the class Transformers has for the stock model type; None for the general one, which needs no name.

    Raises:
        ValueError: tokenizer_config.json or config.json is no JSON object.
    """
    fields = {}
    for file in ("config.json", "tokenizer_config.json"):  # in this order: what is written is the last
        content = (folder / file).read_text(encoding="utf-8") if (folder / file).is_file() else "{}"
        if not isinstance(found := json.loads(content), dict):
            raise ValueError(f"{file}: {folder / file} must hold a JSON object")
        fields[file] = found
    if name and has_tokenizer(folder) and not any(each.get("tokenizer_class") for each in fields.values()):
        write_json(folder / "tokenizer_config.json", {**fields["tokenizer_config.json"], "tokenizer_class": name})


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
