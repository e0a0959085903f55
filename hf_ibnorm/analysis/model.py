"""Everything that the diagnostics measure, on one model."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..checks import MOST_TOKENS, check_choice, check_number
from ..sites import contract
from .noise import DELTA, noise_robustness
from .normality import lambda_against_likelihood, measure_normality, qq, require_analysis, spaced
from .places import batches, evaluating
from .plane import information_plane
from .sites import ModelStatistics, watch

PARTS = ("normality", "noise", "information")
"""Parts that can be left out; the statistics of the sites cannot."""
PLACES = ("before", "after")
"""The input of a norm, and its output before gain and bias."""
_MOST = {"rows": 1_000_000, "draws": 1000, "noise_tokens": MOST_TOKENS, "samples": 100_000}
"""More would take days: every draw is a forward pass for each site, and samples take memory and time as n²."""
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
        draws: T, number of draws of the noise.
        noise_tokens: tokens that the effect of the noise is measured on, about; all if there are fewer.
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
    """Measure every norm of a causal language model while it reads a text.

    Args:
        model: as `known_norms` takes it; put in eval mode meanwhile, so that no norm adds noise.
        ids: tokens, int64 of shape (rows, length).
        measuring: which parts are measured, and how; by default everything, at every norm.
        scale_ids: tokens of the training set, as `ids`, for the scale of the noise; None for the tokens of `ids` that
            its effect is measured on.

    Returns:
        * `loss` in nats a token
        * `sites`: site → its `SiteStatistics.result`
        * `normality`: site → `before` (the input) and `after` (the output before gain and bias), each a result of
          `measure_normality` with `qq`, the Q-Q data of a few channels
        * `likelihood`: site with a norm of a `newton` step → result of `lambda_against_likelihood`
        * `noise`: the fields of `NoiseRobustness`
        * `plane`: the fields of each `PlanePoint`
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
        require_analysis()
    sample = 0 if "normality" in measuring.skip else min(measuring.rows, ids.numel())
    nll = 0.0
    statistics = ModelStatistics(model.base_model, sample=sample, sites=measuring.sites)
    with evaluating(model), torch.no_grad(), watch(model.base_model, statistics):
        for rows in batches(ids):
            rows = rows.to(model.device)
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
            nll += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    if not math.isfinite(nll):
        raise FloatingPointError("model: it gives numbers that are not finite")
    parts: dict[str, Any] = dict.fromkeys(("normality", "likelihood", "noise", "plane"))
    reasons = dict.fromkeys(measuring.skip, "left out")
    if "normality" not in measuring.skip:
        parts["normality"], parts["likelihood"] = {}, {}
        for site, of_site in statistics.sites.items():
            ran = of_site.width is not None
            samples = {p: getattr(of_site, p).sample.rows() if ran else torch.empty(0, 0) for p in PLACES}
            parts["normality"][site] = {place: _normality(samples[place], measuring.seed) for place in PLACES}
            if (newton := contract(of_site.norm).newton) is not None:
                parts["likelihood"][site] = lambda_against_likelihood(samples["before"], **newton)
    if "noise" not in measuring.skip:
        some = ids[spaced(len(ids), max(1, measuring.noise_tokens // ids.shape[1]))]  # from all over the text
        options: dict[str, Any] = {name: getattr(measuring, name) for name in ("sites", "delta", "draws", "seed")}
        try:
            parts["noise"] = asdict(noise_robustness(model, some, scale_ids=scale_ids, **options))
        except ValueError as error:  # one norm alone, or one that runs twice
            reasons["noise"] = str(error)
    if "information" not in measuring.skip:
        parts["plane"] = list(map(asdict, information_plane(model, ids, **plane_options(measuring))))
    loss = nll / (ids.shape[0] * (ids.shape[1] - 1))
    return {"loss": loss, "sites": statistics.result(), **parts, "reasons": reasons}


def plane_options(measuring: Measuring) -> dict[str, Any]:
    """Options of `information_plane`."""
    return {name: getattr(measuring, name) for name in ("sites", "samples", "beta", "seed")}


def _normality(sample: Tensor, seed: int) -> dict[str, Any]:
    """`measure_normality` of finite rows of shape (R, N), with the Q-Q data of a few of the channels."""
    normality = measure_normality(sample, seed=seed)
    channels = [] if normality["r_squared"] is None else normality["channels"]
    normality["qq"] = []
    for channel in (channels[i] for i in spaced(len(channels), QQ_CHANNELS)):
        values = sample[:, channel].double().cpu().numpy()
        normality["qq"].append({"channel": channel, **qq((values - values.mean()) / values.std(), QQ_POINTS)})
    return normality
