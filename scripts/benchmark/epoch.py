"""An epoch beside its passes alone, the start of main.py, the reading of a folder beside the usual
loader, and what saving takes of a run: cases `epoch`, `data` and `checkpoint`."""

import math
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import cli
import flags
from agd import AGD, init_weights
from architecture import build
from data import IMAGENET_MEAN, IMAGENET_STD, load
from data.folders import FolderBatches
from data.imagenet import find
from runs.log import RunError, read_rows
from scripts.benchmark.measure import by_clock, compared, note, spread, take_turns
from training.cuda_graph import GraphedSteps
from training.losses import mse
from training.metrics import Totals
from training.step import Step, evaluate, train_epoch

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


def run_main(args, device, out, arch, examples, *more):
    """Run main.py on (training, test) examples. Returns the seconds from its start to its report
    of the first epoch; RunError, with the end of its output, where it fails."""
    size = ["--depth", args.depth, "--width", args.width] if arch == "fcn" else []
    command = [sys.executable, "-u", Path(flags.__file__).with_name("main.py"), "--arch", arch,
               *size, "--dataset", args.dataset, "--train_bs", args.batch_size, "--train_examples",
               examples[0], "--test_examples", examples[1], "--device", device, "--data_dir",
               args.data_dir, "--out", out, *more]
    start, seconds, lines = time.perf_counter(), None, []
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, encoding="utf-8") as process:  # fmt: skip
        for line in process.stdout:
            lines.append(line)
            if line.startswith("epoch 1/"):
                seconds = time.perf_counter() - start
    if process.returncode:
        error = RunError(f"main.py did not finish: {''.join(lines).strip()[-2000:]}")
        error.exit_code = process.returncode
        raise error
    return seconds


def first_step(args, device):
    """Seconds from the start of main.py to its report of an epoch of one batch in training and one
    in testing: the first step, and a little more."""
    with tempfile.TemporaryDirectory() as out:
        return run_main(args, device, out, args.arch, (args.batch_size, 128), "--epochs", 1)


def saved(args, device, whole, arch, optimizer, *examples):
    """(seconds of a checkpoint, seconds of an epoch of the `whole` set with its test, bytes) of a
    run of main.py for two epochs of `examples`, from its own log."""
    examples = [n or part.examples for n, part in zip(examples, (whole.train, whole.test))]
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=args.out) as out:
        run_main(args, device, out, arch, examples, "--optimizer", optimizer, "--epochs", 2)
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
    every = cli.every(flags.parser().get_default("save_every"))[1]
    whole = load(args.dataset, args.data_dir, 1, 1, torch.device("cpu"))
    percent, seconds, sizes = {}, {}, {}
    for label, run in RUNS.items():
        run = (*run[:2], args.batch_size, 64) if args.quick else run
        rounds = []
        for i in range(args.repeats):
            rounds.append(saved(args, device, whole, *run))
            note(f"{label}, round {i + 1}/{args.repeats}: {rounds[-1][0]:.3g} s")
        percent[label] = [100 * (1 + epoch / every) * x / epoch for x, epoch, _ in rounds]
        checkpoints, epochs, (*_, sizes[label]) = zip(*rounds)
        seconds[label] = spread({"checkpoint": checkpoints, "epoch": epochs})
    shares = compared(percent, [])["seconds"]
    return {PERCENT: {k: x[0] for k, x in shares.items()},
            "quartiles": {k: x[1:] for k, x in shares.items()}, "seconds": seconds,
            "bytes": sizes, "seconds between two in a long epoch": every}  # fmt: skip


def case(args, device):
    few = {"train_examples": 1024, "test_examples": 256} if args.quick else {}
    test_bs = flags.test_batch(Namespace(**vars(args), train_bs=args.batch_size))
    data = load(args.dataset, args.data_dir, args.batch_size, test_bs, device, **few)
    training, test = ours(args, data, device)
    net = network(args, data, device)
    works = {"ours, training": training, "ours, test": test, "bare": bare(net, data)}
    pairs = [("ours, training", "bare"), ("ours", "bare")]
    if args.arch == "fcn":
        works |= {"bare": bare(PlainFCN(net), data), "bare, our network": works["bare"]}
        pairs.append(("ours, training", "bare, our network"))
    seconds = take_turns(works, args.repeats, by_clock(device, args.clock), say="epoch")
    seconds["ours"] = [a + b for a, b in zip(seconds["ours, training"], seconds["ours, test"])]
    torch_alone = [sys.executable, "-c", "import torch"]
    starts = take_turns({
        "main.py, to its first step": lambda: first_step(args, device),
        "import torch": lambda: subprocess.run(torch_alone, check=True)},
        args.repeats, by_clock(torch.device("cpu")), say="start")  # fmt: skip
    times = compared(seconds, pairs)
    times["seconds"] |= spread(starts)
    return {**times, "data": data.source}


def folder(args, device):
    """Images a second of one thread, by the process's own clock: the loader of main.py without
    workers, and a DataLoader of torchvision's ImageFolder and transforms."""
    images = Path(args.folder or find(args.data_dir), "train")
    torch.set_num_threads(1)
    batches = FolderBatches(images, args.batch_size, args.image_size, IMAGENET_MEAN, IMAGENET_STD,
                            "cpu", train=True)  # fmt: skip
    chain = [transforms.RandomResizedCrop(args.image_size), transforms.RandomHorizontalFlip(),
             transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    theirs = datasets.ImageFolder(images, transforms.Compose(chain))
    loader, epochs = DataLoader(theirs, args.batch_size, shuffle=True), iter(range(1, 1000))

    def ours():
        batches.set_epoch(next(epochs))
        return sum(len(labels) for _, labels in batches)

    works = {"ours": ours, "conventional": lambda: sum(len(labels) for _, labels in loader)}
    seconds = take_turns(works, args.repeats, by_clock(device, "process"), say="data")
    times = compared(seconds, [("conventional", "ours")])
    rates = {name: batches.examples / times["seconds"][name][0] for name in works}
    return {"ratios": times["ratios"], "quartiles": times["quartiles"],
            "images_per_second_per_core": rates["ours"], "conventional": rates["conventional"],
            "images": batches.examples, "seconds": times["seconds"]}  # fmt: skip
