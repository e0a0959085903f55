"""The trainings of a study, as their own files describe them, and those of one norm as a group."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_ibnorm.base import layout
from hf_ibnorm.base.reading import read_json
from hf_ibnorm.report.runs import SKIPPED_SHARE, Run, flat_settings, read_scores

from ..statistics import Paired
from ..store import read_manifest
from .plan import VALIDATION, Arm, Cell, slug

WAITING, BEGUN, FAILED, DIVERGED, TRAINED = "waiting", "begun", "failed", "diverged", "trained"
UNFINISHED = "unfinished"
"""The verdict about a norm until its trainings have ended."""


@dataclass(frozen=True)
class Training:
    """The training of a cell.

    Args:
        state: waiting, begun (running, or stopped on the way), failed, diverged or trained.
        run: its run directory; None where there is none yet, or it has no step.
        problem: why it failed or diverged, or why its scoring failed, in a line.
        scores: benchmark → its row of `scores.json`, over all suites.
        unscored: suites without scores.
        smoke: whether a suite was scored on part of the items only.
        scored_with: suite → settings of the scoring: prompts, precision, context, version of the harness.
    """

    state: str
    run: Run | None = None
    problem: str = ""
    scores: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    unscored: tuple[str, ...] = ()
    smoke: bool = False
    scored_with: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether the training has come to its own end, good or bad."""
        return self.state in (TRAINED, DIVERGED)

    @property
    def validation(self) -> float | None:
        """Last validation loss in nats a token; None unless it was trained."""
        return self.run.metrics[-1][VALIDATION] if self.run and self.state == TRAINED else None

    def value(self, metric: str) -> float | None:
        """The metric of a study; None unless it was trained and has that metric."""
        return self.validation if metric == VALIDATION else self.scores.get(metric, {}).get("raw")


def mean_losses(tuning: Mapping[float, Collection[Training]]) -> dict[float, float | None]:
    """Learning rate → mean validation loss of its trainings; None where one of them diverged or is missing."""
    means: dict[float, float | None] = {}
    for rate, trainings in tuning.items():
        losses = [training.validation for training in trainings if training.validation is not None]
        means[rate] = fmean(losses) if len(losses) == len(trainings) else None
    return means


def scores_folder(folder: Path, suite: str) -> Path:
    """The folder of a cell's scores on a suite."""
    return folder / layout.SCORES_FOLDER / slug(suite)


def read_training(folder: Path, expected: Mapping[str, Any]) -> Training:
    """The training of the cell in `folder`, from the files there, without its scores.

    A run without the `expected` settings is another cell's, and a failed training of this one.

    Raises:
        UserError: a file of the study itself is damaged. A damaged file of the training makes it a failed one.
    """
    run_dir, problem = folder / layout.CELL_RUN, _failure(folder)
    finished = (run_dir / layout.FINAL).exists()
    try:
        run = Run.read(run_dir, finished)
    except ValueError as error:
        if isinstance(error.__cause__, OSError):  # a disk that fails says nothing about the training
            raise
        if finished:
            return Training(FAILED, None, str(error))
        begun = (run_dir / layout.METRICS).exists()
        return Training(FAILED if problem else BEGUN if begun else WAITING, None, problem)
    if wrong := _stranger(run, expected):
        return Training(FAILED, None, wrong)
    if reason := _divergence(run, finished):
        return Training(DIVERGED, run, reason)
    if finished:
        return Training(TRAINED, run)
    return Training(FAILED if problem else BEGUN, run, problem)


def with_scores(training: Training, folder: Path, suites: Sequence[str]) -> Training:
    """A training with those of its scores that are in the cell's folder."""
    if training.state != TRAINED:
        return training
    places = {suite: scores_folder(folder, suite) for suite in suites}
    missing = tuple(suite for suite, place in places.items() if not (place / layout.SCORES).exists())
    scored = {suite: read_scores(place) for suite, place in places.items() if suite not in missing}
    return replace(
        training,
        problem=_failure(folder) if missing else "",
        scores={name: row for scores in scored.values() for name, row in scores["benchmarks"].items()},
        unscored=missing,
        smoke=any(scores["smoke"] for scores in scored.values()),
        scored_with={suite: _manner(read_manifest(places[suite])["identity"]) for suite in scored},
    )


def _failure(folder: Path) -> str:
    """Why the last try of a cell failed; "" where none failed, or the command that failed has been finished since."""
    if not (folder / layout.FAILURE).exists():
        return ""
    failure = read_json("study", folder / layout.FAILURE, layout.FAILURE_FORM)
    return "" if (folder / failure["done"]).exists() else failure["problem"]


