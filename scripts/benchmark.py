"""Times beside their peers in the same run: `python -m scripts.benchmark [epoch|data]`.

epoch, what an epoch takes:

    ours           an epoch of main.py: training, exact test accuracy
    bare           forward and backward passes alone, on batches that lie ready on the device
    conventional   the usual pipeline: a PIL image and its torchvision transforms one by one in a
                   DataLoader, AGD in a plain loop over the layers, loss and eta read every step

data, what one core takes to read the images of a folder (--folder, below which train/CLASS/ lie)
for training at --image_size, in seconds of the process itself, whatever else the machine does:

    ours           the loader of main.py without workers
    conventional   torchvision's ImageFolder and transforms in a DataLoader without workers

The cases take turns, so that a drift of the machine's speed meets all of them. Medians and their
spread go to <out>/benchmark/<case>.json, ratios (round by round, then their median) first.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from agd import AGD, init_weights
from architecture import build
from data import DATASETS, IMAGENET_MEAN, IMAGENET_STD, DataError, default_data_dir, load
from data.imagenet import find
from data.prepare import prepare
from display import table
from run import environment
from train import evaluate, mse, train_epoch


def network(args, data, device):
    torch.manual_seed(0)
    net = build(args.arch, data.shape, data.classes, args.depth, args.width).to(device)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    return net


def ours(args, data, device):
    """An epoch as main.py runs it."""
    net = network(args, data, device)
    optimizer = AGD(net.parameters())
    epochs = iter(range(1, 1000))

    def epoch():
        data.train.set_epoch(next(epochs))
        train_epoch(net, data.train, mse, optimizer).read()
        middle = time.perf_counter()
        evaluate(net, data.test, mse).read()
        return middle

    return epoch


def bare(args, data, device):
    """The passes alone."""
    net = network(args, data, device)
    ready = list(data.train)

    def epoch():
        net.train()
        for inputs, labels in ready:
            mse(net(inputs), labels).mean().backward()
            net.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return epoch


@torch.no_grad()
def plain_agd_step(weights):
    """The paper's update, layer by layer; returns eta, a Python number."""
    norms, scales = [], []
    for p in weights:
        norms.append(p.grad.norm(dim=(0, 1), keepdim=True))
        scales.append(math.sqrt(p.shape[0] / p.shape[1] / math.prod(p.shape[2:])))
    G = sum(s * n.sum() for s, n in zip(scales, norms)) / len(weights)
    eta = math.log((1 + math.sqrt(1 + 4 * G)) / 2)
    for p, s, n in zip(weights, scales, norms):
        p -= eta / len(weights) * s * torch.nan_to_num(p.grad / n)
    return eta


def conventional(args, data, device):
    """What most people write, read by read."""
    from PIL import Image
    from torchvision import transforms

    spec = DATASETS[args.dataset]
    steps = [transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]

    class Images(torch.utils.data.Dataset):
        def __init__(self, images, labels, transform):
            self.images, self.labels, self.transform = images, labels, transform

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])

    with np.load(prepare(args.dataset, args.data_dir)) as file:
        sets = [
            Images(file[f"{split}_images"], file[f"{split}_labels"], transforms.Compose(chain))
            for split, chain in (("train", augment + steps), ("test", steps))
        ]
    train, test = (
        torch.utils.data.DataLoader(part, batch_size=args.batch_size, shuffle=part is sets[0])
        for part in sets
    )
    net = network(args, data, device)
    weights = list(net.parameters())

    def epoch():
        sums = np.zeros(3)
        net.train()
        for inputs, labels in train:
            inputs, labels = inputs.to(device), labels.to(device)
            outputs = net(inputs)
            loss = mse(outputs, labels).mean()
            loss.backward()
            eta = plain_agd_step(weights)
            net.zero_grad()
            sums += loss.item(), (outputs.argmax(1) == labels).float().mean().item(), eta
        net.eval()
        with torch.no_grad():
            for inputs, labels in test:
                inputs, labels = inputs.to(device), labels.to(device)
                outputs = net(inputs)
                sums[1] += (outputs.argmax(1) == labels).float().mean().item()

    return epoch


def ours_of_a_folder(args):
    """Images through the loader of main.py, and the bytes of their files."""
    from data.folders import FolderBatches

    batches = FolderBatches(
        args.folder / "train", args.batch_size, args.image_size, IMAGENET_MEAN, IMAGENET_STD, "cpu",
        train=True,
    )  # fmt: skip
    epochs = iter(range(1, 1000))

    def epoch():
        batches.set_epoch(next(epochs))
        for _ in batches:
            pass

    return epoch, batches.examples


