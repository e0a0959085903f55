"""The directory of a study: its plan, the recipes its trainings start from, and each training's state, read from the
files that the trainings themselves write."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from hf_ibnorm.cli import UserError, bad_input
from hf_ibnorm.files import atomic_directory, check_new_directory, environment_record, sha256, write_json, write_text
from hf_ibnorm.report.runs import Run

from ..harness import choose
from .plan import VALIDATION, Arm, Cell, Search, Study, flag_words, slug

PLAN = "study.json"
WAITING, BEGUN, FAILED, DIVERGED, TRAINED = "waiting", "begun", "failed", "diverged", "trained"


@dataclass(frozen=True)
class Command:
    """One program of a job; there is nothing to do where `done` exists."""

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
    """

    name: str
    folder: Path
    commands: tuple[Command, ...]
    directory: Path
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Training:
    """How far a cell is.

    Args:
        state: waiting, begun (running, or stopped on the way), failed, diverged or trained.
        run: what its run directory says; None where there is none yet, or too little in it.
        problem: of a failed or diverged one, in a line.
        scores: benchmark → its row of `scores.json`, over all suites.
        unscored: suites without scores.
        smoke: whether a suite was scored on part of the items only.
    """

    state: str
    run: Run | None = None
    problem: str = ""
    scores: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    unscored: tuple[str, ...] = ()
    smoke: bool = False

    @property
    def ended(self) -> bool:
        """Whether the training has come to its own end, good or bad."""
        return self.state in (TRAINED, DIVERGED)

    @property
    def validation(self) -> float | None:
        """Last validation loss in nats a token; None unless it was trained."""
        return self.run.metrics[-1][VALIDATION] if self.run and self.state == TRAINED else None

    def value(self, metric: str) -> float | None:
        """The metric that a study compares."""
        if self.state != TRAINED:
            return None
        return self.validation if metric == VALIDATION else self.scores.get(metric, {}).get("raw")


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
    def begin(cls, study: Study, path: Path) -> "Folder":
        """Make the directory of a new study, or go on with the one that is there.

        A study that was begun may get further norms, seeds, learning rates and suites; what it has may not change.

        Raises:
            UserError: `path` holds something else, or a study that is another one; or the recipe is wrong.
        """
        _check_suites(study)
        recipes = {condition: _resolved_recipe(study, condition) for condition in study.conditions}
        found = cls(path, study)
        record = {
            "study": study.content(),
            "recipes": {condition: sha256([text]) for condition, text in recipes.items()},
        }
        if not (path / PLAN).is_file():
            with bad_input(OSError):
                check_new_directory("output", path)
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_directory(path) as folder:
                    (folder / "recipes").mkdir()
                    for condition, text in recipes.items():
                        write_text(folder / found.recipe(condition).relative_to(path), text)
                    begun = {"plan": sha256([json.dumps(record, sort_keys=True)]), "date": _now()}
                    write_json(folder / PLAN, {**record, "history": [begun], "environment": environment_record()})
            return found
        before = found.record()
        now = json.loads(json.dumps(record))
        for part in _changed(before, now):
            raise UserError(f"output: {path} holds a study with {part}; name a new directory")
        plan = sha256([json.dumps(record, sort_keys=True)])
        if before["history"][-1]["plan"] != plan:
            history = [*before["history"], {"plan": plan, "date": _now(), "was": _summary(before["study"])}]
            with found.lock():
                for condition, text in recipes.items():
                    write_text(found.recipe(condition), text)
                write_json(path / PLAN, {**before, **record, "history": history})
        return found

    @classmethod
    def open(cls, path: Path) -> "Folder":
        """The study in `path`, as it was last begun.

        Raises:
            UserError: there is none, or its file is damaged.
        """
        if not (path / PLAN).is_file():
            raise UserError(f"study: {path} holds no study (it has no {PLAN})")
        folder = cls(path, None)  # type: ignore[arg-type]
        with bad_input(KeyError, TypeError, about=f"study: {path / PLAN} is damaged: "):
            folder.study = _study(folder.record()["study"])
        return folder

    def record(self) -> dict[str, Any]:
        """The content of `study.json`."""
        try:
            found: dict[str, Any] = json.loads((self.path / PLAN).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"study: {self.path / PLAN} is damaged: {error}") from error
        return found

    def lock(self) -> FileLock:
        """Held by the process that starts the study's trainings.

        Raises:
            UserError: another one holds it.
        """
        held = FileLock(self.path / ".lock", timeout=2)
        try:
            held.acquire()
        except Timeout:
            raise UserError(f"output: {self.path} is in use by another `study run`") from None
        return held

    def recipe(self, condition: str) -> Path:
        """The resolved recipe of a condition."""
        return self.path / "recipes" / f"{slug(condition) or 'recipe'}.yaml"

    @property
    def winners(self) -> dict[str, dict[str, Any]]:
        """What each search that has ended found: name → {"lam", "learning_rate", ...}."""
        found = {}
        for search in self.study.searches:
            path = self.search_folder(search) / "winner.json"
            if path.exists():
                found[search.name] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def search_folder(self, search: Search) -> Path:
        """Where a search keeps its trials."""
        return self.path / "search" / slug(search.name)

    def arms(self) -> list[Arm]:
        """The study's arms, and those that a search has found."""
        found = list(self.study.arms)
        for search in self.study.searches:
            if search.name in self.winners:
                found.append(searched_arm(search, self.winners[search.name]["lam"]))
        return found

    def groups(self) -> list[tuple[str, Arm]]:
        """Every (condition, arm)."""
        return [(condition, arm) for condition in self.study.conditions for arm in self.arms()]

    def tuning(self, condition: str, arm: Arm) -> list[Cell]:
        """The trainings that decide on an arm's learning rate; none for an arm that comes from a search."""
        return [] if arm.name in self.winners else self.study.tuning_cells(condition, arm)

    def chosen(self, condition: str, arm: Arm) -> float | None:
        """The learning rate with the least mean validation loss over the tuning seeds; a diverged one is out.

        None while trainings are missing, or where every learning rate has a training that diverged.
        """
        if arm.name in self.winners:
            return float(self.winners[arm.name]["learning_rate"])
        losses: dict[float, list[float | None]] = {}
        for cell in self.tuning(condition, arm):
            training = self.training(cell)
            if not training.ended:
                return None
            losses.setdefault(cell.learning_rate, []).append(training.validation)
        means = {rate: sum(each) / len(each) for rate, each in losses.items() if None not in each}  # type: ignore[arg-type]
        return min(means, key=means.__getitem__, default=None)

    def finals(self, condition: str, arm: Arm) -> list[Cell]:
        """The trainings that are compared; none while the learning rate is not known."""
        rate = self.chosen(condition, arm)
        return [] if rate is None else [Cell(condition, arm.name, rate, seed) for seed in self.study.seeds]

    def training(self, cell: Cell) -> Training:
        """How far a cell is."""
        folder = self.path / cell.folder
        found = self._ended.get(cell) or read_training(folder)
        if found.ended:
            self._ended[cell] = found
        return with_scores(found, folder, self.study.suites)

    def training_command(self, condition: str, arm: Arm, learning_rate: float, seed: int, run_dir: Path) -> Command:
        """What trains one cell."""
        settings = {
            "run_dir": str(run_dir),
            "resume": "auto",
            "seed": seed,
            "learning_rate": learning_rate,
            **arm.flags(),
        }
        starter = self.study.launcher or (sys.executable,)
        words = (*starter, "-m", "train_lm", "--config", str(self.recipe(condition)), *flag_words(settings))
        return Command(words, (run_dir / "final").absolute())

    def job(self, cell: Cell, compared: bool) -> Job:
        """What there is to do for a cell; the suites only if it is one that is compared."""
        arm = next(each for each in self.arms() if each.name == cell.arm)
        folder = self.path / cell.folder
        commands = [self.training_command(cell.condition, arm, cell.learning_rate, cell.seed, folder / "run")]
        for suite in self.study.suites if compared else ():
            scores = scores_folder(folder, suite)
            flags = {"model": str(folder / "run"), "suite": suite, "output": str(scores), **self.study.scoring}
            lists = {name: ",".join(each) if isinstance(each, list) else each for name, each in flags.items()}
            words = (sys.executable, "-m", "eval", "run", *flag_words(lists))
            commands.append(Command(words, (scores / "scores.json").absolute()))
        return self.job_of(str(cell), folder, commands)

    def job_of(self, name: str, folder: Path, commands: Sequence[Command]) -> Job:
        """A job that runs from here, with as many threads as the study says."""
        here = Path.cwd()
        return Job(name, here / folder, tuple(commands), here, {"OMP_NUM_THREADS": str(self.study.threads)})

    def to_do(self) -> list[Job]:
        """What can be done now, in order: trainings that choose the learning rates first."""
        tuning, finals = {}, {}
        for condition, arm in self.groups():
            for cell in self.tuning(condition, arm):
                if not self.training(cell).ended:
                    tuning[cell] = self.job(cell, compared=False)
            for cell in self.finals(condition, arm):
                training = self.training(cell)
                if not training.ended or training.unscored:
                    finals[cell] = self.job(cell, compared=True)
        return [*tuning.values(), *finals.values()]

    def counts(self) -> tuple[int, int]:
        """Trainings that have ended (and been scored, if they are to be), and how many there will be."""
        ended = total = 0
        for condition, arm in self.groups():
            tuning, finals = self.tuning(condition, arm), self.finals(condition, arm)
            ended += sum(self.training(cell).ended for cell in tuning if cell not in finals)
            ended += sum((each := self.training(cell)).ended and not each.unscored for cell in finals)
            if finals:
                total += len({*tuning, *finals})
            elif all(self.training(cell).ended for cell in tuning):
                total += len(tuning)  # every learning rate diverged
            else:
                total += len(tuning) + len(set(self.study.seeds) - set(self.study.tuning_seeds))
        return ended, total


