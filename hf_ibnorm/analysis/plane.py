"""The information plane: how much a norm's output says of the token read, and of the token to come.

X is the token that the model reads at a position (its id), T a norm's output there, Y the next token of the text (its
id). X is one token and not all the context: a context occurs once, and then no estimator can say anything. T depends on
earlier tokens, too, so X, T and Y are no Markov chain, and I(T;Y) may be larger than I(X;T).

All values are in nats, and estimates of `information`, which states their limits.

Of the generalization bounds of arXiv 2510.25262, whose text was not at hand, the terms computed are I(X;T), I(T;Y) and
the IB value I(T;Y) - β·I(X;T). No bound is given: its other terms are not known here.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..base.room import check_room
from ..checks import check_number
from ..swap.loading import checkpoints_of, load
from .information import HALVES, KSG, RENYI, SHUFFLES, Draws, Estimate, draw, summary
from .places import chosen_norms, evaluating, hooked

ESTIMATORS = {"renyi": RENYI, "ksg": KSG}
ONCE = "the norm does not run once for each position"
"""Why there is no estimate: two sites share it, or it runs again."""


@dataclass(frozen=True)
class PlanePoint:
    """Where a site (by its name relative to the base model) is in the information plane.

    Args:
        step: of the checkpoint; None for a model that is no checkpoint.
        estimator: "renyi" or "ksg".
        input, output: I(X;T) and I(T;Y).
        ib: I(T;Y) - β·I(X;T), from the same samples.
    """

    step: int | None
    site: str
    estimator: str
    input: Estimate
    output: Estimate
    ib: Estimate
    beta: float


def information_plane(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    sites: str | Collection[str] | None = None,
    estimators: Sequence[str] = tuple(ESTIMATORS),
    samples: int = KSG.least,
    beta: float = 1.0,
    seed: int = 0,
    resamples: int = HALVES,
    shuffles: int = SHUFFLES,
    step: int | None = None,
) -> list[PlanePoint]:
    """I(X;T), I(T;Y) and the IB value of every site of a language model; X, T and Y as the module says.

    With the default options some three seconds a site on one core.

    Args:
        model: a causal language model, as `known_norms` takes it; put in eval mode meanwhile.
        ids: tokens, int64 of shape (rows, length).
        sites: globs (fnmatch) over names relative to the base model; None for all.
        estimators: of "renyi" and "ksg".
        samples: positions to draw from all of `ids`, at most, the same for every model. Not the first of a row, whose
            activations are like no others in trained models, nor the last, which has no next token. Takes memory for
            some 3·samples² numbers.
        beta: β ≥ 0.
        seed: of the positions, halves and shuffles.
        resamples, shuffles: as in `renyi_information`.
        step: goes into the points.

    Raises:
        TypeError, ValueError: a glob that matches no site, an unknown estimator, no number, or one out of range.
    """
    check_number("beta", beta, 0.0)
    if unknown := set(estimators) - set(ESTIMATORS):
        raise ValueError(f"estimators: got {', '.join(sorted(unknown))}, allowed are {', '.join(ESTIMATORS)}")
    x, y, outputs = _collected(model, ids, sites, samples, seed)
    points = []
    for site, t in outputs.items():
        for name in estimators:
            read, to_come = (
                ONCE if t is None else draw(ESTIMATORS[name], t, labels, seed, resamples, shuffles) for labels in (x, y)
            )
            if isinstance(read, str) or isinstance(to_come, str):
                ib: Draws | str = read if isinstance(read, str) else to_come
            else:  # both were drawn from the same halves
                ib = to_come[0] - beta * read[0], to_come[1] - beta * read[1]
            x_t, t_y, value = (summary(each, len(x)) for each in (read, to_come, ib))
            points.append(PlanePoint(step, site, name, x_t, t_y, value, beta))
    return points


def run_information_plane(
    run: Path, ids: Tensor, *, steps: Collection[int] | None = None, **options: Any
) -> Iterator[PlanePoint]:
    """The information plane at every checkpoint that a training run left, in order of steps, one model at a time.

    Args:
        run: run directory of train_lm, with `checkpoints/step-N/model`.
        ids: tokens, int64 of shape (rows, length), made by the run's tokenizer.
        steps: of the checkpoints to take; None for all.
        **options: of `information_plane`.

    Raises:
        TypeError, ValueError: no checkpoint in `run`, or none of a step in `steps`; or as `information_plane`.
    """
    paths = checkpoints_of(run)
    if not paths:
        raise ValueError(f"run: got {str(run)!r}, which has no checkpoints/step-N/model")
    if missing := set(steps or ()) - set(paths):
        wanted, existing = (", ".join(map(str, sorted(each))) for each in (missing, paths))
        raise ValueError(f"steps: got {wanted}, of which there is no checkpoint; there are {existing}")
    for step in sorted(paths if steps is None else set(steps)):
        model = load("run", AutoModelForCausalLM, paths[step], dtype=torch.float32)
        yield from information_plane(model, ids, step=step, **options)


@torch.no_grad()
def _collected(
    model: PreTrainedModel, ids: Tensor, sites: str | Collection[str] | None, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray | None]]:
    """X and Y of shape (n,), and T of shape (n, d) for each site, at positions drawn from all of `ids`; T is None where
    a site has not one output for each position."""
    check_number("samples", samples, 1)
    rows, length = ids.shape
    places = max(0, length - 2)  # of a row
    drawn = torch.randperm(rows * places, generator=torch.Generator().manual_seed(seed))[: int(samples)].sort().values
    check_room("samples", len(drawn), 12 * len(drawn) ** 2, "for their distances")
    row_of, place_of = drawn // max(1, places), drawn % max(1, places) + 1
    base: Any = model.base_model
    norms = chosen_norms(model, sites)
    # One tensor for all rows: many small ones, made between forward passes, would leave holes that memory grows by.
    kept, filled = dict[str, Tensor](), dict.fromkeys(norms, 0)
    here = torch.empty(0, dtype=torch.int64)

    def keep(site: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        row = output.squeeze(0)
        if length not in row.shape[:-1]:
            return
        # Norms of queries and keys have heads beside the positions, or before them.
        row = row.movedim(row.shape.index(length), 0)[here.to(row.device)].flatten(1)
        if site not in kept:
            kept[site] = torch.empty(len(drawn), row.shape[1])
        start = filled[site]
        filled[site] += len(row)
        if filled[site] <= len(drawn):
            kept[site][start : filled[site]] = row.float()

    with hooked({norm: partial(keep, site) for site, norm in norms.items()}), evaluating(model):
        for i in row_of.unique().tolist():
            here = place_of[row_of == i]
            base(input_ids=ids[i : i + 1].to(base.device), use_cache=False)
    empty = torch.empty(0, 1)  # of a text so short that no position can be drawn
    outputs = {site: kept.get(site, empty).numpy() if filled[site] == len(drawn) else None for site in norms}
    x, y = (ids[row_of, place_of + step].cpu().numpy() for step in (0, 1))
    return x, y, outputs
