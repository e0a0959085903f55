"""`convert_checkpoint`: a Llama or GPT-2 on disk, stock or ours, becomes one with other norms, tensor by tensor."""

import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base.files import atomic_directory, write_json, write_text
from ..base.manifest import MANIFEST
from ..base.reading import reading
from ..base.room import check_disk, check_room
from ..configuration_ibnorm import NORM_FIELDS
from ..data.text import draw_text
from ..modeling_ibnorm import build_site
from ..norms import NORMS, norm_name
from ..report.environment import environment_record
from ..sites import contract
from ..swap.loading import TOKENIZER_FILES, load, name_tokenizer
from ..swap.patching import apply_norm, norm_sites
from ..swap.remote_code import add_remote_code
from ..swap.target import relative_globs
from .calibrate import Errors, fit_norms, stock_norm
from .settings import Conversion
from .source import Source, check_ramped, check_tensors, read_source
from .weights import INDEX, SINGLE, STORED, cast, rewrite

RECORD = "conversion.json"
_TAKEN = (
    *TOKENIZER_FILES,
    *("merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model", "sentencepiece.bpe.model"),
    *("*.tiktoken", "tekken.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)
"""What goes with a model and is copied: tokenizer, generation config, chat template, terms of use."""
_REPLACED = ("*.safetensors", "*.safetensors.index.json", "config.json", "README.md", RECORD, MANIFEST)
TEMPLATES = "additional_chat_templates"
"""Folder in which Transformers puts named chat templates."""


@dataclass
class Change:
    """What becomes of the tensors: names of those left out, values of those put in."""

    dropped: set[str] = field(default_factory=set)
    added: dict[str, Tensor] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    """Dropped tensors that were trained → how far the farthest of their values is from where training begins."""
    exact: set[str] = field(default_factory=set)
    """Those put in that keep their dtype, whatever the others get."""


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    norm: str,
    *,
    norm_kwargs: Mapping[str, Any] | None = None,
    sites: str | Collection[str] | None = None,
    init: str = "keep",
    data: str = "sotu",
    calibration_tokens: int = 16_384,
    dtype: str | None = None,
    remote_code: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint with other norms: config, weights, tokenizer, generation config, chat template.

    Weights stream from file to file, so that memory does not grow with the model. `target` appears when it is whole, or
    not at all. Where every norm is the architecture's own in the end, the target is a stock checkpoint.

    Args:
        source: a Llama or GPT-2, stock or ours: directory with safetensors, name on the Hub, or a GGUF file, which is
            dequantized to float32 (through memory).
        target: a new directory.
        norm: a name of `hf_ibnorm.NORMS`.
        norm_kwargs: its options; those left out take their defaults, `eps` the model's own.
        sites: globs over names relative to the base model, such as `"layers.0.*"`; None for all.
        init: `keep`: gains and biases stay, the new norm does what it does at once. `identity`: options that make the
            new norm the old one, to rounding: lam 0 (ibnorm_s: 1) and the standardization of the architecture
            (`layernormalnorm`, GPT-2 only: alpha 0), for λ to be ramped up in training. `calibrate`: gains and biases
            fitted, norm by norm, so that each gives what the old one gave on some text, in the sense of least squares;
            this loads the model, in float32.
        data: text to calibrate on: an embedded corpus, of which the training split is used, or a file (.txt,
            .jsonl, .parquet).
        calibration_tokens: how much of it, about.
        dtype: float32, bfloat16 or float16 for all weights; None for what they have.
        remote_code: put the model's code into the target (`hf_ibnorm.remote_code`).

    Returns:
        What was done, as it is written to `target/conversion.json`.

    Raises:
        ValueError, TypeError: an argument or the source, named; nothing is left behind.
        OSError: the target exists or cannot be written, or there is no room.
    """
    wanted = Conversion(norm, norm_kwargs, sites, init, data, calibration_tokens, dtype, remote_code)
    wanted.check(Path(target))
    with ExitStack() as stack:
        return convert_source(read_source(source, stack), Path(target), wanted)


def convert_source(found: Source, target: Path, wanted: Conversion) -> dict[str, Any]:
    """`convert_checkpoint` of a source that was read, for what was checked."""
    _ = found.tokenizer  # a bad one makes a bad source, whether it is needed or not
    with reading("source: config.json", found.folder), torch.device("meta"):
        model = found.architecture(found.config)
    check_tensors(found, model)
    check_ramped(found, model)
    options = dict(wanted.norm_kwargs or {})
    if wanted.init == "identity":
        options = identity_options(wanted.norm, options, found)
    old, globs = norm_sites(model.base_model), relative_globs(model, wanted.sites)
    apply_norm(model, wanted.norm, wanted.sites, **options)
    config = _config_of(model, found)
    if wanted.remote_code and config is not model.config:
        raise ValueError("remote_code: got True, but a stock checkpoint needs no code of ours; leave it out")
    change = _changes(found, old, model.config)
    errors = _calibrate(found, model.config, change, wanted) if wanted.init == "calibrate" else None
    check_disk("target", target, 1.01 * _bytes(found, wanted.dtype))
    record = {
        "source": found.title,
        "source_architecture": found.architecture.__name__,
        "architecture": config.architectures[0],
        "init": wanted.init,
        "norm": _norm_record(model.config, globs),
        **{name: getattr(model.config, name) for name in NORM_FIELDS},
        "dtype": wanted.dtype or "unchanged",
        "tensors_added": sorted(change.added),
        "tensors_dropped": sorted(change.dropped),
        "lost": change.lost,
        "files_left": files_left(found.folder),
        "calibration": None if errors is None else {"data": Path(wanted.data).name, **errors},
        "environment": environment_record(),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(target) as folder:
        if wanted.dtype is not None:
            config.dtype = getattr(torch, wanted.dtype)
        config.save_pretrained(folder)
        _write_weights(found, change, folder, wanted.dtype)
        _copy_rest(found.folder, folder)
        name_tokenizer(folder, found.family.tokenizer_name)
        if wanted.remote_code:
            add_remote_code(folder)
        write_json(folder / RECORD, record)
        write_text(folder / "README.md", card_text(record))
    return record


def identity_options(norm: str, given: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Options with which `norm` is the architecture's own norm.

    Raises:
        ValueError: there are none, an option is given that they decide, or the source has other norms already.
    """
    name, stock = norm_name(norm, "norm"), source.family.pin.stock
    if isinstance(source.config, source.family.config):
        raise ValueError(
            "init: got 'identity' for a source with norms of this package; it takes a stock Llama or GPT-2"
        )
    entry = NORMS[name]
    options = ({}, {}) if name == stock else entry.identity_for(stock)
    if options is None:
        raise ValueError(f"init: got 'identity', but no options make {name} a {stock}; use keep")
    decided, given = options[0], {**options[1], **given}
    decided["eps"] = getattr(source.config, source.family.config.norm_eps_field)
    decided["elementwise_affine"] = True
    for option, value in given.items():
        if (option in decided and value != decided[option]) or option == entry.contract.ramp:
            raise ValueError(
                f"norm_kwargs.{option}: got {value!r} with init 'identity', which sets it to {decided.get(option)!r}; "
                "leave it out, or use init 'keep'"
            )
    return {**given, **{key: value for key, value in decided.items() if key in entry.defaults}}


def _config_of(model: PreTrainedModel, source: Source) -> Any:
    """The config to save: a stock one where every norm is what the architecture has."""
    config: Any = model.config
    pin, ours = source.family.pin, type(model)
    stock = next(stock for stock, cls in source.family.stock_classes.items() if cls is ours)
    config.architectures = [ours.__name__]
    if all(config.norm_at(site) == stock_norm(config) for site in pin.names(config)):
        dropped = (*NORM_FIELDS, "model_type", "architectures", "auto_map")
        fields = {name: value for name, value in config.to_dict().items() if name not in dropped}
        config = source.family.config.__bases__[1](**fields, architectures=[stock.__name__])
    return config


def _changes(source: Source, old_norms: Mapping[str, nn.Module], config: Any) -> Change:
    """Which tensors of norms the target has no place for, and which the source has not."""
    shards, prefix = source.places, source.prefix
    change = Change()
    for site, old in old_norms.items():
        new, initial = build_site(config, site), contract(old).initial_values()
        had, parameters = source.of_norm(site), dict(new.named_parameters())
        for name, value in new.state_dict().items():
            key = f"{prefix}{site}.{name}"
            if name == contract(new).ramp:  # the config says what it is
                change.added[key] = value
                change.exact.add(key)
            elif name not in had:
                change.added[key] = value.to(source.dtype_at(site)) if name in parameters else value
        change.dropped |= {f"{prefix}{site}.{name}" for name in set(had) - new.state_dict().keys()}
        for name in sorted({name for name, _ in old.named_parameters()} - parameters.keys()):
            key = f"{prefix}{site}.{name}"
            if moved := float((shards[key].tensor(key).float() - initial[name]).abs().max()):
                change.lost[key] = moved
    return change


def _calibrate(source: Source, config: Any, change: Change, wanted: Conversion) -> dict[str, int | Errors]:
    """Put fitted gains and biases into `change`; returns on how many tokens, and the errors, site by site."""
    if source.tokenizer is None:
        raise ValueError(f"source: {source.folder} has no tokenizer to calibrate with")
    tokens, context = wanted.calibration_tokens, config.max_position_embeddings
    ids = draw_text("data", wanted.data, "train", source.tokenizer, tokens, context).ids
    # Of a block: inputs of the source and of the target, outputs of both.
    needed = 4 * 4 * ids.numel() * config.hidden_size
    check_room("calibration_tokens", tokens, needed, f"for the hidden states of {ids.numel():,} tokens")
    model = load("source", source.architecture, source.folder, dtype=torch.float32).eval()
    fitted, errors = fit_norms(model, config, ids)
    for name, value in fitted.items():
        key, site = f"{source.prefix}{name}", name.rpartition(".")[0]
        change.added[key] = value if wanted.dtype else cast(key, value, source.dtype_at(site))
    return {"tokens": ids.numel(), "sites": errors}


def _bytes(source: Source, dtype: str | None) -> int:
    """Bytes of the source's tensors in `dtype`, as they are stored where that is None."""
    if dtype is None:
        return source.bytes
    sizes = [(entry["data_offsets"], entry["dtype"]) for shard in source.shards for entry in shard.tensors.values()]
    width = getattr(torch, dtype).itemsize
    return sum((end - begin) // STORED[kind].itemsize * width for (begin, end), kind in sizes if kind in STORED)


def _write_weights(source: Source, change: Change, folder: Path, dtype: str | None) -> None:
    """The weights in as many parts, new tensors beside others of their norm, and the index."""
    homes = {name.rpartition(".")[0]: shard for name, shard in source.places.items()}
    places: dict[str, str] = {}
    written, count = 0, len(source.shards)
    files = [SINGLE if count == 1 else shard.path.name for shard in source.shards]
    if count > 1 and (len(set(files)) < count or SINGLE in files):  # out of several folders
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for shard, file in zip(source.shards, files, strict=True):
        added = {
            name: value if dtype is None or name in change.exact else cast(name, value, getattr(torch, dtype))
            for name, value in sorted(change.added.items())
            if source.places.get(name, homes.get(name.rpartition(".")[0], source.shards[-1])) is shard
        }
        written += rewrite(shard, folder / file, change.dropped, added, getattr(torch, dtype) if dtype else None)
        kept = (shard.tensors.keys() - change.dropped) | added.keys()
        places |= dict.fromkeys(sorted(kept), file)
    if count > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": written}, "weight_map": dict(sorted(places.items()))})


def _is_one_of(path: Path, globs: Collection[str]) -> bool:
    return path.is_file() and any(fnmatchcase(path.name, glob) for glob in globs)


def _copy_rest(source: Path, folder: Path) -> None:
    """What goes with a model, and nothing else: anything may lie beside it, and the target may be published."""
    for path in sorted(source.iterdir()):
        if _is_one_of(path, _TAKEN):
            shutil.copyfile(path, folder / path.name)
    for path in sorted((source / TEMPLATES).glob("*.jinja")):
        (folder / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / TEMPLATES / path.name)


def files_left(source: Path) -> list[str]:
    """What lies in the source's folder that the target has neither a copy nor another version of."""
    left = [path for path in sorted(source.iterdir()) if not _is_one_of(path, (*_TAKEN, *_REPLACED))]
    return [f"{path.name}/" if path.is_dir() else path.name for path in left if path.name != TEMPLATES]


def _norm_record(config: Any, globs: list[str] | None) -> dict[str, Any]:
    """The norm that was asked for, with all its options, and the globs of its sites; None for all."""
    sites = config.norm_pin.names(config)
    site = next(site for site in sites if globs is None or any(fnmatchcase(site, glob) for glob in globs))
    name, options = config.norm_at(site)
    return {"type": name, "kwargs": options, "sites": globs}


def card_text(record: dict[str, Any]) -> str:
    """What the target is, for its README.md."""
    name, norm = record["source"], record["norm"]
    ours = record["architecture"].startswith("IBNorm")
    where = f"at {', '.join(f'`{glob}`' for glob in norm['sites'])} " if norm["sites"] else ""
    stayed = record["architecture"] == record["source_architecture"] and not ours
    if stayed or record["init"] == "identity":
        worth = "to rounding it computes what its source does"
    else:
        worth = "expect it to be worse than its source"
    lines = [
        f"---\nlibrary_name: transformers\ntags: [hf_ibnorm, {norm['type']}]\n---",
        f"# {name} with {norm['type']}",
        f"`{name}`, {'an' if record['source_architecture'][0] == 'I' else 'a'} {record['source_architecture']}, as "
        f"{'an' if ours else 'a'} {record['architecture']}: its norms {where}are `{norm['type']}` with "
        f"`{json.dumps(norm['kwargs'])}`. Made by `hf-ibnorm convert --init {record['init']}`; no "
        f"weight of another layer was changed, and nothing was trained: {worth}.",
        *([f"Lost in this: {lost_text(record)}."] if record["lost"] else []),
        f"{'Load it after `import hf_ibnorm`. ' if ours else ''}The licence of the source goes on to apply.",
    ]
    return "\n\n".join(lines) + "\n"


def lost_text(record: dict[str, Any]) -> str:
    """The trained tensors that a conversion dropped, in words; empty where there are none."""
    lost = record["lost"]
    if not lost:
        return ""
    kinds = sorted({name.rpartition(".")[2] for name in lost})
    return f"{len(lost)} trained tensors ({', '.join(kinds)}), values up to {max(lost.values()):.3g} from their start"