def searched_arm(search: Search, lam: float) -> Arm:
    """The arm of one λ of a search."""
    return Arm(search.name, search.norm, {**search.kwargs, "lam": lam})


def scores_folder(folder: Path, suite: str) -> Path:
    """Where a cell keeps the scores of a suite."""
    return folder / "scores" / slug(suite)


def read_training(folder: Path) -> Training:
    """How far the cell in `folder` is, from what is on disk; its scores are not read."""
    run_dir = folder / "run"
    failure = folder / "failure.json"
    problem = json.loads(failure.read_text(encoding="utf-8"))["problem"] if failure.exists() else ""
    finished = (run_dir / "final").exists()
    try:
        run = Run.read(run_dir, finished)
    except ValueError as error:  # nothing there yet, or not enough, or damaged
        if finished:
            return Training(FAILED, None, problem or str(error))
        begun = (run_dir / "config.yaml").exists()
        return Training(FAILED if problem else BEGUN if begun else WAITING, None, problem)
    if reason := _divergence(run, finished):
        return Training(DIVERGED, run, reason)
    return Training(TRAINED if finished else FAILED if problem else BEGUN, run, problem)


def with_scores(training: Training, folder: Path, suites: Sequence[str]) -> Training:
    """The same with the scores there are."""
    if training.state != TRAINED:
        return training
    files = {suite: scores_folder(folder, suite) / "scores.json" for suite in suites}
    missing = tuple(suite for suite, path in files.items() if not path.exists())
    found = [json.loads(files[suite].read_text(encoding="utf-8")) for suite in suites if suite not in missing]
    rows = {name: row for each in found for name, row in each["benchmarks"].items()}
    return replace(training, scores=rows, unscored=missing, smoke=any(each["smoke"] for each in found))


