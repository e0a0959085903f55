"""The findings of a study as tables, rows and sentences: verdicts first, then the numbers they rest on."""

import math
import shlex
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from hf_ibnorm.base.files import sha256
from hf_ibnorm.report.runs import Run
from hf_ibnorm.report.tables import Table, decimals, number_cell

from ..compare import BETTER, SAME, WORSE
from ..statistics import BOOTSTRAP_FROM, TEST_FROM
from .folder import SOURCE, Folder
from .plan import VALIDATION, Cell
from .results import (
    HASHES,
    NO_BASELINE,
    NO_SCATTER,
    NO_SCORE,
    ONE_SEED,
    REFUSED,
    UNFINISHED,
    Group,
    environments,
    failures,
    lower_is_better,
)
from .training import DIVERGED, FAILED, Training

VERDICTS = (
    *(BETTER, WORSE, SAME),
    *(DIVERGED, REFUSED, FAILED, UNFINISHED, ONE_SEED, NO_SCATTER, NO_SCORE, NO_BASELINE),
)
"""In the order in which sentences name them."""


def metric_title(groups: Sequence[Group], metric: str) -> str:
    """The metric with its unit, and which way is up."""
    if metric == VALIDATION:
        return "validation loss, nats per token (lower is better)"
    if lower_is_better(groups, metric):
        return f"{metric}, bits per byte (lower is better)"
    return f"{metric} (higher is better)"


def verdict_table(groups: Sequence[Group], metric: str) -> Table:
    """The norms, a row each: verdict, metric, difference, interval, p, what could be seen."""
    most = max((group.paired.n for group in groups if group.paired), default=0)
    columns = [metric, "difference", "95 % interval", "p, corrected", "could be seen"]
    columns += ["sign test"] * (most >= TEST_FROM) + ["bootstrap"] * (most >= BOOTSTRAP_FROM)
    table = Table(["norm", "verdict", *columns, "learning rate"], text=2)
    for group in groups:
        cells = [mean_spread(list(group.values(metric).values())), *_statistics(group)][: len(columns)]
        cells += [""] * (len(columns) - len(cells))
        table.rows.append([group.label, verdict_text(group), *cells, number_cell(group.learning_rate, "g")])
    return table


def _statistics(group: Group) -> list[str]:
    """The cells of `verdict_table` on the differences from the baseline; none for a norm without differences."""
    paired = group.paired
    if paired is None:
        return []
    digits = decimals(stdev(group.differences) / math.sqrt(paired.n) if paired.n > 1 else None)
    return [
        f"{paired.mean:+.{digits}f}",
        _interval(paired.interval, digits),
        number_cell(group.adjusted, ".2g"),
        number_cell(paired.detectable, f".{digits}f"),
        number_cell(paired.sign_p, ".2g"),
        _interval(paired.bootstrap, digits),
    ]


def verdict_text(group: Group) -> str:
    """A verdict, with the number of seeds that diverged, or the pairs that were refused."""
    if group.verdict == DIVERGED and group.finals:
        count = sum(each.state == DIVERGED for each in group.finals.values())
        return f"{DIVERGED} ({count} of {len(group.finals)} seeds)"
    if group.verdict == REFUSED:
        return f"{REFUSED} ({', '.join(group.refused)})"
    return group.verdict


def cost_table(groups: Sequence[Group], metric: str) -> Table:
    """What quality cost: parameters, floating point operations, time."""
    names = ["norm", metric, "parameters", "10¹² FLOPs", "tokens", "seconds", "seconds per step (fastest tenth)"]
    table = Table([*names, "trainings to tune"])
    for group in groups:
        runs = group.runs()
        if not runs:
            continue
        tokens = runs[0].metrics[-1]["tokens"]
        table.rows.append(
            [
                group.label,
                mean_spread(list(group.values(metric).values())),
                f"{runs[0].environment['parameters']:,}",
                f"{runs[0].environment['flops_per_token'] * tokens / 1e12:,.1f}",
                f"{tokens:,}",
                mean_spread([run.seconds() for run in runs], 0),
                mean_spread([run.seconds_per_step() for run in runs], 3),
                str(sum(map(len, group.tuning.values())) or "search"),
            ]
        )
    return table


