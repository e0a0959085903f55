"""A study: its YAML file, the norms that are compared, and the trainings ("cells") that follow from them."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_ibnorm.base import fields
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.layout import CELLS
from hf_ibnorm.base.reading import read_text, read_yaml, reading
from hf_ibnorm.checks import nearest
from hf_ibnorm.report.runs import NORM_SETTINGS, flat_settings

from ..options import OF_STUDIES
from . import STUDIES, shipped_studies

VALIDATION = "eval_loss"
"""The metric of a study without a test set: the validation loss, which chooses the learning rates too."""
_STUDYS_OWN = ("run_dir", "resume", "seed", "learning_rate", "config", "check", "push_to_hub", *NORM_SETTINGS)


@dataclass(frozen=True)
class Arm:
    """One of the norms that a study compares.

    Args:
        name: of the arm, in tables.
        norm: the norm's name.
        kwargs: its options, resolved; without `eps` where the file has none: then the model's is used.
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
        """The fields of the recipe that this arm sets."""
        norm = {"model.norm_type": self.norm, "model.norm_kwargs": dict(self.kwargs)}
        return {**norm, "model.norm_overrides": list(self.overrides), **(self.settings or {})}

    @property
    def lam(self) -> float | None:
        """λ of an IBNorm."""
        return self.kwargs.get("lam")

    @property
    def family(self) -> str:
        """A text that is the same for arms that differ in name and λ alone."""
        other = {**asdict(self), "name": "", "kwargs": {k: v for k, v in self.kwargs.items() if k != "lam"}}
        return json.dumps(other, sort_keys=True)


@dataclass(frozen=True)
class Search:
    """A search for λ by successive halving, an entry of `search`; its winner becomes an arm of the study.

    Args:
        norm: the norm whose λ is searched.
        lam: least and greatest λ; tried on a logarithmic scale.
        trials: number of trainings that are begun, each with a λ and one of the study's learning rates.
        name: of the arm; in the file by default the norm's with "searched".
        kwargs: the norm's other options.
        reduction: of so many trainings that reach a validation, one goes on.
    """

    norm: str
    lam: tuple[fields.PositiveNumber, fields.PositiveNumber]
    trials: fields.PositiveInt
    name: str = ""
    kwargs: dict = field(default_factory=dict)
    reduction: fields.FromTwo = 3

    def arm(self, lam: float | None) -> Arm:
        """The arm with a λ; without one while the search has not ended, or where every trial diverged."""
        return Arm(self.name, self.norm, {**self.kwargs, **({} if lam is None else {"lam": lam})})


@dataclass(frozen=True)
class Cell:
    """One training: an arm with one learning rate and one seed, under one condition."""

    condition: str
    arm: str
    learning_rate: float
    seed: int

    @property
    def folder(self) -> Path:
        """The cell's folder in the study's directory."""
        names = [slug(name) for name in (self.condition, self.arm) if name]
        return Path(CELLS, *names, f"lr={self.learning_rate:g}", f"seed={self.seed}")

    def __str__(self) -> str:
        where = f"{self.condition}, " if self.condition else ""
        return f"{where}{self.arm}, learning rate {self.learning_rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A study as its file describes it.

    Args:
        name: the file's, without its ending.
        about: the question of the study, in a sentence or two.
        recipe: of train_lm: a shipped one's name, or a path.
        settings: fields of the recipe that the study changes, for every training (`set` in the file).
        conditions: name → fields of the recipe; the whole comparison is made under each. A single one without a name
            where the file has none.
        arms: the norms (`norms` in the file).
        baseline: the arm that the others are compared with; "" until the recipe is known: then the model's stock norm.
        learning_rates: the grid that is tried for every arm.
        tuning_seeds: seeds of the trainings that try the grid; the least mean of their validation losses decides.
        seeds: seeds with which every arm is trained at its best learning rate, and compared.
        suites: each as `eval run --suite` takes it; the models of `seeds` are scored on them.
        metric: the benchmark that gives the verdict; "eval_loss" for the validation loss.
        scoring: flags of `eval run`, such as batch_size.
        threads: of torch, in each training: another number of threads rounds sums in another way.
        launcher: starts a training instead of python, such as [accelerate, launch, --num_processes, "8"].
        gpus: GPUs that a training has to itself; 0: it sees all of the machine's.
        searches: searches for λ.
        source: the text of the file.
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


