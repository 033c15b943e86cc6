"""SpectralAGD beside tuned baselines: `python -m scripts.spectral CASE [--only TEXT]`.

    fcn      a fully connected network, 5 to 60 epochs of CIFAR-10, beside AdamW
    gpt      a small GPT on characters, 1,500 to 12,000 steps, beside AdamW
    resnet8  a small ResNet with batch norm and either loss, beside AdamW
    stock    networks of transformers, timm, torchvision and torch as they start, beside AdamW
    adapt    trained networks on new data, beside AGD and Adam: what they learn, what they forget

A part of a case, of a few minutes, that is done is added to <out>/spectral/CASE.json, and is not
run again; `--list` prints the parts, `--only` runs those with a text in their name. `report` writes
the tables of all cases into the README.md there. SpectralAGD is scored at its average X, a baseline
at its last weights. A case takes one thread.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import itertools
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from agd import SpectralAGD, init_weights
from architecture import build, with_vectors
from architecture.resnet import BASIC, PostActivation, conv
from data import load
from scripts import any_model
from scripts import comparisons as lab
from scripts.comparisons import Limit
from training.losses import LOSSES, mse, xent

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
              "digit_rates": (1e-4, 1e-3, 3e-3)},
}  # fmt: skip
QUICK = {
    "fcn": {"marks": {0: (1, 2, 3), 1: (1,)}, "horizons": {1: (0, 1), 2: (0,)},
            "rates": (3e-4, 1e-3)},
    "gpt": {"every": 2, "marks": {0: (2, 4, 6), 1: (2, 4)}, "horizons": {4: (0,)}},
}  # fmt: skip


def ours(net, steps=None):
    return SpectralAGD(net)


def rules(args):
    """{name: function from a network and a number of steps to its optimiser}."""
    return {OURS: ours, **{f"AdamW {x:g}": partial(lab.adamw, x, args) for x in args.rates}}


def planned(args, unit, work, **how):
    """The parts of a case that reads SpectralAGD at several marks, and AdamW at its horizons."""
    plan = [(OURS, seed, marks) for seed, marks in args.marks.items()]
    plan += [(f"AdamW {rate:g}", seed, (end,)) for end, seeds in args.horizons.items()
             for rate in args.rates for seed in seeds]  # fmt: skip
    return {f"{run}, {marks[-1]} {unit}, seed {seed}":
            partial(lab.measure, args, run, work, rules(args)[run], seed, marks=marks, **how)
            for run, seed, marks in plan}  # fmt: skip


def fcn(args):
    """Fully connected networks with biases and an orthogonal start, on the square loss."""

    def work(seed):
        net = build("fcn", (3, 32, 32), 10, args.depth, args.width, bias=True)
        init_weights(net, torch.Generator().manual_seed(seed))
        data = load("cifar10", args.data_dir, args.batch, 1000, lab.CPU, seed,
                    train_examples=args.images, test_examples=args.test)  # fmt: skip
        args.data = data.source
        return net, data.train, data.test, mse, None

    first, second, *_, last = args.marks[0]
    run = {mark: f"{OURS}, {mark} epochs" for mark in args.marks[0]}
    limits = [
        Limit(run[first], "test loss", 0.602), Limit(run[first], "test accuracy", 54.2, True),
        Limit(run[second], "test loss", 0.54), Limit(run[second], "test accuracy", 60, True),
        Limit(run[last], "test accuracy", 64, True),
    ]  # fmt: skip
    limits += [Limit(run[end], "test accuracy", 4, True, f"AdamW 0.001, {end} epochs")
               for end in args.horizons]  # fmt: skip
    return planned(args, "epochs", work, take=iter), limits


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
    """Characters (B, T) to outputs (B, T, letters)."""

    def __init__(self, letters, width, heads, layers, context):
        super().__init__()
        self.token, self.position = nn.Embedding(letters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, x):
        y = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(y)))


def gpt(args):
    """Small GPTs with an orthogonal start, scored on the first `held` characters of the validation
    text."""
    starts = {}

    def make(letters):
        return GPT(letters, args.width, args.heads, args.layers, args.context)

    def work(seed):
        steps = max(*args.horizons, *map(max, args.marks.values()))
        work = lab.of_text(args, make, steps, seed, args.texts, args.held + 1)
        init_weights(work[0], torch.Generator().manual_seed(seed))
        starts[seed] = work[0].head.weight.norm().item()
        return work

    def more(net, stream, loss):
        gains = [x.weight.norm().item() for x in net.modules() if isinstance(x, nn.LayerNorm)]
        return {"largest_gain": max(gains),
                "output_layer_/_s": net.head.weight.norm().item() / starts[stream.seed]}

    first, second, last = (f"{OURS}, {mark} steps" for mark in args.marks[0])
    key = "validation loss"
    limits = [Limit(first, key, 1.70), Limit(second, key, 1.60), Limit(last, key, 0, than=second)]
    return planned(args, "steps", work, width=args.every, more=more,
                   keys=["validation_loss"]), limits  # fmt: skip


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
    """Characters (B, T) to outputs (B, T, letters), by two recurrent layers."""

    def __init__(self, letters, width=128):
        super().__init__()
        self.token, self.layers = nn.Embedding(letters, width), nn.LSTM(width, width, 2)
        self.head = nn.Linear(width, letters)

    def forward(self, x):
        return self.head(self.layers(self.token(x.T))[0]).transpose(0, 1)


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
        runs = {OURS: ours, **any_model.beside_adam(args)}
        return [x for seed in args.seeds for x in any_model.adapted(args, runs, seed, "images, ")]

    return {"images": of_images, **{f"digits, seed {seed}": partial(adapt_to_digits, args, seed)
                                    for seed in args.seeds}}, []  # fmt: skip


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
    before = torch.optim.AdamW(start.parameters(), args.digit_rate_before)
    list(lab.train(start, before, lab.epochs(old.train, args.digit_before), xent))
    runs = {OURS: ours, "AGD": any_model.ours}
    runs |= {f"AdamW {x:g}": lambda net, steps, x=x: torch.optim.AdamW(net.parameters(), x)
             for x in args.digit_rates}  # fmt: skip

    def more(net, *_):
        return {"new_accuracy": lab.score(net, new.test, xent)[1],
                "old_accuracy": lab.score(net, old.test, xent)[1]}  # fmt: skip

    return lab.adapted(args, "digits, ", start, new.train, new.test, xent, runs, seed, take=iter,
                       marks=args.digit_marks, more=more)  # fmt: skip


CASES = {"fcn": fcn, "gpt": gpt, "resnet8": resnet8, "stock": stock, "adapt": adapt}


def main(argv=None):
    return lab.main(globals(), "SpectralAGD beside tuned baselines", argv)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
