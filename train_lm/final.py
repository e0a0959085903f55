"""Whether `final`, the model that a training leaves, is still the model that was saved."""

import fnmatch
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_ibnorm.base.manifest import MANIFEST, damage

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def among(name: str, globs: tuple[str, ...]) -> bool:
    """Whether one of `globs` matches the name of a file."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def flaw(final: Path) -> str | None:
    """Why a model's folder cannot be loaded, or is not as its training saved it; None where all is well.

    An earlier release left no manifest: then each file is only checked for its form. OSError where one cannot be read.
    """
    if not final.is_dir():
        return "is no folder"
    names = {path.name for path in final.iterdir()}
    weights = sorted(name for name in names if among(name, WEIGHTS[:1]))
    if not weights:
        pickles = sorted(name for name in names if among(name, PICKLES))
        instead = f"the pickle{'s' * (len(pickles) > 1)} {', '.join(pickles)}" if pickles else "no weights"
        return f"has {instead}, must have safetensors: save it with save_pretrained"
    needed = {"config.json"}
    for index in final.glob(WEIGHTS[1]):
        try:
            needed |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"has a damaged {index.name}: {error}"
    if missing := sorted(needed - names):
        return f"has no {', '.join(missing)}"
    if MANIFEST in names and (problem := damage(final)):
        return f"is not as it was saved: {problem}; if it was changed on purpose, remove its {MANIFEST}"
    for name in weights:
        try:
            with safe_open(final / name, framework="pt"):  # checks that header and size agree
                pass
        except SafetensorError as error:
            return f"has a damaged {name}: {error}"
    try:
        readable = isinstance(json.loads((final / "config.json").read_text(encoding="utf-8")), dict)
    except ValueError:
        readable = False
    return None if readable else "has a damaged config.json"
