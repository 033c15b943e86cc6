"""Draw runs: `python -m scripts.plot RUN [RUN ...] -o curves.png`, RUN a log of main.py.

Left the objective, in the middle the accuracy, on the training images as they were met (solid) and
on the test images (dashed), on the right AGD's automatic learning rate eta, its mean in an epoch
within the band from its least to its greatest. PNG, PDF or SVG, by the name of the output.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import math

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cli import Parser
from runs.log import RunError, read_rows
from scripts import style
from scripts.results import Result
from scripts.style import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY

COLOURS = [BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK]
DASHED = (0, (3, 1.5))
TITLES = {"mse": "Square loss", "xent": "Cross-entropy"}


def read(path):
    """The Result of a log. Raises RunError where nothing of it can be drawn."""
    rows = read_rows(path)
    epochs = [row for row in rows if row["kind"] == "epoch"]
    if not epochs:
        raise RunError(f"{path} holds no finished epoch")
    return Result(None, rows[0], epochs, [], None, True)


def labels(paths):
    """A label a run: the parts of its name that not all runs have, or the whole name."""
    names = [Path(path).stem.split("-") for path in paths]
    shared = set.intersection(*map(set, names)) if len(names) > 1 else set()
    return [", ".join([x for x in name if x not in shared] or name) for name in names]


def draw(paths):
    """A figure of the runs."""
    runs = [read(path) for path in paths]
    with_eta = [any(row["eta_mean"] is not None for row in run.epochs) for run in runs]
    columns = 3 if any(with_eta) else 2
    with plt.style.context([style.STYLE]):
        figure, axes = plt.subplots(1, columns, figsize=(3.0 * columns, 2.6))
        for i, (run, name, eta) in enumerate(zip(runs, labels(paths), with_eta)):
            colour = COLOURS[i % len(COLOURS)]
            for ax, kind in ((axes[0], "loss"), (axes[1], "acc")):
                style.curve(ax, run, f"train_{kind}", colour, label=name)
                style.curve(ax, run, f"test_{kind}", colour, linestyle=DASHED)
            if eta:
                style.band(axes[2], run, "eta", colour)
        losses = {run.first["settings"].get("loss") for run in runs}
        axes[0].set_title(TITLES.get(losses.pop() if len(losses) == 1 else None, "Objective"))
        low, high = axes[0].get_ylim()
        if math.isfinite(axes[0].dataLim.ymax) and (low <= 0 or high / low > 5):
            axes[0].set_yscale("log")
        axes[1].set_title("Accuracy")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes[1].legend(handles=style.kinds(DASHED), loc="lower right")
        if any(with_eta):
            axes[2].set_title("Automatic learning rate η")
            axes[2].set_ylim(bottom=0)
        for ax in axes:
            ax.set_xlabel("epoch")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        style.legend(figure, axes[0].get_legend_handles_labels()[0], min(len(runs), 4))
    return figure


def main(argv=None):
    parser = Parser(prog="python -m scripts.plot", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a log, results/logs/*.jsonl")
    parser.add_argument("-o", "--output", default="curves.png", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if Path(args.output).suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"{args.output} does not end in .png, .pdf or .svg")
    try:
        style.save(draw(args.runs), args.output)
    except RunError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{args.output} cannot be written: {error.strerror or error}")
    print(f"Drawn: {args.output}")


if __name__ == "__main__":
    main()
