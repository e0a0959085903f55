"""The findings of a study as tables, rows and sentences: verdicts first, then the numbers they rest on."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from statistics import fmean, stdev
from typing import Any

from hf_ibnorm.base.files import sha256
from hf_ibnorm.report.runs import Run
from hf_ibnorm.report.tables import Table, decimals, number_cell

from ..statistics import BOOTSTRAP_FROM, TEST_FROM
from .folder import SOURCE, Folder
from .plan import VALIDATION, Study
from .results import HASHES, REFUSED, VERDICTS
from .training import DIVERGED, FAILED, Group


def verdict_table(groups: Sequence[Group], metric: str) -> Table:
    """The norms, a row each: verdict, metric, difference, interval, p, the least difference that could be seen."""
    most = max((group.paired.n for group in groups if group.paired), default=0)
    columns = [metric, "difference", "95 % interval", "p, corrected", "could be seen"]
    columns += ["sign test"] * (most >= TEST_FROM) + ["bootstrap"] * (most >= BOOTSTRAP_FROM)
    table = Table(["norm", "verdict", *columns, "learning rate"], text=2)
    for group in groups:
        cells = [mean_spread(group.values(metric).values()), *_statistics(group)][: len(columns)]
        cells += [""] * (len(columns) - len(cells))
        table.rows.append([group.label, verdict_text(group), *cells, number_cell(group.learning_rate, "g")])
    return table


def _statistics(group: Group) -> list[str]:
    """The cells of `verdict_table` on the differences from the baseline; none for a norm without differences."""
    paired = group.paired
    if paired is None:
        return []
    digits = decimals(stdev(group.differences) / math.sqrt(paired.n) if paired.n > 1 else None)

    def interval(ends: tuple[float, float] | None) -> str:
        return "-" if ends is None else f"{ends[0]:+.{digits}f} to {ends[1]:+.{digits}f}"

    return [
        f"{paired.mean:+.{digits}f}",
        interval(paired.interval),
        number_cell(group.adjusted, ".2g"),
        number_cell(paired.detectable, f".{digits}f"),
        number_cell(paired.sign_p, ".2g"),
        interval(paired.bootstrap),
    ]


def verdict_text(group: Group) -> str:
    """A verdict, with the number of seeds that diverged, or the pairs that were refused."""
    if group.verdict == DIVERGED and group.finals:
        count = sum(training.state == DIVERGED for training in group.finals.values())
        return f"{DIVERGED} ({count} of {len(group.finals)} seeds)"
    if group.verdict == REFUSED:
        return f"{REFUSED} ({', '.join(group.refused)})"
    return group.verdict


def cost_table(groups: Sequence[Group], metric: str) -> Table:
    """The cost of the quality: parameters, floating point operations, time."""
    names = ["norm", metric, "parameters", "10¹² FLOPs", "tokens", "seconds", "seconds per step (fastest tenth)"]
    table = Table([*names, "trainings to tune"])
    for group in groups:
        if runs := group.runs():
            environment, tokens = runs[0].environment, runs[0].metrics[-1]["tokens"]
            flops = environment["flops_per_token"]
            row = [
                group.label,
                mean_spread(group.values(metric).values()),
                f"{environment['parameters']:,}",
                number_cell(flops and flops * tokens / 1e12, ",.1f"),
                f"{tokens:,}",
                mean_spread([run.seconds() for run in runs], 0),
                mean_spread([run.seconds_per_step() for run in runs], 3),
                str(sum(map(len, group.tuning.values())) or "search"),
            ]
            table.rows.append(row)
    return table


def tuning_table(groups: Sequence[Group]) -> Table:
    """Validation loss at every learning rate of the grid; the least one is marked."""
    rates = sorted({rate for group in groups for rate in group.tuning})
    rows = [[group.label, *(_tuned_text(group, rate) for rate in rates)] for group in groups if group.tuning]
    return Table(["norm", *(f"{rate:g}" for rate in rates)], rows)


def _tuned_text(group: Group, rate: float) -> str:
    if (loss := group.tuned().get(rate)) is not None:
        return f"{loss:.3f}{' *' if rate == group.learning_rate else ''}"
    return next((state for state in (DIVERGED, FAILED) if state in group.tuning_states(rate)), "-")


def benchmark_table(groups: Sequence[Group]) -> Table:
    """Every benchmark of the suites, mean ± standard deviation over seeds."""
    scored = [group for group in groups if any(training.scores for training in group.finals.values())]
    names = dict.fromkeys(name for group in scored for training in group.finals.values() for name in training.scores)
    metrics = [*names, VALIDATION]
    rows = [[group.label, *(mean_spread(group.values(name).values()) for name in metrics)] for group in scored]
    return Table(["norm", *names, "validation loss"], rows)


def failure_table(groups: Sequence[Group]) -> Table:
    """Trainings that failed or diverged, tuning included, and refused pairs."""
    rows = []
    for group in groups:
        for cell, training in group.cells().items():
            if training.state in (FAILED, DIVERGED) or training.problem:
                rows.append([str(cell), training.state, training.problem])
    rows += [[f"{group.label}, {pair}", "pair refused", why] for group in groups for pair, why in group.refused.items()]
    return Table(["training", "what", "why"], rows, text=3)


def cell_rows(groups: Sequence[Group], metric: str) -> list[dict[str, Any]]:
    """Every training of the study, as rows of `cells.csv`."""
    rows = []
    for group in groups:
        for cell, training in group.cells().items():
            run, compared = training.run, group.is_compared(cell)
            row = {
                "condition": cell.condition,
                "norm": cell.arm,
                "learning_rate": cell.learning_rate,
                "seed": cell.seed,
                "compared": compared,
                "state": training.state,
                "eval_loss": training.validation,
                "metric": training.value(metric) if compared else None,
                "steps": run and run.metrics[-1]["step"],
                "tokens": run and run.metrics[-1]["tokens"],
                "seconds": run and round(run.seconds(), 1),
                "init_sha": run and run.environment["init_sha"][:16],
                "batches_sha": run and sha256(step["batch_sha"] for step in run.metrics)[:16],
            }
            rows.append(row)
    return rows


def verdict_sentences(groups: Sequence[Group], baseline: str) -> list[str]:
    """The verdicts, a sentence for each condition."""
    lines = []
    for condition in dict.fromkeys(group.condition for group in groups):
        here = [group for group in groups if group.condition == condition and group.arm.name != baseline]
        names = {kind: ", ".join(group.arm.name for group in here if group.verdict == kind) for kind in VERDICTS}
        listed = "; ".join(f"{kind}: {norms}" for kind, norms in names.items() if norms)
        verdicts = f"Against {baseline} - {listed}." if listed else f"Nothing is compared with {baseline}."
        lines.append(f"{condition}: {verdicts}" if condition else verdicts)
    return lines


def equality_sentences(folder: Folder, groups: Sequence[Group], metric: str) -> list[str]:
    """Sentences on the conditions that all norms had in common, as far as files show them, and on the differences."""
    study, lines = folder.study, []
    runs = [run for group in groups for run in group.runs()]
    if pairs := sum(len(group.differences) for group in groups):
        paired = [run for group in groups if group.differences for run in group.runs()]
        unknown = [title for name, title in HASHES.items() if any(run.environment.get(name) is None for run in paired)]
        same = [title for title in HASHES.values() if title not in unknown]
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
            settings = ", ".join(f"{name} = {value}" for name, value in arm.settings.items())
            lines.append(f"NOTE: on purpose, {arm.name} has {settings}.")
    lines += _tuning_sentences(study, groups, metric)
    for search in study.searches:
        if winner := folder.winner(search.name):
            trials, others = len(winner["trials"]), len(study.learning_rates)
            lines.append(f"NOTE: {search.name} had {trials} trials, and other norms {others}.")
    if any(map(_draws_noise, runs)):
        lines.append("Noise is off in validation: models are in eval mode, which train_lm checks.")
        if study.suites and "noise" not in study.scoring.get("ignore", ()):
            lines.append("Noise is off in scoring: the doctor of `eval run` checks that logits repeat.")
    for name in ("versions", "device", "torch_threads", "norm_backend", "git_revision", "cpu_capability"):
        kinds = Counter(json.dumps(run.environment.get(name), sort_keys=True) for run in runs)
        if len(kinds) > 1:
            counts = "; ".join(f"{count} with {kind}" for kind, count in kinds.most_common())
            lines.append(f"NOTE: {name} is not the same for all trainings: {counts}.")
    for change in folder.record()["history"][1:]:
        lines.append(f"NOTE: the plan was changed at {change['date']}, after it began with {change['was']}.")
    return lines


def _draws_noise(run: Run) -> bool:
    """Whether a norm of a run's model draws noise in training; a norm that is not registered here is passed over."""
    from hf_ibnorm.norms import NORMS, build_norm

    known = [(name, options) for _, name, options in run.norms() if name in NORMS]
    return any(getattr(build_norm(name, 2, **options), "draws_noise", False) for name, options in known)


