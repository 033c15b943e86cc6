"""Draw runs: `python -m scripts.plot RUN [RUN ...] -o curves.png`.

RUN is a log of main.py, a record (NAME.run.json), which stands for its log, or a folder, which
stands for the logs in it or in its logs/. Above the objective, then the accuracy, on the training
images as they were met (solid) and on the test images (dashed), below AGD's automatic learning rate
eta, its mean in an epoch within the band from its least to its greatest. Of texts the objective is
in nats a token (on the right in bits a byte), the accuracy that of the next token, and dashed is
validation. The title is what all runs have in common, the legend what tells them apart. The picture
is 80 mm wide: a column of a page. PNG, PDF or SVG, by the name of the output.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import math
import os
import re
import textwrap
from collections import Counter

from cli import Parser, a_path, command


def parse(argv=None):
    """(the parser, the arguments)."""
    parser = Parser(prog=command("scripts.plot"), description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", nargs="+", type=a_path, metavar="RUN",
                        help="a log, output/logs/NAME.jsonl, its record, or a folder of logs")
    parser.add_argument("-o", "--output", type=a_path, default="curves.png",
                        help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if Path(args.output).suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"{args.output} does not end in .png, .pdf or .svg")
    return parser, args


if __name__ == "__main__":
    parse()  # a mistake is refused before torch and matplotlib are imported, which takes seconds

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter

from runs.log import RunError, read_rows
from scripts import style
from scripts.results import Result
from scripts.style import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY
from scripts.words import LOSSES, described
from training.saved import CHECKPOINTS, split

COLOURS = [BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK]
MARKERS = [None, "o", "s", "^", "D", "v"]  # of the first seven runs, of the next seven, ...
MOST = len(COLOURS) * len(MARKERS)
DASHED = (0, (3, 1.5))
WIDTH = 80 / 25.4  # inches
PANEL, LINE = 1.25, 0.14  # inches: the height of a panel, and of a line of text
TITLE, LABEL = 50, 48  # characters of a line
RECORD = ".run.json"
ALL = math.inf  # epochs: each is drawn


def logs(paths):
    """The logs that the paths stand for, and the sentences about those in folders that have nothing
    to draw. Raises RunError for a path that stands for none."""
    results, notes = {}, []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted([*path.glob("*.jsonl"), *path.glob("logs/*.jsonl")], key=by_number)
            drawn = {}
            for log in inside:
                try:
                    drawn[log] = read(log)
                except RunError as error:
                    notes.append(f"left out: {error}")
            if inside and not drawn:
                raise RunError(notes[-1].removeprefix("left out: "))
            if not drawn:
                raise RunError(f"{path} holds {nothing(path)}")
            results |= drawn
        elif path.name.endswith(RECORD):
            log = path.with_name(path.name.removesuffix(RECORD) + ".jsonl")
            if not log.exists():
                raise RunError(f"the log of {path} is not beside it: there is no {log}")
            results[log] = read(log)
        elif path.name.endswith(CHECKPOINTS):
            log = path.resolve().parents[1] / "logs" / f"{split(path.name)[0]}.jsonl"
            log = log if path.is_absolute() else os.path.relpath(log)
            raise RunError(f"{path} is a checkpoint: give its log, {log}")
        else:
            results[path] = read(path)
    once = {path.resolve(): path for path in results}
    return {path: results[path] for path in once.values()}, notes


def by_number(path):
    """A key that sorts names with numbers as people do: bs128 before bs1024."""
    return [(int(x), "") if x.isdecimal() else (0, x) for x in re.split(r"(\d+)", str(path))]


def nothing(folder):
    """What a folder without logs holds, and where some are."""
    below = sorted({path.parents[1] for path in folder.glob("*/logs/*.jsonl")})
    below += sorted({path.parent for path in folder.glob("*/*.jsonl")})
    return "no logs" + (f"; {below[0]} does" if below else ", nor does its logs/")


def read(path):
    """The Result of a log. Raises RunError where nothing of it can be drawn."""
    rows = read_rows(path)
    epochs = [row for row in rows if row["kind"] == "epoch"]
    if not epochs:
        raise RunError(f"{path} holds no finished epoch")
    return Result(None, rows[0], epochs, [], None, True)


def titles(runs):
    """(the title, a label a run) of {path: Result}: what is common, and what is not."""
    each = []
    for path, run in runs.items():
        try:
            each.append(described(run.first))
        except (AttributeError, TypeError, ValueError) as error:
            raise RunError(f"{path} has settings that are not main.py's: {error}") from error
    keys = list(dict.fromkeys(key for words in each for key in words))
    # A setting that other runs do not have is at its default there.
    each = [{key: words.get(key, (f"{key.replace('_', ' ')} as usual", True)) for key in keys}
            for words in each]  # fmt: skip
    common = [key for key in keys if len({words[key][0] for words in each}) == 1]
    title = [each[0][key][0] for key in common if not each[0][key][1]]
    labels = [", ".join(words[key][0] for key in keys if key not in common) for words in each]
    # Runs of the same settings are told apart by their places.
    counts, where = Counter(labels), places(list(runs))
    labels = [", ".join(filter(None, pair)) if counts[pair[0]] > 1 else pair[0]
              for pair in zip(labels, where)]  # fmt: skip
    return ", ".join(title), labels


def places(paths):
    """The parts of each path that not all have, without the suffix."""
    parts = [[x for x in path.resolve().with_suffix("").parts if x != "logs"] for path in paths]
    shared = set.intersection(*map(set, parts))
    return ["/".join(x for x in each if x not in shared) for each in parts]


def filled(text, width):
    """The text in lines, broken between its parts where these fit."""
    whole = text.replace(", ", ",\n").replace(" ", "\xa0").replace("\n", " ")
    return textwrap.fill(whole, width, break_on_hyphens=False).replace("\xa0", " ")


def draw(runs):
    """A figure of {path of a log: its Result}; with a legend for 2 to MOST of them."""
    title, labels = titles(runs)
    title = filled(title, TITLE)
    labels = [filled(label, LABEL) for label in labels] if 1 < len(runs) <= MOST else []
    results = list(runs.values())
    with_eta = [any(row["eta_mean"] is not None for row in run.epochs) for run in results]
    panels = 3 if any(with_eta) else 2
    columns = 2 if labels and max(map(len, labels)) <= 20 else 1
    lines = sum(label.count("\n") + 1 for label in labels) / columns + title.count("\n") + 1
    with plt.style.context([style.STYLE]):
        size = WIDTH, panels * PANEL + lines * LINE + 0.35
        figure, axes = plt.subplots(panels, 1, figsize=size, sharex=True)
        texts = all(run.is_text for run in results)
        for i, (run, eta) in enumerate(zip(results, with_eta)):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
            label = labels[i] if labels else None
            for ax, kind in ((axes[0], "loss"), (axes[1], "acc")):
                style.curve(ax, run, f"train_{kind}", colour, marker, most=ALL, label=label)
                style.curve(ax, run, f"test_{kind}", colour, most=ALL, linestyle=DASHED)
            if eta:
                style.band(axes[2], run, "eta", colour, most=ALL)
        losses = {run.first["settings"].get("loss") for run in results}
        loss = LOSSES.get(losses.pop() if len(losses) == 1 else None, "objective")
        axes[0].set_ylabel(loss)
        low, high = axes[0].get_ylim()
        if math.isfinite(axes[0].dataLim.ymax) and (low <= 0 or high / low > 5):
            style.log_values(axes[0])
        if texts and loss == LOSSES["xent"]:
            axes[0].set_ylabel("loss (nats a token)")
            _bits(axes[0], results)
        axes[1].set_ylabel("accuracy")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        kinds = style.kinds(DASHED, "validation" if texts else "test")
        axes[1].legend(handles=kinds)
        if any(with_eta):
            axes[2].set_ylabel("learning rate η")
            axes[2].set_ylim(bottom=0)
        axes[-1].set_xlabel("epoch")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        figure.align_ylabels()
        figure.suptitle(title, fontsize=8)
        if labels:
            handles = axes[0].get_legend_handles_labels()[0]
            figure.legend(handles=handles, loc="outside lower center", ncols=columns,
                          fontsize=7)  # fmt: skip
    return figure


def _bits(ax, results):
    """An axis of bits a byte on the right of the loss, where one serves all runs and both texts."""
    factors = {round(row[f"{kind}_bits"] / row[f"{kind}_loss"], 6) if row.get(f"{kind}_loss") and
               f"{kind}_bits" in row else None for run in results for row in run.epochs
               for kind in ("train", "test")}  # fmt: skip
    if len(factors) == 1 and None not in factors:
        (bits,) = factors
        right = ax.secondary_yaxis("right", functions=(lambda y: y * bits, lambda y: y / bits))
        right.set_ylabel("bits a byte")


def main(argv=None):
    parser, args = parse(argv)
    try:
        runs, notes = logs(args.runs)
        if len(runs) > MOST:
            notes.append(f"{len(runs)} runs have no legend: it tells {MOST} apart")
        for note in notes:
            print(note, file=sys.stderr)
        style.save(draw(runs), args.output)
    except RunError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{args.output} cannot be written: {error.strerror or error}")
    print(f"Drawn: {args.output}")


if __name__ == "__main__":
    main()
