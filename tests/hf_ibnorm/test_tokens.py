"""Text as tokens: what looks like a special token is text, long texts have the tokens they have as a whole."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_ibnorm import load_corpus
from hf_ibnorm.data import tokens
from hf_ibnorm.data.text import draw_text
from hf_ibnorm.data.tokens import Encoder, begins_texts

pytestmark = pytest.mark.oldest
TEXTS = ["It is a truth universally acknowledged, that </s> is a word of its own < / s > unk pad", "<s> and <pad> !"]
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(size=300):
    """As GPT-2's: special tokens are in the vocabulary, no merge makes them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=ALPHABET)
    tokenizer.train_from_iterator([load_corpus("sotu", "train")[0]], trainer)
    return tokenizer


def whole_words():
    """As Llama 3's: a word that is in the vocabulary is taken whole, merges or not."""
    words = ["an", "and", "and</s>"]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *ALPHABET, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "n"), ("an", "d"), ("and", "</s>")], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.ByteLevel()
    return tokenizer


def unigram():
    """As T5's: special tokens are pieces like all others, and of the best score."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=70, special_tokens=SPECIAL, unk_token="<unk>")
    )
    return tokenizer


def word_pieces():
    """As BERT's, with words of its own."""
    vocabulary = {
        token: i for i, token in enumerate([*SPECIAL, *"<>/!spadun", *(f"##{letter}" for letter in "</>spadun")])
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(cleanup=False)
    return tokenizer


KINDS = {each.__name__: each for each in (byte_level, whole_words, unigram, word_pieces)}


def wrapped(tokenizer, **names):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(names or NAMES))


@pytest.mark.parametrize("kind", KINDS)
def test_what_looks_like_a_special_token_is_text(kind, tmp_path):
    wrapped(KINDS[kind]()).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "and</s> <s> <pad> and"
    assert {0, 1, 3} <= set(tokenizer(text, add_special_tokens=False).input_ids), "by itself it takes it for tokens"
    (*ids, end) = Encoder(tokenizer).documents([text])
    assert not {0, 1, 3} & set(ids)
    assert end == tokenizer.eos_token_id
    if kind not in ("word_pieces", "whole_words"):
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_all_other_text_has_the_tokens_it_always_had(kind):
    tokenizer = wrapped(KINDS[kind]())
    for text in ("and a truth < is / s > !", "", "  and\n\n pad", "and unk 日本 😀"):
        assert Encoder(tokenizer).documents([text])[:-1].tolist() == tokenizer(text, add_special_tokens=False).input_ids


def test_a_special_token_of_one_character_stays_the_letter_that_spells_it():
    tokenizer = wrapped(byte_level(), eos_token="</s>", pad_token="!")
    assert tokenizer.decode(Encoder(tokenizer).documents(["oh!"])[:-1]) == "oh!"


def test_what_was_set_on_the_tokenizer_changes_nothing():
    tokenizer = wrapped(byte_level())
    encoder = Encoder(tokenizer)
    expected = encoder.documents(TEXTS).tolist()
    tokenizer(TEXTS, padding=True, truncation=True, max_length=4)
    assert Encoder(tokenizer).documents(TEXTS).tolist() == encoder.documents(TEXTS).tolist() == expected


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "llama_2"])
def test_parts_of_a_long_text_have_the_tokens_of_the_whole(kind, monkeypatch):
    if kind == "llama_2":
        plain = byte_level()
        plain.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer = wrapped(plain)
    else:
        tokenizer = wrapped(KINDS[kind]())
    text = load_corpus("sotu", "train")[0]
    text = " ".join(text.split()) if kind == "llama_2" else text
    whole = Encoder(tokenizer).documents([text, "and"])
    monkeypatch.setattr(tokens, "PART", 500)
    monkeypatch.setattr(tokens, "AT_ONCE", 2000)
    assert len(text) > 10 * tokens.PART
    encoder = Encoder(tokenizer)
    assert encoder.drops_space == (kind != "byte_level")
    np.testing.assert_array_equal(encoder.documents([text, "and"]), whole)


def test_a_long_text_without_words_is_cut_anywhere(monkeypatch):
    monkeypatch.setattr(tokens, "PART", 100)
    tokenizer = wrapped(byte_level())
    text = "".join(map(str, range(2000))) + "好" * 1000
    assert tokenizer.decode(Encoder(tokenizer).documents([text])[:-1]) == text


def begins_with_bos(tokenizer, token="<s>"):
    special = [(token, tokenizer.token_to_id(token))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{token} $A", special_tokens=special)
    return tokenizer


def test_documents_begin_with_bos_where_the_tokenizer_begins_texts_with_it_or_it_is_asked_for():
    plain, begins = wrapped(byte_level()), wrapped(begins_with_bos(byte_level()))
    assert (begins_texts(plain), begins_texts(begins)) == (False, True)
    bare = Encoder(plain).documents(TEXTS).tolist()
    assert bare == Encoder(begins, False).documents(TEXTS).tolist()
    expected = [id for text in TEXTS for id in [0, *Encoder(plain).documents([text]).tolist()]]
    assert Encoder(begins).documents(TEXTS).tolist() == Encoder(plain, True).documents(TEXTS).tolist() == expected
    assert Encoder(begins).key != Encoder(begins, False).key
    with pytest.raises(ValueError, match="add_bos: got true, the tokenizer has no bos_token"):
        Encoder(wrapped(byte_level(), eos_token="</s>"), True)


def test_a_bos_that_is_the_end_of_the_text_before_is_not_set_twice():
    tokenizer = wrapped(begins_with_bos(byte_level(), "</s>"), bos_token="</s>", eos_token="</s>")
    assert begins_texts(tokenizer)
    assert Encoder(tokenizer).documents(["a", "b"]).tolist().count(tokenizer.eos_token_id) == 2


def test_text_to_calibrate_or_measure_on_is_text_too_and_begins_with_bos(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"and </s> <pad> so on. " * 200)
    plain, begins = wrapped(byte_level()), wrapped(begins_with_bos(byte_level()))
    texts = [draw_text("data", str(path), "test", each, 600, 128) for each in (plain, begins)]
    bare, begun = (each.ids for each in texts)
    assert not torch.isin(bare, torch.tensor([0, 1, 2, 3])).any()
    assert plain.decode(bare[0]).startswith("and </s> <pad> so on.")
    assert (begun[:, 0] == 0).all()
    assert torch.equal(begun[:, 1:], bare[:, 1:])
    assert texts[0].bytes == texts[1].bytes


@pytest.mark.parametrize("documents", [["a short document " * 3] * 400, ["a long document " * 3000]])
def test_text_to_measure_on_may_be_many_short_documents_of_any_kind_of_file(tmp_path, documents):
    import json

    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    assert draw_text("data", str(path), "test", wrapped(byte_level()), 1024, 256).ids.shape == (4, 256)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"te', "line 2, is no JSON"),
        ("a.txt", b"\xff", "cannot be read"),
        ("a.csv", b"text", "allowed are .txt"),
        ("gone.txt", None, "no such file"),
        ("x" * 300, None, "neither a corpus"),
        ("a\0b", None, "neither a corpus"),
    ],
)
def test_text_that_cannot_be_measured_on_is_one_line_that_names_it(tmp_path, monkeypatch, name, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        draw_text("report_data", name, "test", wrapped(byte_level()), 1024, 256)
    assert str(caught.value).startswith("report_data: ")
    assert len(str(caught.value).splitlines()) == 1
