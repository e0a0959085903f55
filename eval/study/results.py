"""The verdicts of a study: each norm's compared trainings, paired with the baseline's."""

from collections.abc import Iterable, Sequence

from hf_ibnorm.base import layout
from hf_ibnorm.report.runs import differing_in_runs

from ..statistics import BETTER, SAME, WORSE, paired, verdicts
from ..suites import DEFINED
from .folder import Folder
from .plan import VALIDATION, Arm
from .training import DIVERGED, FAILED, TRAINED, UNFINISHED, Group, Training

BASELINE, REFUSED, NO_BASELINE = "baseline", "refused", "no baseline"
ONE_SEED, NO_SCATTER, NO_SCORE = "one seed", "no scatter between seeds", "no score"
VERDICTS = (BETTER, WORSE, SAME, DIVERGED, REFUSED, FAILED, UNFINISHED, ONE_SEED, NO_SCATTER, NO_SCORE, NO_BASELINE)
"""Verdicts about a norm that is not the baseline, in the order in which sentences name them."""
HASHES = {name: title for name, title in layout.HASHES.items() if name != "teacher_sha"}  # a run need not have one


def gather(folder: Folder) -> list[Group]:
    """Every norm of a study under every condition, judged against the baseline.

    A pair whose trainings differ in a setting, data or initial values is refused by name, and its norm gets no verdict.
    Nor does a norm with a seed that diverged or is missing: the seeds that are left would be a selection.
    """
    study, groups = folder.study, folder.groups()
    for condition in study.conditions:
        here = [group for group in groups if group.condition == condition]
        judge(here, next(group for group in here if group.arm.name == study.baseline), study.metric)
    return groups


def lower_is_better(groups: Iterable[Group], metric: str) -> bool:
    """Whether less of a metric is better: the validation loss, and bits per byte of whole documents."""
    if metric == VALIDATION or (metric in DEFINED and DEFINED[metric].rolling):
        return True
    rows = [training.scores.get(metric) for group in groups for training in group.finals.values()]
    return any(row and row["details"]["metric"] == "bits_per_byte" for row in rows)


def metric_title(groups: Sequence[Group], metric: str) -> str:
    """The metric with its unit, and which way is up."""
    if metric == VALIDATION:
        return "validation loss, nats per token (lower is better)"
    if lower_is_better(groups, metric):
        return f"{metric}, bits per byte (lower is better)"
    return f"{metric} (higher is better)"


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
    """Name of a pair with the baseline → the difference; of trainings that are compared, and of those that tuned."""
    pairs = [
        (f"seed {seed}", training, baseline.finals[seed], metric)
        for seed, training in group.finals.items()
        if seed in baseline.finals
    ]
    for (rate, ours), theirs in zip(group.tuning.items(), baseline.tuning.values(), strict=False):
        pairs += [(f"tuning at {rate:g}", training, theirs[seed], "") for seed, training in ours.items()]
    reasons = {
        name: difference(a, b, group.arm, baseline.arm, tested) for name, a, b, tested in pairs if a.ended and b.ended
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _hindrance(group: Group, metric: str) -> str:
    """Why a norm can have no verdict; "" where it can."""
    tuning = [training for trainings in group.tuning.values() for training in trainings.values()]
    finals = list(group.finals.values())
    lost = bool(tuning) and not finals and group.tuning_ended
    if lost or group.verdict == DIVERGED or any(training.state == DIVERGED for training in finals):
        return DIVERGED
    if any(training.state == FAILED for training in tuning) or any(training.problem for training in finals):
        return FAILED
    if not finals or any(not training.ended or training.unscored for training in finals):
        return UNFINISHED
    return "" if len(group.values(metric)) == len(finals) else NO_SCORE


def difference(ours: Training, theirs: Training, arm: Arm, baseline: Arm, metric: str) -> str:
    """The first difference between two trainings of one seed that must be equal but for their arms; "" without one.

    Equal must be initial weights, every batch, the number of tokens, text, tokenizer, all settings but those that the
    arms set; and with a `metric` the items of that benchmark, and the settings of its scoring. Of a training that
    diverged only the batches before that are compared.
    """
    if ours.run is None or theirs.run is None:
        return "there is no run"
    runs = ours.run, theirs.run
    for name, title in HASHES.items():
        a, b = (run.environment.get(name) for run in runs)
        if a != b:
            a, b = ("missing" if sha is None else sha[:16] for sha in (a, b))
            return f"{title} differ: {name} is {a}, the baseline's {b}"
    for row, other in zip(*(run.metrics for run in runs), strict=False):
        if row["batch_sha"] != other["batch_sha"]:
            shas = f"batch_sha is {row['batch_sha']}, the baseline's {other['batch_sha']}"
            return f"batches differ from step {row['step']} on: {shas}"
    tokens = [run.metrics[-1]["tokens"] for run in runs]
    if ours.state == theirs.state == TRAINED and tokens[0] != tokens[1]:
        return f"tokens differ: {tokens[0]:,}, the baseline's {tokens[1]:,}"
    free = {"learning_rate", *arm.flags(), *baseline.flags()}
    for name, (a, b) in differing_in_runs(runs, free).items():
        return f"{name} differs: {a!r}, the baseline's {b!r}"
    if metric in ours.scores and metric in theirs.scores:
        return _asked_otherwise(ours, theirs, metric)
    return ""


def _asked_otherwise(ours: Training, theirs: Training, metric: str) -> str:
    """The difference in a benchmark's items, or in the settings of its scoring; "" where there is none."""
    tasks = [training.scores[metric]["details"]["tasks"] for training in (ours, theirs)]
    a, b = ({name: (task["hash"], task["n"]) for name, task in of_run.items()} for of_run in tasks)
    if a != b:
        return f"the items of {metric} differ"
    for suite, manner in ours.scored_with.items():
        for name, value in manner.items():
            if (other := theirs.scored_with.get(suite, {}).get(name)) != value:
                return f"{suite} was scored with {name} {value!r}, for the baseline with {other!r}"
    return ""
