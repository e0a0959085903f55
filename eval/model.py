"""The model under test: loaded whole or refused, wrapped by lm-eval's own HFLM, hashed."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_ibnorm.base.command import quiet_libraries
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import sha256, sha256_tensors
from hf_ibnorm.swap.loading import load_tokenizer, load_whole


def processes() -> int:
    """How many processes a launcher (accelerate, torchrun) has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the one of these processes that writes files and prints."""
    return os.environ.get("RANK", "0") == "0"


def load_model(path: Path, batch_size: int | str, device: str | None, dtype: str) -> Any:
    """lm-eval's stock HFLM around the checkpoint at `path`; UserError where the checkpoint cannot be loaded whole, or
    its tokenizer does not fit the model."""
    import torch

    quiet_libraries()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with bad_input(RuntimeError, AssertionError, about=f"device: got {device!r}: "):
        torch.zeros(1, device=device).item()  # a device without values, such as meta, has none to give
    config, tokenizer = load_tokenizer(path)
    model = load_whole(path, config, dtype)  # the harness itself would not tell of missing weights
    return wrap_model(model, tokenizer, batch_size, device)


def wrap_model(model: Any, tokenizer: Any, batch_size: int | str, device: str) -> Any:
    """lm-eval's stock HFLM around a causal language model of Transformers; UserError for a batch size that is to be
    found on a CPU, and a tokenizer without special tokens.

    Where a launcher has started several processes, each answers a part of the requests, on a GPU of its own if there
    are any.
    """
    if batch_size == "auto" and str(device).startswith("cpu"):
        raise UserError(
            "batch_size: got 'auto', on a CPU it must be a whole number: the search takes minutes and always ends at 64"
        )
    quiet_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError("tokenizer: it has neither a BOS nor an EOS token, lm-eval begins texts with one of them")
    if (tokenizer.pad_token_id or 0) >= model.config.vocab_size:  # a token without a row in the embedding
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    if processes() > 1:
        from accelerate import PartialState

        device = str(PartialState().device)
    lm = HFLM(
        pretrained=model.to(device),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        softmax_dtype="float32",  # in half precision choices would tie, and a constant model would not be noticed
    )
    if processes() > 1:
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, name, _divided(getattr(lm, name)))
    return lm


def _divided(answer: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """`answer`, a method of HFLM, divided over processes: each answers a part of the requests, and all get all answers.

    lm-eval itself divides documents: each process would draw other examples for its prompts, and one with fewer
    documents than processes would fail.
    """

    def answer_together(requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        from torch import distributed

        count, rank = distributed.get_world_size(), distributed.get_rank()
        mine = requests[rank::count]
        parts: list[list[Any]] = [[]] * count
        distributed.all_gather_object(parts, list(answer(mine, disable_tqdm=rank > 0)) if mine else [])
        answers: list[Any] = [None] * len(requests)
        for i, part in enumerate(parts):
            answers[i::count] = part
        return answers

    return answer_together


_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Fields of a generation_config that stay: the tokens with which the model's texts begin and end."""
_OF_GENERATE = ("use_cache", "output_attentions", "output_hidden_states", "transformers_version", "_from_model_config")
"""Fields of a generation_config that change no text."""


@contextmanager
def generation_config_aside(lm: Any) -> Iterator[dict[str, Any]]:
    """Have a model write as its tasks ask: while inside, its generation_config says with which tokens a text ends, and
    nothing else, such as a penalty for repetition.

    Yields:
        The fields put aside that would have changed the texts.
    """
    from transformers import GenerationConfig

    model = lm.model
    given = getattr(model, "generation_config", None) or GenerationConfig()
    # PEFT passes the wrapper's generation_config on to the model inside.
    before = [(each, vars(each)["generation_config"]) for each in model.modules() if "generation_config" in vars(each)]
    model.generation_config = GenerationConfig(**{name: getattr(given, name, None) for name in _ENDS})
    options, kept = given.to_diff_dict(), (*_ENDS, *_OF_GENERATE)
    try:
        yield {name: value for name, value in options.items() if name not in kept and value is not None}
    finally:
        model.generation_config = given
        for module, config in before:
            module.generation_config = config


def fingerprint(lm: Any) -> dict[str, Any]:
    """All of a model that its answers depend on: hashes of weights, config and tokenizer, and of the generation_config,
    which counts where a task does not say how to write; its dtype and longest input."""
    model, tokenizer = lm.model, lm.tokenizer
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NO_MATTER}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # The last call leaves its padding and truncation in the tokenizer: they are no part of it.
    rules = {**json.loads(backend.to_str()), "padding": None, "truncation": None} if backend else tokenizer.get_vocab()
    words = [str(tokenizer.chat_template), type(tokenizer).__name__]
    for field in ("add_bos_token", "clean_up_tokenization_spaces", "split_special_tokens"):
        words.append(str(getattr(tokenizer, field, None)))
    generation = getattr(model, "generation_config", None)
    options = generation.to_diff_dict() if generation else {}
    return {
        "weights": sha256_tensors(model.state_dict().items()),
        "config": sha256([_json(config)]),
        "tokenizer": sha256([json.dumps(rules, sort_keys=True), _json(tokenizer.special_tokens_map), *words]),
        "generation": sha256([_json({name: value for name, value in options.items() if name not in _OF_GENERATE})]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_length": lm.max_length,
    }


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


_NO_MATTER = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "auto_map", "architectures")
"""Fields of a config that change no answer, and that differ between a model on disk and the same one in memory."""
