"""Which runs the suite needs, and how they are scored: functions of rows, as `train.run` returns
them."""

import math
from statistics import fmean, median
from typing import NamedTuple

from scripts.suite.methods import METHODS, TRIALS

SEEDS = (0, 1, 2)
TUNED = "adamw"  # the method whose setting is chosen for each workload
SHARE = 0.75  # of the budget, within which the tuned method sets the target
TAU = 4  # the ratio to the fastest up to which a profile is integrated


class Task(NamedTuple):
    """A run: `setting` are a method's keyword arguments, as sorted pairs."""

    workload: str
    method: str
    seed: int
    setting: tuple = ()


def trials(workload):
    """The tasks among which the tuned method's setting is chosen."""
    settings = [tuple(sorted(setting.items())) for setting in TRIALS]
    return [Task(workload, TUNED, SEEDS[0], setting) for setting in settings]


def task_of(row):
    setting = tuple(sorted(row["setting"].items()))
    return Task(row["workload"], row["method"], row["seed"], setting)


def best(row, share=1.0):
    """The least score of a run within a share of its budget, from its first step on; a run that
    failed has the scores until then."""
    return min((x[2] for x in row["curve"][1:] if x[0] <= share * row["steps"]), default=math.inf)


def choice(rows, workload):
    """The setting of TRIALS whose run has the least score within SHARE of the budget: None while a
    trial is missing."""
    done, tasks = {task_of(row): row for row in rows}, trials(workload)
    if not all(task in done for task in tasks):
        return None
    return min(tasks, key=lambda task: best(done[task], SHARE)).setting


def setting_of(rows, workload, method):
    """A method's setting on a workload, as of a Task: None while the tuned method has none."""
    if method == TUNED:
        return choice(rows, workload)
    return tuple(sorted(METHODS[method].setting.items()))


def needed(rows, workloads, methods):
    """The tasks to run next, in their order: a tuned method's seeds follow from its trials."""
    done, tasks = {task_of(row) for row in rows}, []
    for workload in workloads:
        for method in methods:
            tasks += trials(workload) if method == TUNED else []
            setting = setting_of(rows, workload, method)
            if setting is not None:
                tasks += [Task(workload, method, seed, setting) for seed in SEEDS]
    return [task for task in dict.fromkeys(tasks) if task not in done]


def runs_of(rows, workload, method):
    """The rows of a method on a workload that count, one a seed: of the tuned method those with the
    chosen setting."""
    setting = setting_of(rows, workload, method)
    return [row for row in rows if task_of(row)[:2] == (workload, method)
            and task_of(row).setting == setting]  # fmt: skip


def target(rows, workload):
    """The score that the tuned method reaches within SHARE of the budget, the median of SEEDS: None
    while a run is missing."""
    runs = runs_of(rows, workload, TUNED)
    return median(best(row, SHARE) for row in runs) if len(runs) == len(SEEDS) else None


def steps_to(row, score):
    """The step of the first evaluation with this score or less; infinite if there is none."""
    return next((x[0] for x in row["curve"][1:] if x[2] <= score), math.inf)


def steps(rows, workload, method):
    """The steps to the target of each seed that has run; empty without a target."""
    score = target(rows, workload)
    runs = runs_of(rows, workload, method) if score is not None else []
    return [steps_to(row, score) for row in runs]


def medians(rows, workloads):
    """{method: {workload: steps}}: the medians over SEEDS, where all have run."""
    table = {}
    for method in METHODS:
        for workload in workloads:
            found = steps(rows, workload, method)
            if len(found) == len(SEEDS):
                table.setdefault(method, {})[workload] = median(found)
    return table


def in_seconds(table, costs):
    """`medians` times costs, {workload: {method: seconds of a step}}, where these are known."""
    return {method: {x: value * costs[x][method] for x, value in row.items()
                     if method in costs.get(x, ())}
            for method, row in table.items()}  # fmt: skip


def ratios(table, workloads):
    """{method: [its time over the fastest method's, of each workload]} of {method: {workload:
    time}}. Of methods with a time on all the workloads; empty for fewer than two."""
    whole = {method: row for method, row in table.items() if row.keys() >= set(workloads)}
    if len(whole) < 2 or not workloads:
        return {}
    fastest = {x: min(row[x] for row in whole.values()) for x in workloads}
    return {method: [row[x] / fastest[x] if row[x] < math.inf else math.inf for x in workloads]
            for method, row in whole.items()}  # fmt: skip


def profile_score(ratios):
    """The integral of the performance profile, the share of workloads with a ratio of tau or less,
    over tau from 1 to TAU, divided by TAU - 1: 1 for a method that is the fastest on all."""
    return fmean(max(0, TAU - x) / (TAU - 1) for x in ratios)


def calibrated(rows, workloads):
    """The setting of TRIALS with the least mean rank over the workloads, by the trials' least score
    within SHARE of the budget: the one setting of NAdamW. None while a trial is missing."""
    done, ranks = {task_of(row): row for row in rows}, {}
    for workload in workloads:
        tasks = trials(workload)
        if not all(task in done for task in tasks):
            return None
        scores = {task.setting: best(done[task], SHARE) for task in tasks}
        for setting, score in scores.items():
            rank = sum((x < score) + (x == score) / 2 for x in scores.values())
            ranks.setdefault(setting, []).append(rank)
    return dict(min(ranks, key=lambda setting: fmean(ranks[setting])))
