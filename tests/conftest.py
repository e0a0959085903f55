"""Shared by all tests: few threads, no hub, small models."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from helpers import shake
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_ibnorm import IBNormGPT2Config, IBNormLlamaConfig
from hf_ibnorm.configuration_ibnorm import NORM_FIELDS

torch.set_num_threads(2)
logging.disable_progress_bar()

TINY = {
    "llama": (
        IBNormLlamaConfig,
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "gpt2": (IBNormGPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
}
STOCK = {"llama": (LlamaConfig, LlamaForCausalLM), "gpt2": (GPT2Config, GPT2LMHeadModel)}


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command's `main` in this process, which spares the seconds of importing everything again.

    command(main, "words", ...) returns its exit code and what it wrote to standard output and standard error.
    """

    def run(main, *words):
        monkeypatch.setattr("sys.argv", ["command", *words])
        with pytest.raises(SystemExit) as ending:
            main()
        return ending.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def fixtures() -> Path:
    """Folder of reference numbers."""
    return Path(__file__).parent / "fixtures"


@pytest.fixture
def tiny_config():
    """Factory of configs for models of some 20,000 parameters: tiny_config("llama", norm_type=...)."""

    def make(family: str, **fields):
        cls, sizes = TINY[family]
        return cls(**{**sizes, "vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, **fields})

    return make


@pytest.fixture
def stock_model(tiny_config):
    """Factory of tiny stock models, their parameters moved off the initial values: stock_model("gpt2")."""

    def make(family: str, cls=None, **fields):
        config_cls, model_cls = STOCK[family]
        config = tiny_config(family, **fields).to_dict()
        plain = {key: value for key, value in config.items() if key not in (*NORM_FIELDS, "model_type")}
        torch.manual_seed(1)
        return shake((cls or model_cls)(config_cls(**plain)))

    return make
