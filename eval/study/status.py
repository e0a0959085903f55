"""How far a study is."""

from collections import Counter

from hf_ibnorm.base.layout import TRIAL
from hf_ibnorm.report.tables import Table

from .folder import Folder
from .training import BEGUN, DIVERGED, FAILED, TRAINED, WAITING

SHOWN = 20


def print_status(folder: Folder) -> None:
    """Print how many trainings of each norm are in which state, what runs now, and what failed; UserError where a file
    of the study is damaged."""
    states = (TRAINED, DIVERGED, FAILED, BEGUN, WAITING)
    table = Table(["norm", "learning rate", *states, "scored"])
    problems = []
    for condition, arm in folder.groups():
        finals = folder.finals(condition, arm)
        trainings = folder.cells(condition, arm)
        counts = Counter(each.state for each in trainings.values())
        rate = folder.chosen(condition, arm)
        scored = sum(trainings[cell].state == TRAINED and not trainings[cell].unscored for cell in finals)
        name = f"{condition}: {arm.name}" if condition else arm.name
        row = [name, "to be chosen" if rate is None else f"{rate:g}", *(str(counts[state] or "") for state in states)]
        table.rows.append([*row, f"{scored} of {len(finals or folder.study.seeds)}" if folder.study.suites else ""])
        problems += [f"{each.state}: {cell}: {each.problem}" for cell, each in trainings.items() if each.problem]
    table.print()
    for line in problems[:SHOWN]:
        print(line)
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN} more")
    ended, total = folder.counts()
    print(f"{ended} of {total} trainings have ended")
    for search in folder.study.searches:
        done = len(list(folder.search_folder(search).glob(f"trial-*/{TRIAL}")))
        print(f"{search.name}: {done} of {search.trials} trials have ended")
    names = folder.running()
    print("no `study run` is at work here" if names is None else f"running now: {'; '.join(names) or 'nothing'}")
