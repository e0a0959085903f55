"""Models of any architecture: sites as they are, the same function under an identity, saved and loaded to the bit."""

import copy
import json
import pickle
import subprocess
import sys
import textwrap
from collections import Counter

import peft
import pytest
import torch
import transformers
from architectures import architectures, check, inputs_of, output_of, small_config
from helpers import shake
from torch import nn

import hf_ibnorm
from hf_ibnorm import (
    IBNorm,
    apply_norm,
    convert_checkpoint,
    describe_sites,
    norm_sites,
    restore_norm,
    set_lam,
    swapped_norms,
)
from hf_ibnorm.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:.*what loaded weights compute", "ignore:.*no place for trained")

QUICK = {
    "Qwen3ForCausalLM": {("stream", "rmsnorm", "w"): 5, ("qk", "rmsnorm", "w"): 4},
    "Gemma2ForCausalLM": {("stream", "rmsnorm", "1+w"): 9},
    "Olmo2ForCausalLM": {("stream", "rmsnorm", "w"): 5, ("qk", "rmsnorm", "w"): 4},
    "OPTForCausalLM": {("stream", "layernorm", "w"): 5},
    "BertForMaskedLM": {
        ("stream", "layernorm", "w"): 4,
        ("embedding", "layernorm", "w"): 1,
        ("head", "layernorm", "w"): 1,
    },
    "T5ForConditionalGeneration": {("stream", "rmsnorm", "w"): 12},
    "ViTForImageClassification": {("stream", "layernorm", "w"): 5},
    "ConvNextForImageClassification": {
        ("stream", "layernorm", "w"): 9,
        ("embedding", "layernorm", "w"): 1,
    },
}
"""Architecture → how many sites of each kind, stock norm and gain a small one has."""
SLOW = {
    "LlamaForCausalLM": {("stream", "rmsnorm", "w"): 5},
    "GPT2LMHeadModel": {("stream", "layernorm", "w"): 5},
    "Qwen2ForCausalLM": {("stream", "rmsnorm", "w"): 5},
    "Qwen3MoeForCausalLM": {("stream", "rmsnorm", "w"): 5, ("qk", "rmsnorm", "w"): 4},
    "MistralForCausalLM": {("stream", "rmsnorm", "w"): 5},
    "MixtralForCausalLM": {("stream", "rmsnorm", "w"): 5},
    "GemmaForCausalLM": {("stream", "rmsnorm", "1+w"): 5},
    "Gemma3ForCausalLM": {("stream", "rmsnorm", "1+w"): 9, ("qk", "rmsnorm", "1+w"): 4},
    "Olmo3ForCausalLM": {("stream", "rmsnorm", "w"): 5, ("qk", "rmsnorm", "w"): 4},
    "PhiForCausalLM": {("stream", "layernorm", "w"): 3},
    "Phi3ForCausalLM": {("stream", "rmsnorm", "w"): 5},
    "SmolLM3ForCausalLM": {("stream", "rmsnorm", "w"): 5},
    "GraniteForCausalLM": {("stream", "rmsnorm", "w"): 5},
    "Cohere2ForCausalLM": {("stream", "layernorm", "w"): 3},
    "StableLmForCausalLM": {("stream", "layernorm", "w"): 5},
    "Starcoder2ForCausalLM": {("stream", "layernorm", "w"): 5},
    "GPTNeoXForCausalLM": {("stream", "layernorm", "w"): 5},
    "GPTNeoForCausalLM": {("stream", "layernorm", "w"): 5},
    "GPTJForCausalLM": {("stream", "layernorm", "w"): 3},
    "BloomForCausalLM": {("stream", "layernorm", "w"): 5, ("embedding", "layernorm", "w"): 1},
    "FalconForCausalLM": {("stream", "layernorm", "w"): 3},
    "DeepseekV3ForCausalLM": {("stream", "rmsnorm", "w"): 5, ("latent", "rmsnorm", "w"): 4},
    "GptOssForCausalLM": {("stream", "rmsnorm", "w"): 5},
    "Mamba2ForCausalLM": {("stream", "rmsnorm", "w"): 3, ("latent", None, ""): 2},
    "RobertaForMaskedLM": {
        ("stream", "layernorm", "w"): 4,
        ("embedding", "layernorm", "w"): 1,
        ("head", "layernorm", "w"): 1,
    },
    "ModernBertForMaskedLM": {
        ("stream", "layernorm", "w"): 4,
        ("embedding", "layernorm", "w"): 1,
        ("head", "layernorm", "w"): 1,
    },
    "DistilBertForMaskedLM": {
        ("stream", "layernorm", "w"): 4,
        ("embedding", "layernorm", "w"): 1,
        ("head", "layernorm", "w"): 1,
    },
    "Dinov2ForImageClassification": {("stream", "layernorm", "w"): 5},
    "DeiTForImageClassification": {("stream", "layernorm", "w"): 5},
    "SiglipForImageClassification": {("stream", "layernorm", "w"): 6},
    "SwinForImageClassification": {("stream", "layernorm", "w"): 6, ("embedding", "layernorm", "w"): 1},
}
FIELDS = {
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "Qwen3MoeForCausalLM": {"mlp_only_layers": []},
    "GPTJForCausalLM": {"rotary_dim": 8},
    "DeepseekV3ForCausalLM": {
        **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 32, "q_lora_rank": 48},
        **{"n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    },
    "Mamba2ForCausalLM": {"num_heads": 8, "n_groups": 2, "state_size": 16},
    "Dinov2ForImageClassification": {
        **{"stage_names": ["stem", "stage1", "stage2"], "_out_features": ["stage2"], "_out_indices": [2]},
    },
    "ConvNextForImageClassification": {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 32, 64]},
    "SwinForImageClassification": {
        **{
            "depths": [1, 1],
            "num_heads": [2, 4],
            "embed_dim": 16,
            "hidden_size": 32,
            "window_size": 4,
            "patch_size": 4,
        },
        **{"stage_names": ["stem", "stage1", "stage2"], "_out_features": ["stage2"], "_out_indices": [2]},
    },
}
"""Fields of the configs that small sizes alone do not make."""
TYPES = architectures() | {"SiglipForImageClassification": "siglip"}
ARCHITECTURES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def make(name, seed=0):
    """A small model, moved off its initial weights, and what it is given."""
    torch.manual_seed(seed)
    model = getattr(transformers, name)(small_config(TYPES[name], **FIELDS.get(name, {})))
    return shake(model), inputs_of(model)


