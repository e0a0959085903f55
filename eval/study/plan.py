"""What a study is: the norms that are compared, and the trainings ("cells") that follow from them."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_ibnorm.base.layout import CELLS

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
        return json.dumps(other, sort_keys=True)


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
        return Path(CELLS, *parts, f"lr={self.learning_rate:g}", f"seed={self.seed}")

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


def slug(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.=+-]+", "_", name)


def flag_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line: text as it is, all else as JSON."""
    pairs = ((f"--{name}", each if isinstance(each, str) else json.dumps(each)) for name, each in settings.items())
    return [word for pair in pairs for word in pair]
