"""What tests of the evaluation share: small models with their tokenizers, the fixture mirror, NLTK's data."""

import os
from functools import cache
from pathlib import Path

import lm_eval.utils
import pytest
import torch
from transformers import AutoModelForCausalLM

from eval.answers import answer, prompts_of
from eval.harness import load_tasks
from eval.options import Prompting
from eval.scoring import score_benchmark
from eval.suites import SUITES
from hf_ibnorm import load_corpus
from train_lm.config import build_model_config, read_command_line
from train_lm.tokenizer import train_tokenizer, wrap_tokenizer

lm_eval.utils.env.from_string = cache(lm_eval.utils.env.from_string)  # it compiles each template for each item
EMBEDDED = {each.name: each for each in SUITES["embedded"]}
NOVEL = 3_000
"""Characters of the test novel that these tests read."""


def make_checkpoint(path, context=512):
    """An untrained model with noise norms and large weights, so that its answers differ, and its tokenizer."""
    config = read_command_line(["--config", "tiny", "--run_dir", "unused", "--model.norm_type", "layernormalnorm"])
    tokenizer = wrap_tokenizer(train_tokenizer([load_corpus("austen", "train")[0][:50_000]], 300), context)
    settings = build_model_config(config, len(tokenizer), tokenizer.eos_token_id)
    settings.max_position_embeddings = context
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A model whose context holds the embedded tasks, and its tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def long_checkpoint(tmp_path_factory):
    """A model whose context holds every prompt of the leaderboards, and its tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("long"), 1 << 16)


@pytest.fixture(autouse=True)
def short_novel(monkeypatch):
    monkeypatch.setattr("eval.suites.load_corpus", lambda name, split: [load_corpus(name, split)[0][:NOVEL]])


@pytest.fixture(scope="session")
def mirror():
    """Folder of hand-made items for every task of the leaderboards."""
    return Path(__file__).parents[1] / "fixtures" / "leaderboard_mirror"


@pytest.fixture(scope="session", autouse=True)
def punkt(tmp_path_factory):
    """A sentence splitter where IFEval looks for NLTK's, which no package registry carries; the folder's path."""
    import nltk
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    root = tmp_path_factory.mktemp("nltk_data")
    folder = root / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    nltk.data.path.insert(0, str(root))  # NLTK writes nowhere else
    trainer = PunktTrainer()
    trainer.train(load_corpus("austen", "train")[0][:100_000])
    save_punkt_params(trainer.get_params(), dir=str(folder))
    os.environ["NLTK_DATA"] = str(root)  # of commands that tests start
    return root


@pytest.fixture(scope="session")
def score():
    """Score one benchmark with a model, without files: score(lm, benchmark, limit)."""

    def run(lm, benchmark, limit=None):
        prompting = Prompting(limit)
        complete, loaded = load_tasks(benchmark)
        prompts = prompts_of(lm, complete, loaded["tasks"], prompting)
        return score_benchmark(complete, answer(lm, complete, loaded, prompts, prompting))

    return run
