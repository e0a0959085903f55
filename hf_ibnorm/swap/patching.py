"""Swapping the norms of a live model, and undoing it.

A patched model is an instance of the registered class (a LlamaForCausalLM becomes an IBNormLlamaForCausalLM), so that
saving and loading it needs nothing special. γ and β stay the very same parameters wherever the new norm has them.
"""

import copy
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_ibnorm import NORM_FIELDS
from ..modeling_ibnorm import OURS, build_site, check_checkpointing, check_sites, forget_origin, prefix_of, set_site
from ..norms import norm_name, resolve_norm_kwargs
from ..sites import Pin, contract
from .families import FAMILIES, Family

_RECORD = "_norms_before"
_ADAPTER_BASE = "base_model_name_or_path"
_OF_THE_NORMS = (*NORM_FIELDS, "architectures", "auto_map", "_name_or_path")
_HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name or name == "_is_full_backward_hook"]
_MOVED = ("weight", "bias")
# Transformers replaces functions of torch.nn.init while it initializes a model: two threads must not do so at once.
_INITIALIZING = threading.Lock()


@dataclass
class _State:
    """All that patching changes in a model."""

    norms: dict[str, Any]
    ramped: dict[str, float]
    attributes: list[tuple[Any, str, Any]]
    """(object, name, value): classes, configs, and where the weights came from."""

    @classmethod
    def of(cls, target: "_Target") -> "_State":
        norms = {site: target.base.get_submodule(site) for site in target.sites}
        models = [module for module in target.model.modules() if isinstance(module, PreTrainedModel)]
        attributes = [
            (m, name, getattr(m, name)) for m in models for name in ("__class__", "name_or_path", "loss_type")
        ]
        attributes += [(m, "config", m.config) for m in target.root.modules() if "config" in vars(m)]
        attributes += [(adapter, _ADAPTER_BASE, getattr(adapter, _ADAPTER_BASE)) for adapter in target.adapters]
        ramped = {site: norm.ramped for site, norm in norms.items() if getattr(norm, "ramp", None)}
        return cls(norms, ramped, attributes)

    def put_back(self, target: "_Target") -> None:
        """Undo patching; other changes of the config (attention, vocabulary) stay."""
        for site, norm in self.norms.items():
            current = target.base.get_submodule(site)
            if current is not norm:
                norm.train(current.training)
                norm.to(**_factory(target.base, current if [*current.parameters()] else norm))
                set_site(target.base, site, norm)
            if site in self.ramped and norm.ramped != self.ramped[site]:
                if norm.held is None:  # learned: only its start is restored
                    norm.initial_ramped = self.ramped[site]
                else:
                    norm.set_ramped(self.ramped[site])
        for item, name, value in self.attributes:
            setattr(item, name, value)
        config = target.model.config
        vars(config).update({key: value for key, value in vars(target.config).items() if key not in _OF_THE_NORMS})
        target.point_at(config)


class _Target:
    """The parts of a model that patching works on."""

    def __init__(self, model: nn.Module, exact: bool = True) -> None:
        root: Any = model
        # PEFT's wrapper holds the model; anything else that wraps one (DDP, compile) would go on with the old norms.
        self.root, self.model = root, root.get_base_model() if hasattr(root, "get_base_model") else root
        self.family = _family(self.model, exact)
        self.base: Any = self.model.base_model
        self.config: Any = self.model.config
        self.pin: Pin = self.family.pin
        self.sites = check_sites(self.base, self.config, self.pin)
        self.prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is self.base)

    @property
    def is_stock(self) -> bool:
        return not isinstance(self.config, self.family.config)

    @property
    def adapters(self) -> list[Any]:
        """PEFT's configs of the adapters on the model."""
        adapters = getattr(self.root, "peft_config", None) or getattr(self.model, "peft_config", None)
        return list(adapters.values()) if isinstance(adapters, dict) else []

    def point_at(self, config: PreTrainedConfig) -> None:
        """Let every module that reads the model's config read `config`: attention has a reference of its own."""
        for module in self.root.modules():
            if isinstance(vars(module).get("config"), type(self.config)):
                module.config = config


