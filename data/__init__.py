"""The data sets, by name, as batches of (inputs, labels) on the device."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.arrays import ArrayBatches, load_arrays
from data.common import DataError, default_data_dir

__all__ = ["DATASETS", "Data", "DataError", "default_data_dir", "is_folder", "load"]


class Spec(NamedTuple):
    """What is fixed about a data set; mean and deviation of a channel in units of 0..1."""

    shape: tuple  # of an image as stored, (H, W, C)
    classes: int
    mean: tuple = None  # None: measured on the training images
    std: tuple = None
    pad: int = 0  # zero padding before a random crop of the original size, in training
    flip: bool = False  # random horizontal flip, in training


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DATASETS = {
    "digits": Spec((8, 8, 1), 10),
    "mnist": Spec((28, 28, 1), 10, (0.1307,), (0.3081,)),
    "cifar10": Spec(
        (32, 32, 3), 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), pad=4, flip=True
    ),
    "cifar100": Spec(
        (32, 32, 3), 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), pad=4, flip=True
    ),
    "imagenet": Spec((None, None, 3), 1000, IMAGENET_MEAN, IMAGENET_STD, flip=True),
}


class Data(NamedTuple):
    """`train` and `test` have a length (their batches), `set_epoch(n)`, and iterate over (inputs
    float32 (batch, *shape), labels int64 (batch,)) on the device; `examples` counts the images."""

    train: object
    test: object
    shape: tuple  # (channels, height, width)
    classes: int
    source: dict  # what identifies the images that were used
    files: tuple = ()  # (the file), or (the folder, the paths of the images below it)


def load(
    name, data_dir, train_bs, test_bs, device, seed=0, workers=0, image_size=None,
    skip_bad_images=False, rank=0, size=1, train_examples=None, test_examples=None,
):  # fmt: skip
    """The data set `name`: one of DATASETS, "folder:PATH", or "npz:FILE", a prepared file of any
    classes and side in `data_dir`, augmented like CIFAR's if it has colours.

    Of the sets that are arrays, `train_examples` and `test_examples` take the first so many.

    Batch sizes are global: of each batch this rank gets every `size`-th example from `rank` on.
    Raises DataError, with what to do about it, where the images cannot be had.
    """
    shard = {"device": device, "rank": rank, "size": size}
    if is_folder(name):
        from data.folders import folder_batches  # torchvision takes a second to import
        from data.imagenet import find

        path = find(data_dir) if name == "imagenet" else Path(name[len("folder:") :])
        classes = DATASETS[name].classes if name in DATASETS else None
        path = path.expanduser()
        train, test, *facts = folder_batches(
            path, train_bs, test_bs, image_size or 224, classes, IMAGENET_MEAN, IMAGENET_STD,
            seed=seed, workers=workers, skip_bad_images=skip_bad_images, **shard,
        )  # fmt: skip
        images = [file for part in (train, test) for file, _ in part.loader.dataset.samples]
        return Data(train, test, *facts, (path, images))

    spec, remedy = DATASETS.get(name, Spec(None, None)), None
    if name == "digits":
        path = Path(__file__).with_name("digits.npz")
        remedy = "It is part of this repository: `git checkout data/digits.npz`."
    elif name.startswith("npz:"):
        path = Path(data_dir).expanduser() / Path(name[len("npz:") :]).expanduser()
        remedy = "What such a file holds: `python -m data.prepare --help`."
        if not path.exists():
            raise DataError(f"there is no {path}")
    else:
        from data.prepare import prepare

        path = prepare(name, data_dir)
    arrays, source = load_arrays(path, spec.shape, spec.classes, remedy)
    images = arrays["train_images"]
    if spec.shape is None:
        side, colours = images.shape[1], images.shape[3] == 3
        spec = Spec(
            images.shape[1:], int(arrays["train_labels"].max()) + 1,
            pad=side // 8 if colours else 0, flip=colours,
        )  # fmt: skip
    mean, std = spec.mean, spec.std
    if mean is None:
        mean, std = channel_statistics(images)
    for split, wanted in (("train", train_examples), ("test", test_examples)):
        there = len(arrays[f"{split}_labels"])
        if wanted is not None and wanted > there:
            raise DataError(f"{name} has {there} images for --{split}_examples, not {wanted}")
        for part in ("images", "labels"):
            arrays[f"{split}_{part}"] = arrays[f"{split}_{part}"][:wanted]
    train = ArrayBatches(
        arrays["train_images"], arrays["train_labels"], mean, std, train_bs, shuffle=True,
        pad=spec.pad, flip=spec.flip, seed=seed, **shard,
    )  # fmt: skip
    test = ArrayBatches(
        arrays["test_images"], arrays["test_labels"], mean, std, test_bs, **shard
    )
    height, side, channels = images.shape[1:]
    return Data(train, test, (channels, height, side), spec.classes, source, (path,))


def is_folder(name):
    """Whether the data set `name` is a folder of images, and not arrays."""
    return name == "imagenet" or name.startswith("folder:")


def channel_statistics(images):
    """Mean and deviation of each channel of images (N, H, W, C) uint8, in units of 0..1."""
    channels = [images[..., c].ravel() for c in range(images.shape[3])]
    counts = np.array([np.bincount(x, minlength=256) for x in channels])
    p, x = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = p @ x
    std = np.sqrt((p * (x - mean[:, None]) ** 2).sum(1))
    return mean, np.maximum(std, 1 / 255)  # a channel may be blank
