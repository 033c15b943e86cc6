"""SpectralAGD beside tuned baselines: `python -m scripts.spectral CASE [--only TEXT]`.

    fcn      a fully connected network, 5 to 60 epochs of CIFAR-10, beside AdamW
    gpt      a small GPT on characters, 1,500 to 12,000 steps, beside AdamW
    resnet8  a small ResNet with batch norm and either loss, beside AdamW
    stock    networks of transformers, timm, torchvision and torch as they start, beside AdamW
    adapt    trained networks on new data, beside AGD and Adam: what they learn, what they forget
    units    the fully connected network with its loss in other units
    rows     polar factors of blocks of rows, beside those of whole matrices
    moment   the momentum in bfloat16, beside float32

A part of a case, of a few minutes, that is done is added to <out>/spectral/CASE.json, and is not
run again; `--list` prints the parts, `--only` runs those with a text in their name. `report` writes
the tables of all cases into the README.md there, `draw` the figure. SpectralAGD is scored at its
average X, a baseline at its last weights. A case takes one thread.
"""

import copy
import itertools
import math
import sys
import warnings
from functools import partial
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

import agd
from agd import AGD, SpectralAGD, init_weights
from architecture import build, with_vectors
from architecture.resnet import BASIC, PostActivation, conv
from data import load
from scripts import any_model, style
from scripts import comparisons as lab
from scripts.comparisons import Limit
from training.losses import LOSSES, mse, xent
from training.step import train_epoch

OURS = "SpectralAGD"
# Of networks: {seed: epochs, or steps, at which its run is read}; {horizon of AdamW: its seeds}.
FCN = {"depth": 4, "width": 256, "batch": 128, "images": None, "test": None}
COSINE = {"weight_decay": 0.1, "warm_up": 100, "clip": 1.0, "betas": (0.9, 0.95)}
PLAIN = {"weight_decay": 0.1, "warm_up": 0, "clip": None, "betas": (0.9, 0.999)}
TEXT = {"layers": 4, "heads": 4, "context": 64, "texts": 16, "held": 2**15}
SETTINGS = {
    "fcn": {**FCN, "marks": {0: (5, 20, 60), 1: (5,)}, "rates": (3e-4, 1e-3),
            "horizons": {5: (0, 1), 20: (0,)}, **PLAIN},
    "gpt": {**TEXT, "width": 64, "every": 250, "marks": {0: (1500, 4000, 12_000), 1: (1500, 4000)},
            "rates": (5e-3, 1e-2, 2e-2), "horizons": {4000: (0,), 12_000: (0,)}, **COSINE},
    "resnet8": {"channels": (16, 32, 64), "images": 10_000, "test": 4000, "batch": 128, "pad": 4,
                "flip": True, "epochs": 6, "losses": ("xent", "mse"), "rate": 3e-3,
                "seeds": (0, 1), **PLAIN},
    "stock": {"layers": 4, "heads": 4, "width": 96, "context": 64, "texts": 16, "text_steps": 400,
              "images": 10_000, "test": 10_000, "batch": 128, "flip": True, "image_steps": 234,
              "seeds": (0, 1), "rates": (1e-3, 3e-3, 1e-2), "rate_seeds": (0,), **COSINE,
              "weight_decay": 0.05, "warm_up": 50},
    "adapt": {**any_model.SETTINGS["finetune"], "hidden": 128, "digits": 300, "digit_batch": 32,
              "digit_before": 20, "digit_rate_before": 1e-3, "digit_marks": (1, 3, 10),
              "digit_rates": (1e-4, 1e-3, 3e-3), "ages": ("grown", 4, 16)},
    "units": {**FCN, "epochs": 2, "scales": (1, 0.5, 1000, 0.001)},
    "rows": {**FCN, **TEXT, "epochs": 3, "width": (128, 256, 512), "steps": 600,
             "text_width": (128, 256), "rows": (None, 128, 64)},
    "moment": {**FCN, **TEXT, "epochs": 2, "width": (256,), "steps": 600, "text_width": (64,),
               "moments": ("float32", "bfloat16")},
}  # fmt: skip
QUICK = {None: {  # tiny, for tests; a case's own win
    "depth": 3, "width": 16, "batch": 16, "images": 64, "test": 32, "layers": 2, "heads": 2,
    "context": 16, "texts": 4, "held": 64, "epochs": 1, "steps": 2, "seeds": (0,), "warm_up": 1,
    "before": 1, "rates": (1e-3,), "channels": (4, 8, 8), "text_steps": 4, "image_steps": 2,
    "hidden": 16, "digits": 64, "digit_before": 1, "digit_marks": (1, 2), "digit_rates": (1e-3,)},
    "fcn": {"marks": {0: (1, 2, 3), 1: (1,)}, "horizons": {1: (0, 1), 2: (0,)},
            "rates": (3e-4, 1e-3)},
    "gpt": {"every": 2, "marks": {0: (2, 4, 6), 1: (2, 4)}, "horizons": {4: (0,)}},
    "rows": {"width": (160,), "text_width": (80,)}, "moment": {"width": (16,), "text_width": (16,)},
}  # fmt: skip


