"""How far a study is."""

from collections import Counter

from hf_ibnorm.base.layout import TRIAL
from hf_ibnorm.report.tables import Table

from .folder import Folder
from .training import BEGUN, DIVERGED, FAILED, TRAINED, WAITING

SHOWN = 20


def print_status(folder: Folder) -> None:
    """Print how many trainings of each norm are in which state, which run now, and which failed; UserError where a file
    of the study is damaged."""
    study, states = folder.study, (TRAINED, DIVERGED, FAILED, BEGUN, WAITING)
    table = Table(["norm", "learning rate", *states, "scored"])
    problems = []
    for group in folder.groups():
        trainings = group.cells()
        counts = Counter(training.state for training in trainings.values())
        scored = sum(training.state == TRAINED and not training.unscored for training in group.finals.values())
        rate = "to be chosen" if group.learning_rate is None else f"{group.learning_rate:g}"
        row = [group.label, rate, *(str(counts[state] or "") for state in states)]
        table.rows.append([*row, f"{scored} of {len(group.finals or study.seeds)}" if study.suites else ""])
        for cell, training in trainings.items():
            if training.problem:
                problems.append(f"{training.state}: {cell}: {training.problem}")
    table.print()
    for line in problems[:SHOWN]:
        print(line)
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN} more")
    ended, total = folder.counts()
    print(f"{ended} of {total} trainings have ended")
    for search in study.searches:
        done = len(list(folder.search_folder(search.name).glob(f"trial-*/{TRIAL}")))
        print(f"{search.name}: {done} of {search.trials} trials have ended")
    names = folder.running()
    print("no `study run` is at work here" if names is None else f"running now: {'; '.join(names) or 'nothing'}")
