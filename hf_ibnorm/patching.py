"""Swapping the norms of a live model, and undoing it.

A patched model is an instance of the registered class (a LlamaForCausalLM becomes an IBNormLlamaForCausalLM), so that
saving and loading it needs nothing special. γ and β stay the very same parameters wherever the new norm has them.
"""

import copy
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_ibnorm import NORM_FIELDS, SiteTable
from .families import FAMILIES, Family
from .modeling_ibnorm import build_site, check_checkpointing, check_sites, set_site
from .norms import norm_name, resolve_norm_kwargs

_OURS = {stock: ours for family in FAMILIES for stock, ours in family.stock_classes.items()}
_STOCK_OR_OURS = {*_OURS, *_OURS.values()}

_RECORD = "_norms_before"
_HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name or name == "_is_full_backward_hook"]
# Transformers replaces functions of torch.nn.init while it initializes a model: two threads must not do so at once.
_INITIALIZING = threading.Lock()


@dataclass
class _State:
    """All that patching changes in a model."""

    norms: dict[str, nn.Module]
    classes: list[tuple[nn.Module, type]]
    configs: list[tuple[nn.Module, PreTrainedConfig]]
    loss_type: str | None

    @classmethod
    def of(cls, target: "_Target") -> "_State":
        return cls(
            norms={site: target.base.get_submodule(site) for site in target.sites},
            classes=[(module, type(module)) for module in target.model.modules() if type(module) in _STOCK_OR_OURS],
            configs=[(m, m.__dict__["config"]) for m in target.root.modules() if "config" in m.__dict__],
            loss_type=target.model.loss_type,
        )

    def put_back(self, target: "_Target") -> None:
        for site, norm in self.norms.items():
            current = target.base.get_submodule(site)
            norm.train(current.training)
            norm.to(**_factory(target.base, current if [*current.parameters()] else norm))
            set_site(target.base, site, norm)
        for module, cls in self.classes:
            module.__class__ = cls
        for module, config in self.configs:
            vars(module)["config"] = config
        target.model.loss_type = self.loss_type


class _Target:
    """The parts of a model that patching works on."""

    def __init__(self, model: nn.Module) -> None:
        self.root = model
        # PEFT's wrapper holds the model; anything else that wraps one (DDP, compile) would go on with the old norms.
        wrapped: Any = model
        self.model = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped
        self.family = _family(self.model)
        self.base: Any = self.model.base_model
        self.config: Any = self.model.config
        self.table: SiteTable = self.family.config.norm_site_table
        self.sites = self.table.names(self.config)
        check_sites(self.base, self.sites)
        self.prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is self.base)

    @property
    def is_stock(self) -> bool:
        return not isinstance(self.config, self.family.config)


def _family(model: nn.Module) -> Family:
    for family in FAMILIES:
        if type(model) in (*family.stock_classes, *family.stock_classes.values()):
            return family
    known = ", ".join(cls.__name__ for family in FAMILIES for pair in family.stock_classes.items() for cls in pair)
    raise TypeError(f"model: got {type(model).__name__}, known are {known}, bare or wrapped by PEFT")


