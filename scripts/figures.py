"""Draw the paper's figures from the runs of the table: `scripts.reproduce FIGURE --draw`.

Numbered as in the authors' blog post. A panel whose runs are not there says so.
"""

import hashlib
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from scripts.experiments import BATCHES, DEPTHS, PEERS, WIDTHS
from scripts.results import data_name, network_name, tuned

STYLE = Path(__file__).with_name("paper.mplstyle")
WIDTH = 7.2  # inches, the text of a page

# Okabe and Ito's colours, which colour-blind readers tell apart, in an order of lightness that is
# one in grey too; markers and dashes say it once more.
BLACK, BLUE, ORANGE, GREEN, PINK, SKY, RED = (
    "#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00",
)  # fmt: skip
OPTIMIZERS = {  # colour and marker
    "AGD": (BLACK, None),
    "Adam": (ORANGE, "o"),
    "SGD": (BLUE, "^"),
    "Prodigy": (GREEN, "s"),
    "Schedule-free AdamW": (PINK, "D"),
    "D-Adapted Adam": (SKY, "v"),
}
ETA, OBJECTIVE, TRAIN, TEST = BLUE, ORANGE, BLACK, PINK  # as in figures 4, 6 and 7
DOTTED = (0, (1, 1.2))
DASHED = (0, (4, 1.8))


def draw(figure, results):
    """The picture of a figure, or None where none of its runs has been run."""
    with plt.style.context([STYLE]):
        return DRAWN[figure](results)


def fingerprint(picture):
    """A checksum of what is drawn, whatever draws it: the points of all lines and bands, the words
    of titles, labels and legends."""
    drawn = []
    for ax in picture.axes:
        points = [line.get_xydata() for line in ax.lines]
        points += [path.vertices for band in ax.collections for path in band.get_paths()]
        drawn += [f"{x:.6g}" for xy in points for x in np.asarray(xy, dtype=float).ravel()]
        drawn += [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]
        drawn += [text.get_text() for text in ax.texts]
    drawn += [text.get_text() for legend in picture.legends for text in legend.get_texts()]
    return hashlib.sha256("\n".join(drawn).encode()).hexdigest()


def save(figure, results):
    """Write a figure as PNG and PDF; returns their paths, or () where there is nothing to draw.

    The PNG's "Source" is the fingerprint of what it shows.
    """
    picture = draw(figure, results)
    if picture is None:
        return ()
    folder = results.folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{figure}.png", folder / f"{figure}.pdf"
    with plt.style.context([STYLE]):
        picture.savefig(paths[0], metadata={"Source": fingerprint(picture)})
        picture.savefig(paths[1], metadata={"CreationDate": None})
    plt.close(picture)
    return paths


# Axes and what they share.


def percent(ax, found=()):
    """Accuracies in %, from 0 to the quarter above the highest of the runs."""
    highest = max((row[key] for x in found for row in x.epochs
                   for key in ("train_acc", "test_acc")), default=1)  # fmt: skip
    top = 25 * math.ceil(4 * highest + 0.02)
    ax.set_ylim(0, min(top, 102))
    ax.yaxis.set_major_locator(FixedLocator(range(0, 101, 25)))


def log_epochs(ax, epochs, label="epochs"):
    """From the first epoch to the last, by tens, and in numbers that people read."""
    ax.set_xscale("log")
    ax.set_xlim(1, max(epochs, 2))
    steps = [1, 2, 5] if epochs < 100 else [1]
    ax.xaxis.set_major_locator(LogLocator(subs=steps))
    ax.xaxis.set_minor_locator(NullLocator() if epochs < 100 else LogLocator(subs=range(2, 10)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(FuncFormatter(power))
    ax.set_xlabel(label)


def power(x, _):
    """1 to 1000 as they are, beyond as powers of ten."""
    return f"{x:g}" if x < 1e4 else f"$10^{{{math.log10(x):.0f}}}$"


def not_run(ax, why="not run"):
    ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", color="#777777",
            fontstyle="italic")  # fmt: skip
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])


