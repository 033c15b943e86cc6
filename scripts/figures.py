"""The paper's figures, drawn from the runs of the table: `scripts.reproduce FIGURE --draw`.

Numbered as in the authors' blog post. A function's docstring is its figure's caption.
"""

import math

import matplotlib.pyplot as plt
import numpy as np

from scripts import majorisation, style
from scripts.bigram import bigram_loss
from scripts.experiments import (
    ADAMW,
    BASELINES,
    BATCHES,
    DEPTHS,
    PEERS,
    ROOTS,
    RULES,
    SPECTRAL,
    TEXT_PEERS,
    WIDTHS,
)
from scripts.results import common_epochs, searched
from scripts.style import BLACK, BLUE, DASHED, DOTTED, RED, WIDTH
from scripts.style import fingerprint as fingerprint  # of the benchmark's picture
from scripts.words import data_name


def draw(figure, results):
    """The picture of a figure, or None before any of its runs."""
    if figure not in ("fig2", "fig3") and not results.of(figure):
        return None
    with plt.style.context([style.STYLE]):
        return DRAWN[figure](results)


def save(figure, results):
    """Write a figure as PNG and PDF; returns their paths, or () where there is nothing to draw."""
    picture = draw(figure, results)
    if picture is None:
        return ()
    folder = results.folder / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    return style.save(picture, folder / f"{figure}.png", folder / f"{figure}.pdf")


def longest(results):
    return max((len(result.epochs) for result in results), default=1)


def _shown(results, *key):
    """The run of a curve: of a grid the tuned one, of seeds the first; None where it is missing."""
    return results.tuned(*key) if key[-1] in BASELINES else results.only(*key)


def fig1(results):
    """Train accuracy solid, test accuracy dotted. AGD, the paper's rule and the spectral one,
    beside the default rates of Adam (0.001) and SGD (0.1) on 32 layers. Against learning rates,
    where a grid was run: the last accuracy, of both AGDs as level lines; a cross where training
    broke off."""
    panels = list(dict.fromkeys(result.experiment.panel for result in results.of("fig1")))
    size = {"figsize": (max(0.45, len(panels) / 3) * WIDTH, 2.3)}
    figure, axes = plt.subplots(1, len(panels), squeeze=False, **size)
    for ax, panel in zip(axes[0], panels):
        style.percent(ax, results.of("fig1"))
        ax.set_title(results.title("fig1", panel))
        runs = results.of("fig1", panel)
        if panel == "rates":
            _rates(ax, results)
        else:
            for x in runs:
                # Both defaults stay at chance: a broad line under a narrow one, markers between.
                look = {"linewidth": 3.2} if x.experiment.curve == "Adam" else {}
                shift = 0.5 if x.experiment.curve == "SGD" else 0
                colour, marker = style.OPTIMIZERS[x.experiment.curve]
                style.curve(ax, x, "train_acc", colour, marker, 100, shift, **look)
                style.curve(ax, x, "test_acc", colour, None, 100, linestyle=DOTTED)
            style.log_axis(ax, longest(runs))
    axes[0, 0].set_ylabel("accuracy (%)")
    names = [name for name in (*RULES, *BASELINES) if results.of("fig1", curve=name)]
    keys = [*map(style.optimizer_key, names), *style.kinds()]
    style.legend(figure, keys, 3 if len(panels) < 3 else 6)
    return figure


def _rates(ax, results):
    """Accuracy against the learning rate, after the epochs that all runs have; a run that broke off
    counts as it ended. Where Adam and SGD both stay at chance, a broad line lies under a narrow
    one."""
    epochs = common_epochs(results.of("fig1", "rates"))
    for name in (*BASELINES, *RULES):
        runs = [x.until(epochs) for x in results.of("fig1", "rates", name) if not x.only_begun]
        colour, marker = style.OPTIMIZERS[name]
        size = 1.6 if name == "Adam" else 1
        for kind, line in style.KINDS:
            y = [100 * result.last[f"{kind}_acc"] for result in runs]
            if name in RULES:
                for level in y[:1]:
                    ax.axhline(level, color=colour, linestyle=line, linewidth=1.0)
            else:
                x = [float(result.experiment.flag("--lr")) for result in runs]
                ax.plot(x, y, color=colour, linestyle=line, marker=marker, markersize=3.2 * size,
                        markerfacecolor="white", linewidth=1.4 * size)  # fmt: skip
                ends = [acc if result.stopped else math.nan for acc, result in zip(y, runs)]
                ax.plot(x, ends, color=BLACK, linestyle="none", marker="x", zorder=3)
    ax.set_xscale("log")
    ax.set_xticks([1e-7, 1e-5, 1e-3, 1e-1, 1e1])
    ax.minorticks_off()
    ax.set_xlabel(f"rate of Adam and SGD, {epochs:,} epochs")


