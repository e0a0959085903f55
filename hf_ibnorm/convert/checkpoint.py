"""`convert_checkpoint`: a model on disk, stock or ours, becomes one with other norms, tensor by tensor."""

import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base.files import atomic_directory, write_json, write_text
from ..base.layout import CONVERSION
from ..base.manifest import MANIFEST
from ..base.reading import reading
from ..base.room import check_disk, check_room
from ..configuration_ibnorm import NORM_FIELDS, STOCK
from ..data.text import draw_text
from ..modeling_ibnorm import build_site, forget_origin, qualified
from ..norms import NORMS, norm_name
from ..report.environment import environment_record
from ..sites import Formula, Site, context_of, contract, discover, identify
from ..swap.loading import load, name_tokenizer
from ..swap.patching import apply_norm
from ..swap.remote_code import add_remote_code
from ..swap.target import Target, chosen_sites, relative
from .calibrate import Errors, fit_norms
from .settings import Conversion
from .source import COPIED, Source, check_ramped, check_tensors, read_source
from .weights import INDEX, SINGLE, cast, rewrite

# Files of a source that the target has another version of.
_REPLACED = ("*.safetensors", "*.safetensors.index.json", "config.json", "README.md", CONVERSION, MANIFEST)
TEMPLATES = "additional_chat_templates"  # folder in which Transformers puts named chat templates


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

    Weights stream from file to file, so that memory does not grow with the model. `target` appears whole or not at all.
    Where every norm is the architecture's own in the end, it is a stock checkpoint.

    Args:
        source: a model of Transformers, stock or ours: directory with safetensors, name on the Hub, or a GGUF file,
            which is dequantized to float32. A GGUF file, and weights that Transformers renames or merges when it loads
            them, go through memory.
        target: a new directory.
        norm: a name of `hf_ibnorm.NORMS`.
        norm_kwargs: its options; those left out take their defaults, `eps` the model's own.
        sites: globs over names relative to the base model, such as `"layers.0.*"`; None for all.
        init: `keep`: gains and biases stay, and the new norm is at full strength. `identity`: options that make the new
            norm the old one, to rounding: lam 0 (ibnorm_s: 1) and the standardization of the architecture
            (`layernormalnorm`, GPT-2 only: alpha 0), for λ to be ramped up in training. `calibrate`: gains and biases
            fitted, norm by norm, by least squares to the outputs of the old norm on some text; this loads the model,
            in float32.
        data: text to calibrate on: an embedded corpus, of which the training split is used, or a file (.txt,
            .jsonl, .parquet).
        calibration_tokens: length of that text in tokens, about.
        dtype: float32, bfloat16 or float16 for all weights; None keeps theirs.
        remote_code: put the model's code into the target (`hf_ibnorm.remote_code`).

    Returns:
        The record of the conversion, as in `target/conversion.json`.

    Raises:
        ValueError, TypeError: an argument or the source, named; nothing is left behind.
        OSError: the target exists or cannot be written, or there is no room.
    """
    wanted = Conversion(norm, norm_kwargs, sites, init, data, calibration_tokens, dtype, remote_code)
    wanted.check(Path(target))
    with ExitStack() as stack:
        return convert_source(read_source(source, stack), Path(target), wanted)


def convert_source(source: Source, target: Path, wanted: Conversion) -> dict[str, Any]:
    """`convert_checkpoint` for a source that was read and a conversion that was checked."""
    _ = source.tokenizer  # a bad one makes a bad source, whether it is needed or not
    with reading("source: config.json", source.folder), torch.device("meta"):
        model = source.architecture(source.config)
    check_tensors(source, model)
    check_ramped(source, model)
    parts = Target(model)
    globs = relative(parts, wanted.sites)
    options = dict(wanted.norm_kwargs or {})
    if wanted.init == "identity":
        options = _identity_options(wanted.norm, options, source, parts, globs)
    before = {site: parts.norm_at(site) for site in parts.kinds}
    forget_origin(model)  # of weights that are not in it
    apply_norm(model, wanted.norm, wanted.sites, **options)
    changed = {site: kind for site, kind in parts.kinds.items() if parts.norm_at(site) is not before[site]}
    config = _config_of(model)
    if wanted.remote_code and config is not model.config:
        raise ValueError("remote_code: got True, but a stock checkpoint needs no code of ours; leave it out")
    dtype = getattr(torch, wanted.dtype) if wanted.dtype else None
    names = {site: source.stored_name(parts.names[site]) for site in changed}
    norms = {names[site]: (before[site], site, kind) for site, kind in changed.items()}
    added, dropped, lost = _changes(source, norms, model.config, dtype)
    errors = _calibrate(source, model.config, changed, names, added, wanted) if wanted.init == "calibrate" else None
    check_disk("target", target, 1.01 * source.bytes_in(wanted.dtype))
    norm = {"type": model.config.norm_type, "kwargs": model.config.norm_kwargs}
    norm = norm if globs is None else model.config.norm_overrides[-1][1]
    left = [path for path in sorted(source.folder.iterdir()) if not _is_one_of(path, (*COPIED, *_REPLACED))]
    record = {
        "source": source.title,
        "source_architecture": source.architecture.__name__,
        "architecture": config.architectures[0],
        "init": wanted.init,
        "norm": {**norm, "sites": globs},
        **{name: getattr(model.config, name) for name in NORM_FIELDS},
        "dtype": wanted.dtype or "unchanged",
        "tensors_added": sorted(added),
        "tensors_dropped": sorted(dropped),
        "lost": lost,
        "files_left": [f"{path.name}/" if path.is_dir() else path.name for path in left if path.name != TEMPLATES],
        "calibration": None if errors is None else {"data": Path(wanted.data).name, **errors},
        "environment": environment_record(),
    }
    with atomic_directory(target) as folder:
        if dtype is not None:
            config.dtype = dtype
        config.save_pretrained(folder)
        _write_weights(source, added, dropped, folder, dtype)
        _copy_rest(source.folder, folder)
        name_tokenizer(folder, source.family.tokenizer_name)
        if wanted.remote_code:
            add_remote_code(folder)
        write_json(folder / CONVERSION, record)
        write_text(folder / "README.md", card_text(record))
    return record


def _identity_options(
    norm: str, given: Mapping[str, Any], source: Source, parts: Target, globs: list[str] | None
) -> dict[str, Any]:
    """Options with which `norm` is the architecture's own norm at the chosen sites.

    ValueError where there are none, they contradict a given option, or the source has other norms already.
    """
    name = norm_name(norm, "norm")
    if source.is_ours:
        raise ValueError("init: got 'identity' for a source with norms of this package; it takes a stock model")
    formulas = [identify(parts.norm_at(site)) for site in chosen_sites(parts, globs, None)]
    known = [formula for formula in formulas if isinstance(formula, Formula)]
    stock, *others = sorted({formula.computes for formula in known})
    if others:
        raise ValueError(f"init: got 'identity' for sites that are {stock} and {others[0]}; name sites of one kind")
    entry = NORMS[name]
    options = ({}, {}) if name == stock else entry.identity_for(stock)
    if options is None:
        raise ValueError(f"init: got 'identity', but no options make {name} a {stock}; use keep")
    decided, given = options[0], {**options[1], **given}
    if source.family.pin is not None:
        decided["eps"] = known[0].eps
    elif given.get("eps") is not None:
        kept = "which keeps that of each norm; leave it out"
        raise ValueError(f"norm_kwargs.eps: got {given['eps']!r} with init 'identity', {kept}")
    decided["elementwise_affine"] = any(formula.gain for formula in known)
    for option, value in given.items():
        if (option in decided and value != decided[option]) or option == entry.contract.ramp:
            raise ValueError(
                f"norm_kwargs.{option}: got {value!r} with init 'identity', which sets it to {decided.get(option)!r}; "
                "leave it out, or use init 'keep'"
            )
    return {**given, **{option: value for option, value in decided.items() if option in entry.defaults}}


def _config_of(model: PreTrainedModel) -> Any:
    """The config to save: a stock config where every norm is the architecture's own."""
    config: Any = model.config
    config.architectures = [type(model).__name__]
    left_out = (*NORM_FIELDS, "model_type", "architectures", "auto_map")
    fields = {name: value for name, value in config.to_dict().items() if name not in left_out}
    cls: Any = type(model)
    stock_config = type(config).__bases__[1](**fields, architectures=[cls.stock.__name__])
    with torch.device("meta"):
        stock = cls.stock(stock_config)
    is_stock = all(_is_stock(site, stock, config) for site in discover(stock) if site.problem is None)
    return stock_config if is_stock else config