def _divergence(run: Run, finished: bool) -> str:
    """Why a run counts as diverged, or nothing: it ended itself, or has learnt nothing by its end."""
    last = run.metrics[-1]
    lost = [name for name in ("loss", "grad_norm", VALIDATION) if last.get(name, 0.0) is None]
    given_up = last.get("skipped", 0) >= run.config["max_skipped_steps"] or VALIDATION in lost
    if not finished:
        return f"{lost[0]} not finite at step {last['step']}" if lost and given_up else ""
    guessing = math.log(run.config["model"]["vocab_size"])
    if last[VALIDATION] >= 0.99 * guessing:
        return f"learnt nothing: validation loss {last[VALIDATION]:.3f} at the end, guessing has {guessing:.3f}"
    return ""


def _check_suites(study: Study) -> None:
    """Raise UserError for a suite that does not exist, or a metric that none of them has."""
    names = [benchmark.name for suite in study.suites for benchmark in choose(suite)[1]]
    if study.metric not in (VALIDATION, *names):
        raise UserError(f"metric: got {study.metric!r}, must be {VALIDATION} or one of the suites': {', '.join(names)}")


def _resolved_recipe(study: Study, condition: str) -> str:
    """Every field of the recipe under a condition, by asking train_lm, which knows them."""
    settings = {**study.settings, **study.conditions[condition]}
    code, said = _ask(["train_lm", "--config", study.recipe, *flag_words(settings), "--print_config"])
    if code:
        raise UserError(f"recipe: {(said.strip().splitlines() or ['train_lm failed'])[-1].removeprefix('error: ')}")
    content = yaml.safe_load(said)
    for name in ("run_dir", "resume", "seed", "learning_rate"):
        del content[name]
    for name in ("norm_type", "norm_kwargs", "norm_overrides"):
        del content["model"][name]
    return yaml.safe_dump(content, sort_keys=False)