def fig2(results):
    """Eight steps of gradient descent from the red point."""
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.1), sharey=True)
    grid = np.linspace(-2.2, 2.2, 300)
    for ax, (words, rate) in zip(axes, (("too small", 0.05), ("right", 0.7), ("too large", 2.07))):
        w = -1.2 * (1 - rate) ** np.arange(9)
        ax.plot(grid, grid**2 / 2, color=BLUE, linewidth=1.6)
        ax.plot(w, w**2 / 2, color=BLACK, marker="o", markersize=3.2, linewidth=0.8)
        ax.plot(w[:1], w[:1] ** 2 / 2, color=RED, marker="o", markersize=5, linestyle="none")
        ax.set(title=f"learning rate {rate:g}: {words}", xlim=(-2.2, 2.2), ylim=(-0.15, 2.4),
               xlabel="weight $w$")  # fmt: skip
        ax.grid(False)
    axes[0].set_ylabel(r"objective $\mathcal{L}(w)=w^2/2$")
    return figure


def fig3(results):
    """The measured objective L(W + tΔW) along AGD's own direction and the paper's majorisation
    L − tG + ½(eᵗ − 1)², least at t = η; where the objective lay above the bound, the gap would be
    filled in red. All in the paper's normalisation: the square loss with its ½, inputs of norm √d₀.
    Training has no ½, other inputs and batches of 128, so its η is larger. Right, at t = η: mean
    over layers of ‖ΔW‖/‖W‖, means over images of ‖Δf‖/√C and of |Δℓ|, and ΔL."""
    measured = majorisation.read(results)
    if measured is None:
        return None
    row = majorisation.planned(results)
    figure = plt.figure(figsize=(WIDTH, 2.6))
    *axes, chain = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])
    for ax, (when, state) in zip(axes, measured["states"].items()):
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
        ax.set(title=when, xlabel="$t$, along AGD's direction")
    axes[0].set_ylabel(r"objective $\mathcal{L}$")
    _chain(chain, measured["states"])
    style.legend(figure, [
        style.key("objective, measured", BLUE),
        style.key("majorisation", RED, linestyle=DASHED),
        style.key("before the step", BLACK, marker="x", linestyle="none"),
        style.key("least of the bound: the step", BLACK, marker=r"$\downarrow$", markersize=8,
                  linestyle="none"),
    ])  # fmt: skip
    data = data_name(row.flag("--dataset"), measured["run"]["data"])
    words = f"{row.network}, {measured['images']:,} images of {data}"
    figure.supxlabel(words, fontsize=7)
    return figure


def _chain(ax, states):
    """The chain of perturbations, each with its measured size at t = eta."""
    ax.set_axis_off()
    ax.set_xlim(0, 4)
    ax.set_ylim(-0.2, 3.3)
    centre = {"ha": "center", "va": "center"}
    arrow = {"arrowstyle": "-|>", "color": BLACK}
    links = ((r"$\Delta W$", "weights", "dW", style.ORANGE),
             (r"$\Delta f$", "outputs", "df", style.SKY),
             (r"$\Delta\ell$", "losses", "dl", style.GREEN),
             (r"$\Delta\mathcal{L}$", "objective", "dL", style.PINK))  # fmt: skip
    for i, (symbol, word, key, colour) in enumerate(links):
        ax.text(i + 0.5, 2.55, symbol, fontsize=11, **centre, bbox={
            "boxstyle": "round,pad=0.42", "facecolor": colour, "alpha": 0.35, "edgecolor": BLACK,
            "linewidth": 0.8})  # fmt: skip
        ax.text(i + 0.5, 1.9, word, fontsize=7, **centre)
        if i < 3:
            ax.annotate("", (i + 1.2, 2.55), (i + 0.8, 2.55), arrowprops=arrow)
        for row, state in enumerate(states.values()):
            number = f"{state['chain'][key]:.2g}".replace("-", "−")
            ax.text(i + 0.5, 1.05 - 0.75 * row, number, fontsize=7.5, **centre)
    for row, when in enumerate(states):
        ax.text(0, 1.4 - 0.75 * row, when, fontsize=6.5, color="#666666", va="center")
    ax.set_title("how a perturbation travels, at $t=η$")


