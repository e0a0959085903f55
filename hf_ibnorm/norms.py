"""Norms by name: every norm that is known, its options resolved, and the module built.

A norm is a class of `NormBase` (`norm_base`) that `register_norm` gives a name; those that come with the package are in
`norms_ibnorm`, `norms_normality` and `norms_classic`.
"""

import importlib.util
import inspect
import numbers
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checks import check_bool, check_number, nearest, own_norm_files
from .norm_base import Measure as Measure
from .norm_base import NormBase as NormBase
from .norm_base import width_of
from .norms_classic import DynamicTanh as DynamicTanh
from .norms_classic import PlacedNorm
from .norms_ibnorm import IBNorm as IBNorm
from .norms_normality import LayerNormalNorm as LayerNormalNorm


@dataclass(frozen=True)
class NormEntry:
    """One row of the registry: the class, the arguments that the name fixes, and every option with its default."""

    cls: type[nn.Module]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @property
    def contract(self) -> type[NormBase]:
        """The class to ask: the norm's own; for torch's modules `NormBase`, with the answers of an ordinary norm."""
        return self.cls if issubclass(self.cls, NormBase) else NormBase

    def identity_for(self, stock: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """`NormBase.identity_for`, with the arguments that the name fixes."""
        return self.contract.identity_for(stock, **self.fixed)


NORMS: dict[str, NormEntry] = {}
"""Name → norm, for every norm that configs, commands and `apply_norm` can name."""


def register_norm(name: str, cls: type[nn.Module], **fixed: Any) -> None:
    """Let configs, `apply_norm`, training, conversion and diagnostics know a norm by a name.

    Registering the same class again under its name replaces the row, so that a notebook's cell can be run twice.

    Args:
        name: lower-case letters, digits and "_"; it must differ from all names even without its "_".
        cls: a subclass of `NormBase`. Every argument of its `__init__` but `normalized_shape`, `gain`, `area`, `device`
            and `dtype` is an option, and needs a default that JSON can hold; with `**kwargs` those of its base class
            are options, too.
        **fixed: arguments that the name fixes, which are then no options.

    Raises:
        ValueError, TypeError: the name or the class cannot be taken; the message says why.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name: got {name!r}, must be lower-case letters, digits and _")
    for known, entry in NORMS.items():
        if known.replace("_", "") == name.replace("_", "") and (
            known != name or (entry.cls.__module__, entry.cls.__qualname__) != (cls.__module__, cls.__qualname__)
        ):
            raise ValueError(f"name: got {name!r}, which is taken by {entry.cls.__name__}")
    if not (isinstance(cls, type) and issubclass(cls, NormBase)):
        raise TypeError(f"cls: got {cls!r}, must be a subclass of hf_ibnorm.NormBase")
    defaults = cls.option_defaults(**fixed)
    if without := [option for option, default in defaults.items() if default is inspect.Parameter.empty]:
        raise TypeError(f"cls: {cls.__name__} has no default for {', '.join(without)}; every option needs one")
    NORMS[name] = NormEntry(cls, fixed, defaults)


for _variant in ("S", "L", "T", "shrink"):
    register_norm(f"ibnorm_{_variant.lower()}", IBNorm, variant=_variant)
register_norm("layernormalnorm", LayerNormalNorm)
# torch's own modules: once built, they are asked through `sites.StockNorm`.
NORMS["layernorm"] = NormEntry(nn.LayerNorm, {}, {"eps": 1e-5, "elementwise_affine": True, "bias": True})
NORMS["rmsnorm"] = NormEntry(nn.RMSNorm, {}, {"eps": 1e-6, "elementwise_affine": True})
register_norm("dyt", DynamicTanh)


def all_measures() -> dict[str, Measure]:
    """Name → diagnostic, of every norm that is known."""
    return {measure.name: measure for entry in NORMS.values() for measure in entry.contract.measures}


def ramped_options() -> set[str]:
    """Name of every option that training can ramp, of every norm that is known."""
    return {entry.contract.ramp for entry in NORMS.values() if entry.contract.ramp}


def norm_name(name: str, field: str = "norm_type") -> str:
    """The registry's spelling of `name`; case, "-" and "_" do not matter. `field` is what errors call it.

    Raises:
        ValueError: no such norm; the message gives the nearest name and all of them.
    """
    if not isinstance(name, str):
        raise ValueError(f"{field}: got a {type(name).__name__}, must be the name of a norm: {', '.join(NORMS)}")
    names = {known.replace("_", ""): known for known in NORMS}
    key = name.lower().replace("-", "").replace("_", "")
    if key not in names:
        hint = nearest(name.lower().replace("-", "_"), list(NORMS))
        raise ValueError(
            f"{field}: unknown norm {name!r}{hint}; known are {', '.join(NORMS)}; one of your own needs "
            "hf_ibnorm.register_norm first"
        )
    return names[key]


def resolve_norm_kwargs(
    name: str, kwargs: Mapping[str, Any] | None, model_eps: float | None = None, field: str = "norm_kwargs"
) -> dict[str, Any]:
    """Every option of norm `name` with its value: `kwargs` over the model's eps over the registry's defaults.

    None counts as left out. `field` is what errors call the options.

    Raises:
        ValueError, TypeError: an unknown option (with the nearest name), or a value that is not allowed.
    """
    name = norm_name(name)
    entry = NORMS[name]
    if not isinstance(kwargs, Mapping | None):
        raise TypeError(f"{field}: got {kwargs!r}, must be a dict of options of {name}")
    for key in kwargs or {}:
        if key not in entry.defaults:
            options = list(entry.defaults)
            hint = nearest(str(key), options)
            raise ValueError(f"{field}.{key}: {name} has no such option{hint}; it has {', '.join(options)}")
    given = {key: value for key, value in (kwargs or {}).items() if value is not None}
    resolved = {**entry.defaults, **given}
    if model_eps is not None and entry.contract.takes_model_eps and "eps" in resolved and "eps" not in given:
        resolved["eps"] = model_eps
    # Numbers as floats, so that a config reads the same whether 4, 4.0 or numpy's 4 was given.
    for key, value in resolved.items():
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            resolved[key] = float(value)
    checked = (id(entry), repr(resolved))
    if checked not in _checked:
        try:
            _build(entry, 1, resolved, device="meta")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{field}.{error} (norm {name})") from None
        _checked[checked] = entry
    return resolved


_checked: dict[tuple[int, str], NormEntry] = {}
"""Options found valid: a config is checked whenever it is made, validated or saved. The values keep the ids alive."""


def build_resolved(name: str, normalized_shape: Any, kwargs: Mapping[str, Any], **factory: Any) -> nn.Module:
    """`build_norm` with a name and options that were resolved before."""
    return _build(NORMS[name], normalized_shape, kwargs, **factory)


def _build(entry: NormEntry, normalized_shape: Any, kwargs: Mapping[str, Any], **factory: Any) -> nn.Module:
    for key, default in entry.defaults.items():  # torch's own modules do not check theirs
        if isinstance(default, bool):
            check_bool(key, kwargs[key])
        elif key == "eps":
            check_number("eps", kwargs[key], 0.0)
    place = {name: value for name, value in factory.items() if name in ("gain", "area")}
    if place and issubclass(entry.cls, NormBase) and not entry.cls.follows_place:
        facts = ", ".join(f"{name} {value}" for name, value in place.items())
        raise ValueError(
            f"norm: {entry.cls.__name__} cannot be at a place with {facts}: its forward must use `multiplier` and "
            "`to_rows`, and its class set follows_place"
        )
    if not place or issubclass(entry.cls, NormBase):
        return entry.cls(width_of(normalized_shape), **entry.fixed, **kwargs, **factory)
    computes = "layernorm" if entry.cls is nn.LayerNorm else "rmsnorm"
    return PlacedNorm(width_of(normalized_shape), computes, **{"bias": False, **kwargs}, **factory)


def build_norm(
    name: str,
    normalized_shape: int | tuple[int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the norm `name` over a last dimension of width `normalized_shape`.

    Args:
        name: a key of `NORMS`; case, "-" and "_" do not matter.
        normalized_shape: N, an int or a 1-tuple.
        device, dtype: of the parameters.
        **kwargs: options of that norm; those left out take the registry's defaults.

    Returns:
        The module: `IBNorm`, `LayerNormalNorm`, `DynamicTanh`, or torch's own `LayerNorm` or `RMSNorm`.

    Raises:
        ValueError, TypeError: unknown name or option (with the nearest), or a value that is not allowed.
    """
    name = norm_name(name)
    return _build(NORMS[name], normalized_shape, resolve_norm_kwargs(name, kwargs), device=device, dtype=dtype)


def import_own() -> None:
    """Import the files with norms of the user's own, so that every command and every process of it knows them."""
    for file in own_norm_files():
        name = os.path.splitext(os.path.basename(file))[0]
        if name not in sys.modules and (spec := importlib.util.spec_from_file_location(name, file)) and spec.loader:
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)


if __name__ == "hf_ibnorm.norms":  # not the copy that travels with a checkpoint
    import_own()
