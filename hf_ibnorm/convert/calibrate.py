"""Gains and biases fitted so that new norms give the outputs of the old norms on some text: least squares per channel.

Block after block two streams of hidden states go through the model side by side: one with the old norms, whose outputs
are the targets, and one with the new norms, each fitted as soon as it is reached, so that it also corrects errors of
the norms before it. The model is in memory once, whatever its depth, and every block runs a few times.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling_ibnorm import build_site, set_site
from ..norms import resolve_norm_kwargs
from ..sites import contract

BATCH = 4  # sequences at a time
_AFFINE = ("weight", "bias")
Errors = dict[str, dict[str, float | None]]
_Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]  # hidden states, and the other arguments of a block


@dataclass
class Sums:
    """Sums for least squares over pairs of z, a norm without gain and bias, and its target y: float64, per channel."""

    count: int
    z: Tensor
    y: Tensor
    zz: Tensor
    zy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> "Sums":
        """Of tensors of shape (..., N)."""
        count, totals = 0, torch.zeros((), dtype=torch.float64)
        for z, y in pairs:
            z, y = z.flatten(0, -2).double(), y.flatten(0, -2).double()
            totals = totals + torch.stack([product.sum(0) for product in (z, y, z * z, z * y, y * y)])
            count += len(z)
        return cls(count, *totals)

    def fit(self, gain: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
        """Gain and bias with the least squared error; a channel in which z is constant keeps `gain`."""
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
    """Fit the norms of `config`, the target's, to the norms of `model`, and put them in their place.

    `model` is the source in float32 and eval mode; `ids` are the tokens to fit on, int64 of shape (rows, length).

    Returns:
        Site.parameter → fitted values, float32; and site → error as a fraction of the variance of the old norm's
        output, with the old gains (`kept`) and with the new gains (`fitted`); None where the variance is 0.

    Raises:
        ValueError: the model gives numbers that are not finite.
    """
    base: Any = model.base_model
    pin, old_norm = config.norm_pin, getattr(model.config, "norm_at", lambda site: stock_norm(config))
    sites = [site for site in pin.names(config) if config.norm_at(site) != old_norm(site)]
    norms: dict[str, Any] = {site: build_site(config, site).eval() for site in sites}
    for site, norm in norms.items():
        affine = {name: value for name, value in base.get_submodule(site).named_parameters() if name in _AFFINE}
        norm.load_state_dict(affine, strict=False)
    calls = [_first_call(base, pin.blocks, rows) for rows in ids.split(BATCH)]
    teacher = student = [hidden for hidden, _, _ in calls]
    errors: Errors = {}
    for i, block in enumerate(base.get_submodule(pin.blocks)):
        in_block = [site for site in sites if site.startswith(f"{pin.blocks}.{i}.")]
        with _recorded({site: base.get_submodule(site) for site in in_block}) as targets:
            teacher = [_run(block, hidden, call) for hidden, call in zip(teacher, calls, strict=True)]
        for site in in_block:
            with _recorded({site: base.get_submodule(site)}, inputs=True) as inputs:
                for hidden, call in zip(student, calls, strict=True):
                    _run(block, hidden, call)
            if inputs[site]:  # without an encoder, cross-attention's norm is not called
                errors |= _fit(site, norms[site], inputs[site], targets[site])
            set_site(base, site, norms[site])
        student = [_run(block, hidden, call) for hidden, call in zip(student, calls, strict=True)]
    if pin.final in sites:
        errors |= _fit(pin.final, norms[pin.final], student, map(base.get_submodule(pin.final), teacher))
    values = [(f"{site}.{name}", value) for site in errors for name, value in norms[site].named_parameters()]
    return {name: value.detach() for name, value in values if name.rpartition(".")[2] in _AFFINE}, errors


def stock_norm(config: Any) -> tuple[str, dict[str, Any]]:
    """Name and options of the stock model's norm, for one of our configs, as `norm_at` gives them."""
    name = config.norm_pin.stock
    return name, resolve_norm_kwargs(name, None, getattr(config, config.norm_eps_field))


def _fit(site: str, norm: Any, inputs: Iterable[Tensor], targets: Iterable[Tensor]) -> Errors:
    """Give `norm` the gain and bias that fit best; returns the errors at its site, none for a norm without a gain."""
    if getattr(norm, "weight", None) is None:
        return {}
    sums = Sums.of((contract(norm).core(x), y) for x, y in zip(inputs, targets, strict=True))
    if not (sums.zz.isfinite() & sums.yy.isfinite()).all():
        raise ValueError(f"source: at {site} it gives numbers that are not finite")
    old_bias = getattr(norm, "bias", None)
    gain, bias = sums.fit(norm.weight, with_bias=old_bias is not None)
    kept = sums.error(norm.weight.double(), torch.zeros_like(gain) if old_bias is None else old_bias.double())
    norm.weight.copy_(gain)
    if old_bias is not None:
        old_bias.copy_(bias)
    return {site: {"kept": kept, "fitted": sums.error(gain, bias)}}


class _Reached(Exception):
    """The first block was called."""


def _first_call(base: Any, blocks: str, rows: Tensor) -> _Call:
    """The call of the first block on some rows; all blocks get the same other arguments."""
    calls: list[_Call] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        calls.append((hidden, args[1:], kwargs))
        raise _Reached

    first = base.get_submodule(blocks)[0]
    with first.register_forward_pre_hook(catch, with_kwargs=True), suppress(_Reached):
        base(input_ids=rows, use_cache=False)
    return calls[0]


def _run(block: nn.Module, hidden: Tensor, call: _Call) -> Tensor:
    out = block(hidden, *call[1], **call[2])
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


@contextmanager
def _recorded(norms: dict[str, nn.Module], inputs: bool = False) -> Iterator[dict[str, list[Tensor]]]:
    """Site → outputs of its norm, or inputs, one for each call inside the block."""
    record: dict[str, list[Tensor]] = {site: [] for site in norms}

    def note(site: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        record[site].append(args[0] if inputs else output)

    with ExitStack() as hooks:
        for site, norm in norms.items():
            hooks.enter_context(norm.register_forward_hook(partial(note, site)))
        yield record
