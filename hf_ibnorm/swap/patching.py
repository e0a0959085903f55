"""Swapping the norms of a live model, and undoing it.

A patched model is an instance of the registered class (a LlamaForCausalLM becomes an IBNormLlamaForCausalLM), so that
saving and loading it needs nothing special. γ and β stay the very same parameters wherever the new norm has them.
"""

import copy
import inspect
import itertools
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_ibnorm import STOCK, resolve_norm
from ..modeling_ibnorm import build_site, check_checkpointing, forget_origin, mark_parts, ours, qualified, set_site
from ..norms import NORMS, NormBase, norm_name
from ..sites import STREAM, Formula, Site, contract, discover, identify
from .families import family_of
from .target import ADAPTER_BASE, State, Target, check_class, chosen_sites, factory_of, patterns, relative

_RECORD = "_norms_before"
_HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name or name == "_is_full_backward_hook"]
_MOVED = ("weight", "bias")
# Transformers replaces functions of torch.nn.init while it initializes a model: two threads must not do so at once.
_INITIALIZING = threading.Lock()


def norm_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of a model that can be swapped, by qualified name, as in `model.get_submodule`.

    Args:
        model: a model of Transformers, stock or with norms of this package, bare or wrapped by PEFT.

    Returns:
        Of a Llama or GPT-2 with L blocks 2·L+1 norms in order of execution (GPT-2 with cross-attention: 3·L+1), of
        other models all whose `Site` has no problem, in the order in which the modules were made.

    Raises:
        TypeError: a model that is not of Transformers.
        RuntimeError: a Llama or GPT-2 has norms where the architecture has none, or lacks some.
    """
    target = Target(model, exact=False)
    return {name: target.root.get_submodule(name) for name in target.names.values()}


def describe_sites(model: nn.Module) -> list[Site]:
    """Every norm of a model: its place, what it computes, and whether it can be swapped.

    Args:
        model: as in `norm_sites`; on the meta device, too.

    Returns:
        The sites, in the order in which the modules were made; names are relative to the base model.

    Raises:
        TypeError: a model that is not of Transformers.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    check_class(model, exact=False)
    return discover(model)


