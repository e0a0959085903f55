"""One norm of a study under one condition: its trainings, and the verdict about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_ibnorm.report.runs import Run

from ..statistics import BETTER, SAME, WORSE, Paired
from .plan import Arm, Cell
from .training import DIVERGED, FAILED, TRAINED, Training, mean_losses

BASELINE, REFUSED, UNFINISHED, NO_BASELINE = "baseline", "refused", "unfinished", "no baseline"
ONE_SEED, NO_SCATTER, NO_SCORE = "one seed", "no scatter between seeds", "no score"
VERDICTS = (BETTER, WORSE, SAME, DIVERGED, REFUSED, FAILED, UNFINISHED, ONE_SEED, NO_SCATTER, NO_SCORE, NO_BASELINE)
"""Verdicts about a norm that is not the baseline, in the order in which sentences name them."""


@dataclass(eq=False)
class Group:
    """One norm under one condition.

    Args:
        condition: its name, "" where a study has none.
        arm: the norm.
        tuning: learning rate → seed → a training that decides on the learning rate; empty for an arm of a search.
        learning_rate: the best one; None while it is not known, or where every one has a training that diverged.
        finals: seed → the training that is compared; empty while the learning rate is None.
        refused: name of a pair with the baseline that does not count → why.
        differences: from the baseline, one a seed; none where a pair is missing or refused.
        paired: statistics of the differences.
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

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the least or the greatest of several: a better one may lie outside."""
        rates = sorted(self.tuning)
        return len(rates) > 1 and self.learning_rate in (rates[0], rates[-1])
