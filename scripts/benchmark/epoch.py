"""An epoch beside its passes alone and the usual pipeline, the start of main.py, and what saving
takes of a run: cases `epoch` and `checkpoint`."""

import math
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torchvision import transforms

import cli
import flags
from agd import AGD, init_weights
from architecture import build
from data import DATASETS, load
from data.prepare import prepare
from runs.log import RunError, read_rows
from scripts.benchmark.measure import by_clock, compared, note, spread, take_turns
from training.cuda_graph import GraphedSteps
from training.losses import mse
from training.metrics import Totals
from training.step import Step, evaluate, train_epoch

GROWTH = {"width": (64, 128, 256, 512, 1024), "depth": (2, 4, 8, 16, 32),
          "batch_size": (32, 64, 128, 256, 512, 1024, 2048, 4096)}  # one at a time
IMAGES = 8192  # of an epoch that grows
RUNS = {  # network, optimiser, images in training and in testing that stand for an epoch's (None)
    "FCN 10×256, AGD": ("fcn", "agd", None, None),
    "ResNet-18, AGD": ("resnet18", "agd", 256, 128),
    "ResNet-18, Adam": ("resnet18", "adam", 256, 128),  # which has two numbers a weight beside it
}
PERCENT = "ratios in percent of an epoch"


class PlainFCN(torch.nn.Module):
    """The fully connected network in torch's own layers, on the same weights: bare passes are its,
    however fast the product's own become."""

    def __init__(self, net):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for p in net.parameters():
            self.layers.append(torch.nn.Linear(*p.shape[::-1], bias=False, device=p.device))
            self.layers[-1].weight = p

    def forward(self, x):
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = layer(x).mul_(math.sqrt(2)).relu_()
        return self.layers[-1](x)


def network(args, data, device):
    torch.manual_seed(0)
    net = build(args.arch, data.shape, data.classes, args.depth, args.width).to(device)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    return net


def ours(args, data, device):
    """(training, test): functions that take an epoch as main.py does, on a GPU by CUDA graphs."""
    net = network(args, data, device)
    optimizer, epochs, graphed = AGD(net.parameters()), iter(range(1, 1000)), None
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with torch.cuda.stream(stream):  # None: the current one
        if stream:
            graphed = GraphedSteps(Step(net, mse, optimizer), data.train)

    def training():
        data.train.set_epoch(next(epochs))
        with torch.cuda.stream(stream):
            if graphed:
                net.train()
                list(graphed.steps(Totals()))
            totals = graphed.totals() if graphed else train_epoch(net, data.train, mse, optimizer)
            totals.read()

    return training, lambda: evaluate(net, data.test, mse).read()


def bare(net, data):
    """A function: forward and backward passes alone, on batches that are ready on the device."""
    ready = list(data.train)

    def epoch():
        net.train()
        for inputs, labels in ready:
            mse(net(inputs), labels).mean().backward()
            net.zero_grad()

    return epoch


@torch.no_grad()
def plain_agd_step(weights):
    """The paper's update, layer by layer; returns eta, a Python number."""
    scales = [math.sqrt(p.shape[0] / p.shape[1] / math.prod(p.shape[2:])) for p in weights]
    norms = [p.grad.norm(dim=(0, 1), keepdim=True) for p in weights]
    G = sum(s * n.sum() for s, n in zip(scales, norms)) / len(weights)
    eta = math.log((1 + math.sqrt(1 + 4 * G)) / 2)
    for p, s, n in zip(weights, scales, norms):
        p -= eta / len(weights) * s * torch.nan_to_num(p.grad / n)
    return eta


def conventional(args, data, device):
    """A function: an epoch and its test as most people write them. Torch's own layers, a PIL image
    and its torchvision transforms one by one in a DataLoader, a plain loop over the layers; loss,
    accuracy and eta are read every step."""
    spec = DATASETS[args.dataset]
    plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])
    crop, flip = transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()
    net, loaders = network(args, data, device), []
    net = PlainFCN(net) if args.arch == "fcn" else net
    with np.load(prepare(args.dataset, args.data_dir)) as file:
        for split, batches, chain in (
            ("train", data.train, transforms.Compose([crop, flip, plain])),
            ("test", data.test, plain),
        ):

            def collate(pairs, transform=chain):
                images = [transform(PIL.Image.fromarray(image)) for image, _ in pairs]
                return torch.stack(images), torch.tensor([label for _, label in pairs])

            pairs = zip(file[f"{split}_images"][: batches.examples], file[f"{split}_labels"])
            loaders.append(torch.utils.data.DataLoader(
                list(pairs), args.batch_size, split == "train", collate_fn=collate))  # fmt: skip

    def epoch():
        sums = np.zeros(3)
        for loader, training in zip(loaders, (True, False)):
            net.train(training)
            for inputs, labels in loader:
                inputs, labels = inputs.to(device), labels.to(device)
                with torch.set_grad_enabled(training):
                    outputs = net(inputs)
                if training:
                    loss = mse(outputs, labels).mean()
                    loss.backward()
                    sums[1:] += loss.item(), plain_agd_step(list(net.parameters()))
                    net.zero_grad()
                sums[0] += (outputs.argmax(1) == labels).float().mean().item()

    return epoch


