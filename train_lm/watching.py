"""What goes into and comes out of the norms at some steps of a training: `norms.jsonl`, and curves for the trackers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from hf_ibnorm.analysis import ModelStatistics, watch

from .settings import TrainConfig

_LEFT_OUT = ("reasons", "edges", "counts", "below", "above")
_CURVES = ("skewness", "excess_kurtosis", "near_zero", "massive")
"""Of what comes out, for the trackers."""
_OF_A_KIND = ("contraction", "saturation", "slope")


@contextmanager
def watched(model: PreTrainedModel, step: int, config: TrainConfig) -> Iterator[ModelStatistics | None]:
    """Around the forward passes of `step`: yields the statistics that they fill, None where it is not to be watched.

    Names of sites are relative to the base model, as in `norm_overrides`. The effective rank is left out: its matrices
    would have to be sent and decomposed.
    """
    every = config.watch_norms
    if not every or (step % every and step not in (1, config.max_steps)):
        yield None
        return
    with watch(model.base_model, ModelStatistics(model.base_model, rank_width=0)) as statistics:
        yield statistics


def read(statistics: ModelStatistics, accelerator: Accelerator) -> dict[str, Any]:
    """Site → its cells in `norms.jsonl`, over the rows of all processes. Waits for the device.

    Every process must call this; the first one gets the cells, the others nothing.
    """
    if accelerator.num_processes > 1:
        for site in statistics.sites.values():  # one by one: together they would take as much memory as a small model
            packed = site.packed()
            if packed is None:  # of a norm that did not run, on any process
                continue
            of_all = accelerator.gather(packed[None])
            if accelerator.is_main_process:
                for other in of_all[1:]:
                    site.merge(site.unpacked(other))
    if not accelerator.is_main_process:
        return {}
    return {name: _short(cells) for name, cells in statistics.result().items()}


def _short(cell: Any) -> Any:
    """A cell without what is long, empty or not finite, which JSON does not know; numbers to 6 digits."""
    if isinstance(cell, dict):
        short = {key: _short(each) for key, each in cell.items() if key not in _LEFT_OUT}
        return {key: each for key, each in short.items() if each is not None}
    if isinstance(cell, float):
        return float(f"{cell:.6g}") if math.isfinite(cell) else None
    return cell


def curves(sites: dict[str, Any]) -> dict[str, float]:
    """The few numbers of each site that trackers get, by name, from what `read` gives."""
    found: dict[str, float | None] = {}
    for site, cells in sites.items():
        after = cells.get("after", {})
        own = {name: cells.get(name) for name in _OF_A_KIND} | {"lam_hat": cells.get("lam_hat", {}).get("mean")}
        for name, value in {**{name: after.get(name) for name in _CURVES}, **own}.items():
            found[f"norms/{site}/{name}"] = value
    return {name: value for name, value in found.items() if value is not None}
