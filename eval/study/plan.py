"""What a study is: its file, the norms that are compared, and the trainings ("cells") that follow from them."""

import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.reading import read_text, read_yaml, reading
from hf_ibnorm.checks import check_number, nearest

STUDIES = Path(__file__).parents[1] / "studies"
VALIDATION = "eval_loss"
"""The metric of a study that has no test set: the validation loss, on which the learning rate was chosen too."""


@dataclass(frozen=True)
class Arm:
    """One of the norms that a study compares.

    Args:
        name: what tables call it.
        norm: a norm's name.
        kwargs: its options, resolved, but for an epsilon that was not given: that is the model's.
        overrides: norms of single sites, as in the config's `norm_overrides`.
        settings: fields of the recipe that are different for this arm alone.
        learning_rate_scale: factor on every learning rate of the grid.
    """

    name: str
    norm: str
    kwargs: Mapping[str, Any]
    overrides: tuple[Any, ...] = ()
    settings: Mapping[str, Any] | None = None
    learning_rate_scale: float = 1.0

    def flags(self) -> dict[str, Any]:
        """Fields of the recipe that make a training one of this arm."""
        named = {
            "model.norm_type": self.norm,
            "model.norm_kwargs": dict(self.kwargs),
            "model.norm_overrides": list(self.overrides),
        }
        return {**named, **(self.settings or {})}

    @property
    def lam(self) -> float | None:
        """λ of an IBNorm."""
        return self.kwargs.get("lam")

    @property
    def family(self) -> str:
        """What arms share that differ in λ alone."""
        other = {**asdict(self), "name": "", "kwargs": {k: v for k, v in self.kwargs.items() if k != "lam"}}
        return yaml.safe_dump(other)


@dataclass(frozen=True)
class Search:
    """A search for λ by successive halving; its winner becomes an arm of the study.

    Args:
        name: of that arm.
        norm: the norm whose λ is searched.
        kwargs: its other options.
        lam: least and greatest λ; tried on a logarithmic scale.
        trials: trainings that are begun; each has its λ and one of the study's learning rates.
        reduction: of so many trainings that reach a validation, one goes on.
    """

    name: str
    norm: str
    kwargs: Mapping[str, Any]
    lam: tuple[float, float]
    trials: int
    reduction: int = 3


@dataclass(frozen=True)
class Cell:
    """One training: an arm with one learning rate and one seed, under one condition."""

    condition: str
    arm: str
    learning_rate: float
    seed: int

    @property
    def folder(self) -> Path:
        """Where it lies below the study's directory."""
        parts = [slug(each) for each in (self.condition, self.arm) if each]
        return Path("cells", *parts, f"lr={self.learning_rate:g}", f"seed={self.seed}")

    def __str__(self) -> str:
        where = f"{self.condition}, " if self.condition else ""
        return f"{where}{self.arm}, learning rate {self.learning_rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A study as its file describes it.

    Args:
        name: the file's.
        about: what it asks, in a sentence or two.
        recipe: of train_lm: a shipped one's name, or a path.
        settings: fields of the recipe that the study changes, for every training (`set` in the file).
        conditions: name → fields of the recipe; the whole comparison is made under each. One without a name if the
            file has none.
        arms: the norms (`norms` in the file).
        baseline: the arm that the others are compared with; "" until the recipe is known: then the model's stock norm.
        learning_rates: the grid that is tried for every arm.
        tuning_seeds: seeds with which it is tried; the mean of their validation losses decides.
        seeds: seeds with which every arm is trained at its best learning rate, and compared.
        suites: what the models of `seeds` are scored on, as `eval run --suite` takes it; a list.
        metric: the benchmark that gives the verdict; "eval_loss" for the validation loss.
        scoring: flags of `eval run`, such as batch_size.
        threads: of torch, in each training: with another number its sums are rounded otherwise.
        launcher: what starts a training instead of python, such as [accelerate, launch, --num_processes, "8"].
        gpus: GPUs that a training has to itself; 0: it sees all there are.
        searches: searches for λ.
        source: the file itself.
    """

    name: str
    about: str
    recipe: str
    settings: Mapping[str, Any]
    conditions: Mapping[str, Mapping[str, Any]]
    arms: tuple[Arm, ...]
    baseline: str
    learning_rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    suites: tuple[str, ...]
    metric: str
    scoring: Mapping[str, Any]
    threads: int
    launcher: tuple[str, ...]
    gpus: int
    searches: tuple[Search, ...]
    source: str

    def tuning_cells(self, condition: str, arm: Arm) -> list[Cell]:
        """The trainings that decide on an arm's learning rate."""
        scale = arm.learning_rate_scale
        return [
            Cell(condition, arm.name, rate * scale, seed) for rate in self.learning_rates for seed in self.tuning_seeds
        ]

    def content(self) -> dict[str, Any]:
        """As plain data, to be kept as JSON."""
        return asdict(self)


