"""The directory of a study: its plan, the recipes its trainings start from, and what is still to be done."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
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
from hf_ibnorm.swap.families import FAMILIES

from ..options import Settings, add_settings
from ..suites import SUITES, choose
from .plan import VALIDATION, Arm, Cell, Search, Study, flag_words, slug
from .training import Training, mean_losses, read_training, scores_folder, with_scores


@dataclass(frozen=True)
class Command:
    """One program of a job; it has run where the file or folder `done` exists."""

    words: tuple[str, ...]
    done: Path


@dataclass(frozen=True)
class Job:
    """What is still to be done for a cell: the training, and the suites if it is one that is compared.

    Args:
        name: the cell's.
        folder: where it lies, absolute.
        commands: what is to be run, one after the other.
        directory: where they are run: paths in them may be relative.
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
    """A study's directory.

    Args:
        path: the directory; made by `begin`.
        study: what is in it.
    """

    def __init__(self, path: Path, study: Study) -> None:
        self.path, self.study = path, study
        self._ended: dict[Cell, Training] = {}

    @classmethod
    def begin(cls, study: Study, path: Path, command: Sequence[str]) -> "Folder":
        """Make the directory of a new study, or go on with the one that is there.

        A study that was begun may get further norms, seeds, learning rates and suites; what it has may not change,
        unless nothing has been trained yet.

        Args:
            study: what to carry out.
            path: the directory.
            command: that carries it out, for the report; kept as it was where it is empty.

        Raises:
            UserError: `path` holds something else, or a study that is another one; or the study cannot be.
        """
        check_suites(study)
        recipes = {condition: _resolved_recipe(study, condition) for condition in study.conditions}
        study = replace(study, baseline=study.baseline or _stock_norm(study, recipes))
        hashes = {condition: sha256([text]) for condition, text in recipes.items()}
        record = json.loads(json.dumps({"study": study.content(), "recipes": hashes, "command": list(command)}))
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
        history = before["history"]
        if not any(self.path.glob(f"*/**/{layout.METRICS}")):
            history = []
        elif changed := _changed(before, record):
            raise UserError(f"output: {self.path} holds a study with {changed[0]}; name a new directory")
        entry = _entry(record)
        if not history or history[-1]["plan"] != entry["plan"]:
            history = [*history, {**entry, **({"was": _summary(before["study"])} if history else {})}]
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
        record = cls(path, None).record()  # type: ignore[arg-type]
        with reading("study", path / layout.PLAN):
            return cls(path, study_from(record["study"]))

    def record(self) -> dict[str, Any]:
        """The content of `study.json`; UserError where it is damaged."""
        record: dict[str, Any] = read_json("study", self.path / layout.PLAN, layout.PLAN_FORM)
        return record

    def lock(self) -> AbstractContextManager[None]:
        """Keep any other process from starting the study's trainings; UserError where another one does."""
        return alone_in(self.path, f"output: {self.path} is in use by another `study run`", timeout=2)

    def note_running(self, names: Sequence[str]) -> None:
        """Write down what runs now."""
        write_json(self.path / layout.RUNNING, names)

    def running(self) -> list[str] | None:
        """What runs now, as it was noted last; None where no `study run` is at work."""
        try:
            with self.lock():
                return None
        except UserError:
            path = self.path / layout.RUNNING
            return list(read_json("study", path, layout.RUNNING_FORM)) if path.exists() else []

    def recipe(self, condition: str) -> Path:
        """The resolved recipe of a condition."""
        return self.path / layout.RECIPES / f"{slug(condition) or 'recipe'}.yaml"

    def search_folder(self, search: Search) -> Path:
        """Where a search keeps its trials."""
        return self.path / layout.SEARCHES / slug(search.name)

    def winner(self, name: str) -> dict[str, Any] | None:
        """{"lam", "learning_rate", ...} of a search, both None where every trial diverged; None before it has ended."""
        search = next(each for each in self.study.searches if each.name == name)
        path = self.search_folder(search) / layout.WINNER
        return read_json("study", path, layout.WINNER_FORM) if path.exists() else None

    def is_searched(self, arm: Arm) -> bool:
        """Whether an arm comes from a search."""
        return arm.name in [search.name for search in self.study.searches]

    def arms(self) -> list[Arm]:
        """The study's arms, and those that come from a search: without λ until it is found."""
        searched = [(search, self.winner(search.name) or {}) for search in self.study.searches]
        return [*self.study.arms, *(searched_arm(search, winner.get("lam")) for search, winner in searched)]

    def groups(self) -> list[tuple[str, Arm]]:
        """Every (condition, arm)."""
        return [(condition, arm) for condition in self.study.conditions for arm in self.arms()]

    def tuning(self, condition: str, arm: Arm) -> list[Cell]:
        """The trainings that decide on an arm's learning rate; none for an arm that comes from a search."""
        return [] if self.is_searched(arm) else self.study.tuning_cells(condition, arm)

    def tried(self, condition: str, arm: Arm) -> dict[float, list[Training]]:
        """Learning rate → the trainings that decide on it, one a tuning seed."""
        trainings: dict[float, list[Training]] = {}
        for cell in self.tuning(condition, arm):
            trainings.setdefault(cell.learning_rate, []).append(self.training(cell, arm))
        return trainings

    def chosen(self, condition: str, arm: Arm) -> float | None:
        """The learning rate with the least mean validation loss over the tuning seeds; a diverged one is out.

        None while trainings are missing, or where every learning rate has a training that diverged.
        """
        if self.is_searched(arm):
            return (self.winner(arm.name) or {}).get("learning_rate")
        tried = self.tried(condition, arm)
        if not all(each.ended for trainings in tried.values() for each in trainings):
            return None
        means = {rate: loss for rate, loss in mean_losses(tried).items() if loss is not None}
        return min(means, key=means.__getitem__, default=None)

    def finals(self, condition: str, arm: Arm) -> list[Cell]:
        """The trainings that are compared; none while the learning rate is not known."""
        rate = self.chosen(condition, arm)
        return [] if rate is None else [Cell(condition, arm.name, rate, seed) for seed in self.study.seeds]

    def cells(self, condition: str, arm: Arm) -> dict[Cell, Training]:
        """All trainings of an arm that are known by now; one that both tunes and is compared is in it once."""
        cells = dict.fromkeys((*self.tuning(condition, arm), *self.finals(condition, arm)))
        return {cell: self.training(cell, arm) for cell in cells}

    def training(self, cell: Cell, arm: Arm) -> Training:
        """How far a cell is."""
        folder = self.path / cell.folder
        training = self._ended.get(cell) or read_training(folder, identity(arm, cell.learning_rate, cell.seed))
        if training.ended:
            self._ended[cell] = training
        return with_scores(training, folder, self.study.suites)

    def training_job(self, cell: Cell, arm: Arm, folder: Path, name: str, suites: Sequence[str] = ()) -> Job:
        """A training in `folder`, and suites that its model is scored on.

        It runs from here, with as many threads as the study says.
        """
        here, run_dir = Path.cwd(), folder / layout.CELL_RUN
        expected = identity(arm, cell.learning_rate, cell.seed)
        # A recipe may ask for push_to_hub: every training would go to the same repository.
        never = {"push_to_hub": None}
        settings = {"run_dir": str(run_dir), "resume": "auto", **never, **expected, **arm.flags()}
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

    def to_do(self) -> list[Job]:
        """What can be done now, in order: trainings that choose the learning rates first."""
        tuning: dict[Cell, Job] = {}
        finals: dict[Cell, Job] = {}
        for condition, arm in self.groups():
            for cell in self.tuning(condition, arm):
                if not self.training(cell, arm).ended:
                    tuning[cell] = self.training_job(cell, arm, self.path / cell.folder, str(cell))
            for cell in self.finals(condition, arm):
                training, suites = self.training(cell, arm), self.study.suites
                if not training.ended or training.unscored:
                    finals[cell] = self.training_job(cell, arm, self.path / cell.folder, str(cell), suites)
        return [*tuning.values(), *finals.values()]

    def counts(self) -> tuple[int, int]:
        """Trainings that have ended (and been scored if they are to be), and how many there will be; searches apart."""
        ended = total = 0
        for condition, arm in self.groups():
            tuning, finals = self.tuning(condition, arm), self.finals(condition, arm)
            ended += sum(self.training(cell, arm).ended for cell in tuning if cell not in finals)
            ended += sum((each := self.training(cell, arm)).ended and not each.unscored for cell in finals)
            if finals:
                total += len({*tuning, *finals})
            elif all(self.training(cell, arm).ended for cell in tuning):
                total += len(tuning)  # every learning rate diverged
            else:
                total += len(tuning) + len(set(self.study.seeds) - set(self.study.tuning_seeds))
        return ended, total


