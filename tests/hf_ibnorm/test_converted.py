"""A converted checkpoint in the libraries that people train and generate with: it is a model like any other there."""

import peft
import pytest
import torch
import trl
from datasets import Dataset
from helpers import FAMILIES, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from hf_ibnorm import IBNorm, convert_checkpoint

NORM = {"identity": "ibnorm_l", "keep": "ibnorm_t"}
STEPS = 24
QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
TRAINING = {"max_steps": STEPS, "learning_rate": 2e-2, "lr_scheduler_type": "constant", "logging_steps": 1}
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}


@pytest.fixture(params=NORM)
def init(request):
    return request.param


@pytest.fixture(params=FAMILIES)
def converted(request, init, source, tmp_path):
    """Directory of a converted checkpoint, with its tokenizer."""
    convert_checkpoint(source(request.param), tmp_path / "converted", NORM[init], init=init)
    return tmp_path / "converted"


@pytest.fixture
def model(converted):
    model = load(converted)
    assert any(isinstance(module, IBNorm) for module in model.modules())
    return model


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_lora_trains_saves_loads_anew_and_merges(model, tmp_path):
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for _ in range(STEPS):
        loss = wrapped(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < seen[0]
    expected = wrapped.eval()(tokens()).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()  # finds the base by its path
    assert torch.equal(again(tokens()).logits, expected)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged")(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def test_hf_trainer_trains_it_and_saves_what_it_trained(model, tmp_path):
    args = TrainingArguments(tmp_path / "run", per_device_train_batch_size=2, **TRAINING, **QUIET)
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    trainer.save_model(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(tokens()).logits, model.eval()(tokens()).logits)


ROWS = {
    "text": [{"text": "some text to learn from"}, {"text": "to learn some text"}],
    "chat": [
        {"messages": [{"role": "user", "content": "some text"}, {"role": "assistant", "content": " to learn from"}]}
    ],
}


# What is trained on matters to how TRL reads it, what is trained to how it is saved: quickly, not each with each.
@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        pytest.param(kind, whole, marks=[] if (kind == "text") == whole else [pytest.mark.slow])
        for kind in ROWS
        for whole in (True, False)
    ],
)
def test_trl_s_sft_trainer_trains_it_from_its_directory(converted, kind, whole, tmp_path):
    adapter = None if whole else peft.LoraConfig(task_type="CAUSAL_LM")
    args = trl.SFTConfig(
        tmp_path / "run", per_device_train_batch_size=2, max_length=32, bf16=False, **TRAINING, **QUIET
    )
    trainer = trl.SFTTrainer(str(converted), args, train_dataset=Dataset.from_list(ROWS[kind] * 4), peft_config=adapter)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    trainer.save_model(tmp_path / "saved")
    again = (load if whole else peft.AutoPeftModelForCausalLM.from_pretrained)(tmp_path / "saved").eval()
    assert torch.equal(again(tokens()).logits, trainer.model.eval()(tokens()).logits)


def test_greedy_generation_is_the_most_likely_token_every_time(model):
    ids = tokens()
    for _ in range(GREEDY["max_new_tokens"]):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(tokens(), **GREEDY), ids)


def test_a_static_cache_generates_the_same(model):
    assert torch.equal(
        model.generate(tokens(), cache_implementation="static", **GREEDY), model.generate(tokens(), **GREEDY)
    )


def test_sampling_is_repeated_by_its_seed(model):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate(tokens(), **{**GREEDY, "do_sample": True}))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_pipeline_generates_from_its_directory(converted):
    generate = pipeline("text-generation", model=str(converted))
    text = generate("some text", return_full_text=False, **GREEDY)[0]["generated_text"]
    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = torch.tensor([tokenizer("some text").input_ids])
    expected = load(converted).generate(ids, **GREEDY)[0, ids.shape[1] :]
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.slow
def test_it_compiles_without_a_graph_break(model):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(tokens(), use_cache=False).logits, model(tokens()).logits, rtol=1e-4, atol=1e-5
        )