def tuning_table(groups: Sequence[Group]) -> Table:
    """Validation loss at every learning rate of the grid; the least one is marked."""
    rates = sorted({rate for group in groups for rate in group.tuning})
    table = Table(["norm", *(f"{rate:g}" for rate in rates)])
    for group in groups:
        losses = group.tuned()
        if losses:
            table.rows.append([group.label, *(_tuned(group, rate, losses.get(rate)) for rate in rates)])
    return table


def benchmark_table(groups: Sequence[Group]) -> Table:
    """Every benchmark of the suites, mean ± standard deviation over seeds."""
    scored = [group for group in groups if any(each.scores for each in group.finals.values())]
    names = dict.fromkeys(name for group in scored for each in group.finals.values() for name in each.scores)
    table = Table(["norm", *names, "validation loss"])
    for group in scored:
        cells = [mean_spread(list(group.values(name).values())) for name in (*names, VALIDATION)]
        table.rows.append([group.label, *cells])
    return table


def failure_table(folder: Folder, groups: Sequence[Group]) -> Table:
    """Trainings that failed or diverged, and refused pairs."""
    table = Table(["training", "what", "why"], text=3)
    table.rows += [[str(cell), each.state, each.problem] for cell, each in failures(folder, groups)]
    for group in groups:
        table.rows += [[f"{group.label}, {pair}", "pair refused", why] for pair, why in group.refused.items()]
    return table


def cell_rows(folder: Folder, groups: Sequence[Group], metric: str) -> list[dict[str, Any]]:
    """Every training of the study, as rows of `cells.csv`."""
    rows = []
    for group in groups:
        finals = folder.finals(group.condition, group.arm)
        for cell, training in folder.cells(group.condition, group.arm).items():
            rows.append(_cell_row(cell, training, metric, compared=cell in finals))
    return rows


def _cell_row(cell: Cell, training: Training, metric: str, compared: bool) -> dict[str, Any]:
    run = training.run
    row = {
        "condition": cell.condition,
        "norm": cell.arm,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "compared": compared,
        "state": training.state,
        "eval_loss": training.validation,
        "metric": training.value(metric) if compared else None,
    }
    if run is None:
        return row | dict.fromkeys(("steps", "tokens", "seconds", "init_sha", "batches_sha"))
    return row | {
        "steps": run.metrics[-1]["step"],
        "tokens": run.metrics[-1]["tokens"],
        "seconds": round(run.seconds(), 1),
        "init_sha": run.environment["init_sha"][:16],
        "batches_sha": sha256(each["batch_sha"] for each in run.metrics)[:16],
    }


def verdict_sentences(groups: Sequence[Group], baseline: str) -> list[str]:
    """The verdicts, a sentence for each condition."""
    lines = []
    for condition in dict.fromkeys(group.condition for group in groups):
        here = [group for group in groups if group.condition == condition and group.arm.name != baseline]
        names = {kind: [group.arm.name for group in here if group.verdict == kind] for kind in VERDICTS}
        listed = "; ".join(f"{kind}: {', '.join(each)}" for kind, each in names.items() if each)
        verdicts = f"Against {baseline} - {listed}." if listed else f"Nothing is compared with {baseline}."
        lines.append(f"{condition}: {verdicts}" if condition else verdicts)
    return lines


def what_was_equal(folder: Folder, groups: Sequence[Group], metric: str) -> list[str]:
    """Sentences on what all norms had in common, as far as the files show it, and on what they had not."""
    study, lines = folder.study, []
    pairs = sum(len(group.differences) for group in groups)
    runs = [run for group in groups if group.differences for run in group.runs()]
    if pairs:
        unknown = [what for name, what in HASHES.items() if any(run.environment.get(name) is None for run in runs)]
        same = [what for what in HASHES.values() if what not in unknown]
        lines.append(
            f"{pairs} pairs of trainings have equal {', '.join(same)}, every batch, number of tokens, and all settings "
            "but the norm and the learning rate; hashes are in cells.csv and in each run's environment.json."
        )
        if unknown:
            lines.append(f"NOTE: of {', '.join(unknown)} there is no hash, as of a stream; the batches are compared.")
    for group in groups:
        lines += [f"REFUSED: {group.label}, {pair}: {why}." for pair, why in group.refused.items()]
    for arm in study.arms:
        if arm.settings:
            lines.append(
                f"NOTE: on purpose, {arm.name} has {', '.join(f'{k} = {v}' for k, v in arm.settings.items())}."
            )
    lines += _tuning_lines(folder, groups, metric)
    if any(_draws_noise(run) for group in groups for run in group.runs()):
        lines.append("Noise is off in validation: models are in eval mode, which train_lm checks.")
        if study.suites and "noise" not in study.scoring.get("ignore", ()):
            lines.append("Noise is off in scoring: the doctor of `eval run` checks that logits repeat.")
    lines += [f"NOTE: {line}." for line in environments(groups)]
    for change in folder.record()["history"][1:]:
        lines.append(f"NOTE: the plan was changed at {change['date']}, after it began with {change['was']}.")
    return lines


