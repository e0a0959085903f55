"""Carrying a study out: searches, then the trainings that choose learning rates, then those that are compared."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from hf_ibnorm.base import layout
from hf_ibnorm.base.command import require_extra
from hf_ibnorm.base.errors import UserError
from hf_ibnorm.base.files import write_json
from hf_ibnorm.base.reading import read_json

from .folder import Folder, Job
from .jobs import Ending, Executor, outcome_of
from .plan import VALIDATION, Cell, Search
from .training import DIVERGED, TRAINED, read_training, with_scores

PRUNED = "pruned"
LOOK = 0.5
"""Seconds between two looks at a trial's validation losses."""


def run_study(folder: Folder, executor: Executor, say: Callable[[str], None]) -> list[str]:
    """Carry out all of a study that is not done, in a directory that this process has locked.

    `say` is given a line whenever a job ends. Returns a line for each job that failed; a training that diverged has not
    failed: that is a result.
    """
    running: dict[Future[Ending], Job] = {}
    tried: set[str] = set()
    failures: list[str] = []
    folder.note_running([])
    for search in folder.study.searches:
        try:
            run_search(folder, search, executor, say)
        except UserError as error:
            failures.append(str(error))
            say(str(error))
    while True:
        for job in folder.to_do().values():
            if job.name not in tried and executor.room():
                tried.add(job.name)
                running[executor.submit(job)] = job
        folder.note_running([job.name for job in running.values()])
        if not running:
            return failures
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            job = running.pop(future)
            line = result_line(folder, job, outcome_of(future, job))
            if line.startswith("failed"):
                failures.append(f"{job.name}: {line}")
            else:
                tried.discard(job.name)  # a training that tuned may be compared next, and has to be scored then
            ended, total = folder.counts()
            say(f"[{ended}/{total}] {job.name}: {line}")


def result_line(folder: Folder, job: Job, ending: Ending) -> str:
    """The result of a job, in a few words."""
    training = with_scores(read_training(job.folder, job.expected), job.folder, folder.study.suites)
    if training.state == DIVERGED:
        return f"diverged: {training.problem}"
    if ending.code or training.validation is None:
        return f"failed: {ending.line or training.problem}"
    value = training.value(folder.study.metric)
    scored = folder.study.metric != VALIDATION and value is not None
    metric = f", {folder.study.metric} {value:.4f}" if scored else ""
    minutes, seconds = divmod(round(ending.seconds), 60)
    duration = f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
    return f"validation {training.validation:.4f}{metric} ({duration})"


def run_search(folder: Folder, search: Search, executor: Executor, say: Callable[[str], None]) -> None:
    """Find a λ and a learning rate on the tuning seed, trial after trial, and write them into `winner.json`.

    λ is drawn by Optuna's TPE sampler on a logarithmic scale, the learning rate from the study's grid. Trials run one
    after another, so that the same study gives the same trials; at each validation a trial whose loss is not among
    the best `1/reduction` of the trials that came as far is stopped (Optuna's SuccessiveHalvingPruner). All trials have
    the schedule of a whole training. A search that was stopped goes on with the trial that was interrupted.

    Raises:
        UserError: Optuna is not installed, or a training failed.
    """
    place = folder.search_folder(search.name)
    if (place / layout.WINNER).exists():
        return
    require_extra("study", "optuna")
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place.mkdir(parents=True, exist_ok=True)
    pruner = optuna.pruners.SuccessiveHalvingPruner(reduction_factor=search.reduction)
    study = optuna.create_study(pruner=pruner)
    states = {TRAINED: TrialState.COMPLETE, PRUNED: TrialState.PRUNED}
    results = []
    for number in range(search.trials):
        # A sampler of its own for each trial: its draws depend on the earlier results alone, and the files of the
        # trials are all that a search has to remember.
        study.sampler = optuna.samplers.TPESampler(seed=1000 * folder.study.tuning_seeds[0] + number)
        path = place / f"trial-{number:03d}" / layout.TRIAL
        result = read_json("study", path, layout.TRIAL_FORM) if path.exists() else None
        if result:
            study.enqueue_trial({name: result[name] for name in ("lam", "learning_rate")})
        trial = study.ask()
        lam = trial.suggest_float("lam", *search.lam, log=True)
        rate = trial.suggest_categorical("learning_rate", list(folder.study.learning_rates))
        if result:
            _tell(trial, result["validated"])
        else:
            name = f"{search.name}, trial {number + 1} of {search.trials}, λ {lam:.4g}, learning rate {rate:g}"
            cell = Cell("", search.name, rate, folder.study.tuning_seeds[0])
            job = folder.training_job(cell, search.arm(lam), path.parent, name)
            result = {"lam": lam, "learning_rate": rate, **_carry_out(folder, job, executor, trial)}
            write_json(path, result)
            say(f"{name}: {result['state']}" + (f", validation {result['loss']:.4f}" if result["loss"] else ""))
        results.append(result)
        loss = result["loss"] if result["state"] == TRAINED else None
        study.tell(trial, loss, states.get(result["state"], TrialState.FAIL))
    trained = [result for result in results if result["state"] == TRAINED]
    best = min(trained, key=lambda result: result["loss"], default={})
    winner = {name: best.get(name) for name in ("lam", "learning_rate", "loss")}
    write_json(place / layout.WINNER, {**winner, "trials": results})
    outcome = f"λ {winner['lam']:.4g}, validation {winner['loss']:.4f}" if trained else "none, all diverged"
    say(f"{search.name}: best of {search.trials} trials: {outcome}")


def _carry_out(folder: Folder, job: Job, executor: Executor, trial: Any) -> dict[str, Any]:
    """Train one trial, to its end or until it is pruned: its state, last loss and validations."""
    future = executor.submit(job)
    folder.note_running([job.name])
    validated: list[tuple[int, float]] = []
    ended = pruned = False
    while not (ended or pruned):
        ended = bool(wait([future], timeout=LOOK).done)
        training = read_training(job.folder, job.expected)
        new = training.run.curve(VALIDATION)[len(validated) :] if training.run else []
        behind = _tell(trial, new)
        validated += new if behind is None else new[: behind + 1]
        pruned = behind is not None
    if pruned:
        executor.cancel(future)
        wait([future])
        return {"loss": validated[-1][1], "validated": validated, "state": PRUNED}
    ending = outcome_of(future, job)
    if training.state != DIVERGED and (ending.code or training.validation is None):
        raise UserError(f"search: {job.name}: {ending.line or training.problem}")
    return {"loss": training.validation, "validated": validated, "state": training.state}


def _tell(trial: Any, validated: Sequence[Sequence[float]]) -> int | None:
    """Report validations (step, loss) in their order; the index of the validation that prunes the trial, or None.

    The pruner is asked after each validation, even where the end of the trial is known: it judges later trials by the
    losses at which it was asked.
    """
    for i, (step, loss) in enumerate(validated):
        trial.report(loss, int(step))
        if trial.should_prune():
            return i
    return None
