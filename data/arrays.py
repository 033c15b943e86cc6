"""Small data sets: uint8 arrays held on the device, shuffled, cropped and flipped by the batch."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.common import DataError

GATHER = 1024  # images that are gathered at a time, in batches of which there are enough
KEYS = ("train_images", "train_labels", "test_images", "test_labels")


class ArrayBatches:
    """Batches of images (N, H, W, C) uint8 and labels (N,) int64, both numpy arrays.

    The order of an epoch is a function of (seed, epoch), the crop and the flip of an image one of
    (seed, epoch, index): no generator lives from batch to batch, so a resumed run and any number
    of ranks see the same images. The last batch may be smaller; no image is left out (`missing` is
    0), and of several ranks each yields every batch, also one of which it has no image.

    Cropping pads the image with zeros (black) by `pad` on every side and cuts out a window of the
    original size; then the image is mirrored or not; then channels are normalised by mean and
    deviation (in units of 0..1).
    """

    missing = 0

    def __init__(
        self, images, labels, mean, std, batch_size, device, shuffle=False, pad=0, flip=False,
        seed=0, rank=0, size=1,
    ):  # fmt: skip
        self.images = F.pad(torch.from_numpy(images).permute(0, 3, 1, 2), [pad] * 4).to(device)
        self.images = self.images.contiguous()
        self.labels = torch.from_numpy(labels).to(device)
        # Normalised as (x/255 - mean) / std, in two passes over the batch.
        mean, std = torch.tensor(np.array([mean, std]), dtype=torch.float64).view(2, -1, 1, 1)
        self.shift = (mean * 255).to(device=device, dtype=torch.float32)
        self.scale = (1 / (std * 255)).to(device=device, dtype=torch.float32)
        self.side = images.shape[1:3]
        self.examples, self.batch_size, self.device = len(images), batch_size, device
        self.shuffle, self.pad, self.flip = shuffle, pad, flip
        self.seed, self.rank, self.size, self.epoch = seed, rank, size, 0

    def __len__(self):
        return -(-self.examples // self.batch_size)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order, top, left, mirror = self._draw()
        # This rank's share of each batch; several small batches are gathered at a time.
        starts = range(0, self.examples, self.batch_size)
        shares = [order[i : i + self.batch_size][self.rank :: self.size] for i in starts]
        group = max(1, GATHER // self.batch_size)
        # A view of every possible crop, (N, C, top, left, H, W), without a copy.
        height, width = self.side
        windows = self.images.unfold(2, height, 1).unfold(3, width, 1)
        for i in range(0, len(shares), group):
            sizes = [len(share) for share in shares[i : i + group]]
            index = torch.cat(shares[i : i + group])
            if self.pad:
                images = windows[index, :, top[index], left[index]]
            else:
                images = self.images[index]
            if self.flip:
                # A choice without a branch; uint8 wraps around, so the sum is exact.
                choice = mirror[index, None, None, None]
                images = (images.flip(3) - images).mul_(choice).add_(images)
            for batch, labels in zip(images.split(sizes), self.labels[index].split(sizes)):
                yield batch.float().sub_(self.shift).mul_(self.scale), labels

    def _draw(self):
        """This epoch's order of all N images, and crop offsets and flip of each, by its index."""
        rng = np.random.default_rng((self.seed, self.epoch))
        N = self.examples
        order = rng.permutation(N) if self.shuffle else np.arange(N)
        top, left = rng.integers(0, 2 * self.pad + 1, (2, N)) if self.pad else (order, order)
        mirror = rng.integers(0, 2, N).astype(np.uint8) if self.flip else order
        return [torch.from_numpy(x).to(self.device) for x in (order, top, left, mirror)]


def load_arrays(path, shape=None, classes=None, remedy=None):
    """The arrays of a prepared data set, by KEYS, and what identifies them: its name and CRCs.

    Checks the shape of an image and the number of classes; None takes them as they are. `remedy`
    says what to do about a file that is not right.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            crc = {key: f"{archive.getinfo(key + '.npy').CRC:08x}" for key in KEYS}
        with np.load(path) as file:  # verifies the CRCs
            arrays = {key: file[key] for key in KEYS}
        for split in ("train", "test"):
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            if shape is None and images.ndim == 4 and images.size:
                shape = images.shape[1:]
            if images.dtype != np.uint8 or images.shape[1:] != shape:
                sides = ", ".join(map(str, shape or "HWC"))
                raise ValueError(f"{split}_images is not uint8 (N, {sides})")
            if labels.dtype != np.int64 or labels.shape != images.shape[:1] or not len(labels):
                raise ValueError(f"{split}_labels is not int64 (N,) with an entry an image")
            if classes is None:
                classes = len(np.unique(labels))
            if labels.min() != 0 or labels.max() != classes - 1:
                raise ValueError(f"{split}_labels do not run from 0 to {classes - 1}")
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, zlib.error,
            zipfile.BadZipFile) as error:  # fmt: skip
        raise DataError(
            f"{path} is damaged or another data set ({error}). "
            + (
                remedy
                or f"`python -m data.prepare {path.stem} --data_dir {path.parent}` makes it anew."
            )
        ) from error
    return arrays, {"file": path.name, "crc32": crc}
