"""Small data sets: uint8 arrays held on the device, shuffled, cropped and flipped by the batch."""

import math
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.batches import Batches
from data.common import DataError, reason

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
# The arrays of a file may be MODEST bytes longer than RATIO times the file. Photographs shrink by
# a third, drawings to a fifteenth; deflate can shrink to a thousandth, and such a file is a trap.
MODEST, RATIO = 2**28, 100
# By the version of an .npy. These evaluate literals alone, of 10,000 characters at most.
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ArrayBatches(Batches):
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
    """({key: array} by KEYS, {"file", "crc32"} which identifies them) of a prepared data set.

    Checks the shape of an image and the number of classes; None takes any. Memory is taken for no
    more than the file is worth (RATIO), and no object is read: those would be pickles. Raises
    DataError with `remedy`, what to do about a file that is damaged.
    """
    path = Path(path)
    try:
        arrays, crc32 = _read(path)
        for split in ("train", "test"):
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            if shape is None and images.ndim == 4 and images.size:
                shape = images.shape[1:]
            if images.dtype != np.uint8 or images.shape[1:] != shape:
                sides = ", ".join(map(str, shape or "HWC"))
                raise ValueError(f"{split}_images is not uint8 (N, {sides})")
            if labels.dtype != np.int64 or labels.shape != images.shape[:1] or not len(labels):
                raise ValueError(f"{split}_labels is not int64 (N,) with an entry an image")
            classes = classes or len(np.unique(labels))
            if classes < 2:
                raise ValueError(f"{split}_labels are all the same: there is nothing to tell apart")
            if labels.min() != 0 or labels.max() != classes - 1:
                raise ValueError(f"{split}_labels do not run from 0 to {classes - 1}")
    except Exception as error:  # a damaged file raises whatever its reader comes upon
        anew = f"`python -m data.prepare {path.stem} --data_dir {path.parent}` makes it anew."
        raise DataError(
            f"{path} is damaged or another data set ({reason(error)}). {remedy or anew}"
        ) from error
    return arrays, {"file": path.name, "crc32": crc32}


def _read(path):
    """({key: array}, {key: CRC}) of an .npz. ValueError where its entries claim too much."""
    size, arrays, crc32 = path.stat().st_size, {}, {}
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("it is no file")
    with zipfile.ZipFile(path) as archive:
        entries = {key: archive.getinfo(f"{key}.npy") for key in KEYS}
        total = sum(entry.file_size for entry in entries.values())
        if total > MODEST + RATIO * size:
            raise ValueError(f"{size:,} bytes are said to hold {total:,}")
        for key, entry in entries.items():
            # zipfile bounds what it unpacks at a time of these alone.
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{key} is compressed in a way that numpy does not write")
            with archive.open(entry) as file:  # numpy takes memory for what the header claims
                dims, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
                rest = entry.file_size - file.tell()
            if math.prod(dims) * dtype.itemsize != rest:
                raise ValueError(f"{key} has {rest:,} bytes, not those of its shape {dims}")
            with archive.open(entry) as file:  # compares the CRC as it reads the last byte
                arrays[key] = np.lib.format.read_array(file, allow_pickle=False)
            crc32[key] = f"{entry.CRC:08x}"
    return arrays, crc32
