"""Image folders: decoded, cropped and flipped by worker processes, normalised on the device."""

import contextlib
import math
import os
import warnings
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from cli import printable
from data.arrays import channel_statistics
from data.batches import ImageBatches
from data.common import DataError, reason
from data.imagenet_layout import entries_of, few, unreadable
from data.resize import has_deep_colours, is_deep, is_image, open_image, read_image, suffix, to_rgb
from data.workers import (
    AHEAD,
    WorkerError,
    end,
    has_room,
    held_back,
    ignore_all,
    lacking,
    processes_of,
    undisturbed,
)

SAMPLE = 32  # images by which a folder is judged and measured
LONG = 16  # the longer side of a test image is at most so many times the shorter one
SYSTEM = ("thumbs.db", "desktop.ini")  # files that Windows puts there
KINDS = 12  # of files that a sentence lists
NONE = "without a suffix"


class FolderBatches(ImageBatches):
    """Batches of the images below `root`, one folder a class, at `image_size` x `image_size`.

    Training takes a RandomResizedCrop and a flip (`augment` crop: no flip; none: what testing
    takes), testing resizes the shorter side to 256/224 of `image_size` and cuts out the centre. An
    image that cannot be decoded raises DataError with its path or, with `skip_bad_images`, is left
    out and listed once in `bad_images`. `notes` has a sentence where there are several kinds of
    files. Of deep images `mean` and `std` are measured instead, on a sample of those of training.
    """

    pause = False  # whether a pass has no batches: it starts the workers

    def __init__(
        self, root, batch_size, image_size, mean, std, device, train=False, seed=0, workers=0,
        skip_bad_images=False, rank=0, size=1, augment="default",
    ):  # fmt: skip
        self.classes, samples, self.notes = list_images(root)
        self.mean, self.std = train and deep_statistics(samples, image_size) or (mean, std)
        super().__init__(
            len(samples), batch_size, self.mean, self.std, device, train, seed, rank, size
        )
        self.root, self.skip_bad_images, self.bad_images = root, skip_bad_images, set()
        images = _Images(samples, image_size, augment if train else "none", seed)
        self.images, self.workers = images, workers
        self.loader, self.processes, self.unshared = None, (), 0

    def start(self, workers):
        """Start that many worker processes, which wait for the first pass. Raises OSError and
        others of the system's, and leaves none behind."""
        # Twice a loader; the number is the user's, and --check compares it with the cores.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        self.loader = DataLoader(
            self.images,
            batch_sampler=_Sampler(self),
            num_workers=workers,
            collate_fn=self.images.collate,
            pin_memory=torch.device(self.device).type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=AHEAD if workers else None,
            worker_init_fn=ignore_all,
            generator=torch.Generator(),  # the workers draw nothing, and leave torch's own alone
        )
        if workers:
            self.pause = True
            try:
                self.processes = processes_of(self._loaded)
            finally:
                self.pause = False

    def close(self, kill=False):
        with undisturbed():
            if kill:
                end(self.processes)
            self.loader = None  # asks the workers to end
            end(self.processes)
        self.processes = ()

    def __iter__(self):
        self.missing, self.position = 0, self.first
        for images, labels, bad in self._loaded():
            self.advance()
            if isinstance(images, np.ndarray):
                self.unshared += len(labels) > 0
                images = torch.from_numpy(images)
            labels = torch.from_numpy(labels)
            for path, why in bad:
                if isinstance(why, Exception):
                    raise why
                if not self.skip_bad_images:
                    raise DataError(
                        f"{path} cannot be decoded: {why}. Replace it, or leave such images "
                        "out with --skip_bad_images."
                    )
                self.bad_images.add(path)
            self.missing += len(bad)
            if len(labels) or self.size > 1:
                images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
                yield self.normalised(images), labels.to(self.device, non_blocking=True)
        if self.size == 1 and self.missing == self.examples:
            raise DataError(f"none of the {self.examples} images under {self.root} can be decoded")

    def _loaded(self):
        """No local of __iter__: a traceback would keep it, and the workers, beyond close()."""
        if self.loader is None:
            self.start(self.workers)
        with held_back():
            return iter(self.loader)


