"""Draw the paper's figures from the runs of the table: `scripts.reproduce FIGURE --draw`.

Numbered as in the authors' blog post. A panel whose runs are not there says so.
"""

import hashlib
import math
import os

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from scripts.experiments import BATCHES, DEPTHS, PEERS, RULES, SPECTRAL, WIDTHS
from scripts.results import data_name, network_name, read_measurement
from scripts.style import (
    BLACK,
    BLUE,
    DASHED,
    DOTTED,
    ETA,
    GREEN,
    OBJECTIVE,
    OPTIMIZERS,
    ORANGE,
    PINK,
    RED,
    SKY,
    STYLE,
    TEST,
    TRAIN,
    WIDTH,
    band,
    curve,
    eta_loss_accuracy,
    kinds,
    legend,
    log_axis,
    log_values,
    not_run,
    only,
    optimizer_key,
    percent,
    quantities,
    right_axis,
    share_range,
    spaced,
    title,
    train_and_test,
)  # fmt: skip


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
        for path, words in zip(paths, ({"Source": fingerprint(picture)}, {"CreationDate": None})):
            partial = path.with_suffix(".partial")
            picture.savefig(partial, format=path.suffix[1:], metadata=words)
            os.replace(partial, path)
    plt.close(picture)
    return paths


def fig1(results):
    found = {panel: results.of("fig1", panel) for panel in ("deep", "rates", "imagenet")}
    planned = [panel for panel in found if any(
        row[:2] == ("fig1", panel) for row in results.table)]  # fmt: skip
    if not any(found.values()):
        return None
    figure, axes = plt.subplots(1, len(planned), figsize=(WIDTH / 3 * len(planned), 2.3))
    for ax, panel in zip(axes, planned):
        percent(ax, sum(found.values(), []))
        if not found[panel]:
            ax.set_title({"imagenet": "ResNet-50, ImageNet"}.get(panel, ""))
            not_run(ax)
            continue
        ax.set_title(title(found[panel][0]))
        if panel == "rates":
            _rates(ax, results)
            continue
        for result in found[panel]:
            train_and_test(ax, result, "acc", *OPTIMIZERS[result.experiment.curve], 100)
        log_axis(ax, max(len(x.epochs) for x in found[panel]))
    axes[0].set_ylabel("accuracy (%)")
    names = [x for x in (*RULES, "Adam", "SGD") if results.of("fig1", curve=x)]
    legend(figure, [optimizer_key(name) for name in names] + kinds(), 3 if len(planned) < 3 else 6)
    return figure


