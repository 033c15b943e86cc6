"""Every run of every figure, at two scales: `python -m scripts.experiments [quick|full]` prints it.

`full` is the paper's, with stand-ins where it wants a GPU, `quick` the same pictures from runs that
two CPU cores finish in under a quarter of an hour a figure. A figure is drawn from these runs and
no others.

No rate here has a schedule, so that a run is the beginning of a longer one: figures that share a
run may stop reading it at different epochs. AdamW in figure 10 is tuned with one.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import shlex
from typing import NamedTuple

from cli import Parser, command, one_of
from scripts.words import network_name

FIGURES = {
    "fig1": "AGD beside defaults and beside learning rates",
    "fig2": "a learning rate too small, right and too large",
    "fig3": "the objective and its majorisation",
    "fig4": "breadth: networks and data sets",
    "fig5": "AGD beside tuned Adam and SGD",
    "fig6": "width and depth",
    "fig7": "batch size",
    "fig8": "the cost of tuning",
    "fig10": "characters of Shakespeare",
    "fig11": "the clock of spectral AGD",
    "phases": "a training set that is fitted",
}
SCALES = ("quick", "full")

TUNED = tuple(f"1e{k}" for k in range(-5, 0))  # the grid over which a baseline is tuned
WIDE = tuple(f"1e{k}" for k in range(-7, 2))  # the grid of figure 1
SPECTRAL = "Spectral AGD"
BASELINES = ("Adam", "SGD")
ADAMW = "AdamW"  # with a warm-up, a cosine and decay
ROOTS = ("3e-4", "1e-3", "3e-3", "1e-2", "3e-2")  # the grid over which it is tuned
RULES = {"AGD": "agd", SPECTRAL: "spectral"}  # with nothing to set, by the name of a curve
PEERS = {  # at their defaults, the class by its dotted name
    "Prodigy": "prodigyopt.Prodigy",
    "Schedule-free AdamW": "schedulefree.AdamWScheduleFree",
    "D-Adapted Adam": "dadaptation.DAdaptAdam",
}
TEXT_PEERS = tuple(PEERS)[:2]
DEPTHS = (2, 4, 8, 16, 32)
WIDTHS = {"quick": (64, 128, 256, 512), "full": (64, 128, 256, 512, 1024, 2048)}
BATCHES = (32, 128, 1024, 4096)


class Experiment(NamedTuple):
    """One run. The runs of one figure, panel and curve are the points of a grid, or its seeds."""

    figure: str  # of FIGURES
    panel: str
    curve: str  # "Adam", "SGD", ADAMW, one of RULES or of PEERS
    epochs: int  # that the figure reads; another figure may read more of the same run
    flags: tuple  # of main.py: all but --epochs and where things lie

    def flag(self, name, default=None):
        """The value of a flag, as it is written."""
        return self.flags[self.flags.index(name) + 1] if name in self.flags else default

    @property
    def scheduled(self):
        """Whether its rates depend on its length, so that a shorter run is another run."""
        return "--schedule" in self.flags

    @property
    def network(self):
        """The network, in words."""
        return network_name(*map(self.flag, ("--arch", "--depth", "--width")))


def experiments(scale):
    """The table, a list of Experiments."""
    quick, rows = scale == "quick", []

    def add(figure, panel, curve, epochs, flags, rates=(None,), seeds=(0,)):
        optimizer = {**RULES, **PEERS}.get(curve, curve.lower())
        for rate in rates:
            for seed in seeds:
                words = shlex.split(flags) + ["--optimizer", optimizer]
                words += [] if rate is None else ["--lr", rate]
                words += ["--seed", str(seed)]
                rows.append(Experiment(figure, panel, curve, epochs, tuple(words)))

    def versus(figure, panel, epochs, flags, baselines, rates, rules=("AGD",), seeds=(0,)):
        for curve in rules:
            add(figure, panel, curve, epochs, flags, seeds=seeds)
        for curve in baselines:
            add(figure, panel, curve, epochs, flags, rates)

    def cifar(depth, width):
        return f"--arch fcn --depth {depth} --width {width} --dataset cifar10 --test_bs 1000"

    eight = f"{cifar(8, 256)} --log_updates"  # the network of figure 5
    # Quick convolutional runs see a few of the images, in smaller batches.
    part = "--train_examples {} --test_examples 250 --train_bs 32" if quick else ""
    resnet = f"--arch resnet18 --dataset cifar10 --test_bs 1000 {part.format(320)}"
    vgg = f"--arch vgg --dataset {{}} --test_bs 1000 {part.format(640)}"
    imagenet = "--arch resnet50 --dataset imagenet --loss xent --train_bs 1024 --test_bs 1000"

    # Figure 1. Left: the defaults of Adam (0.001) and SGD (0.1) on a deep network. Middle: final
    # accuracy against the learning rate; the quick scale in the smaller network. Right, and the
    # last panel of figure 4: ImageNet, beyond the quick scale.
    for curve, rate in (("AGD", None), (SPECTRAL, None), ("Adam", "1e-3"), ("SGD", "1e-1")):
        add("fig1", "deep", curve, 15 if quick else 1000, cifar(32, 256), [rate])
    network, epochs = (eight, 5) if quick else (resnet, 2000)
    versus("fig1", "rates", epochs, network, BASELINES, WIDE, RULES)
    if not quick:
        versus("fig1", "imagenet", 350, imagenet, ["SGD"], ["1e-1"])

    # Figure 3 measures the network of figure 5 at its start and at its end.
    add("fig3", "majorisation", "AGD", 14 if quick else 2000, eight)

    # Figure 4. tiny100, where it is at hand, stands in for a CIFAR-100 that is not.
    for panel, flags, epochs in (
        ("fcn", cifar(16, 512), 3),
        ("resnet18", resnet, 6),
        ("vgg", vgg.format("cifar100"), 6),
        ("vgg, tiny100", vgg.format("npz:tiny100.npz"), 6),
    ):
        versus("fig4", panel, epochs if quick else 2000, flags, ["Adam"], TUNED)
    if not quick:
        versus("fig4", "imagenet", 350, imagenet, ["SGD"], ["1e-1"])
        # A tenth of the images stands in for all of them where there is no GPU.
        tenth = f"{resnet} --train_examples 5000 --test_examples 1000"
        versus("fig4", "resnet18, 5,000 images", 30, tenth, ["Adam"], ["1e-4"], RULES)

    # Figure 5, and figure 8 on the same runs with other optimisers that need no tuning. The paper's
    # length has one seed: another is a day of two cores.
    epochs, seeds = (14, (0, 1, 2)) if quick else (2000, (0,))
    for figure in ("fig5", "fig8"):
        versus(figure, "fcn", epochs, eight, BASELINES, TUNED, RULES, seeds)
    for curve in PEERS:
        add("fig8", "fcn", curve, epochs, eight)

    # Figure 6.
    for depth in DEPTHS:
        for width in WIDTHS[scale]:
            add("fig6", f"{depth}x{width}", "AGD", 6 if quick else 2000, cifar(depth, width))

    # Figure 7, every step in the first epoch.
    for batch in BATCHES:
        flags = f"{cifar(4, 256)} --train_bs {batch} --log_steps 1"
        add("fig7", f"batch {batch}", "AGD", 20 if quick else 1000, flags, seeds=seeds)

    # Figure 10: 250 steps an epoch.
    text, epochs = "--arch gpt --dataset shakespeare", 6 if quick else 20
    tuned = f"{text} --schedule cosine --weight_decay 0.1"
    for curve in RULES:
        add("fig10", "gpt", curve, epochs, text, seeds=(0, 1, 2))
    add("fig10", "gpt", ADAMW, epochs, tuned, ROOTS, seeds=(0, 1, 2))
    for curve in TEXT_PEERS:
        add("fig10", "gpt", curve, epochs, text)

    # Figure 11, the first of figure 5's spectral runs, for longer than its quick scale.
    add("fig11", "fcn", SPECTRAL, 100, eight)

    # A thousand images are fitted within minutes, and show what the whole set shows in days.
    flags = f"{cifar(8, 512)} --train_examples 1000 --test_examples 1000"
    add("phases", "fcn", "AGD", 600, flags)
    return rows


def main(argv=None):
    parser = Parser(prog=command("scripts.experiments"), description=__doc__)
    parser.add_argument("scales", nargs="*", type=one_of(SCALES), metavar="quick|full")
    for scale in parser.parse_args(argv).scales or SCALES:
        for row in experiments(scale):
            line = f"python main.py {shlex.join(row.flags)} --epochs {row.epochs}"
            print(f"{scale:5}  {row.figure:6}  {row.panel:23}  {row.curve:19}  {line}")


if __name__ == "__main__":
    sys.exit(main())
