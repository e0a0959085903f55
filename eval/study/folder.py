"""The directory of a study: its plan, the recipes that its trainings start from, and the jobs that are left."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from hf_ibnorm.base import layout
from hf_ibnorm.base.command import OneLineParser
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import alone_in, atomic_directory, check_new_directory, sha256, write_json, write_text
from hf_ibnorm.base.layout import SOURCE
from hf_ibnorm.base.reading import read_json, reading
from hf_ibnorm.swap.families import Family

from ..options import Settings, add_settings
from ..suites import SUITES, choose
from .plan import VALIDATION, Arm, Cell, Study, flag_words, slug, study_from
from .training import DIVERGED, UNFINISHED, Group, Training, read_training, scores_folder, with_scores


@dataclass(frozen=True)
class Command:
    """One program of a job; it has run where the file or folder `done` exists."""

    words: tuple[str, ...]
    done: Path


@dataclass(frozen=True)
class Job:
    """The programs that a cell still needs: its training, and the suites where it is compared.

    Args:
        name, folder: of the cell; the folder is absolute.
        commands: the programs, in their order.
        directory: where they are started, for paths in them may be relative.
        environment: variables that are set for them.
        expected: settings that tell the cell's run from others.
    """

    name: str
    folder: Path
    commands: tuple[Command, ...]
    directory: Path
    environment: Mapping[str, str]
    expected: Mapping[str, Any]


class Folder:
    """The directory `path` of a study, which `begin` makes."""

    def __init__(self, path: Path, study: Study) -> None:
        self.path, self.study = path, study
        self._ended: dict[Cell, Training] = {}

    @classmethod
    def begin(cls, study: Study, path: Path, command: Sequence[str]) -> "Folder":
        """Make the directory of a new study, or go on with the study in it.

        A study may get further norms, seeds, learning rates and suites. Those that it has may not change once a
        training has begun. The report names the `command` that carries the study out; an empty one leaves the command
        that was noted before.

        Raises:
            UserError: `path` holds something else, or another study; or the plan cannot be carried out.
        """
        check_suites(study)
        recipes = {condition: _resolved_recipe(study, condition) for condition in study.conditions}
        study = replace(study, baseline=study.baseline or _stock_norm(study, recipes))
        hashes = {condition: sha256([text]) for condition, text in recipes.items()}
        record = json.loads(json.dumps({"study": asdict(study), "recipes": hashes, "command": list(command)}))
        folder = cls(path, study)
        if (path / layout.PLAN).is_file():
            folder._go_on(record, recipes)
            return folder
        with bad_input(OSError):
            check_new_directory("output", path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_directory(path) as new:
                cls(new, study)._write({**record, "history": [_entry(record)]}, recipes)
        return folder

    def _go_on(self, record: dict[str, Any], recipes: Mapping[str, str]) -> None:
        """Write the plan of a study that was begun, where it has grown; UserError where it has changed."""
        before = self.record()
        for condition, text in recipes.items():
            file = self.recipe(condition)
            # An earlier release lacked some fields of today's; its recipe means their defaults.
            differs = before["recipes"].get(condition) != record["recipes"][condition] and file.is_file()
            if differs and _without_cells(_checked(str(file), {})) == text:
                before["recipes"][condition] = record["recipes"][condition]
        trained = any(self.path.glob(f"*/**/{layout.METRICS}"))
        if trained and (changed := _changed(before, record)):
            raise UserError(f"output: {self.path} holds a study with {changed[0]}; name a new directory")
        history, entry = before["history"] if trained else [], _entry(record)
        if not history or history[-1]["plan"] != entry["plan"]:
            history = [*history, entry | ({"was": _summary(before["study"])} if history else {})]
        record = {**record, "command": record["command"] or before["command"], "history": history}
        if record != before:
            with self.lock():
                self._write(record, recipes)

    def _write(self, record: dict[str, Any], recipes: Mapping[str, str]) -> None:
        """Write recipes, source and plan; the plan last, because a folder with one counts as a study."""
        (self.path / layout.RECIPES).mkdir(exist_ok=True)
        for condition, text in recipes.items():
            write_text(self.recipe(condition), text)
        write_text(self.path / SOURCE, self.study.source)
        write_json(self.path / layout.PLAN, record)

    @classmethod
    def open(cls, path: Path) -> "Folder":
        """The study in `path`, as it was last begun; UserError where there is none, or its file is damaged."""
        if not (path / layout.PLAN).is_file():
            raise UserError(f"study: {path} holds no study (it has no {layout.PLAN})")
        record = read_json("study", path / layout.PLAN, layout.PLAN_FORM)
        with reading("study", path / layout.PLAN):
            return cls(path, study_from(record["study"]))

    def record(self) -> dict[str, Any]:
        """The content of `study.json`; UserError where it is damaged."""
        return read_json("study", self.path / layout.PLAN, layout.PLAN_FORM)

    def lock(self) -> AbstractContextManager[None]:
        """Keep any other process from starting the study's trainings; UserError where another one does."""
        return alone_in(self.path, f"output: {self.path} is in use by another `study run`", timeout=2)

    def note_running(self, names: Sequence[str]) -> None:
        """Write down which jobs run now."""
        write_json(self.path / layout.RUNNING, names)

    def running(self) -> list[str] | None:
        """The jobs that run now, as they were noted last; None where no `study run` is at work."""
        try:
            with self.lock():
                return None
        except UserError:
            path = self.path / layout.RUNNING
            return read_json("study", path, layout.RUNNING_FORM) if path.exists() else []

    def recipe(self, condition: str) -> Path:
        """The file with the resolved recipe of a condition."""
        return self.path / layout.RECIPES / f"{slug(condition) or 'recipe'}.yaml"

    def search_folder(self, name: str) -> Path:
        """The folder of a search's trials."""
        return self.path / layout.SEARCHES / slug(name)

    def winner(self, name: str) -> dict[str, Any] | None:
        """{"lam", "learning_rate", ...} of a search, both None where every trial diverged; None until it has ended."""
        path = self.search_folder(name) / layout.WINNER
        return read_json("study", path, layout.WINNER_FORM) if path.exists() else None

    def groups(self) -> list[Group]:
        """Every norm under every condition, with its trainings as far as they have come."""
        study = self.study
        groups = []
        for condition in study.conditions:
            for arm in study.arms:
                rates = [rate * arm.learning_rate_scale for rate in study.learning_rates]
                tuning = {rate: self._trainings(condition, arm, rate, study.tuning_seeds) for rate in rates}
                groups.append(Group(condition, arm, tuning))
                groups[-1].learning_rate = groups[-1].best_rate()
            for search in study.searches:
                winner = self.winner(search.name)
                lam, rate = (winner["lam"], winner["learning_rate"]) if winner else (None, None)
                verdict = DIVERGED if winner and rate is None else UNFINISHED
                groups.append(Group(condition, search.arm(lam), {}, rate, verdict=verdict))
        for group in groups:
            if group.learning_rate is not None:
                group.finals = self._trainings(group.condition, group.arm, group.learning_rate, study.seeds)
        return groups

    def _trainings(self, condition: str, arm: Arm, rate: float, seeds: Iterable[int]) -> dict[int, Training]:
        """Seed → training, with its scores."""
        trainings = {}
        for seed in seeds:
            cell = Cell(condition, arm.name, rate, seed)
            folder = self.path / cell.folder
            training = self._ended.get(cell) or read_training(folder, identity(arm, cell))
            if training.ended:
                self._ended[cell] = training
            trainings[seed] = with_scores(training, folder, self.study.suites)
        return trainings

    def training_job(self, cell: Cell, arm: Arm, folder: Path, name: str, suites: Sequence[str] = ()) -> Job:
        """A training in `folder`, started from the working directory, and the scoring of its model on suites."""
        here, run_dir = Path.cwd(), folder / layout.CELL_RUN
        expected = identity(arm, cell)
        # A recipe may ask for push_to_hub: every training would go to the same repository.
        settings = {"run_dir": str(run_dir), "resume": "auto", "push_to_hub": None, **expected, **arm.flags()}
        starter = self.study.launcher or (sys.executable,)
        words = (*starter, "-m", "train_lm", "--config", str(self.recipe(cell.condition)), *flag_words(settings))
        commands = [Command(words, here / run_dir / layout.FINAL)]
        for suite in suites:
            scores = scores_folder(folder, suite)
            flags = {"model": str(run_dir), "suite": suite, "output": str(scores), **_scoring(self.study, suite)}
            words = (sys.executable, "-m", "eval", "run", *flag_words(flags))
            commands.append(Command(words, here / scores / layout.SCORES))
        environment = {"OMP_NUM_THREADS": str(self.study.threads)}
        return Job(name, here / folder, tuple(commands), here, environment, expected)

    def to_do(self) -> dict[str, Job]:
        """The jobs that can be done now, by the folder of their cell; first those that choose the learning rates."""
        tuning: dict[str, Job] = {}
        finals: dict[str, Job] = {}
        for group in self.groups():
            for cell, training in group.cells().items():
                compared = group.is_compared(cell)
                if not training.ended or (compared and training.unscored):
                    suites, jobs = (self.study.suites, finals) if compared else ((), tuning)
                    folder = self.path / cell.folder
                    jobs[str(cell.folder)] = self.training_job(cell, group.arm, folder, str(cell), suites)
        return tuning | finals

    def counts(self) -> tuple[int, int]:
        """Number of trainings that have ended, and are scored if they must be, and of all; trials of searches apart."""
        ended = total = 0
        for group in self.groups():
            for cell, training in group.cells().items():
                total += 1
                ended += training.ended and not (group.is_compared(cell) and training.unscored)
            if not group.tuning_ended:  # the other seeds follow
                total += len(set(self.study.seeds) - set(self.study.tuning_seeds))
        return ended, total