# What stands in for a panel of figure 4 that was not run.
STAND_INS = {"resnet18": "resnet18, 5,000 images", "vgg": "vgg, tiny100"}


def fig4(results):
    """Adam at the rate of its grid with the least train loss, or at the one rate that was run.
    Spectral AGD is tested at its average. Below, η, its mean in each epoch within its range."""
    names, drawn = (*RULES, *BASELINES), {}
    for panel in ("fcn", "resnet18", "vgg", "imagenet"):
        for place in filter(None, (panel, STAND_INS.get(panel))):
            runs = {name: _shown(results, "fig4", place, name) for name in names}
            if any(runs.values()):
                drawn[place] = runs
                break
    if not drawn:
        return None
    size = {"figsize": (max(0.45, len(drawn) / 3) * WIDTH, 4.6), "height_ratios": (1, 1, 0.6)}
    figure, axes = plt.subplots(3, len(drawn), squeeze=False, sharex="col", **size)
    for (objective, accuracy, eta), (panel, runs) in zip(axes.T, drawn.items()):
        objective.set_title(results.title("fig4", panel).replace(", ", "\n", 1), fontsize=7.5)
        words = []
        for name in names:
            if result := runs[name]:
                look = style.OPTIMIZERS[name]
                style.curve(objective, result, "train_loss", *look)
                style.train_and_test(accuracy, result, "acc", *look, 100)
                if name in RULES:
                    style.band(eta, result, "eta", *look)
            if name in BASELINES and results.of("fig4", panel, name):
                words.append(f"{name}{_rate(results, result)}".replace(" (", "\n("))
        objective.text(0.03, 0.04, "\n".join(words), transform=objective.transAxes, fontsize=7)
        style.log_values(objective)
        style.log_axis(eta, max(len(result.epochs) for result in runs.values() if result))
        if any(runs[name] for name in RULES):
            style.log_values(eta)
        else:
            style.not_run(eta)
    for ax, words in zip(axes[:, 0], ("train loss", "accuracy (%)", "η")):
        ax.set_ylabel(words)
    there = [name for name in names if any(runs[name] for runs in drawn.values())]
    style.legend(figure, [*map(style.optimizer_key, there), *style.kinds()])
    return figure


def _rate(results, result):
    """The rate of the tuned run of a grid, and when it was chosen if the grid is not finished."""
    if result is None:
        return ": search not finished"
    row = result.experiment
    epochs = results.searched_epochs(*row[:3])
    return f", rate {row.flag('--lr')}" + (
        f" (chosen after {epochs:,} epochs)" if epochs < len(result.epochs) else "")  # fmt: skip


def fig5(results):
    """Adam and SGD at the rate of the grid with the least train loss. Spectral AGD is tested at its
    average. Right: the update of a step, a mean over layers; the line is its mean in an epoch, the
    band its range. Of several seeds the first is shown."""
    runs, keys = {}, []
    for name in (*RULES, *BASELINES):
        if not results.of("fig5", "fcn", name):
            continue
        result = _shown(results, "fig5", "fcn", name)
        rate = _rate(results, result) if name in BASELINES else ""
        keys.append(style.optimizer_key(name, name + rate))
        if result is not None:
            runs[name] = result
    figure, (objective, accuracy, update) = plt.subplots(1, 3, figsize=(WIDTH, 2.5))
    for name, result in runs.items():
        look = style.OPTIMIZERS[name]
        shift = 0.5 if name == "SGD" else 0  # its line is close to Adam's: markers between those
        style.curve(objective, result, "train_loss", *look, shift=shift)
        style.curve(accuracy, result, "test_acc", *look, 100, shift)
        style.band(update, result, "update", *look)
    style.log_values(objective)
    style.log_values(update)
    objective.set_title("train loss")
    accuracy.set_title("test accuracy (%)")
    update.set_title(r"relative update $\|\Delta W\|_F\,/\,\|W\|_F$")
    for ax in (objective, accuracy, update):
        style.log_axis(ax, longest(runs.values()))
    style.legend(figure, keys)
    figure.supxlabel(results.title("fig5", "fcn"), fontsize=7)
    return figure


