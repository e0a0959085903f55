"""Transformers' own common tests of models, on our classes: what passes for the stock classes passes for ours.

They are in Transformers' source distribution, from which they are run (`make .venv/.transformers-tests`).
"""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import transformers

ROOT = Path(__file__).parents[2]
SOURCES = Path(sys.prefix) / "transformers-tests"
TESTS = SOURCES / f"transformers-{transformers.__version__}" / "tests"
FAMILIES = ("Llama", "GPT2", "Qwen3", "Gemma2", "OPT", "Bert", "ViT")
STUBS = {
    # Of what the common tests import, these two are not in the source distribution.
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TESTS.is_dir(), reason="no source distribution (make .venv/.transformers-tests)"),
]


@pytest.fixture
def common(tmp_path):
    """Run common tests of stock classes or ours; returns what pytest said, and (family, test) → outcome."""
    package = tmp_path / "tests"
    for name, text in {"__init__.py": f"__path__.append({str(TESTS)!r})\n", **STUBS}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).with_name("__init__.py").touch()
        (package / name).write_text(text)
    shutil.copy(ROOT / "tests" / "common" / "stand_ins.py", package / "test_stand_ins.py")

    def run(norms, tests=()):
        words = [f"tests/test_stand_ins.py::{family}::{test}" for family, test in tests] or ["tests/test_stand_ins.py"]
        report = tmp_path / f"{norms}.xml"
        paths = os.pathsep.join(map(str, (ROOT, SOURCES)))
        environment = os.environ | {"NORMS": norms, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTEST_ADDOPTS", None)
        quiet = ["-q", "--tb=line", "--disable-warnings", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        command = [sys.executable, "-m", "pytest", *quiet, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert report.is_file(), done.stdout + done.stderr
        outcomes = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            outcome = "passed" if not kinds else "skipped" if kinds == {"skipped"} else "failed"
            outcomes[case.get("classname").rpartition(".")[2], case.get("name")] = outcome
        return done.stdout, outcomes

    return run


def test_what_passes_for_stock_classes_passes_for_ours(common):
    said, ours = common("ours")
    passed = Counter(family for (family, _), outcome in ours.items() if outcome == "passed")
    assert passed.keys() == {f"Test{family}" for family in FAMILIES}
    assert min(passed.values()) > 60, said
    missed = [test for test, outcome in ours.items() if outcome != "passed"]
    _, stock = common("stock", missed)
    assert not {test: ours[test] for test in missed if stock[test] == "passed"}, said
