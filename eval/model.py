"""The model under test: found on disk or on the Hub, loaded whole or refused, wrapped by lm-eval's own HFLM, hashed."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from hf_ibnorm.cli import UserError, bad_input, quiet_libraries
from hf_ibnorm.files import sha256, sha256_tensors

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def find_model(model: str) -> Path:
    """The directory with the checkpoint: `model` itself, its `model` (a training checkpoint), its `final` (a run), or
    the Hub's repository of that name, which is downloaded.

    Raises:
        UserError: there is none, or the Hub gives none.
    """
    path = Path(model)
    for candidate in (path, path / "model", path / "final"):
        if (candidate / "config.json").is_file():
            return candidate
    if path.exists() or not HUB_NAME.fullmatch(model):
        raise UserError(f"model: {path} is not a model directory (it has no config.json)")
    from huggingface_hub import snapshot_download

    with bad_input(Exception, about=f"model: {path} is no directory, and the Hub does not give it: "):
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))


def processes() -> int:
    """How many processes a launcher (accelerate, torchrun) has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one of them that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def load_model(path: Path, batch_size: int | str, device: str | None, dtype: str) -> Any:
    """lm-eval's stock HFLM around the checkpoint at `path`.

    Raises:
        UserError: the checkpoint cannot be loaded whole, or its tokenizer does not fit the model.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    quiet_libraries()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with bad_input(RuntimeError, AssertionError, about=f"device: got {device!r}: "):
        torch.empty(1, device=device)
    causes = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)
    if not any(path.glob("*token*")) and not any(path.glob("vocab.*")):
        raise UserError(f"tokenizer: {path} has none (no tokenizer.json); save it beside the model")
    with bad_input(*causes, about=f"model: {path} cannot be loaded: "):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise UserError(
            f"tokenizer: its highest token id is {highest}, the model's vocab_size is {config.vocab_size}; "
            f"the tokenizer in {path} is not this model's"
        )
    with bad_input(*causes, about=f"model: {path} cannot be loaded: "):
        # Loaded here and not by the harness, which would fill missing weights at random and say so nowhere.
        model, report = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = sorted(str(key) for key in report[problem])
            kind = problem.replace("_keys", "")
            raise UserError(f"model: the weights in {path} do not fit its config, {kind}: {', '.join(names[:3])}")
    return wrap_model(model, tokenizer, batch_size, device)


def wrap_model(model: Any, tokenizer: Any, batch_size: int | str, device: str) -> Any:
    """lm-eval's stock HFLM around a causal language model of Transformers; where a launcher has started several
    processes, each answers a part of the requests, on a GPU of its own if there are any.

    Raises:
        UserError: a batch size that is to be found on a CPU, or a tokenizer without special tokens.
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
    if processes() > 1:
        from accelerate import PartialState

        device = str(PartialState().device)
    kind = divided(HFLM) if processes() > 1 else HFLM
    return kind(
        pretrained=model.to(device),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        softmax_dtype="float32",  # in half precision choices would tie, and a constant model would not be noticed
    )


def divided(kind: type) -> type:
    """A model class of lm-eval of which every process answers a part of the requests, and all get all answers.

    lm-eval itself divides documents: each process would draw other examples for its prompts, and one with fewer
    documents than processes would fail.
    """

    class Divided(kind):  # type: ignore[misc, valid-type]
        def _part(self, answer: Any, requests: list[Any]) -> list[Any]:
            from torch import distributed

            count, rank = distributed.get_world_size(), distributed.get_rank()
            mine = requests[rank::count]
            parts: list[list[Any]] = [[]] * count
            distributed.all_gather_object(parts, list(answer(mine, disable_tqdm=rank > 0)) if mine else [])
            found: list[Any] = [None] * len(requests)
            for i, part in enumerate(parts):
                found[i::count] = part
            return found

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return self._part(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return self._part(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return self._part(super().generate_until, requests)

    return Divided


def fingerprint(harness: Any) -> dict[str, Any]:
    """What the answers of a model depend on: hashes of weights, config and tokenizer, its dtype and longest input."""
    model, tokenizer = harness.model, harness.tokenizer
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NO_MATTER}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Padding and truncation are what the last call left there.
    rules = {**json.loads(backend.to_str()), "padding": None, "truncation": None} if backend else tokenizer.get_vocab()
    words = [
        json.dumps(rules, sort_keys=True),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        str(tokenizer.chat_template),
        type(tokenizer).__name__,
        str(getattr(tokenizer, "add_bos_token", None)),
    ]
    return {
        "weights": sha256_tensors(model.state_dict().items()),
        "config": sha256([json.dumps(config, sort_keys=True, default=str)]),
        "tokenizer": sha256(words),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_length": harness.max_length,
    }


_NO_MATTER = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "auto_map", "architectures")
"""Fields of a config that change no answer, and that differ between a model on disk and the same one in memory."""
