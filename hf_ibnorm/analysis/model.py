"""Everything that the diagnostics measure, on one model."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..base.command import require_extra
from ..checks import MOST_TOKENS, check_choice, check_number
from ..sites import contract
from .noise import DELTA, noise_robustness
from .normality import lambda_against_likelihood, measure_normality, qq
from .places import batches, chosen_norms, evaluating
from .plane import information_plane
from .sites import ModelStatistics, watch

PARTS = ("normality", "noise", "information")
"""What can be left out; the statistics of the sites cannot."""
PLACES = ("before", "after")
"""A norm: what goes in, what comes out."""
_MOST = {"rows": 1_000_000, "draws": 1000, "noise_tokens": MOST_TOKENS, "samples": 100_000}
"""What takes days beyond: every draw is a forward pass for each site, and samples take memory and time as n²."""
QQ_CHANNELS, QQ_POINTS = 4, 51
"""Channels of a site whose Q-Q data are kept, and points of each."""


@dataclass(frozen=True)
class Measuring:
    """How the diagnostics are taken.

    Args:
        sites: globs (fnmatch) over the names of norms relative to the base model; None for all.
        skip: parts to leave out, of "normality", "noise" and "information".
        rows: rows that the tests of normality see, at most; a sample of all.
        delta: δ of the noise, in mean absolute deviations; LayerNormalNorm trains with 1.
        draws: T, how often the noise is drawn.
        noise_tokens: tokens that it is measured on, about; all if there are fewer.
        samples: positions that the information plane is estimated from, at most.
        beta: β of the IB value.
        seed: of samples, noise and positions.
    """

    sites: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    rows: int = 1000
    delta: float = DELTA
    draws: int = 6
    noise_tokens: int = 2048
    samples: int = 2000
    beta: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))

    def check(self) -> None:
        """Raise ValueError or TypeError, naming the field, for a value that is not allowed."""
        for part in self.skip:
            check_choice("skip", part, PARTS)
        for name, most in _MOST.items():
            check_number(name, getattr(self, name), 1, most)
            if getattr(self, name) != int(getattr(self, name)):
                raise ValueError(f"{name}: got {getattr(self, name)}, must be a whole number")
        for name in ("delta", "beta"):
            check_number(name, getattr(self, name), 0.0)
        check_number("seed", self.seed, 0, 2**31)


def analyze_model(
    model: PreTrainedModel, ids: Tensor, measuring: Measuring | None = None, scale_ids: Tensor | None = None
) -> dict[str, Any]:
    """Look at every norm of a causal language model while it reads a text.

    Args:
        model: as `known_norms` takes it; put in eval mode meanwhile, so that no norm adds noise.
        ids: tokens, int64 of shape (rows, length).
        measuring: what is taken, and how; by default everything, at every norm.
        scale_ids: tokens of the training set, as `ids`, for the scale of the noise; None for those of `ids` that the
            noise is measured on.

    Returns:
        * `loss` in nats a token
        * `sites`: site → what `SiteStatistics.result` says
        * `normality`: site → `before` (what goes in) and `after` (what comes out, without gain and bias), each what
          `measure_normality` says with `qq`, the Q-Q data of a few channels
        * `likelihood`: site with a norm of a `newton` step → what `lambda_against_likelihood` says
        * `noise`: the fields of `NoiseRobustness`
        * `plane`: those of `PlanePoint`, a point each
        * `reasons`: part that is None → why

    Raises:
        UserError: the extra `analysis` is not installed.
        ValueError, TypeError: an option, named, that is not allowed; or the model runs no known norm.
        FloatingPointError: the model gives numbers that are not finite.
    """
    measuring = measuring or Measuring()
    measuring.check()
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise ValueError(f"ids: got shape {tuple(ids.shape)}, must be (rows, length), length >= 2")
    if set(measuring.skip) < set(PARTS):
        require_extra("analysis", "scipy", "sklearn", "pingouin")
    norms = chosen_norms(model, measuring.sites)
    sample = 0 if "normality" in measuring.skip else min(measuring.rows, ids.numel())
    nll = 0.0
    made = ModelStatistics(model.base_model, sample=sample, sites=measuring.sites)
    with evaluating(model), torch.no_grad(), watch(model.base_model, made) as statistics:
        for rows in batches(ids):
            rows = rows.to(model.device)
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
            nll += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    if not math.isfinite(nll):
        raise FloatingPointError("model: it gives numbers that are not finite")
    found: dict[str, Any] = dict.fromkeys(("normality", "likelihood", "noise", "plane"))
    reasons = dict.fromkeys(measuring.skip, "left out")
    if "normality" not in measuring.skip:
        found["normality"], found["likelihood"] = {}, {}
        for site, norm in norms.items():
            each = statistics.sites[site]
            rows_of = {place: getattr(each, place).sample.rows() for place in PLACES}
            found["normality"][site] = {place: normality_of(kept, measuring.seed) for place, kept in rows_of.items()}
            if (newton := contract(norm).newton) is not None:
                found["likelihood"][site] = lambda_against_likelihood(rows_of["before"], **newton)
    if "noise" not in measuring.skip:
        some = _spread_out(ids, measuring.noise_tokens)
        options: dict[str, Any] = {name: getattr(measuring, name) for name in ("sites", "delta", "draws", "seed")}
        try:
            found["noise"] = asdict(noise_robustness(model, some, scale_ids=scale_ids, **options))
        except ValueError as error:  # one norm alone, or one that runs twice
            reasons["noise"] = str(error)
    if "information" not in measuring.skip:
        found["plane"] = [asdict(point) for point in information_plane(model, ids, **plane_options(measuring))]
    loss = nll / (ids.shape[0] * (ids.shape[1] - 1))
    return {"loss": loss, "sites": statistics.result(), **found, "reasons": reasons}


def plane_options(measuring: Measuring) -> dict[str, Any]:
    """Options of `information_plane`."""
    return {name: getattr(measuring, name) for name in ("sites", "samples", "beta", "seed")}


def normality_of(sample: Tensor, seed: int) -> dict[str, Any]:
    """What `measure_normality` says of rows of shape (R, N), and the Q-Q data of a few of its channels."""
    found = measure_normality(sample, seed=seed)
    channels = [] if found["r_squared"] is None else found["channels"]
    finite = sample[sample.isfinite().all(-1)].double().cpu().numpy()
    drawn = []
    for channel in (channels[i] for i in spaced(len(channels), QQ_CHANNELS)):
        values = finite[:, channel]
        drawn.append({"channel": channel, **qq((values - values.mean()) / values.std(), QQ_POINTS)})
    return {**found, "qq": drawn}


def _spread_out(ids: Tensor, tokens: int) -> Tensor:
    """Rows from all over the text, about so many tokens in all."""
    return ids[spaced(len(ids), max(1, tokens // ids.shape[1]))]


def spaced(count: int, most: int) -> list[int]:
    """Up to `most` of `count` indices, evenly spaced, both ends among them (of one only the first)."""
    indices: list[int] = np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()
    return indices
