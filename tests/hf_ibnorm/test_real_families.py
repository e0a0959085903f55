"""Trained models of other families than Llama: a BERT and an ALBERT of chemical reactions, as PyPI packages ship them.

rxnfp 0.1.0 and rxnmapper 0.4.3 (both MIT, IBM; the models of arXiv 2012.06051 and of Schwaller et al., Science Advances
2021) have the weights in the package. They are masked language models of SMILES, a notation for molecules.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from hf_ibnorm import apply_norm, convert_checkpoint, describe_sites, restore_norm

PACKAGES = Path(sys.prefix) / "checkpoints"
FOLDERS = {
    "bert": PACKAGES / "rxnfp/models/transformers/bert_pretrained",
    "albert": PACKAGES / "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
}
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(Path.is_dir, FOLDERS.values())), reason="the checkpoints are missing (make test-real)"
    ),
]
REACTION = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
TOKEN = re.compile(r"\[[^\]]+]|Br?|Cl?|>>?|%[0-9]{2}|[A-Za-z0-9().=#+@?~*$:/\\-]")


@pytest.fixture(params=FOLDERS)
def source(request, tmp_path):
    """The model as safetensors, its family, and a reaction in which every third token is masked, with those tokens."""
    family, folder = request.param, tmp_path / "package"
    shutil.copytree(FOLDERS[family], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": family}))
    AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path / "source")
    known = {token: i for i, token in enumerate((folder / "vocab.txt").read_text().split())}
    ids = torch.tensor([[known[token] for token in ("[CLS]", *TOKEN.findall(REACTION), "[SEP]")]])
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[0, 2:-1:3] = True
    return family, tmp_path / "source", ids.masked_fill(hidden, known["[MASK]"]), hidden, ids[hidden]


@torch.no_grad()
def logits(folder, masked):
    return AutoModelForMaskedLM.from_pretrained(folder).eval()(masked).logits


def test_an_identity_says_what_the_trained_model_says_and_the_way_back_has_its_bits(source, tmp_path):
    family, folder, masked, hidden, tokens = source
    expected = logits(folder, masked)
    guessed = expected[hidden].argmax(-1)
    assert (guessed == tokens).float().mean() > 0.7, "not a trained model"
    convert_checkpoint(folder, tmp_path / "converted", "ibnorm_l", init="identity")
    converted = logits(tmp_path / "converted", masked)
    assert (converted - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(converted[hidden].argmax(-1), guessed)
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["model_type"] == f"ibnorm_{family}"
    convert_checkpoint(tmp_path / "converted", tmp_path / "back", "layernorm")
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_its_norms_are_found_swapped_and_put_back(source):
    family, folder, masked, _, _ = source
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    stream = [site for site in describe_sites(model) if site.kind == "stream"]
    assert len(stream) == (24 if family == "bert" else 2)  # the blocks of an ALBERT share one
    assert {(site.computes, site.eps, site.problem) for site in stream} == {("layernorm", 1e-12, None)}
    with torch.no_grad():
        expected = model(masked).logits
        with pytest.warns(UserWarning, match="what loaded weights compute"):
            apply_norm(model, "ibnorm_t", lam=3.0)
        assert not torch.allclose(model(masked).logits, expected, atol=0.1)
        restore_norm(model)
        assert torch.equal(model(masked).logits, expected)