def is_swapped(site):
    """Whether a site gets another norm by default."""
    return site.kind == "stream" and site.problem is None


def identity_of(model):
    """Options with which an IBNorm computes what the model's stream norms do."""
    (computes,) = {site.computes for site in describe_sites(model) if is_swapped(site)}
    return {"lam": 1.0, "standardize": "rms" if computes == "rmsnorm" else "layer"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sites_are_what_the_architecture_has(name):
    with torch.device("meta"):
        model = getattr(transformers, name)(small_config(TYPES[name], **FIELDS.get(name, {})))
    counts = Counter((site.kind, site.computes, site.gain) for site in describe_sites(model))
    assert counts == (QUICK | SLOW)[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_identity_changes_nothing_and_another_norm_survives_saving_and_loading(name, tmp_path):
    model, inputs = make(name)
    expected, before = output_of(model, inputs), {key: value.clone() for key, value in model.state_dict().items()}
    with swapped_norms(model, "ibnorm_s", **identity_of(model)):
        torch.testing.assert_close(
            output_of(model, inputs), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )
    assert torch.equal(output_of(model, inputs), expected)

    apply_norm(model, "ibnorm_l", lam=3.0)
    assert type(model) is getattr(hf_ibnorm, f"IBNorm{name}")
    assert all(type(norm) is IBNorm for key, norm in norm_sites(model).items() if key in chosen(model))
    patched = output_of(model, inputs)
    assert not torch.allclose(patched, expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output_of(loaded, inputs), patched)
    assert type(pickle.loads(pickle.dumps(loaded))) is type(loaded)
    registered = type(model)(copy.deepcopy(model.config))
    registered.load_state_dict(model.state_dict())
    assert torch.equal(output_of(registered.eval(), inputs), patched)

    restore_norm(model)
    assert type(model).__name__ == name
    assert torch.equal(output_of(model, inputs), expected)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def chosen(model):
    """Names of the sites of the kind that is swapped by default."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return {prefix + site.name for site in describe_sites(model) if is_swapped(site)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_flow_through_every_new_norm(name):
    model, inputs = make(name)
    flow = []
    for norm in (None, "ibnorm_t"):
        if norm is not None:
            apply_norm(model, norm)
        model.zero_grad()
        model(**inputs)[0].float().square().mean().backward()
        gradients = {key: norm.weight.grad for key, norm in norm_sites(model).items() if key in chosen(model)}
        flow.append({key for key, gradient in gradients.items() if gradient is not None and gradient.any()})
    assert flow[0] == flow[1] != set()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_checkpoint_is_converted_there_and_back(name, tmp_path):
    model, inputs = make(name)
    model.save_pretrained(tmp_path / "stock")
    expected, (stock,) = output_of(model, inputs), {site.computes for site in describe_sites(model) if is_swapped(site)}
    convert_checkpoint(tmp_path / "stock", tmp_path / "new", "ibnorm_l", init="identity")
    new = getattr(hf_ibnorm, f"IBNorm{name}").from_pretrained(tmp_path / "new").eval()
    torch.testing.assert_close(output_of(new, inputs), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    bias = any(getattr(norm, "bias", None) is not None for norm in norm_sites(model).values())
    options = {} if bias or stock == "rmsnorm" else {"bias": False}
    record = convert_checkpoint(tmp_path / "new", tmp_path / "back", stock, norm_kwargs=options)
    assert record["architecture"] == name
    back = type(model).from_pretrained(tmp_path / "back").state_dict()
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())


GENERATE = [name for name in QUICK if name.endswith("CausalLM") or name.startswith("T5")]
GENERATE += [pytest.param(name, marks=pytest.mark.slow) for name in SLOW if name.endswith(("CausalLM", "LMHeadModel"))]


@pytest.mark.parametrize("name", GENERATE)
def test_generation_is_the_same_with_and_without_a_cache(name):
    model, inputs = make(name)
    apply_norm(model, "ibnorm_l", lam=3.0)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    if model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = 0
    texts = [model.generate(inputs["input_ids"], use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_trains_beside_the_new_norms(name):
    model, inputs = make(name)
    apply_norm(model, "ibnorm_l")
    linear = next(key.rpartition(".")[2] for key, module in model.named_modules() if isinstance(module, nn.Linear))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=[linear], r=2, init_lora_weights=False))
    assert torch.isfinite(output_of(wrapped, inputs)).all()
    assert not any(norm.weight.requires_grad for norm in norm_sites(wrapped).values())


def test_gains_of_one_more_than_the_weight_go_both_ways_to_the_bit():
    model, _ = make("Gemma2ForCausalLM")
    model = model.to(torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    apply_norm(model, "rmsnorm")
    apply_norm(model, "ibnorm_l")
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    torch.manual_seed(0)
    fresh = type(model)(copy.deepcopy(model.config))
    assert all((norm.weight == 0).all() for norm in norm_sites(fresh).values())
    assert "gain=1+w" in repr(fresh)


def test_a_norm_that_does_not_follow_the_place_is_refused_there(monkeypatch):
    model, _ = make("Gemma2ForCausalLM")
    monkeypatch.setattr(hf_ibnorm.DynamicTanh, "follows_place", False)
    with pytest.raises(
        ValueError, match=r"^norm: DynamicTanh cannot be at a place with gain 1\+w: its forward must use"
    ):
        apply_norm(model, "dyt")
    assert type(model).__name__ == "Gemma2ForCausalLM"


def composite():
    """A small model of images and text, whose text part has experts that loading merges."""
    parts = {
        "text_config": small_config("mixtral", rms_norm_eps=1e-3),
        "vision_config": small_config("clip_vision_model", layer_norm_eps=1e-4),
    }
    torch.manual_seed(0)
    config = transformers.LlavaConfig(**parts, image_token_index=255)
    return shake(transformers.LlavaForConditionalGeneration(config))


LOADED = [
    "OPTForCausalLM",
    "T5ForConditionalGeneration",
    "ConvNextForImageClassification",
    "Gemma2ForCausalLM",
    "llava",
]


@pytest.mark.parametrize("name", LOADED)
def test_a_stock_checkpoint_that_is_loaded_with_a_norm_is_the_one_that_is_patched(name, tmp_path):
    model, inputs = (composite(), {"input_ids": torch.arange(3, 15)[None]}) if name == "llava" else make(name)
    model.save_pretrained(tmp_path / "stock")
    patched = apply_norm(type(model).from_pretrained(tmp_path / "stock"), "ibnorm_l", lam=3.0).eval()
    loaded = type(patched).from_pretrained(
        tmp_path / "stock", norm_type="ibnorm_l", norm_kwargs={"lam": 3.0}, output_loading_info=True
    )
    assert all(key.endswith(("bias", "lam")) for key in loaded[1]["missing_keys"])
    assert not loaded[1]["unexpected_keys"]
    assert loaded[0].config.to_dict() | {"architectures": None} == patched.config.to_dict() | {"architectures": None}
    assert torch.equal(output_of(loaded[0].eval(), inputs), output_of(patched, inputs))
    eps = {site.eps for site in describe_sites(model) if is_swapped(site)}
    assert {norm.eps for norm in norm_sites(patched).values() if isinstance(norm, IBNorm)} == eps
    set_lam(patched, 2.0)
    patched.save_pretrained(tmp_path / "new")
    again = type(patched).from_pretrained(tmp_path / "new").eval()
    assert {norm.lam_value for norm in norm_sites(again).values() if isinstance(norm, IBNorm)} == {2.0}
    assert torch.equal(output_of(again, inputs), output_of(patched, inputs))
    apply_norm(patched, "dyt")  # has no ε, and the model's is not forgotten
    apply_norm(patched, "ibnorm_l")
    assert {norm.eps for norm in norm_sites(patched).values() if isinstance(norm, IBNorm)} == eps


def test_parts_of_a_composite_model_keep_their_configs_and_are_not_saved_alone(tmp_path):
    model = composite()
    text = model.config.text_config
    apply_norm(model, "ibnorm_l")
    assert model.config.text_config is model.model.language_model.config is text
    with pytest.raises(
        ValueError, match="is a part of a model, and its config does not name its norms; save the whole"
    ):
        model.model.language_model.save_pretrained(tmp_path)
    restore_norm(model)
    assert model.config.text_config is model.model.language_model.config is text


def test_a_checkpoint_that_does_not_say_its_type_is_a_stock_one(tmp_path):
    model, _ = make("OPTForCausalLM")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    del content["model_type"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"^norm_type: this checkpoint is a stock 'opt' model; say which norm it gets"):
        hf_ibnorm.IBNormOPTForCausalLM.from_pretrained(tmp_path)


def test_threads_that_ask_for_a_class_at_once_get_the_same():
    code = """
        from concurrent.futures import ThreadPoolExecutor
        import hf_ibnorm
        with ThreadPoolExecutor(4) as pool:
            print(len(set(pool.map(lambda _: getattr(hf_ibnorm, "IBNormMistralForCausalLM"), range(4)))))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_fields_of_a_config_that_look_like_options_of_a_norm_are_its_own(tmp_path):
    model, _ = make("Qwen3MoeForCausalLM")
    model.save_pretrained(tmp_path)
    config = hf_ibnorm.IBNormQwen3MoeConfig.from_pretrained(tmp_path, norm_type="ibnorm_l", norm_topk_prob=True)
    assert config.norm_topk_prob is True
    transformers.Starcoder2Config(norm_epsilon=1e-3).save_pretrained(tmp_path / "other")
    config = hf_ibnorm.IBNormStarcoder2Config.from_pretrained(tmp_path / "other", norm_type="ibnorm_l")
    assert config.norm_epsilon == 1e-3


def test_other_kinds_and_globs_name_other_sites(tmp_path):
    model, inputs = make("Qwen3ForCausalLM")
    apply_norm(model, "ibnorm_t", kinds="qk")
    assert model.config.norm_type == "stock"
    assert [glob for glob, _ in model.config.norm_overrides] == [
        "layers.*.self_attn.q_norm",
        "layers.*.self_attn.k_norm",
    ]
    apply_norm(model, "ibnorm_l", "layers.1.*", kinds=["stream"])
    apply_norm(model, "dyt", "norm")
    norms = {key: type(norm).__name__ for key, norm in norm_sites(model).items()}
    assert norms["model.layers.0.input_layernorm"] == "Qwen3RMSNorm"
    assert norms["model.layers.1.input_layernorm"] == norms["model.layers.1.self_attn.q_norm"] == "IBNorm"
    assert norms["model.norm"] == "DynamicTanh"
    assert model.model.layers[1].input_layernorm.variant == "L"
    assert model.model.layers[1].self_attn.q_norm.variant == "T"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output_of(loaded, inputs), output_of(model, inputs))
    apply_norm(model, "ibnorm_s")  # the norms of the stream: those of queries and keys stay as they are
    assert model.model.layers[1].self_attn.q_norm.variant == "T"
    set_lam(model, 2.0)
    assert {norm.lam_value for norm in norm_sites(model).values()} == {2.0}


def test_a_head_s_norm_is_a_site_of_its_own(tmp_path):
    model, inputs = make("BertForMaskedLM")
    apply_norm(model, "ibnorm_l", kinds="head")
    assert type(model.cls.predictions.transform.LayerNorm) is IBNorm
    assert model.config.norm_overrides[0][0] == "cls.predictions.transform.LayerNorm"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output_of(loaded, inputs), output_of(model, inputs))
    assert hf_ibnorm.IBNormBertModel.from_pretrained(tmp_path).config.norm_type == "stock"