def _is_stock(site: Site, stock: PreTrainedModel, config: Any) -> bool:
    """Whether the norm that a config of ours has for a site is the one that the stock model has there."""
    name, options = config.norm_at(site.name, site.kind)
    norm = stock.get_submodule(qualified(stock, site.name))
    has_bias = getattr(norm, "bias", None) is not None
    same = options.get("eps") in (None, site.eps) and options.get("elementwise_affine", True) == bool(site.gain)
    return name == STOCK or (name == site.computes and same and options.get("bias", has_bias) == has_bias)


def _changes(
    source: Source, changed: Mapping[str, tuple[nn.Module, str, str]], config: Any, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], set[str], dict[str, float]]:
    """The changes in the tensors of norms, for the target's config and `dtype` (None keeps the source's).

    `changed` is a norm's name in the files → the old norm, its site and the kind of that.

    Returns:
        Added tensors by name; names of dropped tensors; and name of each dropped tensor that was trained → the largest
        distance of a value from its initial value.
    """
    added: dict[str, Tensor] = {}
    dropped: set[str] = set()
    lost: dict[str, float] = {}
    for norm, (old, site, kind) in changed.items():
        start, new, initial = f"{norm}.", build_site(config, site, old, kind), contract(old).initial_values()
        stored, state = source.tensors_of(norm), {f"{start}{name}": value for name, value in new.state_dict().items()}
        parameters = {f"{start}{name}" for name, _ in new.named_parameters()}
        dropped |= set(stored) - state.keys()
        for name, value in state.items():
            if name == f"{start}{contract(new).ramp}":  # of the config's value, and in float32 always
                added[name] = value
            elif name not in stored:
                value = value.to(source.dtype_of(norm)) if name in parameters else value
                added[name] = value if dtype is None else cast(name, value, dtype)
        for name in sorted({f"{start}{name}" for name, _ in old.named_parameters()} - parameters):
            distance = (source.places[name].tensor(name).float() - initial[name.removeprefix(start)]).abs().max()
            if distance:
                lost[name] = float(distance)
    return added, dropped, lost


