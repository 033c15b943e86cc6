"""Image folders: decoded, cropped and flipped by worker processes, normalised on the device."""

import contextlib
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cli import printable
from data.common import DataError
from data.imagenet_layout import entries_of, few, is_image
from data.resize import open_image, read_image, reason
from training.control import held_back, ignore_all

LONG = 16  # how often the longer side of a test image may hold the shorter one


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
        self.classes, samples = list_images(root)
        self.root, self.examples = root, len(samples)
        self.batch_size, self.device, self.size = batch_size, device, size
        self.sampler = _EpochSampler(self.examples, batch_size, train, seed, rank, size)
        self.skip_bad_images, self.bad_images, self.missing = skip_bad_images, set(), 0
        self.position = 0
        mean, std = torch.tensor([mean, std], dtype=torch.float64).view(2, -1, 1, 1)
        self.shift = (mean * 255).to(device=device, dtype=torch.float32)
        self.scale = (1 / (std * 255)).to(device=device, dtype=torch.float32)
        self.loader = DataLoader(
            _Images(samples, image_size, train, seed),
            batch_sampler=self.sampler,
            num_workers=workers,
            collate_fn=tuple,  # of what __getitems__ gives: a batch already
            pin_memory=torch.device(device).type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=ignore_all,
            generator=torch.Generator(),  # the workers draw nothing, and leave torch's own alone
        )

    def __len__(self):
        return -(-self.examples // self.batch_size)

    def set_epoch(self, epoch, start=0):
        """The next pass is that of `epoch`, from batch `start` on; `position` counts those that
        have been begun, the ones before `start` included."""
        self.sampler.epoch, self.sampler.start = epoch, start

    def order(self):
        """The indices of the images in the order of this epoch, an int64 array."""
        return self.sampler.order()

    def close(self):
        """End the worker processes; nothing can be read any longer."""
        self.loader = None

    def __iter__(self):
        self.missing, self.position = 0, self.sampler.start
        with held_back():
            batches = iter(self.loader)
        for images, labels, bad in batches:
            self.position += 1
            for path, why in bad:
                if not self.skip_bad_images:
                    raise DataError(
                        f"{path} cannot be decoded: {why}. Replace it, or leave such images "
                        "out with --skip_bad_images."
                    )
                self.bad_images.add(path)
            self.missing += len(bad)
            if len(labels) or self.size > 1:
                images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
                images = images.to(torch.float32, memory_format=torch.contiguous_format)
                labels = labels.to(self.device, non_blocking=True)
                yield images.sub_(self.shift).mul_(self.scale), labels
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


def list_images(root):
    """([name of each class], [(path, class)]) of the images below `root`, in torchvision's order.

    Every folder in `root` is a class, hidden ones too, and what lies below it belongs to it. Links
    are followed. Raises DataError where there is none, one class alone, a class without images, a
    folder that cannot be read, or one that links lead to twice, as those in a circle do.
    """
    classes = [name for name, is_folder in entries_of(root) if is_folder]
    samples, empty = [], []
    for label, name in enumerate(classes):
        found, seen, folders = [], set(), [os.path.join(root, name)]
        while folders:
            folder = folders.pop()
            inside, place = entries_of(folder), os.stat(folder)
            if (place.st_dev, place.st_ino) in seen:
                raise DataError(f"{folder} is a link to a folder that class {name} has already: "
                                "remove one of them")  # fmt: skip
            seen.add((place.st_dev, place.st_ino))
            folders += [os.path.join(folder, n) for n, is_folder in inside if is_folder]
            found.append((folder, [n for n, is_folder in inside if not is_folder and is_image(n)]))
        paths = [os.path.join(folder, n) for folder, names in sorted(found) for n in names]
        samples += [(path, label) for path in paths]
        if not paths:
            empty.append(name)
    if empty or len(classes) < 2:
        said = (
            f"{len(empty)} of its {len(classes)} classes have none: {few(empty)}" if empty else
            f"{classes[0]} is its only class, and there is nothing to tell apart" if classes else
            "it has no folders"
        )  # fmt: skip
        raise DataError(f"no images under {root}, one folder a class: {said}")
    return classes, samples


class _EpochSampler:
    """Batches of (epoch, index): the workers need no state to know what to draw."""

    def __init__(self, examples, batch_size, shuffle, seed, rank, size):
        self.examples, self.batch_size, self.shuffle = examples, batch_size, shuffle
        self.seed, self.rank, self.size = seed, rank, size
        self.epoch = self.start = 0

    def __len__(self):
        return -(-self.examples // self.batch_size) - self.start

    def order(self):
        if self.shuffle:
            return np.random.default_rng((self.seed, self.epoch)).permutation(self.examples)
        return np.arange(self.examples)

    def __iter__(self):
        epoch, order = self.epoch, self.order()
        for i in range(self.start * self.batch_size, self.examples, self.batch_size):
            index = order[i : i + self.batch_size][self.rank :: self.size]
            yield [(epoch, int(i)) for i in index]


class _Images(Dataset):
    def __init__(self, samples, image_size, train, seed):
        self.samples, self.image_size, self.train, self.seed = samples, image_size, train, seed

    def __getitem__(self, item):
        """(uint8 (side, side, 3), label, None), or (None, label, (path, reason)) of a bad image."""
        epoch, index = item
        path, label = self.samples[index]
        try:
            image = decode(path)
        except Exception as error:  # a damaged file raises whatever its decoder comes upon
            return None, label, (printable(path), reason(error))
        if self.train:
            rng = np.random.default_rng((self.seed, epoch, index))
            image = random_crop_and_flip(image, self.image_size, rng)
        else:
            image = centre_crop(image, self.image_size)
        return image, label, None

    def __getitems__(self, items):
        """A batch: (uint8 (n, side, side, 3), labels (n,), [(path, reason) of each bad image])."""
        images = _empty_batch(len(items), self.image_size, self.image_size, 3)
        labels, bads = [], []
        for item in items:
            image, label, bad = self[item]
            if bad is None:
                images[len(labels)] = image
                labels.append(label)
            else:
                bads.append(bad)
        return images[: len(labels)], torch.tensor(labels, dtype=torch.int64), bads


def decode(path):
    """uint8 (height, width, 3), to the bit what PIL's convert("RGB") gives; raises as PIL does.

    PIL reads every header, so what it refuses is refused. The pixels of a JPEG come from
    torchvision, which takes three quarters of PIL's time for it with the same library; PIL decodes
    the rest, and has the last word where torchvision finds a fault, as in a file that was cut, or
    has no such function (0.29 announces that). An EXIF orientation is not applied.
    """
    content = read_image(path)
    with open_image(content) as file:
        if 0 in file.size:
            raise ValueError("it has no pixels")
        if file.format == "JPEG" and file.mode in ("RGB", "L"):
            content = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            with contextlib.suppress(Exception):
                image = torchvision.io.decode_jpeg(content, torchvision.io.ImageReadMode.RGB)
                return image.permute(1, 2, 0)
        return torch.from_numpy(np.array(file.convert("RGB")))


def random_crop_and_flip(image, side, rng):
    """torchvision's RandomResizedCrop and a flip of an image, uint8 (height, width, 3), drawn from
    a numpy generator: (side, side, 3).

    The window covers 8 to 100 % of the area, with an aspect ratio from 3/4 to 4/3 (uniform in its
    logarithm); after ten windows that do not fit, the largest central one within those ratios.
    """
    top, left, h, w = random_window(*image.shape[:2], rng)
    image = resize(image[top : top + h, left : left + w], side, side)
    return image.flip(1) if rng.random() < 0.5 else image


def random_window(height, width, rng):
    """(top, left, height, width) of random_crop_and_flip's window."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return int(top), int(left), h, w
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def centre_crop(image, side):
    """The central (side, side, 3) of an image, uint8 (height, width, 3), once its shorter side
    measures 256/224 of that. Of a side that is more than LONG times the other, as long in memory
    as it is thin on disk, the ends are cut off first."""
    most = LONG * min(image.shape[:2])
    for dim in range(2):
        if image.shape[dim] > most:
            image = image.narrow(dim, (image.shape[dim] - most) // 2, most)
    short, least = round(side * 256 / 224), min(image.shape[:2])
    height, width = (int(short * n / least) for n in image.shape[:2])
    top, left = round((height - side) / 2), round((width - side) / 2)
    return resize(image, height, width)[top : top + side, left : left + side]


def resize(image, height, width):
    """An image, uint8 (h, w, 3), as (height, width, 3): PIL's bilinear filter with antialiasing,
    to within rounding (one level of 255; of the sample's, one value in 10 million is two off)."""
    pixels = image[None].contiguous().permute(0, 3, 1, 2)  # channels last: what the kernel is for
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return pixels[0].permute(1, 2, 0)


def _empty_batch(*shape):
    """uint8; in a worker in shared memory, as torch's own collate does, to be handed over as is."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)
