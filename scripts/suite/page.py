"""The suite's page and picture, from its rows and the seconds of its steps alone."""

import math
from statistics import median

import matplotlib.pyplot as plt

from runs.files import write_whole
from scripts import style
from scripts.markdown import renew, table
from scripts.suite import protocol
from scripts.suite.methods import METHODS, TRIALS
from scripts.suite.train import CALIBRATION, EVALUATIONS, workload
from scripts.suite.workloads import NAMES
from scripts.words import number, rate_name, significant

MARKS = "<!-- rows: python -m scripts.suite --draw -->", "<!-- end of the rows -->"
UNITS = {"steps": "steps to the target", "seconds": "seconds to the target"}
GAP = 0.004  # between the lines of two methods, so that equal profiles are both seen
APART = f"<sub>Each line is drawn {GAP} above that of the method before it in the legend.</sub>"
RULES = f"""\
*The rules.* A run trains for the workload's budget of steps, from the start that the network's
library gives it: AGD, too, runs without the start that it documents for networks of one's own.
{len(protocol.SEEDS)} seeds draw weights and order; the data are the same in all runs. Each method
but AdamW has one setting on all workloads, NAdamW's calibrated here, the others' published by their
authors. AdamW has a warm-up of a twentieth of the budget and a cosine to 0. It is tuned for each
workload by {len(TRIALS)} trials with seed {protocol.SEEDS[0]}: each rate of {{rates}} with each
decay of {{decays}}. The trial with the least score within {protocol.SHARE:.0%} of the budget gives
the setting. The *target* is the least score that this setting reaches within
{protocol.SHARE:.0%} of the budget, the median of the seeds, seed {protocol.SEEDS[0]} being the
trial. NAdamW has the setting with the least mean rank in the trials of all workloads, by the same
score.

A run is evaluated {EVALUATIONS} times, at equal distances. A method that averages weights is
evaluated at the average, with batch norm's statistics taken from {CALIBRATION} batches. The *time*
to the target ends at the first evaluation with that score or less. A run without one has missed:
its time is infinite. A method's time on a workload is the median of its seeds. Seconds are steps
times the seconds of a step, without the evaluations: the CPU time of one thread, of all methods in
turns, by one process (`python -m scripts.suite --time`).

*The score.* A method's ratio on a workload is its time over the fastest method's. The performance
profile is the share of workloads with a ratio of τ or less. The score is the profile's mean over τ
from 1 to {protocol.TAU}: 1 for a method that is the fastest on all workloads, 0 for a method that
is never within {protocol.TAU} times."""


def outcome(row):
    """A run's least score, or why it failed."""
    return row["failed"] or f"least {number(protocol.best(row))}"


def setting_words(setting):
    """The setting of a trial in words."""
    return ", ".join(f"{name} {rate_name(value)}" for name, value in sorted(dict(setting).items()))


def cell(times, fastest, digits):
    """The median time of the seeds, bold where it is the fastest, and how many have missed;
    significant `digits`, or whole steps."""
    missed, time = times.count(math.inf), median(times)
    if time == math.inf:
        return "missed" if missed == len(times) else f"missed by {missed}"
    text = significant(time, digits) if digits else f"{time:g}"
    text = f"**{text}**" if time == fastest else text
    return f"{text} ({missed} missed)" if missed else text


def time_table(rows, workloads, methods, costs=None):
    """The times to the targets in Markdown, a line a workload, a column a method: in steps, or by
    `costs`, {workload: {method: seconds of a step}}, in seconds."""
    lines = []
    for name in workloads:
        found = {method: protocol.steps(rows, name, method) for method in methods}
        if costs is not None:
            own = costs.get(name, {})
            found = {x: [n * own[x] for n in steps] if x in own else []
                     for x, steps in found.items()}  # fmt: skip
        fastest = min((median(times) for times in found.values() if times), default=math.inf)
        digits = None if costs is None else 3
        lines.append([name, *(cell(x, fastest, digits) if x else "" for x in found.values())])
    return table(["", *(METHODS[x].title for x in methods)], lines)