def _rates(ax, results):
    """Final accuracy against the learning rate; a run that broke off counts as it ended."""
    for name in ("Adam", "SGD"):
        found = [x for x in results.of("fig1", "rates", name) if x.finished]
        x = [float(r.experiment.flag("--lr")) for r in found]
        colour, marker = OPTIMIZERS[name]
        for key, style in (("train", "-"), ("test", DOTTED)):
            ax.plot(x, [100 * r.last[f"{key}_acc"] for r in found], color=colour, linestyle=style,
                    marker=marker, markersize=3.2, markerfacecolor="white")  # fmt: skip
    for name in RULES:
        found = only(results, "fig1", "rates", name)
        if found and found.finished:
            ax.axhline(100 * found.last["train_acc"], color=OPTIMIZERS[name][0])
            ax.axhline(100 * found.last["test_acc"], color=OPTIMIZERS[name][0], linestyle=DOTTED)
    ax.set_xscale("log")
    ax.set_xticks([1e-7, 1e-5, 1e-3, 1e-1, 1e1])
    ax.minorticks_off()
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
    path = results.folder / "fig3.json"
    if not path.exists():
        return None
    what = read_measurement(path)
    (row,) = (row for row in results.table if row.figure == "fig3")
    figure = plt.figure(figsize=(WIDTH, 2.6))
    *axes, chain = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])
    for ax, (when, state) in zip(axes, what["states"].items()):
        t, loss, bound = (np.array(state[key]) for key in ("t", "loss", "bound"))
        ax.plot(t, bound, color=RED, linestyle=DASHED)
        ax.plot(t, loss, color=BLUE)
        above = loss > bound
        above[0] = False  # they touch there
        if above.any():
            ax.fill_between(t, bound, loss, where=above, color=RED, alpha=0.25, linewidth=0)
        eta = state["eta"]
        least, there = (float(np.interp(eta, t, y)) for y in (bound, loss))
        ax.plot([0], [state["L"]], color=BLACK, marker="x", markersize=6, markeredgewidth=1.6)
        ax.annotate("", (eta, there), (eta, least), arrowprops={
            "arrowstyle": "-|>", "color": BLACK, "shrinkA": 0, "shrinkB": 0})  # fmt: skip
        ax.axvline(eta, color="#999999", linewidth=0.6, linestyle=DOTTED)
        ax.set_xticks([0, eta, 2 * eta], ["0", f"η = {eta:.3f}", "2η"])
        ax.set_title(when)
        ax.set_xlabel("$t$, along AGD's direction")
    data = data_name(row.flag("--dataset"), what["run"]["data"])
    axes[0].set_ylabel(r"objective $\mathcal{L}$")
    _chain(chain, what["states"])
    keys = [
        Line2D([], [], color=BLUE, label="objective, measured"),
        Line2D([], [], color=RED, linestyle=DASHED, label="majorisation"),
        Line2D([], [], color=BLACK, marker="x", linestyle="none", label="before the step"),
        Line2D([], [], color=BLACK, marker=r"$\downarrow$", markersize=8, linestyle="none",
               label="least of the bound: the step"),
    ]  # fmt: skip
    legend(figure, keys)
    figure.supxlabel(f"{network_name(row)}, {what['images']:,} images of {data}", fontsize=7)
    return figure


def _chain(ax, states):
    """The perturbation chain, each link with its measured size at t = eta."""
    ax.set_axis_off()
    ax.set_xlim(0, 4)
    ax.set_ylim(-0.2, 3.3)
    links = ((r"$\Delta W$", "weights", "dW", ORANGE), (r"$\Delta f$", "outputs", "df", SKY),
             (r"$\Delta\ell$", "losses", "dl", GREEN),
             (r"$\Delta\mathcal{L}$", "objective", "dL", PINK))  # fmt: skip
    for i, (symbol, word, key, colour) in enumerate(links):
        ax.text(i + 0.5, 2.55, symbol, ha="center", va="center", fontsize=11, bbox={
            "boxstyle": "round,pad=0.42", "facecolor": colour, "alpha": 0.35, "edgecolor": BLACK,
            "linewidth": 0.8})  # fmt: skip
        ax.text(i + 0.5, 1.9, word, ha="center", va="center", fontsize=7)
        if i < 3:
            ax.annotate("", (i + 1.2, 2.55), (i + 0.8, 2.55),
                        arrowprops={"arrowstyle": "-|>", "color": BLACK})  # fmt: skip
        for row, state in enumerate(states.values()):
            ax.text(i + 0.5, 1.05 - 0.75 * row, f"{state['chain'][key]:.2g}".replace("-", "−"),
                    ha="center", va="center", fontsize=7.5)  # fmt: skip
    for row, when in enumerate(states):
        ax.text(0, 1.4 - 0.75 * row, when, fontsize=6.5, color="#666666", va="center")
    ax.set_title("how a perturbation travels, at $t=η$")