def conventional_folder(args):
    from torchvision import datasets, transforms

    chain = [
        transforms.RandomResizedCrop(args.image_size), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]  # fmt: skip
    folder = datasets.ImageFolder(args.folder / "train", transforms.Compose(chain))
    loader = torch.utils.data.DataLoader(folder, args.batch_size, shuffle=True)

    def epoch():
        for _ in loader:
            pass

    return epoch


def measure(cases, repeats, clock=time.perf_counter):
    """Seconds of each case's epochs, the cases taking turns after a round that does not count."""
    seconds = {name: [] for name in cases}
    parts = {"ours, training": [], "ours, test": []}
    for i in range(repeats + 1):
        for name, epoch in cases.items():
            start = clock()
            middle = epoch()
            end = clock()
            if i:
                seconds[name].append(end - start)
                if middle:
                    parts["ours, training"].append(middle - start)
                    parts["ours, test"].append(end - middle)
            print(f"round {i}/{repeats}: {name} {end - start:.3f} s", file=sys.stderr)
    return {**seconds, **{name: times for name, times in parts.items() if times}}


def epoch_case(args, device):
    """(seconds of each case, pairs to compare, what else is to be written)."""
    data = load(args.dataset, args.data_dir, args.batch_size, args.batch_size, device)
    cases = {case.__name__: case(args, data, device) for case in (ours, bare, conventional)}
    pairs = [("ours, training", "bare"), ("ours", "bare"), ("conventional", "ours")]
    return measure(cases, args.repeats), pairs, {"data": data.source}


def data_case(args, device):
    torch.set_num_threads(1)
    epoch, images = ours_of_a_folder(args)
    cases = {"ours": epoch, "conventional": conventional_folder(args)}
    seconds = measure(cases, args.repeats, time.process_time)
    rates = {name: images / statistics.median(times) for name, times in seconds.items()}
    found = {"images_per_second_per_core": rates["ours"], "conventional": rates["conventional"],
             "images": images}  # fmt: skip
    return seconds, [("conventional", "ours")], found


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("case", nargs="?", choices=["epoch", "data"], default="epoch", help="(default: epoch)")
    add("--arch", default="fcn")
    add("--dataset", default="cifar10", choices=["cifar10", "cifar100"])
    add("--folder", type=Path, help="of images (default: imagenet in --data_dir or $IMAGENET_PATH)")
    add("--image_size", type=int, default=224)
    add("--depth", type=int, default=10)
    add("--width", type=int, default=256)
    add("--batch_size", type=int, default=128)
    add("--repeats", type=int, default=5, help="counted rounds (default: 5)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data_dir", default=default_data_dir())
    add("--out", default="results")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    try:
        if args.case == "data":
            args.folder = (args.folder or find(args.data_dir)).expanduser()
        case = {"epoch": epoch_case, "data": data_case}[args.case]
        seconds, pairs, found = case(args, device)
    except (DataError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")

    median = {name: statistics.median(times) for name, times in seconds.items()}
    # Of each round on its own, then the median: a round lies within seconds.
    ratios = {
        f"{a} / {b}": statistics.median(x / y for x, y in zip(seconds[a], seconds[b]))
        for a, b in pairs
    }
    result = {
        "ratios": ratios,
        **found,
        "seconds": {
            name: {"median": median[name], "min": min(times), "max": max(times)}
            for name, times in seconds.items()
        },
        "flags": {key: str(x) if isinstance(x, Path) else x for key, x in vars(args).items()},
        "environment": environment(device),
    }
    home = os.path.expanduser("~") + os.sep
    if str(args.folder).startswith(home):
        result["flags"]["folder"] = "~/" + str(args.folder)[len(home) :]
    path = Path(args.out, "benchmark", f"{args.case}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    table(("Median of the ratios", ""), [(k, f"{v:.2f}") for k, v in ratios.items()])
    if args.case == "data":
        rates = {"ours": found["images_per_second_per_core"], "conventional": found["conventional"]}
        table(("Images a second a core", ""), [(k, f"{rate:.0f}") for k, rate in rates.items()])
    table(
        ("Seconds an epoch", "median (min .. max)"),
        [(k, f"{v['median']:.3f} ({v['min']:.3f} .. {v['max']:.3f})")
         for k, v in result["seconds"].items()],
    )
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
