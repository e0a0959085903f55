"""The recipes of published sizes: as many parameters as published, the context really set, and they train."""

import math
import re

import pytest
import torch
from training import metrics, small_corpus
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_ibnorm import NORMS, describe_sites
from train_lm.config import RECIPES, build_model_config, read_command_line
from train_lm.optim import learning_rate
from train_lm.train import train

pytestmark = pytest.mark.usefixtures(small_corpus.__name__)

# Millions of parameters, steps, warmup, tokens a step.
PUBLISHED = {
    "llama-60m": (58.07, 10_000, 1_000, 131_072),
    "llama-130m": (134.11, 20_000, 2_000, 131_072),
    "llama-350m": (367.97, 60_000, 6_000, 131_072),
    "llama-1b": (1339.08, 100_000, 10_000, 131_072),
    "gpt2-small": (124.48, 600_000, 2_000, 491_520),
    "gpt2-medium": (354.87, 600_000, 2_000, 491_520),
}

OTHERS = ("qwen3-60m", "olmo2-60m")


def recipe(name, *flags):
    return read_command_line(["--config", name, "--run_dir", "unused", *flags])


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(build_model_config(config, config.model.vocab_size))


def stock(name):
    """The stock model of a recipe's sizes, on the meta device."""
    model = recipe(name).model
    heads, layers, width = model.num_attention_heads, model.num_hidden_layers, model.hidden_size
    with torch.device("meta"):
        if model.model_type == "gpt2":
            config = GPT2Config(vocab_size=50304, n_positions=1024, n_embd=width, n_layer=layers, n_head=heads)
            return GPT2LMHeadModel(config)
        sizes = {"hidden_size": width, "intermediate_size": model.intermediate_size, "num_attention_heads": heads}
        return LlamaForCausalLM(LlamaConfig(vocab_size=32000, num_hidden_layers=layers, **sizes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_size_and_schedule(name):
    config, (millions, steps, warmup, tokens) = recipe(name), PUBLISHED[name]
    model = on_meta(config)
    assert round(model.num_parameters() / 1e6, 2) == millions
    assert model.num_parameters() == stock(name).num_parameters()
    assert model.config.max_position_embeddings == config.block_size == (1024 if "gpt2" in name else 256)
    assert model.config.pad_token_id is None
    assert (config.max_steps, config.warmup_steps) == (steps, warmup)
    for processes in (1, 2, 4, 8, 16):
        spread = config.spread_over(processes)
        sequences = spread.per_device_train_batch_size * spread.gradient_accumulation_steps * processes
        assert sequences * config.block_size == tokens
    assert learning_rate(steps, config) == pytest.approx(config.learning_rate / 10)
    assert config.model.dtype == "float32"


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "llama" in name])
def test_the_learning_rate_of_a_llama_recipe_is_one_of_a_grid_and_says_so(name):
    line = next(line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if "learning_rate:" in line)
    grid = [float(rate) for rate in re.search(r"GRID \{(.*?)\}", line)[1].split(",")]
    assert grid == [0.01, 0.005, 0.001, 0.0005, 0.0001]
    assert recipe(name).learning_rate in grid
    assert "unpublished" in line


@pytest.mark.parametrize("name", ["gpt2-small", "gpt2-medium"])
def test_residual_projections_of_gpt2_start_smaller_by_the_root_of_twice_the_depth(name):
    config = recipe(name, "--model.hidden_size", "192", "--model.num_attention_heads", "3")
    model = AutoModelForCausalLM.from_config(build_model_config(config, 512))
    depth = config.model.num_hidden_layers
    scaled = GPT2LMHeadModel(GPT2Config(n_embd=192, n_layer=12, n_head=3, vocab_size=512)).transformer.h[0].mlp.c_proj
    if scaled.weight.std() > 0.01:
        pytest.skip("this release of Transformers leaves it out, in the stock model as well")
    for block in model.transformer.h:
        for matrix in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
            assert matrix.std().item() == pytest.approx(0.02 / math.sqrt(2 * depth), rel=0.05)


def test_the_other_families_differ_from_the_llama_in_their_norms_alone():
    llama = on_meta(recipe("llama-60m")).num_parameters()
    assert on_meta(recipe("qwen3-60m")).num_parameters() == llama + 8 * 2 * 64
    assert on_meta(recipe("olmo2-60m")).num_parameters() == llama + 8 * 2 * 512
    for name in OTHERS:
        swapped = ("--model.norm_type", "ibnorm_l")
        computed = {(site.kind, site.computes) for site in describe_sites(on_meta(recipe(name, *swapped)))}
        assert computed == {("stream", None), ("qk", "rmsnorm")}
        everywhere = (*swapped, "--model.norm_overrides", "[['*.q_norm', ibnorm_l], ['*.k_norm', ibnorm_l]]")
        assert not any(site.computes for site in describe_sites(on_meta(recipe(name, *everywhere))))


@pytest.mark.parametrize("name", [*PUBLISHED, *OTHERS])
def test_a_narrow_copy_of_each_recipe_takes_a_step(name, tmp_path):
    text = ["--corpus", "austen", "--corpus_config", "null", "--streaming", "false", "--tokenizer", "null"]
    text += ["--tokenizer_vocab_size", "300", "--model.vocab_size", "null", "--max_eval_blocks", "1"]
    narrow = ["--model.hidden_size", "32", "--model.intermediate_size", "85", "--model.num_attention_heads", "2"]
    few = ["--global_batch_size", "2", "--max_steps", "1", "--warmup_steps", "1", "--compile", "false"]
    norm = ["--model.norm_type", "ibnorm_t"]
    train(read_command_line(["--config", name, "--run_dir", str(tmp_path / "run"), *text, *narrow, *few, *norm]))
    (row,) = metrics(tmp_path / "run")
    assert row["tokens"] == 2 * recipe(name).block_size
    assert abs(row["loss"] - math.log(300)) < 0.2
    assert row["lr"] == recipe(name).learning_rate
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert model.config.num_hidden_layers == recipe(name).model.num_hidden_layers
    assert model.config.max_position_embeddings == recipe(name).block_size


def test_the_norm_of_a_recipe_is_the_published_models_and_any_other_fits():
    for name in PUBLISHED:
        assert recipe(name).model.norm_type == ("layernorm" if "gpt2" in name else "rmsnorm")
    for norm in NORMS:
        assert on_meta(recipe("llama-60m", "--model.norm_type", norm)).config.norm_type == norm
