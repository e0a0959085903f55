"""`manifest.json`: size and SHA-256 of every file of a folder, so that damage to any of them is found and named."""

import errno
import json
from pathlib import Path
from typing import Any

from .files import sha256, sha256_file, write_text

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write the manifest of `folder` into it; an older manifest is replaced."""
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {name: [(folder / name).stat().st_size, sha256_file(folder / name)] for name in paths if name != MANIFEST}
    write_text(folder / MANIFEST, _text(files))


def _text(files: dict[str, Any]) -> str:
    """Content of a manifest, which ends in its own hash."""
    return json.dumps({"files": files, "sha256": sha256([json.dumps(files)])}, indent=2) + "\n"


def damage(folder: Path) -> str | None:
    """The first damage to a file of the manifest in `folder`, in words; None where there is none.

    OSError where a file cannot be read, which says nothing about its content: another try may read it.
    """
    name = MANIFEST
    try:
        text = (folder / name).read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        if text != _text(files):
            return f"{name} is damaged"
        for name, (size, digest) in files.items():
            if (length := (folder / name).stat().st_size) != size:
                return f"{name} has {length} bytes, not {size}"
            if sha256_file(folder / name) != digest:
                return f"{name} is damaged"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{name} is damaged ({error})"
    except OSError as error:
        if not is_absent(error):
            raise
        return f"{name} is missing"
    return None


def has_manifest(folder: Path) -> bool:
    """Whether `folder` holds a manifest of ours; other programs write files of that name too."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and not is_absent(error):
            raise
        return False
    return isinstance(content, dict) and content.keys() == {"files", "sha256"}


def is_absent(error: OSError) -> bool:
    """Whether an error of opening a file means that there is none: the path may end in a folder or a ring of links."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