def open_folders(
    root, classes, train_bs, test_bs, image_size, mean, std, augment="default", **options
):
    """The fields of a Data of the folders train/ and val/ of `root`, with `classes` (None: any)."""
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise DataError(
                f"there is no folder {root / split}: an image folder has {root}/train/CLASS/ and "
                f"{root}/val/CLASS/ with the images of each class."
            )
    train = FolderBatches(
        root / "train", train_bs, image_size, mean, std, train=True, augment=augment, **options
    )
    test = FolderBatches(root / "val", test_bs, image_size, train.mean, train.std, **options)
    odd = sorted(set(train.classes) ^ set(test.classes))
    if odd:
        raise DataError(f"{root}/train and {root}/val differ in their class folders: {few(odd)}")
    if classes not in (None, len(train.classes)):
        raise DataError(f"{root}/train holds {len(train.classes)} class folders, not {classes}")
    source = {"train": train.examples, "val": test.examples}
    paths = [path for part in (train, test) for path, _ in part.images.samples]
    shape = (3, image_size, image_size)
    if train.mean is not mean:  # earlier versions saw deep images otherwise
        source["normalised"] = "by its own statistics"
    notes = train.notes + test.notes
    return train, test, shape, len(train.classes), source, (root, paths), train.classes, notes


def list_images(root):
    """([name of each class], [(path, class)], sentences) of the images below `root`, in
    torchvision's order. The sentences say which kinds of files were taken and left out.

    Every folder in `root` is a class, hidden ones too, and what lies below it belongs to it. Links
    are followed: torchvision's ImageFolder would follow those in a circle for hours, so a folder
    that links lead to twice raises DataError. So does a single class, one without images, or a
    folder that cannot be read.
    """
    entries = entries_of(root)
    classes = [name for name, is_folder in entries if is_folder]
    left_out = Counter(f"{suffix(name) or NONE} beside the class folders"
                       for name, folder in entries if not folder and is_users(name))  # fmt: skip
    taken, samples, empty, present = Counter(), [], [], Counter()
    for label, name in enumerate(classes):
        images, seen, others = [], set(), Counter()
        for folder, _, names in os.walk(os.path.join(root, name), onerror=unreadable,
                                        followlinks=True):  # fmt: skip
            place = os.stat(folder)
            if (place.st_dev, place.st_ino) in seen:
                raise DataError(f"{folder} is a link to a folder that class {name} has already: "
                                "remove one of them")  # fmt: skip
            seen.add((place.st_dev, place.st_ino))
            pictures = sorted(filter(is_image, names))
            images.append((folder, pictures))
            taken.update(map(suffix, pictures))
            if len(pictures) < len(names):
                others.update(suffix(n) or NONE for n in names if not is_image(n) and is_users(n))
        paths = [os.path.join(folder, n) for folder, names in sorted(images) for n in names]
        samples += [(path, label) for path in paths]
        left_out += others
        if not paths:
            empty.append(name)
            present += others
    if empty or len(classes) < 2:
        fault = (
            f"{len(empty)} of its {len(classes)} classes have none: {few(empty)}"
            + (f"; the files there are {listed(present)}, and images are .jpg, .png or others of "
               "docs/data.md" if present else "") if empty else
            f"{classes[0]} is its only class, and there is nothing to tell apart" if classes else
            "it has no folders"
        )  # fmt: skip
        raise DataError(f"no images under {root}, one folder a class: {fault}")
    sentence = f"{root} has {len(samples):,} images: {listed(taken)}"
    if left_out:
        n = left_out.total()
        sentence += f"; {n:,} file{'s were' if n > 1 else ' was'} left out: {listed(left_out)}"
    return classes, samples, (sentence,) if left_out or len(taken) > 1 else ()


def is_users(name):
    """Whether a file was put there on purpose: it is neither hidden nor the system's."""
    return not name.startswith(".") and name.lower() not in SYSTEM


def listed(counts):
    """The most frequent kinds of files in a Counter, for a sentence."""
    parts = [f"{printable(name)[:50]} ({n:,})" for name, n in counts.most_common(KINDS)]
    return ", ".join(parts) + (", ..." if len(counts) > KINDS else "")


