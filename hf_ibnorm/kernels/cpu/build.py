"""Compiling the CPU kernels, once for a machine, into the user's cache directory.

Environments with the same key share a build. It is made in a temporary directory, under a lock that ends with its
process, and renamed after a trial: a killed build blocks no other, and half a library is never loaded.
"""

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

from ...base.files import sha256
from ...functional import ib_norm
from ..options import IBNormOptions
from .library import Library

SOURCE = Path(__file__).with_name("norms.cpp")
COMPILERS = ("c++", "g++", "clang++")
# By torch.backends.cpu.get_cpu_capability(), which ATEN_CPU_CAPABILITY can lower. Not by -march=native: machines that
# share a cache directory may have different processors.
INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"],
}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message is one line that says why and what to do."""


def flags() -> list[str]:
    """The compiler's flags for this processor."""
    return [*FLAGS, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])]


def key() -> str:
    """Name of the build that this source, torch and processor need."""
    abi = f"{torch.compiled_with_cxx11_abi()}"
    return sha256([torch.__version__, abi, torch.backends.cpu.get_cpu_capability(), *flags(), SOURCE.read_bytes()])[:16]


def folder() -> Path:
    """The folder of builds: $HF_IBNORM_KERNELS, else hf_ibnorm/kernels in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_IBNORM_KERNELS") or f"{home}/hf_ibnorm/kernels").expanduser()


def library_path() -> Path:
    """The library that this source, torch and processor need, built or not."""
    return folder() / f"norms-{key()}.so"


def load() -> Library:
    """The built kernels; FileNotFoundError where there are none, OSError or AttributeError for a damaged file."""
    path = library_path()
    if not path.exists():
        capability = torch.backends.cpu.get_cpu_capability()
        raise FileNotFoundError(f"not built for torch {torch.__version__} and {capability}")
    return Library(path, key())


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of c++, g++ and clang++ on the PATH; BuildError for none."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    lacks = f"CXX: {' '.join(wanted)!r}" if wanted else f"a C++ compiler ({', '.join(COMPILERS)})"
    raise BuildError(f"{lacks} is not on the PATH; install one (apt install g++), or norms stay plain PyTorch")


def build(force: bool = False) -> tuple[Path, bool]:
    """Compile the kernels unless they are there, with `force` anyway; returns the library, and whether it is new.

    Raises:
        BuildError: there is no compiler, it failed, or its library does not compute the formulas.
        OSError: the cache directory cannot be written.
    """
    target = library_path()
    if not force and _problem(target) is None:
        return target, False
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / ".lock"):
        if not force and _problem(target) is None:  # another process was faster
            return target, False
        for abandoned in target.parent.glob(".build-*"):  # by killed processes, for we hold the lock
            shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as temporary:
            made = Path(temporary) / target.name
            command = [*compiler(), *flags(), "-o", str(made), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [done.stderr.strip()]
                raise BuildError(f"{' '.join(command)} failed: {errors[0] or f'exit code {done.returncode}'}")
            if problem := _problem(made):
                raise BuildError(problem)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(made, target)
    return target, True


def _problem(library: Path) -> str | None:
    """Why a library cannot be used; None for one that agrees with the formulas on a small input."""
    x = torch.linspace(-3, 3, 2 * 37).reshape(2, 37)
    try:
        made = Library(library, key())
    except (OSError, AttributeError) as error:
        return f"the library just compiled cannot be loaded: {error}"
    y, _ = made.forward(x, None, None, IBNormOptions(torch.tensor(2.0), "T", "raw", "layer", "compress_first", 1e-6))
    if torch.allclose(y, ib_norm(x, variant="T", lam=2.0), atol=1e-5):
        return None
    return f"the library just compiled with {compiler()[0]} computes something else than the formulas"
