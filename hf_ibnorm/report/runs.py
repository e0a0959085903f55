"""Training runs read back from disk, and set side by side."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base import layout
from ..base.errors import UserError
from ..base.reading import check_form, read_json, read_text, read_yaml, reading
from .tables import Table, score_cell

SKIPPED_SHARE = 0.25
"""A run fails when this share of its steps was skipped because loss or gradient was not finite."""
NORM_SETTINGS = tuple(f"model.{name}" for name in layout.NORM_FIELDS)
"""Settings of a run that say which norms its model has."""


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings on one level: those of the model as `model.name`."""
    flat = {**config, **{f"model.{name}": value for name, value in config["model"].items()}}
    del flat["model"]
    return flat


def differing_settings(settings: Sequence[Mapping[str, Any]], free: Iterable[str]) -> dict[str, list[Any]]:
    """The settings, on one level, that differ between runs: name → the value in each run, None where a run lacks it.

    The names are sorted; settings in `free` may differ, and are left out.
    """
    names = sorted(set().union(*settings).difference(free))
    values = {name: [of_run.get(name) for of_run in settings] for name in names}
    return {name: in_runs for name, in_runs in values.items() if any(value != in_runs[0] for value in in_runs)}


@dataclass(frozen=True)
class Run:
    """A training run as its directory describes it; `scores` is None where `scores/scores.json` is missing."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    scores: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path, finished: bool = True) -> "Run":
        """Read the run in `path`.

        Args:
            path: run directory of train_lm.
            finished: whether the run must be finished. If not, a last line of `metrics.jsonl` that is being written is
                left out.

        Raises:
            UserError, ValueError: `path` is no run directory, or no finished one, or a file in it is damaged; the
                message names it.
        """
        for name in (layout.CONFIG, layout.ENVIRONMENT, layout.METRICS, *([layout.FINAL] if finished else [])):
            if not (path / name).exists():
                kind = "a finished run directory" if finished else "a run directory"
                raise ValueError(f"run: {path} is not {kind} (it has no {name})")
        metrics = _rows(path / layout.METRICS, finished)
        if not metrics and not finished:
            raise ValueError(f"run: {path / layout.METRICS} has no step yet")
        if finished and (not metrics or metrics[-1].get("eval_loss") is None):
            raise ValueError(f"run: {path / layout.METRICS} does not end with a validated step")
        config = read_yaml("run", path / layout.CONFIG, layout.RUN_CONFIG_FORM)
        for override in config["model"].get("norm_overrides") or []:
            where = f"run: {path / layout.CONFIG}: norm_overrides"
            if not isinstance(override, list) or len(override) != 2:
                raise UserError(f"{where}: got {override!r}, must be [glob, norm]")
            check_form(f"{where}: {override[0]}", override[1], layout.RUN_NORM_FORM)
        environment = read_json("run", path / layout.ENVIRONMENT, layout.RUN_ENVIRONMENT_FORM)
        folder = path / layout.SCORES_FOLDER
        scores = read_scores(folder) if (folder / layout.SCORES).exists() else None
        return cls(path.name, config, environment, metrics, scores)

    def norms(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Glob, name and options: of the norm of all sites, whose glob is "", and of every override."""
        model = self.config["model"]
        overrides = [(glob, norm["type"], norm["kwargs"]) for glob, norm in model.get("norm_overrides") or []]
        return [("", model["norm_type"], model["norm_kwargs"]), *overrides]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Step and value of a column of `metrics.jsonl`, where it has one: a skipped step may have no loss."""
        return [(row["step"], row[name]) for row in self.metrics if row.get(name) is not None]

    def step_seconds(self) -> list[float]:
        """Seconds of each step, validation not counted."""
        before = [0, *(row["tokens"] for row in self.metrics)]
        return [
            (row["tokens"] - start) / row["tokens_per_second"] for start, row in zip(before, self.metrics, strict=False)
        ]

    def seconds(self) -> float:
        """Seconds of all steps together, validation not counted."""
        return math.fsum(self.step_seconds())

    def seconds_per_step(self) -> float:
        """First decile of the seconds of the steps, validation not counted.

        Other work on the machine can only slow a step down: from one hour to the next the median moves by several
        percent, and the fast steps hardly move.
        """
        seconds = sorted(self.step_seconds())
        return seconds[len(seconds) // 10]


def differing_in_runs(runs: Sequence[Run], free: Iterable[str]) -> dict[str, list[Any]]:
    """`differing_settings` of runs, with the number of `processes`; settings that a run notes as harmless are free."""
    harmless = {name for run in runs for name in run.environment.get("harmless_settings", ())}
    settings = [{**flat_settings(run.config), "processes": run.environment.get("num_processes")} for run in runs]
    return differing_settings(settings, {*free, *harmless})


def read_scores(folder: Path) -> dict[str, Any]:
    """The content of `scores.json` in the folder that `python -m eval run --output` wrote.

    Raises:
        UserError, ValueError: there is no such file, or it is damaged; the message names it.
    """
    path = folder / layout.SCORES
    if not path.is_file():
        raise ValueError(f"scores: {folder} has no {layout.SCORES}")
    return read_json("scores", path, layout.SCORES_FORM)


def _rows(path: Path, finished: bool) -> list[dict[str, Any]]:
    lines = read_text("run", path).splitlines(keepends=True)
    if not finished and lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        with reading("run", f"{where},"):
            rows.append(json.loads(line))
        check_form(f"run: {where}", rows[-1], layout.RUN_STEP_FORM)
        if rows[-1]["tokens_per_second"] <= 0:
            raise UserError(f"run: {where}: tokens_per_second: got 0 or less, must be more")
    return rows


def labels(runs: Sequence[Run]) -> list[str]:
    """A label for each run: its norms with their λ, and the directory's name where two runs share these.

    λ is the option that can be ramped; a norm that is not registered here is named without it.
    """
    from ..norms import NORMS

    norms = []
    for run in runs:
        texts = []
        for glob, name, options in run.norms():
            lam = options.get(str(NORMS[name].contract.ramp)) if name in NORMS else None
            shown = f" λ={lam:g}" if isinstance(lam, int | float) else ""
            texts.append(f"{glob and glob + ': '}{name}{shown}")
        norms.append(", ".join(texts))
    count = Counter(norms)
    return [label if count[label] == 1 else f"{label} ({run.name})" for label, run in zip(norms, runs, strict=True)]


def comparison(runs: Sequence[Run]) -> Table:
    """Runs as columns: scores on the test set first, then the cost of training, then the tasks."""
    table = Table(["", *labels(runs)])
    scored = [run.scores["benchmarks"] if run.scores else {} for run in runs]
    names = list(dict.fromkeys(name for scores in scored for name in scores))

    def add_scores(rolling: bool, title: str) -> None:
        for name in names:
            rows = [scores.get(name) for scores in scored]
            if any(row and (row["details"]["metric"] == "bits_per_byte") == rolling for row in rows):
                table.rows.append([title.format(name=name), *(score_cell(row) if row else "-" for row in rows)])

    add_scores(True, "{name}, bits per byte (lower is better)")
    table.rows += [
        ["parameters", *(f"{run.environment['parameters']:,}" for run in runs)],
        ["tokens trained on", *(f"{run.metrics[-1]['tokens']:,}" for run in runs)],
        ["seconds per step (fastest tenth)", *(f"{run.seconds_per_step():.3f}" for run in runs)],
    ]
    add_scores(False, "{name}, accuracy")
    table.rows.append(["validation loss, nats per token", *(f"{run.metrics[-1]['eval_loss']:.3f}" for run in runs)])
    return table


def fairness(runs: Sequence[Run]) -> list[str]:
    """Sentences on the settings, data and initial values that the runs share; a difference is a WARNING."""
    lines = []
    starts = {run.environment["init_sha"] for run in runs}
    if len(starts) == 1:
        lines.append(f"Same initial values of every shared parameter: sha256 {starts.pop()[:16]}.")
    else:
        lines.append("WARNING: the runs did not start from the same values of their shared parameters.")
    orders = {tuple(row["batch_sha"] for row in run.metrics) for run in runs}
    if len(orders) == 1:
        lines.append(f"Same data in the same order: all {len(orders.pop())} batches have equal hashes.")
    else:
        lines.append("WARNING: the runs did not see the same batches in the same order.")
    if different := differing_in_runs(runs, NORM_SETTINGS):
        lines.append(f"WARNING: besides the norm the runs differ in {', '.join(different)}.")
    for run in runs:
        if run.scores is None:
            lines.append(f"WARNING: {run.name} has not been scored (python -m eval run ... --output RUN/scores).")
        elif run.scores["smoke"]:
            lines.append(f"WARNING: {run.name} was scored on part of the items only: SMOKE - not a leaderboard score.")
    seeds = {run.config["seed"] for run in runs}
    if len(seeds) == 1:
        lines.append(
            f"One seed ({seeds.pop()}) of a small model decides nothing: another seed or learning rate can move these "
            "numbers as much as the norm does."
        )
    return lines
