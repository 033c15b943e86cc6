"""Small data sets: uint8 arrays held on the device, shuffled, cropped and flipped by the batch."""

import math
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cli import command
from data.batches import ImageBatches
from data.common import DataError, reason

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
# The arrays of a file may be MODEST bytes longer than RATIO times the file. Photographs shrink by
# a third, drawings to a fifteenth; deflate can shrink to a thousandth, and such a file is a trap.
MODEST, RATIO = 2**28, 100
# By the version of an .npy. These evaluate literals alone, of 10,000 characters at most.
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ArrayBatches(ImageBatches):
    """Batches of images (N, H, W, C) uint8 and labels (N,) int64, both numpy arrays.

    The last batch may be smaller; no image is left out. Cropping pads an image with zeros (black)
    by `pad` on every side and cuts out a window of the original size; then the image is mirrored
    or not; then channels are normalised.
    """

    def __init__(
        self, images, labels, mean, std, batch_size, device, shuffle=False, pad=0, flip=False,
        seed=0, rank=0, size=1,
    ):  # fmt: skip
        super().__init__(len(images), batch_size, mean, std, device, shuffle, seed, rank, size)
        self.images = F.pad(torch.from_numpy(images).permute(0, 3, 1, 2), [pad] * 4).to(device)
        self.images = self.images.contiguous()
        self.labels, self.pad, self.flip, self.held = labels, pad, flip, None
        # Offsets in memory of a crop's pixels from its first one, as they are and mirrored,
        # (2, C, H, W); and a view of every possible crop, indexed by its first pixel's offset.
        height, width = images.shape[1:3]
        pixels = torch.arange(self.images[0].numel()).view(self.images.shape[1:])
        pixels = pixels[:, :height, :width]
        self.pixels = torch.stack([pixels, pixels.flip(2)]).to(device)
        self.crops = self.images.as_strided(
            (self.images.numel() - int(pixels.max()), *pixels.shape), (1, *pixels.stride())
        )
        # A CPU copies whole rows, some six times as fast as pixel by pixel.
        self._images = self._rows if device.type == "cpu" else self._pixels
        self.count = torch.arange(min(batch_size, len(images)), device=device)

    def __iter__(self):
        draws, self.position = self._draws(), self.first
        for share in self.shares():
            self.advance()
            yield self._batch(*draws[:, share])

    def hold(self):
        """Make `at` give the batches of this epoch, from the same memory in every epoch."""
        draws, self.position = self._draws(), self.first
        self.held = draws if self.held is None else self.held.copy_(draws)

    def at(self, position, size):
        """The batch of `size` images from image `position` on, a 0-dim int64 tensor on the device:
        the same batch as iteration gives, by kernels of fixed shape for CUDA graphs. One rank."""
        return self._batch(*self.held.index_select(1, position + self.count[:size]))

    def _batch(self, places, mirror, labels):
        return self.normalised(self._images(places, mirror)), labels

    def _rows(self, places, mirror):
        images = self.crops.index_select(0, places)
        if self.flip:
            # A choice without a branch; uint8 wraps around, so the sum is exact.
            choice = mirror.to(torch.uint8)[:, None, None, None]
            images = (images.flip(3) - images).mul_(choice).add_(images)
        return images

    def _pixels(self, places, mirror):
        return self.images.view(-1)[self.pixels[mirror] + places[:, None, None, None]]

    def _draws(self):
        """The images of this epoch in its order, (3, N) int64 on the device: the offset of the
        crop's first pixel, whether it is mirrored, the label."""
        rng, N = np.random.default_rng((self.seed, self.epoch)), self.examples
        order, none = self.order(rng), np.zeros(N, np.int64)
        top, left = rng.integers(0, 2 * self.pad + 1, (2, N)) if self.pad else (none, none)
        mirror = rng.integers(0, 2, N) if self.flip else none
        image, _, row, _ = self.images.stride()
        places = order * image + top[order] * row + left[order]
        draws = torch.from_numpy(np.stack([places, mirror[order], self.labels[order]]))
        if self.device.type == "cuda":  # copied without a wait; torch keeps the source until then
            return draws.pin_memory().to(self.device, non_blocking=True)
        return draws.to(self.device)


def channel_statistics(images):
    """Mean and deviation of each channel of images (N, H, W, C) uint8, in units of 0..1."""
    channels = [images[..., c].ravel() for c in range(images.shape[3])]
    counts = np.array([np.bincount(x, minlength=256) for x in channels])
    p, x = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = p @ x
    std = np.sqrt((p * (x - mean[:, None]) ** 2).sum(1))
    return mean, np.maximum(std, 1 / 255)  # a channel may be blank


