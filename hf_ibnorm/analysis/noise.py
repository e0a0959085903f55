"""Noise robustness ζ: how much noise at one norm's values changes those of a later norm."""

import math
import operator
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checks import check_number
from ..report.tables import Table, number_cell
from ..sites import contract
from .places import batches, chosen_norms, evaluating, hooked

DELTA = 0.5
"""δ of the paper's Table 3."""
Grid = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class NoiseRobustness:
    """ζ of every pair of sites.

    Args:
        delta, draws: δ and T, as in `relative_change`.
        sites: names, in order of execution.
        zeta: S × S for S sites, a row where the noise was added, a column where it was measured; a fraction. None
            unless the column's site comes after the row's; also None where the undisturbed values are all 0, or one of
            the values is not finite.
        spread: standard deviation of ζ over the draws; None where ζ is, and for a single draw.
        scale_rows: number of rows that the scale of the noise was estimated from.
    """

    delta: float
    draws: int
    sites: tuple[str, ...]
    zeta: Grid
    spread: Grid
    scale_rows: int

    def table(self) -> Table:
        """ζ as a table, a row for each site that noise was added at."""
        lines = zip(self.sites, self.zeta, strict=True)
        rows = [[site, *(number_cell(value, ".4f", "") for value in values)] for site, values in lines]
        return Table(["noise at", *self.sites], rows)


def noise_robustness(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    delta: float = DELTA,
    draws: int = 6,
    sites: str | Collection[str] | None = None,
    seed: int = 0,
    scale_ids: Tensor | None = None,
) -> NoiseRobustness:
    """ζ between the norms of a language model, Definition 5.1 of arXiv 2505.00685; the formula is in `relative_change`.

    The definition's s_k is estimated over the whole training set: give tokens of it as `scale_ids`. In a transformer a
    norm feeds a branch beside the residual stream: noise is added to the branch's input, and the stream carries the
    undisturbed values past it. The norms' own training noise is off, because the model is in eval mode.

    Takes draws·(S - 1) + 1 forward passes of all `ids`, two of all `scale_ids`, and memory for the values of all S
    sites.

    Args:
        model: as `known_norms` takes it; put in eval mode meanwhile.
        ids: tokens, int64 of shape (rows, length).
        delta, draws: δ ≥ 0 and T ≥ 1, as in `relative_change`; 0.5 and 6 in the paper's Table 3.
        sites: globs (fnmatch) over names relative to the base model; None for all. At least two sites.
        seed: of the noise. Models of the same width and sites get the same noise on the same number of tokens.
        scale_ids: tokens that the scale of the noise is estimated on, as `ids`; None for `ids` themselves.

    Raises:
        TypeError, ValueError: a glob that matches no site, or as `relative_change`.
    """
    base: Any = model.base_model
    chosen = chosen_norms(model, sites)

    def run(rows: Tensor) -> None:
        base(input_ids=rows.to(base.device), use_cache=False)

    with evaluating(model):
        parts = [] if scale_ids is None else [partial(run, rows) for rows in batches(scale_ids)]
        scales = mean_deviations(parts, chosen) if parts else None
        return relative_change(partial(run, ids), chosen, delta=delta, draws=draws, seed=seed, scales=scales)


class Scale(NamedTuple):
    """Mean |z - mean z| of each unit of a norm, float64 of shape (N,), over so many rows of z."""

    deviation: Tensor
    rows: int


@torch.no_grad()
def mean_deviations(runs: Sequence[Callable[[], Any]], sites: Mapping[str, nn.Module]) -> dict[str, Scale]:
    """s_k of every unit of every site: its mean absolute deviation over all rows of all runs.

    Args:
        runs: forward passes; each is called twice, for the mean first.
        sites: norms as `contract` takes them; one that does not run is left out.
    """

    def mean_of_rows(function: Callable[[str, Tensor], Tensor]) -> dict[str, tuple[Tensor, int]]:
        sums: dict[str, tuple[Any, int]] = {}

        def add(site: str, norm: nn.Module, args: Any, _output: Tensor) -> None:
            rows = function(site, contract(norm).core(args[0]).flatten(0, -2).double())
            total, count = sums.get(site, (0, 0))
            sums[site] = total + rows.sum(0), count + len(rows)

        with hooked({norm: partial(add, site) for site, norm in sites.items()}):
            for run in runs:
                run()
        return {site: (total / count, count) for site, (total, count) in sums.items()}

    means = mean_of_rows(lambda _, rows: rows)
    deviations = mean_of_rows(lambda site, rows: (rows - means[site][0]).abs())
    return {site: Scale(*deviation) for site, deviation in deviations.items()}