def identity(arm: Arm, cell: Cell) -> dict[str, Any]:
    """Settings that tell one training of a study from the others."""
    norm = {"model.norm_type": arm.norm, "model.norm_kwargs": dict(arm.kwargs)}
    return {"seed": cell.seed, "learning_rate": cell.learning_rate, **norm}


def check_suites(study: Study) -> None:
    """Raise UserError for a suite or flag of scoring that does not exist, or a metric that no suite has."""
    chosen = [choose(suite, _scoring(study, suite).get("include_path")) for suite in study.suites]
    names = [benchmark.name for benchmarks in chosen for benchmark in benchmarks]
    if study.metric not in (VALIDATION, *names):
        raise UserError(f"metric: got {study.metric!r}, must be {VALIDATION} or one of the suites': {', '.join(names)}")
    if study.metric in study.scoring.get("skip", ()):
        raise UserError(f"scoring: skip leaves out {study.metric}, which is the metric")
    parser = OneLineParser(prog="scoring")
    add_settings(parser)
    try:
        for suite in study.suites or ("",):
            flags = {"model": "", "suite": suite, **_scoring(study, suite)}
            settings = vars(parser.parse_args(flag_words(flags)))
            del settings["model"]
            if suite:
                Settings(**settings).benchmarks()
    except UserError as error:
        raise UserError(f"scoring: {error}") from error


