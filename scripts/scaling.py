"""Data-parallel training of ResNet-50 on 1 to 1,024 GPUs, on paper: `python -m scripts.scaling`.

Prints the tables of docs/distributed.md; --write renews them there. Times are in seconds, sizes in
bytes, bandwidths in GB/s.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import math

import torch

from architecture import build
from cli import Parser, command, number
from scripts.markdown import renew, table
from scripts.words import significant

PAGE = Path(__file__).resolve().parents[1] / "docs" / "distributed.md"
MARKS = "<!-- tables: python -m scripts.scaling --write -->", "<!-- end of the tables -->"
DLE = "NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md"
TUNING = "NVIDIA/nccl, src/graph/tuning.cc at 01afd20"
INPUTS = {  # name: (value, unit, source); "assumed" is a guess that a measurement should replace
    "TF32": (938, "images/s", f"published, one A100 80GB, batch 256, SGD: {DLE}"),
    "mixed": (2470, "images/s", "published, the same table"),
    "launch": (20e-6, "s a kernel", "assumed; the batch-1 forward pass there (V100) gives 46e-6"),
    "kernels": (7.5, "a weight tensor", "counted: 404 of both passes of ResNet-50, 54 weights"),
    "backward": (2 / 3, "of compute", "assumed: twice the forward pass, as the FLOPs are"),
    "memory": (2039, "GB/s", "A100 80GB: 5,120 bits at 1,593 MHz, twice a clock"),
    "inter_share": (0.8, "of line rate", "assumed, as github.com/NVIDIA/nccl-tests/issues/212"),
    "base": (8.4e-6, "s", f"latency of a ring, protocol Simple: {TUNING}"),
    "near": (3.4e-6, "s a step", "the same over NVLink"),
    "far": (9.6e-6, "s a step", "the same over the network"),
    "node_link": (235, "GB/s", "NCCL's limit for A100 over NVLink 3 (line rate 300): the same"),
}
KNOWN = {name: value for name, (value, *_) in INPUTS.items()}
# Line rates of a node, GB/s.
LINKS = {"8 × HDR 200": 200, "1 × HDR 200": 25, "100 GbE": 12.5, "25 GbE": 3.125}
GPUS, SHOWN = [2**k for k in range(11)], (64, 1024)
LARGEST = 256  # images of a micro-batch
BUCKETS = (1 << 20, 25 << 20)  # bytes, the first and the others: DistributedDataParallel's


def count(side):
    """[(bytes, FLOPs of a forward pass of one image)] of ResNet-50's weights, in the order of the
    forward pass, on images of side × side pixels. Nothing is computed (device meta)."""
    weights = []

    def note(module, inputs, output):
        places, size = output.numel() // output.shape[1], module.weight.numel()
        weights.append((4 * size, 2 * places * size))

    with torch.device("meta"):
        net = build("resnet50", (3, side, side), 1000)
        for module in net.modules():
            if getattr(module, "weight", None) is not None:
                module.register_forward_hook(note)
        net(torch.empty(1, 3, side, side))
    return weights


def buckets(weights):
    """[(bytes, share of the backward pass that has filled it)] of DistributedDataParallel's
    messages: from the last layer on, each closes once it has reached its limit."""
    filled, size, done, total = [], 0, 0, sum(flops for _, flops in weights)
    for n, flops in reversed(weights):
        size, done = size + n, done + flops
        if size >= BUCKETS[bool(filled)]:
            filled.append((size, done / total))
            size = 0
    return filled + [(size, 1.0)] * bool(size)


def all_reduce(size, n, inter, node, width):
    """Seconds over n GPUs in nodes of `width`, with links of `inter` and `node` GB/s: a ring inside
    the nodes, halving and doubling between them."""
    if n == 1:
        return 0.0
    width, nodes = min(n, width), math.ceil(n / width)
    wait = 2 * (width - 1) * KNOWN["near"] + 2 * math.ceil(math.log2(nodes)) * KNOWN["far"]
    share = (width - 1) / width / node + (nodes - 1) / nodes / inter
    return KNOWN["base"] + wait + 2 * size * share / 1e9


class Model:
    """Training `weights` at t(b) = t0 + b / r, from a GPU's `rate` in images a second at batch
    `at`; `link`: the last arguments of all_reduce."""

    def __init__(self, weights, rate, at, link, launch=KNOWN["launch"]):
        self.link, self.buckets = link, buckets(weights)
        self.t0 = KNOWN["kernels"] * len(weights) * launch
        if at / rate <= self.t0:
            raise ValueError(f"{rate} images/s at {at} leave no time for launches")
        self.rate = at / (at / rate - self.t0)
        # AGD reads every gradient twice and every weight once, and writes it once.
        self.update = 4 * sum(size for size, _ in weights) / KNOWN["memory"] / 1e9

    def step(self, n, batch, micro=1, overlap=True):
        """Seconds: (passes and update, all communication, what of it the backward pass does not
        hide, the step) of n GPUs with `batch` images each, in `micro` parts that communicate once.
        """
        passes = micro * self.t0 + batch / self.rate
        images = sent = all_reduce(4, n, *self.link)  # the images are counted before the passes
        backward = KNOWN["backward"] * passes / micro * overlap
        arrived = 0.0
        for size, ready in self.buckets:
            arrived = max(arrived, ready * backward) + all_reduce(size, n, *self.link)
            sent += all_reduce(size, n, *self.link)
        compute, exposed = passes + self.update, images + arrived - backward if n > 1 else 0.0
        return compute, sent, exposed, compute + exposed

    def efficiency(self, n, batch, in_all):
        """(step, images a second, efficiency beside one GPU) of `batch` images a GPU, or in all."""
        each, parts = batch / n if in_all else batch, n if in_all else 1
        one, many = (self.step(k, b, math.ceil(b / LARGEST)) for k, b in ((1, batch), (n, each)))
        return many, n * each / many[-1], one[-1] / parts / many[-1]

    def reach(self, batch, in_all):
        """How many GPUs, by powers of two, keep an efficiency of 0.8, and of 0.5."""
        counts = [n for n in GPUS if n <= batch or not in_all]
        return " / ".join(f"{max(n for n in counts if self.efficiency(n, batch, in_all)[2] >= x):,}"
                          for x in (0.8, 0.5))  # fmt: skip

    def least(self, n):
        """The smallest batch a GPU at which n GPUs reach 0.8 of one GPU's best rate."""
        goal = 0.8 * LARGEST / self.step(1, LARGEST)[-1]
        sizes = (b for b in range(1, LARGEST) if b / self.step(n, b)[-1] >= goal)
        return next(sizes, f"over {LARGEST}")