def deep_statistics(samples, image_size):
    """(mean, deviation) of each channel on a sample of the images whose files are `samples`, or
    None where less than half are of 12 or 16 bits. Of these, sensors fill a part: by ImageNet's
    statistics all would be about as black, and a network without biases cannot tell them apart."""
    sample, images = [path for path, _ in samples[:: -(-len(samples) // SAMPLE)]], []
    for path in sample:
        try:
            with open_image(read_image(path)) as file:
                deep = is_deep(file) or has_deep_colours(file)
            if deep:
                images.append(centre_crop(decode(path), image_size).numpy())
        except Exception as error:  # a damaged file is refused, or left out, in training
            if lacking(error):
                raise
    return channel_statistics(np.stack(images)) if 2 * len(images) > len(sample) else None


class _Sampler:
    """(epoch, index) of each image of a batch: the workers need no state to know what to draw."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        if self.batches.pause:
            return
        epoch, order = self.batches.epoch, self.batches.order()
        for share in self.batches.shares():
            yield [(epoch, int(i)) for i in order[share]]


class _Images(Dataset):
    def __init__(self, samples, image_size, augment, seed):
        self.samples, self.image_size, self.augment, self.seed = samples, image_size, augment, seed

    def __getitem__(self, item):
        """(uint8 (side, side, 3), label, None), or (None, label, (path, reason)) of a bad image."""
        epoch, index = item
        path, label = self.samples[index]
        try:
            image = decode(path)
        except Exception as error:  # a decoder raises anything on a damaged file
            if lacking(error):
                why = WorkerError(f"{printable(path)} cannot be read here ({reason(error)}): try "
                                  "fewer --workers")  # fmt: skip
                return None, label, (printable(path), why)
            return None, label, (printable(path), reason(error))
        if self.augment == "none":
            return centre_crop(image, self.image_size), label, None
        rng, flip = np.random.default_rng((self.seed, epoch, index)), self.augment != "crop"
        return random_crop_and_flip(image, self.image_size, rng, flip), label, None

    def collate(self, items):
        """(uint8 (n, side, side, 3), int64 array of labels (n,), [(path, reason) of each bad
        image]). The images are an array where shared memory has no room for a tensor: then, as the
        labels, they go through a pipe."""
        images = [image for image, _, bad in items if bad is None]
        labels = np.array([label for _, label, bad in items if bad is None], np.int64)
        bad = [bad for _, _, bad in items if bad is not None]
        if not images:
            return np.empty((0, self.image_size, self.image_size, 3), np.uint8), labels, bad
        worker = get_worker_info()
        # A worker of torch before 2.7 dies where another one takes the last room meanwhile.
        at_once = 2 * worker.num_workers * len(images) * images[0].nbytes if worker else 0
        try:
            if not has_room(at_once):
                raise RuntimeError
            return default_collate(images), labels, bad  # stacked in shared memory, by a worker
        except RuntimeError:
            return np.stack([image.numpy() for image in images]), labels, bad


def decode(path):
    """uint8 (height, width, 3), to the bit what `to_rgb` makes of PIL's image; raises as it does.

    PIL reads every header, so what it refuses is refused. torchvision decodes JPEGs, with the same
    library in three quarters of PIL's time. PIL decodes the rest, and every file in which
    torchvision finds a fault, or for which it has no such function (0.29 announces that). An EXIF
    orientation is not applied.
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
        return torch.from_numpy(np.array(to_rgb(file)))


def random_crop_and_flip(image, side, rng, flip=True):
    """torchvision's RandomResizedCrop of an image, uint8 (height, width, 3), drawn from a numpy
    generator, and with `flip` a flip of one in two: (side, side, 3).

    The window covers 8 to 100 % of the area, with an aspect ratio from 3/4 to 4/3 (uniform in its
    logarithm); after ten windows that do not fit, it is the largest central one of such a ratio.
    """
    top, left, h, w = random_window(*image.shape[:2], rng)
    image = resize(image[top : top + h, left : left + w], side, side)
    return image.flip(1) if flip and rng.random() < 0.5 else image


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
    """The central (side, side, 3) of an image, uint8 (height, width, 3), whose shorter side is
    resized to 256/224 of that. A side more than LONG times the other loses its ends first: a thin
    file would be huge in memory."""
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
    up to rounding (one level of 255; of the sample, two levels for one value in 10 million)."""
    pixels = image[None].contiguous().permute(0, 3, 1, 2)  # channels last: the kernel's fast layout
    pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return pixels[0].permute(1, 2, 0)
