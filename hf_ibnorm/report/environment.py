"""What a result depends on besides its own settings: versions, device, threads, norm backends, git revision."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ..version import __version__

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

    from ..kernels import describe

    return {kind: describe(kind) for kind in (("cuda", "cpu") if torch.cuda.is_available() else ("cpu",))}


def package_versions() -> dict[str, str | None]:
    """Versions of this package, Python and `PACKAGES`; None where one is not installed."""

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
