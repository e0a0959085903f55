"""Searching λ by successive halving with Optuna: trainings that are behind at a validation are stopped there."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ibnorm.cli import UserError, require_extra
from hf_ibnorm.files import write_json

from .folder import DIVERGED, TRAINED, Folder, Training, read_training, searched_arm
from .plan import VALIDATION, Search

if TYPE_CHECKING:
    from .run import Executor

LOOK = 0.5
"""Seconds between two looks at a trial's validation losses."""


def run_search(folder: Folder, search: Search, executor: "Executor", say: Callable[[str], None]) -> None:
    """Find a λ and a learning rate on the tuning seed, trial after trial, and write them into `winner.json`.

    λ is drawn by Optuna's TPE sampler on a logarithmic scale, the learning rate from the study's grid. Trials run one
    after another, so that the same study gives the same trials; at each validation a trial whose loss is not among
    the best `1/reduction` of those that came as far is stopped (Optuna's SuccessiveHalvingPruner). All trials have the
    schedule of a whole training. A search that was stopped goes on with the trial that was interrupted.

    Raises:
        UserError: Optuna is not installed, a training failed, or every one diverged.
    """
    place = folder.search_folder(search)
    if (place / "winner.json").exists():
        return
    require_extra("study", "optuna")
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place.mkdir(parents=True, exist_ok=True)
    begun = sorted(place.glob("trial-*/result.json"))
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=folder.study.tuning_seeds[0]),
        pruner=optuna.pruners.SuccessiveHalvingPruner(reduction_factor=search.reduction),
    )
    # The trials' own files are the record: told again in their order, they leave the sampler where it was.
    for number in range(search.trials):
        trial = study.ask()
        lam = trial.suggest_float("lam", *search.lam, log=True)
        rate = trial.suggest_categorical("learning_rate", list(folder.study.learning_rates))
        where = place / f"trial-{number:03d}"
        name = f"{search.name}, trial {number + 1} of {search.trials}, λ {lam:.4g}, learning rate {rate:g}"
        if where / "result.json" in begun:
            result = json.loads((where / "result.json").read_text(encoding="utf-8"))
            _tell(trial, result["validated"])
        else:
            result = _carry_out(folder, search, executor, trial, lam, rate, where, name)
            write_json(where / "result.json", {"lam": lam, "learning_rate": rate, **result})
            say(f"{name}: {result['state']}" + (f", validation {result['loss']:.4f}" if result["loss"] else ""))
        if result["state"] == TRAINED:
            study.tell(trial, result["loss"])
        else:
            study.tell(trial, state=TrialState.PRUNED if result["state"] == "pruned" else TrialState.FAIL)
    if not any(trial.state == TrialState.COMPLETE for trial in study.trials):
        raise UserError(
            f"search: {search.name}: every one of {search.trials} trials diverged; lower lam or learning_rates"
        )
    best = study.best_trial
    say(
        f"{search.name}: the best of {search.trials} trials has λ {best.params['lam']:.4g}, validation {best.value:.4f}"
    )
    write_json(
        place / "winner.json", {**best.params, "trial": best.number, "loss": best.value, "trials": _trials(place)}
    )


def _carry_out(
    folder: Folder, search: Search, executor: "Executor", trial: Any, lam: float, rate: float, where: Path, name: str
) -> dict[str, Any]:
    """Train one trial, to its end or until it is pruned."""
    seed = folder.study.tuning_seeds[0]
    command = folder.training_command("", searched_arm(search, lam), rate, seed, where / "run")
    future = executor.submit(folder.job_of(name, where, [command]))
    told: list[tuple[int, float]] = []
    pruned = False
    while not pruned:
        ended = bool(wait([future], timeout=LOOK).done)
        training = read_training(where)
        new = _validated(training)[len(told) :]
        behind = _tell(trial, new)
        told += new if behind is None else new[: behind + 1]
        pruned = behind is not None
        if ended:
            break
    if pruned:
        executor.cancel(future)
        wait([future])
        return {"state": "pruned", "loss": told[-1][1], "validated": told}
    ending = future.result()
    if training.state == DIVERGED:
        return {"state": DIVERGED, "loss": None, "validated": told}
    if ending.code:
        raise UserError(f"search: {name}: {ending.line}")
    return {"state": TRAINED, "loss": training.validation, "validated": told}


def _tell(trial: Any, validated: Sequence[Sequence[float]]) -> int | None:
    """Report validations in their order; the index of the one at which the trial is to be pruned.

    The pruner is asked after each, even of a trial whose end is known: what it saw is what it judges later ones by.
    """
    for i, (step, loss) in enumerate(validated):
        trial.report(loss, int(step))
        if trial.should_prune():
            return i
    return None


def _validated(training: Training) -> list[tuple[int, float]]:
    """Step and loss of every validation so far."""
    rows = training.run.metrics if training.run else []
    return [(row["step"], row[VALIDATION]) for row in rows if row.get(VALIDATION) is not None]


def _trials(place: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(place.glob("trial-*/result.json"))]