def _manner(identity: dict[str, Any]) -> dict[str, Any]:
    """The settings of a scoring that two scores must share to be compared."""
    model = {name: identity["model"][name] for name in ("dtype", "max_length")}
    return {**identity["prompting"], **model, "overlong": identity["overlong"], **identity["versions"]}


def _stranger(run: Run, expected: Mapping[str, Any]) -> str:
    """The first setting that shows that a run belongs to another cell; "" where it is the cell's own."""
    settings = flat_settings(run.config)
    for name, value in expected.items():
        got = shared = settings.get(name)
        if isinstance(value, Mapping) and isinstance(got, Mapping):
            # A run's options are resolved; those of a cell may lack the model's epsilon.
            shared = {option: got.get(option) for option in value}
        if shared != value:
            return f"the run here is another one: {name} is {got!r}, must be {value!r}"
    return ""


def _divergence(run: Run, finished: bool) -> str:
    """Why a run counts as diverged: it gave up, or learnt nothing by its end; "" where it does not."""
    last = run.metrics[-1]
    if finished:
        guessing = math.log(run.config["model"]["vocab_size"])
        if last[VALIDATION] >= 0.99 * guessing:
            return f"learnt nothing: validation loss {last[VALIDATION]:.3f} at the end, guessing has {guessing:.3f}"
        return ""
    steps, skipped = run.config["max_steps"], sum("skipped" in row for row in run.metrics)
    if last["step"] == steps and skipped >= SKIPPED_SHARE * steps:
        return f"{skipped} of {steps} steps skipped"
    lost = [name for name in ("loss", "grad_norm", VALIDATION) if last.get(name, 0.0) is None]
    given_up = last.get("skipped", 0) >= run.config["max_skipped_steps"] or VALIDATION in lost
    return f"{lost[0]} not finite at step {last['step']}" if lost and given_up else ""


@dataclass(eq=False)
class Group:
    """One norm under one condition.

    Args:
        condition: its name, "" where a study has none.
        arm: the norm.
        tuning: learning rate → seed → a training that decides on the learning rate; empty for an arm of a search.
        learning_rate: the best learning rate; None while it is not known, or where a training diverged at each of them.
        finals: seed → the training that is compared; empty while the learning rate is None.
        refused: name of a pair with the baseline that does not count → why.
        differences: from the baseline, one a seed; none where a pair is missing or refused.
        paired: their statistics.
        adjusted: p after Holm's correction.
        verdict: about this norm.
    """

    condition: str
    arm: Arm
    tuning: Mapping[float, Mapping[int, Training]]
    learning_rate: float | None = None
    finals: Mapping[int, Training] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    differences: list[float] = field(default_factory=list)
    paired: Paired | None = None
    adjusted: float | None = None
    verdict: str = UNFINISHED

    @property
    def label(self) -> str:
        """The norm, and the condition where a study has several."""
        return f"{self.condition}: {self.arm.name}" if self.condition else self.arm.name

    def values(self, metric: str) -> dict[int, float]:
        """Seed → the metric, of compared trainings that have it."""
        values = {seed: training.value(metric) for seed, training in self.finals.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def runs(self) -> list[Run]:
        """The compared runs that were trained to their end."""
        return [training.run for training in self.finals.values() if training.state == TRAINED and training.run]

    def cells(self) -> dict[Cell, Training]:
        """All trainings that are known by now, those that tune first; a training that is compared too is in it once."""
        by_rate = list(self.tuning.items())
        if self.learning_rate is not None:
            by_rate.append((self.learning_rate, self.finals))
        return {
            Cell(self.condition, self.arm.name, rate, seed): training
            for rate, trainings in by_rate
            for seed, training in trainings.items()
        }

    def is_compared(self, cell: Cell) -> bool:
        """Whether the training of one of the cells is compared."""
        return cell.learning_rate == self.learning_rate and cell.seed in self.finals

    @property
    def tuning_ended(self) -> bool:
        """Whether every training that decides on the learning rate has ended."""
        return all(training.ended for trainings in self.tuning.values() for training in trainings.values())

    def best_rate(self) -> float | None:
        """The learning rate with the least mean validation loss; None while trainings that decide on it are missing."""
        losses = {rate: loss for rate, loss in self.tuned().items() if loss is not None}
        return min(losses, key=losses.__getitem__) if losses and self.tuning_ended else None

    def tuned(self) -> dict[float, float | None]:
        """Learning rate → mean validation loss over the tuning seeds; None where one diverged or is missing."""
        return mean_losses({rate: trainings.values() for rate, trainings in self.tuning.items()})

    def tuning_states(self, rate: float) -> set[str]:
        """States of the trainings with one learning rate that decide on it."""
        return {training.state for training in self.tuning.get(rate, {}).values()}