def shipped_studies() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def read_study(name: str) -> Study:
    """Read a study's file: a path, or the bare name of a shipped one.

    Raises:
        UserError: no such file, or it is wrong; the message names the field, the value and what is allowed.
    """
    path = STUDIES / f"{name}.yaml" if name in shipped_studies() else Path(name)
    with reading("study", name[:100]):
        there = path.is_file()
    if not there:
        known = shipped_studies()
        raise UserError(f"study: got {name!r}, no such file; shipped are {', '.join(known)}{nearest(name, known)}")
    content = read_yaml("study", path)
    with bad_input():
        return parse_study(path.stem, content, read_text("study", path), path.parent)


_FIELDS = ("about", "recipe", "set", "conditions", "norms", "baseline", "learning_rates", "tuning_seeds", "seeds")
_FIELDS += ("suites", "metric", "scoring", "threads", "launcher", "gpus", "search")
_ARM = ("name", "norm", "kwargs", "overrides", "set", "learning_rate_scale", "sweep")
_SCORING = (
    "include_path",
    "num_fewshot",
    "mirror",
    "limit",
    "batch_size",
    "device",
    "dtype",
    "overlong",
    "skip",
    "ignore",
    "cache",
)
_STUDYS_OWN = ("run_dir", "resume", "seed", "learning_rate", "config", "check", "push_to_hub")
_STUDYS_OWN += ("model.norm_type", "model.norm_kwargs", "model.norm_overrides")


def parse_study(name: str, content: Any, source: str, folder: Path = Path()) -> Study:
    """The study that the content of a file describes.

    Args:
        name: of the study.
        content: the file's, as YAML gives it.
        source: its text.
        folder: where the file lies, and a recipe named by a relative path may.

    Raises:
        ValueError, TypeError: naming the field, the value and what is allowed.
    """
    given = _mapping("study", content, _FIELDS)
    for field in ("recipe", "norms", "learning_rates", "seeds"):
        if given.get(field) is None:
            raise ValueError(f"{field}: is missing; a study needs recipe, norms, learning_rates and seeds")
    recipe = _text("recipe", given["recipe"])
    if (folder / recipe).is_file():
        recipe = str(folder / recipe)
    settings = _settings("set", given.get("set"))
    conditions = {
        _text("conditions", key): _settings(f"conditions.{key}", value)
        for key, value in _filled("conditions", _mapping("conditions", _given(given, "conditions", {"": {}}))).items()
    }
    norms = _filled("norms", _list("norms", given["norms"]))
    arms = tuple(arm for i, entry in enumerate(norms) for arm in _arms(f"norms[{i}]", entry))
    searches = tuple(_search(f"search[{i}]", entry) for i, entry in enumerate(_optional(given, "search")))
    named = [arm.name for arm in arms] + [search.name for search in searches]
    for what, names in (("norms", named), ("conditions", list(conditions))):
        slugs = [slug(each) for each in names]
        if twice := [each for each, slug in zip(names, slugs, strict=True) if slugs.count(slug) > 1]:
            raise ValueError(f"{what}: {twice[0]!r} is there more than once, or too like another name")
    baseline = _text("baseline", _given(given, "baseline", ""))
    if baseline and baseline not in [arm.name for arm in arms]:
        allowed = ", ".join(arm.name for arm in arms)
        raise ValueError(f"baseline: got {baseline!r}, must be one of norms: {allowed}{nearest(baseline, named)}")
    rates = _filled("learning_rates", _list("learning_rates", given["learning_rates"]))
    rates = tuple(_number("learning_rates", each) for each in rates)
    _unlike("learning_rates", tuple(f"{rate:g}" for rate in rates))  # as the folders are called
    seeds = _seeds("seeds", given["seeds"])
    tuning = _seeds("tuning_seeds", _given(given, "tuning_seeds", list(seeds[:1])))
    if shared := sorted(set(seeds) & set(tuning)) if searches else []:
        raise ValueError(f"seeds: got {shared[0]}, which is one of tuning_seeds; a search is confirmed on fresh seeds")
    suites = tuple(_text("suites", each) for each in _optional(given, "suites"))
    metric = _text("metric", _given(given, "metric", VALIDATION))
    if metric != VALIDATION and not suites:
        raise ValueError(f"metric: got {metric!r}, but there are no suites; name one, or {VALIDATION}")
    if searches and "conditions" in given:
        raise ValueError("search: cannot go with conditions; give each condition a study of its own")
    return Study(
        name=name,
        about=" ".join(_text("about", _given(given, "about", "")).split()),
        recipe=recipe,
        settings=settings,
        conditions=conditions,
        arms=arms,
        baseline=baseline,
        learning_rates=rates,
        tuning_seeds=tuning,
        seeds=seeds,
        suites=_unlike("suites", suites),
        metric=metric,
        scoring=_scoring(_given(given, "scoring", {})),
        threads=_whole("threads", _given(given, "threads", 1), 1),
        launcher=tuple(_text("launcher", each) for each in _list("launcher", _given(given, "launcher", []))),
        gpus=_whole("gpus", _given(given, "gpus", 0), 0),
        searches=searches,
        source=source,
    )


