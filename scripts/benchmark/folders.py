"""The seconds of one core that reads a folder of images for training: case `data`."""

import torch

from data import IMAGENET_MEAN, IMAGENET_STD
from data.folders import FolderBatches
from data.imagenet import find
from scripts.benchmark.measure import by_clock, compared, take_turns


def conventional(args):
    """A DataLoader of torchvision's ImageFolder and transforms, without workers."""
    from torchvision import datasets, transforms

    chain = [
        transforms.RandomResizedCrop(args.image_size), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]  # fmt: skip
    folder = datasets.ImageFolder(args.folder / "train", transforms.Compose(chain))
    return torch.utils.data.DataLoader(folder, args.batch_size, shuffle=True)


def case(args, device):
    """Images a second of one thread, by the process's own clock: the loader of main.py without
    workers, and the conventional one."""
    args.folder = (args.folder or find(args.data_dir)).expanduser()
    torch.set_num_threads(1)
    batches = FolderBatches(args.folder / "train", args.batch_size, args.image_size, IMAGENET_MEAN,
                            IMAGENET_STD, "cpu", train=True)  # fmt: skip
    epochs, loader = iter(range(1, 1000)), conventional(args)

    def ours():
        batches.set_epoch(next(epochs))
        return sum(len(labels) for _, labels in batches)

    works = {"ours": ours, "conventional": lambda: sum(len(labels) for _, labels in loader)}
    seconds = take_turns(works, args.repeats, by_clock(device, "process"), say="data")
    told = compared(seconds, [("conventional", "ours")])
    ours, theirs = (batches.examples / told["seconds"][name][0] for name in works)
    return {"ratios": told["ratios"], "quartiles": told["quartiles"],
            "images_per_second_per_core": ours, "conventional": theirs,
            "images": batches.examples, "seconds": told["seconds"]}  # fmt: skip
