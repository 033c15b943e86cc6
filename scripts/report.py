"""`<out>/README.md`: the paper's numbers beside the runs that are there, and what is missing."""

from collections import Counter
from pathlib import Path

from runs.files import write_whole
from runs.log import RunError
from scripts import majorisation
from scripts.claims import CLAIMS, judge
from scripts.experiments import DEPTHS, FIGURES, PEERS, RULES, SCALES, WIDTHS
from scripts.figures import DRAWN
from scripts.markdown import table
from scripts.results import Results, common_epochs
from scripts.words import number, short_name

MADE = "Written by `python -m scripts.reproduce`"
INTRODUCTION = (
    f"{MADE}; nothing here was typed. A quick run is a beginning: the paper's numbers are those of "
    "1,000 to 2,000 epochs (ImageNet: 350), and a quick number beside one of them is not its "
    "reproduction. *JPEG CIFAR-10* is CIFAR-10 whose images were stored as JPEG of quality 75, "
    "which may move an accuracy by a point or two; *tiny100*, a hundred classes of Tiny ImageNet "
    "at 32 pixels, stands in for CIFAR-100, and its accuracies do not compare with that."
)
TUNED = (
    "Tuned means the least train loss (**bold**) over the grid, test accuracies unseen, in the "
    "last epoch that all runs have which did not break off. A run whose loss was no longer finite "
    "is kept as a failure."
)
# The paper's final test accuracies in %, by figure, panel and curve (its section 5 and captions),
# and the best rates of its grids.
PAPER = {
    ("fig1", "deep", "Adam"): "10", ("fig1", "deep", "SGD"): "10",
    ("fig4", "fcn", "AGD"): "52.7", ("fig4", "fcn", "Adam"): "53.5",
    ("fig4", "resnet18", "AGD"): "91.2", ("fig4", "resnet18", "Adam"): "92.9",
    ("fig4", "vgg", "AGD"): "67.4", ("fig4", "vgg", "Adam"): "69.7",
    ("fig4", "imagenet", "AGD"): "65.5",
    ("fig5", "fcn", "Adam"): "at 1e-4", ("fig5", "fcn", "SGD"): "at 1e-1",
    ("fig6", "2x64", "AGD"): "42.55", ("fig6", "4x2048", "AGD"): "63.7",
    ("fig7", "batch 32", "AGD"): "55.0", ("fig7", "batch 128", "AGD"): "58.0",
    ("fig7", "batch 1024", "AGD"): "60.0", ("fig7", "batch 4096", "AGD"): "59.8",
}  # fmt: skip


def page(out):
    """The path of the page under `out`. Raises RunError where the page there is somebody else's."""
    path = Path(out, "README.md")
    if path.exists() and MADE not in path.read_text(encoding="utf-8", errors="replace"):
        raise RunError(f"{path} is a page of somebody else's, and stays: choose another --out")
    return path


def write(out):
    """Write the page from the files under `out`; returns its path."""
    out, path = Path(out), page(out)
    scales = [results for results in (Results(out, scale) for scale in SCALES)
              if (results.folder / "logs").is_dir()]  # fmt: skip
    parts = ["# Results", INTRODUCTION, claims(scales)]
    for results in scales:
        parts.append(f"## Scale: {results.scale}")
        parts += [part(results) for part in (numbers, texts, sizes, searches, pictures, extent)]
    if (out / "measured" / "README.md").exists():
        parts.append("## More\n\n[Other runs and the benchmark](measured/README.md)")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n\n".join(filter(None, parts)) + "\n")
    return path


def claims(scales):
    """Each claim with its verdict at each scale, and what holding means."""
    rows = [[f"{claim.says}<br><sub>{claim.holds_if}</sub>"] for claim in CLAIMS]
    for results in scales:
        for row, claim in zip(rows, CLAIMS):
            verdict, words = judge(claim, results)
            row.append(f"**{verdict}**" + (f": {words}" if words else ""))
    words = ("The paper's, then two on a text. A quick verdict is one on the beginning of "
             "training. A verdict *so far* is one on runs that have not come to the paper's "
             "length: they are compared after as many epochs as all of them have. Accuracies at "
             "one train loss are from all epochs, those beyond that, too.")  # fmt: skip
    head = ["claim", *(results.scale for results in scales)]
    return f"## The claims\n\n{words}\n\n" + table(head, rows)


def in_numbers(figure, panel, curve):
    """Whether a curve gets a row. Figure 8's other runs are figure 5's, the rates of figure 1 stand
    with the searches."""
    return (
        (figure, panel, curve) in PAPER
        or figure in ("fig4", "fig5", "fig11", "phases")
        or (figure == "fig8" and curve in PEERS)
        or (figure == "fig1" and (panel != "rates" or curve in RULES))
    )


