"""What came out of a study: for each norm the trainings that count, paired with the baseline's, and a verdict."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hf_ibnorm.report.runs import Run, flat_settings, harmless_settings

from ..statistics import Paired, paired, verdicts
from ..suites import DEFINED
from .folder import Folder
from .plan import VALIDATION, Arm, Cell
from .training import DIVERGED, FAILED, TRAINED, Training, mean_losses

BASELINE, REFUSED, UNFINISHED, NO_BASELINE = "baseline", "refused", "unfinished", "no baseline"
ONE_SEED, NO_SCATTER, NO_SCORE = "one seed", "no scatter between seeds", "no score"
_ARMS_OWN = frozenset(("model.norm_type", "model.norm_kwargs", "model.norm_overrides", "learning_rate"))
HASHES = {
    "init_sha": "initial values of the shared parameters",
    "tokenizer_sha": "tokenizer",
    "train_sha": "training text",
    "validation_sha": "validation text",
}


@dataclass
class Group:
    """One norm under one condition.

    Args:
        condition: its name, "" where a study has none.
        arm: the norm.
        tuning: learning rate → its trainings, one a tuning seed.
        learning_rate: the best of them; None while it is not known, or where all diverged.
        finals: seed → the training that is compared.
        refused: which pair with the baseline does not count → why.
        differences: from the baseline, one a seed; none where a pair is missing or refused.
        paired: what they say.
        adjusted: p after Holm's correction.
        verdict: about this norm; see the constants above and in `compare`.
    """

    condition: str
    arm: Arm
    tuning: dict[float, list[Training]]
    learning_rate: float | None
    finals: dict[int, Training]
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
        """Seed → the metric, of trainings that have it."""
        values = {seed: each.value(metric) for seed, each in self.finals.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def runs(self) -> list[Run]:
        """The compared runs that were trained to their end."""
        return [each.run for each in self.finals.values() if each.state == TRAINED and each.run]

    def tuned(self) -> dict[float, float | None]:
        """Learning rate → mean validation loss over the tuning seeds; None where one diverged or is missing."""
        return mean_losses(self.tuning)

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the least or the greatest of several: a better one may lie outside."""
        rates = sorted(self.tuning)
        return len(rates) > 1 and self.learning_rate in (rates[0], rates[-1])


def gather(folder: Folder) -> list[Group]:
    """Every norm of a study under every condition, judged against the baseline.

    Pairs that do not share what they must are refused by name, and a norm with a refused pair gets no verdict; nor does
    one with a seed that diverged or is missing: the seeds that are left would be a selection.
    """
    study, groups = folder.study, []
    for condition, arm in folder.groups():
        finals = {cell.seed: folder.training(cell, arm) for cell in folder.finals(condition, arm)}
        groups.append(Group(condition, arm, folder.tried(condition, arm), folder.chosen(condition, arm), finals))
        if folder.is_searched(arm) and folder.winner(arm.name) and not finals:
            groups[-1].verdict = DIVERGED
    for condition in study.conditions:
        here = [group for group in groups if group.condition == condition]
        judge(here, next(group for group in here if group.arm.name == study.baseline), study.metric)
    return groups


def lower_is_better(groups: Iterable[Group], metric: str) -> bool:
    """Whether less of a metric is better: the validation loss, and bits per byte of whole documents."""
    if metric == VALIDATION or (metric in DEFINED and DEFINED[metric].rolling):
        return True
    rows = (each.scores[metric] for group in groups for each in group.finals.values() if metric in each.scores)
    return any(row["details"]["metric"] == "bits_per_byte" for row in rows)


def judge(groups: Sequence[Group], baseline: Group, metric: str) -> None:
    """Give every group of one condition its verdict."""
    counted, norms = [], len(groups) - 1
    baseline.verdict = _hindrance(baseline, metric)
    for group in groups:
        if group is baseline:
            continue
        group.refused = _refusals(group, baseline, metric)
        group.verdict = REFUSED if group.refused else _hindrance(group, metric) or (baseline.verdict and NO_BASELINE)
        if not group.verdict:
            ours, theirs = group.values(metric), baseline.values(metric)
            group.differences = [ours[seed] - theirs[seed] for seed in ours]
            group.paired = paired(group.differences, norms)
            counted.append(group)
    baseline.verdict = baseline.verdict or BASELINE
    judged = verdicts([group.paired for group in counted if group.paired], lower_is_better(groups, metric), norms)
    for group, (adjusted, verdict) in zip(counted, judged, strict=True):
        group.adjusted, group.verdict = adjusted, verdict or (ONE_SEED if len(group.finals) == 1 else NO_SCATTER)


