"""Language models on disk or on the Hub: found, and loaded whole or refused."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..base import layout
from ..base.command import quiet_libraries
from ..base.errors import UserError, bad_input
from ..base.files import write_json
from ..base.reading import reading, told
from ..base.room import check_model

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def find_model(model: str) -> Path:
    """The directory with the checkpoint: `model` itself, its `model` (a training checkpoint), its `final` (a run), or
    the Hub's repository of that name, which is downloaded.

    Raises:
        UserError: there is none, or the Hub gives none.
    """
    path = Path(model)
    with reading("model", model[:100]):  # a name may be too long, or hold a zero byte
        for candidate in (path, path / layout.MODEL, path / layout.FINAL):
            if (candidate / "config.json").is_file():
                return candidate
        exists = path.exists()
    if exists or not HUB_NAME.fullmatch(model):
        raise UserError(f"model: {path} is not a model directory (it has no config.json)")
    from huggingface_hub import snapshot_download

    with bad_input(Exception, about=f"model: {path} is no directory, and the Hub does not give it: "):
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))


def checkpoints_of(run: Path) -> dict[int, Path]:
    """Step → the model that a training run left there, in order; none where `run` is no run directory of train_lm."""
    models = {}
    prefix = layout.checkpoint_name("")
    for config in run.glob(f"{layout.CHECKPOINTS}/{prefix}*/{layout.MODEL}/config.json"):
        with suppress(ValueError):  # a folder with another name
            models[int(config.parts[-3].removeprefix(prefix))] = config.parent
    return dict(sorted(models.items()))


def load(field: str, cls: Any, where: str | Path, **options: Any) -> Any:
    """`cls.from_pretrained(where)`. Code in a checkpoint is never run, whatever anybody answers.

    Args:
        field: what errors call it.
        cls: a class of Transformers, or one of its Auto classes.
        where: directory, or name on the Hub.
        **options: of `from_pretrained`.

    Raises:
        UserError: whatever goes wrong.
    """
    try:
        with reading(field, where):
            loaded = cls.from_pretrained(where, trust_remote_code=False, **options)
            if hasattr(loaded, "is_fast"):
                loaded("a")  # a tokenizer with a setting of the wrong type fails when it is first used
            return loaded
    except UserError as error:
        reason = told(error.__cause__ or error)
        if "trust_remote_code" in reason or "custom code" in reason:
            reason = "it needs code of its own, which lies there and is never run"
        elif os.path.isdir(where):
            raise
        else:
            reason = f"no such directory, and the Hub gives no model: {reason}"
        raise UserError(f"{field}: got {str(where)[:200]!r}, {reason}") from error


def load_tokenizer(path: Path) -> tuple[Any, Any]:
    """The config and the tokenizer of the checkpoint at `path`.

    A special token beyond the model's vocabulary (often a `<pad>`) is allowed: only a text that spells it becomes it.
    Code that pads must check.

    Raises:
        UserError: config or tokenizer cannot be read, or the tokenizer does not fit the config.
    """
    from transformers import AutoConfig, AutoTokenizer

    quiet_libraries()
    if not any(path.glob("*token*")) and not any(path.glob("vocab.*")):
        raise UserError(f"tokenizer: {path} has none (no tokenizer.json); save it beside the model")
    config = load("model", AutoConfig, path, local_files_only=True)
    check_model("model", config)
    tokenizer = load("tokenizer", AutoTokenizer, path, local_files_only=True)
    check_tokenizer("tokenizer", tokenizer, config, path)
    return config, tokenizer


def check_tokenizer(field: str, tokenizer: Any, config: Any, where: Path) -> None:
    """Raise UserError where a text may become a token that the model's embedding has no row for.

    Args:
        field: what the error calls it.
        tokenizer: the tokenizer at `where`.
        config: of the model.
        where: for the message.
    """
    beyond = sorted(token for token in tokenizer.get_vocab().values() if token >= config.get_text_config().vocab_size)
    if beyond and (reachable := [token for token in beyond if _may_be_read(tokenizer, token)]):
        last = reachable[-1]
        raise UserError(
            f"{field}: it has the token {tokenizer.convert_ids_to_tokens(last)!r} with id {last}, the model's "
            f"vocab_size is {config.get_text_config().vocab_size}; the tokenizer in {where} is not this model's"
        )


def _may_be_read(tokenizer: Any, token: int) -> bool:
    """Whether a text may become `token`: only special tokens that were added, and begin or end no text, may not."""
    added = tokenizer.added_tokens_decoder.get(token)
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    return added is None or not added.special or token in (*ends, *tokenizer("a").input_ids)


def load_whole(path: Path, config: Any, dtype: Any) -> Any:
    """The causal language model at `path`.

    Raises:
        UserError: it cannot be loaded, or its weights are not those of the config.
    """
    from transformers import AutoModelForCausalLM

    options = {"config": config, "dtype": dtype, "use_safetensors": True, "local_files_only": True}
    model, report = load("model", AutoModelForCausalLM, path, output_loading_info=True, **options)
    # Transformers fills missing weights at random and says so nowhere but here.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key) for key in report[problem])
        if problem == "unexpected_keys":
            names = [name for name in names if not _OLD_MASK.search(name) or not _is_mask(path, name)]
        if names:
            kind = problem.replace("_keys", "")
            raise UserError(f"model: the weights in {path} do not fit its config, {kind}: {', '.join(names[:3])}")
    return model


_OLD_MASK = re.compile(r"(^|\.)attn\.(masked_)?bias$")
"""Buffers that old releases of Transformers saved with GPT-2: its causal mask, which is computed today."""


def _is_mask(path: Path, name: str) -> bool:
    """Whether a tensor of a checkpoint has the shape of a causal mask, (1, 1, n, n), or is the number that fills it."""
    from safetensors import safe_open

    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                if key == name or name.endswith(f".{key}") or key.endswith(f".{name}"):
                    shape = tensors.get_slice(key).get_shape()
                    return not shape or (len(shape) == 4 and shape[:2] == [1, 1] and shape[2] == shape[3])
    return False


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Every tokenizer that Transformers saves has one of these files."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a model directory has a tokenizer; without one, some releases of Transformers make an empty tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def name_tokenizer(folder: Path, name: str | None) -> None:
    """Write the tokenizer's class into a model directory, where neither tokenizer nor config names one.

    Transformers would choose the class by the model type; the files of the stock model may rely on that, as the Hub's
    gpt2 does.

    Args:
        folder: with a `config.json`; one without a tokenizer is left alone.
        name: the class Transformers has for the stock model type; None for the general one, which needs no name.

    Raises:
        ValueError: tokenizer_config.json or config.json is no JSON object.
    """
    fields = {}
    for file in ("config.json", "tokenizer_config.json"):  # in this order: what is written is the last
        content = (folder / file).read_text(encoding="utf-8") if (folder / file).is_file() else "{}"
        if not isinstance(found := json.loads(content), dict):
            raise ValueError(f"{file}: {folder / file} must hold a JSON object")
        fields[file] = found
    if name and has_tokenizer(folder) and not any(each.get("tokenizer_class") for each in fields.values()):
        write_json(folder / "tokenizer_config.json", {**fields["tokenizer_config.json"], "tokenizer_class": name})
