"""The verb `analyze` of the `hf-ibnorm` command."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ..base.command import quiet_libraries
from ..base.errors import UserError, bad_input

_OF_A_PART = {
    "normality": ("rows",),
    "noise": ("delta", "draws", "noise_tokens"),
    "information": ("samples", "beta", "checkpoints"),
}
"""Part that can be skipped → flags without effect then."""


def _analyze(arguments: argparse.Namespace) -> None:
    models: dict[str, str] = {}
    named = any(_is_named(word) for word in arguments.model)
    for word in arguments.model if named else ():
        name, _, path = word.partition("=")
        if not _is_named(word) or not path or name in models:
            raise UserError(f"model: got {word!r}, must be NAME=DIR like the others, each name once")
        models[name] = path

    from .model import Measuring
    from .show.tables import median_table
    from .survey import analyze

    quiet_libraries()
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    for part in given.get("skip", ()):
        for name in _OF_A_PART.get(part, ()):
            if name in given:
                unused = f"which nothing would use as {part} is skipped; leave it out"
                raise UserError(f"{name}: got {given[name]!r}, {unused}")
    wanted = {name: given[name] for name in Measuring.__dataclass_fields__ if name in given}
    wanted |= {name: tuple(wanted[name]) for name in ("sites", "skip") if name in wanted}
    options: dict[str, Any] = {name: given[name] for name in ("data", "tokens", "checkpoints") if name in given}
    options |= {"measuring": Measuring(**wanted), "say": partial(print, flush=True)}
    with bad_input(OSError):
        record = analyze(models or arguments.model, arguments.output, **options)
    median_table(record).print()
    print(f"report: {Path(arguments.output) / 'report.html'}")


def _is_named(word: str) -> bool:
    """Whether it is NAME=DIR; a path may have a = as well."""
    name, equals, _ = word.partition("=")
    return bool(equals and name) and "/" not in name and not Path(word).exists()


def add_verb(verbs: Any) -> None:
    """Add it to the command's parser."""
    parser = verbs.add_parser(
        "analyze",
        help="what the norms of models do to the representation",
        description="Measure every norm of causal language models while they read a text: moments, sparsity, rank, "
        "normality, robustness to noise, information; one page, pictures, CSV. Several models are shown together.",
    )
    add = parser.add_argument
    text = "model directories, names on the Hub, or runs of train_lm, whose checkpoints are measured, too"
    add("--model", nargs="+", required=True, metavar="[NAME=]DIR", help=text)
    add("--output", required=True, metavar="DIR", help="new directory for the report")
    text = "text to measure on: austen, sotu (their test splits) or a .txt, .jsonl or .parquet (default: sotu)"
    add("--data", metavar="FILE|CORPUS", help=text)
    add("--tokens", type=int, help="how much of it, about (default: 16384)")
    add("--sites", nargs="+", metavar="GLOB", help="only norms with such names, e.g. 'layers.0.*' (default: all)")
    add("--skip", nargs="+", metavar="PART", help="leave out normality, noise or information (default: none)")
    add("--rows", type=int, help="rows that tests of normality see, at most (default: 1000)")
    add("--delta", type=float, help="size of the noise, in mean absolute deviations of a unit (default: 0.5)")
    add("--draws", type=int, help="how often the noise is drawn (default: 6)")
    add("--noise_tokens", type=int, help="tokens that its effect is measured on, about (default: 2048)")
    text = "positions for the information plane, at most: memory grows as their square (default: 2000)"
    add("--samples", type=int, help=text)
    add("--beta", type=float, help="β of the IB value, I(T;Y) - β·I(X;T) (default: 1)")
    text = "checkpoints of a run for the information plane, at most, with the last (default: 5)"
    add("--checkpoints", type=int, help=text)
    add("--seed", type=int, help="of samples, noise and positions (default: 0)")
    parser.set_defaults(go=_analyze)
