"""The distance of a converted model from its source on some text: as a whole, and norm by norm."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.text import Text
from ..sites import contract
from ..swap.patching import norm_sites


@dataclass(frozen=True)
class SiteCost:
    """The cost of a conversion at one norm."""

    # Squared difference between outputs of the source and of the model, each on its own hidden states, as a fraction of
    # the variance of the source's output; None where that is 0.
    error: float | None
    # Standard deviation over the features, before gain and bias: 1 for an IBNorm, a little below 1 for an RMSNorm.
    row_std: float  # mean over the tokens
    least_row_std: float  # of the token where it is smallest


@dataclass(frozen=True)
class Cost:
    """The cost of a conversion."""

    bits_per_byte: float  # of the text, without each row's first token
    kl: float  # Kullback-Leibler divergence of the next-token distribution from the source's, nats, mean over tokens
    top1: float  # share of the tokens at which both models have the same most likely token
    sites: dict[str, SiteCost]


@contextmanager
def _watched(model: PreTrainedModel) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Site → (output of its norm, (T, N); standard deviation of each token before gain and bias), for the last row."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(site: str, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[site] = output[0], contract(norm).core(args[0])[0].std(-1, correction=0)

    with ExitStack() as hooks:
        for site, norm in norm_sites(model.base_model).items():
            hooks.enter_context(norm.register_forward_hook(partial(note, site)))
        yield seen


@torch.no_grad()
def measure(source: PreTrainedModel, model: PreTrainedModel, text: Text) -> Cost:
    """Compare a model, which may be the source itself, with its source: both in eval mode and on one device.

    ValueError where the model gives numbers that are not finite.
    """
    nll, kl, same, count = 0.0, 0.0, 0, 0
    sums: dict[str, Tensor] = {}
    stds: dict[str, list[Tensor]] = {}
    with _watched(source) as old, nullcontext(old) if model is source else _watched(model) as new:
        for row in text.ids.to(model.device)[:, None]:
            expected = source(input_ids=row, use_cache=False).logits[0, :-1].float()
            logits = expected if model is source else model(input_ids=row, use_cache=False).logits[0, :-1].float()
            p, q = expected.log_softmax(-1), logits.log_softmax(-1)
            nll -= q.gather(1, row[0, 1:, None]).double().sum().item()
            kl += (p.exp() * (p - q)).sum(-1).double().sum().item()
            same += int((expected.argmax(-1) == logits.argmax(-1)).sum())
            count += len(q)
            for site, (output, std) in new.items():
                y, difference = old[site][0].double(), (output - old[site][0]).double()
                of_row = torch.stack([difference.square().sum(0), y.sum(0), y.square().sum(0)])
                sums[site] = sums[site] + of_row if site in sums else of_row
                stds.setdefault(site, []).append(std)
    if not math.isfinite(nll) or not math.isfinite(kl):
        raise ValueError("it gives numbers that are not finite")
    sites = {}
    for site, (error, y, yy) in sums.items():
        variance, of_rows = float((yy - y * y / text.ids.numel()).sum()), torch.cat(stds[site])
        share = float(error.sum()) / variance if variance else None
        sites[site] = SiteCost(share, float(of_rows.mean()), float(of_rows.min()))
    return Cost(nll / math.log(2) / text.bytes, kl / count, same / count, sites)