def fig6(results):
    """A row is a quantity; η is its mean in an epoch. Left: networks of all depths and widths after
    the last epoch that all of them have, brighter is better (η: larger is darker). Right: the way
    there, a picture for each depth, a line for each width."""
    runs = {(depth, width): results.only("fig6", f"{depth}x{width}", "AGD")
            for depth in DEPTHS for width in WIDTHS[results.scale]}  # fmt: skip
    runs = {size: result for size, result in runs.items() if result}
    runs = {size: x for size, x in runs.items() if not x.only_begun} or runs
    depths, widths = (sorted(set(sizes)) for sizes in zip(*runs))
    epochs = common_epochs(runs.values())
    figure = plt.figure(figsize=(WIDTH, 4.7))
    columns = (0.52 * len(widths), *[0.85] * len(depths))
    grid = figure.add_gridspec(3, len(columns), width_ratios=columns)
    colours = dict(zip(widths, style.shades(len(widths))))
    quantities = (("train loss", "train_loss", 1, ".3f", "viridis_r"),
                  ("test accuracy (%)", "test_acc", 100, ".1f", "viridis"),
                  ("η", "eta_mean", 1, ".2f", "YlGnBu"))  # fmt: skip
    for row, (words, key, scale, form, colormap) in enumerate(quantities):
        last = {size: scale * x.until(epochs).column(key)[-1] for size, x in runs.items()}
        table = figure.add_subplot(grid[row, 0])
        style.heat_map(table, depths, widths, last, form, colormap)
        table.set_title(f"{words}, epoch {epochs:,}")
        table.set_ylabel("depth")
        table.tick_params(labelbottom=row == 2)
        first = None
        for column, depth in enumerate(depths, 1):
            first = ax = figure.add_subplot(grid[row, column], sharey=first, sharex=first)
            for width in widths:
                if result := runs.get((depth, width)):
                    result = result.until(epochs)
                    style.curve(ax, result, key, colours[width], scale=scale, linewidth=1.0)
            ax.tick_params(labelleft=column == 1, labelbottom=row == 2)
            if row == 0:
                ax.set_title(f"depth {depth}")
            style.log_axis(ax, epochs, "epochs" if row == 2 else "", few=True)
        if key == "train_loss":
            style.log_values(first)
    table.set_xlabel("width")
    style.legend(figure, [style.key(f"width {width}", colours[width]) for width in widths])
    figure.supxlabel(f"FCN depth×width, {next(iter(runs.values())).data}", fontsize=7)
    return figure


def fig7(results):
    """Train loss and η: means over steps of the first epoch, then over epochs; η within its range,
    which widens where a point begins to stand for an epoch. Of several seeds the first is shown."""
    figure, (objective, eta, accuracy) = plt.subplots(1, 3, figsize=(WIDTH, 2.6))
    runs = {batch: results.only("fig7", f"batch {batch}", "AGD") for batch in BATCHES}
    there, keys = [batch for batch in BATCHES if runs[batch]], []
    for (batch, result), colour, marker in zip(runs.items(), style.shades(len(runs)), "os^D"):
        if result is None:
            continue
        keys.append(style.key(f"batch size {batch:,}", colour, marker=marker, markersize=3.6,
                              markerfacecolor="white"))  # fmt: skip
        style.curve(accuracy, result, "test_acc", colour, marker, 100)
        steps, loss, low, mean, high = _iterations(result)
        style.span(eta, steps, low, high, colour)
        for ax, y in ((objective, loss), (eta, mean)):
            ax.plot(steps, y, color=colour)
            style.end(ax, steps[-1], y[-1], colour, marker)
    for ax, words in ((objective, "train loss"), (eta, "automatic learning rate η")):
        ax.set_title(words)
        style.log_values(ax)
        style.log_axis(ax, int(max(ax.dataLim.intervalx)), "iterations")
    accuracy.set_title("test accuracy (%)")
    style.log_axis(accuracy, longest(results.of("fig7")))
    style.legend(figure, keys)
    figure.supxlabel(results.title("fig7", f"batch {there[0]}"), fontsize=7)
    return figure


