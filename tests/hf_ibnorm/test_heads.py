"""Heads besides language modeling: those that the stock models have, over models with our norms."""

import pytest
import torch
import transformers
from helpers import FAMILIES, FAMILY, STOCK_NORM, shake, stock_config, stock_of, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerFast, pipeline
from transformers.models.auto import modeling_auto

import hf_ibnorm
from hf_ibnorm import apply_norm, convert_checkpoint, restore_norm
from hf_ibnorm.sites import is_norm

pytestmark = pytest.mark.oldest

HEADS = [
    pytest.param(family, getattr(hf_ibnorm, name), id=name)
    for family in FAMILIES
    for name in hf_ibnorm.__all__
    if name.startswith(FAMILY[family].config.__name__.removesuffix("Config"))
    and ("For" in name or "DoubleHeads" in name)
    if not name.endswith("CausalLM")
]


def answer(model):
    """What a model gives for some tokens and labels, its loss first; no caches."""
    ids = tokens()
    kind = next(kind for kind in LABELS if kind in type(model).__name__)
    out = model(ids[None] if kind == "DoubleHeads" else ids, **LABELS[kind])
    return [value for value in out.to_tuple() if isinstance(value, torch.Tensor)]


LABELS = {
    "SequenceClassification": {"labels": torch.tensor([0, 1])},
    "TokenClassification": {"labels": tokens() % 2},
    "QuestionAnswering": {"start_positions": torch.tensor([2, 3]), "end_positions": torch.tensor([4, 9])},
    "DoubleHeads": {"labels": tokens()[None], "mc_labels": torch.tensor([1])},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_auto_class_that_knows_the_stock_model_knows_ours(tiny_config, family):
    config = tiny_config(family)
    stock = stock_config(config)
    known = {
        name: cls
        for name, cls in vars(modeling_auto).items()
        if hasattr(cls, "from_config") and type(stock) in (cls._model_mapping or ())
    }
    assert known.keys() >= {"AutoModel", "AutoModelForCausalLM", "AutoModelForTokenClassification"}
    assert ("AutoModelForPreTraining" in known) == (family == "gpt2")
    for auto in known.values():
        with torch.device("meta"):
            assert stock_of(type(auto.from_config(config))) is type(auto.from_config(stock))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stock_class_with_a_head_has_one_of_ours(family):
    modeling = getattr(transformers.models, family)
    stock = {name for name in dir(modeling) if name.startswith(("Llama", "GPT2")) and "PreTrained" not in name}
    models = {
        name
        for name in stock
        if isinstance(getattr(modeling, name), type) and hasattr(getattr(modeling, name), "forward")
    }
    prefix = FAMILY[family].config.__name__.removesuffix("Config")
    ours = {name.removeprefix("IBNorm") for name in hf_ibnorm.__all__ if name.startswith(prefix)}
    assert models == {name for name in ours if not name.endswith("Config")}


@pytest.mark.parametrize(("family", "cls"), HEADS)
def test_with_the_stock_norm_a_head_is_the_stock_one(tiny_config, family, cls):
    config = tiny_config(family, norm_type=STOCK_NORM[family], pad_token_id=0)
    made = []
    for model, its_config in ((cls, config), (stock_of(cls), stock_config(config))):
        torch.manual_seed(0)
        made.append(model(its_config))
    ours, stock = made
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in stock.state_dict().items())
    assert sorted(ours.state_dict()) == sorted(stock.state_dict())
    for mode in (True, False):  # dropout, too
        answers = []
        for model in made:
            torch.manual_seed(0)
            answers.append(answer(model.train(mode)))
        for a, b in zip(*answers, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def assert_same(model, expected):
    """But for what a product of matrices rounds differently where its memory begins elsewhere."""
    for a, b in zip(answer(model.eval()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("family", "cls"), HEADS)
def test_a_patched_head_saves_loads_converts_and_is_restored(stock_model, family, cls, tmp_path):
    model = stock_model(family, stock_of(cls), pad_token_id=0).eval()
    model.save_pretrained(tmp_path / "stock")
    before = answer(model)
    apply_norm(model, "ibnorm_t", lam=0.3)
    assert type(model) is cls
    after = answer(model)
    assert not torch.equal(before[0], after[0])
    model.save_pretrained(tmp_path / "patched")
    convert_checkpoint(tmp_path / "stock", tmp_path / "converted", "ibnorm_t", norm_kwargs={"lam": 0.3})
    loads = [cls, *(getattr(transformers, name) for name, ours in FAMILY[family].auto_classes.items() if ours is cls)]
    for folder in ("patched", "converted"):
        for load in loads:
            loaded = load.from_pretrained(tmp_path / folder)
            assert type(loaded) is cls
            assert_same(loaded, after)
    convert_checkpoint(tmp_path / "converted", tmp_path / "back", STOCK_NORM[family])
    for stock in (restore_norm(model), stock_of(cls).from_pretrained(tmp_path / "back")):
        assert type(stock) is stock_of(cls)
        assert_same(stock, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_classification_pipeline_runs_from_a_saved_directory(tiny_config, family, tmp_path, transformers_log):
    model = shake(AutoModelForTokenClassification.from_config(tiny_config(family, num_labels=3)))
    assert sum(is_norm(module) for module in model.modules()) == 5
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"<end>": 0, **{f"w{i}": i for i in range(1, 61)}}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(tmp_path)
    found = pipeline("token-classification", model=str(tmp_path))("w1 w2 w3")
    expected = model(torch.tensor([[1, 2, 3]])).logits[0].argmax(-1)
    assert [each["entity"] for each in found] == [model.config.id2label[int(label)] for label in expected]
    assert "not supported" not in transformers_log.text
