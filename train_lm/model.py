"""The model of a run: built with initial weights, or loaded from a checkpoint; and the teacher it may learn from."""

import math
import os
import warnings
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import cached_file

from hf_ibnorm.analysis.places import evaluating
from hf_ibnorm.base import layout
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import sha256_tensors
from hf_ibnorm.base.room import check_model
from hf_ibnorm.configuration_ibnorm import NORM_FIELDS, STOCK
from hf_ibnorm.convert.checkpoint import lost_text
from hf_ibnorm.convert.weights import Shard, read_shards
from hf_ibnorm.modeling_ibnorm import build_site, qualified, ramped_norms, site_kinds
from hf_ibnorm.norms import norm_name
from hf_ibnorm.sites import blocks_of, context_of, contract, is_norm
from hf_ibnorm.swap.families import Family, family_of
from hf_ibnorm.swap.loading import has_tokenizer, load

from .architecture import FAULTS, build_model_config, causal_family, check_vocabulary, names_in
from .settings import TrainConfig
from .start import Start
from .tokenizer import load_tokenizer, saved_and_loaded

PROBED = 8  # tokens that a new model reads to see whether it looks ahead


def make_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, start: Start) -> tuple[PreTrainedModel, Any]:
    """The model to train in float32, and the config it began with (λ may have been ramped since)."""
    set_seed(config.seed)
    with bad_input():
        saved = None if start.checkpoint is None else start.checkpoint.path / layout.MODEL
        if config.model.init_from is None:
            model_config = build_model_config(config, len(tokenizer), tokenizer.eos_token_id)
            family = family_of(model_config)
        else:
            family, model_config = starting_config(config, saved or config.model.init_from, start.saved)
            check_vocabulary(model_config.vocab_size, len(tokenizer))
            config.check_context(context_of(model_config))
        if saved is not None:
            model = load("resume", family.causal_lm, saved, dtype=torch.float32)
            for name in NORM_FIELDS:  # the checkpoint's own have λ as far as its ramp had come
                setattr(model.config, name, getattr(model_config, name))
        elif config.model.init_from is not None:
            model, lost = load_start(family, config.model.init_from, model_config)
            start.messages.extend([lost] * bool(lost))
        else:
            model = new_model("model", model_config)
        if saved is None:
            check_causal("model.model_type" if config.model.init_from is None else "model.init_from", model)
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(f"model: {name} is {parameter.dtype}, must be torch.float32, or its updates round away")
    return model, model_config


def new_model(field: str, model_config: Any, **options: Any) -> PreTrainedModel:
    """A model in float32 with initial weights; ValueError, which `field` opens, where its config allows none."""
    about = f"{field}: a {family_of(model_config).stock_model_type} cannot be built with these fields of its config: "
    with bad_input(*FAULTS, TypeError, about=about):
        return AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, **options)


def load_start(family: Family, where: str, model_config: Any) -> tuple[PreTrainedModel, str]:
    """The model of a checkpoint with the norms of `model_config`, and a line about the weights that are lost, or ""."""
    model, missing, dropped = load_weights("model.init_from", family.causal_lm, where, config=model_config)
    own: Any = load("model.init_from", AutoConfig, where)
    if not isinstance(own, family.config):
        own = load("model.init_from", family.config, where, norm_type=family.stock_norm)
    old = initial_norms(family, own)
    had = tuple(f".{name}" for name in old)
    new = norm_prefixes(model)
    lost = [name for name in missing if not name.startswith(new) or f".{name}".endswith(had)]
    refuse_lost("model.init_from", where, lost)
    return model, lost_message(where, dropped, old)


def initial_norms(family: Family, own: Any) -> dict[str, torch.Tensor]:
    """What the norms of a model with the config `own` hold before training: site.name → tensor."""
    with torch.device("meta"):
        model = family.causal_lm(own)
    held: dict[str, torch.Tensor] = {}
    for site, kind in site_kinds(model, own.norm_pin).items():
        norm = model.get_submodule(qualified(model, site))
        stock = own.norm_at(site, kind)[0] == STOCK
        values = contract(norm).initial_values() if stock else build_site(own, site, norm, kind).state_dict()
        held |= {f"{site}.{name}": value for name, value in values.items()}
    return held


