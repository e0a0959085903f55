"""The Triton kernels compiled ahead of time, which needs no GPU: that they compile, and fit into registers."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

COMPILE = """
import json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_ibnorm.kernels.triton import ib_norm, normal_norm, warps_of

ptxas, record = sys.argv[1], []
IB = [
    dict(VARIANT=variant, MEAN_ABS=flag and variant != "S", RMS=flag, STANDARDIZE_FIRST=flag)
    for variant in "SLT"
    for flag in (False, True)
]
NORMAL = [dict(MODE=mode, normals_ptr=None) for mode in ("none", "scaled", "unscaled", "dropout")]
NORMAL.append(dict(MODE="scaled", seed_ptr=None))


def kind(name, dtype, constants):
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return {"seed": "*i64", "x": dtype, "y": dtype, "grad": dtype, "dx": dtype}.get(name[:-4], "*fp32")
    return "i32" if name in ("n", "rows", "x_stride", "grad_stride") else "fp32"


def spilled(function, dtype, constants, capability, warps):
    signature = {name: kind(name, dtype, constants) for name in function.arg_names}
    source, target = ASTSource(function, signature, constants), GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        suffix = "a" if capability >= 90 else ""
        words = [ptxas, "-v", f"-arch=sm_{capability}{suffix}", file.name, "-o", "/dev/null"]
        done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sum(map(int, re.findall(r"([0-9]+) bytes spill", done.stderr)))


for capability in (80, 90):
    for dtype in ("*bf16", "*fp32", "*fp16"):
        for block in (1024,) if dtype == "*fp16" else (1024, 4096):
            for module, forms in ((ib_norm, IB), (normal_norm, NORMAL)):
                for form in forms:
                    both = {"forward": (module.forward, 8), "backward": (module.backward, 4)}
                    for way, (function, each) in both.items():
                        size = spilled(function, dtype, {**form, "BLOCK": block}, capability, warps_of(block, each))
                        record.append([capability, dtype, block, way, form, size])
print(json.dumps(record))
"""


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What was compiled, each with the bytes that it spills to local memory."""
    if not (spec := find_spec("triton")):
        pytest.skip("Triton is not installed")
    ptxas = Path(spec.origin).parent / "backends/nvidia/bin/ptxas"
    if not ptxas.exists():
        pytest.skip(f"{ptxas} is not there")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    words = [sys.executable, "-c", COMPILE, str(ptxas)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_kernel_compiles_for_the_oldest_and_a_recent_gpu(record):
    assert {row[0] for row in record} == {80, 90}
    assert len(record) == 2 * 5 * 2 * (6 + 5)


@pytest.mark.slow
def test_ib_norm_as_models_use_it_spills_nothing_and_its_other_forms_next_to_nothing(record):
    rows = [(form, size) for capability, *_, form, size in record if capability == 90 and "VARIANT" in form]
    assert len(rows) == 5 * 2 * 6
    for form, size in rows:
        assert size <= (16 if form["STANDARDIZE_FIRST"] else 0), form


@pytest.mark.slow
def test_normal_norm_spills_nothing_forward_and_little_backward(record):
    rows = [(row[3], row[4], row[5]) for row in record if row[0] == 90 and "MODE" in row[4]]
    assert len(rows) == 5 * 2 * 5
    for way, form, size in rows:
        assert size <= (0 if way == "forward" else 512), form
