"""AGD(net) on networks of many kinds: `python -m scripts.any_model CASE [--data_dir DIR]`.

Each case writes <out>/any_model/CASE.json and prints its tables:

    stacks    plain stacks of 10 and 20 layers, four activations, with and without a scaled start
    biases    a fully connected network with and without biases
    affine    a convolutional network, batch norm with and without gains and biases
    gpt2      transformers' GPT-2 on characters, beside AdamW
    finetune  a trained network on new images, beside Adam: what it learns, what it forgets
    families  five of torchvision's families, beside Adam

`report` writes the tables of all into the README.md there, `draw` figure 9. Images are neither
cropped nor mirrored.
"""

import argparse
import copy
import itertools
import json
import math
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
from runs.provenance import environment
from scripts import any_model_report
from training.losses import mse, xent
from training.step import evaluate, train_epoch

CPU = torch.device("cpu")
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
QUICK = {  # what a test has time for
    "depths": (3,), "depth": 3, "width": 16, "epochs": 1, "before": 1, "images": 64, "test": 32,
    "batch": 16, "seeds": (0,), "channels": (4, 4, 4), "layers": 2, "context": 16, "steps": 4,
    "warm_up": 2, "activations": ("ReLU", "Tanh"), "rates": (1e-3,),
}  # fmt: skip


def cifar(args, seed, part=slice(None), pad=0, flip=False):
    """(training, test) batches of CIFAR-10, `images` and `test` of them drawn from the whole set,
    which may be sorted by class; of the training images, `part`, cropped by `pad` and mirrored."""
    spec, path, found = DATASETS["cifar10"], prepare("cifar10", args.data_dir), []
    arrays, args.data = load_arrays(path, spec.shape, spec.classes)
    for i, (split, count) in enumerate((("train", args.images), ("test", args.test))):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        order = np.random.RandomState(i).permutation(len(labels))[:count]
        order = order if i else order[part]
        augment = {} if i else {"pad": pad, "flip": flip, "shuffle": True}
        found.append(ArrayBatches(images[order], labels[order], spec.mean, spec.std, args.batch,
                                  CPU, seed=seed, **augment))  # fmt: skip
    return found


def whole(batches):
    """Those of the full size: the rest of an epoch may be a few images."""
    return (batch for batch in batches if len(batch[1]) == batches.batch_size)


def train(net, optimizer, batches, loss, epochs, take=whole):
    """Returns the mean loss of each epoch."""
    curve = []
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        curve.append(train_epoch(net, take(batches), loss, optimizer).read()["loss"])
    return curve


def train_steps(net, optimizer, batches, loss, steps, width=10):
    """Train `steps` batches. Returns the means of each `width` losses."""

    def endless():
        for epoch in itertools.count():
            batches.set_epoch(epoch)
            yield from whole(batches)

    totals = train_epoch(net, itertools.islice(endless(), steps), loss, optimizer)
    losses = totals.read()["steps"]["loss"]
    return [statistics.fmean(losses[i : i + width]) for i in range(0, steps, width)]


def score(net, batches, loss):
    """(loss, accuracy in %) of the network on all of `batches`."""
    found = evaluate(net, batches, loss).read()
    return found["loss"], 100 * found["acc"]


def row(run, seed, optimizer=None, curve=(), **numbers):
    """One run of a case, with L and the last eta where the optimiser is AGD."""
    if isinstance(optimizer, AGD):
        numbers |= {"L": optimizer.L, "η": optimizer.eta.item()}
    numbers = {key.replace("_", " "): float(f"{x:.5g}") for key, x in numbers.items()}
    return {"run": run, "seed": seed, "numbers": numbers, "curve": [round(x, 5) for x in curve]}


def bound(rows, run, key, limit, least=False):
    """The bound that a number of the runs of a name is at most, or at least, `limit`."""
    values = [x["numbers"][key] for x in rows if x["run"] == run]
    found = (min if least else max)(values)
    return {"what": f"{run}: {key}", "found": found, "limit": limit, "least": least}


