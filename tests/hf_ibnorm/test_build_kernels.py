"""`hf-ibnorm build_kernels`: compiling the CPU kernels, and everything that can go wrong with it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from hf_ibnorm import kernels
from hf_ibnorm.cli import main
from hf_ibnorm.kernels.cpu import build

BUILD = [sys.executable, "-m", "hf_ibnorm.cli", "build_kernels"]
HAS_COMPILER = any(shutil.which(name) for name in build.COMPILERS)


@pytest.fixture
def built():
    """The library that is really built, found before `folder` takes its place."""
    path = build.library_path()
    if not path.exists():
        pytest.skip(f"{path} is not built")
    return path


@pytest.fixture
def folder(built_or_not, monkeypatch, tmp_path):
    """An empty cache of builds."""
    folder = tmp_path / "kernels"
    monkeypatch.setenv("HF_IBNORM_KERNELS", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    kernels.forget()
    yield folder
    monkeypatch.undo()
    kernels.forget()


@pytest.fixture
def built_or_not(request):
    """Sees to it that `built` looks at the user's own cache."""
    if "built" in request.fixturenames:
        request.getfixturevalue("built")


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Make $CXX a script: compiler("shell commands"), in which $OUT is what to write; returns the list of its runs."""

    class Runs:
        path = tmp_path / "runs"

        def __len__(self):
            return len(self.path.read_text().splitlines()) if self.path.exists() else 0

    def make(commands):
        script = tmp_path / "compiler"
        find = 'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then OUT=$2; fi; shift; done'
        script.write_text(f"#!/bin/sh\necho run >> {Runs.path}\n{find}\n{commands}\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return Runs()

    return make


def left_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.is_dir() else []


def assert_refused(command, folder, *messages):
    code, out, err = command(main, "build_kernels")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    for message in messages:
        assert message in err
    assert left_in(folder) == []


def test_without_a_compiler_the_error_says_what_to_install(command, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_refused(command, folder, "C++ compiler (c++, g++, clang++)", "on the PATH", "apt install g++")


def test_a_compiler_that_is_not_there_is_named(command, folder, monkeypatch):
    monkeypatch.setenv("CXX", "nonsense++")
    assert_refused(command, folder, "CXX: 'nonsense++' is not on the PATH")


def test_the_first_error_of_a_compiler_that_fails_is_shown(command, folder, compiler):
    compiler("echo 'note: hm' >&2; echo 'x.cpp:1: error: bad' >&2; echo 'x.cpp:2: error: worse' >&2; exit 1")
    assert_refused(command, folder, "x.cpp:1: error: bad", "norms.cpp")


def test_a_compiler_that_fails_in_silence_is_told_by_its_exit_code(command, folder, compiler):
    compiler("exit 3")
    assert_refused(command, folder, "exit code 3")


def test_a_compiler_that_dies_is_an_error(command, folder, compiler):
    compiler("kill -9 $$")
    assert_refused(command, folder, "failed")


def test_a_compiler_that_writes_nothing_is_an_error(command, folder, compiler):
    compiler("exit 0")
    assert_refused(command, folder, "cannot be loaded")


def test_a_compiler_that_writes_no_library_is_an_error(command, folder, compiler):
    compiler('echo nonsense > "$OUT"')
    assert_refused(command, folder, "cannot be loaded")


def other_library(tmp_path, source):
    """A library compiled from C that is not ours."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    (tmp_path / "other.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "other.so", tmp_path / "other.c"], check=True)
    return tmp_path / "other.so"


def test_a_library_that_is_not_ours_is_not_installed(command, folder, compiler, tmp_path):
    other = other_library(tmp_path, "int answer() { return 42; }")
    compiler(f'cp {other} "$OUT"')
    assert_refused(command, folder, "cannot be loaded", "hf_ibnorm_ib_norm")