@torch.no_grad()
def check_causal(field: str, model: PreTrainedModel) -> None:
    """Raise ValueError where what a model says of a token depends on tokens after it, which it is to predict."""
    ids = torch.zeros((2, PROBED), dtype=torch.int64)
    ids[1, -1] = 1
    kind = f"{field}: got a {type(model).__name__}"
    unread = bad_input(*FAULTS, TypeError, ValueError, about=f"{kind}, which does not read {PROBED} tokens alone: ")
    with unread, evaluating(model), torch.random.fork_rng(devices=[]):
        first, second = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(first[:-1], second[:-1], rtol=0, atol=1e-4 * float(first.abs().max())):
        raise ValueError(f"{kind}, which looks at the tokens that it is to predict; must be causal")


def load_weights(field: str, cls: Any, where: str, **options: Any) -> tuple[PreTrainedModel, list[str], list[str]]:
    """A model of class `cls` in float32; names of its weights that `where` lacks, and of weights only `where` has."""
    check_model(field, options.get("config") or load(field, AutoConfig, where))
    model, loading = load(field, cls, where, dtype=torch.float32, output_loading_info=True, **options)
    if bad := [name for name, value in model.named_parameters() if not value.isfinite().all()]:
        raise ValueError(f"{field}: got {where!r}, whose {bad[0]} has NaN or infinity: {len(bad)} tensors in all")
    missing = {*loading["missing_keys"], *map(str, loading["mismatched_keys"])}
    return model, sorted(missing), sorted(loading["unexpected_keys"])


def refuse_lost(field: str, where: str, lost: list[str]) -> None:
    """Raise ValueError where weights are missing."""
    if lost:
        raise ValueError(f"{field}: got {where!r}, which lacks {', '.join(lost[:5])}: {len(lost)} in all")


def lost_message(where: str, names: Collection[str], initial: dict[str, torch.Tensor]) -> str:
    """A line about the tensors `names` of a checkpoint that have no place in the model, in the words of a conversion.

    `initial` is of the checkpoint's norms before training: a tensor with the same value is no loss. "" for none.
    """
    shards: dict[str, Shard] = {}
    if names:
        folder = Path(where) if Path(where).is_dir() else Path(str(cached_file(where, "config.json"))).parent
        with suppress(ValueError):  # no safetensors
            shards = {name: shard for shard in read_shards(folder) for name in shard.tensors}
    lost = {}
    for name in names:
        start = next((value for known, value in initial.items() if f".{name}".endswith(f".{known}")), None)
        if name not in shards:  # in a file that only Transformers reads
            lost[name] = float("nan")
        elif moved := float((shards[name].tensor(name).float() - (0.0 if start is None else start)).abs().max()):
            lost[name] = moved
    if not lost:
        return ""
    words = lost_text(lost) if all(map(math.isfinite, lost.values())) else f"{len(lost)} tensors"
    shown = [*sorted(lost)[:3], *["..."] * (len(lost) > 3)]
    return f"lost: {words}, for which the model has no place: {', '.join(shown)}"


