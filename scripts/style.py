"""How pictures look and how they are saved: colours, axes, legends, the curves of a run."""

import hashlib
import io
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from runs.files import write_whole

STYLE = Path(__file__).with_name("paper.mplstyle")
WIDTH = 7.2  # inches, the text of a page

# Okabe and Ito's colours, which colour-blind readers tell apart. Where grey does not, markers, dots
# and dashes do.
BLACK, BLUE, ORANGE, GREEN, PINK, SKY, RED = (
    "#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00",
)  # fmt: skip
GREY = "#555555"
OPTIMIZERS = {  # colour and marker
    "AGD": (BLACK, None),
    "Spectral AGD": (RED, "P"),
    "Adam": (ORANGE, "o"),
    "AdamW": (BLUE, "o"),
    "SGD": (BLUE, "^"),
    "Prodigy": (GREEN, "s"),
    "Schedule-free AdamW": (PINK, "D"),
    "D-Adapted Adam": (SKY, "v"),
    "Muon, AdamW": (ORANGE, "^"),
    "NAdamW": (BLUE, "s"),
    "AdamW, tuned": (GREY, None),
}
MANY = 50  # epochs, above which a line goes through means
DOTTED = (0, (1, 1.2))
DASHED = (0, (4, 1.8))
KINDS = (("train", "-"), ("test", DOTTED))


def fingerprint(picture):
    """A checksum of the content of a picture, whichever version draws it: the points of all lines
    and bands, the words of titles, labels and legends."""
    drawn = []
    for ax in picture.axes:
        points = [line.get_xydata() for line in ax.lines]
        points += [path.vertices for band in ax.collections for path in band.get_paths()]
        drawn += [f"{x:.6g}" for xy in points for x in np.asarray(xy, dtype=float).ravel()]
        drawn += [ax.get_title(), ax.get_xlabel(), ax.get_ylabel()]
        drawn += [text.get_text() for text in ax.texts]
    drawn += [text.get_text() for legend in picture.legends for text in legend.get_texts()]
    drawn += [text.get_text() for text in picture.texts]
    return hashlib.sha256("\n".join(drawn).encode()).hexdigest()


def save(picture, *paths):
    """Write a picture as PNG, PDF or SVG, by the suffix of each path, and close it. Returns the
    paths. A PNG's "Source" is the fingerprint of the picture."""
    for path in map(Path, paths):
        words = {".png": {"Source": fingerprint(picture)}, ".pdf": {"CreationDate": None}}
        file = io.BytesIO()
        with plt.style.context([STYLE]):
            picture.savefig(file, format=path.suffix[1:], metadata=words.get(path.suffix))
        write_whole(path, file.getvalue())
    plt.close(picture)
    return paths


def percent(ax, results=()):
    """Accuracies in %, from 0 to the quarter above the highest of the runs."""
    highest = max((row[key] for result in results for row in result.epochs
                   for key in ("train_acc", "test_acc")), default=1)  # fmt: skip
    ax.set_ylim(0, min(25 * math.ceil(4 * highest + 0.02), 102))
    ax.yaxis.set_major_locator(FixedLocator(range(0, 101, 25)))


def log_axis(ax, last, label="epochs", first=1, few=False):
    """A log axis of x from `first` to `last`: ticks at 1, 2, 5 or tens alone, and at `last`; `few`:
    for a small picture."""
    last = max(last, 2 * first)
    ticks = [k * 10**n for n in range(8) for k in (1, 2, 5) if first <= k * 10**n <= last]
    tens_alone = len(ticks) > (3 if few else 7)
    ticks = [x for x in ticks if not tens_alone or str(x)[0] == "1"]
    if first == 1 and last < 100 and last not in ticks:
        ticks = [x for x in ticks if last / x > 1.35] + [last]
    ax.set_xscale("log")
    ax.set_xlim(first, last)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    powers = tens_alone and last >= 10_000
    ax.xaxis.set_major_formatter(FuncFormatter(
        lambda x, _: f"$10^{{{math.log10(x):.0f}}}$" if powers else f"{x:g}"
    ))  # fmt: skip
    ax.set_xlabel(label)


