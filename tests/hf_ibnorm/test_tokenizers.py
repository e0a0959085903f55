"""Tokenizers of GPT-2's that leave it to the model type which class they are, as those of the Hub's gpt2 family do."""

import json

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, GPT2Tokenizer

from hf_ibnorm import apply_norm, convert_checkpoint
from hf_ibnorm.swap.loading import load_tokenizer
from hf_ibnorm.swap.remote_code import add_remote_code
from train_lm.tokenizer import load_tokenizer as tokenizer_to_train_with

pytestmark = pytest.mark.oldest

END, TEXT = "<|endoftext|>", "some text<|endoftext|>to learn"


@pytest.fixture
def nameless(tmp_path):
    """Put a tokenizer into a folder that names no class: nameless(folder, "vocab.json", ...) writes these files."""

    def write(folder, *files):
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(["some text to learn from " * 9], 300, special_tokens=[END])
        folder.mkdir(exist_ok=True)
        made = tmp_path / "made"
        made.mkdir()
        trained.save_model(str(made))
        GPT2Tokenizer(str(made / "vocab.json"), str(made / "merges.txt")).backend_tokenizer.save(
            str(made / "tokenizer.json")
        )
        (made / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
        for file in files:
            (made / file).rename(folder / file)
        return folder

    return write


FORMS = [("tokenizer.json", "tokenizer_config.json"), ("vocab.json", "merges.txt")]


def described(tokenizer):
    specials = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    return type(tokenizer), specials, tokenizer(TEXT).input_ids, tokenizer.model_max_length


@pytest.mark.parametrize("files", FORMS, ids=" ".join)
def test_a_converted_gpt2_keeps_its_tokenizer(stock_model, nameless, files, tmp_path):
    stock_model("gpt2", vocab_size=300).save_pretrained(tmp_path / "stock")
    nameless(tmp_path / "stock", *files)
    expected = described(AutoTokenizer.from_pretrained(tmp_path / "stock"))
    assert expected[:2] == (GPT2Tokenizer, (END,) * 3)
    convert_checkpoint(tmp_path / "stock", tmp_path / "swapped", "ibnorm_l")
    convert_checkpoint(tmp_path / "swapped", tmp_path / "back", "layernorm")
    for folder in ("swapped", "back"):
        assert described(AutoTokenizer.from_pretrained(tmp_path / folder)) == expected
        assert described(load_tokenizer(tmp_path / folder)[1]) == expected  # for evaluation
        assert described(tokenizer_to_train_with("tokenizer", tmp_path / folder)) == expected
        assert (
            json.loads((tmp_path / folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "GPT2Tokenizer"
        )


@pytest.mark.parametrize("files", FORMS, ids=" ".join)
def test_our_model_type_chooses_the_tokenizer_as_the_stock_one_does(stock_model, nameless, files, tmp_path):
    apply_norm(stock_model("gpt2", vocab_size=300), "ibnorm_l").save_pretrained(tmp_path / "patched")
    nameless(tmp_path / "patched", *files)
    assert described(AutoTokenizer.from_pretrained(tmp_path / "patched"))[:2] == (GPT2Tokenizer, (END,) * 3)
    config = tmp_path / "patched" / "tokenizer_config.json"
    assert not config.exists() or "tokenizer_class" not in json.loads(config.read_text())
    add_remote_code(tmp_path / "patched")  # where our model type is not known
    assert json.loads(config.read_text())["tokenizer_class"] == "GPT2Tokenizer"


def test_a_class_that_is_named_stays(source, tmp_path):
    folder = source("gpt2")
    named = json.loads((folder / "tokenizer_config.json").read_text())
    assert named["tokenizer_class"] != "GPT2Tokenizer"
    convert_checkpoint(folder, tmp_path / "swapped", "ibnorm_l")
    assert json.loads((tmp_path / "swapped" / "tokenizer_config.json").read_text()) == named
    assert described(AutoTokenizer.from_pretrained(tmp_path / "swapped")) == described(
        AutoTokenizer.from_pretrained(folder)
    )
