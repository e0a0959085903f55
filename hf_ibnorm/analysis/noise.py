"""Noise robustness ζ: how much of a disturbance at one norm's output is left at the output of a later one."""

import functools
import math
import operator
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checks import check_number
from ..report.tables import Table
from .places import chosen_norms, evaluating


@dataclass(frozen=True)
class NoiseRobustness:
    """ζ of every pair of sites.

    Args:
        delta: δ, strength of the noise.
        draws: T, how often it was drawn.
        sites: names, in order of execution.
        zeta: S × S for S sites, a row where the noise was added, a column where it was measured; a fraction. None
            unless the column's site comes after the row's, and where the undisturbed output is 0 everywhere, or
            one of the outputs is not finite.
        spread: standard deviation of ζ over the draws; None where ζ is, and for a single draw.
    """

    delta: float
    draws: int
    sites: tuple[str, ...]
    zeta: tuple[tuple[float | None, ...], ...]
    spread: tuple[tuple[float | None, ...], ...]

    def table(self) -> Table:
        """ζ as a table, a row for each site that noise was added at."""
        rows = [
            [site, *("" if value is None else f"{value:.4f}" for value in values)]
            for site, values in zip(self.sites, self.zeta, strict=True)
        ]
        return Table(["noise at", *self.sites], rows)


def noise_robustness(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    delta: float,
    draws: int = 6,
    sites: str | Collection[str] | None = None,
    seed: int = 0,
) -> NoiseRobustness:
    """ζ between the norms of a language model, after Definition 5.1 of arXiv 2505.00685; formula in `relative_change`.

    In a transformer a norm feeds a branch beside the residual stream: noise is added to what the branch reads, and
    the stream carries the undisturbed values past it. Noise of a norm's own is off, because the model is in eval mode.

    Takes draws·(S - 1) + 1 forward passes of all `ids`, and memory for the outputs of all S sites.

    Args:
        model: as `known_norms` takes it; put in eval mode meanwhile.
        ids: tokens, int64 of shape (rows, length).
        delta: δ ≥ 0.
        draws: T ≥ 1.
        sites: globs (fnmatch) over names relative to the base model; None for all. At least two sites.
        seed: of the noise. Models of the same width and sites get the same noise on the same number of tokens.

    Raises:
        TypeError: an argument that is no number.
        ValueError: a glob that matches no site, fewer than two sites, a norm that runs more than once, or a value out
            of range.
    """
    base: Any = model.base_model
    chosen, run = chosen_norms(model, sites), functools.partial(base, input_ids=ids.to(base.device), use_cache=False)
    with evaluating(model):
        return relative_change(run, chosen, delta=delta, draws=draws, seed=seed)


@torch.no_grad()
def relative_change(
    run: Callable[[], Any], sites: Mapping[str, nn.Module], *, delta: float, draws: int, seed: int = 0
) -> NoiseRobustness:
    """How much noise at site k changes the output of each later site ℓ::

        h'_k = h_k + δ·s·n,  s = mean|h_k - mean(h_k)| of each row (over the last dimension),  n ~ N(0, 1)
        ζ(k→ℓ) = E‖h'_ℓ - h_ℓ‖₁ / E‖h_ℓ‖₁

    with both means over all rows, so that rows count by their size, and ζ itself averaged over the draws.

    Args:
        run: a forward pass; must do the same each time.
        sites: modules that `run` calls once each, in this order, and that return tensors of shape (..., N).
        delta: δ ≥ 0.
        draws: T ≥ 1.
        seed: the normals n at a site are `torch.randn(h_k.shape)`, one after the other, of a CPU generator with this
            seed, in float32: those of a site do not depend on what other sites there are.

    Raises:
        TypeError, ValueError: fewer than two sites, one module at two of them or run more than once, or a value out of
            range.
    """
    check_number("delta", delta, 0.0)
    check_number("draws", draws, 1)
    draws = operator.index(draws)
    if len(set(sites.values())) < max(2, len(sites)):
        raise ValueError(f"sites: got {', '.join(sites) or 'none'}; must be two or more, each a module of its own")
    names = tuple(sites)
    clean: dict[str, Tensor] = {}

    def keep(site: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if site in clean:
                raise ValueError(f"sites: {site} runs more than once")
            clean[site] = output.detach()

        return hook

    with _hooked({sites[site]: keep(site) for site in names}):
        run()
    sizes = {site: clean[site].double().abs().sum().item() for site in names}
    zeta: list[tuple[float | None, ...]] = []
    spread: list[tuple[float | None, ...]] = []
    for i, noisy in enumerate(names):
        later = [site for site in names[i + 1 :] if 0 < sizes[site] < math.inf]
        changes: dict[str, list[float]] = {site: [] for site in later}

        def compare(site: str, changes: dict[str, list[float]] = changes) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
                changes[site].append((output.double() - clean[site].double()).abs().sum().item() / sizes[site])

            return hook

        h = clean[noisy] if clean[noisy].dtype == torch.float64 else clean[noisy].float()
        scale = delta * (h - h.mean(-1, keepdim=True)).abs().mean(-1, keepdim=True)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(draws if later else 0):
            noise = scale * torch.randn(h.shape, generator=generator).to(h)
            disturb = {sites[noisy]: lambda _module, _args, output, noise=noise: (output + noise).to(output.dtype)}
            with _hooked(disturb | {sites[site]: compare(site) for site in later}):
                run()
        finite = {site: each for site, each in changes.items() if all(map(math.isfinite, each))}
        found = [finite.get(site) for site in names]
        zeta.append(tuple(None if each is None else statistics.fmean(each) for each in found))
        spread.append(tuple(None if each is None or len(each) < 2 else statistics.stdev(each) for each in found))
    return NoiseRobustness(float(delta), draws, names, tuple(zeta), tuple(spread))


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """With forward hooks on modules."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