@torch.no_grad()
def relative_change(
    run: Callable[[], Any],
    sites: Mapping[str, nn.Module],
    *,
    delta: float,
    draws: int,
    seed: int = 0,
    scales: Mapping[str, Scale] | None = None,
) -> NoiseRobustness:
    """How much noise at norm k changes the values of each later norm ℓ, Definition 5.1 of arXiv 2505.00685::

        z'_k = z_k + n·δ·s_k,  s_k = mean over rows of |z_k - mean(z_k)| for each unit,  n ~ N(0, 1)
        ζ(k→ℓ) = mean over rows of ‖z'_ℓ - z_ℓ‖₁ / ‖z_ℓ‖₁,  norms over the units of ℓ

    averaged over the draws. z is a norm's output before gain and bias: a gain that moves into the weights behind it
    changes no ζ. Noise is added at all units of k at once. Rows that are 0 everywhere at ℓ are left out.

    Args:
        run: a forward pass; must do the same each time.
        sites: norms as `contract` takes them, which `run` calls once each, in this order.
        delta: δ ≥ 0.
        draws: T ≥ 1.
        seed: the normals n at a site are `torch.randn(z_k.shape)`, one after the other, of a CPU generator with this
            seed, in float32: they do not depend on what other sites there are.
        scales: s_k as `mean_deviations` gives it, of the training set in the paper; None for s_k of this very run.

    Raises:
        TypeError, ValueError: fewer than two sites, one module at two sites or run more than once, a norm whose output
            is no gain times what it computes, or a value out of range.
    """
    check_number("delta", delta, 0.0)
    check_number("draws", draws, 1)
    draws = operator.index(draws)
    if len(set(sites.values())) < max(2, len(sites)):
        raise ValueError(f"sites: got {', '.join(sites) or 'none'}; must be two or more, each a module of its own")
    clean, gains, changes = dict[str, Tensor](), dict[str, Tensor | float](), dict[str, list[float]]()

    def keep(site: str, norm: nn.Module, args: Any, output: Tensor) -> None:
        if site in clean:
            raise ValueError(f"sites: {site} runs more than once")
        clean[site] = contract(norm).core(args[0])
        gains[site] = _gain(site, norm, clean[site], output)

    def disturb(noise: Tensor, _norm: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return (output + noise).to(output.dtype)

    def compare(site: str, norm: nn.Module, args: Any, _output: Tensor) -> None:
        change = (contract(norm).core(args[0]) - clean[site]).abs().sum(-1, dtype=torch.float64)
        changes[site].append((change / sizes[site])[sizes[site] > 0].mean().item())

    with hooked({norm: partial(keep, site) for site, norm in sites.items()}):
        run()
    names = tuple(site for site in sites if site in clean)  # cross-attention's does not run without an encoder
    if len(names) < 2:
        raise ValueError(f"sites: of {', '.join(sites)} fewer than two run")
    scales = mean_deviations([run], sites) if scales is None else scales
    sizes = {site: z.abs().sum(-1, dtype=torch.float64) for site, z in clean.items()}
    zeta: list[tuple[float | None, ...]] = []
    spread: list[tuple[float | None, ...]] = []
    for i, noisy in enumerate(names):
        later = [site for site in names[i + 1 :] if sizes[site].isfinite().all() and sizes[site].any()]
        changes = {site: [] for site in later}
        scale = delta * scales[noisy].deviation.to(clean[noisy])
        generator = torch.Generator().manual_seed(seed)
        for _ in range(draws if later else 0):
            noise = scale * torch.randn(clean[noisy].shape, generator=generator).to(scale)
            comparing = {sites[site]: partial(compare, site) for site in later}
            with hooked({sites[noisy]: partial(disturb, noise * gains[noisy]), **comparing}):
                run()
        known = [changes.get(site, ()) for site in names]
        known = [values if all(map(math.isfinite, values)) else () for values in known]
        zeta.append(tuple(statistics.fmean(values) if values else None for values in known))
        spread.append(tuple(statistics.stdev(values) if len(values) > 1 else None for values in known))
    return NoiseRobustness(float(delta), draws, names, tuple(zeta), tuple(spread), scales[names[0]].rows)


def _gain(site: str, norm: Any, z: Tensor, output: Tensor) -> Tensor | float:
    """The factor of `z` in a norm's output: its weight, or as in Gemma its weight plus 1; 1 without a weight.

    Raises:
        ValueError: neither makes that output, so noise on `z` cannot be turned into noise on the output.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    tolerance = 16 * torch.finfo(output.dtype).eps
    for gain in (1.0,) if weight is None else (weight.to(z), 1 + weight.to(z)):
        expected = z * gain if bias is None else z * gain + bias
        size = expected.abs().max() if expected.numel() else 0.0
        if not expected.isfinite().all() or bool((expected - output).abs().max() <= tolerance * (size + 1e-30)):
            return gain
    raise ValueError(f"sites: {site} is a {type(norm).__name__}, whose output is no gain times what it computes")
