"""`<out>/README.md`: the paper's numbers beside the runs that are there, and what is not."""

import math
import os
from pathlib import Path

from runs.log import RunError
from scripts.claims import CLAIMS, judge
from scripts.experiments import DEPTHS, FIGURES, PEERS, RULES, SCALES, WIDTHS
from scripts.results import Results, data_name, network_name

# The paper's final test accuracies in %, by figure, panel and curve (its section 5 and captions),
# and the best rates of its grids.
PAPER = {
    ("fig1", "deep", "Adam"): "10",
    ("fig1", "deep", "SGD"): "10",
    ("fig4", "fcn", "AGD"): "52.7",
    ("fig4", "fcn", "Adam"): "53.5",
    ("fig4", "resnet18", "AGD"): "91.2",
    ("fig4", "resnet18", "Adam"): "92.9",
    ("fig4", "vgg", "AGD"): "67.4",
    ("fig4", "vgg", "Adam"): "69.7",
    ("fig4", "imagenet", "AGD"): "65.5",
    ("fig5", "fcn", "Adam"): "at 1e-4",
    ("fig5", "fcn", "SGD"): "at 1e-1",
    ("fig6", "2x64", "AGD"): "42.55",
    ("fig6", "4x2048", "AGD"): "63.7",
    ("fig7", "batch 32", "AGD"): "55.0",
    ("fig7", "batch 128", "AGD"): "58.0",
    ("fig7", "batch 1024", "AGD"): "60.0",
    ("fig7", "batch 4096", "AGD"): "59.8",
}

CAPTIONS = {
    "fig1": "Train accuracy solid, test accuracy dotted. AGD, the paper's rule and the spectral "
    "one, beside the default rates of Adam (0.001) and SGD (0.1) on 32 layers; then the last "
    "accuracy at every rate from 1e-7 to 10, with those of AGD as level lines.",
    "fig2": "Eight steps of gradient descent from the red point.",
    "fig3": "The measured objective L(W + tΔW) along AGD's own direction and the paper's "
    "majorisation L − tG + ½(eᵗ − 1)², least at t = η; where the objective lay above the bound, "
    "the gap would be filled in red. All in the paper's normalisation: the square loss with its ½, "
    "inputs of norm √d₀. Training has no ½, other inputs and batches of 128, so its η is larger. "
    "Right, at t = η: mean over layers of ‖ΔW‖/‖W‖, means over images of ‖Δf‖/√C and of |Δℓ|, "
    "and ΔL.",
    "fig4": "AGD solid, the tuned baseline dashed; η with its range in each epoch.",
    "fig5": "Adam and SGD at the rate of the grid with the least final train loss; of each AGD's "
    "seeds the first. Spectral AGD is tested at its average. Right: the mean over layers, its mean "
    "in each epoch within the range of its steps.",
    "fig6": "Accuracy on the left axis, objective and η, with its range in each epoch, on the "
    "right one.",
    "fig7": "The steps of the first epoch, averaged over twelfths of a decade, then every epoch "
    "(points, averages over that epoch, hence the kink); η with its range; of the seeds the first. "
    "Test accuracy is measured at the ends of epochs.",
    "fig8": "What a budget buys, in epochs and in seconds. A search over five rates that has spent "
    "5n epochs has the network that had the least train loss after n; both AGDs, and other "
    "optimisers at their defaults, have their one run. Epochs of one network, so the passes cost "
    "the same, while the optimisers' own time differs: a step of spectral AGD takes several times "
    "the passes of such a small network. Seconds are those of the logs, training and test; the "
    "table above names their machines, which several runs shared. Of each AGD's seeds the first; "
    "the train loss of Schedule-free AdamW and of spectral AGD is that of the weights that they "
    "train, their test accuracy that of those that they average.",
    "fig11": "The length of Z, and the angle by which a step turns it, at the end of every epoch, "
    "means over the hidden layers; dashed what follows for steps of random directions, from the "
    "measured η and from the number of steps t alone. No horizon is set.",
    "phases": "A part of the training set is fitted soon: η rises, then falls.",
}
MADE = "Written by `python -m scripts.reproduce`"
TITLES = {key: f"Figure {key[3:]}: {what}" for key, what in FIGURES.items() if key[:3] == "fig"}


