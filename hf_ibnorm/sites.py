"""The norms of a model, read off the model: where they are, what each computes, and the object to ask about it.

A norm is identified by what it computes, not by its class: it is run on a few random rows, on a copy in float64, and
compared with the formulas of torch. That works for a model on the meta device, too. An architecture that has classes of
ours has a `Pin` of expected sites, so that a change in Transformers is noticed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .norm_base import NormBase, copy_with, initial_values

EPS_ATTRIBUTES = ("eps", "variance_epsilon", "epsilon", "norm_eps")
"""Names under which norms of torch and Transformers keep their ε."""
EPS_FIELDS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "layernorm_epsilon")
"""Names under which configs of Transformers keep their norms' ε."""
STREAM, QK, LATENT, EMBEDDING = "stream", "qk", "latent", "embedding"
"""Kinds of site: in the residual stream; on queries and keys; on another width in a block; after the embedding."""


@dataclass(frozen=True)
class Formula:
    """What a norm computes: gain·z + bias, z by one of torch's formulas.

    Args:
        computes: "layernorm" or "rmsnorm", as the registry calls them.
        gain: "w" where the gain is the weight, "1+w" where it is one more, "" where there is none.
        eps: added to the variance or the mean square.
    """

    computes: str
    gain: str
    eps: float


@dataclass(frozen=True)
class Site:
    """A place of a model that has a norm.

    Args:
        name: relative to the base model.
        kind: `STREAM`, `QK`, `LATENT` or `EMBEDDING`.
        width: of the dimension that is normalized; None where the norm does not say.
        formula: what is computed there; None where the norm is one of ours, or was not identified.
        problem: why it was not identified; None where it was.
    """

    name: str
    kind: str
    width: int | None
    formula: Formula | None
    problem: str | None = None


class StockNorm:
    """One of torch's or Transformers' norms, answering as `NormBase` does.

    Raises:
        TypeError: what it computes is none of the known formulas.
    """

    ramp = held = newton = None
    draws_noise = updates_state = False
    measures = ()

    def __init__(self, norm: nn.Module) -> None:
        formula = identify(norm)
        if isinstance(formula, str):
            raise TypeError(f"norm: got {type(norm).__name__}, must be a norm of hf_ibnorm, a LayerNorm or an RMSNorm")
        self.norm, self.formula = norm, formula

    def core(self, x: Tensor) -> Tensor:
        """z of `x`, shape (..., N), before gain and bias: float32 (float64 for float64)."""
        x = x if x.dtype == torch.float64 else x.float()
        normalize = F.layer_norm if self.formula.computes == "layernorm" else F.rms_norm
        return normalize(x, x.shape[-1:], eps=self.formula.eps)

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
    shapes = tuple((name, tuple(value.shape)) for name, value in norm.named_parameters())
    key = (type(norm), repr(sorted(values.items())), shapes)
    if key not in _known:
        _known[key] = _identified(norm)
    return _known[key]


def _identified(norm: nn.Module) -> Formula | str:
    try:
        with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x = _rows(width_of_norm(norm) or 8)
            probe = _probe(norm)
            y = type(probe).forward(probe, x)
            weight, bias = (getattr(probe, name, None) for name in ("weight", "bias"))
    except Exception as error:
        return f"it does not run on rows alone ({type(error).__name__})"
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return "it gives something else than rows of the same width"
    given = [getattr(norm, name, None) for name in EPS_ATTRIBUTES]
    # torch's RMSNorm with eps None takes finfo.eps of its input's dtype.
    candidates = {float(eps): float(eps) for eps in given if isinstance(eps, float | int)}
    for eps, reported in (candidates or {torch.finfo(x.dtype).eps: torch.finfo(torch.float32).eps}).items():
        for computes, normalize in (("layernorm", F.layer_norm), ("rmsnorm", F.rms_norm)):
            z = normalize(x, x.shape[-1:], eps=float(eps))
            gains = {"": z} if weight is None else {"w": z * weight, "1+w": z * (1 + weight)}
            for gain, scaled in gains.items():
                expected = scaled if bias is None else scaled + bias
                if torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-5):  # some compute in float32
                    return Formula(computes, gain, reported)
    return "it computes neither a LayerNorm nor an RMSNorm of its rows"


def _rows(width: int) -> Tensor:
    """Rows that tell formulas apart, (2, 3, N): of three one has a mean, one is so small that ε counts."""
    x = torch.randn(2, 3, width, dtype=torch.float64)
    return x * torch.tensor([[1.0], [1e-3], [3.0]], dtype=torch.float64) + torch.tensor([[2.0], [0.0], [0.0]])


def _probe(norm: nn.Module) -> nn.Module:
    """A copy of a norm on the CPU, in float64, with random parameters and without hooks."""
    probe = copy_with(norm, lambda value: torch.randn(value.shape, dtype=torch.float64, device="cpu"))
    probe.training = False
    return probe


def width_of_norm(norm: nn.Module) -> int | None:
    """Width of the dimension that a norm is over; None where it does not say."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 1:
        return weight.shape[0]
    shape = getattr(norm, "normalized_shape", None)
    return shape[-1] if isinstance(shape, tuple) and shape else None


def discover(base: nn.Module) -> list[Site]:
    """The sites of a base model, in the order in which its modules were made.

    Args:
        base: on any device, "meta" too.
    """
    hidden = getattr(getattr(base, "config", None), "hidden_size", None)
    modules = base.named_modules(remove_duplicate=False)
    return [_site(name, module, hidden) for name, module in modules if is_norm(module)]


def _site(name: str, norm: nn.Module, hidden: int | None) -> Site:
    width, last = width_of_norm(norm), name.rpartition(".")[2]
    if last.startswith(("q_", "k_", "query_", "key_")) and "norm" in last:
        kind = QK
    elif "embed" in name:
        kind = EMBEDDING
    else:
        kind = STREAM if width in (hidden, None) else LATENT
    formula = None if isinstance(norm, NormBase) else identify(norm)
    problem = formula if isinstance(formula, str) else None
    return Site(name, kind, width, formula if isinstance(formula, Formula) else None, problem)


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
