"""The source of a conversion: a model on disk or on the Hub, stock or ours, read and checked."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..base.room import check_model
from ..modeling_ibnorm import agree, ramped_norms
from ..norms import ramped_options
from ..swap.families import FAMILIES, Family
from ..swap.loading import check_tokenizer, has_tokenizer, load
from ..swap.patching import norm_sites
from .weights import STORED, Shard, read_shards

_HUB = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Args:
        folder: where it is.
        name: as the user named it.
        config: its config.
        family: which it belongs to.
        architecture: its class, stock or ours.
        shards: its weights.
    """

    folder: Path
    name: str
    config: Any
    family: Family
    architecture: type[PreTrainedModel]
    shards: list[Shard]

    @property
    def title(self) -> str:
        """What it is called, without the folders that it lies in; a name on the Hub whole."""
        path = Path(self.name)
        return path.resolve().name if path.exists() else self.name

    @property
    def bytes(self) -> int:
        """Size of its weights."""
        return sum(shard.path.stat().st_size for shard in self.shards)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the weights; None where there is none.

        Raises:
            ValueError: it cannot be read, or has tokens that the embedding has no row for.
        """
        if not has_tokenizer(self.folder):
            return None
        tokenizer = load("source: tokenizer", AutoTokenizer, self.folder)
        check_tokenizer("source: tokenizer", tokenizer, self.config, self.folder)
        return tokenizer

    @cached_property
    def places(self) -> dict[str, Shard]:
        """Name of a tensor → the part that has it."""
        return {name: shard for shard in self.shards for name in shard.tensors}

    @cached_property
    def prefix(self) -> str:
        """What the names of the base model's tensors begin with.

        A language model's may be named as those of the base model alone: Transformers adds the prefix when it loads.
        """
        prefix = f"{self.architecture.base_model_prefix}."
        return prefix if any(name.startswith(prefix) for name in self.places) else ""

    def of_norm(self, site: str) -> list[str]:
        """The names of what the weights hold of a norm, relative to it."""
        start = f"{self.prefix}{site}."
        return [name.removeprefix(start) for name in self.places if name.startswith(start)]

    def dtype_at(self, site: str) -> torch.dtype:
        """In which a norm's parameters are stored; where there are none, those of the rest."""
        here = [f"{self.prefix}{site}.{name}" for name in self.of_norm(site)]
        # A ramped option is in float32 whatever the rest is in.
        others = (name for name in [*here, *self.places] if name.rpartition(".")[2] not in ramped_options())
        kinds = (self.places[name].tensors[name]["dtype"] for name in others)
        return next(STORED[kind] for kind in kinds if kind in STORED)


def read_source(source: str | Path, stack: ExitStack) -> Source:
    """The model to convert; what has to be made or fetched for it lasts as long as `stack`.

    Raises:
        ValueError: it is no model of a known architecture, is quantized, or parts of it are missing.
    """
    folder = Path(source)
    if folder.suffix == ".gguf":
        folder = _dequantized(folder, Path(stack.enter_context(TemporaryDirectory(prefix="hf_ibnorm_"))))
    elif not folder.is_dir():
        folder = _fetched(str(source))
    config = load("source: config.json", AutoConfig, folder)
    check_model("source", config, weights=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"source: got {str(source)!r}, which is quantized; load it, dequantize() it, and save that")
    classes = {
        cls.__name__: (family, cls) for family in FAMILIES for pair in family.stock_classes.items() for cls in pair
    }
    names = config.architectures if isinstance(config.architectures, list) else []
    if not names or names[0] not in classes:
        stock = [cls.__name__ for family in FAMILIES for cls in family.stock_classes]
        raise ValueError(
            f"source: got {str(source)!r}, a {names[0] if names else config.model_type}; known are {', '.join(stock)}, "
            "stock or ours"
        )
    family, architecture = classes[names[0]]
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"source: got {str(source)!r}, which has an adapter of PEFT: merge it, and save the model anew"
        )
    shards = read_shards(folder, getattr(config, "transformers_weights", None))
    return Source(folder, str(source), config, family, architecture, shards)


def _fetched(name: str) -> Path:
    """The files of a model on the Hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"source: got {name!r}, no such directory, and the Hub does not give it: {str(error).splitlines()[0][:200]}"
        ) from error


def _dequantized(file: Path, folder: Path) -> Path:
    """A GGUF file as a model directory in float32."""
    if find_spec("gguf") is None:
        raise ValueError(f"source: got {str(file)!r}, which needs gguf: pip install 'hf_ibnorm[gguf]'")
    if not file.is_file():
        raise ValueError(f"source: got {str(file)!r}, no such file")
    from transformers import AutoModelForCausalLM

    quantized = load("source", AutoModelForCausalLM, file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = load("source", AutoTokenizer, file.parent, gguf_file=file.name)
    # One that came from GGUF cannot be saved; its weights can.
    config = quantized.config
    del config.quantization_config
    with torch.device("meta"):
        model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"source: got {str(file)!r}, for which {folder.parent} has no room: {error}") from error
    return folder


def check_tensors(source: Source, model: PreTrainedModel) -> None:
    """Raise ValueError where the weights are not those of the config: one is missing, or of another shape."""
    model.tie_weights()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    bare = "" if source.prefix else f"{source.architecture.base_model_prefix}."
    there = {id(value) for name, value in parameters.items() if name.removeprefix(bare) in source.places}
    for name, value in parameters.items():
        name = name.removeprefix(bare)
        if name not in source.places:
            if id(value) not in there:  # not even under the name of one that it is tied to
                raise ValueError(f"source: {source.folder} has no {name}")
        elif (kind := source.places[name].tensors[name]["dtype"]) not in STORED:
            raise ValueError(f"source: {source.folder} has a {name} of {kind}, must be one of {', '.join(STORED)}")
        elif (shape := source.places[name].tensors[name]["shape"]) != list(value.shape):
            raise ValueError(
                f"source: {source.folder} has a {name} of shape {shape}, its config makes it {list(value.shape)}"
            )


def check_ramped(source: Source, model: PreTrainedModel) -> None:
    """Raise ValueError where the weights have another λ than the config, as `from_pretrained` does."""
    for site, norm in norm_sites(model.base_model).items():
        for option in sorted(ramped_options() - norm.state_dict().keys()):
            if (name := f"{source.prefix}{site}.{option}") in source.places:
                raise ValueError(f"source: {source.folder} has {name}, its config no norm with a {option} there")
    for site, norm, value in ramped_norms(model) if isinstance(source.config, source.family.config) else ():
        name = f"{source.prefix}{site}.{norm.ramp}"
        if name in source.places and not agree(value, held := source.places[name].tensor(name)):
            raise ValueError(f"source: {source.folder} has {held.item():g} as {name}, its config {value:g}")