def test_a_library_that_computes_something_else_is_not_installed(command, folder, compiler, tmp_path):
    names = ("normal_norm", "normals", "elementary", "has_float16")
    source = "".join(f"int hf_ibnorm_{name}() {{ return 0; }}\n" for name in names)
    zeros = "for (int i = 0; i < 2 * 37; i++) ((float *)common[4])[i] = 0;"
    other = other_library(tmp_path, f"{source}int hf_ibnorm_ib_norm(void **common) {{ {zeros} return 0; }}\n")
    compiler(f'cp {other} "$OUT"')
    assert_refused(command, folder, "computes something else than the formulas")


@pytest.mark.parametrize("what", ["the folder", "a folder above it"])
def test_a_file_in_the_place_of_the_folder_is_one_line(command, folder, compiler, monkeypatch, what):
    runs = compiler("exit 0")
    folder.write_text("a file")
    if what != "the folder":
        monkeypatch.setenv("HF_IBNORM_KERNELS", str(folder / "below"))
    code, out, err = command(main, "build_kernels")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{os.environ['HF_IBNORM_KERNELS']} cannot be used" in err
    assert folder.read_text() == "a file"
    assert len(runs) == 0


def test_a_library_is_built_once_and_again_by_force(command, built, folder, compiler):
    runs = compiler(f'cp {built} "$OUT"')
    code, out, err = command(main, "build_kernels")
    assert (code, err) == (0, "")
    assert out.startswith(f"built {build.library_path()} in ")
    assert left_in(folder) == [build.library_path().name]
    assert command(main, "build_kernels") == (0, f"{build.library_path()} is there already\n", "")
    assert len(runs) == 1
    assert command(main, "build_kernels", "--force")[1].startswith("built ")
    assert len(runs) == 2
    assert left_in(folder) == [build.library_path().name]


def test_a_build_that_fails_leaves_the_one_that_is_there(command, built, folder, compiler):
    compiler(f'cp {built} "$OUT"')
    command(main, "build_kernels")
    compiler("exit 1")
    assert command(main, "build_kernels", "--force")[0] == 2
    assert left_in(folder) == [build.library_path().name]
    assert build.library_path().read_bytes() == built.read_bytes()


def test_what_was_built_is_used_once_older_answers_are_forgotten(command, built, folder, compiler):
    assert "not built" in kernels.describe("cpu")
    compiler(f'cp {built} "$OUT"')
    command(main, "build_kernels")
    kernels.forget()
    assert kernels.describe("cpu") == f"fused (C++, {torch.backends.cpu.get_cpu_capability()}, build {build.key()})"