def numbers(results):
    """The paper's numbers, ours, and the hardware and commands behind ours."""
    head = ["", "paper, test %", "here, test %", "here, train %", "epochs", "made with", "command"]
    rows = []
    for key in dict.fromkeys(row[:3] for row in results.table):
        if not in_numbers(*key):
            continue
        (figure, panel, curve), planned, there = key, results.planned(*key), results.of(*key)
        what = f"{short_name(figure)}, {results.title(*key)}"
        what += f", {panel}, {curve}" if panel.startswith("batch") else f", {curve}"
        shown, paper = comparable(results, key, there), PAPER.get(key, "")
        if not shown:
            begun = f" ({len(there)} of {len(planned)} runs begun)" if there else ""
            rows.append([what, paper, "not run" + begun, *[""] * 4])
            continue
        rate, chosen = shown[0].experiment.flag("--lr"), results.searched_epochs(*key)
        rate = f" at {rate}" if rate else ""
        if rate and chosen < len(shown[0].epochs):
            rate += f", chosen after {chosen:,}"
        accuracies = [spread([100 * x.last[f"{kind}_acc"] for x in shown])
                      for kind in ("test", "train")]  # fmt: skip
        rows.append([what + rate, paper, *accuracies, length(shown[0]), *origin(shown)])
    return "### Numbers\n\n" + table(head, rows)


def comparable(results, key, there):
    """The runs behind a number: those of the tuned rate of a grid, or the equally long seeds."""
    if len({row.flag("--lr") for row in results.planned(*key)}) > 1:
        return results.tuned_seeds(*key)
    longest = max((len(x.epochs) for x in there), default=0)
    return [x for x in there if len(x.epochs) == longest or x.stopped]


def spread(values, form=".1f"):
    """The mean, and the range over more than one."""
    wide = f" ({min(values):{form}} to {max(values):{form}}, {len(values)} seeds)"
    return f"{sum(values) / len(values):{form}}" + (wide if len(values) > 1 else "")


def length(result):
    """The number of its epochs, and how many are planned."""
    done, planned = len(result.epochs), result.experiment.epochs
    if result.stopped:
        return f"stopped in {done}: {result.stopped.split(';')[0]}"
    return f"{done:,}" if done == planned else f"{done:,} of {planned:,}"


def made_with(first):
    """Hardware, version and date of a run, and of its resumptions elsewhere."""
    parts = [f"{hardware(first)}; {first['date'][:10]}"]
    for later in first.get("resumed", []):
        if {"device_name", "torch", "threads"} & set(later):
            parts.append(f"from epoch {later['after_epoch'] + 1} {hardware({**first, **later})}")
    return ", ".join(parts)


def hardware(first):
    words = [first["device_name"]]
    if not first["device"].startswith("cuda"):
        words += [f"{first['cores']} cores"] if "cores" in first else []
        words += [f"{first['threads']} thread{'s' if first['threads'] > 1 else ''} a run"]
    return ", ".join([*words, f"torch {first['torch']}"])


def outcome(*seeds, mark=True):
    """Train loss and test accuracy, of a text validation loss, means over the seeds; `mark`: the
    epochs of a run that is not finished."""
    broken, cut = next((x for x in seeds if x.stopped), None), ""
    if broken:
        return f"stopped in epoch {len(broken.epochs)}: {broken.stopped.split(' at ')[0]}"
    begun = next((x for x in seeds if not x.finished), None)
    if begun and mark:
        cut = f" ({length(begun)} epochs)"
    loss, test, acc = (sum(x) / len(seeds) for x in zip(
        *((x.loss, x.test_loss, x.last["test_acc"]) for x in seeds)))  # fmt: skip
    return f"{number(loss)}, {number(test) if seeds[0].is_text else f'{100 * acc:.1f} %'}{cut}"


def texts(results):
    """Figure 10 in numbers."""
    if not results.of("fig10"):
        return ""
    head = ["", "validation loss, nats a token", "bits a byte", "next token right, %",
            "train loss", "epochs", "minutes a run", "made with", "command"]  # fmt: skip
    rows = []
    for key in dict.fromkeys(row[:3] for row in results.planned("fig10")):
        there = results.of(*key)
        what, shown = f"{results.title(*key)}, {key[2]}", comparable(results, key, there)
        if not shown:
            begun = f" ({len(there)} of {len(results.planned(*key))} runs begun)" if there else ""
            rows.append([what, "not run" + begun, *[""] * 7])
            continue
        rate = shown[0].experiment.flag("--lr")
        columns = zip(*((x.test_loss, x.column("test_bits")[-1], 100 * x.last["test_acc"], x.loss)
                        for x in shown))  # fmt: skip
        cells = map(spread, columns, (".3f", ".3f", ".1f", ".3f"))
        minutes = spread([x.seconds / 60 for x in shown])
        rows.append([what + (f" at {rate}" if rate else ""), *cells, length(shown[0]), minutes,
                     *origin(shown)])  # fmt: skip
    return "### Text\n\n" + table(head, rows)