def stacks(args):
    rows, bounds = [], []
    limits = dict(zip(args.depths, (93, 87)))
    for depth, name, scaled in itertools.product(args.depths, args.activations, (True, False)):
        run = f"{name}, {depth} layers, {'inputs=batch' if scaled else 'orthogonal × s'}"
        for seed in args.seeds:
            data = load("digits", None, args.batch, 512, CPU, seed)
            sizes = [math.prod(data.shape)] + [args.width] * (depth - 1) + [data.classes]
            layers = [x for pair in itertools.pairwise(sizes)
                      for x in (nn.Linear(*pair, bias=False), getattr(nn, name)())]  # fmt: skip
            net = nn.Sequential(nn.Flatten(), *layers[:-1])
            first = next(iter(data.train))[0] if scaled else None
            init_weights(net, torch.Generator().manual_seed(seed), inputs=first)
            optimizer = AGD(net)
            curve = train(net, optimizer, data.train, mse, args.epochs, iter)
            rows.append(row(run, seed, optimizer, test_accuracy=score(net, data.test, mse)[1],
                            train_loss=curve[-1]))  # fmt: skip
        if scaled:
            bounds.append(bound(rows, run, "test accuracy", limits[depth], least=True))
    return rows, bounds


def on_and_off(args, name, make, key, limit, take=None):
    """Train the networks make(False) and make(True), drawn anew, on the square loss; without the
    images that are left over at the end of an epoch, and then, if `take` is None, with them."""
    rows, bounds = [], []
    for on, seed in itertools.product((False, True), args.seeds):
        torch.manual_seed(seed)
        net = make(on)
        init_weights(net, torch.Generator().manual_seed(seed))
        batches, tests = cifar(args, seed)
        optimizer = AGD(net)
        curve = train(net, optimizer, batches, mse, args.epochs, take or whole)
        loss, accuracy = score(net, tests, mse)
        rows.append(row(f"{name} {'on' if on else 'off'}", seed, optimizer, curve,
                        train_loss=score(net, batches, mse)[0], last_epoch=curve[-1],
                        test_loss=loss, test_accuracy=accuracy))  # fmt: skip
    for off, on in zip(rows, rows[len(args.seeds) :]):
        gain = off["numbers"][key] - on["numbers"][key]
        bounds.append({"what": f"{name}, seed {on['seed']}: {key}, off minus on", "found": gain,
                       "limit": limit, "least": True})  # fmt: skip
    if take is None:
        last = f"last {args.images % args.batch} images too, {name}"
        rows += on_and_off(args, last, make, key, limit, iter)[0]
    return rows, bounds


def biases(args):
    def make(on):
        return build("fcn", (3, 32, 32), 10, args.depth, args.width, bias=on)

    return on_and_off(args, "biases", make, "train loss", 0.005)


def affine(args):
    """Of two networks, whose linear layer sees the mean over positions, or every position."""

    def make(on, flat):
        layers, before, positions = [], 3, 32**2
        for i, channels in enumerate(args.channels):
            layers += [nn.Conv2d(before, channels, 3, 2 if i else 1, 1, bias=False),
                       nn.BatchNorm2d(channels, affine=False), nn.ReLU()]  # fmt: skip
            before, positions = channels, positions // 4 if i else positions
        layers += [] if flat else [nn.AdaptiveAvgPool2d(1)]
        head = nn.Linear(before * (positions if flat else 1), 10, bias=False)
        return with_vectors(nn.Sequential(*layers, nn.Flatten(), head), False, on)

    rows, bounds = on_and_off(args, "affine", lambda on: make(on, False), "last epoch", 0.015)
    more = on_and_off(args, "all positions, affine", lambda on: make(on, True), "last epoch",
                      0.015, whole)  # fmt: skip
    return rows + more[0], bounds + more[1]