def _tuning_sentences(study: Study, groups: Sequence[Group], metric: str) -> list[str]:
    """How the learning rates were chosen."""
    lines = []
    grid = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    seeds = ", ".join(map(str, study.tuning_seeds))
    if tuned := [group.label for group in groups if group.tuning and group.tuning_ended]:
        who = "Every norm" if len(tuned) == len(groups) else ", ".join(tuned)
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
    several = [group for group in groups if len(group.tuning) > 1]
    if edge := [group.label for group in several if group.learning_rate in (min(group.tuning), max(group.tuning))]:
        lines.append(f"NOTE: the best learning rate is at the edge of the grid for {', '.join(edge)}.")
    return lines


def provenance(folder: Folder, groups: Sequence[Group]) -> list[str]:
    """Date, machine, versions, and the command that makes the report again."""
    record, threads = folder.record(), folder.study.threads
    lines = [f"Begun {record['history'][0]['date'][:10]}, trainings with {threads} thread{'s' * (threads > 1)} each."]
    if run := next((run for group in groups for run in group.runs()), None):
        environment = run.environment
        names = ("hf_ibnorm", "torch", "transformers", "accelerate", "lm_eval")
        versions = ", ".join(f"{name} {environment['versions'].get(name)}" for name in names)
        lines.append(
            f"On {environment['device']}, {environment['cpu_count']} cores; {versions}; "
            f"revision {environment.get('git_revision') or 'unknown'}."
        )
    command = shlex.join(record["command"] or ["python", "-m", "eval", "study", "commands", SOURCE])
    return [*lines, f"Made by `{command}`; the study's file and its resolved recipe lie beside this report."]


def mean_spread(values: Collection[float], most: int = 4) -> str:
    """`4.313 ± 0.021`: mean and standard deviation, to two digits of that and `most` decimals; a dash for no value."""
    if not values:
        return "-"
    spread = stdev(values) if len(values) > 1 else None
    digits = decimals(spread, most)
    return f"{fmean(values):.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