def _family(model: nn.Module, exact: bool) -> Family:
    for family in FAMILIES:
        known = (*family.stock_classes, *family.stock_classes.values())
        # A subclass may do anything in its methods, which patching would lose with the class.
        if type(model) in known or (isinstance(model, known) and not exact):
            return family
    name, names = type(model).__name__, [cls.__name__ for family in FAMILIES for cls in family.stock_classes]
    if type(model).__module__.startswith("transformers_modules."):
        raise TypeError(f"model: got {name} of a checkpoint's own code; import hf_ibnorm before loading it")
    raise TypeError(f"model: got {name}, known are {', '.join(names)}, stock or registered, bare or wrapped by PEFT")


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
    target = _Target(model, exact=False)
    return {target.prefix + site: target.base.get_submodule(site) for site in target.sites}


def apply_norm(
    model: nn.Module, norm: str, sites: str | Collection[str] | None = None, **norm_kwargs: Any
) -> nn.Module:
    """Replace the norms of a live model, in place.

    Device, dtype, training mode, hooks, ties and `requires_grad` are kept. γ and β stay the same parameters where the
    new norm has them; a missing β starts at zero. Weights of linear layers are not touched, random numbers not drawn.
    The model becomes an instance of the registered class, so `save_pretrained` and `from_pretrained` give the same
    model to the bit (after `import hf_ibnorm`). Applying again replaces. An error leaves the model as it was.

    An optimizer built before does not know new parameters (β, α of dyt, θ of a learned λ) and still holds dropped ones:
    build it afterwards. The same goes for DDP, FSDP and torch.compile: patch first, then wrap. Patch the outermost
    model: after patching only the inner `model.model`, the outer one would save a stock config.

    Args:
        model: a stock or registered Llama or GPT-2 (base model, language model or with another head), bare or wrapped
            by PEFT.
        norm: a name of `hf_ibnorm.NORMS`.
        sites: globs (fnmatch) over names relative to the base model, such as `"layers.0.*"` or `["norm"]`; None for
            all. The other norms stay; in a stock Llama they become torch's RMSNorm, the same up to rounding, because
            that is what the saved model will have.
        **norm_kwargs: options of that norm; those left out take their defaults, `eps` the model's own.

    Returns:
        The same model.

    Raises:
        TypeError: a model of another family (the message names those that are known), or a misplaced argument.
        ValueError: an unknown norm or option, a value that is not allowed, a glob that matches no site, offloaded or
            parametrized norms, or gradient checkpointing without `preserve_rng_state` for a norm that draws noise.
        RuntimeError: the model is not the architecture it says.

    Warns:
        UserWarning: trained parameters that the new norm has no place for.
    """
    target = _Target(model)
    config, globs = _patched_config(target, norm, sites, norm_kwargs)
    norms = _build_norms(target, config, globs)
    check_checkpointing(target.model, norms.values())
    registered = _registered_model(target, config)
    _check_keys(target, registered, norms)
    before = _State.of(target)
    _check_parameters([(site, before.norms[site]) for site in norms])
    _warn_of_lost([(site, before.norms[site], new) for site, new in norms.items()])
    for site, new in norms.items():
        _move(before.norms[site], new)

    # All that can fail is done, and the model is still unchanged.
    target.model.__dict__.setdefault(_RECORD, before)
    for site, new in norms.items():
        set_site(target.base, site, new)
    for item, name, value in before.attributes:
        if name == "__class__":
            item.__class__ = OURS.get(value, value)
    target.point_at(config)
    target.model.loss_type = registered.loss_type
    forget_origin(target.model)
    for adapter in target.adapters:
        setattr(adapter, _ADAPTER_BASE, None)
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
        UserWarning: trained parameters that the old norm has no place for; RMSNorm has no β.
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
    swapped = [(site, target.base.get_submodule(site), norm) for site, norm in before.norms.items()]
    swapped = [(site, current, norm) for site, current, norm in swapped if current is not norm]
    _check_parameters([(site, norm) for site, *pair in swapped for norm in pair])
    _warn_of_lost(swapped)
    before.put_back(target)
    for _, current, norm in swapped:
        _move(current, norm)
    del target.model.__dict__[_RECORD]
    return model