class Characters:
    """Batches of (characters (B, T), those that follow (B, T)): `steps` at random places of a
    text, or, if it is None, all of the text."""

    def __init__(self, text, args, steps=None, seed=0):
        self.text, self.args, self.steps, self.seed = text, args, steps, seed
        self.batch_size = args.batch

    def set_epoch(self, epoch):
        """There is one."""

    def __iter__(self):
        last, rng = len(self.text) - self.args.context, np.random.default_rng(self.seed)
        for _ in range(self.steps or 0):
            yield self._batch(rng.integers(0, last, self.args.batch))
        places = [] if self.steps else range(0, last, self.args.context)
        for i in range(0, len(places), 128):
            yield self._batch(places[i : i + 128])

    def _batch(self, places):
        windows = torch.stack([self.text[i : i + self.args.context + 1] for i in places])
        return windows[:, :-1], windows[:, 1:]


class Logits(nn.Module):
    """A language model of transformers, from characters to outputs (B, V, T)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(input_ids=x).logits.transpose(1, 2)


def texts(args):
    """(training text, validation text, number of letters): places in the alphabet, (N,) int64."""
    path = Path(args.data_dir).expanduser() / "shakespeare.txt"
    letters, text = np.unique(list(path.read_text(encoding="utf-8")), return_inverse=True)
    text, cut = torch.from_numpy(text), 9 * len(text) // 10
    return text[:cut], text[cut:], len(letters)


def stock_gpt2(args, letters):
    """transformers' GPT-2 with a tied head and without dropout."""
    import transformers

    config = {"vocab_size": letters, "n_positions": args.context, "n_embd": args.width,
              "n_layer": args.layers, "n_head": args.heads, "resid_pdrop": 0, "embd_pdrop": 0,
              "attn_pdrop": 0, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    return Logits(transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)))


def text_loss(outputs, labels):
    """The mean cross-entropy of each text, (B,). outputs (B, V, T), labels (B, T)."""
    return xent(outputs, labels).mean(1)


def gpt2(args):
    (text, held, letters), rows = texts(args), []
    runs = {"AGD": AGD, f"AGD, L = the count, {args.count}": lambda x: AGD(x, depth=args.count)}
    runs |= {f"AdamW {x:g}": lambda net, x=x: adamw(net, x, args.steps, args) for x in args.rates}
    for run, seed in itertools.product(runs, args.seeds):
        torch.manual_seed(seed)
        net = stock_gpt2(args, letters)
        optimizer, batches = runs[run](net), Characters(text, args, args.steps, seed)
        curve = train_steps(net, optimizer, batches, text_loss, args.steps)
        rows.append(row(run, seed, optimizer, curve, train_loss=curve[-1], validation_loss=score(
            net, Characters(held, args), text_loss)[0]))  # fmt: skip
    return rows, [bound(rows, "AGD", "validation loss", 2.52)]


def adamw(net, rate, steps, args):
    """AdamW with a warm-up, a cosine to 0 at `steps` and, if `clip`, clipped gradients."""
    optimizer = torch.optim.AdamW(net.parameters(), betas=args.betas,
                                  weight_decay=args.weight_decay)  # fmt: skip
    count = itertools.count(1)

    def before(*_):
        t = next(count)
        done = max(0, t - args.warm_up) / (steps - args.warm_up)
        factor = min(1, t / max(args.warm_up, 1)) * (1 + math.cos(math.pi * done)) / 2
        optimizer.param_groups[0]["lr"] = rate * factor
        if args.clip:
            nn.utils.clip_grad_norm_(net.parameters(), args.clip)

    optimizer.register_step_pre_hook(before)
    return optimizer


def beside_adam(args):
    """{name: function from a network to its optimiser} of AGD and of Adam at each rate."""
    return {"AGD": AGD, **{f"Adam {x:g}": lambda net, x=x: torch.optim.Adam(net.parameters(), x)
                           for x in args.rates}}  # fmt: skip


