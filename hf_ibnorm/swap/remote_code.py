"""Checkpoints that carry their code, for machines without this package (`trust_remote_code=True`)."""

import inspect
import json
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from ..base.files import write_json, write_text
from ..base.manifest import damage, has_manifest, write_manifest
from .families import FAMILIES
from .loading import name_tokenizer


def add_remote_code(checkpoint: str | Path) -> list[Path]:
    """Put the model's code into a saved checkpoint, so that it loads without hf_ibnorm.

    Afterwards every Auto class that knows the stock model (`AutoModel`, `AutoModelForCausalLM`, ...) loads it with
    `trust_remote_code=True` in an environment that has only Transformers, with the same logits to the bit
    (`backend="reference"`), and models saved there carry the code on. Where hf_ibnorm is imported its own classes are
    used, and what they save does not carry the code: call this again. A tokenizer there that names no class, which
    Transformers would choose by the model type, names the stock model's from then on.

    Args:
        checkpoint: a directory that `save_pretrained` wrote. Its `config.json` is rewritten, with an `auto_map`, and so
            is the `manifest.json` that a training left there.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: there is no `config.json` in it.
        ValueError: `config.json` is of another model type; the message names those that are known. Or a file is not
            what the manifest that a training left there says.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"checkpoint: {checkpoint} has no config.json; must be a directory with a saved model")
    noted = has_manifest(checkpoint)
    if noted and (problem := damage(checkpoint)):
        raise ValueError(f"checkpoint: {checkpoint} is not as it was saved: {problem}")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    known = {family.config.model_type: family for family in FAMILIES}
    if config.get("model_type") not in known:
        raise ValueError(f"model_type: got {config.get('model_type')!r} in {checkpoint}, must be {' or '.join(known)}")
    family = known[config["model_type"]]
    source = Path(inspect.getfile(family.causal_lm))
    # Flat files only, found through `from .module import name`: what Transformers can follow when it loads or saves.
    files = [source, *map(Path, get_relative_import_files(source))]
    for file in files:
        write_text(checkpoint / file.name, file.read_text(encoding="utf-8"))
    name_tokenizer(checkpoint, family.tokenizer_name)
    classes: dict[str, type] = {"AutoConfig": family.config, **family.auto_classes}
    config["auto_map"] = {auto: f"{Path(inspect.getfile(cls)).stem}.{cls.__name__}" for auto, cls in classes.items()}
    write_json(checkpoint / "config.json", config)  # last: before it, the checkpoint is what it was
    if noted:
        write_manifest(checkpoint)
    return [checkpoint / file.name for file in files] + [checkpoint / "config.json"]
