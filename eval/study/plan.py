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
"""The metric of a study without a test set: the validation loss, which chooses the learning rates too."""


@dataclass(frozen=True)
class Arm:
    """One of the norms that a study compares.

    Args:
        name: of the arm, in tables.
        norm: the norm's name.
        kwargs: its options, resolved; without `eps` where none was given, for then it is the model's.
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
    """A search for λ by successive halving; its winner becomes an arm of the study.

    Args:
        name: of that arm.
        norm: the norm whose λ is searched.
        kwargs: its other options.
        lam: least and greatest λ; tried on a logarithmic scale.
        trials: number of trainings that are begun, each with a λ and one of the study's learning rates.
        reduction: of so many trainings that reach a validation, one goes on.
    """

    name: str
    norm: str
    kwargs: Mapping[str, Any]
    lam: tuple[float, float]
    trials: int
    reduction: int = 3

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


def shipped_studies() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def slug(name: str) -> str:
    """The name of a folder for a name that may have any characters."""
    return re.sub(r"[^\w.=+-]+", "_", name)


def flag_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line: text as it is, all else as JSON."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words
