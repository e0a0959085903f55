"""What Transformers, PEFT and torch do with a model, done with these: each test is a trap that was seen or feared."""

import copy
import functools
import pickle

import peft
import pytest
import torch
from helpers import FAMILIES, FINAL, build, shake, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.func import functional_call, grad, vmap
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_ibnorm import NORMS, IBNorm, apply_norm, build_norm, no_decay_parameter_names, norm_sites, set_lam
from hf_ibnorm.norms import NormBase

pytestmark = pytest.mark.oldest

QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
OURS = [name for name, entry in NORMS.items() if issubclass(entry.cls, NormBase)]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=["registered", "patched"])
def model(request, tiny_config, stock_model, family):
    """A trained-looking model whose blocks have IBNorm, and a LayerNormalNorm at the end."""
    if request.param == "patched":
        patched = apply_norm(stock_model(family), "ibnorm_t", lam=0.3)
        return apply_norm(patched, "layernormalnorm", sites=FINAL[family])
    overrides = {FINAL[family]: "layernormalnorm"}
    return shake(build(tiny_config(family, norm_type="ibnorm_t", norm_kwargs={"lam": 0.3}, norm_overrides=overrides)))


@pytest.fixture
def tokenizer():
    words = {"<end>": 0, **{f"w{i}": i for i in range(1, 61)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def checkpointing(model, **kwargs):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs or None)


def lams(model):
    return [norm.lam for norm in model.modules() if isinstance(norm, IBNorm)]


@pytest.mark.parametrize("name", OURS)
def test_gradient_checkpointing_gives_bit_equal_gradients(tiny_config, family, name):
    model = build(tiny_config(family, norm_type=name))  # layernormalnorm draws noise by default
    gradients = []
    for on in (False, True):
        if on:
            checkpointing(model)
        model.train().zero_grad()
        torch.manual_seed(3)
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointing_that_would_draw_other_noise_is_refused(tiny_config, stock_model, family):
    model = build(tiny_config(family, norm_type="layernormalnorm"))
    with pytest.raises(ValueError, match="preserve_rng_state: got False"):
        checkpointing(model, preserve_rng_state=False, use_reentrant=False)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    quiet = build(tiny_config(family, norm_type="layernormalnorm", norm_kwargs={"noise": 0.0}))
    checkpointing(quiet, preserve_rng_state=False, use_reentrant=False)

    stock = stock_model(family)
    checkpointing(stock, preserve_rng_state=False, use_reentrant=False)
    with pytest.raises(ValueError, match="preserve_rng_state"):
        apply_norm(stock, "layernormalnorm")
    assert stock.config.model_type == family
    apply_norm(stock, "layernormalnorm", noise=0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "beam", "sampling", "static"],
)
def test_generation_with_and_without_cache_agrees(model, options):
    generated = []
    for cache in (True, False):
        torch.manual_seed(0)
        these = options if cache else {key: value for key, value in options.items() if key != "cache_implementation"}
        generated.append(
            model.generate(tokens(), max_new_tokens=8, min_new_tokens=8, pad_token_id=0, use_cache=cache, **these)
        )
    assert generated[0].shape == (2, 24)
    assert torch.equal(*generated)


@pytest.mark.parametrize("cache", [True, False])
def test_left_padding_changes_nothing_that_is_generated(model, cache):
    short, padded = tokens()[:1, 6:], torch.cat([torch.zeros(1, 6, dtype=torch.long), tokens()[:1, 6:]], 1)
    batch = torch.cat([padded, tokens()[1:]])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "use_cache": cache}
    alone = model.generate(short, **options)[:, short.shape[1] :]
    together = model.generate(batch, attention_mask=(batch != 0).long(), **options)[:1, 16:]
    assert torch.equal(alone, together)


def test_pipelines_run_from_a_saved_directory(model, tiny_config, family, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    generate = pipeline("text-generation", model=str(tmp_path / "lm"))
    text = generate("w1 w2 w3", max_new_tokens=4, do_sample=False, return_full_text=False)
    ids = torch.tensor([tokenizer("w1 w2 w3")["input_ids"]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text[0]["generated_text"].split() == tokenizer.decode(expected[0, 3:], skip_special_tokens=True).split()

    classifier = shake(build(tiny_config(family, pad_token_id=0), cls=AutoModelForSequenceClassification))
    classifier.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    scores = pipeline("text-classification", model=str(tmp_path / "classifier"))("w1 w2 w3", top_k=None)
    expected = classifier(ids).logits.softmax(-1)[0].max().item()
    assert scores[0]["score"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads_compute_in_it_and_keep_lam(model, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert [(lam.dtype, lam.item()) for lam in lams(half)] == [(torch.float32, torch.tensor(0.3).item())] * 4
    out = half(tokens()).logits
    assert out.dtype == dtype
    assert (out.float() - model(tokens()).logits).abs().mean() < 0.05 * model(tokens()).logits.abs().mean()


def test_a_device_map_and_offloading_to_disk_change_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    one_block = f"{model.base_model_prefix}.{model.config.norm_pin.blocks}.1"
    leaves = [name for name, module in model.named_modules() if not [*module.children()]]
    spread = {name: "disk" if name.startswith(one_block) else "cpu" for name in leaves}
    for device_map in ("cpu", "auto", spread):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert any(parameter.is_meta for parameter in loaded.parameters())  # offloaded indeed


def test_a_sharded_checkpoint_is_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_the_same_model(model, clone):
    twin = clone(model)
    assert torch.equal(twin(tokens()).logits, model(tokens()).logits)
    set_lam(twin, 2.0)
    assert [lam.item() for lam in lams(model)] == [lams(build(model.config))[0].item()] * 4


def test_a_model_made_on_the_meta_device_is_whole_when_materialized(model):
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *lams(empty)])
    empty.to_empty(device="cpu")
    # State dicts lack every non-persistent buffer: lam must be there by itself, Transformers' own are copied here.
    for (name, buffer), (_, other) in zip(model.named_buffers(), empty.named_buffers(), strict=True):
        if not name.endswith("lam"):
            other.copy_(buffer)
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty.eval()(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tiny_config, family, tied, tmp_path):
    model = shake(build(tiny_config(family, tie_word_embeddings=tied)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_hidden_states_and_attentions_come_out(model):
    model.set_attn_implementation("eager")
    out = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in out.hidden_states] == [(2, 16, 32)] * 3
    assert [attention.shape for attention in out.attentions] == [(2, 2, 16, 16)] * 2


def test_lora_with_default_targets_saves_loads_and_merges(model, tmp_path):
    before = model(tokens()).logits
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False)).eval()
    after = wrapped(tokens()).logits
    assert not torch.allclose(before, after)
    wrapped.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(loaded(tokens()).logits, after)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, after)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(tokens()).logits, merged(tokens()).logits)


