"""What an epoch takes, beside its passes alone and beside the usual pipeline."""

import math
from argparse import Namespace

import numpy as np
import torch

from agd import AGD, init_weights
from architecture import build
from data import DATASETS, load
from data.prepare import prepare
from flags import test_batch
from scripts.benchmark import program
from scripts.benchmark.measure import (
    by_clock,
    medians,
    note,
    quartiles,
    ratios,
    spread,
    take_turns,
)
from training.cuda_graph import GraphedSteps
from training.losses import mse
from training.step import Step, evaluate, train_epoch

GROWTH = {  # one at a time, the others as in the default network
    "width": (64, 128, 256, 512, 1024),
    "depth": (2, 4, 8, 16, 32),
    "batch_size": (32, 64, 128, 256, 512, 1024, 2048, 4096),
}
IMAGES = 8192  # of an epoch that grows


class PlainFCN(torch.nn.Module):
    """The fully connected network of architecture/fcn.py as torch alone has it, with its weights:
    what bare passes are, however fast the product's own become."""

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
    """(training, test) of an epoch as main.py runs them, on a GPU by CUDA graphs."""
    net = network(args, data, device)
    optimizer = AGD(net.parameters())
    epochs, stream, replay = iter(range(1, 1000)), None, None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            replay = GraphedSteps(Step(net, mse, optimizer), data.train)

    def training():
        data.train.set_epoch(next(epochs))
        with torch.cuda.stream(stream):  # None is the one there is
            train_epoch(net, data.train, mse, optimizer, replay=replay).read()

    return training, lambda: evaluate(net, data.test, mse).read()


def bare(net, data):
    """Forward and backward passes alone, on batches that lie ready on the device."""
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
    """What most people write: torch's own layers, a PIL image and its torchvision transforms one by
    one in a DataLoader, a plain loop over the layers, loss, accuracy and eta read every step."""
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
            Images(file[f"{split}_images"][:n], file[f"{split}_labels"][:n],
                   transforms.Compose(chain))
            for split, n, chain in (("train", data.train.examples, augment + steps),
                                    ("test", data.test.examples, steps))
        ]  # fmt: skip
    train, test = (
        torch.utils.data.DataLoader(part, batch_size=args.batch_size, shuffle=part is sets[0])
        for part in sets
    )
    net = network(args, data, device)
    net = PlainFCN(net) if args.arch == "fcn" else net
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


def growth(args, device):
    """Seconds of an epoch of training and of its passes alone against the network's sizes and the
    batch, of `images` images."""
    images = 512 if args.quick else IMAGES
    found = {"images": images}
    for key, values in GROWTH.items():
        values = values[1:3] if args.quick else values
        found[key] = {"values": list(values), "ratios": [], "ours": [], "bare": []}
        for value in values:
            here = type(args)(**{**vars(args), "arch": "fcn", key: value})
            data = load(args.dataset, args.data_dir, here.batch_size, here.batch_size, device,
                        train_examples=images, test_examples=1)  # fmt: skip
            training, _ = ours(here, data, device)
            passes = bare(PlainFCN(network(here, data, device)), data)
            seconds = take_turns(
                {"ours": training, "bare": passes}, args.repeats, by_clock(device, args.clock)
            )
            note(f"growth: {key} {value}, {args.repeats} rounds")
            (each,) = ratios(seconds, [("ours", "bare")]).values()
            found[key]["ratios"].append(medians({"": each})[""])
            for name, told in spread(seconds).items():
                found[key][name].append(told)
    return found


def case(args, device):
    few = {"train_examples": 1024, "test_examples": 256} if args.quick else {}
    test_bs = test_batch(Namespace(**vars(args), train_bs=args.batch_size))
    data = load(args.dataset, args.data_dir, args.batch_size, test_bs, device, **few)
    training, test = ours(args, data, device)
    net = network(args, data, device)
    works = {"ours, training": training, "ours, test": test, "bare": bare(net, data)}
    if args.arch == "fcn":
        works |= {"bare": bare(PlainFCN(net), data), "bare, our network": bare(net, data)}
    works["conventional"] = conventional(args, data, device)
    seconds = take_turns(works, args.repeats, by_clock(device, args.clock), say="epoch")
    seconds["ours"] = [a + b for a, b in zip(seconds["ours, training"], seconds["ours, test"])]
    pairs = [("ours, training", "bare"), ("ours", "bare"), ("conventional", "ours"),
             ("conventional", "bare")]  # fmt: skip
    pairs += [("ours, training", x) for x in works if x == "bare, our network"]
    each = ratios(seconds, pairs)
    starts = {"main.py, to its first step": lambda: program.first_step(args, device),
              "import torch": program.importing}  # fmt: skip
    starts = take_turns(starts, args.repeats, lambda work: work(), say="start")
    return {
        "ratios": medians(each),
        "quartiles": quartiles(each),
        "seconds": spread({**seconds, **starts}),
        "growth": growth(args, device),
        "data": data.source,
    }