def norm_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of a model by qualified name, as in `model.get_submodule`, in order of execution.

    Args:
        model: a stock or registered Llama or GPT-2, base model or with a head, bare or wrapped by PEFT.

    Returns:
        2·L+1 norms for L blocks (GPT-2 with cross-attention: 3·L+1).

    Raises:
        TypeError: a model of another family; the message names those that are known.
        RuntimeError: the model has norms where the architecture has none, or lacks some.
    """
    target = _Target(model)
    return {target.prefix + site: target.base.get_submodule(site) for site in target.sites}


def apply_norm(model: nn.Module, norm: str, sites: str | Sequence[str] | None = None, **norm_kwargs: Any) -> nn.Module:
    """Replace the norms of a live model, in place.

    Device, dtype, training mode, hooks, ties and `requires_grad` are kept. γ and β stay the same parameters where the
    new norm has them; a missing β starts at zero. Weights of linear layers are not touched, random numbers not drawn.
    The model becomes an instance of the registered class, so `save_pretrained` and `from_pretrained` give the same
    model to the bit (after `import hf_ibnorm`). Applying again replaces. An error leaves the model as it was.

    An optimizer built before does not know new parameters (β, α of dyt, θ of a learned λ) and still holds dropped ones:
    build it afterwards. The same goes for DDP, FSDP and torch.compile: patch first, then wrap. Patch the outermost
    model: after patching only the inner `model.model`, the outer one would save a stock config.

    Args:
        model: a stock or registered Llama or GPT-2 (base model, language model or sequence classifier), bare or wrapped
            by PEFT.
        norm: a name of `hf_ibnorm.NORMS`.
        sites: globs (fnmatch) over names relative to the base model, such as `"layers.0.*"` or `["norm"]`; None for
            all. The other norms stay; in a stock Llama they become torch's RMSNorm, the same up to rounding, because
            that is what the saved model will have.
        **norm_kwargs: options of that norm; those left out take their defaults, `eps` the model's own.

    Returns:
        The same model.

    Raises:
        TypeError: a model of another family; the message names those that are known.
        ValueError: an unknown norm or option, a value that is not allowed, a glob that matches no site, offloaded
            norms, or gradient checkpointing without `preserve_rng_state` for a norm that draws noise.
        RuntimeError: the model is not the architecture it says.

    Warns:
        UserWarning: trained γ or β that the new norm has no place for.
    """
    target = _Target(model)
    config = _patched_config(target, norm, sites, norm_kwargs)
    norms = _build_norms(target, config)
    check_checkpointing(target.model, norms.values())
    registered = _check_against_registered(target, config, norms)

    before = _State.of(target)
    lost = [loss for site, new in norms.items() for loss in _move(target.base.get_submodule(site), new, site)]
    for site, new in norms.items():
        set_site(target.base, site, new)
    for module, cls in before.classes:
        module.__class__ = _OURS.get(cls, cls)
    _point_at(target, config)
    target.model.loss_type = registered.loss_type
    _warn_of(lost)
    target.model.__dict__.setdefault(_RECORD, before)
    return model


def restore_norm(model: nn.Module) -> nn.Module:
    """Undo `apply_norm`, however often it was applied: classes, config and norms are what they were before.

    γ and β keep their trained values where the old norm has them. Changes made since to other fields of the config
    (attention implementation, vocabulary size, ...) are kept.

    Args:
        model: what `apply_norm` was given, or a copy of it.

    Returns:
        The same model.

    Raises:
        TypeError: a model of another family.
        ValueError: there is nothing to undo: the model is a stock one, was restored already, or was loaded or built
            with these norms, not patched (`hf-ibnorm convert` makes a stock checkpoint of such a model).

    Warns:
        UserWarning: trained γ or β that the old norm has no place for; RMSNorm has no β.
    """
    target = _Target(model)
    before: _State | None = target.model.__dict__.get(_RECORD)
    if before is None:
        raise ValueError(
            f"model: this {type(target.model).__name__} has the stock norms, there is nothing to restore"
            if target.is_stock
            else f"model: this {type(target.model).__name__} was loaded or built with its norms, not patched by "
            "apply_norm; `hf-ibnorm convert` makes a stock checkpoint of it"
        )
    norms, current = {site: target.base.get_submodule(site) for site in target.sites}, target.config
    old = next(config for module, config in before.configs if module is target.model)
    before.put_back(target)
    lost = [loss for site, norm in norms.items() for loss in _move(norm, target.base.get_submodule(site), site)]
    vars(old).update({key: value for key, value in vars(current).items() if key not in NORM_FIELDS})
    _point_at(target, old)
    del target.model.__dict__[_RECORD]
    _warn_of(lost)
    return model


@contextmanager
def swapped_norms(
    model: nn.Module, norm: str, sites: str | Sequence[str] | None = None, **norm_kwargs: Any
) -> Iterator[nn.Module]:
    """`with swapped_norms(model, norm): ...` applies a norm and afterwards puts back exactly what was there.

    The norms, their parameters' values, classes and config are those of before, also after an exception, whatever was
    done to them in between. Training inside changes the other weights, which stay changed.

    Args:
        model, norm, sites, **norm_kwargs: as in `apply_norm`.

    Yields:
        The model.

    Raises, warns:
        As `apply_norm`.
    """
    target = _Target(model)
    before, record = _State.of(target), target.model.__dict__.get(_RECORD)
    values = [(p, p.detach().clone()) for module in before.norms.values() for p in module.parameters()]
    try:
        yield apply_norm(model, norm, sites, **norm_kwargs)
    finally:
        before.put_back(target)
        target.model.__dict__.pop(_RECORD, None)
        if record is not None:
            target.model.__dict__[_RECORD] = record
        with torch.no_grad():
            for parameter, value in values:
                if not (value.is_meta or torch.equal(parameter, value)):  # an unneeded copy would spoil a graph
                    parameter.copy_(value)


def _patched_config(
    target: _Target, norm: str, sites: str | Sequence[str] | None, norm_kwargs: dict[str, Any]
) -> PreTrainedConfig:
    """The config the patched model will have; a copy, because models may share one."""
    config: Any = copy.deepcopy(target.config)
    if target.is_stock:
        config.__class__ = target.family.config
        config.norm_type, config.norm_kwargs, config.norm_overrides = target.table.stock, None, []
    name = norm_name(norm, "norm")
    kwargs = resolve_norm_kwargs(name, norm_kwargs, getattr(config, config.norm_eps_field))
    if sites is None:
        config.norm_type, config.norm_kwargs, config.norm_overrides = name, kwargs, []
    else:
        globs = [sites] if isinstance(sites, str) else list(sites)
        for glob in globs or [""]:
            if not any(fnmatchcase(site, glob) for site in target.sites):
                raise ValueError(f"sites: {glob!r} matches no site; sites are {target.table.describe(config)}")
        kept = [override for override in config.norm_overrides if override[0] not in globs]
        config.norm_overrides = kept + [[glob, {"type": name, "kwargs": kwargs}] for glob in globs]
    config.resolve_norms()
    return config


def _factory(base: nn.Module, norm: nn.Module) -> dict[str, Any]:
    """Device and dtype for a norm that takes the place of `norm`."""
    like = next(norm.parameters(), None)
    like = next(base.parameters()) if like is None else like
    return {"device": like.device, "dtype": like.dtype}


def _build_norms(target: _Target, config: Any) -> dict[str, nn.Module]:
    """The new norm of every site that changes; sites that shared a module share the new one."""
    norms: dict[str, nn.Module] = {}
    shared: dict[tuple[int, str], nn.Module] = {}
    for site in target.sites:
        old, (name, kwargs) = target.base.get_submodule(site), config.norm_at(site)
        if not target.is_stock and target.config.norm_at(site) == (name, kwargs):
            continue
        if getattr(getattr(old, "_hf_hook", None), "offload", False):
            raise ValueError(f"model: the norm {target.prefix}{site} is offloaded; patch before dispatching the model")
        key = (id(old), f"{name} {kwargs}")
        if key not in shared:
            trained = [parameter.requires_grad for parameter in old.parameters()] or [True]
            shared[key] = build_site(config, site, **_factory(target.base, old)).requires_grad_(any(trained))
        norms[site] = shared[key]
    return norms


def _check_against_registered(target: _Target, config: Any, norms: dict[str, nn.Module]) -> PreTrainedModel:
    """The registered model of `config` on the meta device, whose state the patched model must have key for key.

    Building it also makes its class known to Transformers' recorder of hidden states, which would give None.

    Raises:
        RuntimeError: the keys differ: what would be saved would not load.
    """
    cls = _OURS.get(type(target.model), type(target.model))
    with _INITIALIZING, torch.device("meta"):
        registered = cls(copy.deepcopy(config))
    if any(type(module).__module__.startswith("peft.") for module in target.model.modules()):
        return registered  # adapters have keys of their own, and are saved apart
    inner = "" if target.base is target.model else f"{target.model.base_model_prefix}."
    ours = {key for key in target.model.state_dict() if not key.startswith(tuple(f"{inner}{site}." for site in norms))}
    ours |= {f"{inner}{site}.{key}" for site, norm in norms.items() for key in norm.state_dict()}
    if differing := ours ^ set(registered.state_dict()):
        raise RuntimeError(f"model: patched it would differ from a {cls.__name__} in {', '.join(sorted(differing))}")
    return registered


def _move(old: nn.Module, new: nn.Module, site: str) -> list[str]:
    """Give `new` what `old` has: γ and β themselves, training mode, hooks. Returns trained tensors that are lost."""
    lost = []
    for name, initial in (("weight", 1.0), ("bias", 0.0)):
        tensor = getattr(old, name, None)
        if tensor is None:
            continue
        if getattr(new, name, None) is not None:
            setattr(new, name, tensor)
        elif not tensor.is_meta and (tensor != initial).any():
            lost.append(f"{site}.{name}")
    new.train(old.training)
    for name in _HOOKS:  # the very same dicts, so that the handles that remove hooks go on working
        vars(new)[name] = vars(old)[name]
    if hasattr(old, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)
    return lost


def _point_at(target: _Target, config: PreTrainedConfig) -> None:
    """Let every module that reads the model's config read `config`: attention has a reference of its own."""
    for module in target.root.modules():
        if isinstance(vars(module).get("config"), type(target.config)):
            vars(module)["config"] = config


def _warn_of(lost: list[str]) -> None:
    if lost:
        warnings.warn(
            f"the new norms have no place for trained {', '.join(lost)}: {len(lost)} dropped", UserWarning, stacklevel=3
        )