def _arms(field: str, entry: Any) -> list[Arm]:
    """The arms of one entry of `norms`: one, or one for each combination of a `sweep`."""
    from hf_ibnorm.norms import norm_name

    given = {"norm": entry} if isinstance(entry, str) else _mapping(field, entry, _ARM)
    if "norm" not in given:
        raise ValueError(f"{field}.norm: is missing; must be the name of a norm")
    norm = norm_name(given["norm"], f"{field}.norm")
    base = _mapping(f"{field}.kwargs", _given(given, "kwargs", {}))
    sweep = given.get("sweep")
    sweep = {} if sweep is None else _filled(f"{field}.sweep", _mapping(f"{field}.sweep", sweep))
    values = [_filled(f"{field}.sweep.{key}", _list(f"{field}.sweep.{key}", value)) for key, value in sweep.items()]
    scale = _number(f"{field}.learning_rate_scale", given.get("learning_rate_scale", 1.0))
    arms = []
    for combination in itertools.product(*values):
        chosen = dict(zip(sweep, combination, strict=True))
        told = " ".join(
            [_text(f"{field}.name", given.get("name", norm)), *(f"{k}={_short(v)}" for k, v in chosen.items())]
        )
        if "name" not in given and not sweep and base:
            told = " ".join([norm, *(f"{k}={_short(v)}" for k, v in base.items())])
        arms.append(
            Arm(
                told,
                norm,
                _resolved(norm, {**base, **chosen}, f"{field}.kwargs"),
                tuple(_list(f"{field}.overrides", _given(given, "overrides", []))),
                _settings(f"{field}.set", given.get("set")) or None,
                scale,
            )
        )
    return arms


def _search(field: str, entry: Any) -> Search:
    from hf_ibnorm.norms import norm_name

    given = _mapping(field, entry, tuple(each.name for each in fields(Search)))
    for name in ("norm", "lam", "trials"):
        if name not in given:
            raise ValueError(f"{field}.{name}: is missing; a search needs norm, lam and trials")
    norm = norm_name(given["norm"], f"{field}.norm")
    ends = [_number(f"{field}.lam", each) for each in _list(f"{field}.lam", given["lam"])]
    if len(ends) != 2 or ends[0] >= ends[1]:
        raise ValueError(f"{field}.lam: got {given['lam']!r}, must be the least λ and the greatest")
    kwargs = _mapping(f"{field}.kwargs", _given(given, "kwargs", {}))
    for end in ends:
        _resolved(norm, {**kwargs, "lam": end}, f"{field}.kwargs")
    trials = _whole(f"{field}.trials", given["trials"], 1)
    reduction = _whole(f"{field}.reduction", _given(given, "reduction", 3), 2)
    name = _text(f"{field}.name", given.get("name", f"{norm} searched"))
    return Search(name, norm, kwargs, (ends[0], ends[1]), trials, reduction)


