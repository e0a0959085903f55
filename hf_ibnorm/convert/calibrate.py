"""Gains and biases fitted so that new norms give what the old ones gave on some text: least squares in each channel.

Block after block two streams of hidden states go through the model side by side: one with the old norms, whose outputs
are the targets, and one with the new norms, each fitted as soon as it is reached, so that a norm also makes up for what
those before it could not. The model is in memory once, whatever its depth, and every block runs a few times.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling_ibnorm import build_site, set_site
from ..norms import resolve_norm_kwargs
from ..sites import contract

BATCH = 4
"""Sequences at a time."""
Errors = dict[str, dict[str, float | None]]


@dataclass
class Sums:
    """What least squares needs of pairs (z, y), per channel, in float64: z a norm without gain and bias, y its aim."""

    count: int
    z: Tensor
    y: Tensor
    zz: Tensor
    zy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> "Sums":
        """Of tensors of shape (..., N)."""
        count, totals = 0, None
        for z, y in pairs:
            z, y = z.flatten(0, -2).double(), y.flatten(0, -2).double()
            new = torch.stack([each.sum(0) for each in (z, y, z * z, z * y, y * y)])
            totals = new if totals is None else totals + new
            count += len(z)
        assert totals is not None
        return cls(count, *totals)

    def fit(self, gain: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
        """Gain and bias with the least squared error; a channel in which z never moves keeps `gain`."""
        zero = torch.zeros_like(self.z)
        z, y = (self.z / self.count, self.y / self.count) if with_bias else (zero, zero)
        variance, covariance = self.zz / self.count - z * z, self.zy / self.count - z * y
        moves = variance > 1e-12 * (self.zz / self.count).clamp_min(1e-30)
        fitted = torch.where(moves, covariance / torch.where(moves, variance, 1.0), gain.double())
        return fitted, y - fitted * z

    def error(self, gain: Tensor, bias: Tensor) -> float | None:
        """Squared error of gain·z + bias over all channels, as a fraction of the target's variance, if any."""
        squares = gain * gain * self.zz + 2 * gain * bias * self.z + self.count * bias * bias
        squares += self.yy - 2 * gain * self.zy - 2 * bias * self.y
        variance = float((self.yy - self.y * self.y / self.count).sum())
        return float(squares.sum()) / variance if variance else None


@torch.no_grad()
def fit_norms(model: PreTrainedModel, config: Any, ids: Tensor) -> tuple[dict[str, Tensor], Errors]:
    """Fit the norms of `config` to those of `model`, whose norms are replaced on the way.

    Args:
        model: the source in eval mode, float32.
        config: that of the target, with the norm of every site.
        ids: what to fit on, int64 of shape (rows, length).

    Returns:
        Site.parameter → values, float32, for each that was fitted; and site → error as a fraction of the variance of
        the old norm's output, with the old gains (`kept`) and with the new ones (`fitted`); None where that is 0.

    Raises:
        ValueError: the model gives numbers that are not finite.
    """
    base: Any = model.base_model
    table = config.norm_pin
    sites = [site for site in table.names(config) if config.norm_at(site) != _old_norm(config, model, site)]
    news = {site: _like(base.get_submodule(site), build_site(config, site).eval()) for site in sites}
    calls = [_first_block(base, table.blocks, rows) for rows in ids.split(BATCH)]
    teacher = [hidden for hidden, _, _ in calls]
    student = list(teacher)
    found: dict[str, Tensor] = {}
    errors: Errors = {}

    def fit(site: str, inputs: list[Tensor], targets: list[Tensor]) -> None:
        norm = news[site]
        if getattr(norm, "weight", None) is None:
            return
        sums = Sums.of((contract(norm).core(x), y) for x, y in zip(inputs, targets, strict=True))
        if not (sums.zz.isfinite() & sums.yy.isfinite()).all():
            raise ValueError(f"source: at {site} it gives numbers that are not finite")
        own_bias = getattr(norm, "bias", None)
        gain, bias = sums.fit(norm.weight, with_bias=own_bias is not None)
        kept = torch.zeros_like(norm.weight) if own_bias is None else own_bias
        errors[site] = {
            "kept": sums.error(norm.weight.double(), kept.double()),
            "fitted": sums.error(gain, bias),
        }
        norm.weight.copy_(gain)
        found[f"{site}.weight"] = norm.weight.detach()
        if own_bias is not None:
            own_bias.copy_(bias)
            found[f"{site}.bias"] = own_bias.detach()

    for i, block in enumerate(base.get_submodule(table.blocks)):
        here = [site for site in sites if site.startswith(f"{table.blocks}.{i}.")]
        with _outputs({site: base.get_submodule(site) for site in here}) as targets:
            teacher = [_run(block, hidden, call) for hidden, call in zip(teacher, calls, strict=True)]
        for site in here:
            with _outputs({site: base.get_submodule(site)}, inputs=True) as seen:
                for hidden, call in zip(student, calls, strict=True):
                    _run(block, hidden, call)
            if seen[site]:  # cross-attention's is not called without an encoder
                fit(site, seen[site], targets[site])
            set_site(base, site, news[site])
        student = [_run(block, hidden, call) for hidden, call in zip(student, calls, strict=True)]
    if table.final in sites:
        fit(table.final, student, [base.get_submodule(table.final)(hidden) for hidden in teacher])
    return found, errors


def stock_norm(config: Any) -> tuple[str, dict[str, Any]]:
    """Name and options of the norm that the stock model of one of our configs has, as `norm_at` gives them."""
    name = config.norm_pin.stock
    return name, resolve_norm_kwargs(name, None, getattr(config, config.norm_eps_field))


def _old_norm(config: Any, model: PreTrainedModel, site: str) -> tuple[str, dict[str, Any]]:
    """Name and options of the norm that `model` has at `site`, in the terms of `config`."""
    old: Any = model.config
    found: tuple[str, dict[str, Any]] = old.norm_at(site) if hasattr(old, "norm_at") else stock_norm(config)
    return found


def _like(old: nn.Module, new: Any) -> Any:
    """`new` with the gain and bias of `old`, where both have them."""
    for name in ("weight", "bias"):
        if getattr(old, name, None) is not None and getattr(new, name, None) is not None:
            getattr(new, name).copy_(getattr(old, name))
    return new


class _Reached(Exception):
    """The first block was called."""


def _first_block(base: Any, blocks: str, rows: Tensor) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """With what the first block is called: hidden states, and the arguments that all blocks get beside them."""
    caught: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        caught.append((hidden, args[1:], kwargs))
        raise _Reached

    handle = base.get_submodule(blocks)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        base(input_ids=rows, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


def _run(block: nn.Module, hidden: Tensor, call: tuple[Tensor, tuple[Any, ...], dict[str, Any]]) -> Tensor:
    out = block(hidden, *call[1], **call[2])
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


@contextmanager
def _outputs(norms: dict[str, nn.Module], inputs: bool = False) -> Iterator[dict[str, list[Tensor]]]:
    """What each norm gives, or gets, at every call inside the block."""
    seen: dict[str, list[Tensor]] = {site: [] for site in norms}

    def note(site: str) -> Any:
        return lambda _, args, out: seen[site].append(args[0] if inputs else out)

    handles = [norm.register_forward_hook(note(site)) for site, norm in norms.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
