"""Image folders: decoded, cropped and flipped by worker processes, normalised on the device."""

import math
import signal
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as T

from data.common import DataError


class FolderBatches:
    """Batches of the images below `root`, one folder a class, at `image_size` x `image_size`.

    Training takes a RandomResizedCrop and a flip, testing resizes the shorter side to 256/224 of
    `image_size` and cuts out the centre. Order and augmentation are functions of (seed, epoch,
    index). An image that cannot be decoded stops the run with its path, or, with
    `skip_bad_images`, is left out and listed once in `bad_images`; `missing` is their number in
    the last pass. Of several ranks each yields every batch, also one of which it has no image.
    """

    def __init__(
        self, root, batch_size, image_size, mean, std, device, train=False, seed=0, workers=0,
        skip_bad_images=False, rank=0, size=1,
    ):  # fmt: skip
        try:
            folder = ImageFolder(root)
        except (OSError, RuntimeError) as error:
            raise DataError(f"no images under {root}, one folder a class: {error}") from error
        self.root, self.classes, self.examples = root, folder.classes, len(folder.samples)
        self.batch_size, self.device, self.size = batch_size, device, size
        self.sampler = _EpochSampler(self.examples, batch_size, train, seed, rank, size)
        self.skip_bad_images, self.bad_images, self.missing = skip_bad_images, set(), 0
        mean, std = torch.tensor([mean, std], dtype=torch.float64).view(2, -1, 1, 1)
        self.shift = (mean * 255).to(device=device, dtype=torch.float32)
        self.scale = (1 / (std * 255)).to(device=device, dtype=torch.float32)
        self.loader = DataLoader(
            _Images(folder.samples, image_size, train, seed),
            batch_sampler=self.sampler,
            num_workers=workers,
            collate_fn=partial(_collate, side=image_size),
            pin_memory=torch.device(device).type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_interrupts,
        )

    def __len__(self):
        return -(-self.examples // self.batch_size)

    def set_epoch(self, epoch):
        self.sampler.epoch = epoch

    def __iter__(self):
        self.missing = 0
        for images, labels, bad in self.loader:
            for path, reason in bad:
                if not self.skip_bad_images:
                    raise DataError(
                        f"{path} cannot be decoded: {reason}. Replace it, or leave such images "
                        "out with --skip_bad_images."
                    )
                self.bad_images.add(path)
            self.missing += len(bad)
            if len(labels) or self.size > 1:
                images = images.to(self.device, non_blocking=True)
                labels = labels.to(self.device, non_blocking=True)
                yield images.float().sub_(self.shift).mul_(self.scale), labels
        if self.size == 1 and self.missing == self.examples:
            raise DataError(f"none of the {self.examples} images under {self.root} can be decoded")


def folder_batches(
    root, train_bs, test_bs, image_size, classes, mean, std, seed, workers, skip_bad_images,
    **shard,
):  # fmt: skip
    """(train, test, shape, number of classes, source) of the folders train/ and val/ of `root`."""
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise DataError(
                f"there is no folder {root / split}: an image folder has {root}/train/CLASS/ and "
                f"{root}/val/CLASS/ with the images of each class."
            )
    options = {"seed": seed, "workers": workers, "skip_bad_images": skip_bad_images, **shard}
    train = FolderBatches(
        root / "train", train_bs, image_size, mean, std, train=True, **options
    )
    test = FolderBatches(root / "val", test_bs, image_size, mean, std, **options)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"{root}/train and {root}/val differ in their class folders: {', '.join(odd[:5])}"
            f"{', ...' if len(odd) > 5 else ''}"
        )
    if classes is not None and len(train.classes) != classes:
        raise DataError(f"{root}/train holds {len(train.classes)} class folders, not {classes}")
    source = {"train": train.examples, "val": test.examples}
    return train, test, (3, image_size, image_size), len(train.classes), source


class _EpochSampler:
    """Batches of (epoch, index): the workers need no state to know what to draw."""

    def __init__(self, examples, batch_size, shuffle, seed, rank, size):
        self.examples, self.batch_size, self.shuffle = examples, batch_size, shuffle
        self.seed, self.rank, self.size, self.epoch = seed, rank, size, 0

    def __len__(self):
        return -(-self.examples // self.batch_size)

    def __iter__(self):
        epoch, order = self.epoch, np.arange(self.examples)
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.examples)
        for start in range(0, self.examples, self.batch_size):
            index = order[start : start + self.batch_size][self.rank :: self.size]
            yield [(epoch, int(i)) for i in index]


class _Images(Dataset):
    def __init__(self, samples, image_size, train, seed):
        self.samples, self.image_size, self.train, self.seed = samples, image_size, train, seed

    def __getitem__(self, item):
        """(uint8 (3, side, side), label, None), or (None, label, (path, reason)) of a bad image."""
        epoch, index = item
        path, label = self.samples[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except Exception as error:  # a damaged file raises whatever its decoder comes upon
            return None, label, (path, str(error).replace(repr(path), "this file"))
        if self.train:
            image = random_crop_and_flip(
                image, self.image_size, np.random.default_rng((self.seed, epoch, index))
            )
        else:
            image = centre_crop(image, self.image_size)
        return T.pil_to_tensor(image), label, None


def random_crop_and_flip(image, side, rng):
    """torchvision's RandomResizedCrop and a flip of a PIL image, drawn from a numpy generator.

    The window covers 8 to 100 % of the area, with an aspect ratio from 3/4 to 4/3 (uniform in its
    logarithm); after ten windows that do not fit, the largest central one within those ratios.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            break
    else:
        ratio = min(max(width / height, 3 / 4), 4 / 3)
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        top, left = (height - h) // 2, (width - w) // 2
    image = T.resized_crop(image, top, left, h, w, [side, side])
    return T.hflip(image) if rng.random() < 0.5 else image


def centre_crop(image, side):
    """The central window of `side`, once the shorter side measures 256/224 of it."""
    return T.center_crop(T.resize(image, round(side * 256 / 224)), [side, side])


def _ignore_interrupts(worker):
    """Ctrl-C reaches every process of a terminal; the main one ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(items, side):
    """(uint8 (batch, 3, side, side), labels (batch,), [(path, reason) of each bad image])."""
    good = [(image, label) for image, label, bad in items if bad is None]
    images = torch.empty((len(good), 3, side, side), dtype=torch.uint8)
    for image, (pixels, _) in zip(images, good):
        image.copy_(pixels)
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return images, labels, [bad for _, _, bad in items if bad is not None]