def figures(x):
    """Three of them, with commas."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def tables(args):
    """All tables, in Markdown."""
    weights = count(224)
    rates = {"given": args.images_per_second} if args.images_per_second else {
        name: KNOWN[name] for name in ("TF32", "mixed")}  # fmt: skip
    links = {f"{x:g} GB/s": x for x in args.inter_link or ()} or LINKS
    models = {(rate, link): Model(weights, value, args.rate_batch, (
        KNOWN["inter_share"] * speed, args.node_link, args.gpus_per_node))
        for rate, value in rates.items() for link, speed in links.items()}  # fmt: skip
    names, first = next(iter(models.items()))
    cases = {f"{b:,} a GPU": (b, False) for b in args.batch_per_gpu}
    cases |= {f"{b:,} in all": (b, True) for b in args.batch}
    inputs = [(k, f"{v:,.6g}" if v >= 1e-3 else significant(v, 2), *x)
              for k, (v, *x) in INPUTS.items()]  # fmt: skip
    speeds, size = ", ".join(f"{x:g}" for x in links.values()), sum(size for size, _ in weights)
    inputs += [("links", speeds, "GB/s a node", f"line rates: {', '.join(links)}"),
               ("gradient", f"{size / 1e6:.1f}", "MB", f"counted: {len(weights)} weights"),
               ("t0", f"{1e3 * first.t0:.1f}", "ms", "launches of a step"),
               ("AGD's step", f"{1e3 * first.update:.2f}", "ms", "4 passes over the weights")]
    steps, reach = [], []
    for name, case in cases.items():
        for n in (n for n in SHOWN if n <= case[0] or not case[1]):
            step, images, efficiency = first.efficiency(n, *case)
            times = (figures(1e3 * x) for x in step[:3])
            steps.append((name, n, *times, figures(images), f"{efficiency:.2f}"))
    for key, m in models.items():
        ways = ((m.step(1, 32 * x, x)[-1], m.step(64, 32 * x, x, y)[-1])
                for x, y in ((1, False), (1, True), (4, True)))  # fmt: skip
        reach.append((*key, *(m.reach(*case) for case in cases.values()), m.least(1024),
                      " / ".join(f"{one / many:.2f}" for one, many in ways)))  # fmt: skip
    parts = {
        "Inputs, and what follows": (("input", "value", "unit", "source"), inputs),
        f"A step, {', '.join(names)}": (("batch", "GPUs", "compute, ms", "all-reduce, ms",
                                         "of which shows, ms", "images/s", "efficiency"), steps),
        "GPUs up to which the efficiency is at least 0.8 / 0.5": (
            ("rate", "link of a node", *cases, "least batch", "64 GPUs × 32"), reach),
    }  # fmt: skip
    return "\n\n".join(f"### {title}\n\n{table(*part)}" for title, part in parts.items())


def main(argv=None):
    parser = Parser(prog=command("scripts.scaling"), description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add, positive, whole = parser.add_argument, number(float, 1e-6), number(int, 1)
    add("--images_per_second", type=positive, metavar="R", help="of one GPU, a whole step")
    add("--rate_batch", type=whole, default=256, help="the batch of that rate (256)")
    add("--gpus_per_node", type=whole, default=8)
    add("--node_link", type=positive, default=KNOWN["node_link"], metavar="GB/s", help="that an "
        "all-reduce reaches a GPU inside a node (default: %(default)s)")
    add("--inter_link", type=positive, nargs="+", metavar="GB/s", help="line rates of a node")
    add("--batch_per_gpu", type=whole, nargs="+", default=[32, 256])
    add("--batch", type=whole, nargs="+", default=[1024, 8192], help="in all")
    add("--write", action="store_true", help=f"renew the tables of docs/{PAGE.name}")
    args = parser.parse_args(argv)
    try:
        text = tables(args)
    except ValueError as error:
        parser.error(f"no plan comes of these numbers: {error}")
    if args.write:
        renew(PAGE, *MARKS, text, "\n\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