def _calibrate(
    source: Source,
    config: Any,
    kinds: Mapping[str, str],
    names: Mapping[str, str],
    added: dict[str, Tensor],
    wanted: Conversion,
) -> dict[str, int | Errors]:
    """Put fitted gains and biases into `added`; returns the number of tokens, and the errors by site.

    `kinds` and `names` are the sites that changed → their kind, and the norm's name in the files.
    """
    if source.tokenizer is None:
        raise ValueError(f"source: {source.folder} has no tokenizer to calibrate with")
    tokens, text = wanted.calibration_tokens, config.get_text_config()
    ids = draw_text("data", wanted.data, "train", source.tokenizer, tokens, context_of(config)).ids
    # Of one block: inputs of the source and of the target, outputs of both.
    needed = 4 * 4 * ids.numel() * text.hidden_size
    check_room("calibration_tokens", tokens, needed, f"for the hidden states of {ids.numel():,} tokens")
    model = load("source", source.architecture, source.folder, dtype=torch.float32).eval()
    fitted, errors = fit_norms(model, config, kinds, ids)
    for key, value in fitted.items():
        site, _, parameter = key.rpartition(".")
        dtype = getattr(torch, wanted.dtype) if wanted.dtype else source.dtype_of(names[site])
        added[f"{names[site]}.{parameter}"] = cast(f"{names[site]}.{parameter}", value, dtype)
    return {"tokens": ids.numel(), "sites": errors}


def _write_weights(
    source: Source, added: Mapping[str, Tensor], dropped: set[str], folder: Path, dtype: torch.dtype | None
) -> None:
    """The weights in as many files as the source's, new tensors beside others of their norm, and the index."""
    homes = {name.rpartition(".")[0]: shard for name, shard in source.places.items()}
    places: dict[str, str] = {}
    written, count = 0, len(source.shards)
    files = [SINGLE if count == 1 else shard.path.name for shard in source.shards]
    if count > 1 and (len(set(files)) < count or SINGLE in files):  # out of several folders
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for shard, file in zip(source.shards, files, strict=True):
        added_here = {
            name: value
            for name, value in sorted(added.items())
            if source.places.get(name, homes.get(name.rpartition(".")[0], source.shards[-1])) is shard
        }
        written += rewrite(shard, folder / file, dropped, added_here, dtype)
        places |= dict.fromkeys((shard.tensors.keys() - dropped) | added_here.keys(), file)
    if count > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": written}, "weight_map": dict(sorted(places.items()))})


def _is_one_of(path: Path, globs: Collection[str]) -> bool:
    return path.is_file() and any(fnmatchcase(path.name, glob) for glob in globs)


def _copy_rest(source: Path, folder: Path) -> None:
    """Copy the other files of a model, and nothing else: anything may lie beside them, and targets are published."""
    for path in sorted(source.iterdir()):
        if _is_one_of(path, COPIED):
            shutil.copyfile(path, folder / path.name)
    for path in sorted((source / TEMPLATES).glob("*.jinja")):
        (folder / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / TEMPLATES / path.name)


def card_text(record: dict[str, Any]) -> str:
    """The target's README.md."""
    name, norm = record["source"], record["norm"]
    ours = record["architecture"].startswith("IBNorm")
    where = f"at {', '.join(f'`{glob}`' for glob in norm['sites'])} " if norm["sites"] else ""
    same = record["architecture"] == record["source_architecture"] and not ours
    if same or record["init"] == "identity":
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
        *([f"Lost in this: {lost_text(record['lost'])}."] if record["lost"] else []),
        f"{'Load it after `import hf_ibnorm`. ' if ours else ''}The licence of the source goes on to apply.",
    ]
    return "\n\n".join(lines) + "\n"


def lost_text(lost: Mapping[str, float]) -> str:
    """Dropped tensors that were trained, in words; `lost` is as in the record of a conversion, and not empty."""
    kinds = sorted({name.rpartition(".")[2] for name in lost})
    return f"{len(lost)} trained tensors ({', '.join(kinds)}), values up to {max(lost.values()):.3g} from their start"