def fig4(results):
    third = "vgg"
    if not results.of("fig4", "vgg") and results.of("fig4", "vgg, tiny100"):
        third = "vgg, tiny100"
    planned = {row.panel: row for row in results.table if row.figure == "fig4"}
    panels = [panel for panel in ("fcn", "resnet18", third, "imagenet") if panel in planned]
    if not results.of("fig4"):
        return None
    figure, axes = plt.subplots(2, len(panels), figsize=(WIDTH, 3.5), sharex="col", sharey="row")
    for (top, bottom), panel in zip(axes.T, panels):
        found = results.of("fig4", panel)
        if not found:
            row = planned[panel]
            words = f"{network_name(row)}, {data_name(row.flag('--dataset'), {})}"
            top.set_title(words, fontsize=7.5)
            not_run(top)
            not_run(bottom)
            continue
        top.set_title(title(found[0]), fontsize=7.5)
        baseline = results.tuned("fig4", panel, "SGD" if panel == "imagenet" else "Adam")
        agd = only(results, "fig4", panel, "AGD")
        for result, style in ((agd, {}), (baseline, {"linestyle": DASHED, "alpha": 0.65})):
            if result is not None:
                curve(top, result, "train_loss", OBJECTIVE, **style)
                curve(bottom, result, "train_acc", TRAIN, scale=100, **style)
                curve(bottom, result, "test_acc", TEST, scale=100, **style)
        if agd:
            band(top, agd, "eta", ETA)
        log_axis(bottom, max(len(x.epochs) for x in found))
    log_values(axes[0, 0])
    percent(axes[1, 0], results.of("fig4"))
    axes[0, 0].set_ylabel("objective and η")
    axes[1, 0].set_ylabel("accuracy (%)")
    dashed = Line2D([], [], color="#555555", linestyle=DASHED, alpha=0.65,
                    label="tuned Adam (ImageNet: SGD)")  # fmt: skip
    legend(figure, [*quantities(test="-"), dashed], 3)
    return figure


def fig5(results):
    shown, keys = {}, []
    for name in (*RULES, "Adam", "SGD"):
        if not results.of("fig5", "fcn", name):
            continue
        if name in RULES:
            found, words = only(results, "fig5", "fcn", name), name
        else:
            found = results.tuned("fig5", "fcn", name)
            rate = found and found.experiment.flag("--lr")
            words = f"{name}, rate {rate}" if found else f"{name}: search not finished"
        keys.append(optimizer_key(name, words))
        if found is not None:
            shown[name] = found
    if not keys:
        return None
    figure, (objective, accuracy, update) = plt.subplots(1, 3, figsize=(WIDTH, 2.4))
    for name, result in shown.items():
        train_and_test(objective, result, "loss", *OPTIMIZERS[name])
        train_and_test(accuracy, result, "acc", *OPTIMIZERS[name], 100)
        band(update, result, "update", OPTIMIZERS[name][0])
    log_values(objective)
    update.set_yscale("log")
    objective.set_title("objective")
    accuracy.set_title("accuracy (%)")
    update.set_title(r"relative update $\|\Delta W\|_F\,/\,\|W\|_F$")
    percent(accuracy, shown.values())
    for ax in (objective, accuracy, update):
        log_axis(ax, max((len(x.epochs) for x in shown.values()), default=1))
    legend(figure, keys + kinds())
    return figure


