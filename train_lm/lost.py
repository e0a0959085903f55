"""What a checkpoint has and the model that starts from it does not: weights that training begins without."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig
from transformers.utils import cached_file

from hf_ibnorm.convert.checkpoint import lost_text
from hf_ibnorm.convert.weights import Shard, read_shards
from hf_ibnorm.families import Family
from hf_ibnorm.modeling_ibnorm import build_site


def norm_parameters(family: Family, where: str) -> dict[str, Tensor]:
    """The parameters of the norms that the checkpoint `where` has, by name within the base model, before training."""
    config: Any = AutoConfig.from_pretrained(where)
    if not isinstance(config, family.config):
        config = family.config.from_pretrained(where, norm_type=family.config.norm_site_table.stock)
    sites = config.norm_site_table.names(config)
    return {
        f"{site}.{name}": value.detach()
        for site in sites
        for name, value in build_site(config, site).named_parameters()
    }


def lost_message(where: str, names: Collection[str], initial: dict[str, Tensor]) -> str:
    """What is lost with the tensors `names` of the checkpoint `where`, in the words of a conversion.

    Args:
        where: directory or name of the checkpoint.
        names: what the model has no place for.
        initial: `norm_parameters`; a norm's parameter that is still as it began is no loss.

    Returns:
        A line; nothing where nothing is lost.
    """
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
    words = lost_text({"lost": lost}) if all(map(math.isfinite, lost.values())) else f"{len(lost)} tensors"
    some = [*sorted(lost)[:3], *["..."] * (len(lost) > 3)]
    return f"lost: {words}, for which the model has no place: {', '.join(some)}"


def _stored(where: str) -> dict[str, Shard]:
    """Name of a tensor → the file that has it; empty where there are no safetensors."""
    folder = Path(where) if Path(where).is_dir() else Path(str(cached_file(where, "config.json"))).parent
    try:
        return {name: shard for shard in read_shards(folder) for name in shard.tensors}
    except ValueError:
        return {}
