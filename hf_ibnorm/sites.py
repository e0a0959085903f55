"""The norms of a model, read off the model: where they are, what each computes, and the object to ask about it.

A norm is identified by what it computes, not by its class: it is run on a few random rows (or images), on a copy in
float64, and compared with the formulas of torch. That works for a model on the meta device, too. Two architectures have
a `Pin` of expected sites, so that a change in Transformers is noticed.
"""

import dis
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedConfig, PreTrainedModel

from .grouping import CHANNELS, LAYER, from_rows, to_rows
from .norm_base import NormBase, copy_with, initial_values

EPS_ATTRIBUTES = ("eps", "variance_epsilon", "epsilon", "norm_eps")
"""Names under which norms of torch and Transformers keep their ε."""
EPS_FIELDS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "layernorm_epsilon")
"""Names under which configs of Transformers keep their norms' ε."""
_EPS_IN_CODE = (1e-5, 1e-6, 1e-12, 1e-8)
"""Values of ε that the code of a norm may have, where the module keeps none."""
STREAM, QK, LATENT, EMBEDDING, HEAD = "stream", "qk", "latent", "embedding", "head"
"""Kinds of site: in the residual stream; on queries or keys; on another width in a block; after the embedding; outside
the base model, in a head."""
KINDS = (STREAM, QK, LATENT, EMBEDDING, HEAD)
BATCH, GROUP = "batch", "group"
_OF_IMAGES = (CHANNELS, BATCH, GROUP)
_QK = re.compile(r"(^|\.)((q|k|qk|query|key)_?(layer)?_?norms?|norm_?(q|k)|(query|key)_layer_?norm)(\.|$)")


@dataclass(frozen=True)
class Formula:
    """What a norm computes: gain·z + bias, z by one of torch's formulas over the elements of an area.

    Args:
        computes: the registry's name, "layernorm", "rmsnorm", "batchnorm" or "groupnorm".
        gain: "w" where the gain is the weight, "1+w" where it is one more, "" where there is none.
        eps: added to the variance or the mean square.
        area: "layer" (the last dimension), "channels" (dimension 1 of a channels-first image, at each position),
            "batch" or "group".
    """

    computes: str
    gain: str
    eps: float
    area: str = LAYER


@dataclass(frozen=True)
class Site:
    """A place of a model that has a norm.

    Args:
        name: relative to the base model; of a norm outside it, relative to the model.
        kind: "stream", "qk", "latent", "embedding" or "head".
        area: "layer", "channels", "batch" or "group"; None where the norm was not identified.
        width: how many values the norm has a gain for, or normalizes; None where the norm does not say.
        computes: the registry's name of the stock norm; None where the norm is one of ours, or was not identified.
        gain: "w" or "1+w"; "" where the norm has no gain.
        eps: added to the variance or the mean square; None where that is unknown.
        problem: why the norm cannot be swapped, and stays as it is; None where it can.
    """

    name: str
    kind: str
    area: str | None
    width: int | None
    computes: str | None
    gain: str
    eps: float | None
    problem: str | None = None


