"""Draw runs: `python -m scripts.plot RUN [RUN ...] -o curves.png`, RUN a log of main.py.

Left the objective, in the middle the accuracy, on the training images as they were met (solid) and
on the test images (dashed), on the right AGD's automatic learning rate eta, its mean in an epoch
within the band from its least to its greatest. PNG, PDF or SVG, by the name of the output.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cli import Parser
from runs.log import RunError, read_rows, reason

# Okabe and Ito's colours, which colour-blind readers tell apart; the lightest one is left out.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE = Path(__file__).with_name("paper.mplstyle")


def read(path):
    """(first row, list of epoch rows) of a log."""
    rows = read_rows(path)
    epochs = [row for row in rows if row["kind"] == "epoch"]
    if not epochs:
        raise RunError(f"{path} holds no finished epoch")
    for key in ("arch", "dataset", "optimizer", "loss"):
        if not isinstance(rows[0]["flags"].get(key), str):
            raise RunError(f"{path} does not say its --{key}")
    return rows[0], epochs


def labels(flags):
    """What tells the runs apart: the settings in which they differ, else the name."""
    shown = ("arch", "depth", "width", "dataset", "loss", "optimizer", "lr", "gain", "train_bs",
             "image_size", "seed", "epochs")  # fmt: skip
    differ = [k for k in shown if len({str(f.get(k)) for f in flags}) > 1]
    if not differ:
        network = f"{flags[0]['arch']}"
        if flags[0]["arch"] == "fcn":
            network += f" {flags[0]['depth']}×{flags[0]['width']}"
        return [f"{network}, {flags[0]['dataset']}, {flags[0]['optimizer'].upper()}"] * len(flags)
    text = {"train_bs": "batch", "image_size": "side"}
    return [
        ", ".join(
            str(f.get(k)) if k in ("arch", "dataset", "loss", "optimizer")
            else f"{text.get(k, k)} {f.get(k)}"
            for k in differ
            if f.get(k) is not None
        )
        for f in flags
    ]  # fmt: skip


def draw(paths):
    """A figure of the runs."""
    runs = [read(path) for path in paths]
    names = labels([first["flags"] for first, _ in runs])
    with_eta = any(row["eta_mean"] is not None for _, epochs in runs for row in epochs)
    with plt.style.context([STYLE]):
        columns = 3 if with_eta else 2
        figure, axes = plt.subplots(1, columns, figsize=(3.0 * columns, 2.6))
        for i, ((_, epochs), name) in enumerate(zip(runs, names)):
            colour = COLOURS[i % len(COLOURS)]

            def column(key, epochs=epochs):
                return [float("nan") if row[key] is None else row[key] for row in epochs]

            x = column("epoch")
            dot = {"marker": "o", "markersize": 3} if len(x) == 1 else {}
            for ax, key in ((axes[0], "loss"), (axes[1], "acc")):
                ax.plot(x, column(f"train_{key}"), color=colour, label=name, **dot)
                ax.plot(x, column(f"test_{key}"), color=colour, linestyle=(0, (3, 1.5)), **dot)
            if with_eta and any(row["eta_mean"] is not None for row in epochs):
                axes[2].fill_between(
                    x, column("eta_min"), column("eta_max"), color=colour, alpha=0.2, linewidth=0
                )
                axes[2].plot(x, column("eta_mean"), color=colour, **dot)
        losses = {first["flags"]["loss"] for first, _ in runs}
        axes[0].set_title("Objective" if len(losses) > 1 else
                          {"mse": "Square loss", "xent": "Cross-entropy"}.get(*losses, "Objective"))
        low, high = axes[0].get_ylim()
        if low <= 0 or high / low > 5:
            axes[0].set_yscale("log")
        axes[1].set_title("Accuracy")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if with_eta:
            axes[2].set_title("Automatic learning rate η")
            axes[2].set_ylim(bottom=0)
        for ax in axes:
            ax.set_xlabel("epoch")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        keys = [
            plt.Line2D([], [], color="#555555", label="train"),
            plt.Line2D([], [], color="#555555", linestyle=(0, (3, 1.5)), label="test"),
        ]
        axes[1].legend(handles=keys, loc="lower right")
        handles, shown = axes[0].get_legend_handles_labels()
        figure.legend(handles, shown, loc="outside upper center", ncols=min(len(runs), 4))
    return figure


def main(argv=None):
    parser = Parser(
        prog="python -m scripts.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a log, results/logs/*.jsonl")
    parser.add_argument("-o", "--output", default="curves.png", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if Path(args.output).suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"{args.output} does not end in .png, .pdf or .svg")
    try:
        figure = draw(args.runs)
        with plt.style.context([STYLE]):
            figure.savefig(args.output)
    except RunError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{args.output} cannot be written: {reason(error)}")
    plt.close(figure)
    print(f"Drawn: {args.output}")


if __name__ == "__main__":
    main()
