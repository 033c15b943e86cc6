"""AGD(net) on networks of many kinds: `python -m scripts.any_model CASE [--data_dir DIR]`.

    stacks    plain stacks of 10 and 20 layers, four activations, with and without a scaled start
    biases    a fully connected network with and without biases
    affine    a convolutional network, batch norm with and without gains and biases
    gpt2      transformers' GPT-2 on characters, beside AdamW
    finetune  a trained network on new images, beside Adam: what it learns, what it forgets
    families  five of torchvision's families, beside Adam

A part that is done is added to <out>/any_model/CASE.json, and is not run again; `--list` prints the
parts, `--only` runs those with a text in their name. `report` writes the tables of all cases into
the README.md there. Images are neither cropped nor mirrored.
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

from agd import AGD, init_weights
from architecture import build, with_vectors
from data import load
from scripts import comparisons as lab
from scripts.comparisons import Limit
from training.losses import mse, xent

IMAGES = {"images": 10_000, "test": 2000, "batch": 128, "seeds": (0, 1)}
SETTINGS = {
    "stacks": {"activations": ("ReLU", "GELU", "SiLU", "Tanh"), "depths": (10, 20), "width": 64,
               "epochs": 15, "batch": 128, "seeds": (0, 1)},
    "biases": {**IMAGES, "depth": 4, "width": 256, "epochs": 10},
    "affine": {**IMAGES, "images": 5000, "channels": (16, 32, 32), "epochs": 8},
    "gpt2": {"layers": 4, "width": 96, "heads": 4, "context": 64, "batch": 16, "steps": 400,
             "rates": (1e-3, 3e-3, 1e-2), "warm_up": 50, "weight_decay": 0.05, "clip": 1.0,
             "betas": (0.9, 0.95), "count": 19, "seeds": (0, 1)},
    "finetune": {**IMAGES, "depth": 4, "width": 256, "epochs": 4, "before": 8, "rate_before": 3e-4,
                 "rates": (1e-4, 3e-4, 1e-3)},
    "families": {**IMAGES, "images": 5000, "batch": 64, "steps": 120, "seeds": (0,),
                 "rates": (3e-4, 1e-3, 3e-3)},
}  # fmt: skip


def ours(net, steps=None):
    return AGD(net)


def beside_adam(args):
    """{name: function from a network to its optimiser} of AGD and of Adam at each rate."""
    return {"AGD": ours, **{
        f"Adam {x:g}": lambda net, steps=None, x=x: torch.optim.Adam(net.parameters(), x)
        for x in args.rates}}  # fmt: skip


def stacks(args):
    def work(depth, name, scaled, seed):
        data = load("digits", None, args.batch, 512, lab.CPU, seed)
        sizes = [math.prod(data.shape)] + [args.width] * (depth - 1) + [data.classes]
        layers = [x for pair in itertools.pairwise(sizes)
                  for x in (nn.Linear(*pair, bias=False), getattr(nn, name)())]  # fmt: skip
        net = nn.Sequential(nn.Flatten(), *layers[:-1])
        first = next(iter(data.train))[0] if scaled else None
        init_weights(net, torch.Generator().manual_seed(seed), inputs=first)
        return net, data.train, data.test, mse, None

    runs, limits, least = {}, [], dict(zip(args.depths, (93, 87)))
    for kind in itertools.product(args.depths, args.activations, (True, False)):
        depth, name, scaled = kind
        run = f"{name}, {depth} layers, {'inputs=batch' if scaled else 'orthogonal × s'}"
        runs[run] = partial(work, *kind), ours
        limits += [Limit(run, "test accuracy", least[depth], True)] * scaled
    return lab.parts(args, runs, take=iter), limits


def on_and_off(args, name, make, key, limit):
    """Parts that train make(False) and make(True), drawn anew, on the square loss; with it on, the
    number `key` is lower by at least `limit`."""

    def work(on, seed):
        net = make(on)
        init_weights(net, torch.Generator().manual_seed(seed))
        return net, *lab.cifar(args, seed), mse, None

    def more(net, batches, loss):
        return {"train_loss": lab.score(net, batches, mse)[0], "last_epoch": loss}

    runs = {f"{name} {'on' if on else 'off'}": (partial(work, on), ours) for on in (False, True)}
    return lab.parts(args, runs, more=more), [Limit(f"{name} off", key, limit, True, f"{name} on")]


def biases(args):
    def make(on):
        return build("fcn", (3, 32, 32), 10, args.depth, args.width, bias=on)

    return on_and_off(args, "biases", make, "train loss", 0.005)


def affine(args):
    """Of two networks, whose linear layer sees the mean over positions, or every position."""

    def make(flat, on):
        layers, before, positions = [], 3, 32**2
        for i, channels in enumerate(args.channels):
            layers += [nn.Conv2d(before, channels, 3, 2 if i else 1, 1, bias=False),
                       nn.BatchNorm2d(channels, affine=False), nn.ReLU()]  # fmt: skip
            before, positions = channels, positions // 4 if i else positions
        layers += [] if flat else [nn.AdaptiveAvgPool2d(1)]
        head = nn.Linear(before * (positions if flat else 1), 10, bias=False)
        return with_vectors(nn.Sequential(*layers, nn.Flatten(), head), False, on)

    names = {"affine": False, "all positions, affine": True}
    both = [on_and_off(args, name, partial(make, flat), "last epoch", 0.015)
            for name, flat in names.items()]  # fmt: skip
    return both[0][0] | both[1][0], both[0][1] + both[1][1]


def gpt2(args):
    def work(seed):
        return lab.of_text(args, partial(lab.stock_gpt2, args), args.steps, seed)

    rules = {"AGD": ours, f"AGD, L = the count, {args.count}":
             lambda net, steps: AGD(net, depth=args.count)}  # fmt: skip
    rules |= {f"AdamW {x:g}": partial(lab.adamw, x, args) for x in args.rates}
    runs = {run: (work, rule) for run, rule in rules.items()}
    return lab.parts(args, runs, keys=["validation_loss"]), [Limit("AGD", "validation loss", 2.52)]


def adapted(args, runs, seed, name=""):
    """Rows of the network of `biases`, by Adam on the first half of the images; then on the second,
    by each of `runs`."""
    torch.manual_seed(seed)
    start = build("fcn", (3, 32, 32), 10, args.depth, args.width, bias=True)
    half = args.images // 2
    old, tests = lab.cifar(args, seed, slice(half))
    new, _ = lab.cifar(args, seed, slice(half, None))

    def more(net, *_):
        return {"test_accuracy": lab.score(net, tests, mse)[1],
                "new_half_loss": lab.score(net, new, mse)[0],
                "old_half_loss": lab.score(net, old, mse)[0]}  # fmt: skip

    before = torch.optim.Adam(start.parameters(), args.rate_before)
    list(lab.train(start, before, lab.epochs(old, args.before, lab.whole), mse))
    return lab.adapted(args, name, start, new, tests, mse, runs, seed, more=more)


def finetune(args):
    return {f"seed {x}": partial(adapted, args, beside_adam(args), x) for x in args.seeds}, []


def families(args):
    from torchvision import models
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    sizes = {"image_size": 32, "patch_size": 4, "num_layers": 4, "num_heads": 4,
             "hidden_dim": 96, "mlp_dim": 384}  # fmt: skip
    stages = [CNBlockConfig(48, 96, 2), CNBlockConfig(96, 192, 2), CNBlockConfig(192, None, 2)]
    nets = {
        "ResNet-18": models.resnet18, "MobileNet-V3 small": models.mobilenet_v3_small,
        "ViT 4×96": partial(models.VisionTransformer, **sizes),
        "ConvNeXt 48-96-192": partial(ConvNeXt, stages),
        "DenseNet 3×4": partial(models.DenseNet, 12, (4, 4, 4), 24),
    }  # fmt: skip

    def work(net, seed):
        return net(num_classes=10), *lab.cifar(args, seed), xent, args.steps

    return lab.parts(args, {f"{name}, {run}": (partial(work, net), rule)
                            for name, net in nets.items()
                            for run, rule in beside_adam(args).items()}), []  # fmt: skip


CASES = {"stacks": stacks, "biases": biases, "affine": affine, "gpt2": gpt2,
         "finetune": finetune, "families": families}  # fmt: skip


def main(argv=None):
    return lab.main(globals(), "AGD(net) on any network", argv)


if __name__ == "__main__":
    sys.exit(main())