@contextmanager
def swapped_norms(
    model: nn.Module, norm: str, sites: str | Collection[str] | None = None, **norm_kwargs: Any
) -> Iterator[nn.Module]:
    """`with swapped_norms(model, norm): ...` applies a norm and afterwards puts back exactly what was there.

    The norms, their parameters' values, hooks and λ, the classes and the norm fields of the config are those of before,
    also after an exception. What else is done inside (training other weights, another attention) stays done.

    Args:
        model, norm, sites, **norm_kwargs: as in `apply_norm`.

    Yields:
        The model.

    Raises, warns:
        As `apply_norm`.
    """
    target = _Target(model)
    before, record = _State.of(target), target.model.__dict__.get(_RECORD)
    old = before.norms.values()
    hooks = [(norm, name, copy.copy(vars(norm)[name])) for norm in old for name in _HOOKS]
    values = [(p, p.detach().clone(), p.requires_grad) for norm in old for p in norm.parameters()]
    try:
        yield apply_norm(model, norm, sites, **norm_kwargs)
    finally:
        now = _Target(model)
        before.put_back(now)
        target.model.__dict__.pop(_RECORD, None)
        if record is not None:
            target.model.__dict__[_RECORD] = record
        for each, name, content in hooks:
            if isinstance(content, dict):  # emptied and filled, because handles hold this very dict
                vars(each)[name].clear()
                vars(each)[name].update(content)
            else:
                vars(each)[name] = content
        for parameter, value, requires_grad in values:
            parameter.requires_grad_(requires_grad)
            # An unneeded copy would invalidate what autograd has saved.
            if not (value.is_meta or torch.equal(parameter, value)):
                with torch.no_grad():
                    parameter.copy_(value)


def _patched_config(
    target: _Target, norm: str, sites: str | Collection[str] | None, norm_kwargs: dict[str, Any]
) -> tuple[Any, list[str]]:
    """The config the patched model will have, a copy because models may share one; and the globs of its new norm."""
    for misplaced, right in (("norm_kwargs", "the options themselves, such as lam=2.0"), ("site", "sites=")):
        if misplaced in norm_kwargs:
            raise TypeError(f"{misplaced}: no such argument of apply_norm; write {right}")
    globs = _relative(target, sites)
    config: Any = copy.deepcopy(target.config)
    if target.is_stock:
        config.__class__ = target.family.config
        vars(config).pop("model_type", None)  # a loaded config has it as an attribute, which would hide the class's
        config.norm_type, config.norm_kwargs, config.norm_overrides = target.pin.stock, None, []
    name = norm_name(norm, "norm")
    kwargs = resolve_norm_kwargs(name, norm_kwargs, getattr(config, config.norm_eps_field))
    if globs is None:
        globs = ["*"]
        config.norm_type, config.norm_kwargs, config.norm_overrides = name, kwargs, []
    else:
        if not globs:
            raise ValueError(f"sites: got no glob; sites are {target.pin.describe(config)}")
        for glob in globs:
            target.pin.check_glob(f"sites: {glob!r}", glob, config)
        kept = [override for override in config.norm_overrides if override[0] not in globs]
        config.norm_overrides = kept + [[glob, {"type": name, "kwargs": kwargs}] for glob in globs]
    config.resolve_norms()
    return config, globs


def relative_globs(model: nn.Module, sites: str | Collection[str] | None) -> list[str] | None:
    """`sites` of `apply_norm` as globs over names relative to the base model; None for all.

    Raises:
        TypeError: a model of another family, or no globs.
    """
    return _relative(_Target(model, exact=False), sites)


def _relative(target: _Target, sites: str | Collection[str] | None) -> list[str] | None:
    if sites is None:
        return None
    globs: list[Any] = [sites] if isinstance(sites, str) or not isinstance(sites, Collection) else list(sites)
    if not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"sites: got {sites!r}, must be a glob or a list of globs")
    return [glob.removeprefix(target.prefix) for glob in globs]


def _factory(base: nn.Module, norm: nn.Module) -> dict[str, Any]:
    """Device and dtype for a norm that takes the place of `norm`."""
    like = next(norm.parameters(), None)
    like = next(base.parameters()) if like is None else like
    return {"device": like.device, "dtype": like.dtype}