def curve(ax, result, key, colour, marker=None, scale=1.0, **style):
    """A line over the epochs, from the first on; a few markers on a log axis."""
    y = [scale * value for value in result.column(key)]
    x = range(1, len(y) + 1)
    if marker:
        shown = sorted({round(n) for n in np.geomspace(1, len(y), 4)})
        style |= {"marker": marker, "markevery": [n - 1 for n in shown], "markersize": 3.6}
        style |= {"markerfacecolor": "white", "markeredgewidth": 1.0, "clip_on": False}
    elif len(y) == 1:
        style |= {"marker": "o", "markersize": 3}
    return ax.plot(x, y, color=colour, **style)


def band(ax, result, key, colour):
    """The mean of an epoch's values within the range from their least to their greatest."""
    x = range(1, len(result.epochs) + 1)
    low, high = result.column(f"{key}_min"), result.column(f"{key}_max")
    ax.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
    return curve(ax, result, f"{key}_mean", colour)


def optimizer_key(name, label=None, **style):
    colour, marker = OPTIMIZERS[name]
    return Line2D([], [], color=colour, marker=marker, markersize=3.6, markerfacecolor="white",
                  label=label or name, **style)  # fmt: skip


def kinds():
    """The keys of train and test."""
    return [Line2D([], [], color="#555555", label="train"),
            Line2D([], [], color="#555555", linestyle=DOTTED, label="test")]  # fmt: skip


def quantities():
    return [
        Line2D([], [], color=ETA, label="automatic learning rate η"),
        Line2D([], [], color=OBJECTIVE, label="objective"),
        Line2D([], [], color=TRAIN, label="train accuracy"),
        Line2D([], [], color=TEST, label="test accuracy"),
    ]


def train_and_test(ax, result, kind, colour, marker=None, scale=1.0):
    curve(ax, result, f"train_{kind}", colour, marker, scale)
    curve(ax, result, f"test_{kind}", colour, None, scale, linestyle=DOTTED)


def top_legend(figure, handles, ncols=None):
    figure.legend(handles=handles, loc="outside upper center", ncols=ncols or len(handles))


def seed_0(found):
    """The runs of a curve that a picture shows: those of the first seed."""
    return [x for x in found if x.experiment.flag("--seed") == "0"]


def only(results, figure, panel, name):
    found = seed_0(results.of(figure, panel, name))
    return found[0] if found else None


def title(found):
    """Network and data of a run."""
    part = found.experiment.flag("--train_examples")
    images = f", {int(part):,} images" if part else ""
    return f"{network_name(found.experiment)}, {data_name(found.first)}{images}"


# The figures, in order.


def fig1(results):
    panels = [p for p in ("deep", "rates", "imagenet") if any(
        row.figure == "fig1" and row.panel == p for row in results.table)]
    if not results.of("fig1"):
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH / 3 * len(panels), 2.3))
    for ax, panel in zip(axes, panels):
        found = results.of("fig1", panel)
        percent(ax, results.of("fig1"))
        if not found:
            ax.set_title({"imagenet": "ResNet-50, ImageNet"}.get(panel, ""))
            not_run(ax)
            continue
        ax.set_title(title(found[0]))
        if panel == "rates":
            _rates(ax, results)
            continue
        for result in found:
            train_and_test(ax, result, "acc", *OPTIMIZERS[result.experiment.curve], 100)
        log_epochs(ax, max(len(x.epochs) for x in found))
    axes[0].set_ylabel("accuracy (%)")
    top_legend(figure, [optimizer_key(name) for name in ("AGD", "Adam", "SGD")] + kinds())
    return figure


def _rates(ax, results):
    """Final accuracy against the learning rate; a run that broke off counts as it ended."""
    for name in ("Adam", "SGD"):
        found = results.of("fig1", "rates", name)
        x = [float(r.experiment.flag("--lr")) for r in found]
        colour, marker = OPTIMIZERS[name]
        for key, style in (("train", "-"), ("test", DOTTED)):
            ax.plot(x, [100 * r.last[f"{key}_acc"] for r in found], color=colour, linestyle=style,
                    marker=marker, markersize=3.2, markerfacecolor="white")  # fmt: skip
    agd = only(results, "fig1", "rates", "AGD")
    if agd:
        ax.axhline(100 * agd.last["train_acc"], color=BLACK)
        ax.axhline(100 * agd.last["test_acc"], color=BLACK, linestyle=DOTTED)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(numticks=5))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("learning rate of Adam and SGD")