def _refusals(group: Group, baseline: Group, metric: str) -> dict[str, str]:
    """Pair with the baseline → what it must share and does not; of compared trainings and of those that tuned."""
    pairs = [
        (f"seed {seed}", training, baseline.finals[seed], metric)
        for seed, training in group.finals.items()
        if seed in baseline.finals
    ]
    for (rate, ours), theirs in zip(group.tuning.items(), baseline.tuning.values(), strict=False):
        pairs += [(f"tuning at {rate:g}", a, b, "") for a, b in zip(ours, theirs, strict=True)]
    reasons = {
        name: difference(a, b, group.arm, baseline.arm, tested) for name, a, b, tested in pairs if a.ended and b.ended
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _hindrance(group: Group, metric: str) -> str:
    """Why a norm can have no verdict; "" where it can."""
    tuning = [each for trainings in group.tuning.values() for each in trainings]
    finals = list(group.finals.values())
    if group.verdict == DIVERGED or any(each.state == DIVERGED for each in finals):
        return DIVERGED
    if tuning and not finals and all(each.ended for each in tuning):
        return DIVERGED
    if any(each.state == FAILED for each in tuning) or any(each.problem for each in finals):
        return FAILED
    if not finals or any(not each.ended or each.unscored for each in finals):
        return UNFINISHED
    return "" if len(group.values(metric)) == len(finals) else NO_SCORE


def difference(ours: Training, theirs: Training, arm: Arm, other: Arm, metric: str) -> str:
    """The first thing that two trainings of one seed must share and do not, or "".

    They share initial weights, every batch, the number of tokens, text, tokenizer, all settings but those that the arms
    are about, and what the test asks, if `metric` is one: its items, and the manner of asking. Of one that diverged
    only the batches that it has seen are compared.
    """
    if ours.run is None or theirs.run is None:
        return "there is no run"
    runs = ours.run, theirs.run
    for name, what in HASHES.items():
        a, b = (run.environment.get(name) for run in runs)
        if a != b:
            a, b = ("missing" if value is None else value[:16] for value in (a, b))
            return f"{what} differ: {name} is {a}, the baseline's {b}"
    for row, other_row in zip(*(run.metrics for run in runs), strict=False):
        if row["batch_sha"] != other_row["batch_sha"]:
            shas = f"batch_sha is {row['batch_sha']}, the baseline's {other_row['batch_sha']}"
            return f"batches differ from step {row['step']} on: {shas}"
    tokens = [run.metrics[-1]["tokens"] for run in runs]
    if ours.state == theirs.state == TRAINED and tokens[0] != tokens[1]:
        return f"tokens differ: {tokens[0]:,}, the baseline's {tokens[1]:,}"
    free = {*harmless_settings(runs), *_ARMS_OWN, *(arm.settings or {}), *(other.settings or {})}
    a, b = ({**flat_settings(run.config), "processes": run.environment.get("num_processes")} for run in runs)
    for name in sorted((a.keys() | b.keys()) - free):
        if a.get(name) != b.get(name):
            return f"{name} differs: {a.get(name)!r}, the baseline's {b.get(name)!r}"
    if metric in ours.scores and metric in theirs.scores:
        return _asked_otherwise(ours, theirs, metric)
    return ""


def _asked_otherwise(ours: Training, theirs: Training, metric: str) -> str:
    """The difference in a benchmark's items, or in how two models were asked; "" where there is none."""
    tasks = [each.scores[metric]["details"]["tasks"] for each in (ours, theirs)]
    a, b = ({task: (row["hash"], row["n"]) for task, row in each.items()} for each in tasks)
    if a != b:
        return f"the items of {metric} differ"
    for suite, manner in ours.scored_with.items():
        for name, value in manner.items():
            if (other := theirs.scored_with.get(suite, {}).get(name)) != value:
                return f"{suite} was scored with {name} {value!r}, for the baseline with {other!r}"
    return ""


def environments(groups: Iterable[Group]) -> list[str]:
    """Sentences about versions, devices and threads that differ between trainings."""
    runs = [run for group in groups for run in group.runs()]
    lines = []
    for name in ("versions", "device", "torch_threads", "norm_backend", "git_revision", "cpu_capability"):
        kinds = Counter(json.dumps(run.environment.get(name), sort_keys=True) for run in runs)
        if len(kinds) > 1:
            counts = "; ".join(f"{count} with {kind}" for kind, count in kinds.most_common())
            lines.append(f"{name} is not the same for all trainings: {counts}")
    return lines


def failures(folder: Folder, groups: Sequence[Group]) -> list[tuple[Cell, Training]]:
    """Every training that failed or diverged, tuning included."""
    cells = [item for group in groups for item in folder.cells(group.condition, group.arm).items()]
    return [(cell, each) for cell, each in cells if each.state in (FAILED, DIVERGED) or each.problem]
