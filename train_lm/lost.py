"""What a checkpoint has and the model that starts from it does not: weights that training begins without."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig
from transformers.utils import cached_file

from hf_ibnorm.convert.checkpoint import lost_text
from hf_ibnorm.convert.weights import Shard, read_shards
from hf_ibnorm.modeling_ibnorm import build_site
from hf_ibnorm.swap.families import Family
from hf_ibnorm.swap.loading import load


def norms_of(family: Family, where: str) -> dict[str, nn.Module]:
    """The norms that the checkpoint `where` has, by site, as they are before training."""
    config: Any = load("model.init_from", AutoConfig, where)
    if not isinstance(config, family.config):
        config = load("model.init_from", family.config, where, norm_type=family.pin.stock)
    return {site: build_site(config, site) for site in family.pin.names(config)}


def lost_message(where: str, names: Collection[str], norms: dict[str, nn.Module]) -> str:
    """What is lost with the tensors `names` of the checkpoint `where`, in the words of a conversion.

    Args:
        where: directory or name of the checkpoint.
        names: what the model has no place for.
        norms: what `norms_of` gives; a tensor of theirs that is still as it began is no loss.

    Returns:
        A line; nothing where nothing is lost.
    """
    initial = {f"{site}.{name}": value for site, norm in norms.items() for name, value in norm.state_dict().items()}
    places = _stored(where) if names else {}
    lost = {}
    for name in names:
        start = next((value for known, value in initial.items() if f".{name}".endswith(f".{known}")), None)
        if name not in places:  # in a file that only Transformers reads
            lost[name] = float("nan")
        elif moved := float((places[name].tensor(name).float() - (0.0 if start is None else start)).abs().max()):
            lost[name] = moved
    if not lost:
        return ""
    words = lost_text(lost) if all(map(math.isfinite, lost.values())) else f"{len(lost)} tensors"
    some = [*sorted(lost)[:3], *["..."] * (len(lost) > 3)]
    return f"lost: {words}, for which the model has no place: {', '.join(some)}"


def _stored(where: str) -> dict[str, Shard]:
    """Name of a tensor → the file that has it; empty where there are no safetensors."""
    folder = Path(where) if Path(where).is_dir() else Path(str(cached_file(where, "config.json"))).parent
    try:
        return {name: shard for shard in read_shards(folder) for name in shard.tensors}
    except ValueError:
        return {}
