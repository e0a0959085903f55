"""The parts of a model that patching works on, and the choice of sites in it."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checks import check_choice
from ..configuration_ibnorm import NORM_FIELDS, NormConfigMixin
from ..modeling_ibnorm import NormModelMixin, qualified, set_site, site_kinds
from ..sites import KINDS, STREAM, base_prefix, discover
from .families import stand_in

ADAPTER_BASE = "base_model_name_or_path"
_OF_THE_NORMS = (*NORM_FIELDS, "architectures", "auto_map", "_name_or_path")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Target:
    """The parts of a model that patching works on."""

    def __init__(self, model: nn.Module, exact: bool = True) -> None:
        root: Any = model
        # PEFT's wrapper holds the model; anything else that wraps one (DDP, compile) would go on with the old norms.
        self.root, self.model = root, root.get_base_model() if hasattr(root, "get_base_model") else root
        check_class(self.model, exact)
        self.base: Any = self.model.base_model
        self.config: Any = self.model.config
        self.config_class = type(self.config) if self.is_patched else stand_in(type(self.config))
        self.pin = self.config_class.norm_pin
        self.kinds = site_kinds(self.model, self.pin)
        above = next(f"{name}." if name else "" for name, module in model.named_modules() if module is self.model)
        self.prefix = above + base_prefix(self.model)
        """What names of the base model's modules begin with in the model that was given."""
        self.names = {site: above + qualified(self.model, site) for site in self.kinds}
        """Site → name in the model that was given."""

    @property
    def is_patched(self) -> bool:
        """Whether the config is one of ours."""
        return isinstance(self.config, NormConfigMixin)

    def norm_at(self, site: str) -> Any:
        """The norm at a site."""
        return self.root.get_submodule(self.names[site])

    @property
    def adapters(self) -> list[Any]:
        """PEFT's configs of the adapters on the model."""
        adapters = getattr(self.root, "peft_config", None) or getattr(self.model, "peft_config", None)
        return list(adapters.values()) if isinstance(adapters, dict) else []

    def point_at(self, config: PreTrainedConfig) -> None:
        """Let every module that reads the model's config read `config`: attention has a reference of its own.

        A part with a copy that differs, such as the decoder of a T5, keeps the copy.
        """
        for module in self.root.modules():
            if vars(module).get("config") is self.config:
                module.config = config


@dataclass
class State:
    """All that patching changes in a model."""

    norms: dict[str, Any]
    ramped: dict[str, float]
    attributes: list[tuple[Any, str, Any]]
    """(object, name, value): classes, configs, and where the weights came from."""

    @classmethod
    def of(cls, target: Target) -> "State":
        norms = {site: target.norm_at(site) for site in target.kinds}
        models = [module for module in target.model.modules() if isinstance(module, PreTrainedModel)]
        names = ("__class__", "name_or_path", "loss_type", "_keys_to_ignore_on_load_missing")
        attributes = [(m, name, getattr(m, name)) for m in models for name in names]
        attributes += [(m, "config", m.config) for m in target.root.modules() if "config" in vars(m)]
        attributes += [(adapter, ADAPTER_BASE, getattr(adapter, ADAPTER_BASE)) for adapter in target.adapters]
        ramped = {site: norm.ramped for site, norm in norms.items() if getattr(norm, "ramp", None)}
        return cls(norms, ramped, attributes)

    def put_back(self, target: Target) -> None:
        """Undo patching; other changes of the config (attention, vocabulary) stay."""
        for site, norm in self.norms.items():
            current = target.norm_at(site)
            if current is not norm:
                norm.train(current.training)
                norm.to(**factory_of(target.base, current if [*current.parameters()] else norm))
                set_site(target.model, site, norm)
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


def check_class(model: nn.Module, exact: bool) -> None:
    """Raise TypeError unless `model` is one of Transformers' own classes, or of ours.

    A subclass may do anything in its methods, which patching would lose with the class: with `exact`, none is taken.
    """
    classes = type(model).__mro__[: 1 if exact else None]
    if any(
        cls.__module__.startswith("transformers.models.")
        or cls.__module__ == "hf_ibnorm"
        or NormModelMixin in cls.__bases__
        for cls in classes
    ):
        return
    name = type(model).__name__
    if type(model).__module__.startswith("transformers_modules."):
        raise TypeError(f"model: got {name} of a checkpoint's own code; import hf_ibnorm before loading it")
    raise TypeError(
        f"model: got {name}, must be a model of Transformers, stock or with norms of hf_ibnorm, bare or wrapped by PEFT"
    )


def chosen_sites(target: Target, globs: list[str] | None, kinds: str | Collection[str] | None) -> list[str]:
    """The sites that globs and kinds mean.

    Raises:
        ValueError: a glob that matches no site, an unknown kind, or no site at all.
    """
    wanted = [kinds] if isinstance(kinds, str) or not isinstance(kinds, Collection | None) else kinds
    if wanted is not None and not wanted:
        raise ValueError(f"kinds: got no kind, allowed are {', '.join(KINDS)}")
    for kind in wanted or ():
        check_choice("kinds", kind, KINDS)
    if globs is not None and not globs:
        raise ValueError(f"sites: got no glob; sites are {listed(target)}")
    for glob in globs or ():
        if not any(fnmatchcase(site, glob) for site in target.kinds):
            sites = [site for site in discover(target.model) if fnmatchcase(site.name, glob)]
            reason = f" that can be swapped ({sites[0].name}: {sites[0].problem})" if sites else ""
            raise ValueError(f"sites: {glob!r} matches no site{reason}; sites are {listed(target)}")
    wanted = wanted or (KINDS if globs is not None else (STREAM,))
    chosen = [
        site
        for site, kind in target.kinds.items()
        if kind in wanted and (globs is None or any(fnmatchcase(site, glob) for glob in globs))
    ]
    if not chosen:
        problems = sorted({site.problem for site in discover(target.model) if site.problem})
        reason = f"; of the others: {'; '.join(problems[:3])}" if problems else ""
        raise ValueError(
            f"model: {type(target.model).__name__} has no norm of kind {' or '.join(wanted)} that can be swapped; "
            f"it has {listed(target)}{reason}"
        )
    return chosen


def listed(target: Target) -> str:
    """The sites of a model, for errors."""
    if target.pin is not None:
        return target.pin.describe(target.config)
    return ", ".join(patterns(list(target.kinds), list(target.kinds))) or "none"


def patterns(chosen: list[str], sites: list[str]) -> list[str]:
    """Globs that match `chosen` among all `sites`, and no other: numbers become stars where that is so."""
    patterns = list(dict.fromkeys(NUMBER.sub("*", site) for site in chosen))
    matched = {site for site in sites if any(fnmatchcase(site, pattern) for pattern in patterns)}
    return patterns if matched == set(chosen) else chosen


def relative(target: Target, sites: str | Collection[str] | None) -> list[str] | None:
    """`sites` of `apply_norm` as globs over names relative to the base model; None for all.

    Raises:
        TypeError: no globs.
    """
    if sites is None:
        return None
    globs: list[Any] = [sites] if isinstance(sites, str) or not isinstance(sites, Collection) else list(sites)
    if not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"sites: got {sites!r}, must be a glob or a list of globs")
    return [glob.removeprefix(target.prefix) for glob in globs]


def factory_of(base: nn.Module, norm: nn.Module) -> dict[str, Any]:
    """Device and dtype for a norm that takes the place of `norm`."""
    like = next(norm.parameters(), None)
    like = next(base.parameters()) if like is None else like
    return {"device": like.device, "dtype": like.dtype}
