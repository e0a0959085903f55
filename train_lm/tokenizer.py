"""The tokenizer of a run: trained on its text, or an existing one."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.swap.loading import TOKENIZER_FILES, has_tokenizer, load

END_OF_TEXT = "<|endoftext|>"
LARGEST_ID = 2**24
"""The largest id that a token may have: no model has as many rows."""
_SENTINEL = re.compile(r"<extra_id_\d+>")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE tokenizer on `documents`; returns it as the JSON text of the `tokenizers` library.

    Every byte has a token, so no text is unknown; the one special token stands between documents. Deterministic.
    `vocab_size` is at least 257 (256 bytes and the special token); small corpora may give fewer tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer.to_str()


def wrap_tokenizer(json_text: str, context: int) -> PreTrainedTokenizerFast:
    """The trained tokenizer as one of Transformers; a text starts after the end of the text before."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json_text),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(field: str, where: str | Path) -> PreTrainedTokenizerFast:
    """A tokenizer from a directory or from the Hub; UserError unless it is a fast one with a token that ends a text."""
    if Path(where).is_dir() and not has_tokenizer(Path(where)):
        raise UserError(
            f"{field}: got {str(where)!r}, no tokenizer could be loaded: it has none of {', '.join(TOKENIZER_FILES)}"
        )
    tokenizer = load(field, AutoTokenizer, where)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{field}: got {str(where)!r}, a {type(tokenizer).__name__}; must be a fast tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{field}: got {str(where)!r}, which has no eos_token to set between documents")
    tokenizer = for_language_model(tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def saved_and_loaded(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """`tokenizer` as a checkpoint gives it back.

    Loading adds parts without effect; with them from the start, a resumed run has the same tokenizer.
    """
    with bad_input(Exception, about="TMPDIR: a tokenizer cannot be written there: "), TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return load_tokenizer("tokenizer", folder)


def for_language_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """`tokenizer` without the parts that serve encoder-decoder models such as T5; most come back as they are.

    T5 marks the gaps it learns to fill with 100 tokens that no text holds (`<extra_id_0>`, ...), and ends every text it
    encodes with `</s>`. Embedding rows for these tokens would never be trained; and a text does not go on after `</s>`,
    so that scores of prompts that end with it would mean nothing. The ids of the text itself stay the same.

    Raises:
        UserError: the parts cannot be taken out; or an id is so large that to write the vocabulary, with all ids below,
            would not end.
    """
    if (largest := max(tokenizer.get_vocab().values(), default=0)) > LARGEST_ID:
        raise UserError(f"tokenizer: it has a token with the id {largest}, must be at most {LARGEST_ID}")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    sentinels = {token["content"] for token in content["added_tokens"] if _SENTINEL.fullmatch(token["content"])}
    ends_texts = tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]
    if not sentinels and not ends_texts:
        return tokenizer
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in sentinels]
    if content["model"]["type"] == "Unigram":
        content["model"]["vocab"] = [piece for piece in content["model"]["vocab"] if piece[0] not in sentinels]
    if ends_texts:
        content["post_processor"] = _without(content["post_processor"], tokenizer.eos_token)
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        **{name: token for name, token in named.items() if token not in sentinels},
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
    )
    if made("a").input_ids[-1:] == [made.eos_token_id]:
        raise UserError("tokenizer: it ends every text it encodes, and how to undo that is not known")
    if made.get_vocab() != {token: i for token, i in tokenizer.get_vocab().items() if token not in sentinels}:
        raise UserError("tokenizer: its <extra_id_N> stand before other tokens, whose ids would change without them")
    return made


def _without(processor: dict[str, Any], token: str | None) -> dict[str, Any]:
    """A tokenizer's post-processor that does not add `token`."""
    if processor["type"] == "Sequence":
        return {**processor, "processors": [_without(part, token) for part in processor["processors"]]}
    if processor["type"] != "TemplateProcessing":
        return processor
    templates = {
        name: [piece for piece in processor[name] if piece.get("SpecialToken", {}).get("id") != token]
        for name in ("single", "pair")
    }
    return {**processor, **templates}
