"""Pretraining of other architectures than Llama and GPT-2: their own fields, their own norms, and what is refused."""

import json

import pytest
import torch
from training import config, metrics, result, run, run_stopped, small_corpus
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ibnorm import IBNorm, describe_sites
from hf_ibnorm.base.errors import UserError
from train_lm.architecture import build_model_config
from train_lm.checkpoint import skeleton_of
from train_lm.flops import flops_per_token
from train_lm.memory import step_memory
from train_lm.model import check_causal

pytestmark = pytest.mark.usefixtures(small_corpus.__name__)

QWEN3 = ("--model.model_type", "qwen3", "--model.config_kwargs.head_dim", "16", "--model.norm_type", "ibnorm_t")
MOE = (
    *("--model.model_type", "qwen3_moe", "--model.norm_type", "ibnorm_l"),
    *("--model.config_kwargs", "{head_dim: 16, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 24}"),
)


def built(*flags):
    torch.manual_seed(0)
    wanted = config("unused", *flags)
    return AutoModelForCausalLM.from_config(build_model_config(wanted, wanted.tokenizer_vocab_size))


def test_a_qwen3_is_trained_with_the_norm_asked_for_and_its_own_on_queries_and_keys(tmp_path):
    run(tmp_path / "run", *QWEN3)
    rows = metrics(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert type(model).__name__ == "IBNormQwen3ForCausalLM"
    kinds = {(site.kind, site.computes): site.width for site in describe_sites(model)}
    assert kinds == {("stream", None): 32, ("qk", "rmsnorm"): 16}
    assert isinstance(model.model.norm, IBNorm)
    assert model.config.head_dim == 16
    assert model.config.pad_token_id is None
    recipe = (tmp_path / "run" / "config.yaml").read_text()
    assert "head_dim: 16" in recipe
    assert "norm_eps: 1.0e-06" in recipe


def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path):
    run(tmp_path / "whole", *QWEN3)
    run_stopped(4, tmp_path / "stopped", *QWEN3)
    run(tmp_path / "stopped", *QWEN3, "--resume", "auto")
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")


def test_another_norm_changes_no_shared_initial_weight(tmp_path):
    shas = set()
    for norm in ("ibnorm_l", "stock"):
        run(tmp_path / norm, *QWEN3[:4], "--model.norm_type", norm, "--max_steps", "1", "--warmup_steps", "1")
        shas.add(json.loads((tmp_path / norm / "environment.json").read_text())["init_sha"])
    assert len(shas) == 1


@pytest.mark.parametrize("trainable", ["norms", "lora"])
def test_a_stock_qwen3_is_healed_with_other_norms(tmp_path, trainable):
    folder = tmp_path / "source"
    run(tmp_path / "first", *QWEN3[:4], "--model.norm_type", "stock", "--max_steps", "1", "--warmup_steps", "1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "final")
    fields = {name: value for name, value in model.config.to_dict().items() if not name.startswith("norm_")}
    stock = AutoConfig.for_model(**{**fields, "model_type": "qwen3"})
    AutoModelForCausalLM.from_config(stock).save_pretrained(folder)
    tokenizer = ("--tokenizer", str(tmp_path / "first" / "final"))
    start = ("--model.init_from", str(folder), *QWEN3[4:], *tokenizer, "--trainable", trainable)
    run(tmp_path / "run", *start, "--teacher", str(folder), "--max_steps", "2", "--warmup_steps", "1")
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    source = AutoModelForCausalLM.from_pretrained(folder)
    changed = {
        name
        for name, value in healed.state_dict().items()
        if name in source.state_dict() and not torch.equal(value, source.state_dict()[name])
    }
    norms = {name for name in changed if "norm" in name}
    assert norms
    assert (changed == norms) == (trainable == "norms")


def test_flops_are_those_of_the_experts_that_a_token_is_sent_to():
    two, four = (
        flops_per_token(skeleton_of(built(*MOE, f"--model.config_kwargs.{name}", "4")), 32)
        for name in ("num_experts", "num_experts_per_tok")
    )
    assert four - two == pytest.approx(6 * 2 * 2 * 3 * 32 * 24)  # two blocks, two experts more of three matrices each


@pytest.mark.parametrize("flags", [QWEN3, MOE], ids=["dense", "experts"])
def test_a_step_is_planned(flags):
    step, model = step_memory(config("unused", *flags)), built(*flags)
    assert step.parameters == sum(p.numel() for p in model.parameters())
    assert step.block == sum(p.numel() for p in model.model.layers[0].parameters())
    assert step.flops_per_token == flops_per_token(skeleton_of(model), 32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--model.model_type", "qwen33"),
            r"model.model_type: got 'qwen33', must be the model type of a causal language model of Transformers, such "
            r"as llama, gpt2, qwen3 or olmo2 \(did you mean 'qwen3'\?\)",
        ),
        (("--model.model_type", "vit"), "model.model_type: got 'vit', must be the model type of a causal language"),
        (
            ("--model.model_type", "gemma3"),
            r"model of several parts \(text_config, vision_config\); did you mean gemma3_",
        ),
        (("--model.model_type", "mpt"), "norm_type: mpt has a field of this name; its norms cannot be chosen"),
        (
            ("--model.model_type", "qwen3", "--model.config_kwargs.head_dims", "16"),
            r"model.config_kwargs: got head_dims, qwen3 has no such field \(did you mean 'head_dim'\?\)",
        ),
        (
            ("--model.model_type", "gpt2", "--model.config_kwargs.n_embd", "16"),
            "model.config_kwargs: got n_embd, which model.hidden_size sets",
        ),
        (("--model.config_kwargs.pad_token_id", "0"), "model.config_kwargs: got pad_token_id, which the run sets"),
        (
            ("--model.model_type", "bloom", "--model.intermediate_size", "128"),
            "model.intermediate_size: got 128, which nothing would use: the config of bloom has no such field",
        ),
    ],
)
def test_a_field_that_does_not_fit_is_named(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_model_that_looks_ahead_is_refused():
    bert = built("--model.model_type", "bert")
    assert bert.config.is_decoder
    check_causal("model.model_type", bert)
    for module in bert.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
        if hasattr(module, "is_decoder"):
            module.is_decoder = False
    bert.config.is_decoder = False
    with pytest.raises(ValueError, match="IBNormBertLMHeadModel, which looks at the tokens that it is to predict"):
        check_causal("model.model_type", bert)


PLAIN = (
    *("qwen2", "gemma2", "olmo3", "phi", "phi3", "smollm3", "granite", "cohere2", "stablelm", "starcoder2"),
    *("gpt_neox", "opt", "bloom", "falcon", "mistral", "gemma3_text", "mixtral"),
)
TRAINED = {
    **{name: {} for name in PLAIN},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 16},
    "deepseek_v3": {
        **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 32, "q_lora_rank": 48},
        **{
            "n_routed_experts": 8,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    },
}
"""Model type → what its config needs to be small, besides the sizes that all have."""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TRAINED)
def test_the_named_families_learn_and_are_counted(tmp_path, model_type):
    kwargs = json.dumps(TRAINED[model_type])
    flags = ("--model.model_type", model_type, "--model.config_kwargs", kwargs, "--model.norm_type", "ibnorm_s")
    run(tmp_path / "run", *flags, "--learning_rate", "0.01")
    rows = metrics(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["flops_per_token"] > 2 * 300 * 32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert any(isinstance(module, IBNorm) for module in model.modules())