def _build_norms(target: _Target, config: Any, globs: list[str]) -> dict[str, nn.Module]:
    """The new norm of every site that changes; sites that shared a module share the new one.

    In a stock model that is every site: those not chosen get the registry's form of the stock norm.
    """
    norms: dict[str, nn.Module] = {}
    shared: dict[tuple[int, str], nn.Module] = {}
    for site in target.sites:
        if not (target.is_stock or any(fnmatchcase(site, glob) for glob in globs)):
            continue
        old = target.base.get_submodule(site)
        if getattr(getattr(old, "_hf_hook", None), "offload", False):
            raise ValueError(f"model: the norm {target.prefix}{site} is offloaded; patch before dispatching the model")
        key = (id(old), repr(config.norm_at(site)))
        if key not in shared:
            shared[key] = build_site(config, site, **_factory(target.base, old))
        norms[site] = shared[key]
    return norms


def _registered_model(target: _Target, config: Any) -> PreTrainedModel:
    """The model of `config` on the meta device.

    Its keys are those that a saved model must have.
    """
    with _INITIALIZING, torch.device("meta"):
        return OURS.get(type(target.model), type(target.model))(copy.deepcopy(config))


def _check_keys(target: _Target, registered: PreTrainedModel, norms: dict[str, nn.Module]) -> None:
    """Raise RuntimeError unless the patched model will have the state of the registered one, key for key.

    Otherwise the saved model could not be loaded. Adapters have keys of their own and are saved apart. Quantized layers
    have other keys; loading quantizes them again.
    """
    if any(type(module).__module__.startswith("peft.") for module in target.model.modules()):
        return
    inner = prefix_of(target.model)
    ours = {key for key in target.model.state_dict() if not key.startswith(tuple(f"{inner}{site}." for site in norms))}
    ours |= {f"{inner}{site}.{key}" for site, norm in norms.items() for key in norm.state_dict()}
    theirs = set(registered.state_dict())
    if getattr(target.config, "quantization_config", None) is not None:
        modules = dict(target.model.named_modules())
        layers = {name: layer for name, layer in registered.named_modules() if not [*layer.children()]}
        quantized = tuple(f"{name}." for name, layer in layers.items() if type(modules.get(name)) is not type(layer))
        norm_keys = tuple(f"{inner}{site}." for site in target.sites)
        ours, theirs = (
            {key for key in keys if key.startswith(norm_keys) or not key.startswith(quantized)}
            for keys in (ours, theirs)
        )
    if differing := sorted(ours ^ theirs):
        raise RuntimeError(
            f"model: patched it would differ from a {type(registered).__name__} in {len(differing)} tensors "
            f"({', '.join(differing[:5])}), so that it could not be loaded; was it changed?"
        )


def _check_parameters(norms: list[tuple[str, nn.Module]]) -> None:
    """Raise ValueError unless the gain and bias of each (site, norm) are parameters that another norm can take over.

    Under torch's parametrizations, weight and spectral norms and pruning they are computed from others.
    """
    for site, norm in norms:
        for name in _MOVED:
            if getattr(norm, name, None) is not dict(norm.named_parameters(recurse=False)).get(name):
                raise ValueError(
                    f"model: the {name} of the norm {site} is computed from other tensors (parametrized or pruned); "
                    "make it a parameter again first (remove_parametrizations, prune.remove)"
                )


def _move(old: nn.Module, new: nn.Module) -> None:
    """Give `new` what `old` has: γ and β themselves, training mode, hooks; other parameters follow `requires_grad`."""
    trainable = [parameter.requires_grad for parameter in old.parameters()]
    for name, parameter in [*new.named_parameters(recurse=False)]:
        if name in _MOVED and getattr(old, name, None) is not None:
            setattr(new, name, getattr(old, name))
        elif trainable:
            parameter.requires_grad_(any(trainable))
    new.train(old.training)
    for name in _HOOKS:  # the very same dicts, so that the handles that remove hooks go on working
        vars(new)[name] = vars(old)[name]
    if hasattr(old, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)


def _warn_of_lost(swaps: list[tuple[str, nn.Module, nn.Module]]) -> None:
    """Warn of trained parameters of `old` that have no place in `new`, for each (site, old, new)."""
    lost = []
    for site, old, new in swaps:
        initial = contract(old).initial_values()
        for name, parameter in old.named_parameters(recurse=False):
            kept = name in _MOVED and getattr(new, name, None) is not None
            if not (kept or parameter.is_meta or torch.equal(parameter, initial[name].to(parameter.device))):
                lost.append(f"{site}.{name}")
    if lost:
        warnings.warn(
            f"the new norms have no place for trained {', '.join(lost)}: {len(lost)} dropped", UserWarning, stacklevel=3
        )
