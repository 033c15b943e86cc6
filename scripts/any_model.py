"""AGD(net) on networks of many kinds: `python -m scripts.any_model CASE [--data_dir DIR]`.

Each case writes <out>/any_model/CASE.json and prints its table and its bounds:

    stacks    plain stacks of 10 and 20 layers, four activations, with and without a scaled start
    biases    a fully connected network with and without biases
    affine    a convolutional network, batch norm with and without gains and biases
    gpt2      transformers' GPT-2 on characters, beside AdamW
    finetune  a trained network on new images, beside Adam: what it learns, what it forgets
    families  five of torchvision's families, beside Adam

`report` writes their tables into README.md in that folder, `draw` figure 9. Images are not
cropped or mirrored. Of a baseline's rates, the best one has the best of the numbers marked *,
which are of the test set: that favours the baseline.
"""

import argparse
import copy
import itertools
import json
import math
import os
import platform
import statistics
import sys
from contextlib import suppress
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from agd import AGD, init_weights
from architecture import build, with_vectors
from data import DATASETS, default_data_dir, load
from data.arrays import ArrayBatches, load_arrays
from data.prepare import prepare
from provenance import environment
from train import evaluate, mse, train_epoch, xent

CPU = torch.device("cpu")
SEEDS = {"seeds": (0, 1)}
IMAGES = {"images": 10_000, "test": 2000, "batch": 128, **SEEDS}
SETTINGS = {
    "stacks": {"activations": ("ReLU", "GELU", "SiLU", "Tanh"), "depths": (10, 20), "width": 64,
               "epochs": 15, "batch": 128, **SEEDS},
    "biases": {**IMAGES, "depth": 4, "width": 256, "epochs": 10},
    "affine": {**IMAGES, "images": 5000, "channels": (16, 32, 32), "epochs": 8},
    "gpt2": {"layers": 4, "width": 96, "heads": 4, "context": 64, "batch": 16, "steps": 400,
             "rates": (1e-3, 3e-3, 1e-2), "warm_up": 50, "weight_decay": 0.05, "clip": 1.0,
             "betas": (0.9, 0.95), "count": 19, **SEEDS},
    "finetune": {**IMAGES, "depth": 4, "width": 256, "epochs": 4, "before": 8, "rate_before": 3e-4,
                 "rates": (1e-4, 3e-4, 1e-3)},
    "families": {**IMAGES, "images": 5000, "batch": 64, "steps": 120, "seeds": (0,),
                 "rates": (3e-4, 1e-3, 3e-3)},
}  # fmt: skip
QUICK = {  # what a test has time for
    "depths": (3,), "depth": 3, "width": 16, "epochs": 1, "before": 1, "images": 64, "test": 32,
    "batch": 16, "seeds": (0,), "channels": (4, 4, 4), "layers": 2, "context": 16, "steps": 4,
    "warm_up": 2, "activations": ("ReLU", "Tanh"),
}  # fmt: skip


def cifar(args, seed, part=slice(None)):
    """(training, test) batches of CIFAR-10, `images` and `test` of them drawn from the whole set,
    which may be sorted by class; of the training images, `part`."""
    spec, path, found = DATASETS["cifar10"], prepare("cifar10", args.data_dir), []
    arrays, args.data = load_arrays(path, spec.shape, spec.classes)
    for i, (split, count) in enumerate((("train", args.images), ("test", args.test))):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        order = np.random.RandomState(i).permutation(len(labels))[:count]
        order = order if i else order[part]
        found.append(ArrayBatches(images[order], labels[order], spec.mean, spec.std, args.batch,
                                  CPU, shuffle=not i, seed=seed))  # fmt: skip
    return found


def train(net, optimizer, batches, loss, epochs):
    """The readings of each epoch (see train.Totals.read)."""
    found = []
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        found.append(train_epoch(net, batches, loss, optimizer).read())
    return found


def train_steps(net, optimizer, batches, loss, steps, width=10):
    """The losses of the first `steps` batches, means of `width` of them."""
    def whole():
        for epoch in itertools.count():
            batches.set_epoch(epoch)
            yield from batches

    few = itertools.islice(whole(), steps)
    losses = train_epoch(net, few, loss, optimizer).read()["steps"]["loss"]
    return [statistics.fmean(losses[i : i + width]) for i in range(0, steps, width)]