def fig6(results):
    every = results.of("fig6")
    if not every:
        return None
    widths = WIDTHS[results.scale]
    figure, axes = plt.subplots(
        len(DEPTHS), len(widths), figsize=(WIDTH, 5.9), sharex=True, sharey=True
    )
    found = {x.experiment.panel: x for x in reversed(every)}
    rights = []
    for i, depth in enumerate(DEPTHS):
        axes[i, 0].set_ylabel(f"depth {depth}", fontsize=8.5)
        for j, width in enumerate(widths):
            ax, result = axes[i, j], found.get(f"{depth}x{width}")
            axes[0, j].set_title(f"width {width}")
            rights.append(right_axis(ax))
            if j < len(widths) - 1:
                rights[-1].tick_params(labelright=False)
            if result is not None:
                eta_loss_accuracy(ax, rights[-1], result)
            else:
                ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color="#777777")
    percent(axes[0, 0], every)
    share_range(rights)
    log_axis(axes[0, 0], max(len(x.epochs) for x in every), "")
    figure.supxlabel("epochs", fontsize=8)
    figure.supylabel("accuracy (%)", fontsize=8)
    rights[len(widths) * (len(DEPTHS) // 2 + 1) - 1].set_ylabel("objective and η")
    legend(figure, quantities())
    return figure


def fig7(results):
    every = results.of("fig7")
    if not every:
        return None
    figure, axes = plt.subplots(1, len(BATCHES), figsize=(WIDTH, 2.4), sharey=True)
    rights = []
    for ax, batch in zip(axes, BATCHES):
        rights.append(right_axis(ax))
        ax.set_title(f"batch size {batch}")
        result = only(results, "fig7", f"batch {batch}", "AGD")
        if result is None:
            not_run(ax)
        else:
            _iterations(ax, rights[-1], result)
    percent(axes[0], every)
    share_range(rights)
    for right in rights[:-1]:
        right.tick_params(labelright=False)
    axes[0].set_ylabel("accuracy (%)")
    rights[-1].set_ylabel("objective and η")
    legend(figure, quantities())
    return figure


def bins(count):
    """Slices of `count` steps, single at first, then a twelfth of a decade wide."""
    points = max(2, 1 + round(12 * np.log10(count)))
    edges = sorted({round(x) for x in np.geomspace(1, count + 1, points)})
    return [slice(low - 1, high - 1) for low, high in zip(edges, edges[1:])]


def _iterations(ax, right, result):
    """The steps of the first epoch, then the ends of epochs."""
    steps = [row for row in result.steps if row["epoch"] == 1]
    parts = bins(len(steps))

    def column(key, of):
        values = np.array([float("nan") if row[key] is None else row[key] for row in steps])
        return np.array([of(values[part]) for part in parts])

    x = [(part.start + 1 + part.stop) / 2 for part in parts]
    right.fill_between(x, column("eta", np.min), column("eta", np.max), color=ETA, alpha=0.22,
                       linewidth=0)  # fmt: skip
    right.plot(x, column("eta", np.mean), color=ETA)
    right.plot(x, column("loss", np.mean), color=OBJECTIVE)
    ax.plot(x, 100 * column("acc", np.mean), color=TRAIN)
    ends = len(steps) * np.arange(1, len(result.epochs) + 1)
    low, high = result.column("eta_min"), result.column("eta_max")
    right.fill_between(ends, low, high, color=ETA, alpha=0.22, linewidth=0)
    dot = {"marker": "o", "markersize": 1.8}
    right.plot(ends, result.column("eta_mean"), color=ETA, **dot)
    right.plot(ends, result.column("train_loss"), color=OBJECTIVE, **dot)
    ax.plot(ends, [100 * acc for acc in result.column("train_acc")], color=TRAIN, **dot)
    ax.plot(ends, [100 * acc for acc in result.column("test_acc")], color=TEST,
            linestyle=DOTTED, **dot)  # fmt: skip
    log_axis(ax, int(ends[-1]), "iterations")


def searched(grid):
    """What a grid search has after each epoch of all its points: (the compute in epochs, in
    seconds, the row of the point with the least train loss), an epoch at a time, as far as every
    point goes that did not break off."""
    alive = [len(found.epochs) for found in grid if not found.stopped]
    for n in range(1, min(alive, default=0) + 1):
        rows = [found.epochs[n - 1] for found in grid if len(found.epochs) >= n]
        finite = [row for row in rows if row["train_loss"] is not None]
        if finite:
            spent = [row["seconds"] for found in grid for row in found.epochs[:n]]
            yield len(spent), sum(spent), min(finite, key=lambda row: row["train_loss"])


def fig8(results):
    if not results.of("fig8"):
        return None
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 4.6), sharex="col", sharey="row")
    keys, seconds = [], []
    for name in (*RULES, *PEERS, "Adam", "SGD"):
        found = results.of("fig8", "fcn", name)
        found = found[:1] if name in RULES else found  # the first seed
        planned = 1 if name in RULES else len(results.planned("fig8", "fcn", name))
        if not found:
            continue
        rates = f", {planned} rates searched" if planned > 1 else ""
        curves = list(searched(found)) if len(found) == planned else []
        keys.append(optimizer_key(name, name + (rates if curves else ": not finished")))
        if not curves:
            continue
        *budgets, rows = zip(*curves)
        seconds += [min(budgets[1]), max(budgets[1])]
        colour, marker = OPTIMIZERS[name]
        style = {"color": colour, "marker": marker, "markersize": 4.2, "markerfacecolor": "white",
                 "markevery": spaced(len(rows), 6), "clip_on": False}  # fmt: skip
        style |= {"linewidth": 2.2} if name in RULES else {}
        for column, spent in enumerate(budgets):
            axes[0, column].plot(spent, [100 * row["test_acc"] for row in rows], **style)
            axes[1, column].plot(spent, [row["train_loss"] for row in rows], **style)
    epochs = max((line.get_xdata()[-1] for line in axes[1, 0].lines), default=2)
    log_axis(axes[1, 0], epochs, "compute: epochs of training, the search included")
    words = "seconds of the runs, the search included"
    log_axis(axes[1, 1], max(seconds, default=2), words, min(seconds, default=1))
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[1, 0].set_ylabel("train loss")
    log_values(axes[1, 0])
    legend(figure, keys, 4)
    return figure