class StockNorm:
    """One of torch's or Transformers' norms, answering as `NormBase` does.

    Raises:
        TypeError: what it computes is none of the known formulas over a layer or channels.
    """

    ramp = held = newton = None
    draws_noise = updates_state = False
    measures = ()

    def __init__(self, norm: nn.Module) -> None:
        formula = identify(norm)
        if isinstance(formula, str) or formula.area not in (LAYER, CHANNELS):
            raise TypeError(f"norm: got {type(norm).__name__}, must be a norm of hf_ibnorm, a LayerNorm or an RMSNorm")
        self.norm, self.formula, self.area = norm, formula, formula.area

    def core(self, x: Tensor) -> Tensor:
        """z of `x`, as the norm takes it, before gain and bias: float32 (float64 for float64)."""
        rows = to_rows(x if x.dtype == torch.float64 else x.float(), self.formula.area)
        normalize = F.layer_norm if self.formula.computes == "layernorm" else F.rms_norm
        return from_rows(normalize(rows, rows.shape[-1:], eps=self.formula.eps), self.formula.area)

    def initial_values(self) -> dict[str, Tensor]:
        """What each parameter of the norm is before training, by name: on the CPU, of its shape and dtype."""
        if self.formula.gain == "1+w":
            return {name: torch.zeros_like(value, device="cpu") for name, value in self.norm.named_parameters()}
        return initial_values(self.norm)

    def measured(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`core` of `rows`, and no diagnostics."""
        return self.core(rows), {}


def contract(norm: nn.Module) -> Any:
    """The object to ask about a norm: one of ours itself, a `StockNorm` for others.

    Raises:
        TypeError: a norm of an unknown formula.
    """
    return norm if isinstance(norm, NormBase) else StockNorm(norm)


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm: one of ours, or a module without submodules whose class name has "Norm" in it."""
    inside = (name for name, _ in module.named_children() if name != "parametrizations")
    return isinstance(module, NormBase) or ("Norm" in type(module).__name__ and not any(inside))


_known: dict[tuple[Any, ...], Formula | str] = {}


def identify(norm: nn.Module) -> Formula | str:
    """What a norm that is not ours computes, or in a few words why that is unknown.

    Args:
        norm: on any device, "meta" too; it is left as it is.
    """
    values = {name: value for name, value in vars(norm).items() if isinstance(value, int | float | str | tuple)}
    tensors = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    shapes = tuple((name, tuple(value.shape)) for name, value in tensors.items())
    key = (type(norm), repr(sorted(values.items())), shapes)
    if key not in _known:
        # A model may be looked at while it is built of fake tensors, which have no values to compare.
        with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _known[key] = _identified(norm)
    return _known[key]


def _identified(norm: nn.Module) -> Formula | str:
    width = width_of_norm(norm) or 8
    try:
        probe = copy_with(norm, partial(_random, scale=1.0))
        probe._buffers = {
            name: value if value is None else _random(value, scale=0.1).abs() for name, value in norm._buffers.items()
        }
        probe.training = False
    except Exception as error:
        return f"its tensors cannot be copied ({type(error).__name__})"
    problem = ""
    rows = _rows(width)
    channels = rows.movedim(-1, 1).contiguous()  # (2, N, 3)
    for x, areas in ((rows, (LAYER,)), (channels.unsqueeze(-1), _OF_IMAGES), (channels, _OF_IMAGES)):
        try:
            y = type(probe).forward(probe, x)  # not its __call__: of the hooks none may run
        except Exception as error:
            problem = problem or f"it does not run on rows alone ({type(error).__name__})"
            continue
        if not isinstance(y, Tensor) or y.shape != x.shape:
            return "it gives something else than rows of the same width"
        for area in areas:
            if (formula := _formula(probe, x, y, area)) is not None:
                return formula
        problem = "it computes no norm that is known here"
    return problem


def _formula(norm: nn.Module, x: Tensor, y: Tensor, area: str) -> Formula | None:
    """The formula over `area` with which `norm` makes `y` of `x`."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    given = [getattr(norm, name, None) for name in EPS_ATTRIBUTES]
    # torch's RMSNorm with eps None takes finfo.eps of its input's dtype.
    candidates = {float(eps): float(eps) for eps in given if isinstance(eps, float | int)}
    candidates = candidates or {torch.finfo(x.dtype).eps: torch.finfo(torch.float32).eps}
    candidates |= {eps: eps for eps in _EPS_IN_CODE if not any(isinstance(eps, float | int) for eps in given)}
    for eps, reported in candidates.items():
        for computes, z in _normalized(norm, x, area, eps):
            rows, expected = to_rows(z, area), to_rows(y.double(), area)
            gains = {"": rows} if weight is None else {"w": rows * weight, "1+w": rows * (1 + weight)}
            for gain, scaled in gains.items():
                # Some norms compute in float32, whatever they are given.
                if torch.allclose(expected, scaled if bias is None else scaled + bias, rtol=1e-4, atol=1e-5):
                    return Formula(computes, gain, reported, area)
    return None


def _normalized(norm: nn.Module, x: Tensor, area: str, eps: float) -> list[tuple[str, Tensor]]:
    """Name of each formula over an area, and what it makes of `x`."""
    if area == BATCH:
        mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
        return [] if mean is None or var is None else [("batchnorm", F.batch_norm(x, mean, var, eps=eps))]
    if area == GROUP:
        groups = getattr(norm, "num_groups", 1)
        return [("groupnorm", F.group_norm(x, groups, eps=eps))] if x.shape[1] % groups == 0 else []
    rows = to_rows(x, area)
    formulas: dict[str, Callable[..., Tensor]] = {"layernorm": F.layer_norm, "rmsnorm": F.rms_norm}
    return [(name, from_rows(f(rows, rows.shape[-1:], eps=eps), area)) for name, f in formulas.items()]


def _random(value: Tensor, scale: float) -> Tensor:
    return scale * torch.randn(value.shape, dtype=torch.float64, device="cpu")


def _rows(width: int) -> Tensor:
    """Rows that tell formulas apart, (2, 3, N): of three one has a mean, one is so small that ε counts."""
    x = torch.randn(2, 3, width, dtype=torch.float64)
    return x * torch.tensor([[1.0], [1e-3], [3.0]], dtype=torch.float64) + torch.tensor([[2.0], [0.0], [0.0]])


def width_of_norm(norm: nn.Module) -> int | None:
    """How many values a norm has a gain for, or normalizes; None where it does not say."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 1:
        return weight.shape[0]
    shape = getattr(norm, "normalized_shape", None)
    if isinstance(shape, tuple) and shape:
        return shape[-1]
    return next((n for n in (getattr(norm, name, None) for name in ("num_features", "num_channels")) if n), None)


def place_of(norm: nn.Module) -> dict[str, str]:
    """Gain convention and area of the place that a norm is in, where they are not the usual ones."""
    formula = norm if isinstance(norm, NormBase) else identify(norm)
    place = {} if isinstance(formula, str) else {"gain": formula.gain, "area": formula.area}
    return {name: value for name, value in place.items() if value not in ("", "w", LAYER)}


def eps_of(norm: nn.Module) -> float | None:
    """ε of a norm, stock or ours; None where there is none, or it is unknown."""
    formula = norm if isinstance(norm, NormBase) else identify(norm)
    return getattr(formula, "eps", None)


def base_prefix(model: nn.Module) -> str:
    """What names of modules of the base model begin with in a model of Transformers; "" for a base model."""
    return "" if getattr(model, "base_model", model) is model else f"{model.base_model_prefix}."


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every norm of a model by the name of its site, in the order in which the modules were made.

    Args:
        model: base model or with a head, on any device.
    """
    prefix = base_prefix(model)
    named = model.named_modules(remove_duplicate=False)
    return {name.removeprefix(prefix): module for name, module in named if is_norm(module)}


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The blocks of a model, with their name relative to the base model: the outermost list with the most norms.

    Args:
        model: base model or with a head, on any device.

    Raises:
        ValueError: the model has no list of modules.
    """
    base: Any = getattr(model, "base_model", model)
    lists = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"model: got {type(model).__name__}, which has no list of blocks")
    norms = list(norm_modules(base))
    return max(lists, key=lambda each: sum(name.startswith(f"{each[0]}.") for name in norms))


