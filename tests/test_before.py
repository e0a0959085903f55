"""What the version before wrote (tests/fixtures/before, by make_before.py) loads, goes on and is reported as it was."""

import csv
import json
import shutil
from importlib.metadata import version

import pytest
import torch
from training import metrics, small_corpus
from transformers import AutoModelForCausalLM

import eval.__main__
import hf_ibnorm.report.__main__
import train_lm.__main__
import train_lm.plot
from hf_ibnorm import convert_checkpoint, norm_sites

STEP = 13
"""Of the stopped run's last checkpoint."""
LOADED = ("patched", "converted", "finished/final", *(f"stopped/checkpoints/step-{i}/model" for i in (0, STEP)))
SCORING = ("--suite", "sva_simple,sva_nounpp", "--limit", "10")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""Between the formulas, which computed what is expected, and kernels."""


def content(path):
    return json.loads(path.read_text())


def cells(table):
    """The cells of a CSV file by row and column."""
    with table.open(newline="") as file:
        return {(i, name): cell for i, row in enumerate(csv.DictReader(file)) for name, cell in row.items()}


@pytest.fixture
def before(fixtures, tmp_path, monkeypatch):
    """A copy of the fixtures, which is the working directory: the paths in them are relative."""
    folder = shutil.copytree(fixtures / "before", tmp_path / "before")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_IBNORM_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def expected(fixtures):
    """What the version before computed."""
    return content(fixtures / "before" / "expected.json")


@torch.no_grad()
def first_logits(model):
    return model.eval()(torch.arange(1, 33).view(2, 16)).logits[:, -1, :8]


@pytest.mark.oldest
@pytest.mark.parametrize("name", LOADED)
def test_a_checkpoint_has_its_norms_its_lam_and_its_logits(before, expected, name):
    model = AutoModelForCausalLM.from_pretrained(before / name)
    norms = {site: [type(norm).__name__, getattr(norm, "lam_value", None)] for site, norm in norm_sites(model).items()}
    assert norms == expected["models"][name]["norms"]
    torch.testing.assert_close(first_logits(model), torch.tensor(expected["models"][name]["logits"]), **CLOSE)


def test_a_converted_checkpoint_goes_back_to_what_it_was(before):
    record = content(before / "converted" / "conversion.json")
    assert convert_checkpoint(before / "converted", before / "back", "rmsnorm").keys() == record.keys()
    stock, back = (AutoModelForCausalLM.from_pretrained(before / name) for name in ("stock", "back"))
    assert first_logits(back).equal(first_logits(stock))


@pytest.mark.usefixtures(small_corpus.__name__)
def test_a_stopped_run_goes_on_at_its_step(before, expected, command):
    recipe = before / "stopped" / "config.yaml"
    assert len(metrics(before / "stopped")) == STEP
    # Not auto, which asks for the processor and the releases of the libraries that the run began with.
    words = ["--config", str(recipe), "--run_dir", "stopped", "--resume", "inexact"]
    code, _, err = command(train_lm.__main__.main, *words)
    assert code == 0, err
    rows = metrics(before / "stopped")
    assert [str(row["step"]) for row in rows] == list(expected["steps"])
    for row, values in zip(rows, expected["steps"].values(), strict=True):
        tolerance = 1e-6 if row["step"] <= STEP + 1 else 1e-4  # after some steps another processor's rounding shows
        assert {name: row.get(name) for name in values} == pytest.approx(values, rel=tolerance), row["step"]
    final = AutoModelForCausalLM.from_pretrained(before / "stopped" / "final")
    logits = torch.tensor(expected["models"]["straight/final"]["logits"])
    torch.testing.assert_close(first_logits(final), logits, rtol=1e-3, atol=1e-4)


def facts(report):
    """The tables and the list of a report, without the line that says how it was made."""
    return [line for line in report.read_text().splitlines() if line.startswith(("| ", "- "))]


def test_finished_runs_are_reported_and_a_stopped_one_is_drawn(before, command):
    code, _, err = command(hf_ibnorm.report.__main__.main, "finished", "finished_rms", "--output", "again")
    assert code == 0, err
    assert facts(before / "again" / "report.md") == facts(before / "report" / "report.md")
    code, _, err = command(train_lm.plot.main, "finished", "stopped", "--output", "runs.png")
    assert code == 0, err


def test_answers_get_the_same_scores_and_are_compared_as_they_were(before, command):
    for words in (
        ("score", "finished/scores", "--output", "again"),
        ("compare", "finished_rms/scores", "finished/scores", "--output", "compared"),
    ):
        code, _, err = command(eval.__main__.main, *words)
        assert code == 0, err
    assert content(before / "again/scores.json") == content(before / "finished/scores/scores.json")
    assert content(before / "compared/comparison.json") == content(before / "comparison/comparison.json")


def test_a_study_gets_the_same_verdicts(before, command):
    code, _, err = command(eval.__main__.main, "study", "report", "study", "--output", "again")
    assert code == 0, err
    for name in ("verdicts.csv", "cells.csv", "curves.csv"):
        now, then = (cells(folder / name) for folder in (before / "again", before / "study" / "report"))
        assert now.keys() == then.keys()
        for place, value in then.items():
            # Libraries of statistics round the last digit of a p-value in their own way.
            assert now[place] == value or float(now[place]) == pytest.approx(float(value), rel=1e-9), (name, place)


@pytest.mark.slow
def test_a_scoring_that_was_stopped_goes_on(before, command):
    folder = before / "finished" / "scores"
    versions = content(folder / "manifest.json")["identity"]["versions"]
    if changed := [name for name, was in versions.items() if version(name).partition("+")[0] != was.partition("+")[0]]:
        pytest.skip(f"scored with another release of {', '.join(changed)}, which is refused")
    scores = content(folder / "scores.json")
    (folder / "results" / "sva_nounpp.json").unlink()
    code, _, err = command(eval.__main__.main, "run", "--model", "finished", *SCORING, "--output", str(folder))
    assert code == 0, err
    assert content(folder / "scores.json") == scores


@pytest.mark.slow
def test_a_finished_study_trains_nothing_again(before, command):
    weights = {path: path.stat().st_mtime_ns for path in before.glob("study/**/model.safetensors")}
    code, _, err = command(eval.__main__.main, "study", "run", "study.yaml", "--output", "study")
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in before.glob("study/**/model.safetensors")} == weights