def identity(arm: Arm, learning_rate: float, seed: int) -> dict[str, Any]:
    """Settings that tell one training of a study from the others."""
    norm = {"model.norm_type": arm.norm, "model.norm_kwargs": dict(arm.kwargs)}
    return {"seed": seed, "learning_rate": learning_rate, **norm}


def searched_arm(search: Search, lam: float | None) -> Arm:
    """The arm of one λ of a search."""
    return Arm(search.name, search.norm, {**search.kwargs, **({} if lam is None else {"lam": lam})})


def check_suites(study: Study) -> None:
    """Raise UserError for a suite or flag of scoring that does not exist, or a metric that nothing gives."""
    names = [each.name for suite in study.suites for each in choose(suite, _scoring(study, suite).get("include_path"))]
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
        name: ",".join(map(str, each)) if isinstance(each, list) else each
        for name, each in study.scoring.items()
        if name != "include_path" or suite not in SUITES
    }


def _resolved_recipe(study: Study, condition: str) -> str:
    """Every field of the recipe under a condition, by asking train_lm, which knows them."""
    shared = {**study.settings, **study.conditions[condition]}
    for arm in study.arms:
        if arm.settings or arm.overrides:  # norm and options were checked with the study's file
            _checked(study.recipe, {**shared, **arm.flags()})
    content = yaml.safe_load(_checked(study.recipe, shared))
    for name in ("seed", "learning_rate"):
        del content[name]
    for name in ("norm_type", "norm_kwargs", "norm_overrides"):
        del content["model"][name]
    return yaml.safe_dump(content, sort_keys=False)


