"""`make demo` itself, with fewer steps: the thread from text to table and picture."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_make_demo_trains_scores_and_reports_and_clears_its_own_folder_only(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".venv", ".git", "demo", "runs", "build", "dist", ".*_cache")
    )
    (tree / "demo").mkdir()
    (tree / "demo" / "left_over").touch()
    (tree / "mine").touch()
    environment = Path(sys.executable).parents[1]
    flags = "--max_steps 4 --warmup_steps 1 --eval_every 2 --per_device_train_batch_size 4 --model.num_hidden_layers 1"
    flags += " --model.hidden_size 32 --model.intermediate_size 48 --model.num_attention_heads 2"  # a novel is scored
    command = ["make", "-o", "setup", "demo", f"VENV={environment}", f"DEMO_FLAGS={flags}"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    demo = tree / "demo"
    assert sorted(path.name for path in demo.iterdir()) == [
        ".cache",
        "ibnorm_t",
        "loss.png",
        "report.md",
        "rmsnorm",
    ]
    assert (tree / "mine").exists()
    report = (demo / "report.md").read_text()
    first_row = report.splitlines()[2]
    assert first_row.startswith("| austen_test, bits per byte")
    assert "Same initial values of every shared parameter" in report
    assert "all 4 batches have equal hashes" in report
    for norm in ("rmsnorm", "ibnorm_t"):
        assert json.loads((demo / norm / "scores" / "scores.json").read_text())["smoke"] is False
    assert "One seed (0) of a small model decides nothing" in done.stdout
