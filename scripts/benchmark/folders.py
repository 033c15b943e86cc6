"""What a core takes to read a folder of images for training."""

import statistics

import torch

from data import IMAGENET_MEAN, IMAGENET_STD
from data.imagenet import find
from scripts.benchmark.measure import (
    by_clock,
    medians,
    quartiles,
    ratios,
    spread,
    take_turns,
)


def ours(args):
    """(an epoch through the loader of main.py, its number of images)."""
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


def conventional(args):
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


def case(args, device):
    """Seconds of the process itself, of one thread."""
    args.folder = (args.folder or find(args.data_dir)).expanduser()
    torch.set_num_threads(1)
    epoch, images = ours(args)
    works = {"ours": epoch, "conventional": conventional(args)}
    seconds = take_turns(works, args.repeats, by_clock(device, "process"), say="data")
    rates = {name: images / statistics.median(times) for name, times in seconds.items()}
    each = ratios(seconds, [("conventional", "ours")])
    return {
        "ratios": medians(each),
        "quartiles": quartiles(each),
        "images_per_second_per_core": rates["ours"],
        "conventional": rates["conventional"],
        "images": images,
        "seconds": spread(seconds),
    }