def fig11(results):
    result = only(results, "fig11", "fcn", SPECTRAL)
    if result is None:
        return None
    figure, (length, turn, eta) = plt.subplots(1, 3, figsize=(WIDTH, 2.5))
    batch = int(result.experiment.flag("--train_bs", 128))
    steps = math.ceil(result.first["train_examples"] / batch)
    epochs = np.arange(1, len(result.epochs) + 1)
    L = result.first["paths" if "paths" in result.first else "layers"]
    relative = np.array(result.column("eta_mean")) / L
    predicted = {"color": BLACK, "linestyle": DASHED, "linewidth": 1.0}
    colour = OPTIMIZERS[SPECTRAL][0]
    curve(length, result, "length", colour)
    length.plot(epochs, np.sqrt(1 + 3 * np.cumsum(steps * relative**2)), **predicted)
    curve(turn, result, "turn", colour)
    turn.plot(epochs, 1 / np.sqrt(3 * steps * epochs), **predicted)
    band(eta, result, "eta", ETA)
    length.set_title(r"length $\rho(Z)/s$")
    turn.set_title("turn of $Z$ in a step")
    eta.set_title("automatic learning rate η")
    for ax in (length, turn, eta):
        log_values(ax)
        log_axis(ax, len(result.epochs))
    keys = [
        Line2D([], [], color=colour, label="mean of the hidden layers"),
        Line2D([], [], **predicted, label=r"predicted: $\sqrt{1+3\,\Sigma(\eta/L)^2}$ and "
               r"$1/\sqrt{3t}$ after $t$ steps"),
    ]  # fmt: skip
    legend(figure, keys)
    figure.supxlabel(f"{title(result)}, {steps} steps an epoch", fontsize=7)
    return figure


def phases(results):
    result = only(results, "phases", "fcn", "AGD")
    if result is None:
        return None
    figure, ax = plt.subplots(figsize=(WIDTH * 0.55, 2.6))
    right = right_axis(ax)
    eta_loss_accuracy(ax, right, result)
    percent(ax, [result])
    log_axis(ax, len(result.epochs))
    ax.set_title(title(result))
    ax.set_ylabel("accuracy (%)")
    right.set_ylabel("objective and η")
    legend(figure, quantities(), 2)
    return figure


DRAWN = {"fig1": fig1, "fig2": fig2, "fig3": fig3, "fig4": fig4, "fig5": fig5, "fig6": fig6,
         "fig7": fig7, "fig8": fig8, "fig11": fig11, "phases": phases}  # fmt: skip