def descent(rate, start=-1.2, steps=8):
    """The points of gradient descent on w^2 / 2, whose slope is w."""
    w = [start]
    for _ in range(steps):
        w.append(w[-1] - rate * w[-1])
    return np.array(w)


def fig2(results):
    def f(w):
        return w**2 / 2

    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.1), sharey=True)
    grid = np.linspace(-2.2, 2.2, 300)
    for ax, (words, rate) in zip(axes, (("too small", 0.05), ("right", 0.7), ("too large", 2.07))):
        x = descent(rate)
        ax.plot(grid, f(grid), color=BLUE, linewidth=1.6)
        ax.plot(x, f(x), color=BLACK, marker="o", markersize=3.2, linewidth=0.8)
        ax.plot(x[:1], f(x[:1]), color=RED, marker="o", markersize=5, linestyle="none")
        ax.set_title(f"learning rate {rate:g}: {words}")
        ax.set_xlim(-2.2, 2.2)
        ax.set_ylim(-0.15, 2.4)
        ax.set_xlabel("weight $w$")
        ax.grid(False)
    axes[0].set_ylabel(r"objective $\mathcal{L}(w)=w^2/2$")
    return figure


def fig3(results):
    from scripts.majorise import majorisation

    path = results.folder / "fig3.json"
    if not path.exists():
        return None
    what = json.loads(path.read_text(encoding="utf-8"))
    figure = plt.figure(figsize=(WIDTH, 2.5))
    *axes, chain = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])
    for ax, (when, state) in zip(axes, what["states"].items()):
        t, loss, bound = (np.array(x) for x in (state["t"], state["loss"], majorisation(state)))
        ax.plot(t, bound, color=RED, linestyle=DASHED)
        ax.plot(t, loss, color=BLUE)
        above = loss > bound + 1e-12
        if above.any():
            ax.fill_between(t, bound, loss, where=above, color=RED, alpha=0.25, linewidth=0)
        eta, G = state["eta"], state["G"]
        least = state["L"] - eta * G + math.expm1(eta) ** 2 / 2
        there = float(np.interp(eta, t, loss))
        ax.plot([0], [state["L"]], color=BLACK, marker="x", markersize=6, markeredgewidth=1.6)
        ax.annotate("", (eta, there), (eta, least),
                    arrowprops={"arrowstyle": "-|>", "color": BLACK, "shrinkA": 0, "shrinkB": 0})
        ax.axvline(eta, color="#999999", linewidth=0.6, linestyle=DOTTED)
        ax.set_xticks([0, eta, 2 * eta], ["0", f"η = {eta:.3f}", "2η"])
        ax.set_title(when)
        ax.set_xlabel("$t$, along AGD's direction")
    axes[0].set_ylabel(r"objective $\mathcal{L}$")
    _chain(chain, what["states"])
    keys = [Line2D([], [], color=BLUE, label="objective, measured"),
            Line2D([], [], color=RED, linestyle=DASHED, label="majorisation"),
            Line2D([], [], color=BLACK, marker="x", linestyle="none", label="AGD is here")]
    figure.legend(handles=keys, loc="outside upper left", ncols=3)
    return figure