def load_arrays(path, shape=None, classes=None, remedy=None):
    """({key: array} by KEYS, {"file", "crc32"} which identifies them) of a prepared data set:
    images uint8 (N, H, W, C), labels int64 (N,).

    The file may have other forms that say the same: images (N, H, W) or channels first, labels of
    any type of number or (N, 1). Checks the shape of an image and the number of classes; None takes
    any shape, and as many classes as there are in train_labels. Memory is taken for no more than
    the file is worth (RATIO), and no object is read: those would be pickles. Raises DataError with
    `remedy`, what to do about a file that is damaged.
    """
    path = Path(path)
    try:
        arrays, crc32 = _read(path)
        for split in ("train", "test"):
            images = _images_of(arrays, f"{split}_images", shape)
            labels = _labels_of(arrays, f"{split}_labels", len(images))
            shape = images.shape[1:]
            least, most = labels.min(), labels.max()
            if split == "test":  # a small part need not have every class
                if least < 0 or most >= classes:
                    raise ValueError(f"test_labels run from {least} to {most}, and those of "
                                     f"training from 0 to {classes - 1}")  # fmt: skip
                continue
            if least == most:
                raise ValueError("train_labels are all the same: there is nothing to tell apart")
            classes = classes or len(np.unique(labels))
            if least != 0 or most != classes - 1:
                raise ValueError(f"train_labels run from {least} to {most}, and {classes} classes "
                                 f"have the numbers from 0 to {classes - 1}")  # fmt: skip
    except Exception as error:  # a damaged file raises whatever its reader comes upon
        anew = command("data.prepare", path.stem, "--data_dir", path.parent)
        raise DataError(
            f"{path} is damaged or another data set ({reason(error)}). "
            + (remedy or f"`{anew}` makes it anew.")
        ) from error
    return arrays, {"file": path.name, "crc32": crc32}


def _images_of(arrays, key, shape):
    """Make the images `key` of `arrays` uint8 (N, H, W, C), `shape` (H, W, C) or None for any.
    Returns them."""
    images = arrays[key]
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4 and images.shape[1] <= 4 < images.shape[3]:
        images = images.transpose(0, 2, 3, 1)
    given = images.dtype, images.ndim, images.shape[1:]
    if given != (np.uint8, 4, shape or images.shape[1:]):
        sides = ", ".join(map(str, shape or "HWC"))
        raise ValueError(f"{key} is {_form(arrays[key])}, not uint8 (N, {sides}) from 0 to 255")
    if not images.size:
        raise ValueError(f"{key} is {_form(arrays[key])}, in which there is no pixel")
    arrays[key] = images
    return images


def _labels_of(arrays, key, count):
    """Make the labels `key` of `arrays` int64 (count,), where that loses nothing. Returns them."""
    labels = arrays[key]
    if labels.dtype.kind not in "biuf" or labels.shape not in ((count,), (count, 1)):
        raise ValueError(f"{key} is {_form(labels)}, not a number for each of {count:,} images")
    labels = labels.reshape(count)
    with np.errstate(invalid="ignore"):  # NaN and infinity are no whole numbers, as is found below
        arrays[key] = labels.astype(np.int64, copy=False)
    if not np.array_equal(arrays[key], labels):
        raise ValueError(f"{key} is {_form(labels)} with values that are not whole numbers")
    return arrays[key]


def _form(array):
    """The type and the shape of an array, in words."""
    return f"{array.dtype} ({', '.join(map(str, array.shape))})"


def _read(path):
    """({key: array}, {key: CRC}) of an .npz. ValueError where its entries claim too much."""
    size, arrays, crc32 = path.stat().st_size, {}, {}
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("it is no file")
    with zipfile.ZipFile(path) as archive:
        entries = {key: archive.getinfo(f"{key}.npy") for key in KEYS}
        # A label of a byte takes eight in the end.
        total = sum(x.file_size * (8 if "labels" in key else 1) for key, x in entries.items())
        if total > MODEST + RATIO * size:
            raise ValueError(f"{size:,} bytes are said to hold {total:,}")
        for key, entry in entries.items():
            # zipfile bounds what it unpacks at a time of these alone.
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{key} is compressed in a way that numpy does not write")
            with archive.open(entry) as file:  # numpy takes memory for what the header claims
                dims, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
                rest = entry.file_size - file.tell()
            if dtype.hasobject:
                raise ValueError(f"{key} holds Python objects, and no numbers")
            if math.prod(dims) * dtype.itemsize != rest:
                raise ValueError(f"{key} has {rest:,} bytes, not those of its shape {dims}")
            with archive.open(entry) as file:  # compares the CRC as it reads the last byte
                arrays[key] = np.lib.format.read_array(file, allow_pickle=False)
            crc32[key] = f"{entry.CRC:08x}"
    return arrays, crc32