def finetune(args, runs=None):
    """The network of `biases`, by Adam on the first half of the images; then on the second, by
    each of `runs`."""
    rows, half = [], args.images // 2
    for seed in args.seeds:
        torch.manual_seed(seed)
        start = build("fcn", (3, 32, 32), 10, args.depth, args.width, bias=True)
        old, tests = cifar(args, seed, slice(half))
        new, _ = cifar(args, seed, slice(half, None))
        train(start, torch.optim.Adam(start.parameters(), args.rate_before), old, mse, args.before)
        for run, make in {"before": None, **(runs or beside_adam(args))}.items():
            net = copy.deepcopy(start)
            optimizer = make and make(net)
            if optimizer:
                train(net, optimizer, new, mse, args.epochs)
            rows.append(row(run, seed, optimizer, test_accuracy=score(net, tests, mse)[1],
                            new_half_loss=score(net, new, mse)[0],
                            old_half_loss=score(net, old, mse)[0]))  # fmt: skip
    return rows, []


def families(args):
    from torchvision import models
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    sizes = {"image_size": 32, "patch_size": 4, "num_layers": 4, "num_heads": 4,
             "hidden_dim": 96, "mlp_dim": 384}  # fmt: skip
    stages = [CNBlockConfig(48, 96, 2), CNBlockConfig(96, 192, 2), CNBlockConfig(192, None, 2)]
    nets = {
        "ResNet-18": models.resnet18,
        "MobileNet-V3 small": models.mobilenet_v3_small,
        "ViT 4×96": lambda num_classes: models.VisionTransformer(**sizes, num_classes=num_classes),
        "ConvNeXt 48-96-192": lambda num_classes: ConvNeXt(stages, num_classes=num_classes),
        "DenseNet 3×4": lambda num_classes: models.DenseNet(
            12, (4, 4, 4), 24, num_classes=num_classes),
    }  # fmt: skip
    rows, runs = [], beside_adam(args)
    for name, seed, run in itertools.product(nets, args.seeds, runs):
        torch.manual_seed(seed)
        net = nets[name](num_classes=10)
        batches, tests = cifar(args, seed)
        optimizer = runs[run](net)
        curve = train_steps(net, optimizer, batches, xent, args.steps)
        rows.append(row(f"{name}, {run}", seed, optimizer, curve, train_loss=curve[-1],
                        test_accuracy=score(net, tests, xent)[1]))  # fmt: skip
        print(rows[-1]["run"], rows[-1]["numbers"], flush=True)
    return rows, []


CASES = {"stacks": stacks, "biases": biases, "affine": affine, "gpt2": gpt2,
         "finetune": finetune, "families": families}  # fmt: skip


def circumstances(args, settings):
    """What a case's file holds beside rows and bounds; `settings`: the names of its settings."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy", "torchvision", "transformers", "timm"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "command": f"{args.command} {args.case}" + " --quick" * args.quick,
        "date": date.today().isoformat(),
        "settings": {key: getattr(args, key) for key in settings},
        "data": args.data, "versions": versions, "environment": environment(CPU),
    }  # fmt: skip


def parser(script, doc, cases):
    """The parser of a script that measures `cases`."""
    command = f"python -m scripts.{script}"
    found = argparse.ArgumentParser(command, description=doc,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("case", choices=[*cases, "report", "draw"])
    found.add_argument("--data_dir", default=default_data_dir())
    found.add_argument("--out", type=Path, default=Path("results"))
    found.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    found.set_defaults(command=command, data=None)
    return found


def main(argv=None):
    args = parser("any_model", __doc__, CASES).parse_args(argv)
    folder = args.out / "any_model"
    if args.case not in CASES:
        getattr(any_model_report, args.case)(folder, CASES)
        return
    for key, value in SETTINGS[args.case].items():
        setattr(args, key, QUICK.get(key, value) if args.quick else value)
    rows, bounds = CASES[args.case](args)
    found = {**circumstances(args, SETTINGS[args.case]), "rows": rows, "bounds": bounds}
    any_model_report.write(folder / f"{args.case}.json", json.dumps(found, indent=1) + "\n")
    print(any_model_report.tables(found))


if __name__ == "__main__":
    sys.exit(main())