def _scoring(study: Study, suite: str) -> dict[str, Any]:
    """The flags of `eval run` for a suite, lists with commas; a suite of ours needs no include_path."""
    return {
        name: ",".join(map(str, value)) if isinstance(value, list) else value
        for name, value in study.scoring.items()
        if name != "include_path" or suite not in SUITES
    }


def _resolved_recipe(study: Study, condition: str) -> str:
    """Every field of the recipe under a condition, by asking train_lm, which knows them."""
    shared = {**study.settings, **study.conditions[condition]}
    for arm in study.arms:
        if arm.settings or arm.overrides:  # norm and options were checked with the study's file
            _checked(study.recipe, {**shared, **arm.flags()})
    return _without_cells(_checked(study.recipe, shared))


def _without_cells(recipe: str) -> str:
    """A whole recipe without the fields that a study's cells set."""
    content = yaml.safe_load(recipe)
    for name in ("seed", "learning_rate"):
        del content[name]
    for name in layout.NORM_FIELDS:
        del content["model"][name]
    return yaml.safe_dump(content, sort_keys=False)


def _checked(recipe: str, settings: Mapping[str, Any]) -> str:
    """The whole recipe, as `train_lm --check` prints it."""
    code, output = ask(["train_lm", "--config", recipe, "--run_dir", "unused", *flag_words(settings), "--check"])
    if code:
        raise UserError(f"recipe: {(output.strip().splitlines() or ['train_lm failed'])[-1].removeprefix('error: ')}")
    return output


def ask(words: Sequence[str]) -> tuple[int, str]:
    """Exit code of one of the house's programs, and its output, or its errors where it failed."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    return done.returncode, done.stderr if done.returncode else done.stdout


def _stock_norm(study: Study, recipes: Mapping[str, str]) -> str:
    """The arm that is the norm of the stock model, such as RMSNorm for Llama; UserError without one."""
    model_type = yaml.safe_load(next(iter(recipes.values())))["model"]["model_type"]
    stock = Family(model_type).stream_norm
    for arm in study.arms:
        if arm.norm == stock:
            return arm.name
    named = f"{stock}, the norm of {model_type}," if stock else f"the norm of {model_type}, which has no name here,"
    raise UserError(f"baseline: is missing, and {named} is none of norms")


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Parts of a study that was begun which the new plan lacks, or has changed.

    Scoring may change: models that were scored in different ways are not compared, and a run with other settings does
    not go on in the same directory.
    """
    old, new = before["study"], now["study"]
    changed = [
        f"another recipe{f' under {condition}' if condition else ''}"
        for condition, recipe in before["recipes"].items()
        if now["recipes"].get(condition) != recipe
    ]
    changed += [f"other {name}" for name in ("baseline", "threads", "tuning_seeds", "metric") if old[name] != new[name]]
    for name in ("seeds", "learning_rates", "suites"):
        changed += [f"{name} {value}" for value in old[name] if value not in new[name]]
    for name, kind in (("arms", "norm"), ("searches", "search")):
        named = {entry["name"]: entry for entry in new[name]}
        changed += [f"another {kind} {entry['name']!r}" for entry in old[name] if named.get(entry["name"]) != entry]
    return changed


def _entry(record: Mapping[str, Any]) -> dict[str, str]:
    """A line of the plan's history; the recipe's path and the words about the study are no part of the plan."""
    plan = {name: value for name, value in record["study"].items() if name not in ("recipe", "source", "about")}
    text = json.dumps([plan, record["recipes"]], sort_keys=True)
    return {"plan": sha256([text]), "date": datetime.now(UTC).isoformat(timespec="seconds")}


def _summary(study: dict[str, Any]) -> str:
    rates = ", ".join(f"{rate:g}" for rate in study["learning_rates"])
    return f"{len(study['arms'])} norms, learning rates {rates}, seeds {', '.join(map(str, study['seeds']))}"
