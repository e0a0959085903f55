"""The verb `sites` of the `hf-ibnorm` command."""

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..base.command import quiet_libraries
from ..base.errors import UserError
from ..base.reading import told
from .families import named_class
from .loading import find_model, load


def _sites(arguments: argparse.Namespace) -> None:
    from ..report.tables import Table
    from .patching import describe_sites
    from .target import NUMBER

    quiet_libraries()
    model = _on_meta(arguments.model)
    sites = describe_sites(model)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(site) for site in sites], indent=2))
        return
    groups = Counter(dataclasses.replace(site, name=NUMBER.sub("*", site.name)) for site in sites)
    columns = ["site", "kind", "area", "computes", "gain", "norms", "width", "eps", "stays because"]
    rows = []
    for site, count in groups.items():
        cells = (site.name, site.kind, site.area, site.computes, site.gain, count, site.width, site.eps, site.problem)
        rows.append(["" if cell is None else f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in cells])
    print(f"{type(model).__name__}: {len(sites)} norms")
    Table(columns, rows, text=5).print()


def _on_meta(name: str) -> Any:
    """The model at a directory or on the Hub, without its weights; of a model type, one of its default size."""
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if name in CONFIG_MAPPING_NAMES and not Path(name).exists():
        config = AutoConfig.for_model(name)
    else:
        config = load("model", AutoConfig, find_model(name))
    architecture = next(iter(config.architectures or []), None)
    try:
        with torch.device("meta"):
            return AutoModel.from_config(config) if architecture is None else named_class(architecture)(config)
    except Exception as error:  # of many kinds: an architecture of the checkpoint's own, sizes that do not fit
        raise UserError(f"model: got {name!r}, which cannot be built: {told(error)}") from error


def add_verb(verbs: Any) -> None:
    """Add it to the command's parser."""
    parser = verbs.add_parser(
        "sites",
        help="the norms of a model: where they are, what they compute, which can be swapped",
        description="List the norms of any model of Transformers. Its weights are not read. A norm is identified by "
        "what it computes; the last column says why a norm cannot be swapped.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory, name on the Hub, or a model type such as qwen3")
    parser.add_argument("--json", action="store_true", help="print JSON, an entry each (default: a table of groups)")
    parser.set_defaults(go=_sites)