def score(net, batches, loss):
    """(loss, accuracy in %) of all of `batches`, each once."""
    found = evaluate(net, batches, loss).read()
    return found["loss"], 100 * found["acc"]


def seeded(seed):
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def stacks(args):
    rows = []
    settings = itertools.product(args.depths, args.activations, (True, False), args.seeds)
    for depth, name, scaled, seed in settings:
        generator = seeded(seed)
        data = load("digits", None, args.batch, 512, CPU, seed)
        sizes = [math.prod(data.shape)] + [args.width] * (depth - 1) + [data.classes]
        layers = [x for pair in itertools.pairwise(sizes)
                  for x in (nn.Linear(*pair, bias=False), getattr(nn, name)())]  # fmt: skip
        net = nn.Sequential(nn.Flatten(), *layers[:-1])
        first = next(iter(data.train))[0]
        init_weights(net, generator, inputs=first if scaled else None)
        optimizer = AGD(net)
        losses = train(net, optimizer, data.train, mse, args.epochs)
        run = f"{name}, {depth} layers, {'inputs=batch' if scaled else 'orthogonal × s'}"
        rows.append(row(run, seed, {"test acc, % *": score(net, data.test, mse)[1],
                                    "train loss": losses[-1]["loss"], "η": optimizer.eta.item(),
                                    "L": optimizer.L}))  # fmt: skip
    least = [bound(f"{name}, {depth} layers: least test accuracy, %",
                   min(numbers(rows, f"{name}, {depth} layers, inputs=batch", "test acc, % *")),
                   limit, least=True)
             for depth, limit in zip(args.depths, (93, 87)) for name in args.activations]
    return rows, least


def biases(args):
    """The study's bound is on the train loss of all training images, at the end."""
    rows = []
    for bias, seed in itertools.product((False, True), args.seeds):
        generator = seeded(seed)
        net = build("fcn", (3, 32, 32), 10, args.depth, args.width, bias=bias)
        rows.append(vectors(args, net, generator, f"biases {'on' if bias else 'off'}", seed))
    return rows, gains(args, rows, "biases", "train loss, whole set", 0.005)


def affine(args):
    rows = []
    for on, seed in itertools.product((False, True), args.seeds):
        generator = seeded(seed)
        layers, before = [], 3
        for i, channels in enumerate(args.channels):
            layers += [nn.Conv2d(before, channels, 3, 2 if i else 1, 1, bias=False),
                       nn.BatchNorm2d(channels, affine=False), nn.ReLU()]  # fmt: skip
            before = channels
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10, bias=False)
        net = with_vectors(nn.Sequential(*layers, *pool), False, on)
        rows.append(vectors(args, net, generator, f"affine {'on' if on else 'off'}", seed))
    return rows, gains(args, rows, "affine", "train loss, last epoch", 0.015)


def vectors(args, net, generator, run, seed):
    """A row: `net` drawn anew and trained on the square loss."""
    init_weights(net, generator)
    batches, tests = cifar(args, seed)
    optimizer = AGD(net)
    epochs = train(net, optimizer, batches, mse, args.epochs)
    loss, accuracy = score(net, tests, mse)
    curve = [x["loss"] for x in epochs]
    return row(run, seed, {"train loss, whole set": score(net, batches, mse)[0],
                           "train loss, last epoch": curve[-1], "test loss": loss,
                           "test acc, % *": accuracy, "η": optimizer.eta.item(),
                           "L": optimizer.L}, curve)  # fmt: skip


def gains(args, rows, name, key, limit):
    off, on = (numbers(rows, f"{name} {x}", key) for x in ("off", "on"))
    return [bound(f"seed {seed}: {key}, off minus on", a - b, limit, least=True)
            for seed, a, b in zip(args.seeds, off, on)]  # fmt: skip