def apply_norm(
    model: nn.Module,
    norm: str,
    sites: str | Collection[str] | None = None,
    kinds: str | Collection[str] | None = None,
    **norm_kwargs: Any,
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
        model: a model of Transformers, stock or with norms of this package, base model or with a head, bare or wrapped
            by PEFT.
        norm: a name of `hf_ibnorm.NORMS`.
        sites: globs (fnmatch) over names relative to the base model, such as `"layers.0.*"` or `["norm"]`. The other
            norms stay; in a stock Llama or GPT-2 they become torch's RMSNorm or LayerNorm, the same up to rounding.
        kinds: kinds of site, of "stream", "qk", "latent", "embedding" and "head" (`describe_sites`). Without `sites`
            and `kinds` the norms in the residual stream are replaced; with `sites` alone, whatever the globs match.
        **norm_kwargs: options of that norm; those left out take their defaults, `eps` the model's own.

    Returns:
        The same model.

    Raises:
        TypeError: a model that is not one of Transformers' own classes (a subclass is refused, too), or a misplaced
            argument.
        ValueError: an unknown norm or option, a value that is not allowed, a glob that matches no site that can be
            swapped, offloaded or parametrized norms, or gradient checkpointing without `preserve_rng_state` for a norm
            that draws noise.
        RuntimeError: the model is not the architecture it says.

    Warns:
        UserWarning: trained parameters that the new norm has no place for; or a norm that changes what the weights of
            a checkpoint compute.
    """
    target = Target(model)
    config, chosen = _patched_config(target, norm, sites, kinds, norm_kwargs)
    registered = _registered_model(target, config)
    norms = _build_norms(target, config, chosen, registered)
    check_checkpointing(target.model, norms.values())
    _check_keys(target, registered, norms)
    before = State.of(target)
    _check_parameters([(site, before.norms[site]) for site in norms])
    _warn_of_lost([(site, before.norms[site], new) for site, new in norms.items()])
    if target.model.name_or_path and any(not _is_identity(before.norms[site], config, site) for site in chosen):
        warnings.warn(
            f"{norm} changes what loaded weights compute; NORMS[...].identity_for has options that do not, `hf-ibnorm "
            "convert --init calibrate` fits the new norms to the old, training by the recipe `heal` adapts the weights",
            UserWarning,
            stacklevel=2,
        )
    for site, new in norms.items():
        _move(before.norms[site], new)

    # All that can fail is done, and the model is still unchanged.
    target.model.__dict__.setdefault(_RECORD, before)
    for site, new in norms.items():
        set_site(target.model, site, new)
    for item, name, value in before.attributes:
        if name == "__class__":
            item.__class__ = ours(value)
    mark_parts(target.model)
    target.point_at(config)
    target.model.loss_type = registered.loss_type
    for name, part in registered.named_modules():
        if isinstance(part, PreTrainedModel):
            own: Any = target.model.get_submodule(name)
            own._keys_to_ignore_on_load_missing = part._keys_to_ignore_on_load_missing
    forget_origin(target.model)
    for adapter in target.adapters:
        setattr(adapter, ADAPTER_BASE, None)
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
        TypeError: a model that is not of Transformers.
        ValueError: there is nothing to undo: the model is a stock one, was restored already, or was loaded or built
            with these norms, not patched (`hf-ibnorm convert` makes a stock checkpoint of such a model).

    Warns:
        UserWarning: trained parameters that the old norm has no place for; RMSNorm has no β.
    """
    target = Target(model)
    before: State | None = target.model.__dict__.get(_RECORD)
    if before is None:
        raise ValueError(
            f"model: this {type(target.model).__name__} has the stock norms, there is nothing to restore"
            if not target.is_patched
            else f"model: this {type(target.model).__name__} was loaded or built with its norms, not patched by "
            "apply_norm; `hf-ibnorm convert` makes a stock checkpoint of it"
        )
    swapped = [(site, target.norm_at(site), norm) for site, norm in before.norms.items()]
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
    model: nn.Module,
    norm: str,
    sites: str | Collection[str] | None = None,
    kinds: str | Collection[str] | None = None,
    **norm_kwargs: Any,
) -> Iterator[nn.Module]:
    """`with swapped_norms(model, norm): ...` applies a norm and afterwards puts back exactly what was there.

    The norms, their parameters' values, hooks and λ, the classes and the norm fields of the config are those of before,
    also after an exception. What else is done inside (training other weights, another attention) stays done.

    Args:
        model, norm, sites, kinds, **norm_kwargs: as in `apply_norm`.

    Yields:
        The model.

    Raises, warns:
        As `apply_norm`.
    """
    target = Target(model)
    before, record = State.of(target), target.model.__dict__.get(_RECORD)
    old = before.norms.values()
    hooks = [(norm, name, copy.copy(vars(norm)[name])) for norm in old for name in _HOOKS]
    values = [(p, p.detach().clone(), p.requires_grad) for norm in old for p in norm.parameters()]
    try:
        yield apply_norm(model, norm, sites, kinds, **norm_kwargs)
    finally:
        now = Target(model)
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
    target: Target,
    norm: str,
    sites: str | Collection[str] | None,
    kinds: str | Collection[str] | None,
    norm_kwargs: dict[str, Any],
) -> tuple[Any, list[str]]:
    """The config the patched model will have, a copy because models may share one; and the sites of its new norm."""
    for misplaced, right in (("norm_kwargs", "the options themselves, such as lam=2.0"), ("site", "sites=")):
        if misplaced in norm_kwargs:
            raise TypeError(f"{misplaced}: no such argument of apply_norm; write {right}")
    globs = relative(target, sites)
    # Parts of a composite model read their own configs, which stay the same objects.
    parts = {id(part): part for part in vars(target.config).values() if isinstance(part, PreTrainedConfig)}
    config: Any = copy.deepcopy(target.config, dict(parts))
    if not target.is_patched:
        config.__class__ = target.config_class
        vars(config).pop("model_type", None)  # a loaded config has it as an attribute, which would hide the class's
        config.norm_type, config.norm_kwargs, config.norm_overrides = family_of(config).stock_norm, None, []
    chosen = chosen_sites(target, globs, kinds)
    name = norm_name(norm, "norm")
    name, kwargs = resolve_norm("norm", name, "norm_kwargs", norm_kwargs, config.model_eps)
    entry = {"type": name, "kwargs": kwargs}
    if globs is None and kinds is None:
        others = [(site, kind, config.norm_at(site, kind)) for site, kind in target.kinds.items() if kind != STREAM]
        kept = [[site, {"type": of[0], "kwargs": of[1]}] for site, kind, of in others if of[0] != STOCK]
        config.norm_type, config.norm_kwargs, config.norm_overrides = name, kwargs, kept
    else:
        globs = globs if globs is not None and kinds is None else patterns(chosen, list(target.kinds))
        kept = [override for override in config.norm_overrides if override[0] not in globs]
        config.norm_overrides = kept + [[glob, entry] for glob in globs]
    config.resolve_norms()
    return config, chosen


