"""Gains and biases fitted so that new norms give the outputs of the old norms on some text: least squares per channel.

Block after block two streams of hidden states go through the model side by side: one with the old norms, whose outputs
are the targets, and one with the new norms, each fitted as soon as it is reached, so that it also corrects errors of
the norms before it. The model is in memory once, whatever its depth, and every block runs a few times.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling_ibnorm import build_site, qualified, set_site
from ..sites import blocks_of, contract

BATCH = 4  # sequences at a time
_AFFINE = ("weight", "bias")
Errors = dict[str, dict[str, float | None]]
_Others = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a block besides hidden states


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
def fit_norms(
    model: PreTrainedModel, config: Any, kinds: Mapping[str, str], ids: Tensor
) -> tuple[dict[str, Tensor], Errors]:
    """Fit the norms of `config`, the target's, to those of `model`, which they replace: float32, in eval mode.

    `kinds` are the sites to fit and their kinds, `ids` the tokens to fit on, int64 of shape (rows, length).

    Returns:
        Site.parameter → fitted values, float32; and site → error as a fraction of the variance of the old norm's
        output, with the old gains (`kept`) and with the new gains (`fitted`); None where the variance is 0.

    Raises:
        ValueError: the model gives numbers that are not finite, or its norms are not in and around one stack of blocks.
    """
    olds = {site: model.get_submodule(qualified(model, site)) for site in kinds}
    norms: dict[str, Any] = {site: build_site(config, site, old, kinds[site]).eval() for site, old in olds.items()}
    for site, norm in norms.items():
        affine = {name: value for name, value in olds[site].named_parameters() if name in _AFFINE}
        norm.load_state_dict(affine, strict=False)
    base: Any = model.base_model
    if base.main_input_name != "input_ids" or base.config.is_encoder_decoder:
        raise ValueError(f"init: got 'calibrate' for a {type(base).__name__}; it takes a text model without an encoder")
    name, blocks = blocks_of(base)
    inside = {site for site in kinds if site.startswith(f"{name}.")}
    outside = {site: old for site, old in olds.items() if site not in inside}
    batches = ids.split(BATCH)
    calls = [_calls(model, blocks, outside, rows) for rows in batches]
    errors: Errors = {}
    for site in [site for site in outside if all(site in each.before for each in calls)]:
        errors |= _fit(site, norms[site], *zip(*(each.before[site] for each in calls), strict=True))
        set_site(model, site, norms[site])
    teacher = [each.hidden for each in calls]
    student = [_calls(model, blocks, {}, rows).hidden for rows in batches] if errors else teacher
    for i, block in enumerate(blocks):
        in_block = [site for site in kinds if site.startswith(f"{name}.{i}.")]
        with _recorded({site: olds[site] for site in in_block}) as targets:
            teacher = [_run(block, hidden, each.others[i]) for hidden, each in zip(teacher, calls, strict=True)]
        for site in in_block:
            with _recorded({site: olds[site]}, inputs=True) as inputs:
                for hidden, each in zip(student, calls, strict=True):
                    _run(block, hidden, each.others[i])
            if inputs[site]:  # without an encoder, cross-attention's norm is not called
                errors |= _fit(site, norms[site], inputs[site], targets[site])
            set_site(model, site, norms[site])
        student = [_run(block, hidden, each.others[i]) for hidden, each in zip(student, calls, strict=True)]
    for site in [site for site in outside if site not in errors]:
        last = [each.after.get(site) for each in calls]
        if not all(x is not None and torch.equal(x, hidden) for x, hidden in zip(last, teacher, strict=True)):
            raise ValueError(f"init: got 'calibrate', but {site} does not follow the last block; name other sites")
        errors |= _fit(site, norms[site], student, map(olds[site], teacher))
    values = [(f"{site}.{name}", value) for site in errors for name, value in norms[site].named_parameters()]
    return {name: value.detach() for name, value in values if name.rpartition(".")[2] in _AFFINE}, errors


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


@dataclass
class _Calls:
    """What a model gives to its blocks, and to norms outside them, on some rows."""

    hidden: Tensor
    """Of the first block."""
    others: list[_Others]
    """The other arguments of each block."""
    before: dict[str, tuple[Tensor, Tensor]]
    """Input and output of each norm that is called before the first block."""
    after: dict[str, Tensor]
    """Input of each norm that is called after it."""


def _calls(model: PreTrainedModel, blocks: nn.ModuleList, outside: Mapping[str, nn.Module], rows: Tensor) -> _Calls:
    calls = _Calls(torch.empty(0), [], {}, {})

    def block_called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not calls.others:
            calls.hidden = hidden
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.others.append((args[1:], others))

    def norm_called(site: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if calls.others:
            calls.after[site] = args[0]
        else:
            calls.before[site] = args[0], output

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(block_called, with_kwargs=True))
        for site, norm in outside.items():
            hooks.enter_context(norm.register_forward_hook(partial(norm_called, site)))
        model.base_model(input_ids=rows, use_cache=False)
    return calls


def _run(block: nn.Module, hidden: Tensor, others: _Others) -> Tensor:
    out = block(hidden, *others[0], **others[1])
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