def cost_table(costs, workloads, methods):
    """Milliseconds of a step in Markdown."""
    lines = [[name, *(significant(1000 * costs[name][x], 3) if x in costs[name] else ""
                      for x in methods)] for name in workloads if name in costs]  # fmt: skip
    return table(["", *(METHODS[x].title for x in methods)], lines)


def best_table(rows, workloads, methods):
    """The least scores within the budget in Markdown, medians of the seeds that have run."""
    lines = []
    for name in workloads:
        runs = [protocol.runs_of(rows, name, method) for method in methods]
        cells = [number(median(map(protocol.best, x))) if x else "" for x in runs]
        target = protocol.target(rows, name)
        lines.append([name, "" if target is None else number(target), *cells])
    return table(["", "target", *(METHODS[x].title for x in methods)], lines)


def all_ratios(rows, workloads, costs):
    """`protocol.ratios` in each of UNITS, of the same workloads."""
    table = protocol.medians(rows, workloads)
    tables = {"steps": table, "seconds": protocol.in_seconds(table, costs)}
    known = list(dict.fromkeys(x for row in table.values() for x in row))
    return {unit: protocol.ratios(tables[unit], known) for unit in UNITS}


def score_table(rows, workloads, methods, costs):
    """Scores, targets reached and runs of tuning in Markdown, the best score in steps first."""
    scores = {unit: {method: protocol.profile_score(x) for method, x in ratios.items()}
              for unit, ratios in all_ratios(rows, workloads, costs).items()}  # fmt: skip
    lines = []
    for method in sorted(methods, key=lambda x: -scores["steps"].get(x, -1)):
        times = [x for name in workloads for x in protocol.steps(rows, name, method)]
        reached = sum(x < math.inf for x in times)
        shown = [f"{scores[unit][method]:.3f}" if method in scores[unit] else "" for unit in UNITS]
        tuning = {protocol.TUNED: f"{len(TRIALS)} a workload",
                  "nadamw": f"{len(TRIALS) * len(workloads)} for all"}  # fmt: skip
        lines.append([METHODS[method].title, METHODS[method].words, tuning.get(method, "none"),
                      *shown, f"{reached} of {len(times)}" if times else ""])  # fmt: skip
    return table(["method", "setting", "runs of tuning", "score, steps", "score, seconds",
                  "runs at the target"], lines)  # fmt: skip


def workload_table(rows, workloads):
    lines = []
    for name in workloads:
        work, chosen = workload(name), protocol.choice(rows, name)
        start = median(row["curve"][0][2] for row in rows if row["workload"] == name)
        target = protocol.target(rows, name)
        steps = next(row["steps"] for row in rows if row["workload"] == name)
        lines.append([f"[{name}](../scripts/suite/workloads/{name}.py)",
                      work.__doc__.splitlines()[0].rstrip("."), work.METRIC, number(start),
                      "" if target is None else number(target), f"{steps:,} × {work.BATCH}",
                      setting_words(chosen) if chosen else ""])  # fmt: skip
    return table(["", "what", "score", "at the start", "target", "budget", "AdamW's setting"],
                 lines)  # fmt: skip


