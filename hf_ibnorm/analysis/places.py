"""Which norms a model has, and in which order it runs them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..grouping import AREAS
from ..norm_base import NormBase
from ..sites import identify, is_norm
from ..swap.families import family_of
from ..swap.patching import norm_sites

AT_ONCE = 2048
"""Tokens of a forward pass, about."""


def known_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of a model by qualified name, in order of execution.

    For a Llama or GPT-2 they are the `norm_sites`. Any other model is run on two tokens: its norms are the modules that
    ran and are a norm of ours, or compute a LayerNorm or an RMSNorm. Among them are norms of queries and keys, for
    which a row is one head's part of a token. A model of images is run on a black one.

    Args:
        model: base model or with a head; of other families one that takes `input_ids` or `pixel_values`.

    Raises:
        ValueError: it has none.
        RuntimeError: as `norm_sites`.
    """
    if isinstance(model, PreTrainedModel) and family_of(model.config).pin is not None:
        return norm_sites(model)
    names = {module: name for name, module in model.named_modules() if _is_known(module)}
    order: dict[str, nn.Module] = {}

    def note(norm: nn.Module, *_: object) -> None:
        order.setdefault(names[norm], norm)

    if names:
        with hooked(dict.fromkeys(names, note)), evaluating(model), torch.no_grad():
            model(**_shortest_inputs(model))
    if not order:
        raise ValueError(
            f"model: got {type(model).__name__}, which runs no known norm: none of ours, no LayerNorm and no RMSNorm"
        )
    return order


def _shortest_inputs(model: Any) -> dict[str, Tensor]:
    """Two tokens, or a black image of the size that the config says."""
    device, config = next(model.parameters()).device, getattr(model, "config", None)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", None) or 32
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), *sides, device=device)}
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    encodes = getattr(config, "is_encoder_decoder", False)
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if encodes else {})}


def chosen_norms(model: nn.Module, sites: str | Collection[str] | None) -> dict[str, nn.Module]:
    """The norms whose names relative to the base model match a glob, in order of execution; all for None.

    Raises what `known_norms` and `matching` raise.
    """
    norms = known_norms(model.base_model)  # type: ignore[arg-type]
    return {site: norms[site] for site in matching(norms, sites)}


def matching(names: Collection[str], sites: str | Collection[str] | None) -> list[str]:
    """The names that match a glob; raises ValueError for a glob that matches none, and for no glob."""
    globs = ["*"] if sites is None else [sites] if isinstance(sites, str) else list(sites)
    for glob in globs or [""]:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"sites: got {glob!r}, which matches none of {', '.join(names)}")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def unknown_norms(model: nn.Module) -> list[str]:
    """Names of modules that are called norms and that `known_norms` does not know, such as norms with a gate."""
    return [name for name, module in model.named_modules() if is_norm(module) and not _is_known(module)]


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, NormBase) or not is_norm(module):
        return isinstance(module, NormBase)
    formula = identify(module)
    return not isinstance(formula, str) and formula.area in AREAS


def batches(ids: Tensor) -> tuple[Tensor, ...]:
    """Rows of tokens, as many at once as a forward pass takes; at least one."""
    return ids.split(max(1, AT_ONCE // ids.shape[1]))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, and afterwards each module in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def hooked(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """With a forward hook on each of some modules."""
    with ExitStack() as handles:
        for module, hook in hooks.items():
            handles.enter_context(module.register_forward_hook(hook))
        yield