def test_the_key_is_that_of_the_source_torch_and_the_processor(monkeypatch, tmp_path):
    keys = [build.key()]

    def changed(owner, name, value):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            keys.append(build.key())

    source = tmp_path / "norms.cpp"
    source.write_bytes(build.SOURCE.read_bytes() + b"\n")
    changed(build, "SOURCE", source)
    changed(build, "FLAGS", [*build.FLAGS, "-g"])
    changed(torch, "__version__", "9.9")
    changed(torch, "compiled_with_cxx11_abi", lambda: not torch._C._GLIBCXX_USE_CXX11_ABI)
    for capability in {"DEFAULT", "AVX2", "AVX512"} - {torch.backends.cpu.get_cpu_capability()}:
        changed(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
    assert len(set(keys)) == len(keys)
    assert build.key() == keys[0]
    assert build.library_path().name == f"norms-{keys[0]}.so"


def test_only_instructions_that_torch_uses_are_compiled_for(monkeypatch):
    for capability, flag in (("AVX512", "-mavx512f"), ("AVX2", "-mavx2")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert flag in build.flags()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not any(flag.startswith("-m") for flag in build.flags())


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_IBNORM_KERNELS": "/a/b"}, "/a/b"),
        ({"HF_IBNORM_KERNELS": "~/b"}, "/home/me/b"),
        ({"XDG_CACHE_HOME": "/cache"}, "/cache/hf_ibnorm/kernels"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/hf_ibnorm/kernels"),
        ({}, "/home/me/.cache/hf_ibnorm/kernels"),
    ],
)
def test_builds_are_kept_where_the_environment_says(monkeypatch, variables, expected):
    for name in ("HF_IBNORM_KERNELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert build.folder() == Path(expected)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def test_a_build_that_was_killed_is_cleared_away_and_blocks_nothing(command, built, folder, compiler, tmp_path):
    compiler(f'touch "$OUT"; echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 120')
    process = subprocess.Popen(BUILD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: (tmp_path / "pid").exists() or process.poll() is not None)
        assert [name for name in left_in(folder) if name.startswith(".build-")]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert [name for name in left_in(folder) if name.startswith(".build-")]
        compiler(f'cp {built} "$OUT"')
        start = time.monotonic()
        assert command(main, "build_kernels")[0] == 0  # while the compiler of the dead build still runs
        assert time.monotonic() - start < 10
        assert left_in(folder) == [build.library_path().name]
    finally:
        process.kill()
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_two_builds_at_once_compile_once(command, built, folder, compiler):
    runs = compiler(f'sleep 1; cp {built} "$OUT"')
    other = subprocess.Popen(BUILD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(runs) or other.poll() is not None)
        assert command(main, "build_kernels") == (0, f"{build.library_path()} is there already\n", "")
        out, err = other.communicate(timeout=60)
    finally:
        other.kill()
    assert (other.returncode, err) == (0, "")
    assert out.startswith(f"built {build.library_path()} in ")
    assert len(runs) == 1
    assert left_in(folder) == [build.library_path().name]


def test_a_build_sees_what_another_made_while_it_waited(built, folder, compiler):
    runs = compiler(f'cp {built} "$OUT"')
    folder.mkdir()
    with ThreadPoolExecutor(1) as threads, FileLock(folder / ".lock"):  # which a build holds
        waiting = threads.submit(build.build)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        shutil.copy(built, build.library_path())
    assert waiting.result() == (build.library_path(), False)
    assert len(runs) == 0


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_the_real_compiler_builds_kernels_that_are_then_used(command, folder):
    code, out, err = command(main, "build_kernels")
    assert (code, err) == (0, "")
    assert out.startswith("built ")
    kernels.forget()
    assert kernels.lacking("cpu") is None


def lesser_processors():
    """What a processor can be told to be, by ATEN_CPU_CAPABILITY."""
    ladder = ["DEFAULT", "AVX2", "AVX512"]
    capability = torch.backends.cpu.get_cpu_capability()
    return ladder[: ladder.index(capability)] if capability in ladder else []


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_kernels_for_lesser_processors_pass_the_same_tests_and_draw_the_same_noise(tmp_path):
    draw = "import torch; from hf_ibnorm.kernels import cpu; seed = torch.tensor([2**61 + 7]); "
    draw += "print(cpu.load().normals(seed, 3, 200).tolist())"
    drawn = {}
    for capability in [*lesser_processors(), torch.backends.cpu.get_cpu_capability()]:
        environment = {**os.environ, "HF_IBNORM_KERNELS": str(tmp_path), "ATEN_CPU_CAPABILITY": capability.lower()}
        run = partial(subprocess.run, env=environment, capture_output=True, text=True)
        done = run(BUILD)
        assert done.returncode == 0, done.stderr
        drawn[capability] = torch.tensor(json.loads(run([sys.executable, "-c", draw]).stdout))
        if capability in lesser_processors():
            words = ["-p", "no:cacheprovider", "-rs", "-k", "not triton"]
            done = run([sys.executable, "-m", "pytest", *words, Path(__file__).with_name("test_kernels.py")])
            assert done.returncode == 0, done.stdout
            assert "not built" not in done.stdout
    first, *others = drawn.values()
    assert len(list(tmp_path.glob("norms-*.so"))) == len(drawn)
    for each in others:
        torch.testing.assert_close(each, first, rtol=1e-5, atol=1e-6)