def test_a_process_without_the_package_refuses_the_checkpoint(tmp_path):
    model, _ = make("Qwen3ForCausalLM")
    apply_norm(model, "ibnorm_l").save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ibnorm_qwen3" in done.stderr
    done = subprocess.run([sys.executable, "-c", f"import hf_ibnorm; {code}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        (
            "Mamba2ForCausalLM",
            ("*.mixer.norm",),
            r"can be swapped \(layers\.0\.mixer\.norm: Mamba2Mixer computes with its norm\.weight",
        ),
        (
            "ResNetForImageClassification",
            (),
            r"has no norm of kind stream that can be swapped; it has none; of the others",
        ),
        (
            "Qwen3ForCausalLM",
            ("h.*",),
            r"sites: 'h\.\*' matches no site; sites are layers\.\*\.self_attn",
        ),
    ],
)
def test_what_cannot_be_swapped_is_named(name, arguments, problem):
    with torch.device("meta"):
        model = getattr(transformers, name)(small_config(TYPES[name]))
    with pytest.raises(ValueError, match=problem):
        apply_norm(model, "ibnorm_l", *arguments)
    with pytest.raises(ValueError, match=r"^kinds: got 'query', allowed are stream, qk, latent, embedding, head"):
        apply_norm(model, "ibnorm_l", kinds="query")


def test_the_command_lists_the_sites_of_a_model_type(command):
    code, out, err = command(main, "sites", "qwen3")
    assert (code, err) == (0, "")
    assert "layers.*.self_attn.q_norm" in out
    assert command(main, "sites", "no-such-model")[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_architecture_works_or_says_why_not(part):
    failures = []
    for name, model_type in [*architectures().items()][part::8]:
        result = check(model_type, name)
        if result.outcome == "fails" or (result.outcome != "works" and not result.reason):
            failures.append(f"{name}: {result.outcome} {result.reason}")
    assert not failures, "\n".join(failures)


def test_a_model_that_was_made_without_its_pooler_is_swapped(tmp_path):
    torch.manual_seed(0)
    model = transformers.BertModel(small_config("bert"), add_pooling_layer=False).eval()
    ids = torch.arange(3, 12)[None]
    apply_norm(model, "ibnorm_l", lam=3.0)
    model.save_pretrained(tmp_path)
    loaded = hf_ibnorm.IBNormBertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    del model.encoder.layer[1]
    with pytest.raises(RuntimeError, match="was it changed"):
        apply_norm(model, "ibnorm_t")