class Characters:
    """Batches of (characters (B, T), those that follow (B, T)): random places of a text, or, if
    `steps` is None, all of it."""

    def __init__(self, text, args, steps=None, seed=0):
        self.text, self.args, self.steps, self.seed = text, args, steps, seed

    def set_epoch(self, epoch):
        """There is one."""

    def __iter__(self):
        T, rng = self.args.context, np.random.default_rng(self.seed)
        for _ in range(self.steps or 0):
            yield self._batch(rng.integers(0, len(self.text) - T, self.args.batch))
        whole = [] if self.steps else range(0, len(self.text) - T, T)
        for i in range(0, len(whole), 128):
            yield self._batch(whole[i : i + 128])

    def _batch(self, places):
        windows = torch.stack([self.text[i : i + self.args.context + 1] for i in places])
        return windows[:, :-1], windows[:, 1:]


class Logits(nn.Module):
    """transformers' language model, from characters to outputs (B, V, T)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(input_ids=x).logits.transpose(1, 2)


def gpt2(args):
    import transformers

    path = Path(args.data_dir).expanduser() / "shakespeare.txt"
    letters, text = np.unique(list(path.read_text(encoding="utf-8")), return_inverse=True)
    text, rows = torch.from_numpy(text), []
    cut = 9 * len(text) // 10
    config = {"vocab_size": len(letters), "n_positions": args.context, "n_embd": args.width,
              "n_layer": args.layers, "n_head": args.heads, "resid_pdrop": 0, "embd_pdrop": 0,
              "attn_pdrop": 0, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    choices = {"AGD": AGD, f"AGD, L = the count, {args.count}": lambda x: AGD(x, depth=args.count)}
    choices |= {f"AdamW {x:g}": lambda net, x=x: adamw(net, x, args) for x in args.rates}

    def loss(outputs, labels):
        return xent(outputs, labels).mean(1)

    for (run, optimizer), seed in itertools.product(choices.items(), args.seeds):
        seeded(seed)
        net = Logits(transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)))
        optimizer, batches = optimizer(net), Characters(text[:cut], args, args.steps, seed)
        curve = train_steps(net, optimizer, batches, loss, args.steps)
        valid = evaluate(net, Characters(text[cut:], args), loss).read()["loss"]
        rows.append(row(run, seed, {"validation loss *": valid, "train loss, 10 steps": curve[-1],
                                    "L": getattr(optimizer, "L", None)}, curve))  # fmt: skip
    worst = max(numbers(rows, "AGD", "validation loss *"))
    return rows, [bound("AGD: greatest validation loss", worst, 2.52)]


def adamw(net, rate, args):
    """AdamW with a warm-up, a cosine to 0 and clipped gradients."""
    optimizer = torch.optim.AdamW(net.parameters(), betas=args.betas,
                                  weight_decay=args.weight_decay)  # fmt: skip
    count = itertools.count(1)

    def before(*_):
        t = next(count)
        done = max(0, t - args.warm_up) / (args.steps - args.warm_up)
        factor = min(1, t / args.warm_up) * (1 + math.cos(math.pi * done)) / 2
        optimizer.param_groups[0]["lr"] = rate * factor
        nn.utils.clip_grad_norm_(net.parameters(), args.clip)

    optimizer.register_step_pre_hook(before)
    return optimizer


def beside_adam(args):
    """{name: function from a network to an optimiser} of AGD and of Adam at each rate."""
    rates = {f"Adam {x:g}": lambda net, x=x: torch.optim.Adam(net.parameters(), x)
             for x in args.rates}  # fmt: skip
    return {"AGD": AGD, **rates}


def finetune(args):
    """The network of `biases`, by Adam on the first half of the images; then on the second."""
    rows, half = [], args.images // 2
    for seed in args.seeds:
        seeded(seed)
        start = build("fcn", (3, 32, 32), 10, args.depth, args.width, bias=True)
        (old, tests), (new, _) = (cifar(args, seed, part)
                                  for part in (slice(half), slice(half, None)))  # fmt: skip
        train(start, torch.optim.Adam(start.parameters(), args.rate_before), old, mse, args.before)
        for run, optimizer in {"before": None, **beside_adam(args)}.items():
            net = copy.deepcopy(start)
            if optimizer is not None:
                train(net, optimizer(net), new, mse, args.epochs)
            rows.append(row(run, seed, {"test acc, % *": score(net, tests, mse)[1],
                                        "loss, new half": score(net, new, mse)[0],
                                        "loss, old half": score(net, old, mse)[0]}))  # fmt: skip
    return rows, []


def families(args):
    from torchvision import models
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    ten = {"num_classes": 10}
    sizes = {"image_size": 32, "patch_size": 4, "num_layers": 4, "num_heads": 4,
             "hidden_dim": 96, "mlp_dim": 384}  # fmt: skip
    stages = [CNBlockConfig(48, 96, 2), CNBlockConfig(96, 192, 2), CNBlockConfig(192, None, 2)]
    nets = {
        "ResNet-18": lambda: models.resnet18(**ten),
        "MobileNet-V3 small": lambda: models.mobilenet_v3_small(**ten),
        "ViT 4×96": lambda: models.VisionTransformer(**sizes, **ten),
        "ConvNeXt 48-96-192": lambda: ConvNeXt(stages, **ten),
        "DenseNet 3×4": lambda: models.DenseNet(12, (4, 4, 4), 24, **ten),
    }
    rows, runs = [], beside_adam(args)
    for (name, make), seed, run in itertools.product(nets.items(), args.seeds, runs):
        seeded(seed)
        net = make()
        batches, tests = cifar(args, seed)
        optimizer = runs[run](net)
        curve = train_steps(net, optimizer, batches, xent, args.steps)
        rows.append(row(f"{name}, {run}", seed, {
            "test acc, % *": score(net, tests, xent)[1], "train loss, 10 steps": curve[-1],
            "L": getattr(optimizer, "L", None)}, curve))  # fmt: skip
        print(rows[-1], flush=True)
    return rows, []


def row(run, seed, numbers, curve=()):
    """One run of a case; numbers that are None are left out."""
    return {"run": run, "seed": seed, "curve": [round(x, 5) for x in curve], "numbers": {
        key: float(f"{x:.5g}") for key, x in numbers.items() if x is not None}}  # fmt: skip


def numbers(rows, run, key):
    """The number `key` of a run, one a seed."""
    return [x["numbers"][key] for x in rows if x["run"] == run]


def bound(what, found, limit, least=False):
    """A bound on a number: at least, or at most, `limit`."""
    return {"what": what, "found": round(found, 4), "limit": f"{'≥' if least else '≤'} {limit:g}",
            "by": round(found - limit if least else limit - found, 4)}  # fmt: skip


def measure(args):
    """Run a case and write its file."""
    rows, bounds = CASES[args.case](args)
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "torchvision", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    words = f"python -m scripts.any_model {args.case}" + " --quick" * args.quick
    what = {"case": args.case, "command": words, "date": date.today().isoformat(),
            "settings": {x: getattr(args, x) for x in SETTINGS[args.case]}, "data": args.data,
            "versions": found, "environment": environment(CPU), "rows": rows,
            "bounds": bounds}  # fmt: skip
    write(args.folder / f"{args.case}.json", json.dumps(what, indent=1, ensure_ascii=False) + "\n")
    print(tables(what))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def tables(what):
    """A case in Markdown: how it was made, its runs, numbers of each seed, and its bounds."""
    settings = ", ".join(f"{k} {v}" for k, v in what["settings"].items())
    versions = ", ".join(f"{k} {v}" for k, v in what["versions"].items())
    machine = what["environment"]
    lines = [f"`{what['command']}`, {what['date']}; {versions}; {machine['device_name']}, "
             f"{machine['threads']} thread; {settings}.", ""]  # fmt: skip
    keys = list(dict.fromkeys(key for x in what["rows"] for key in x["numbers"]))
    cells = [["run", *keys]]
    for run in dict.fromkeys(x["run"] for x in what["rows"]):
        seeds = [x["numbers"] for x in what["rows"] if x["run"] == run]
        values = [[f"{x[key]:.4g}" for x in seeds if key in x] for key in keys]
        cells.append([run, *("; ".join(dict.fromkeys(x)) for x in values)])
    lines += grid(cells)
    if what["bounds"]:
        verdicts = [[x["what"], x["found"], x["limit"], "holds by" if x["by"] >= 0 else
                     "**does not hold** by", abs(x["by"])] for x in what["bounds"]]  # fmt: skip
        lines += ["", *grid([["bound on", "found", "limit", "verdict", ""], *verdicts])]
    return "\n".join(lines)


def grid(cells):
    head, *rest = [f"| {' | '.join(map(str, x))} |" for x in cells]
    return [head, "|" + " --- |" * len(cells[0]), *rest]


def read(folder):
    """{case: what its file holds} of those that have been run."""
    paths = {case: folder / f"{case}.json" for case in SETTINGS}
    return {case: json.loads(path.read_text(encoding="utf-8"))
            for case, path in paths.items() if path.exists()}  # fmt: skip


def report(args):
    """Put each case's tables between its marks in README.md, or at its end where it has none."""
    path = args.folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else "# AGD(net) on any network\n"
    for case, what in read(args.folder).items():
        begin, end = f"<!-- {case} -->", f"<!-- end of {case} -->"
        if begin not in text:
            text += f"\n## {case}\n\n{begin}\n{end}\n"
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{tables(what)}\n{end}{after}"
    write(path, text)