def _build_norms(target: Target, config: Any, chosen: list[str], registered: PreTrainedModel) -> dict[str, nn.Module]:
    """The new norm of every site that changes; sites that shared a module share the new one.

    In a stock Llama or GPT-2 every site changes: those not chosen get torch's form of the stock norm.
    """
    norms: dict[str, nn.Module] = {}
    shared: dict[tuple[int, str], nn.Module] = {}
    everywhere = not target.is_patched and target.pin is not None
    for site, kind in target.kinds.items():
        if not everywhere and site not in chosen:
            continue
        old = target.norm_at(site)
        if getattr(getattr(old, "_hf_hook", None), "offload", False):
            raise ValueError(f"model: the norm {target.names[site]} is offloaded; patch before dispatching the model")
        key = (id(old), repr(config.norm_at(site, kind)))
        if key not in shared:
            like = registered.get_submodule(qualified(registered, site))  # has the ε of the stock norm
            shared[key] = build_site(config, site, like, kind, **factory_of(target.base, old))
        norms[site] = shared[key]
    return norms


def _registered_model(target: Target, config: Any) -> PreTrainedModel:
    """The model that loading would build, on the meta device: what is saved must have its keys.

    A model without a part that its constructor can leave out, such as a pooler, is compared with one without it.
    """
    config = copy.deepcopy(config)
    if isinstance(config.dtype, str):  # as saving a model leaves it; some models make tensors of it
        config.dtype = getattr(torch, config.dtype)
    cls: Any = ours(type(target.model))
    arguments = inspect.signature(cls.stock.__init__).parameters.values()
    switches = {each.name: (each.default, not each.default) for each in arguments if isinstance(each.default, bool)}
    built: list[PreTrainedModel] = []
    for values in itertools.product(*switches.values()):
        with _INITIALIZING, torch.device("meta"):
            built.append(cls(config, **dict(zip(switches, values, strict=True))))
        if dict(built[-1].named_children()).keys() == dict(target.model.named_children()).keys():
            return built[-1]
    return built[0]


def _check_keys(target: Target, registered: PreTrainedModel, norms: dict[str, nn.Module]) -> None:
    """Raise RuntimeError unless the patched model will have the state of the registered one, key for key.

    Otherwise the saved model could not be loaded. Adapters have keys of their own and are saved apart. Quantized layers
    have other keys; loading quantizes them again.
    """
    if any(type(module).__module__.startswith("peft.") for module in target.model.modules()):
        return
    swapped = {qualified(target.model, site): norm for site, norm in norms.items()}
    patched = {key for key in target.model.state_dict() if not key.startswith(tuple(f"{name}." for name in swapped))}
    patched |= {f"{name}.{key}" for name, norm in swapped.items() for key in norm.state_dict()}
    theirs = set(registered.state_dict())
    if getattr(target.config, "quantization_config", None) is not None:
        modules = dict(target.model.named_modules())
        layers = {name: layer for name, layer in registered.named_modules() if not [*layer.children()]}
        quantized = tuple(f"{name}." for name, layer in layers.items() if type(modules.get(name)) is not type(layer))
        norm_keys = tuple(f"{name}." for name in swapped)
        patched, theirs = (
            {key for key in keys if key.startswith(norm_keys) or not key.startswith(quantized)}
            for keys in (patched, theirs)
        )
    if differing := sorted(patched ^ theirs):
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


def _is_identity(old: nn.Module, config: Any, site: str) -> bool:
    """Whether the norm that `config` has for a site computes what the stock norm there does."""
    name, options = config.norm_at(site)
    if isinstance(old, NormBase) or not isinstance(formula := identify(old), Formula):
        return False
    answer = ({}, {}) if name == formula.computes else NORMS[name].identity_for(formula.computes)
    return answer is not None and answer[0].items() <= options.items()


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