def origin(shown):
    """(What made some runs, the command of the first), in words."""
    run, made = shown[0].experiment, dict.fromkeys(made_with(x.first) for x in shown)
    return "; ".join(made), f"`python main.py {' '.join(run.flags)} --epochs {run.epochs}`"


def sizes(results):
    """Figure 6 in numbers."""
    if not results.of("fig6"):
        return ""
    widths, rows, there = WIDTHS[results.scale], [], results.of("fig6")
    epochs = common_epochs(there)
    for depth in DEPTHS:
        runs = [results.only("fig6", f"{depth}x{width}", "AGD") for width in widths]
        rows.append([f"depth {depth}", *(
            "not run" if x is None else "begun" if x.only_begun
            else outcome(x.until(epochs), mark=False) for x in runs)])  # fmt: skip
    planned = there[0].experiment.epochs
    cut = f", after {epochs:,} of {planned:,} epochs" if epochs < planned else ""
    head = ["train loss, test accuracy" + cut, *(f"width {width}" for width in widths)]
    return "### Width and depth\n\n" + table(head, rows)


def searches(results):
    """Every point of every grid, the failures too. Figure 8's grids are figure 5's."""
    parts = []
    for key in dict.fromkeys(row[:3] for row in results.table if row.flag("--lr")):
        planned, runs, best = results.planned(*key), results.of(*key), results.tuned_seeds(*key)
        if key[0] == "fig8" or len(planned) < 2 or not runs:
            continue
        words = f"{short_name(key[0])}, {planned[0].network}, {runs[0].data}, {key[2]}"
        rates, epochs = results.by_rate(*key), results.searched_epochs(*key)
        if len(runs) < len(planned):
            words += f" ({len(runs)} of {len(planned)} runs)"
        elif 0 < epochs < runs[0].experiment.epochs:
            words += f", after {epochs:,} epochs"
            rates = {rate: [x if x.stopped else x.until(epochs) for x in some]
                     for rate, some in rates.items()}  # fmt: skip
            best = [x.until(epochs) for x in best]
        seeds = len({row.flag("--seed") for row in planned})
        words += f", means over {seeds} seeds" if seeds > 1 else ""
        cells = [outcome(*x, mark=not best) for x in rates.values()]
        cells = [f"**{cell}**" if x == best else cell for cell, x in zip(cells, rates.values())]
        what = "train loss, " + ("validation loss" if runs[0].is_text else "test accuracy")
        parts.append(table([words, *rates], [[what, *cells]]))
    return "\n\n".join(["### The searches", TUNED, *parts]) if parts else ""


def pictures(results):
    parts = []
    for figure, what in FIGURES.items():
        path = results.folder / "figures" / f"{figure}.png"
        if path.exists():
            number = figure.removeprefix("fig")
            name = what.capitalize() if number == figure else f"Figure {number}: {what}"
            place = path.relative_to(results.out).as_posix()
            caption = " ".join(DRAWN[figure].__doc__.split())
            parts.append(f"#### {name}\n\n![{name}]({place})\n\n{caption}")
    words = ("A line of many epochs goes through means over twenty-fourths of a decade, the last "
             "of them where its run stands.")  # fmt: skip
    return "\n\n".join(["### Figures", words, *parts]) if parts else ""


def extent(results):
    """How much of the table has been run, and how long it took."""
    rows = []
    for figure in FIGURES:
        planned, there = results.planned(figure), results.of(figure)
        finished, seconds = sum(x.finished for x in there), sum(x.seconds for x in there)
        begun = {x.experiment for x in there}
        missing = Counter(f"{x.panel}, {x.curve}" for x in planned if x not in begun)
        rest = "; ".join(what + f" ({n})" * (n > 1) for what, n in [*missing.items()][:4])
        more = sum([*missing.values()][4:])
        rest += f"; {more} more" if more else ""
        what = figure
        if figure == "fig3":
            measured = majorisation.read(results)
            what += f", measured after {measured['run']['epochs']} epochs" if measured else ""
        if planned:
            rows.append([what, str(len(planned)), str(finished), str(len(there) - finished),
                         f"{seconds / 60:.0f}", rest])  # fmt: skip
    head = ["figure", "runs", "finished", "begun", "minutes of its runs, added up", "not begun"]
    return "### What has been run\n\n" + table(head, rows)