def growth(args, device):
    """Seconds of an epoch of training and of its bare passes against sizes and batch."""
    images = 512 if args.quick else IMAGES
    result = {"images": images}
    for key, values in GROWTH.items():
        values = values[1:3] if args.quick else values
        result[key] = {"values": list(values), "ratios": [], "ours": [], "bare": []}
        for value in values:
            here = Namespace(**{**vars(args), "arch": "fcn", key: value})
            data = load(args.dataset, args.data_dir, here.batch_size, here.batch_size, device,
                        train_examples=images, test_examples=1)  # fmt: skip
            works = {"ours": ours(here, data, device)[0],
                     "bare": bare(PlainFCN(network(here, data, device)), data)}  # fmt: skip
            note(f"growth: {key} {value}, {args.repeats} rounds")
            told = compared(take_turns(works, args.repeats, by_clock(device, args.clock)),
                            [("ours", "bare")])  # fmt: skip
            result[key]["ratios"] += told["ratios"].values()
            for name in works:
                result[key][name].append(told["seconds"][name])
    return result


def start_main(args, device, out, *more):
    """A Popen of main.py, its output in pipes."""
    where = ["--dataset", args.dataset, "--depth", args.depth, "--width", args.width, "--train_bs",
             args.batch_size, "--device", device, "--data_dir", args.data_dir, "--out", out]
    command = [sys.executable, Path(flags.__file__).with_name("main.py"), *where, *more]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, encoding="utf-8")  # fmt: skip


def failed(process, message):
    error = RunError(f"main.py did not finish: {message.strip()[-2000:]}")
    error.exit_code = process.returncode or 1
    return error


def first_step(args, device):
    """Seconds from the start of main.py to its report of an epoch of one batch in training and one
    in testing: the first step, and a little more."""
    with tempfile.TemporaryDirectory() as out:
        start, seconds = time.perf_counter(), None
        with start_main(args, device, out, "--arch", args.arch, "--epochs", 1, "--train_examples",
                        args.batch_size, "--test_examples", 128) as process:  # fmt: skip
            for line in process.stdout:
                if line.startswith("epoch 1/1"):
                    seconds = time.perf_counter() - start
            message = process.stderr.read()
    if seconds is None:
        raise failed(process, message)
    return seconds


def saved(args, device, whole, arch, optimizer, *examples):
    """(seconds of a checkpoint, seconds of an epoch of the `whole` set with its test, bytes) of a
    run of main.py for two epochs of `examples`, from its own log."""
    examples = [n or part.examples for n, part in zip(examples, (whole.train, whole.test))]
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=args.out) as out:
        with start_main(args, device, out, "--arch", arch, "--optimizer", optimizer, "--epochs", 2,
                        "--train_examples", examples[0], "--test_examples", examples[1]) as run:
            message = run.communicate()[1]
        if run.returncode:
            raise failed(run, message)
        ((log,), (file,)) = (sorted(Path(out).rglob(f"*.{x}")) for x in ("jsonl", "pt"))
        (*_, last, end), size = read_rows(log), file.stat().st_size
    training = examples[0] / last["images_per_second"]
    epoch = training * whole.train.examples / examples[0]
    epoch += (last["seconds"] - training) * whole.test.examples / examples[1]
    return end["saving_seconds"] / 2, epoch, size


def checkpoint(args, device):
    """The share of an epoch's time that checkpoints take: one at its end, and one whenever the
    default of --save_every has passed. Wall-clock time, which waits for the disk of --out."""
    Path(args.out).mkdir(parents=True, exist_ok=True)
    every = cli.every(flags.parse(["--device", "cpu"]).save_every)[1]
    whole = load(args.dataset, args.data_dir, 1, 1, torch.device("cpu"))
    percent, times, sizes = {}, {}, {}
    for label, run in RUNS.items():
        run = (*run[:2], args.batch_size, 64) if args.quick else run
        rounds = []
        for i in range(args.repeats):
            rounds.append(saved(args, device, whole, *run))
            note(f"{label}, round {i + 1}/{args.repeats}: {rounds[-1][0]:.3g} s")
        percent[label] = [100 * (1 + epoch / every) * x / epoch for x, epoch, _ in rounds]
        sizes[label], columns = rounds[-1][2], list(zip(*rounds))
        times[label] = spread({"checkpoint": columns[0], "epoch": columns[1]})
    told = spread(percent)
    return {PERCENT: {k: x[0] for k, x in told.items()}, "quartiles": {
        k: x[1:] for k, x in told.items()}, "seconds": times, "bytes": sizes,
        "seconds between two in a long epoch": every}  # fmt: skip


def case(args, device):
    few = {"train_examples": 1024, "test_examples": 256} if args.quick else {}
    test_bs = flags.test_batch(Namespace(**vars(args), train_bs=args.batch_size))
    data = load(args.dataset, args.data_dir, args.batch_size, test_bs, device, **few)
    training, test = ours(args, data, device)
    net = network(args, data, device)
    works = {"ours, training": training, "ours, test": test, "bare": bare(net, data)}
    pairs = [("ours, training", "bare"), ("ours", "bare"), ("conventional", "ours"),
             ("conventional", "bare")]  # fmt: skip
    if args.arch == "fcn":
        works |= {"bare": bare(PlainFCN(net), data), "bare, our network": bare(net, data)}
        pairs.append(("ours, training", "bare, our network"))
    works["conventional"] = conventional(args, data, device)
    seconds = take_turns(works, args.repeats, by_clock(device, args.clock), say="epoch")
    seconds["ours"] = [a + b for a, b in zip(seconds["ours, training"], seconds["ours, test"])]
    torch_alone = [sys.executable, "-c", "import torch"]
    starts = take_turns({
        "main.py, to its first step": lambda: first_step(args, device),
        "import torch": lambda: subprocess.run(torch_alone, check=True)},
        args.repeats, by_clock(torch.device("cpu")), say="start")  # fmt: skip
    told = compared(seconds, pairs)
    return {"ratios": told["ratios"], "quartiles": told["quartiles"],
            "seconds": {**told["seconds"], **spread(starts)},
            "growth": growth(args, device), "data": data.source}  # fmt: skip
