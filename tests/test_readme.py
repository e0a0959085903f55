"""The README's Python example runs as it stands, and its claims about names hold."""

import re
import subprocess
import sys
from pathlib import Path

from hf_ibnorm import NORMS
from hf_ibnorm.norms_ibnorm import DEFAULT_LAM

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs_from_another_folder(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "IBNorm((64,), variant=T, lam=2.0" in done.stdout
    assert (tmp_path / "runs" / "my_model" / "config.json").exists()


def test_table_of_norms_is_complete_and_its_defaults_are_true():
    for name in NORMS:
        assert f"`{name}`" in README
    for variant, lam in DEFAULT_LAM.items():
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `ibnorm_{variant.lower()}`")]
        assert f"`lam` ({lam:g})" in row


def test_linked_files_exist_and_nothing_is_left_to_fill_in():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).is_file(), link
    assert "DEMO_TABLE" not in README


def test_verdicts_are_those_of_the_report():
    (quoted,) = re.findall(r"<!-- quick -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    report = (ROOT / "docs" / "results" / "quick" / "report.md").read_text(encoding="utf-8")
    assert quoted.count("\n") == 9
    assert f"\n\n{quoted}\n\n" in report


def test_readme_stays_short():
    assert len(README.splitlines()) < 200