def _chain(ax, states):
    """The perturbation chain, each link with its measured size at t = eta."""
    ax.set_axis_off()
    ax.set_xlim(0, 4)
    ax.set_ylim(-0.2, 3.3)
    links = (("ΔW", "weights", "dW", ORANGE), ("Δf", "outputs", "df", SKY),
             ("Δℓ", "losses", "dl", GREEN), ("Δ𝓛", "objective", "dL", PINK))
    for i, (symbol, word, key, colour) in enumerate(links):
        symbol = {"Δ𝓛": r"$\Delta\mathcal{L}$", "ΔW": r"$\Delta W$", "Δf": r"$\Delta f$",
                  "Δℓ": r"$\Delta\ell$"}[symbol]
        ax.text(i + 0.5, 2.55, symbol, ha="center", va="center", fontsize=11,
                bbox={"boxstyle": "round,pad=0.42", "facecolor": colour, "alpha": 0.35,
                      "edgecolor": BLACK, "linewidth": 0.8})  # fmt: skip
        ax.text(i + 0.5, 1.9, word, ha="center", va="center", fontsize=7)
        if i < 3:
            ax.annotate("", (i + 1.2, 2.55), (i + 0.8, 2.55),
                        arrowprops={"arrowstyle": "-|>", "color": BLACK})
        for row, state in enumerate(states.values()):
            ax.text(i + 0.5, 1.05 - 0.75 * row, f"{state['chain'][key]:.2g}", ha="center",
                    va="center", fontsize=7.5)
    for row, when in enumerate(states):
        ax.text(0, 1.4 - 0.75 * row, when, fontsize=6.5, color="#666666", va="center")
    ax.set_title("how a perturbation travels, at $t=η$")


def fig4(results):
    panels = ["fcn", "resnet18", "vgg", "imagenet"]
    if not results.of("fig4", "vgg") and results.of("fig4", "vgg, tiny100"):
        panels[2] = "vgg, tiny100"
    in_table = {row.panel for row in results.table if row.figure == "fig4"}
    panels = [panel for panel in panels if panel in in_table]
    if not results.of("fig4"):
        return None
    figure, axes = plt.subplots(2, len(panels), figsize=(WIDTH, 3.4), sharex="col", sharey="row")
    for (top, bottom), panel in zip(axes.T, panels):
        found = results.of("fig4", panel)
        bottom.set_ylim(0, 102)
        if not found:
            names = {"fcn": "FCN 16×512", "resnet18": "ResNet-18, CIFAR-10",
                     "vgg": "VGG-16, CIFAR-100", "imagenet": "ResNet-50, ImageNet"}
            top.set_title(names[panel])
            for ax in (top, bottom):
                ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", va="center",
                        color="#777777", fontstyle="italic")  # fmt: skip
            continue
        top.set_title(title(found[0]), fontsize=7.5)
        agd = only(results, "fig4", panel, "AGD")
        other = tuned(results.of("fig4", panel, "SGD" if panel == "imagenet" else "Adam"))
        for result, style in ((agd, {}), (other, {"linestyle": DASHED, "alpha": 0.65})):
            if result is None:
                continue
            curve(top, result, "train_loss", OBJECTIVE, **style)
            curve(bottom, result, "train_acc", TRAIN, scale=100, **style)
            curve(bottom, result, "test_acc", TEST, scale=100, **style)
        if agd:
            band(top, agd, "eta", ETA)
        log_epochs(bottom, max(len(x.epochs) for x in found))
        top.set_yscale("log")
    axes[0, 0].set_ylabel("objective and η")
    axes[1, 0].set_ylabel("accuracy (%)")
    baseline = Line2D([], [], color="#555555", linestyle=DASHED, alpha=0.65,
                      label="tuned Adam (ImageNet: SGD)")
    top_legend(figure, [*quantities(), baseline])
    return figure


def fig5(results):
    best = {name: tuned(seed_0(results.of("fig5", "fcn", name))) for name in ("AGD", "Adam", "SGD")}
    best = {name: found for name, found in best.items() if found is not None}
    if not best:
        return None
    figure, (objective, accuracy, update) = plt.subplots(1, 3, figsize=(WIDTH, 2.4))
    for name, result in best.items():
        train_and_test(objective, result, "loss", *OPTIMIZERS[name])
        train_and_test(accuracy, result, "acc", *OPTIMIZERS[name], 100)
        band(update, result, "update", OPTIMIZERS[name][0])
    objective.set_yscale("log")
    plain_log(objective)
    update.set_yscale("log")
    objective.set_title("objective")
    accuracy.set_title("accuracy (%)")
    update.set_title(r"relative update $\|\Delta W\|_F\,/\,\|W\|_F$")
    percent(accuracy, best.values())
    for ax in (objective, accuracy, update):
        log_epochs(ax, max(len(x.epochs) for x in best.values()))
    names = [optimizer_key(name, name if name == "AGD" else
                           f"{name}, rate {found.experiment.flag('--lr')}")
             for name, found in best.items()]  # fmt: skip
    top_legend(figure, names + kinds())
    return figure


