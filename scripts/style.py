"""How the figures are drawn: colours, axes, and the curves of a run."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from scripts.results import network_name

STYLE = Path(__file__).with_name("paper.mplstyle")
WIDTH = 7.2  # inches, the text of a page

# Okabe and Ito's colours, which colour-blind readers tell apart. Where grey does not, markers, dots
# and dashes do.
BLACK, BLUE, ORANGE, GREEN, PINK, SKY, RED = (
    "#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00",
)  # fmt: skip
OPTIMIZERS = {  # colour and marker
    "AGD": (BLACK, None),
    "Spectral AGD": (RED, "P"),
    "Adam": (ORANGE, "o"),
    "SGD": (BLUE, "^"),
    "Prodigy": (GREEN, "s"),
    "Schedule-free AdamW": (PINK, "D"),
    "D-Adapted Adam": (SKY, "v"),
}
ETA, OBJECTIVE, TRAIN, TEST = BLUE, ORANGE, BLACK, PINK  # as in figures 4, 6 and 7
DOTTED = (0, (1, 1.2))
DASHED = (0, (4, 1.8))


def percent(ax, found=()):
    """Accuracies in %, from 0 to the quarter above the highest of the runs."""
    highest = max((row[key] for x in found for row in x.epochs
                   for key in ("train_acc", "test_acc")), default=1)  # fmt: skip
    ax.set_ylim(0, min(25 * math.ceil(4 * highest + 0.02), 102))
    ax.yaxis.set_major_locator(FixedLocator(range(0, 101, 25)))


def log_axis(ax, last, label="epochs", first=1):
    """From `first` to `last`: by tens, in between where there is room, and, from 1, `last` itself.
    """
    last = max(last, 2 * first)
    ticks = [k * 10**n for n in range(8) for k in (1, 2, 5) if first <= k * 10**n <= last]
    tens_alone = len(ticks) > 7
    ticks = [x for x in ticks if not tens_alone or str(x)[0] == "1"]
    if first == 1 and last < 100 and last not in ticks:
        ticks = [x for x in ticks if last / x > 1.35] + [last]
    ax.set_xscale("log")
    ax.set_xlim(first, last)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    short = tens if tens_alone and last >= 1000 else plain
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    ax.set_xlabel(label)


def plain(x):
    return f"{x:g}"


def tens(x):
    return "1" if x == 1 else f"$10^{{{math.log10(x):.0f}}}$"


def log_values(ax):
    """A log axis of values: decimal labels where it spans less than two decades."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < 100:
        ax.yaxis.set_major_locator(LogLocator(subs=range(1, 9) if high / low < 4 else [1, 2, 5]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_locator(NullLocator())


def right_axis(ax):
    """A log axis on the right, for what lies beneath the accuracies."""
    right = ax.twinx()
    right.set_yscale("log")
    ax.grid(False)  # it would lie above the curves on the right
    right.grid(False, axis="y")
    right.spines["right"].set_visible(True)
    ax.set_zorder(right.get_zorder() + 1)
    ax.patch.set_visible(False)
    return right


def share_range(axes):
    """One range for all of these log axes, a little wider than what is drawn."""
    drawn = [ax.dataLim.intervaly for ax in axes if ax.has_data()]
    low, high = min(low for low, _ in drawn), max(high for _, high in drawn)
    for ax in axes:
        ax.set_ylim(low / 1.3, high * 1.3)
        ax.yaxis.set_major_locator(LogLocator(numticks=5))
        ax.yaxis.set_minor_formatter(NullFormatter())


def not_run(ax):
    ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", va="center",
            color="#777777", fontstyle="italic")  # fmt: skip
    ax.grid(False)
    ax.tick_params(which="both", bottom=False, labelbottom=False)


def spaced(count, shown):
    """About `shown` of `count` indices, evenly on a log axis."""
    return sorted({round(n) - 1 for n in np.geomspace(1, count, shown)})


def curve(ax, result, key, colour, marker=None, scale=1.0, **style):
    """A line over the epochs, from the first on; a few markers on a log axis."""
    y = [scale * value for value in result.column(key)]
    if marker:
        style |= {"marker": marker, "markevery": spaced(len(y), 4), "markersize": 3.6}
        style |= {"markerfacecolor": "white", "markeredgewidth": 1.0, "clip_on": False}
    elif len(y) == 1:
        style |= {"marker": "o", "markersize": 3}
    ax.plot(range(1, len(y) + 1), y, color=colour, **style)


def band(ax, result, key, colour):
    """The mean of an epoch's values within the range from their least to their greatest."""
    x = range(1, len(result.epochs) + 1)
    low, high = result.column(f"{key}_min"), result.column(f"{key}_max")
    ax.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
    curve(ax, result, f"{key}_mean", colour)


def train_and_test(ax, result, kind, colour, marker=None, scale=1.0):
    curve(ax, result, f"train_{kind}", colour, marker, scale)
    curve(ax, result, f"test_{kind}", colour, None, scale, linestyle=DOTTED)


def eta_loss_accuracy(ax, right, result):
    """All that a run of AGD logs, over the epochs."""
    band(right, result, "eta", ETA)
    curve(right, result, "train_loss", OBJECTIVE)
    curve(ax, result, "train_acc", TRAIN, scale=100)
    curve(ax, result, "test_acc", TEST, scale=100, linestyle=DOTTED)


def optimizer_key(name, label=None):
    colour, marker = OPTIMIZERS[name]
    return Line2D([], [], color=colour, marker=marker, markersize=3.6, markerfacecolor="white",
                  label=label or name)  # fmt: skip


def kinds():
    """The keys of train and test."""
    return [Line2D([], [], color="#555555", label="train"),
            Line2D([], [], color="#555555", linestyle=DOTTED, label="test")]  # fmt: skip


def quantities(test=DOTTED):
    return [
        Line2D([], [], color=ETA, label="automatic learning rate η"),
        Line2D([], [], color=OBJECTIVE, label="objective"),
        Line2D([], [], color=TRAIN, label="train accuracy"),
        Line2D([], [], color=TEST, linestyle=test, label="test accuracy"),
    ]


def legend(figure, handles, ncols=None):
    figure.legend(handles=handles, loc="outside upper center", ncols=ncols or len(handles))


def only(results, figure, panel, name):
    """The run of a curve that a picture shows, the first of its seeds; None where none is there."""
    found = results.of(figure, panel, name)
    return found[0] if found else None


def title(found):
    """Network and data of a run."""
    part = found.experiment.flag("--train_examples")
    images = f", {int(part):,} images" if part else ""
    return f"{network_name(found.experiment)}, {found.data}{images}"