def _draws_noise(run: Run) -> bool:
    """Whether a norm of a run's model draws noise in training; a norm that is not registered here is passed over."""
    from hf_ibnorm.norms import NORMS, build_norm

    known = [(name, options) for _, name, options in run.norms() if name in NORMS]
    return any(getattr(build_norm(name, 2, **options), "draws_noise", False) for name, options in known)


def _tuning_lines(folder: Folder, groups: Sequence[Group], metric: str) -> list[str]:
    """How the learning rates were chosen."""
    study, lines = folder.study, []
    grid = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    seeds = ", ".join(map(str, study.tuning_seeds))
    tuned = [
        group for group in groups if group.tuning and all(each.ended for row in group.tuning.values() for each in row)
    ]
    if tuned:
        who = "Every norm" if len(tuned) == len(groups) else ", ".join(group.label for group in tuned)
        lines.append(
            f"{who} was tried at the same learning rates ({grid}; seed {seeds}): the least validation loss chose."
        )
    if metric == VALIDATION:
        lines.append("The verdict is on the validation loss, which chose the learning rates too: there is no test set.")
    else:
        lines.append(f"Models were scored on {metric} at the chosen learning rate alone.")
    if both := sorted(set(study.tuning_seeds) & set(study.seeds)):
        lines.append(f"Seed {', '.join(map(str, both))} chose the learning rate and is compared too, for every norm.")
    for arm in study.arms:
        if arm.learning_rate_scale != 1:
            lines.append(f"NOTE: on purpose, {arm.name} has {arm.learning_rate_scale:g} times every learning rate.")
    if edge := [group.label for group in groups if group.at_edge]:
        lines.append(f"NOTE: the best learning rate is at the edge of the grid for {', '.join(edge)}.")
    for search in study.searches:
        if winner := folder.winner(search.name):
            lines.append(
                f"NOTE: {search.name} had {len(winner['trials'])} trials, and other norms {len(study.learning_rates)}."
            )
    return lines


def provenance(folder: Folder, groups: Sequence[Group]) -> list[str]:
    """Date, machine, versions, and the command that makes the report again."""
    record, threads = folder.record(), folder.study.threads
    lines = [f"Begun {record['history'][0]['date'][:10]}, trainings with {threads} thread{'s' * (threads > 1)} each."]
    if run := next((run for group in groups for run in group.runs()), None):
        versions = run.environment["versions"]
        kept = ("hf_ibnorm", "torch", "transformers", "accelerate", "lm_eval")
        lines.append(
            f"On {run.environment['device']}, {run.environment['cpu_count']} cores; "
            f"{', '.join(f'{name} {versions.get(name)}' for name in kept)}; "
            f"revision {run.environment.get('git_revision') or 'unknown'}."
        )
    command = record["command"] or ["python", "-m", "eval", "study", "commands", SOURCE]
    return [
        *lines,
        f"Made by `{shlex.join(command)}`; the study's file and its resolved recipe lie beside this report.",
    ]


def mean_spread(values: Sequence[float], most: int = 4) -> str:
    """`4.313 ± 0.021`: mean and standard deviation, to two digits of that and `most` decimals; a dash for no value."""
    if not values:
        return "-"
    spread = stdev(values) if len(values) > 1 else None
    digits = decimals(spread, most)
    return f"{fmean(values):.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _interval(ends: tuple[float, float] | None, digits: int) -> str:
    return "-" if ends is None else f"{ends[0]:+.{digits}f} to {ends[1]:+.{digits}f}"


def _tuned(group: Group, rate: float, loss: float | None) -> str:
    if loss is not None:
        return f"{loss:.3f}{' *' if rate == group.learning_rate else ''}"
    states = {each.state for each in group.tuning.get(rate, [])}
    return next((state for state in (DIVERGED, FAILED) if state in states), "-")
