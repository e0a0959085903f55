"""Carrying a study out: searches, then what chooses the learning rates, then what is compared."""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait

from hf_ibnorm.base.errors import UserError

from .folder import Folder
from .jobs import Ending, Executor, Job, outcome_of
from .plan import VALIDATION
from .search import run_search
from .training import DIVERGED, read_training, with_scores


def run_study(folder: Folder, executor: Executor, say: Callable[[str], None]) -> list[str]:
    """Carry out all of a study that is not done; what is done stays as it is.

    Args:
        folder: the study's directory, which this process has locked.
        executor: carries out the jobs.
        say: is given a line whenever a job ends.

    Returns:
        A line for each job that failed. A training that diverged has not failed: that is a result.
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
            folder.note_running([job.name for job in running.values()])
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
