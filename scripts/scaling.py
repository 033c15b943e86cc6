"""How training scales to many GPUs, on paper: `python -m scripts.scaling`.

Prints the tables of docs/scaling.md, made by scripts/plan.py from the model and the sourced inputs
of scripts/costs.py; --write renews them there, with the picture. --measure prints, as JSON, what
this machine does (all its GPUs, or two processes on its CPU); --from FILE takes that for an input.
"""

import argparse
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from architecture import NETWORKS
from cli import Parser
from data import DataError
from scripts import links
from scripts.costs import known
from scripts.figures import fingerprint
from scripts.plan import GPUS, Plan, tables
from scripts.style import BLACK, BLUE, DASHED, GREEN, ORANGE, RED, STYLE, WIDTH, legend

DOCS = Path(__file__).resolve().parent.parent / "docs"
START, END = "<!-- tables: python -m scripts.scaling --write -->", "<!-- end of the tables -->"


def draw(plan):
    """Efficiency at constant batch a GPU and in all, and images a second of the latter."""
    shown = dict(zip([k for k in plan.links if k != "8 × NDR 400"], (BLACK, BLUE, ORANGE, RED)))
    weak, strong = plan.args.batch_per_gpu[0], plan.args.batch[-1]
    panels = [("weak", weak, 2, f"{weak} images a GPU: efficiency"),
              ("strong", strong, 2, f"{strong:,} images in all: efficiency"),
              ("strong", strong, 1, f"{strong:,} images in all: images/s")]  # fmt: skip
    with plt.style.context([STYLE]):
        figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.5))
        for ax, (kind, batch, column, title) in zip(axes, panels):
            for work, style in zip(plan.works.values(), ("-", DASHED)):
                for link, colour in shown.items():
                    y = [getattr(plan, kind)(work, plan.links[link], n, batch)[column]
                         for n in GPUS]  # fmt: skip
                    ax.plot(GPUS, y, color=colour, linestyle=style)
            ax.set_xscale("log", base=2)
            ax.set_xticks(GPUS[::2], [f"{n:,}" for n in GPUS[::2]])
            ax.set_xlabel("GPUs")
            ax.set_title(title)
            if column == 1:
                ax.set_yscale("log")
            else:
                ax.set_ylim(0, 1.05)
                ax.axhline(0.8, color=GREEN, linewidth=0.7)
                ax.axhline(0.5, color=GREEN, linewidth=0.7)
        keys = [Line2D([], [], color=colour, label=link) for link, colour in shown.items()]
        keys += [Line2D([], [], color="#555555", linestyle=style, label=name)
                 for name, style in zip(plan.works, ("-", DASHED))]  # fmt: skip
        legend(figure, keys)
    return figure


def write(plan, folder=DOCS):
    """Renew the tables of scaling.md between their markers, and scaling.png."""
    path = folder / "scaling.md"
    before, rest = path.read_text(encoding="utf-8").split(START)
    text = f"{before}{START}\n\n{tables(plan)}\n\n{END}{rest.split(END)[1]}"
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    figure = draw(plan)
    with plt.style.context([STYLE]):
        figure.savefig(folder / "scaling.png", metadata={"Source": fingerprint(figure)})
    plt.close(figure)


def parser():
    p = Parser(
        prog="python -m scripts.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--arch", default="resnet50", choices=NETWORKS)
    add("--image_size", type=int, default=224)
    add("--images_per_second", type=float, metavar="R", help="of one GPU, forward, backward, step")
    add("--rate_batch", type=int, default=256, help="the batch of that rate (default: 256)")
    add("--gpus_per_node", type=int, default=known("gpus_per_node"))
    add("--node_link", type=float, default=known("node_link"), metavar="GB/s",
        help="that an all-reduce reaches a GPU inside a node (default: %(default)s)")
    add("--inter_link", type=float, nargs="+", metavar="GB/s", help="line rates of a node")
    add("--batch_per_gpu", type=int, nargs="+", default=[32, 256], help="(default: 32 256)")
    add("--batch", type=int, nargs="+", default=[1024, 8192], help="in all (default: 1024 8192)")
    add("--results", default=DOCS.parent / "results", help="where measurements are")
    add("--from", dest="source", metavar="FILE", help="what --measure has printed elsewhere")
    add("--measure", action="store_true", help="print what this machine does, as JSON")
    add("--images", metavar="FOLDER", help="with --measure: decode these, one folder a class")
    add("--write", action="store_true", help="renew docs/scaling.md and docs/scaling.png")
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if args.measure:
        batches_tried = [2**k for k in range(3, 10)]
        try:
            found = links.measure(args.arch, args.image_size, batches_tried, images=args.images)
        except DataError as error:
            p.error(str(error))
        print(json.dumps(found, indent=1))
        return
    if args.source and not Path(args.source).is_file():
        p.error(f"there is no file {args.source}")
    try:
        plan = Plan(args)
    except (ValueError, KeyError, TypeError) as error:
        p.error(f"no plan comes of these numbers: {error}")
    if args.write:
        write(plan)
    else:
        print(tables(plan))


if __name__ == "__main__":
    main()
