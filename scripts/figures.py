"""The paper's figures, drawn from the runs of the table: `scripts.reproduce FIGURE --draw`.

Numbered as in the authors' blog post. A function's docstring is its figure's caption. A panel
without runs says so.
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
from scripts.results import searched
from scripts.style import BLACK, BLUE, DASHED, DOTTED, ETA, OBJECTIVE, RED, TEST, TRAIN, WIDTH
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


def fig1(results):
    """Train accuracy solid, test accuracy dotted. AGD, the paper's rule and the spectral one,
    beside the default rates of Adam (0.001) and SGD (0.1) on 32 layers; then the last accuracy at
    every rate from 1e-7 to 10, with those of AGD as level lines."""
    panels = list(dict.fromkeys(row.panel for row in results.planned("fig1")))
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH / 3 * len(panels), 2.3))
    for ax, panel in zip(axes, panels):
        style.percent(ax, results.of("fig1"))
        ax.set_title(results.title("fig1", panel))
        runs = results.of("fig1", panel)
        if not runs:
            style.not_run(ax)
        elif panel == "rates":
            _rates(ax, results)
        else:
            for x in runs:
                style.train_and_test(ax, x, "acc", *style.OPTIMIZERS[x.experiment.curve], 100)
            style.log_axis(ax, longest(runs))
    axes[0].set_ylabel("accuracy (%)")
    names = [name for name in (*RULES, *BASELINES) if results.of("fig1", curve=name)]
    keys = [*map(style.optimizer_key, names), *style.kinds()]
    style.legend(figure, keys, 3 if len(panels) < 3 else 6)
    return figure


def _rates(ax, results):
    """Final accuracy against the learning rate; a run that broke off counts as it ended."""
    for name in (*BASELINES, *RULES):
        runs = [result for result in results.of("fig1", "rates", name) if result.finished]
        colour, marker = style.OPTIMIZERS[name]
        for kind, line in style.KINDS:
            y = [100 * result.last[f"{kind}_acc"] for result in runs]
            if name in RULES:
                for level in y[:1]:
                    ax.axhline(level, color=colour, linestyle=line)
            else:
                x = [float(result.experiment.flag("--lr")) for result in runs]
                ax.plot(x, y, color=colour, linestyle=line, marker=marker, markersize=3.2,
                        markerfacecolor="white")  # fmt: skip
    ax.set_xscale("log")
    ax.set_xticks([1e-7, 1e-5, 1e-3, 1e-1, 1e1])
    ax.minorticks_off()
    ax.set_xlabel("learning rate of Adam and SGD")


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


def fig4(results):
    """AGD solid, the tuned baseline dashed; η with its range in each epoch."""
    # Tiny ImageNet, where it was run, stands in for a CIFAR-100 that was not.
    there = [bool(results.of("fig4", x)) for x in ("vgg", "vgg, tiny100")]
    third = "vgg, tiny100" if there == [False, True] else "vgg"
    panels = [x for x in ("fcn", "resnet18", third, "imagenet") if results.planned("fig4", x)]
    figure, axes = plt.subplots(2, len(panels), figsize=(WIDTH, 3.5), sharex="col", sharey="row")
    for (top, bottom), panel in zip(axes.T, panels):
        top.set_title(results.title("fig4", panel), fontsize=7.5)
        if not results.of("fig4", panel):
            style.not_run(top)
            style.not_run(bottom)
            continue
        agd = results.only("fig4", panel, "AGD")
        baseline = results.tuned("fig4", panel, "SGD" if panel == "imagenet" else "Adam")
        for result, look in ((agd, {}), (baseline, {"linestyle": DASHED, "alpha": 0.65})):
            if result is not None:
                style.curve(top, result, "train_loss", OBJECTIVE, **look)
                style.curve(bottom, result, "train_acc", TRAIN, scale=100, **look)
                style.curve(bottom, result, "test_acc", TEST, scale=100, **look)
        if agd:
            style.band(top, agd, "eta", ETA)
        style.log_axis(bottom, longest(results.of("fig4", panel)))
    style.log_values(axes[0, 0])
    style.percent(axes[1, 0], results.of("fig4"))
    axes[0, 0].set_ylabel("objective and η")
    axes[1, 0].set_ylabel("accuracy (%)")
    dashed = style.key("tuned Adam (ImageNet: SGD)", style.GREY, linestyle=DASHED, alpha=0.65)
    style.legend(figure, [*style.quantities(test="-"), dashed], 3)
    return figure


def fig5(results):
    """Adam and SGD at the rate of the grid with the least final train loss; of each AGD's seeds
    the first. Spectral AGD is tested at its average. Right: the mean over layers, its mean in each
    epoch within the range of its steps."""
    runs, keys = {}, []
    for name in (*RULES, *BASELINES):
        if not results.of("fig5", "fcn", name):
            continue
        result, words = results.only("fig5", "fcn", name), name
        if name in BASELINES:
            result = results.tuned("fig5", "fcn", name)
            rate = f", rate {result.experiment.flag('--lr')}" if result else None
            words += rate or ": search not finished"
        keys.append(style.optimizer_key(name, words))
        if result is not None:
            runs[name] = result
    figure, (objective, accuracy, update) = plt.subplots(1, 3, figsize=(WIDTH, 2.4))
    for name, result in runs.items():
        colour, marker = style.OPTIMIZERS[name]
        style.train_and_test(objective, result, "loss", colour, marker)
        style.train_and_test(accuracy, result, "acc", colour, marker, 100)
        style.band(update, result, "update", colour)
    style.log_values(objective)
    update.set_yscale("log")
    objective.set_title("objective")
    accuracy.set_title("accuracy (%)")
    update.set_title(r"relative update $\|\Delta W\|_F\,/\,\|W\|_F$")
    style.percent(accuracy, runs.values())
    for ax in (objective, accuracy, update):
        style.log_axis(ax, longest(runs.values()))
    style.legend(figure, keys + style.kinds())
    return figure


def beside(axes, results, name, draw_panel=style.eta_loss_accuracy):
    """Draw AGD's runs of the panels in `axes`, a dict: accuracies on the left axis, objective and
    eta on the right one. Panels share their ranges."""
    rights = {panel: style.right_axis(ax) for panel, ax in axes.items()}
    for panel, ax in axes.items():
        if not rights[panel].get_subplotspec().is_last_col():
            rights[panel].tick_params(labelright=False)
        result = results.only(name, panel, "AGD")
        if result is None:
            style.not_run(ax)
        else:
            draw_panel(ax, rights[panel], result)
    style.percent(next(iter(axes.values())), results.of(name))
    if len(axes) > 1:
        style.share_range(rights.values())
    return list(rights.values())


def fig6(results):
    """Accuracy on the left axis, objective and η, with its range in each epoch, on the right
    one."""
    widths = WIDTHS[results.scale]
    size = {"figsize": (WIDTH, 5.9), "sharex": True, "sharey": True}
    figure, axes = plt.subplots(len(DEPTHS), len(widths), **size)
    panels = [f"{depth}x{width}" for depth in DEPTHS for width in widths]
    rights = beside(dict(zip(panels, axes.flat)), results, "fig6")
    for ax, depth in zip(axes[:, 0], DEPTHS):
        ax.set_ylabel(f"depth {depth}", fontsize=8.5)
    for ax, width in zip(axes[0], widths):
        ax.set_title(f"width {width}")
    style.log_axis(axes[0, 0], longest(results.of("fig6")), "")
    figure.supxlabel("epochs", fontsize=8)
    figure.supylabel("accuracy (%)", fontsize=8)
    rights[len(widths) * (len(DEPTHS) // 2 + 1) - 1].set_ylabel("objective and η")
    style.legend(figure, style.quantities())
    return figure


def fig7(results):
    """The steps of the first epoch, averaged over twelfths of a decade, then every epoch (points,
    averages over that epoch, hence the kink); η with its range; of the seeds the first. Test
    accuracy is measured at the ends of epochs."""
    figure, axes = plt.subplots(1, len(BATCHES), figsize=(WIDTH, 2.4), sharey=True)
    panels = [f"batch {batch}" for batch in BATCHES]
    rights = beside(dict(zip(panels, axes)), results, "fig7", _iterations)
    for ax, batch in zip(axes, BATCHES):
        ax.set_title(f"batch size {batch}")
    axes[0].set_ylabel("accuracy (%)")
    rights[-1].set_ylabel("objective and η")
    style.legend(figure, style.quantities())
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

    def column(key, reduce=np.mean):
        values = np.array([math.nan if row[key] is None else row[key] for row in steps])
        return np.array([reduce(values[part]) for part in parts])

    def eta(x, low, mean, high, **look):
        right.fill_between(x, low, high, color=ETA, alpha=0.22, linewidth=0)
        right.plot(x, mean, color=ETA, **look)

    x = [(part.start + 1 + part.stop) / 2 for part in parts]
    eta(x, *(column("eta", reduce) for reduce in (np.min, np.mean, np.max)))
    right.plot(x, column("loss"), color=OBJECTIVE)
    ax.plot(x, 100 * column("acc"), color=TRAIN)
    dot = {"marker": "o", "markersize": 1.8}
    ends = len(steps) * np.arange(1, len(result.epochs) + 1)
    eta(ends, *(result.column(f"eta_{which}") for which in ("min", "mean", "max")), **dot)
    right.plot(ends, result.column("train_loss"), color=OBJECTIVE, **dot)
    for (kind, line), colour in zip(style.KINDS, (TRAIN, TEST)):
        accuracies = 100 * np.array(result.column(f"{kind}_acc"))
        ax.plot(ends, accuracies, color=colour, linestyle=line, **dot)
    style.log_axis(ax, int(ends[-1]), "iterations")


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
    keys, seconds = [], []
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
        seconds += budgets[1]
        colour, marker = style.OPTIMIZERS[name]
        look = {"color": colour, "marker": marker, "markersize": 4.2, "markerfacecolor": "white",
                "markevery": style.spaced(len(rows), 6), "clip_on": False}  # fmt: skip
        look |= {"linewidth": 2.2} if name in RULES else {}
        for column, spent in enumerate(budgets):
            axes[0, column].plot(spent, [100 * row["test_acc"] for row in rows], **look)
            axes[1, column].plot(spent, [row["train_loss"] for row in rows], **look)
    epochs = max((line.get_xdata()[-1] for line in axes[1, 0].lines), default=2)
    style.log_axis(axes[1, 0], epochs, "compute: epochs of training, the search included")
    words = "seconds of the runs, the search included"
    style.log_axis(axes[1, 1], max(seconds, default=2), words, min(seconds, default=1))
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[1, 0].set_ylabel("train loss")
    style.log_values(axes[1, 0])
    style.legend(figure, keys, 4)
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
            _last(rates, dict.fromkeys(ROOTS, runs), look[0])
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


def _last(ax, runs, colour, marker=None):
    """The last validation losses of {rate: runs, one a seed} that are finished: the mean within the
    range."""
    ended = {x: [run.test_loss for run in some if run.finished] for x, some in runs.items()}
    x = [float(rate) for rate, losses in ended.items() if losses]
    y = [losses for losses in ended.values() if losses]
    low, mean, high = ([f(losses) for losses in y] for f in (min, np.mean, max))
    ax.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
    ax.plot(x, mean, color=colour, marker=marker, markersize=3.6, markerfacecolor="white")


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
    style.band(eta, result, "eta", ETA)
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
    """A part of the training set is fitted soon: η rises, then falls."""
    figure, ax = plt.subplots(figsize=(WIDTH * 0.55, 2.6))
    (right,) = beside({"fcn": ax}, results, "phases")
    style.log_axis(ax, longest(results.of("phases")))
    ax.set_title(results.title("phases", "fcn"))
    ax.set_ylabel("accuracy (%)")
    right.set_ylabel("objective and η")
    style.legend(figure, style.quantities(), 2)
    return figure


DRAWN = {draw.__name__: draw for draw in (
    fig1, fig2, fig3, fig4, fig5, fig6, fig7, fig8, fig10, fig11, phases)}  # fmt: skip