def _checked(recipe: str, settings: Mapping[str, Any]) -> str:
    """What `train_lm --check` prints: the whole recipe."""
    code, output = ask(["train_lm", "--config", recipe, "--run_dir", "unused", *flag_words(settings), "--check"])
    if code:
        raise UserError(f"recipe: {(output.strip().splitlines() or ['train_lm failed'])[-1].removeprefix('error: ')}")
    return output


def ask(words: Sequence[str]) -> tuple[int, str]:
    """Run one of the house's programs; its exit code, and its output, or its errors where it failed."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    return done.returncode, done.stderr if done.returncode else done.stdout


def _stock_norm(study: Study, recipes: Mapping[str, str]) -> str:
    """The arm that is the norm of the stock model: RMSNorm for Llama, LayerNorm for GPT-2; UserError without one."""
    model_type = yaml.safe_load(next(iter(recipes.values())))["model"]["model_type"]
    (stock,) = (each.pin.stock for each in FAMILIES if each.stock_model_type == model_type)
    for arm in study.arms:
        if arm.norm == stock:
            return arm.name
    raise UserError(f"baseline: is missing, and {stock}, the norm of {model_type}, is none of norms")


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Parts of a study that was begun which the new plan lacks, or has changed.

    Scoring may change: models that were scored in different ways are not compared, and a run with other settings does
    not go on in the same directory.
    """
    old, new = before["study"], now["study"]
    changed = [
        f"another recipe{f' under {name}' if name else ''}"
        for name, each in before["recipes"].items()
        if now["recipes"].get(name) != each
    ]
    changed += [f"other {name}" for name in ("baseline", "threads", "tuning_seeds", "metric") if old[name] != new[name]]
    for name in ("seeds", "learning_rates", "suites"):
        changed += [f"{name} {each}" for each in old[name] if each not in new[name]]
    for name, kind in (("arms", "norm"), ("searches", "search")):
        named = {each["name"]: each for each in new[name]}
        changed += [f"another {kind} {each['name']!r}" for each in old[name] if named.get(each["name"]) != each]
    return changed


def _entry(record: Mapping[str, Any]) -> dict[str, str]:
    """A line of the plan's history; the recipe's path and the words about the study are no part of the plan."""
    plan = {name: each for name, each in record["study"].items() if name not in ("recipe", "source", "about")}
    text = json.dumps([plan, record["recipes"]], sort_keys=True)
    return {"plan": sha256([text]), "date": datetime.now(UTC).isoformat(timespec="seconds")}


def _summary(study: dict[str, Any]) -> str:
    rates = ", ".join(f"{each:g}" for each in study["learning_rates"])
    return f"{len(study['arms'])} norms, learning rates {rates}, seeds {', '.join(map(str, study['seeds']))}"


def study_from(content: dict[str, Any]) -> Study:
    """A study from the plain data of `Study.content`."""

    def frozen(kind: Any, fields: Mapping[str, Any]) -> Any:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})

    parts = {"arms": Arm, "searches": Search}
    study: Study = frozen(
        Study, {**content, **{name: [frozen(kind, each) for each in content[name]] for name, kind in parts.items()}}
    )
    return study