def _ask(words: Sequence[str]) -> tuple[int, str]:
    """Run one of the house's programs; its exit code, and what it printed, or complained about."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    return done.returncode, done.stderr if done.returncode else done.stdout


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a study that was begun has and the new plan has not, or has otherwise."""
    old, new = before["study"], now["study"]
    found = [
        f"another recipe{f' under {name}' if name else ''}"
        for name, each in before["recipes"].items()
        if now["recipes"].get(name) != each
    ]
    found += [
        f"other {name}"
        for name in ("baseline", "threads", "tuning_seeds", "metric", "scoring")
        if old[name] != new[name]
    ]
    for name in ("seeds", "learning_rates", "suites"):
        found += [f"{name} {each}" for each in old[name] if each not in new[name]]
    arms = {arm["name"]: arm for arm in new["arms"]}
    found += [f"another norm {arm['name']!r}" for arm in old["arms"] if arms.get(arm["name"]) != arm]
    searches = {search["name"]: search for search in new["searches"]}
    found += [f"another search {each['name']!r}" for each in old["searches"] if searches.get(each["name"]) != each]
    return found


def _summary(study: dict[str, Any]) -> str:
    return (
        f"{len(study['arms'])} norms, learning rates {', '.join(f'{each:g}' for each in study['learning_rates'])}, "
        f"seeds {', '.join(map(str, study['seeds']))}"
    )


def _study(content: dict[str, Any]) -> Study:
    """A study from the plain data of `Study.content`."""
    arms = tuple(Arm(**{**each, "overrides": tuple(each["overrides"])}) for each in content["arms"])
    searches = tuple(Search(**{**each, "lam": tuple(each["lam"])}) for each in content["searches"])
    lists = ("learning_rates", "tuning_seeds", "seeds", "suites", "launcher")
    return replace(
        Study(**{**content, "arms": arms, "searches": searches}), **{name: tuple(content[name]) for name in lists}
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