def _resolved(norm: str, kwargs: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Every option with its value, so that a study means the same after a default has changed."""
    from hf_ibnorm.norms import resolve_norm_kwargs

    found = resolve_norm_kwargs(norm, kwargs, field=field)
    return {key: value for key, value in found.items() if value is not None and (key != "eps" or key in kwargs)}


def _given(content: Mapping[str, Any], field: str, default: Any) -> Any:
    """A field's value, or its default where it is left out or null."""
    value = content.get(field)
    return default if value is None else value


def _whole(field: str, value: Any, low: int) -> int:
    check_number(field, value, low)
    if not isinstance(value, int):
        raise TypeError(f"{field}: got {value!r}, must be a whole number >= {low}")
    return value


def _mapping(field: str, value: Any, known: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{field}: got {value!r}, must be a mapping")
    for key in value:
        if known is not None and key not in known:
            raise ValueError(
                f"{field}: unknown field {key!r}{nearest(str(key), list(known))}; known are {', '.join(known)}"
            )
    return value


def _settings(field: str, value: Any) -> dict[str, Any]:
    """Fields of a recipe; those of the model as `model.name`."""
    flat: dict[str, Any] = {}
    for key, each in _mapping(field, value or {}).items():
        flat |= {f"model.{k}": v for k, v in each.items()} if key == "model" and isinstance(each, dict) else {key: each}
    for key, each in flat.items():
        if key in _STUDYS_OWN:
            raise ValueError(f"{field}: got {key!r}, which is the study's own; allowed are the recipe's other fields")
        if not isinstance(each, str | int | float | list | dict | None):
            raise TypeError(f"{field}.{key}: got a {type(each).__name__}; put it in quotes to make it text")
    return flat


def _list(field: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{field}: got {value!r}, must be a list")
    return value


def _filled(field: str, value: Any) -> Any:
    """A list or mapping of which something is made for each entry: of none, nothing would be, without a word.

    Raises:
        ValueError: it is empty.
    """
    if not value:
        kind = "list" if isinstance(value, list) else "mapping"
        raise ValueError(f"{field}: got an empty {kind}, must have one or more; leave out a field that is not meant")
    return value


def _optional(given: Mapping[str, Any], field: str) -> list[Any]:
    """A list that may be left out; there, it has entries."""
    value = given.get(field)
    return [] if value is None else _filled(field, _list(field, value))


def _scoring(value: Any) -> dict[str, Any]:
    """Flags of `eval run`; lists of them are not empty, nor are they null."""
    found = _mapping("scoring", value, _SCORING)
    for key, each in found.items():
        if isinstance(each, list):
            _filled(f"scoring.{key}", each)
        elif each is None or isinstance(each, dict):
            raise TypeError(f"scoring.{key}: got {each!r}, must be text, a number or a list")
    return found


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{field}: got {value!r}, must be text")
    return value


def _number(field: str, value: Any) -> float:
    """A number above 0; YAML takes 1e-3, which has no point, for text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{field}: got {value!r}, must be a number > 0")
    return number


def _seeds(field: str, value: Any) -> tuple[int, ...]:
    for each in _filled(field, _list(field, value)):
        check_number(field, _whole(field, each, 0), 0, 2**31)
    return _unlike(field, tuple(value))


def _unlike(field: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    if twice := [each for each in values if values.count(each) > 1]:
        raise ValueError(f"{field}: got {twice[0]} more than once")
    return values


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def slug(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.=+-]+", "_", name)


def flag_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line: text as it is, all else as JSON."""
    pairs = ((f"--{name}", each if isinstance(each, str) else json.dumps(each)) for name, each in settings.items())
    return [word for pair in pairs for word in pair]