def study_from(content: Mapping[str, Any]) -> Study:
    """A study from its plain data in `study.json`, in which tuples are lists."""
    arms = [Arm(**_with_tuples(arm)) for arm in content["arms"]]
    searches = [Search(**_with_tuples(search)) for search in content["searches"]]
    return Study(**_with_tuples({**content, "arms": arms, "searches": searches}))


def _with_tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


def slug(name: str) -> str:
    """The name of a folder for a name that may have any characters."""
    return re.sub(r"[^\w.=+-]+", "_", name)


def flag_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line: text as it is, all else as JSON."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


@dataclass
class _Norm:
    """An entry of `norms`."""

    norm: str
    name: str | None = None
    kwargs: dict = field(default_factory=dict)
    overrides: list = field(default_factory=list)
    set: dict = field(default_factory=dict)
    learning_rate_scale: fields.PositiveNumber = 1.0
    sweep: dict[str, list] = field(default_factory=dict, metadata=fields.FILLED)


@dataclass
class _File:
    """The whole file; `Study` explains its fields."""

    recipe: str
    norms: list = field(metadata=fields.FILLED)
    learning_rates: list[fields.PositiveNumber] = field(metadata=fields.FILLED)
    seeds: list[fields.Seed] = field(metadata=fields.FILLED)
    about: str = ""
    set: dict = field(default_factory=dict)
    conditions: dict[str, dict] = field(default_factory=lambda: {"": {}}, metadata=fields.FILLED)
    baseline: str = ""
    tuning_seeds: list[fields.Seed] = field(default_factory=list, metadata=fields.FILLED)
    suites: list[str] = field(default_factory=list, metadata=fields.FILLED)
    metric: str = VALIDATION
    scoring: dict[str, str | int | float | list] = field(default_factory=dict)
    threads: fields.PositiveInt = 1
    launcher: list[str] = field(default_factory=list)
    gpus: fields.NonNegativeInt = 0
    search: list = field(default_factory=list, metadata=fields.FILLED)


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
    """The study that a file describes: its content as YAML gives it, its text `source`, and the folder it lies in.

    Raises:
        ValueError, TypeError: naming the field, the value and what is allowed.
    """
    file = fields.from_mapping(_File, "study", content)
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
    fields.check_known("scoring", file.scoring, list(OF_STUDIES))
    for flag, value in file.scoring.items():
        fields.check_filled(f"scoring.{flag}", value)
    given = _with_tuples(vars(file))
    del given["norms"], given["set"], given["search"]
    given |= {
        "about": " ".join(file.about.split()),
        "recipe": str(folder / file.recipe) if (folder / file.recipe).is_file() else file.recipe,
        "settings": _settings("set", file.set),
        "conditions": {key: _settings(f"conditions.{key}", value) for key, value in file.conditions.items()},
    }
    return Study(name=name, source=source, arms=arms, searches=searches, **given)


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
    entry = fields.from_mapping(_Norm, where, content, f"{where}.")
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

    search = fields.from_mapping(Search, where, content, f"{where}.")
    norm = norm_name(search.norm, f"{where}.norm")
    if search.lam[0] >= search.lam[1]:
        raise ValueError(f"{where}.lam: got {content['lam']!r}, must be the least λ and the greatest")
    for lam in search.lam:
        _resolved(norm, {**search.kwargs, "lam": lam}, f"{where}.kwargs")
    return replace(search, norm=norm, name=search.name or f"{norm} searched")


def _resolved(norm: str, kwargs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Every option with its value, so that a study means the same after a default has changed."""
    from hf_ibnorm.norms import resolve_norm_kwargs

    options = resolve_norm_kwargs(norm, kwargs, field=where)
    return {name: value for name, value in options.items() if value is not None and (name != "eps" or name in kwargs)}


def _settings(where: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recipe on one level; those of the model as `model.name`."""
    flat = flat_settings(settings) if isinstance(settings.get("model"), dict) else dict(settings)
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
