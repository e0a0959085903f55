"""Tokenizers of other kinds of models: what a language model cannot use is dropped, and the text's ids stay."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.data.tokens import Encoder
from train_lm.tokenizer import for_language_model, load_tokenizer, train_tokenizer, wrap_tokenizer

TEXTS = ["It is a truth universally acknowledged", "that a single man in possession of a good fortune " * 5]


def like_t5(folder, first=False):
    """A tokenizer built as T5's: pieces of a unigram model, 100 sentinels behind them, and </s> at every text's end."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS, trainer)
    known = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    pieces = [*known[:3], *sentinels, *known[3:]] if first else known + sentinels
    tokenizer.model = models.Unigram(pieces, unk_id=2)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[f"<extra_id_{i}>" for i in range(100)],
    )
    made.save_pretrained(folder)
    return made


def test_t5s_sentinels_and_the_end_after_every_text_are_dropped_and_ids_stay(tmp_path):
    original = like_t5(tmp_path / "t5")
    loaded = load_tokenizer("tokenizer", tmp_path / "t5")
    assert len(loaded) == len(original) - 100
    assert not [token for token in loaded.get_vocab() if "extra_id" in token]
    for text in TEXTS:
        assert original(text).input_ids[-1] == original.eos_token_id
        assert loaded(text).input_ids == original(text).input_ids[:-1]
        assert loaded.decode(loaded(text).input_ids) == text
        assert Encoder(loaded).documents([text]).tolist() == original(text).input_ids
    assert (loaded.eos_token, loaded.unk_token, loaded.pad_token) == ("</s>", "<unk>", "<pad>")
    assert max(loaded.get_vocab().values()) == len(loaded) - 1


def test_what_was_made_of_it_is_saved_and_loads_as_it_is(tmp_path):
    like_t5(tmp_path / "t5")
    loaded = load_tokenizer("tokenizer", tmp_path / "t5")
    loaded.save_pretrained(tmp_path / "saved")
    for again in (AutoTokenizer.from_pretrained(tmp_path / "saved"), load_tokenizer("tokenizer", tmp_path / "saved")):
        assert again.get_vocab() == loaded.get_vocab()
        assert [again(text).input_ids for text in TEXTS] == [loaded(text).input_ids for text in TEXTS]
        assert again.eos_token_id == loaded.eos_token_id


def test_a_tokenizer_without_such_things_is_left_alone(tmp_path):
    wrap_tokenizer(train_tokenizer(TEXTS, 280), 64).save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer
    assert load_tokenizer("tokenizer", tmp_path).backend_tokenizer.to_str() == plain.to_str()


def test_sentinels_before_other_tokens_are_refused(tmp_path):
    like_t5(tmp_path / "t5", first=True)
    with pytest.raises(UserError, match="tokenizer: its <extra_id_N> stand before other tokens"):
        load_tokenizer("tokenizer", tmp_path / "t5")


def test_a_beginning_of_text_stays_where_the_end_is_dropped(tmp_path):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    like_llama = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    like_llama.save_pretrained(tmp_path)
    loaded = load_tokenizer("tokenizer", tmp_path)
    assert loaded(TEXTS[0]).input_ids == like_llama(TEXTS[0]).input_ids[:-1]
    assert loaded(TEXTS[0]).input_ids[0] == loaded.bos_token_id == 0
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<s>", "</s>", "<unk>")


@pytest.mark.slow
def test_an_id_beyond_all_rows_is_refused_before_the_vocabulary_is_written_down():
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "b": 10**9}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(
        UserError, match=r"^tokenizer: it has a token with the id 1000000000, must be at most 16777216$"
    ):
        for_language_model(tokenizer)
