"""How far a model is from the one it was made of, on some text: as a whole, and norm by norm."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.text import Text
from ..sites import contract
from ..swap.patching import norm_sites


@dataclass(frozen=True)
class SiteCost:
    """What became of one norm.

    Args:
        error: squared error of its output against the source's at the same place, each in its own model, as a fraction
            of the variance of the source's; None where that is 0.
        row_std: standard deviation over the features, before gain and bias, mean over the tokens. That of an RMSNorm
            is a little below 1, of an IBNorm 1.
        least_row_std: the same of the token where it is smallest.
    """

    error: float | None
    row_std: float
    least_row_std: float


@dataclass(frozen=True)
class Cost:
    """What became of a model.

    Args:
        bits_per_byte: of held-out text, each row's first token apart.
        kl: Kullback-Leibler divergence of its next-token distribution from the source's, in nats, mean over tokens.
        top1: share of the tokens at which both hold the same one most likely.
        sites: site → what became of it.
    """

    bits_per_byte: float
    kl: float
    top1: float
    sites: dict[str, SiteCost]


@dataclass
class _Seen:
    """Of one row of tokens, by site: what the norm gives, and how wide each token is without gain and bias."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    spreads: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[_Seen]:
    """Note what goes on at the norms of a model."""
    seen = _Seen()

    def note(site: str) -> Any:
        def hook(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.outputs[site] = output[0]
            seen.spreads[site] = contract(norm).core(args[0])[0].std(-1, correction=0)

        return hook

    handles = [norm.register_forward_hook(note(site)) for site, norm in norm_sites(model.base_model).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure(source: PreTrainedModel, model: PreTrainedModel, text: Text) -> Cost:
    """Compare a model with the one it was made of.

    Args:
        source: what it was made of; both in eval mode and on one device.
        model: the converted one, or the source itself.
        text: what to run both on.

    Raises:
        ValueError: the model gives numbers that are not finite.
    """
    nll, kl, same, count = 0.0, 0.0, 0, 0
    sums: dict[str, Tensor] = {}
    spreads: dict[str, list[Tensor]] = {}
    with _watched(source) as old, nullcontext(old) if model is source else _watched(model) as new:
        for row in text.ids.to(model.device)[:, None]:
            expected = source(input_ids=row, use_cache=False).logits[0, :-1].float()
            found = expected if model is source else model(input_ids=row, use_cache=False).logits[0, :-1].float()
            p, q = expected.log_softmax(-1), found.log_softmax(-1)
            nll -= q.gather(1, row[0, 1:, None]).double().sum().item()
            kl += (p.exp() * (p - q)).sum(-1).double().sum().item()
            same += int((expected.argmax(-1) == found.argmax(-1)).sum())
            count += len(q)
            for site in new.outputs:
                y, difference = old.outputs[site].double(), (new.outputs[site] - old.outputs[site]).double()
                here = torch.stack([difference.square().sum(0), y.sum(0), y.square().sum(0)])
                sums[site] = sums[site] + here if site in sums else here
                spreads.setdefault(site, []).append(new.spreads[site])
    if not math.isfinite(nll) or not math.isfinite(kl):
        raise ValueError("it gives numbers that are not finite")
    sites = {}
    for site, (error, y, yy) in sums.items():
        variance = float((yy - y * y / text.ids.numel()).sum())
        widths = torch.cat(spreads[site])
        share = float(error.sum()) / variance if variance else None
        sites[site] = SiteCost(share, float(widths.mean()), float(widths.min()))
    return Cost(nll / math.log(2) / text.bytes, kl / count, same / count, sites)