def _iterations(result):
    """Step, train loss, and least, mean and greatest eta: of the first epoch's steps, then of
    epochs, each at its middle; in parts of a decade."""
    steps = [row for row in result.steps if row["epoch"] == 1]
    count, epochs = len(steps), len(result.epochs)
    x = np.concatenate([np.arange(count) + 1, count * (np.arange(2, epochs + 1) - 0.5)])
    first, later = style.bins(count, 12), style.bins(epochs, 24)[1:]
    parts = first + [slice(count - 1 + part.start, count - 1 + part.stop) for part in later]

    def column(key, of_epoch, reduce=np.mean):
        values = [math.nan if row[key] is None else row[key] for row in steps]
        values = np.array(values + result.column(of_epoch)[1:])
        return np.array([reduce(values[part]) for part in parts])

    etas = zip(("min", "mean", "max"), (np.min, np.mean, np.max))
    return (np.array([x[part].mean() for part in parts]), column("loss", "train_loss"),
            *(column("eta", f"eta_{which}", reduce) for which, reduce in etas))  # fmt: skip


def fig8(results):
    """What a budget buys, in epochs and in seconds. A search over five rates that has spent 5n
    epochs has the network that had the least train loss after n; both AGDs, and other optimisers at
    their defaults, have their one run. Epochs of one network, so the passes cost the same, while
    the optimisers' own time differs: a step of spectral AGD takes several times the passes of such
    a small network. Seconds are those of the logs, training and test; the table above names their
    machines, which several runs shared. Of each AGD's seeds the first; the train loss of
    Schedule-free AdamW and of spectral AGD is that of the weights that they train, their test
    accuracy that of those that they average."""
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 4.6), sharex="col", sharey="row")
    keys, longest_budget, seconds = [], 2, []
    for name in (*RULES, *PEERS, *BASELINES):
        runs = results.of("fig8", "fcn", name)
        planned = len(results.planned("fig8", "fcn", name))
        if name in RULES:
            runs, planned = runs[:1], 1  # the first seed
        if not runs:
            continue
        points = list(searched(runs)) if len(runs) == planned else []
        words = f", {planned} rates searched" if planned > 1 else ""
        keys.append(style.optimizer_key(name, name + (words if points else ": not finished")))
        if not points:
            continue
        *budgets, rows = zip(*points)
        longest_budget = max(longest_budget, *budgets[0])
        seconds += budgets[1]
        colour, marker = style.OPTIMIZERS[name]
        look = {"color": colour, "marker": marker, "markersize": 4.2, "markerfacecolor": "white",
                "clip_on": False}  # fmt: skip
        look |= {"linewidth": 2.2} if name in RULES else {}
        for column, spent in enumerate(style.binned(x)[1] for x in budgets):
            look["markevery"] = style.spaced(spent, 6)
            for line, (key, scale) in enumerate((("test_acc", 100), ("train_loss", 1))):
                values = style.binned([scale * row[key] for row in rows])[1]
                axes[line, column].plot(spent, values, **look)
    style.log_axis(axes[1, 0], longest_budget, "compute: epochs of training, the search included")
    words = "seconds of the runs, the search included"
    style.log_axis(axes[1, 1], max(seconds, default=2), words, min(seconds, default=1))
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[1, 0].set_ylabel("train loss")
    style.legend(figure, keys, 4)
    figure.supxlabel(results.title("fig8", "fcn"), fontsize=7)
    return figure


def fig10(results):
    """Validation loss of a transformer on characters, of three seeds the mean within their range.
    AdamW has a warm-up, a cosine and a weight decay of 0.1, and the rate of the grid with the least
    final train loss, a mean over the seeds; the thin lines are its other rates. The other
    optimisers are at their defaults, with one seed. Spectral AGD and Schedule-free AdamW are
    validated at their averages. Right: the last loss at each of AdamW's rates, and level lines of
    the others. A bigram's loss follows from the counts of pairs in the training text, one added to
    each. What is above the frame is a tenth or more above that."""
    size = {"figsize": (WIDTH, 2.9), "width_ratios": (1.6, 1), "sharey": True}
    figure, (steps, rates) = plt.subplots(1, 2, **size)
    keys, bigram = [], bigram_loss()
    for name in (*RULES, ADAMW, *TEXT_PEERS):
        runs, words = results.of("fig10", "gpt", name), name
        if not runs:
            continue
        look = style.OPTIMIZERS[name]
        if name == ADAMW:
            runs = results.tuned_seeds("fig10", "gpt", name)
            words += f", rate {runs[0].experiment.flag('--lr')}" if runs else ": not finished"
            grid = results.by_rate("fig10", "gpt", name)
            for others in grid.values():
                if others != runs:
                    style.seeds(steps, others, "test_loss", look[0], thin=True)
            _last(rates, grid, *look)
        else:
            _last(rates, dict.fromkeys(ROOTS, runs), *look, level=True)
        keys.append(style.optimizer_key(name, words))
        if runs:
            style.seeds(steps, runs, "test_loss", *look)
    level = {"color": style.GREY, "linestyle": DASHED}
    keys.append(style.key(f"a bigram's loss, {bigram:.2f}", **level))
    for ax in (steps, rates):
        ax.axhline(bigram, **level)
    steps.set_ylim(top=1.1 * bigram)
    steps.set_xlim(left=0)
    steps.set_xlabel("steps")
    steps.set_ylabel("validation loss (nats a character)")
    steps.set_title(results.title("fig10", "gpt"))
    rates.set_xscale("log")
    rates.set_xlabel("learning rate of AdamW")
    rates.set_title("at the end")
    style.legend(figure, keys, 3)
    return figure


