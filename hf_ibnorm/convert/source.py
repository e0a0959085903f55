"""The source of a conversion: a model on disk or on the Hub, stock or ours, read and checked."""

import math
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from ..base.reading import reading, told
from ..base.room import check_model
from ..modeling_ibnorm import NormModelMixin, ours, qualified, ramped_norms, same_ramped
from ..norms import ramped_options
from ..swap.families import Family, family_of, named_class
from ..swap.loading import HUB_FILES, TOKENIZER_FILES, check_tokenizer, has_tokenizer, load
from ..swap.patching import norm_sites
from .weights import STORED, Shard, read_shards

COPIED = (
    *TOKENIZER_FILES,
    *("merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model", "sentencepiece.bpe.model"),
    *("*.tiktoken", "tekken.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
"""Files that a conversion copies: tokenizer, generation config, chat template, terms of use."""


@dataclass(frozen=True)
class Source:
    """A model on disk, called `title`: without the folders above it, or by its whole name on the Hub."""

    folder: Path
    title: str
    config: Any
    architecture: type[PreTrainedModel]
    shards: list[Shard]

    @property
    def is_ours(self) -> bool:
        """Whether it has norms of this package already."""
        return issubclass(self.architecture, NormModelMixin)

    @property
    def family(self) -> Family:
        """Its architecture."""
        return family_of(self.config)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the weights, checked against the config; None where there is none."""
        if not has_tokenizer(self.folder):
            return None
        tokenizer = load("source: tokenizer", AutoTokenizer, self.folder)
        check_tokenizer("source: tokenizer", tokenizer, self.config, self.folder)
        return tokenizer

    @cached_property
    def places(self) -> dict[str, Shard]:
        """Name of a tensor → the file with it."""
        return {name: shard for shard in self.shards for name in shard.tensors}

    @cached_property
    def prefix(self) -> str:
        """The beginning of the names of the base model's tensors.

        The file of a language model may lack it: Transformers adds the prefix when it loads.
        """
        prefix = f"{self.architecture.base_model_prefix}."
        return prefix if any(name.startswith(prefix) for name in self.places) else ""

    def stored_name(self, name: str) -> str:
        """Name in the files of a module or tensor of the model."""
        return name if self.prefix else name.removeprefix(f"{self.architecture.base_model_prefix}.")

    def tensors_of(self, norm: str) -> list[str]:
        """The names of the tensors of a norm, which is called `norm` in the files."""
        return [name for name in self.places if name.startswith(f"{norm}.")]

    def dtype_of(self, norm: str) -> torch.dtype:
        """The dtype in which a norm's parameters are stored; of a norm without parameters, that of the first tensor."""
        ramped = ramped_options()  # always in float32
        names = [name for name in [*self.tensors_of(norm), *self.places] if name.rpartition(".")[2] not in ramped]
        kinds = (self.places[name].tensors[name]["dtype"] for name in names)
        return next(STORED[kind] for kind in kinds if kind in STORED)

    def bytes_in(self, dtype: str | None) -> int:
        """Bytes of the weights in `dtype`; None for their files as they are."""
        if dtype is None:
            return sum(shard.path.stat().st_size for shard in self.shards)
        entries = (entry for shard in self.shards for entry in shard.tensors.values() if entry["dtype"] in STORED)
        return getattr(torch, dtype).itemsize * sum(math.prod(entry["shape"]) for entry in entries)


def read_source(source: str | Path, stack: ExitStack) -> Source:
    """Read the model to convert; a temporary directory for it lasts as long as `stack`.

    Raises:
        ValueError: it is no model of a known architecture, is quantized, or parts of it are missing.
    """
    folder, got = Path(source), f"source: got {str(source)!r}"
    title = folder.resolve().name if folder.exists() else str(source)
    if folder.suffix == ".gguf":
        folder = _dequantized(folder, Path(stack.enter_context(TemporaryDirectory(prefix="hf_ibnorm_"))))
    elif not folder.is_dir():
        folder = _fetched(str(source))
    config = load("source: config.json", AutoConfig, folder)
    check_model("source", config, weights=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{got}, which is quantized; load it, dequantize() it, and save that")
    architecture = _architecture(config, got)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{got}, which has an adapter of PEFT: merge it, and save the model anew")
    read = Source(folder, title, config, architecture, _shards(folder, config))
    if _is_as_loaded(read):
        return read
    folder = _loaded_and_saved(read, Path(stack.enter_context(TemporaryDirectory(prefix="hf_ibnorm_"))))
    return Source(folder, title, config, architecture, _shards(folder, config))


def _shards(folder: Path, config: Any) -> list[Shard]:
    return read_shards(folder, getattr(config, "transformers_weights", None))


def _architecture(config: Any, got: str) -> type[PreTrainedModel]:
    """The class that a config names; ValueError where it is none of Transformers or of ours, or does not take it."""
    name = next(iter(config.architectures or []), config.model_type)
    try:
        architecture = named_class(name)
    except AttributeError:
        must_be = "it must be a model of Transformers, stock or with norms of hf_ibnorm"
        raise ValueError(f"{got}, a {name}; {must_be}") from None
    is_taken = isinstance(config, architecture.config_class or ())
    if not is_taken and ours(architecture) not in family_of(config).auto_classes.values():
        raise ValueError(f"{got}, a {name} with the config of a {config.model_type}; they do not go together")
    return architecture


def _is_as_loaded(source: Source) -> bool:
    """Whether the files have tensors by the names of the model: Transformers renames and merges some when it loads."""
    with reading("source: config.json", source.folder), torch.device("meta"):
        model = source.architecture(source.config)
    return not (_missing(source, model) and get_model_conversion_mapping(model))


def _missing(source: Source, model: PreTrainedModel) -> list[str]:
    """Names of the model's parameters that no file has, nor a tensor that they are tied to."""
    model.tie_weights()
    named = {source.stored_name(n): value for n, value in model.named_parameters(remove_duplicate=False)}
    stored = {id(value) for name, value in named.items() if name in source.places}
    return [name for name, value in named.items() if id(value) not in stored]


def _loaded_and_saved(source: Source, folder: Path) -> Path:
    """A directory with the weights by the names of the model, as Transformers loads them: through memory."""
    model, loading = load("source", source.architecture, source.folder, dtype="auto", output_loading_info=True)
    if missing := sorted({*loading["missing_keys"], *map(str, loading["mismatched_keys"])}):
        raise ValueError(f"source: {source.folder} has no {', '.join(missing[:3])}: {len(missing)} in all")
    for path in source.folder.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".bin"):
            shutil.copyfile(path, folder / path.name)
    model.save_pretrained(folder, save_original_format=False)
    return folder


def _fetched(name: str) -> Path:
    """The files of a model on the Hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*HUB_FILES, *COPIED]))
    except Exception as error:
        why = f"no such directory, and the Hub does not give it: {told(error)}"
        raise ValueError(f"source: got {name!r}, {why}") from error


def _dequantized(file: Path, folder: Path) -> Path:
    """A GGUF file as a model directory in float32."""
    if find_spec("gguf") is None:
        raise ValueError(f"source: got {str(file)!r}, which needs gguf: pip install 'hf_ibnorm[gguf]'")
    if not file.is_file():
        raise ValueError(f"source: got {str(file)!r}, no such file")
    quantized = load("source", AutoModelForCausalLM, file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = load("source", AutoTokenizer, file.parent, gguf_file=file.name)
    # Transformers refuses to save a model that came from GGUF: its weights go into a new one.
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
    """Raise ValueError where the weights do not fit the config: a tensor is missing, or of another shape."""
    for name in _missing(source, model):
        raise ValueError(f"source: {source.folder} has no {name}")
    for name, value in model.named_parameters(remove_duplicate=False):
        name = source.stored_name(name)
        entry = source.places[name].tensors[name] if name in source.places else None
        if entry is not None and entry["dtype"] not in STORED:
            kinds = f"{entry['dtype']}, must be one of {', '.join(STORED)}"
            raise ValueError(f"source: {source.folder} has a {name} of {kinds}")
        if entry is not None and entry["shape"] != list(value.shape):
            shapes = f"{entry['shape']}, its config makes it {list(value.shape)}"
            raise ValueError(f"source: {source.folder} has a {name} of shape {shapes}")


def check_ramped(source: Source, model: PreTrainedModel) -> None:
    """Raise ValueError where the weights have another λ than the config, as `from_pretrained` does."""
    for module, norm in norm_sites(model).items():
        for option in sorted(ramped_options() - norm.state_dict().keys()):
            if (name := source.stored_name(f"{module}.{option}")) in source.places:
                raise ValueError(f"source: {source.folder} has {name}, its config no norm with a {option} there")
    for site, norm, value in ramped_norms(model) if source.is_ours else ():
        name = source.stored_name(f"{qualified(model, site)}.{norm.ramp}")
        if name in source.places and not same_ramped(value, stored := source.places[name].tensor(name)):
            raise ValueError(f"source: {source.folder} has {stored.item():g} as {name}, its config {value:g}")