def log_values(ax):
    """A log axis of y: decimal labels where it spans less than two decades, the more of them the
    less it spans, and short ticks at the digits between."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < 100:
        even = MaxNLocator(5, steps=[1, 2, 5, 10])
        tens = LogLocator(subs=[1, 2, 5] if high / low > 10 else [1, 2, 3, 5, 7])
        ax.yaxis.set_major_locator(even if high / low < 3 else tens)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_locator(LogLocator(subs=range(1, 10)))
        ax.yaxis.set_minor_formatter(NullFormatter())


def not_run(ax):
    ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", va="center",
            color="#777777", fontstyle="italic")  # fmt: skip
    ax.grid(False)
    ax.tick_params(which="both", bottom=False, labelbottom=False)


def shades(count):
    """Colours from dark to light, in grey too."""
    return [plt.get_cmap("viridis")(x) for x in np.linspace(0, 0.82, count)]


def heat_map(ax, rows, columns, values, form, colormap):
    """A table of {(row, column): value} whose cells have colours; absent ones stay white."""
    table = np.array([[values.get((row, column), math.nan) for column in columns] for row in rows])
    image = ax.imshow(table, cmap=colormap, aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        if math.isfinite(value):
            light = np.dot(image.cmap(image.norm(value))[:3], (0.3, 0.59, 0.11)) > 0.5
            ax.text(j, i, f"{value:{form}}", ha="center", va="center", fontsize=6.5,
                    color=BLACK if light else "#ffffff")  # fmt: skip
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def bins(count, decade):
    """Slices of `count` items, of one at first, then a part of a decade wide."""
    points = max(2, 1 + round(decade * np.log10(count)))
    edges = sorted({round(x) for x in np.geomspace(1, count + 1, points)})
    return [slice(low - 1, high - 1) for low, high in zip(edges, edges[1:])]


def binned(y, reduce=np.mean, most=MANY):
    """(epochs, values) of values of epochs: all of a few, means of bins of more than `most`."""
    parts = bins(len(y), 24) if len(y) > most else [slice(i, i + 1) for i in range(len(y))]
    return ([(part.start + 1 + part.stop) / 2 for part in parts],
            [reduce(y[part]) for part in parts])  # fmt: skip


def spaced(x, shown, shift=0.0):
    """About `shown` indices of ascending values, evenly on a log axis, moved by `shift` of their
    distance; all of a few."""
    x = np.log(x)
    if len(x) <= 2 * shown and not shift:
        return list(range(len(x)))
    places = (np.arange(shown - bool(shift)) + shift) / (shown - 1)
    return sorted({int(abs(x - x[0] - (x[-1] - x[0]) * place).argmin()) for place in places})


def curve(ax, result, key, colour, marker=None, scale=1.0, shift=0.0, most=MANY, **look):
    """A value of a run over its epochs, with a few markers."""
    x, y = binned([scale * value for value in result.column(key)], most=most)
    if marker:
        look |= {"marker": marker, "markevery": spaced(x, 4, shift), "markersize": 3.6,
                 "markerfacecolor": "white", "markeredgewidth": 1.0, "clip_on": False}  # fmt: skip
    elif len(y) == 1:
        look |= {"marker": "o", "markersize": 3}
    ax.plot(x, y, color=colour, **look)


def seeds(ax, results, key, colour, marker=None, thin=False):
    """A value of runs that differ by their seeds over their steps, as far as all go: the mean
    within the range, or a thin line of the mean."""
    count = min(len(result.epochs) for result in results)
    x = results[0].epoch_steps * np.arange(1, count + 1)
    y = np.array([result.column(key)[:count] for result in results])
    if thin:
        ax.plot(x, y.mean(0), color=colour, linewidth=0.6, alpha=0.7)
        return
    ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.22, linewidth=0)
    ax.plot(x, y.mean(0), color=colour, marker=marker, markersize=3.6, markerfacecolor="white",
            markevery=max(1, count // 6))  # fmt: skip


def end(ax, x, y, colour, marker):
    """The marker at the end of a line."""
    ax.plot([x], [y], color=colour, marker=marker, markersize=3.6, markerfacecolor="white",
            clip_on=False)  # fmt: skip


def span(ax, x, low, high, colour):
    """A range: a light area within thin lines, which tell one from another where they overlap."""
    ax.fill_between(x, low, high, facecolor=to_rgba(colour, 0.2), edgecolor=to_rgba(colour, 0.5),
                    linewidth=0.4)  # fmt: skip


def band(ax, result, key, colour, marker=None, most=MANY):
    """The mean of a value in each epoch, within its range."""
    (x, low), (_, high) = (binned(result.column(f"{key}_{which}"), reduce, most)
                           for which, reduce in (("min", np.min), ("max", np.max)))  # fmt: skip
    span(ax, x, low, high, colour)
    curve(ax, result, f"{key}_mean", colour, marker, most=most)


def train_and_test(ax, result, kind, colour, marker=None, scale=1.0):
    """The "loss" or "acc" of a run: in training solid, in testing dotted."""
    curve(ax, result, f"train_{kind}", colour, marker, scale)
    curve(ax, result, f"test_{kind}", colour, None, scale, linestyle=DOTTED)


def key(label, color, **look):
    """A line of a legend."""
    return Line2D([], [], color=color, label=label, **look)


def optimizer_key(name, label=None):
    colour, marker = OPTIMIZERS[name]
    return key(label or name, colour, marker=marker, markersize=3.6, markerfacecolor="white")


def kinds(test=DOTTED, word="test"):
    return [key("train", GREY), key(word, GREY, linestyle=test)]


def legend(figure, handles, ncols=None):
    """A legend above the panels, in as many columns, or as fit into the width."""
    for columns in range(ncols or len(handles), 0, -1):
        made = figure.legend(handles=handles, loc="outside upper center", ncols=columns)
        if columns == 1 or made.get_window_extent().width <= figure.bbox.width:
            return
        made.remove()