def _last(ax, runs, colour, marker=None, level=False):
    """The last validation losses of {rate: runs, one a seed} that are finished: the mean within the
    range; a level line has its marker at its end alone."""
    ended = {x: [run.test_loss for run in some if run.finished] for x, some in runs.items()}
    x = [float(rate) for rate, losses in ended.items() if losses]
    y = [losses for losses in ended.values() if losses]
    low, mean, high = ([f(losses) for losses in y] for f in (min, np.mean, max))
    ax.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
    ax.plot(x, mean, color=colour, marker=marker, markersize=3.6, markerfacecolor="white",
            markevery=[len(x) - 1] if level and x else None)  # fmt: skip


def fig11(results):
    """The length of Z, and the angle by which a step turns it, at the end of every epoch, means
    over the hidden layers; dashed what follows for steps of random directions, from the measured η
    and from the number of steps t alone. No horizon is set."""
    result = results.only("fig11", "fcn", SPECTRAL)
    figure, (length, turn, eta) = plt.subplots(1, 3, figsize=(WIDTH, 2.5))
    steps = result.epoch_steps
    epochs = np.arange(1, len(result.epochs) + 1)
    L = result.first["paths" if "paths" in result.first else "layers"]
    relative = np.array(result.column("eta_mean")) / L
    predicted = {"color": BLACK, "linestyle": DASHED, "linewidth": 1.0}
    colour = style.OPTIMIZERS[SPECTRAL][0]
    style.curve(length, result, "length", colour)
    length.plot(epochs, np.sqrt(1 + 3 * np.cumsum(steps * relative**2)), **predicted)
    style.curve(turn, result, "turn", colour)
    turn.plot(epochs, 1 / np.sqrt(3 * steps * epochs), **predicted)
    style.band(eta, result, "eta", colour)
    titles = r"length $\rho(Z)/s$", "turn of $Z$ in a step", "automatic learning rate η"
    for ax, words in zip((length, turn, eta), titles):
        ax.set_title(words)
        style.log_values(ax)
        style.log_axis(ax, len(result.epochs))
    words = r"predicted: $\sqrt{1+3\,\Sigma(\eta/L)^2}$ and $1/\sqrt{3t}$ after $t$ steps"
    keys = [style.key("mean of the hidden layers", colour), style.key(words, **predicted)]
    style.legend(figure, keys)
    figure.supxlabel(f"{results.title('fig11', 'fcn')}, {steps} steps an epoch", fontsize=7)
    return figure


def phases(results):
    """A part of the training set is fitted soon: η, its mean in each epoch within its range, rises,
    then falls."""
    result = results.only("phases", "fcn", "AGD")
    figure, (accuracy, eta) = plt.subplots(1, 2, figsize=(WIDTH * 2 / 3, 2.4))
    style.train_and_test(accuracy, result, "acc", BLACK, scale=100)
    style.band(eta, result, "eta", BLACK)
    style.percent(accuracy, [result])
    accuracy.set_title("accuracy (%)")
    eta.set_title("automatic learning rate η")
    style.log_values(eta)
    for ax in (accuracy, eta):
        style.log_axis(ax, len(result.epochs))
    style.legend(figure, style.kinds())
    figure.supxlabel(results.title("phases", "fcn"), fontsize=7)
    return figure


DRAWN = {draw.__name__: draw for draw in (
    fig1, fig2, fig3, fig4, fig5, fig6, fig7, fig8, fig10, fig11, phases)}  # fmt: skip