def write(out):
    """Write the page from what lies under `out`; returns its path."""
    every = [Results(out, scale) for scale in SCALES]
    every = [results for results in every if (results.folder / "logs").is_dir()]
    parts = [
        "# Results",
        f"{MADE}; nothing here was typed. A quick run is a "
        "beginning: the paper's numbers are those of 1,000 to 2,000 epochs (ImageNet: 350), and a "
        "quick number beside one of them is not its reproduction. 'JPEG CIFAR-10' are CIFAR-10's "
        "images after a pass through JPEG, which may move an accuracy by a point or two.",
        claims(every),
    ]
    for results in every:
        parts += [
            f"## Scale: {results.scale}",
            numbers(results),
            widths_and_depths(results),
            rates(results),
            pictures(results),
            extent(results),
        ]
    if (Path(out) / "measured" / "README.md").exists():
        parts.append("## More\n\n[Other runs and the benchmark](measured/README.md)")
    path = Path(out) / "README.md"
    if path.exists() and MADE not in path.read_text(encoding="utf-8", errors="replace"):
        raise RunError(f"{path} is a page of somebody else's, and stays: choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def claims(every):
    """Each claim of the paper with its verdict at each scale, and what holding means."""
    head = ["claim", *(results.scale for results in every)]
    rows = []
    for claim in CLAIMS:
        what, _, rule = claim.__doc__.partition("\n\n")
        verdicts = [judge(claim, results) for results in every]
        cells = [f"**{verdict}**" + (f": {said}" if said else "") for verdict, said in verdicts]
        rows.append([f"{one_line(what)}<br><sub>{one_line(rule)}</sub>", *cells])
    if "full" not in [results.scale for results in every]:
        head, rows = [*head, "full"], [[*row, "not run"] for row in rows]
    words = "A quick verdict is one on the beginning of training."
    return f"## The paper's claims\n\n{words}\n\n" + table(head, rows)


def one_line(text):
    return " ".join(text.split())


def shown(results, key):
    """The runs that a number is of: the equally long seeds, or the tuned point of a grid."""
    found = results.of(*key)
    if len({row.flag("--lr") for row in results.planned(*key)}) > 1:
        best = results.tuned(*key)
        return [best] if best else []
    longest = max((len(x.epochs) for x in found), default=0)
    return [x for x in found if len(x.epochs) == longest or x.stopped]


def spread(values):
    """The mean, and the range over more than one."""
    mean = f"{sum(values) / len(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.1f} to {max(values):.1f}, {len(values)} seeds)"


def numbers(results):
    """The paper's numbers, ours, and what they were made with."""
    head = ["", "paper, test %", "here, test %", "here, train %", "epochs", "made with", "command"]
    rows = []
    for key in dict.fromkeys(row[:3] for row in results.table):
        figure, panel, name = key
        # Figure 8's other runs are figure 5's, the rates of figure 1 stand with the searches.
        mine = figure in ("fig4", "fig5", "fig11", "phases")
        mine = mine or (figure == "fig8" and name in PEERS)
        mine = mine or (figure == "fig1" and (panel != "rates" or name in RULES))
        if not (mine or key in PAPER):
            continue
        planned, there, found = results.planned(*key), results.of(*key), shown(results, key)
        data = there[0].data if there else data_name(planned[0].flag("--dataset"), {})
        what = f"{short(figure)}, {network_name(planned[0])}, {data}"
        what += f", {panel}" if panel.startswith("batch") else ""
        images = planned[0].flag("--train_examples")
        what += f", {int(images):,} images" if images else ""
        if not found:
            under_way = f" ({len(there)} of {len(planned)} runs begun)" if there else ""
            rows.append([f"{what}, {name}", PAPER.get(key, ""), "not run" + under_way, *[""] * 4])
            continue
        run = found[0].experiment
        rate = f" at {run.flag('--lr')}" if run.flag("--lr") else ""
        rows.append([
            f"{what}, {name}{rate}",
            PAPER.get(key, ""),
            spread([100 * x.last["test_acc"] for x in found]),
            spread([100 * x.last["train_acc"] for x in found]),
            length(found[0]),
            "; ".join(dict.fromkeys(made_with(x.first) for x in found)),
            f"`python main.py {' '.join(run.flags)} --epochs {run.epochs}`",
        ])  # fmt: skip
    return "### Numbers\n\n" + table(head, rows)


def part(found, planned):
    """Words for runs that lack others to compare with."""
    return f" ({len(found)} of {len(planned)} runs)" if len(found) < len(planned) else ""


def length(found):
    """Its epochs, and how many they should be."""
    done, planned = len(found.epochs), found.experiment.epochs
    if found.stopped:
        return f"stopped in {done}: {found.stopped.split(';')[0]}"
    return f"{done}" if done == planned else f"{done} of {planned}"


def short(figure):
    return f"fig. {figure[3:]}" if figure.startswith("fig") else figure


def widths_and_depths(results):
    """Figure 6 in numbers."""
    if not results.of("fig6"):
        return ""
    rows = []
    for depth in DEPTHS:
        row = [f"depth {depth}"]
        for width in WIDTHS[results.scale]:
            found = results.of("fig6", f"{depth}x{width}")
            row.append(figures_of(found[0]) if found else "not run")
        rows.append(row)
    head = ["train loss, test accuracy", *(f"width {width}" for width in WIDTHS[results.scale])]
    return "### Width and depth\n\n" + table(head, rows)


def made_with(first):
    """Hardware, version and date of a run, and those that it went on with."""
    parts = [f"{hardware(first)}; {first['date'][:10]}"]
    for later in first.get("resumed", []):
        if {"device_name", "torch", "threads"} & set(later):
            parts.append(f"from epoch {later['after_epoch'] + 1} {hardware({**first, **later})}")
    return ", ".join(parts)


def hardware(first):
    threads = f", {first['threads']} thread{'s' if first['threads'] > 1 else ''} a run"
    cores = f", {first['cores']} cores" if "cores" in first else ""
    gpu = first["device"].startswith("cuda")
    return f"{first['device_name']}{'' if gpu else cores + threads}, torch {first['torch']}"


def figures_of(found):
    """Train loss and test accuracy, and how far the run is if it is not through."""
    if found.stopped:
        return f"stopped in epoch {len(found.epochs)}: {found.stopped.split(' at ')[0]}"
    loss = "not finite" if math.isnan(found.loss) else f"{found.loss:.4f}"
    cut = "" if found.finished else f" ({length(found)} epochs)"
    return f"{loss}, {100 * found.last['test_acc']:.1f} %{cut}"


def grids(results):
    """(figure, words for network and optimiser, its runs, the tuned one or None while some are
    missing) of each grid that has runs."""
    keys = dict.fromkeys(row[:3] for row in results.table if row.flag("--lr"))
    for key in keys:
        planned, found = results.planned(*key), results.of(*key)
        if key[0] == "fig8" or len(planned) < 2 or not found:  # figure 8's are figure 5's
            continue
        words = f"{network_name(planned[0])}, {found[0].data}, {key[2]}{part(found, planned)}"
        yield key[0], words, found, results.tuned(*key)


def rates(results):
    """Every point of every grid, the failures too."""
    parts = []
    for figure, words, found, best in grids(results):
        winner = best and best.experiment
        cells = [figures_of(x) for x in found]
        cells = [f"**{cell}**" if x.experiment == winner else cell for x, cell in zip(found, cells)]
        head = [f"{short(figure)}, {words}", *(x.experiment.flag("--lr") for x in found)]
        parts.append(table(head, [["train loss, test accuracy", *cells]]))
    if not parts:
        return ""
    rule = (
        "Tuned means the least train loss in the last epoch (**bold**) over the grid, test "
        "accuracies unseen; a run whose loss was no longer finite is kept as a failure."
    )
    return "### The searches\n\n" + rule + "\n\n" + "\n\n".join(parts)


def pictures(results):
    parts = []
    for figure, what in FIGURES.items():
        path = results.folder / "figures" / f"{figure}.png"
        if path.exists():
            name = TITLES.get(figure, what.capitalize())
            place = path.relative_to(results.out).as_posix()
            parts.append(f"#### {name}\n\n![{name}]({place})\n\n{CAPTIONS[figure]}")
    return "### Figures\n\n" + "\n\n".join(parts) if parts else ""


def extent(results):
    """How much of the table has been run, and what it took."""
    rows = []
    for figure in FIGURES:
        planned = [row for row in results.table if row.figure == figure]
        if not planned:
            continue
        found = results.of(figure)
        done = [x for x in found if x.finished]
        seconds = sum(row["seconds"] for x in done for row in x.epochs)
        finished = {x.experiment for x in done}
        missing = [row for row in planned if row not in finished]
        panels = list(dict.fromkeys(f"{x.panel}, {x.curve}" for x in missing))
        rest = "; ".join(panels[:4]) + (f"; {len(panels) - 4} more" if len(panels) > 4 else "")
        if figure == "fig3" and not (results.folder / "fig3.json").exists():
            rest = "not measured"
        rows.append([figure, f"{len(done)} of {len(planned)}", f"{seconds / 60:.0f}", rest])
    head = ["figure", "runs", "minutes of its runs, added up", "not run"]
    return "### What has been run\n\n" + table(head, rows)