def ours(net, steps=None):
    return SpectralAGD(net)


def rules(args):
    """{name: function from a network and a number of steps to its optimiser}."""
    return {OURS: ours, **{f"AdamW {x:g}": partial(lab.adamw, x, args) for x in args.rates}}


def follow(net, optimizer, chunks, loss, read, run, seed, marks, unit="epochs", size=1):
    """Train on `chunks`, iterables of batches that are `size` epochs or steps each; after each,
    read() has the network's numbers. Returns a row at each of `marks`; the last has the history."""
    rows, history, clock = [], [], lab.Clock()
    for i, chunk in enumerate(itertools.islice(chunks, max(marks) // size), 1):
        with clock:
            totals = train_epoch(net, chunk, loss, optimizer).read()
        read_at = lab.row(f"{run}, {i * size} {unit}", seed, optimizer, clock=clock,
                      train_loss=totals["loss"], **read())  # fmt: skip
        history.append({unit: i * size, **read_at["numbers"]})
        print(read_at["run"], seed, read_at["numbers"], flush=True)
        if i * size in marks:
            rows.append(read_at)
    rows[-1]["history"] = {key: [x[key] for x in history] for key in history[0]}
    return rows


def epochs_of(batches):
    for epoch in itertools.count():
        batches.set_epoch(epoch)
        yield batches


def planned(args, unit, train):
    """The parts of a case that reads SpectralAGD at several marks, and AdamW at its horizons."""
    plan = [(OURS, seed, marks) for seed, marks in args.marks.items()]
    plan += [(f"AdamW {rate:g}", seed, (end,)) for end, seeds in args.horizons.items()
             for rate in args.rates for seed in seeds]  # fmt: skip
    return {f"{run}, {marks[-1]} {unit}, seed {seed}":
            partial(train, args, run, rules(args)[run], seed, marks)
            for run, seed, marks in plan}  # fmt: skip


def train_fcn(args, run, make, seed, marks, loss=mse, width=None):
    """Rows of a fully connected network with biases and an orthogonal start, read after `marks`
    epochs of CIFAR-10 with the square loss; trained on `loss`."""
    torch.manual_seed(seed)
    net = build("fcn", (3, 32, 32), 10, args.depth, width or args.width, bias=True)
    init_weights(net, torch.Generator().manual_seed(seed))
    data = load("cifar10", args.data_dir, args.batch, 1000, lab.CPU, seed,
                train_examples=args.images, test_examples=args.test)  # fmt: skip
    args.data = data.source
    optimizer = make(net, max(marks) * len(data.train))

    def read():
        return dict(zip(("test_loss", "test_accuracy"), lab.score(net, data.test, mse)))

    return follow(net, optimizer, epochs_of(data.train), loss, read, run, seed, marks)


def fcn(args):
    first, second, *_, last = args.marks[0]
    run = {mark: f"{OURS}, {mark} epochs" for mark in args.marks[0]}
    limits = [
        Limit(run[first], "test loss", 0.602), Limit(run[first], "test accuracy", 54.2, True),
        Limit(run[second], "test loss", 0.54), Limit(run[second], "test accuracy", 60, True),
        Limit(run[last], "test accuracy", 64, True),
    ]  # fmt: skip
    limits += [Limit(run[end], "test accuracy", 4, True, f"AdamW 0.001, {end} epochs")
               for end in args.horizons]  # fmt: skip
    return planned(args, "epochs", train_fcn), limits


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm, on a residual stream (B, T, width)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.project = (nn.Linear(width, width)
                                                          for _ in range(4))  # fmt: skip
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.norms[0](x)
        qkv = (f(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
               for f in (self.query, self.key, self.value))  # fmt: skip
        y = F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.project(y)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """Characters (B, T) to outputs (B, letters, T)."""

    def __init__(self, letters, width, heads, layers, context):
        super().__init__()
        self.token, self.position = nn.Embedding(letters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, x):
        y = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(y))).transpose(1, 2)


def train_gpt(args, run, make, seed, marks, width=None, every=None):
    """Rows of a small GPT with an orthogonal start, read after `marks` steps on the first `held`
    characters of the validation text."""
    text, held, letters = lab.texts(args)
    torch.manual_seed(seed)
    net = GPT(letters, width or args.width, args.heads, args.layers, args.context)
    init_weights(net, torch.Generator().manual_seed(seed))
    optimizer = make(net, max(marks))
    tests = lab.Characters(held[: args.held + 1], args, batch=args.texts)
    stream = iter(lab.Characters(text, args, max(marks), seed, args.texts))
    every = every or args.every
    s = net.head.weight.norm().item()

    def read():
        gains = [x.weight.norm().item() for x in net.modules() if isinstance(x, nn.LayerNorm)]
        return {"validation_loss": lab.score(net, tests, lab.text_loss)[0],
                "largest_gain": max(gains),
                "output_layer_/_s": net.head.weight.norm().item() / s}  # fmt: skip

    chunks = (itertools.islice(stream, every) for _ in itertools.count())
    return follow(net, optimizer, chunks, lab.text_loss, read, run, seed, marks, "steps", every)


def gpt(args):
    first, second, last = (f"{OURS}, {mark} steps" for mark in args.marks[0])
    key = "validation loss"
    limits = [Limit(first, key, 1.70), Limit(second, key, 1.60), Limit(last, key, 0, than=second)]
    return planned(args, "steps", train_gpt), limits


def resnet8(args):
    def net_of():
        a, b, c = args.channels
        net = nn.Sequential(
            conv(3, a, 3, 2), nn.BatchNorm2d(a, affine=False), nn.ReLU(),
            PostActivation(a, a, BASIC, 1), PostActivation(a, b, BASIC, 2),
            PostActivation(b, c, BASIC, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(c, 10),
        )  # fmt: skip
        return with_vectors(net, False, True)

    def work(name, orthogonal, seed):
        net = net_of()
        if orthogonal:
            init_weights(net, torch.Generator().manual_seed(seed))
        return net, *lab.cifar(args, seed, pad=args.pad, flip=args.flip), LOSSES[name], None

    baseline, adam = f"AdamW {args.rate:g}", partial(lab.adamw, args.rate, args)
    rules = {OURS: (ours, True), f"{baseline}, torch's start": (adam, False),
             f"{baseline}, orthogonal start": (adam, True)}  # fmt: skip
    runs = {f"{name}, {run}": (partial(work, name, orthogonal), rule)
            for name in args.losses for run, (rule, orthogonal) in rules.items()}  # fmt: skip
    limits = [Limit(f"{name}, {OURS}", *x) for name, *x in (
        ("xent", "test accuracy", 64, True), ("xent", "test loss", 1.0),
        ("mse", "test accuracy", 61, True), ("mse", "test loss", 0.54))]  # fmt: skip
    return lab.parts(args, runs, recalibrate=True), limits


class LSTM(nn.Module):
    """Characters (B, T) to outputs (B, letters, T), by two recurrent layers."""

    def __init__(self, letters, width=128):
        super().__init__()
        self.token, self.layers = nn.Embedding(letters, width), nn.LSTM(width, width, 2)
        self.head = nn.Linear(width, letters)

    def forward(self, x):
        return self.head(self.layers(self.token(x.T))[0]).permute(1, 2, 0)


def stock(args):
    """Networks with the weights that their libraries give them; L is read from their graphs."""
    def vit():
        from timm.models import VisionTransformer

        return VisionTransformer(img_size=32, patch_size=4, embed_dim=args.width,
                                 depth=args.layers, num_heads=args.heads, num_classes=10)

    def torchvision(name):
        from torchvision import models

        return getattr(models, name)(num_classes=10)

    def images(make, seed):
        return make(), *lab.cifar(args, seed, flip=args.flip), xent, args.image_steps

    def text(make, seed):
        return lab.of_text(args, make, args.text_steps, seed, args.texts)

    kinds = {  # the work, its measures, and the bound on its validation loss
        "GPT-2": (partial(text, partial(lab.stock_gpt2, args)), 2.20),
        "LSTM": (partial(text, LSTM), 2.02), "ViT": (partial(images, vit), 1.42),
        "ResNet-18": (partial(images, partial(torchvision, "resnet18")), 0.96),
        "MobileNet-V3 small": (partial(images, partial(torchvision, "mobilenet_v3_small")), 1.70),
    }  # fmt: skip
    parts = {}
    for (name, (work, _)), (run, rule) in itertools.product(kinds.items(), rules(args).items()):
        keys = ("validation_loss", "accuracy")[: 1 if work.func is text else 2]
        parts |= lab.parts(args, {f"{name}, {run}": (work, rule)}, keys=keys,
                           seeds=args.seeds if run == OURS else args.rate_seeds,
                           recalibrate=work.func is images)  # fmt: skip
    return parts, [Limit(f"{name}, {OURS}", "validation loss", x) for name, (_, x) in kinds.items()]


def adapt(args):
    def of_images():
        runs = {OURS: SpectralAGD, **any_model.beside_adam(args)}
        rows = [x for seed in args.seeds for x in any_model.adapted(args, runs, seed)]
        return [{**x, "run": f"images, {x['run']}"} for x in rows]

    return {"images": of_images, **{f"digits, seed {seed}": partial(adapt_to_digits, args, seed)
                                    for seed in args.seeds}}, []  # fmt: skip


def aged(age, fresh, net):
    """SpectralAGD with the clock, rho(Z) / s, at `age` before its first step; "grown": for each
    weight at its length over that of its start, in `fresh`, if that is more than 1."""
    optimizer = SpectralAGD(net)
    optimizer.param_groups[0]["lr"] = 0  # a step that makes the state and moves nothing

    def begin(*_):
        for p, q in zip(net.parameters(), fresh.parameters()):
            if optimizer.state[p]["held"].all():
                x = max(1.0, (p.norm() / q.norm()).item()) if age == "grown" else age
                optimizer.state[p]["z"].mul_(x)
                optimizer.state[p]["length"].mul_(x)
        optimizer.param_groups[0]["lr"] = 1.0
        hook.remove()

    hook = optimizer.register_step_post_hook(begin)
    return optimizer


def adapt_to_digits(args, seed):
    """Rows of a network that AdamW has trained on digits, and that then sees `digits` of them
    mirrored and moved by a pixel; scored on the test set changed likewise (new) and as it is."""
    old, new = (load("digits", None, args.digit_batch, 512, lab.CPU, seed, train_examples=n)
                for n in (None, args.digits))  # fmt: skip
    for part in new.train, new.test:
        part.images.copy_(part.images.flip(3).roll((1, 1), (2, 3)))
    torch.manual_seed(seed)
    sizes = [math.prod(old.shape), args.hidden, args.hidden, old.classes]
    layers = [x for pair in itertools.pairwise(sizes) for x in (nn.Linear(*pair), nn.ReLU())]
    start = nn.Sequential(nn.Flatten(), *layers[:-1])
    fresh = copy.deepcopy(start)
    before = torch.optim.AdamW(start.parameters(), args.digit_rate_before)
    lab.train(start, before, old.train, xent, args.digit_before, iter)
    runs = {OURS: SpectralAGD, "AGD": AGD}
    runs |= {f"{OURS}, clock at {x}": partial(aged, x, fresh) for x in args.ages}
    runs |= {f"AdamW {x:g}": lambda net, x=x: torch.optim.AdamW(net.parameters(), x)
             for x in args.digit_rates}  # fmt: skip

    def read(net):
        return {"new_accuracy": lab.score(net, new.test, xent)[1],
                "old_accuracy": lab.score(net, old.test, xent)[1]}  # fmt: skip

    rows = [lab.row("digits, before", seed, **read(start))]
    for run, make in runs.items():
        net = copy.deepcopy(start)
        rows += follow(net, make(net), epochs_of(new.train), xent, partial(read, net),
                       f"digits, {run}", seed, args.digit_marks)  # fmt: skip
    return rows


def units(args):
    def train(name, scale):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = train_fcn(args, name, ours, 0, (args.epochs,),
                             lambda outputs, labels: scale * mse(outputs, labels))  # fmt: skip
        rows[-1]["numbers"]["warnings"] = len(caught)
        rows[-1]["warnings"] = [str(x.message) for x in caught]
        return rows

    parts = {f"loss × {x:g}": partial(train, f"loss × {x:g}", x) for x in args.scales}
    whole, half, large, small = (f"{name}, {args.epochs} epochs" for name in parts)
    return parts, [
        Limit(whole, "test loss", 0.01, than=half), Limit(half, "test loss", 0.01, than=whole),
        Limit(large, "test accuracy", 48, True), Limit(small, "warnings", 1, True),
    ]  # fmt: skip


def compared(args, constant, values):
    """The parts and bounds of a case that trains both networks with a constant of agd.py set to
    `values`, {label: value}; each is level with the first one to within the noise of a seed."""

    def train(run, value, network, width, **settings):
        with mock.patch.object(agd, constant, value):
            return network(args, run, ours, 0, width=width, **settings)

    parts, limits = {}, []
    kinds = [("FCN", width, train_fcn, {"marks": (args.epochs,)}, "epochs", "test loss", 0.003)
             for width in args.width]  # fmt: skip
    kinds += [("GPT", width, train_gpt, {"marks": (args.steps,), "every": args.steps}, "steps",
               "validation loss", 0.015) for width in args.text_width]  # fmt: skip
    for kind, width, network, settings, unit, key, noise in kinds:
        runs = {label: f"{kind} {width}, {label}" for label, value in values.items()
                if constant != "ROWS" or value is None or value < width}  # fmt: skip
        for label, run in runs.items():
            parts[run] = partial(train, run, values[label], network, width, **settings)
        first, *others = (f"{run}, {settings['marks'][0]} {unit}" for run in runs.values())
        limits += [Limit(run, key, noise, than=first) for run in others]
    return parts, limits


def rows(args):
    labels = {x: f"blocks of {x} rows" if x else "whole matrices" for x in args.rows}
    return compared(args, "ROWS", {labels[x]: x for x in args.rows})


def moment(args):
    return compared(args, "MOMENT", {x: getattr(torch, x) for x in args.moments})


CASES = {"fcn": fcn, "gpt": gpt, "resnet8": resnet8, "stock": stock, "adapt": adapt,
         "units": units, "rows": rows, "moment": moment}  # fmt: skip


PANELS = (  # case, x, y, title
    ("fcn", "epochs", "test accuracy", "FCN"), ("fcn", "CPU seconds", "test accuracy", "FCN"),
    ("gpt", "steps", "validation loss", "GPT"), ("gpt", "steps", "norm", "GPT, free weights"),
)  # fmt: skip
FREE = {"largest gain": "-", "output layer / s": style.DOTTED}


def draw(folder, results):
    """The figure: both rules over epochs, steps and seconds, and the norms of free weights."""
    import matplotlib.pyplot as plt

    with plt.style.context([style.STYLE]):
        figure, axes = plt.subplots(2, 2, figsize=(style.WIDTH, 4.4))
        for ax, (case, x, y, title) in zip(axes.flat, PANELS):
            lines, values = {}, []
            for line in (r for r in results[case]["rows"] if "history" in r):
                ours, history = line["run"].startswith(OURS), line["history"]
                name = OURS if ours else "AdamW, each rate and horizon"
                look = {"color": style.RED if ours else style.ORANGE,
                        "linewidth": 1.2 if ours else 0.8}  # fmt: skip
                keys = {y: "-"} if y != "norm" else FREE if ours else {}
                for key, dots in keys.items():
                    values += history[key]
                    label = key if y == "norm" else name
                    (lines[label],) = ax.plot(history[x], history[key], linestyle=dots, **look)
            ax.set(title=title, xlabel=x, ylabel=y, xlim=0)
            ax.legend(lines.values(), lines)
            if y == "validation loss":
                low = min(values)
                ax.set_ylim(low - 0.05, min(low + 0.8, max(values) + 0.05))
        figure.savefig(folder / "spectral.png")
    plt.close(figure)


def main(argv=None):
    return lab.main(globals(), "SpectralAGD beside tuned baselines", argv)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