def context_of(config: PreTrainedConfig) -> int | None:
    """The most tokens that a text model takes; None where its config sets no limit, as without learned positions."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def discover(model: nn.Module) -> list[Site]:
    """The sites of a model, in the order in which its modules were made.

    Args:
        model: base model or with a head, on any device, "meta" too.
    """
    prefix, named = base_prefix(model), dict(model.named_modules(remove_duplicate=False))
    owners = {name: module for name, module in named.items() if isinstance(module, PreTrainedModel)}
    tied = _tied(model)
    sites = []
    for name, norm in named.items():
        if not is_norm(norm):
            continue
        parent, _, attribute = name.rpartition(".")
        owner = max((each for each in owners if not each or name.startswith(f"{each}.")), key=len, default=None)
        config = None if owner is None else owners[owner].config
        problem = "its parameters are tied to those of another module" if tied & {*map(id, norm.parameters())} else None
        problem = problem or _reads_inside(type(named[parent]), attribute)
        kind = _kind(name, width_of_norm(norm), config) if name.startswith(prefix) else HEAD
        if name.endswith(".original_module") or ".modules_to_save." in name:
            problem = problem or "PEFT trains it; merge the adapters first"
        if kind == HEAD and f"{prefix}{name}" in named:
            problem = problem or "a module of the base model has its name"
        sites.append(_site(name.removeprefix(prefix), norm, kind, problem))
    return sites


def _tied(model: nn.Module) -> set[int]:
    """Ids of the parameters that different modules share."""
    owners: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(id(module))
    return {parameter for parameter, modules in owners.items() if len(modules) > 1}


_readers: dict[tuple[type, str], str | None] = {}


def _reads_inside(parent: type, attribute: str) -> str | None:
    """A problem where a method of `parent` reads values of its norm `attribute` and computes with them itself."""
    key = (parent, attribute)
    if key not in _readers:
        methods = [method for cls in parent.__mro__ if cls not in nn.Module.__mro__ for method in vars(cls).values()]
        read = next((name for m in methods if inspect.isfunction(m) and (name := _read_of(m, attribute))), None)
        _readers[key] = read and f"{parent.__name__} computes with its {attribute}.{read}"
    return _readers[key]


def _read_of(method: FunctionType, attribute: str) -> str | None:
    """The value of `attribute` that a method loads; its dtype alone is harmless."""
    code = [(step.opname, step.argval) for step in dis.get_instructions(inspect.unwrap(method))]
    values = [("LOAD_ATTR", name) for name in ("weight", "bias", *EPS_ATTRIBUTES)]
    for owner, value, use in zip(code, code[1:], [*code[2:], ("", "")], strict=False):
        if owner == ("LOAD_ATTR", attribute) and value in values and use != ("LOAD_ATTR", "dtype"):
            return value[1]
    return None


def _kind(name: str, width: int | None, config: PreTrainedConfig | None) -> str:
    if _QK.search(name):
        return QK
    if "embed" in name:
        return EMBEDDING
    hidden = getattr(config, "hidden_size", None)
    staged = isinstance(getattr(config, "depths", None), list | tuple)  # each stage of an image model has its own width
    return STREAM if staged or config is None or width in (hidden, None) else LATENT


def _site(name: str, norm: nn.Module, kind: str, problem: str | None) -> Site:
    width = width_of_norm(norm)
    if isinstance(norm, NormBase):
        return Site(name, kind, norm.area, width, None, norm.gain, getattr(norm, "eps", None), problem)
    formula = identify(norm)
    if isinstance(formula, str):
        return Site(name, kind, None, width, None, "", None, problem or formula)
    if width is None:
        problem = problem or "it does not say its width"
    if formula.area not in (LAYER, CHANNELS):
        problem = problem or f"it is over the area {formula.area}, which no norm here is over yet"
    return Site(name, kind, formula.area, width, formula.computes, formula.gain, formula.eps, problem)


@dataclass(frozen=True)
class Pin:
    """What must be found in an architecture: its sites in order of execution, and the norm that the stock model has.

    Args:
        blocks: where the blocks are, relative to the base model.
        in_block: sites in a block.
        final: the site after the last block.
        stock: the stock norm's name in the registry.
        optional: sites in a block that exist only if the config's flag is set: (site, flag).
    """

    blocks: str
    in_block: tuple[str, ...]
    final: str
    stock: str
    optional: tuple[tuple[str, str], ...] = ()

    def _in_block(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return self.in_block + tuple(site for site, flag in self.optional if getattr(config, flag))

    def names(self, config: PreTrainedConfig) -> list[str]:
        """Every site's name in a model of this config: block by block, the final norm last."""
        blocks = range(config.num_hidden_layers)
        return [f"{self.blocks}.{i}.{site}" for i in blocks for site in self._in_block(config)] + [self.final]

    def describe(self, config: PreTrainedConfig) -> str:
        """The same in one line, for errors."""
        in_block = ", ".join(f"{self.blocks}.N.{site}" for site in self._in_block(config))
        return f"{in_block} (N from 0 to {config.num_hidden_layers - 1}), {self.final}"

    def check_glob(self, what: str, glob: str, config: PreTrainedConfig) -> None:
        """Raise ValueError, beginning with `what`, unless `glob` matches a site."""
        if not any(fnmatchcase(site, glob) for site in self.names(config)):
            raise ValueError(f"{what} matches no site; sites are {self.describe(config)}")


PINS: Mapping[str, Pin] = {
    "llama": Pin("layers", ("input_layernorm", "post_attention_layernorm"), "norm", "rmsnorm"),
    "gpt2": Pin("h", ("ln_1", "ln_2"), "ln_f", "layernorm", optional=(("ln_cross_attn", "add_cross_attention"),)),
}
"""Stock model type → what must be found."""