def test_lora_targets_are_those_of_the_stock_model(model, stock_model, family):
    ours, stock = (peft.get_peft_model(each, peft.LoraConfig()) for each in (model, stock_model(family)))
    assert ours.peft_config["default"].target_modules == stock.peft_config["default"].target_modules


def test_hf_trainer_trains_with_our_decay_groups(tiny_config, family, tmp_path):
    model = build(tiny_config(family, norm_type="ibnorm_l", norm_kwargs={"learn_lam": True}))
    spared = set(no_decay_parameter_names(model))
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in parameters.items() if name not in spared], "weight_decay": 0.5},
        {"params": [p for name, p in parameters.items() if name in spared], "weight_decay": 0.0},
    ]
    row = tokens()[0]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(tmp_path, max_steps=30, per_device_train_batch_size=4, save_strategy="no", **QUIET),
        train_dataset=[{"input_ids": row, "labels": row}] * 8,
        optimizers=(torch.optim.AdamW(groups, lr=1e-2), None),
    )
    with torch.no_grad():
        before = model(row[None], labels=row[None]).loss.item()
    gains = [norm.weight.clone() for norm in norm_sites(model).values()]
    trainer.train()
    with torch.no_grad():
        assert model.eval()(row[None], labels=row[None]).loss.item() < before - 1
    in_norms = [p for norm in norm_sites(model).values() for p in norm.parameters()]
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {decays[id(p)] for p in in_norms} == {0.0}
    assert not any(torch.equal(a, norm.weight) for a, norm in zip(gains, norm_sites(model).values(), strict=True))
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(row[None]).logits, model(row[None]).logits)


def test_hf_trainer_refuses_checkpointing_that_would_draw_other_noise(tiny_config, family, tmp_path):
    model = build(tiny_config(family, norm_type="layernormalnorm"))
    kwargs = {"preserve_rng_state": False, "use_reentrant": False}
    args = TrainingArguments(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, max_steps=1, **QUIET
    )
    trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": tokens()[0], "labels": tokens()[0]}])
    with pytest.raises(ValueError, match="preserve_rng_state"):
        trainer.train()


def test_the_model_exports(model):
    exported = torch.export.export(model, (), {"input_ids": tokens(), "use_cache": False}, strict=False)
    out = exported.module()(input_ids=tokens(1), use_cache=False)
    torch.testing.assert_close(out.logits, model(tokens(1)).logits)


@pytest.mark.parametrize("name", OURS)
def test_functional_call_and_vmap_of_gradients_go_through_the_reference(name):
    norm = build_norm(name, 8, dtype=torch.float64).eval()
    torch.manual_seed(0)
    rows = torch.randn(5, 8, dtype=torch.float64)

    def loss(parameters, row):
        return functional_call(norm, parameters, (row,)).pow(3).sum()

    parameters = {key: torch.randn_like(p) for key, p in norm.named_parameters()}
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, rows)
    for i, row in enumerate(rows):
        alone = {key: p.clone().requires_grad_() for key, p in parameters.items()}
        loss(alone, row).backward()
        for key, p in alone.items():
            torch.testing.assert_close(each[key][i], p.grad)
    twice = vmap(grad(lambda row: grad(functools.partial(loss, parameters))(row).square().sum()))(rows)
    assert torch.isfinite(twice).all()


def test_per_example_gradients_of_a_whole_model_agree_with_one_at_a_time(model):
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.set_attn_implementation("eager")

    def loss(parameters, row):
        inputs = {"input_ids": row[None], "labels": row[None], "use_cache": False}
        return functional_call(model, parameters, (), inputs).loss

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, tokens())
    model.zero_grad()
    model(tokens()[:1], labels=tokens()[:1]).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name][0], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_a_training_step_compiles_without_a_graph_break(tiny_config, family, name):
    config = tiny_config(family, norm_type=name, norm_kwargs={"noise": 0.0} if name == "layernormalnorm" else None)
    model = build(config)
    torch.compiler.reset()  # every norm compiles the same lines anew, and their number is limited
    compiled = torch.compile(model.eval(), fullgraph=True)
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        forward(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for eager, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, fused, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True])
def test_changing_lam_does_not_recompile(tiny_config, learned):
    model = build(tiny_config("llama", norm_type="ibnorm_l", norm_kwargs={"learn_lam": learned}))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    inputs = {"input_ids": tokens(), "labels": tokens(), "use_cache": False}
    compiled(**inputs).loss.backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for lam in (0.5, 1.0, 2.0):
            set_lam(model, lam)
            torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)