def plain_log(ax):
    """Decimal labels on a log axis that spans less than two decades."""
    low, high = ax.get_ylim()
    if high / low < 100:
        ax.yaxis.set_major_locator(LogLocator(subs=[1, 2, 3, 4, 5, 6, 7, 8]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_locator(NullLocator())


def fig6(results):
    if not results.of("fig6"):
        return None
    widths = WIDTHS[results.scale]
    figure, axes = plt.subplots(
        len(DEPTHS), len(widths), figsize=(WIDTH, 5.9), sharex=True, sharey=True
    )
    rights = []
    for i, depth in enumerate(DEPTHS):
        for j, width in enumerate(widths):
            ax, result = axes[i, j], only(results, "fig6", f"{depth}x{width}", "AGD")
            if i == 0:
                ax.set_title(f"width {width}")
            if j == 0:
                ax.set_ylabel(f"depth {depth}", fontsize=8.5)
            percent(ax, results.of("fig6"))
            right = ax.twinx()
            rights.append(right)
            right.set_yscale("log")
            right.grid(False)
            right.spines["right"].set_visible(True)
            if j < len(widths) - 1:
                right.tick_params(labelright=False)
            if result is None:
                ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color="#777777")
                continue
            band(right, result, "eta", ETA)
            curve(right, result, "train_loss", OBJECTIVE)
            curve(ax, result, "train_acc", TRAIN, scale=100)
            curve(ax, result, "test_acc", TEST, scale=100)
    share_log(rights)
    longest = max(len(x.epochs) for x in results.of("fig6"))
    log_epochs(axes[0, 0], longest, "")
    figure.supxlabel("epochs", fontsize=8)
    figure.supylabel("accuracy (%)", fontsize=8)
    rights[len(widths) * (len(DEPTHS) // 2 + 1) - 1].set_ylabel("objective and η")
    top_legend(figure, quantities())
    return figure


def share_log(axes):
    """One range for all: whole decades' thirds around what is drawn."""
    low = min(ax.dataLim.intervaly[0] for ax in axes if ax.has_data())
    high = max(ax.dataLim.intervaly[1] for ax in axes if ax.has_data())
    for ax in axes:
        ax.set_ylim(low / 1.3, high * 1.3)
        ax.yaxis.set_minor_formatter(NullFormatter())


def fig7(results):
    if not results.of("fig7"):
        return None
    figure, axes = plt.subplots(1, len(BATCHES), figsize=(WIDTH, 2.4), sharey=True)
    rights = []
    for ax, batch in zip(axes, BATCHES):
        right = ax.twinx()
        rights.append(right)
        right.set_yscale("log")
        right.grid(False)
        right.spines["right"].set_visible(True)
        ax.set_title(f"batch size {batch}")
        percent(ax, results.of("fig7"))
        result = only(results, "fig7", f"batch {batch}", "AGD")
        if result is None:
            not_run(ax)
            continue
        steps = [row for row in result.steps if row["epoch"] == 1]
        n = len(steps)
        x = np.arange(1, n + 1)
        ends = n * np.arange(1, len(result.epochs) + 1)
        faint = {"linewidth": 0.5, "alpha": 0.55}
        right.plot(x, [row["eta"] for row in steps], color=ETA, **faint)
        right.plot(x, [row["loss"] for row in steps], color=OBJECTIVE, **faint)
        ax.plot(x, [100 * row["acc"] for row in steps], color=TRAIN, **(faint | {"alpha": 0.3}))
        low, high = result.column("eta_min"), result.column("eta_max")
        right.fill_between(ends, low, high, color=ETA, alpha=0.22, linewidth=0)
        dot = {"marker": "o", "markersize": 1.6}
        right.plot(ends, result.column("eta_mean"), color=ETA, **dot)
        right.plot(ends, result.column("train_loss"), color=OBJECTIVE, **dot)
        ax.plot(ends, [100 * v for v in result.column("train_acc")], color=TRAIN, **dot)
        ax.plot(ends, [100 * v for v in result.column("test_acc")], color=TEST, **dot)
        log_epochs(ax, ends[-1], "iterations")
        ax.set_xlim(1, ends[-1])
    share_log(rights)
    for right in rights[:-1]:
        right.tick_params(labelright=False)
    axes[0].set_ylabel("accuracy (%)")
    rights[-1].set_ylabel("objective and η")
    top_legend(figure, quantities())
    return figure


def searched(grid):
    """What a grid search has after each epoch of all its points: (the compute in epochs, the row
    of the point with the least train loss), an epoch at a time."""
    longest = max(len(found.epochs) for found in grid)
    for n in range(1, longest + 1):
        alive = [found for found in grid if len(found.epochs) >= n]
        finite = [found for found in alive if found.epochs[n - 1]["train_loss"] is not None]
        if finite:
            spent = sum(min(n, len(found.epochs)) for found in grid)
            yield spent, min((found.epochs[n - 1] for found in finite),
                             key=lambda row: row["train_loss"])  # fmt: skip


def fig8(results):
    if not results.of("fig8"):
        return None
    figure, (accuracy, objective) = plt.subplots(1, 2, figsize=(WIDTH, 2.7))
    keys = []
    for name in ("AGD", *PEERS, "Adam", "SGD"):
        found = seed_0(results.of("fig8", "fcn", name))
        if not found:
            continue
        grid = list(searched(found))
        spent, rows = zip(*grid)
        colour, marker = OPTIMIZERS[name]
        style = {"color": colour, "marker": marker, "markersize": 3.2, "markerfacecolor": "white"}
        style |= {"linewidth": 2.2} if name == "AGD" else {}
        shown = sorted({round(n) for n in np.geomspace(1, len(rows), 5)})
        style |= {"markevery": [n - 1 for n in shown], "clip_on": False}
        accuracy.plot(spent, [100 * row["test_acc"] for row in rows], **style)
        objective.plot(spent, [row["train_loss"] for row in rows], **style)
        label = name if len(found) == 1 else f"{name}, {len(found)} rates searched"
        keys.append(optimizer_key(name, label))
    names = ("AGD", "Adam", "SGD")
    total = max(sum(len(f.epochs) for f in results.of("fig8", "fcn", name)) for name in names)
    for ax in (accuracy, objective):
        log_epochs(ax, total, "compute: epochs of training, the search included")
    accuracy.set_ylabel("test accuracy (%)")
    objective.set_ylabel("train loss")
    objective.set_yscale("log")
    plain_log(objective)
    top_legend(figure, keys, 3)
    return figure


def phases(results):
    result = only(results, "phases", "fcn", "AGD")
    if result is None:
        return None
    figure, ax = plt.subplots(figsize=(WIDTH * 0.55, 2.6))
    right = ax.twinx()
    right.set_yscale("log")
    right.grid(False)
    right.spines["right"].set_visible(True)
    band(right, result, "eta", ETA)
    curve(right, result, "train_loss", OBJECTIVE)
    curve(ax, result, "train_acc", TRAIN, scale=100)
    curve(ax, result, "test_acc", TEST, scale=100)
    percent(ax, [result])
    log_epochs(ax, len(result.epochs))
    ax.set_title(title(result))
    ax.set_ylabel("accuracy (%)")
    right.set_ylabel("objective and η")
    top_legend(figure, quantities(), 2)
    return figure


DRAWN = {"fig1": fig1, "fig2": fig2, "fig3": fig3, "fig4": fig4, "fig5": fig5, "fig6": fig6,
         "fig7": fig7, "fig8": fig8, "phases": phases}  # fmt: skip
