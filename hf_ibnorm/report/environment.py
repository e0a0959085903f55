"""The environment of a result: versions, device, threads, norm backends, git revision."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ..version import __version__

_TRAINING = ("torch", "transformers", "accelerate")
"""Packages that the bits of a training depend on."""
_OTHERS = ("tokenizers", "datasets", "safetensors", "lm_eval", "jsonargparse", "numpy", "scipy", "triton")


def _git_revision() -> str | None:
    """Commit of the checkout that the package runs from, with "-dirty" where tracked files differ; None without one."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    # The package may be installed into the checkout of another project, whose commit says nothing about it.
    if git("ls-files", "--error-unmatch", str(Path(__file__))) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return commit and commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def _norm_backends() -> dict[str, str]:
    """Kind of device → what runs the norms there: fused kernels and their build, or "reference" and the reason."""
    import torch

    from ..kernels import describe

    kinds = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    return {kind: describe(kind) for kind in kinds}


def package_versions() -> dict[str, str | None]:
    """Versions of this package, Python and the libraries; None for a library that is not installed."""
    installed = {package: _version(package) for package in (*_TRAINING, *_OTHERS)}
    return {"hf_ibnorm": __version__, "python": platform.python_version(), **installed}


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment_record() -> dict[str, Any]:
    """What a result depends on besides its own settings, as `environment.json` holds it."""
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
        "git_revision": _git_revision(),
        "command": sys.argv,
    }


def numerics_record() -> dict[str, Any]:
    """What the bits of a training depend on besides its settings: software, kind of device, threads, norm backend."""
    import torch

    versions = package_versions()
    if torch.cuda.is_available():
        device: dict[str, Any] = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        device = {"device": f"{cpu_name()}, {capability}", "threads": torch.get_num_threads()}
    kept = {name: versions[name] for name in ("hf_ibnorm", *_TRAINING)}
    # The first backend is of the device that trains. The reason for "reference" does not change what it computes.
    backend = next(iter(_norm_backends().values()))
    return {**kept, **device, "norm_backend": backend if backend.startswith("fused") else "reference"}


def cpu_name() -> str:
    """The processor's name where the system has it, else its architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