def made_with(rows, timed):
    """Dates, commits, versions and machines of the rows and of the seconds of steps."""
    made = [row["made"] for row in rows]

    def values(key):
        return ", ".join(sorted({str(x[key]) for x in made if x.get(key)}))

    names = ["python", "torch", "numpy", *(x.package for x in METHODS.values() if x.package)]
    versions = ", ".join(f"{x} {values(x)}" for x in dict.fromkeys(names) if values(x))
    days = sorted({row["date"] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    commits = ", ".join(sorted({str(x["commit"])[:7] for x in made}))
    machine = f"{values('device_name')}, one thread a run, other work on its cores"
    words = f"{len(rows)} runs, {when}, at {commits}; {versions}; {machine}."
    sittings = sorted({(x["date"], str(x["made"]["commit"])[:7], x["made"]["device_name"])
                       for x in timed.values()})  # fmt: skip
    if sittings:
        words += f" Steps timed {'; '.join('{}, at {}, {}'.format(*x) for x in sittings)}."
    return f"<sub>{words}</sub>"


def text(rows, workloads, methods, timed):
    """The text between the marks."""
    costs = {name: x["seconds"] for name, x in timed.items()}
    rates, decays = (dict.fromkeys(rate_name(setting[key]) for setting in TRIALS)
                     for key in ("rate", "decay"))  # fmt: skip
    missing = len(protocol.needed(rows, NAMES, METHODS))
    known = all_ratios(rows, NAMES, costs)["steps"]
    scored = "A method has a score once all its runs on the workloads below are there."
    parts = [f"At least {missing} runs are missing. {scored}"] if missing else []
    parts += [
        score_table(rows, workloads, methods, costs),
        *(["![Performance profiles](suite/profile.png)", APART] if known else []),
        RULES.format(rates=", ".join(rates), decays=" and ".join(decays)),
        "## The workloads", workload_table(rows, workloads),
        "## Steps to the target", time_table(rows, workloads, methods),
    ]  # fmt: skip
    if costs:
        parts += [
            "## Seconds to the target", time_table(rows, workloads, methods, costs),
            "## Milliseconds of a step", cost_table(costs, workloads, methods),
        ]  # fmt: skip
    parts += [
        "## The least score within the budget", best_table(rows, workloads, methods),
    ]  # fmt: skip
    failed = [row for row in rows if row["failed"]]
    if failed:
        parts.append("## Runs that failed")
        parts.append(table(["workload", "method", "setting", "seed", "why"], [
            [x["workload"], METHODS[x["method"]].title, setting_words(x["setting"]), x["seed"],
             x["failed"]] for x in failed]))  # fmt: skip
    return "\n\n".join([*parts, made_with(rows, timed)])


def look(method):
    """(colour, marker, line) of a method in the picture."""
    line = style.DASHED if method == protocol.TUNED else "-"
    return *style.OPTIMIZERS.get(METHODS[method].title, (style.GREY, "x")), line


def picture(rows, timed):
    """The performance profiles in steps and in seconds; None where nothing has a score."""
    ratios = all_ratios(rows, NAMES, {name: x["seconds"] for name, x in timed.items()})
    if not ratios["steps"]:
        return None
    workloads = next(iter(ratios["steps"].values()))
    with plt.style.context([style.STYLE]):
        figure, axes = plt.subplots(1, len(UNITS), figsize=(style.WIDTH, 2.9), sharey=True)
        for ax, (unit, label) in zip(axes, UNITS.items()):
            for i, (method, found) in enumerate(ratios[unit].items()):
                colour, marker, line = look(method)
                x = sorted({r for r in found if r <= protocol.TAU})
                above = i * GAP
                y = [sum(r <= t for r in found) / len(found) + above for t in x]
                ax.step([1, *x, protocol.TAU], [above, *y, y[-1] if y else above],
                        where="post", color=colour, linestyle=line)  # fmt: skip
                ax.plot(x, y, color=colour, linestyle="none", marker=marker, zorder=5,
                        markersize=3.6, markerfacecolor="white", clip_on=False)  # fmt: skip
            ax.set_xlim(1, protocol.TAU)
            ax.set_xlabel(f"τ: {label}, over the fastest")
        axes[0].set_ylim(0, 1.04)
        axes[0].set_ylabel(f"share of {len(workloads)} workloads")
        keys = [(METHODS[x].title, *look(x)) for x in ratios["steps"]]
        style.legend(figure, [
            style.key(title, colour, marker=marker, markersize=3.6, markerfacecolor="white",
                      linestyle=line)
            for title, colour, marker, line in keys], ncols=4)  # fmt: skip
    return figure


def write(out, rows, timed):
    """Write the page of these rows and of `Rows.timed`, and its picture, below `out`; returns the
    page, or None without rows. Text outside of the marks of an earlier page stays."""
    if not rows:
        return None
    workloads = [x for x in NAMES if any(row["workload"] == x for row in rows)]
    methods = [x for x in METHODS if any(row["method"] == x for row in rows)]
    image = out / "suite" / "profile.png"
    if drawn := picture(rows, timed):
        style.save(drawn, image)
    else:
        image.unlink(missing_ok=True)
    path = out / "suite.md"
    if not path.exists():
        write_whole(path, f"# Optimisers at one setting each\n\n{MARKS[0]}\n{MARKS[1]}\n")
    renew(path, *MARKS, text(rows, workloads, methods, timed))
    return path