def best_adam(rows, name):
    """The best of Adam's rates for a network, by the accuracy on the test set."""
    runs = {x["run"] for x in rows if x["run"].startswith(f"{name}, Adam")}
    best = max(runs, key=lambda run: statistics.fmean(numbers(rows, run, "test acc, % *")))
    return best.rpartition(", ")[2]


def draw(args):
    """Figure 9: train losses with vectors on and off, and of five families beside Adam."""
    import matplotlib.pyplot as plt

    from scripts import drawing

    found, black = read(args.folder), drawing.BLACK
    with plt.style.context([drawing.STYLE]):
        figure, axes = plt.subplots(2, 4, figsize=(drawing.WIDTH, 3.6))
        left, right = axes[:, 0], axes[:, 1:].flat
        for ax, case in zip(left, ("biases", "affine")):
            for run, style in (("off", drawing.DOTTED), ("on", "-")):
                for x in found[case]["rows"]:
                    if x["run"] == f"{case} {run}":
                        ax.plot(range(1, len(x["curve"]) + 1), x["curve"], color=drawing.BLUE,
                                linestyle=style)  # fmt: skip
            ax.set_title(f"{'FCN' if case == 'biases' else 'conv net'}, {case} on and off")
            ax.set_xlabel("epochs")
        rows = found["families"]["rows"]
        for ax, name in zip(right, dict.fromkeys(x["run"].rpartition(", ")[0] for x in rows)):
            best = best_adam(rows, name)
            for run, style in (("AGD", {"color": black}), (best, {
                    "color": drawing.ORANGE, "marker": "o", "markevery": 3, "markersize": 3.6,
                    "markerfacecolor": "white"})):  # fmt: skip
                for x in (x for x in rows if x["run"] == f"{name}, {run}"):
                    steps = np.linspace(0, found["families"]["settings"]["steps"],
                                        len(x["curve"]) + 1)[1:]  # fmt: skip
                    ax.plot(steps, x["curve"], **style)
            ax.set_title(name)
            ax.text(0.97, 0.93, best, transform=ax.transAxes, ha="right", va="top")
    figure.savefig(args.folder / "fig9.png")


CASES = {"stacks": stacks, "biases": biases, "affine": affine, "gpt2": gpt2,
         "finetune": finetune, "families": families}  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser("python -m scripts.any_model", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=[*CASES, "report", "draw"])
    parser.add_argument("--data_dir", default=default_data_dir())
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    args = parser.parse_args(argv)
    args.folder, args.data = args.out / "any_model", None
    if args.case not in CASES:
        {"report": report, "draw": draw}[args.case](args)
        return
    for key, value in SETTINGS[args.case].items():
        setattr(args, key, QUICK.get(key, value) if args.quick else value)
    measure(args)


if __name__ == "__main__":
    sys.exit(main())