def load_teacher(config: TrainConfig, where: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model to distil, in float32 and eval mode, without gradients; ValueError unless it suits the run."""
    taught = read_config("teacher", where)
    if taught.vocab_size != config.model.vocab_size:
        sizes = f"a vocabulary of {taught.vocab_size}, the model has {config.model.vocab_size}"
        raise ValueError(f"teacher: got {where!r} with {sizes}; both must be as large")
    if (context := context_of(taught)) is not None and config.block_size > context:
        raise ValueError(f"block_size: got {config.block_size}, must be <= the teacher's context of {context}")
    if not Path(where).is_dir() or has_tokenizer(Path(where)):  # on the Hub there is taken to be one
        theirs = saved_and_loaded(load_tokenizer("teacher", where))
        if theirs.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str():
            raise ValueError(f"teacher: got {where!r}, whose tokenizer is not the run's; ids would mean other tokens")
    model, missing, _ = load_weights("teacher", AutoModelForCausalLM, where)
    refuse_lost("teacher", where, missing)
    return model.eval().requires_grad_(False)


def read_config(field: str, where: str | Path) -> Any:
    """The Transformers config of a checkpoint, stock or ours."""
    final = os.path.join(where, layout.FINAL)
    if os.path.isdir(final) and not os.path.exists(os.path.join(where, "config.json")):
        raise ValueError(f"{field}: got {str(where)!r}, which holds no model; did you mean {final}?")
    model_config = load(field, AutoConfig, where)
    causal_family(model_config.model_type, field)
    check_model(field, model_config, weights=False)
    return model_config


def starting_config(config: TrainConfig, where: str | Path, saved: dict[str, Any] | None) -> tuple[Family, Any]:
    """Family and config of the checkpoint `where`, with the run's norms; `saved` are its settings when it began."""
    own = read_config("model.init_from", where)
    family = family_of(own)
    model = config.model
    norms: dict[str, Any] = {"norm_kwargs": model.norm_kwargs} if model.norm_kwargs else {}
    if model.norm_type is not None:
        norms |= {"norm_type": model.norm_type, "norm_overrides": model.norm_overrides}
    elif saved is not None:
        norms |= {name: saved["model"][name] for name in ("norm_type", "norm_overrides")}
    elif not isinstance(own, family.config):
        norms["norm_type"] = family.stock_norm
    if saved is not None and norm_name(norms["norm_type"]) == saved["model"]["norm_type"]:
        # A checkpoint's own have λ as far as its ramp had come.
        norms["norm_kwargs"] = {**saved["model"]["norm_kwargs"], **model.norm_kwargs}
    built = load("model.init_from", family.config, where, **norms)
    for name in names_in(built, "dropout"):
        setattr(built, name, model.dropout)
    return family, built


def scheduled_lams(config: TrainConfig, model: PreTrainedModel, model_config: Any) -> dict[str, tuple[float, float]]:
    """Site → λ at the start of the schedule, where the norm compresses nothing, and at its end; empty without one."""
    if config.lam_schedule == "constant":
        return {}
    lams = {}
    for site, norm, end in ramped_norms(model):
        if norm.held is None:
            raise ValueError(f"lam_schedule: got 'linear', but {site} learns its {norm.ramp} (learn_{norm.ramp})")
        lams[site] = (norm.ramp_start, float(end))
    if not lams:
        raise ValueError("lam_schedule: got 'linear', but the model has no IBNorm, nor another norm with a ramp")
    if all(start == end for start, end in lams.values()):
        at = ", ".join(sorted({f"{end:g}" for _, end in lams.values()}))
        options = " and ".join(sorted({str(norm.ramp) for _, norm, _ in ramped_norms(model)}))
        flag = f"--model.norm_kwargs.{options}"
        if model_config.norm_overrides:  # one of them may have the option, and takes no single option by a flag
            flag += f", or --model.norm_type {model_config.norm_type} with --model.norm_overrides"
        raise ValueError(
            f"lam_schedule: got 'linear', but {options} is to end at {at}, where it starts; name another with {flag}"
        )
    return lams


def norm_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Names of the norms, each with the dot before the names of its parameters."""
    return tuple(f"{name}." for name, module in model.named_modules() if is_norm(module))


def shared_weights_sha(model: nn.Module) -> str:
    """Hash of every parameter that does not belong to a norm: equal for two models that differ in their norms only."""
    norms = norm_prefixes(model)
    return sha256_tensors((name, value) for name, value in model.named_parameters() if not name.startswith(norms))


def speed_up(model: PreTrainedModel, config: TrainConfig) -> None:
    """Recompute activations and compile blocks, as the settings ask; in place, so that no name in a checkpoint changes.

    Must come before Accelerate wraps the model, and after it was copied: a compiled block cannot be copied.
    """
    if config.gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about its name: the oldest Transformers knows no other
            # With the generators' states kept, noise norms and dropout draw the same again.
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": True})
    if config.compile:
        for block in blocks_of(model)[1]:
            block.compile()
