"""The YAML file of a study: the types of its fields, and the study that they describe."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.fields import (
    FILLED,
    FromTwo,
    NonNegativeInt,
    PositiveInt,
    PositiveNumber,
    Seed,
    check_filled,
    check_known,
    from_mapping,
)
from hf_ibnorm.base.reading import read_text, read_yaml, reading
from hf_ibnorm.checks import nearest
from hf_ibnorm.report.runs import NORM_SETTINGS, flat_settings

from ..options import OF_STUDIES
from .plan import STUDIES, VALIDATION, Arm, Search, Study, shipped_studies, slug

_STUDYS_OWN = ("run_dir", "resume", "seed", "learning_rate", "config", "check", "push_to_hub", *NORM_SETTINGS)


@dataclass
class _Norm:
    """An entry of `norms`."""

    norm: str
    name: str | None = None
    kwargs: dict = field(default_factory=dict)
    overrides: list = field(default_factory=list)
    set: dict = field(default_factory=dict)
    learning_rate_scale: PositiveNumber = 1.0
    sweep: dict[str, list] = field(default_factory=dict, metadata=FILLED)


@dataclass
class _Search:
    """An entry of `search`."""

    norm: str
    lam: tuple[PositiveNumber, PositiveNumber]
    trials: PositiveInt
    name: str | None = None
    kwargs: dict = field(default_factory=dict)
    reduction: FromTwo = Search.reduction


@dataclass
class _File:
    """The whole file; `Study` explains its fields."""

    recipe: str
    norms: list = field(metadata=FILLED)
    learning_rates: list[PositiveNumber] = field(metadata=FILLED)
    seeds: list[Seed] = field(metadata=FILLED)
    about: str = ""
    set: dict = field(default_factory=dict)
    conditions: dict[str, dict] = field(default_factory=lambda: {"": {}}, metadata=FILLED)
    baseline: str = ""
    tuning_seeds: list[Seed] = field(default_factory=list, metadata=FILLED)
    suites: list[str] = field(default_factory=list, metadata=FILLED)
    metric: str = VALIDATION
    scoring: dict[str, str | int | float | list] = field(default_factory=dict)
    threads: PositiveInt = 1
    launcher: list[str] = field(default_factory=list)
    gpus: NonNegativeInt = 0
    search: list = field(default_factory=list, metadata=FILLED)


def read_study(name: str) -> Study:
    """Read a study's file: a path, or the bare name of a shipped one.

    Raises:
        UserError: no such file, or it is wrong; the message names the field, the value and what is allowed.
    """
    shipped = shipped_studies()
    path = STUDIES / f"{name}.yaml" if name in shipped else Path(name)
    with reading("study", name[:100]):
        exists = path.is_file()
    if not exists:
        raise UserError(f"study: got {name!r}, no such file; shipped are {', '.join(shipped)}{nearest(name, shipped)}")
    content = read_yaml("study", path)
    with bad_input():
        return parse_study(path.stem, content, read_text("study", path), path.parent)


def parse_study(name: str, content: Any, source: str, folder: Path = Path()) -> Study:
    """The study that the content of a file describes.

    Args:
        name: of the study.
        content: of the file, as YAML gives it.
        source: the text of the file.
        folder: of the file; a recipe named by a relative path may lie there.

    Raises:
        ValueError, TypeError: naming the field, the value and what is allowed.
    """
    file = from_mapping(_File, "study", content)
    arms = tuple(arm for i, entry in enumerate(file.norms) for arm in _arms(f"norms[{i}]", entry))
    searches = tuple(_search(f"search[{i}]", entry) for i, entry in enumerate(file.search))
    file.tuning_seeds = file.tuning_seeds or file.seeds[:1]
    _check_names(file, [arm.name for arm in arms], [search.name for search in searches])
    if searches and (shared := sorted({*file.seeds} & {*file.tuning_seeds})):
        raise ValueError(f"seeds: got {shared[0]}, which is one of tuning_seeds; a search is confirmed on fresh seeds")
    if searches and "" not in file.conditions:
        raise ValueError("search: cannot go with conditions; give each condition a study of its own")
    if file.metric != VALIDATION and not file.suites:
        raise ValueError(f"metric: got {file.metric!r}, but there are no suites; name one, or {VALIDATION}")
    check_known("scoring", file.scoring, list(OF_STUDIES))
    for flag, value in file.scoring.items():
        check_filled(f"scoring.{flag}", value)
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in vars(file).items()}
    del fields["norms"], fields["set"], fields["search"]
    fields |= {
        "about": " ".join(file.about.split()),
        "recipe": str(folder / file.recipe) if (folder / file.recipe).is_file() else file.recipe,
        "settings": _settings("set", file.set),
        "conditions": {key: _settings(f"conditions.{key}", value) for key, value in file.conditions.items()},
    }
    return Study(name=name, source=source, arms=arms, searches=searches, **fields)


def _check_names(file: _File, arms: list[str], searches: list[str]) -> None:
    """Raise ValueError where two entries would share a folder, or the baseline is none of the arms."""
    names = [*arms, *searches]
    for where, named in (("norms", names), ("conditions", list(file.conditions))):
        for name in _repeated(named, slug):
            raise ValueError(f"{where}: {name!r} is there more than once, or too like another name")
    listed: dict[str, list[Any]] = {
        "learning_rates": [f"{rate:g}" for rate in file.learning_rates],
        "seeds": file.seeds,
        "tuning_seeds": file.tuning_seeds,
        "suites": file.suites,
    }
    for where, values in listed.items():
        for value in _repeated(values):
            raise ValueError(f"{where}: got {value} more than once")
    if file.baseline and file.baseline not in arms:
        allowed = f"{', '.join(arms)}{nearest(file.baseline, names)}"
        raise ValueError(f"baseline: got {file.baseline!r}, must be one of norms: {allowed}")


def _arms(where: str, content: Any) -> list[Arm]:
    """The arms of one entry of `norms`: one, or one for each combination of its `sweep`."""
    from hf_ibnorm.norms import norm_name

    content = {"norm": content} if isinstance(content, str) else content
    entry = from_mapping(_Norm, where, content, f"{where}.")
    norm = norm_name(entry.norm, f"{where}.norm")
    shown = entry.kwargs if entry.name is None and not entry.sweep else {}
    settings = _settings(f"{where}.set", entry.set) or None
    arm = Arm(entry.name or norm, norm, {}, tuple(entry.overrides), settings, entry.learning_rate_scale)
    arms = []
    for values in itertools.product(*entry.sweep.values()):
        swept = dict(zip(entry.sweep, values, strict=True))
        options = (shown | swept).items()
        texts = [
            f"{option}={value:g}" if isinstance(value, float) else f"{option}={value}" for option, value in options
        ]
        kwargs = _resolved(norm, {**entry.kwargs, **swept}, f"{where}.kwargs")
        arms.append(replace(arm, name=" ".join([arm.name, *texts]), kwargs=kwargs))
    return arms


def _search(where: str, content: Any) -> Search:
    from hf_ibnorm.norms import norm_name

    entry = from_mapping(_Search, where, content, f"{where}.")
    norm = norm_name(entry.norm, f"{where}.norm")
    if entry.lam[0] >= entry.lam[1]:
        raise ValueError(f"{where}.lam: got {content['lam']!r}, must be the least λ and the greatest")
    for lam in entry.lam:
        _resolved(norm, {**entry.kwargs, "lam": lam}, f"{where}.kwargs")
    return Search(entry.name or f"{norm} searched", norm, entry.kwargs, entry.lam, entry.trials, entry.reduction)


def _resolved(norm: str, kwargs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Every option with its value, so that a study means the same after a default has changed."""
    from hf_ibnorm.norms import resolve_norm_kwargs

    options = resolve_norm_kwargs(norm, kwargs, field=where)
    return {name: value for name, value in options.items() if value is not None and (name != "eps" or name in kwargs)}


def _settings(where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recipe on one level; those of the model as `model.name`."""
    flat = flat_settings(fields) if isinstance(fields.get("model"), dict) else dict(fields)
    for name, value in flat.items():
        if name in _STUDYS_OWN:
            raise ValueError(f"{where}: got {name!r}, which is the study's own; allowed are the recipe's other fields")
        if not isinstance(value, str | int | float | list | dict | None):
            raise TypeError(f"{where}.{name}: got a {type(value).__name__}; put it in quotes to make it text")
    return flat


def _repeated(values: Sequence[Any], folder: Callable[[Any], str] = str) -> list[Any]:
    """The values that share their folder with another one."""
    count = Counter(map(folder, values))
    return [value for value in values if count[folder(value)] > 1]
