"""Small data sets: uint8 arrays held on the device, shuffled, cropped and flipped by the batch."""

import math
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.common import DataError

KEYS = ("train_images", "train_labels", "test_images", "test_labels")

# The header of an .npy: numpy evaluates it as Python, which this does without.
HEADER = re.compile(
    r"(?=.*'descr': *'([^']*)')(?=.*'fortran_order': *(True|False))"
    r"(?=.*'shape': *\(((?:\d+, *)*\d*)\))",
    re.DOTALL,
)
LONGEST = 4096  # characters of a header; numpy's own have 118
DTYPES = {kind: np.dtype(np.uint8) for kind in ("|u1", "u1", "<u1", "=u1", ">u1", "B")}
DTYPES.update({kind: np.dtype(np.int64) for kind in ("<i8", "i8", "=i8")})
# A file may say that it holds this many bytes beside RATIO times its own. Photographs shrink by a
# third, drawings to a fifteenth; deflate's limit is a thousandth, and a file of it a trap.
MODEST, RATIO = 2**28, 100
CHUNK = 2**20  # bytes


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
        self.labels = labels
        # Normalised as (x/255 - mean) / std, in two passes over the batch.
        mean, std = torch.tensor(np.array([mean, std]), dtype=torch.float64).view(2, -1, 1, 1)
        self.shift = (mean * 255).to(device=device, dtype=torch.float32)
        self.scale = (1 / (std * 255)).to(device=device, dtype=torch.float32)
        self.examples, self.batch_size, self.device = len(images), batch_size, device
        self.shuffle, self.pad, self.flip = shuffle, pad, flip
        self.seed, self.rank, self.size = seed, rank, size
        self.epoch = self.start = self.position = 0
        # The places of a crop's pixels in memory, from its first one on, as they are and mirrored,
        # (2, C, H, W); and every possible crop by the place of its first pixel, a view.
        height, width = images.shape[1:3]
        pixels = torch.arange(self.images[0].numel()).view(self.images.shape[1:])
        pixels = pixels[:, :height, :width]
        self.pixels = torch.stack([pixels, pixels.flip(2)]).to(device)
        self.crops = self.images.as_strided(
            (self.images.numel() - int(pixels.max()), *pixels.shape), (1, *pixels.stride())
        )
        # A CPU copies whole rows, some six times as fast as pixel by pixel.
        self._images = self._rows if device.type == "cpu" else self._pixels
        self.held = None
        self.count = torch.arange(min(batch_size, len(images)), device=device)

    def __len__(self):
        return -(-self.examples // self.batch_size)

    def set_epoch(self, epoch, start=0):
        """The next pass is that of `epoch`, from batch `start` on; `position` counts those that
        have been begun, the ones before `start` included."""
        self.epoch, self.start, self.position = epoch, start, start

    def order(self):
        """The indices of the images in the order of this epoch, an int64 array."""
        return self._draw()[0]

    def close(self):
        """There is nothing to end."""

    def __iter__(self):
        draws, self.position = self._draws(), self.start
        for i in range(self.start * self.batch_size, self.examples, self.batch_size):
            self.position += 1
            # This rank's share of the batch.
            yield self._batch(*draws[:, i : i + self.batch_size][:, self.rank :: self.size])

    def advance(self):
        """Count a batch that was taken by `at`."""
        self.position += 1

    def hold(self):
        """Have `at` give the batches of this epoch, from memory that is the same every epoch."""
        draws, self.position = self._draws(), self.start
        if self.held is None:
            self.held = draws
        else:
            self.held.copy_(draws)

    def at(self, position, size):
        """The batch of `size` images from `position` on, a 0-dim int64 tensor on the device, as
        iteration gives it: kernels of fixed shape, which a CUDA graph can hold. A single rank's."""
        return self._batch(*self.held.index_select(1, position + self.count[:size]))

    def _batch(self, places, mirror, labels):
        images = self._images(places, mirror)
        return images.float().sub_(self.shift).mul_(self.scale), labels

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
        """What makes this epoch's images, in its order: (3, N) int64 on the device, the place in
        memory of the crop's first pixel, whether it is mirrored, the label."""
        order, top, left, mirror = self._draw()
        image, _, row, _ = self.images.stride()
        places = order * image + top[order] * row + left[order]
        draws = torch.from_numpy(np.stack([places, mirror[order], self.labels[order]]))
        if self.device.type == "cuda":  # copied without a wait; torch keeps the source until then
            return draws.pin_memory().to(self.device, non_blocking=True)
        return draws.to(self.device)

    def _draw(self):
        """This epoch's order of all N images, and crop offsets and flip of each, by its index."""
        rng = np.random.default_rng((self.seed, self.epoch))
        N = self.examples
        order = rng.permutation(N) if self.shuffle else np.arange(N)
        none = np.zeros(N, np.int64)
        top, left = rng.integers(0, 2 * self.pad + 1, (2, N)) if self.pad else (none, none)
        return order, top, left, rng.integers(0, 2, N) if self.flip else none


def load_arrays(path, shape=None, classes=None, remedy=None):
    """The arrays of a prepared data set, by KEYS, and what identifies them: its name and CRCs.

    Checks the shape of an image and the number of classes; None takes them as they are. `remedy`
    says what to do about a file that is not right. What the file claims is checked before memory
    is taken for it, and nothing but numbers is read: an array of objects would be a pickle.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        with zipfile.ZipFile(path) as archive:
            records = _records(archive, path.stat().st_size)
            crc = {key: f"{record.CRC:08x}" for key, record in records.items()}
            arrays = {key: _array(archive, key, record) for key, record in records.items()}
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
            if classes < 2:
                raise ValueError(f"{split}_labels are all the same: there is nothing to tell apart")
            if labels.min() != 0 or labels.max() != classes - 1:
                raise ValueError(f"{split}_labels do not run from 0 to {classes - 1}")
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, OverflowError,
            zlib.error, struct.error, zipfile.BadZipFile) as error:  # fmt: skip
        raise DataError(
            f"{path} is damaged or another data set ({error}). "
            + (
                remedy
                or f"`python -m data.prepare {path.stem} --data_dir {path.parent}` makes it anew."
            )
        ) from error
    return arrays, {"file": path.name, "crc32": crc}


def _records(archive, size):
    """{key: the entry of its array} of an .npz of `size` bytes; ValueError where what the entries
    claim cannot be."""
    every, records = [info.filename for info in archive.infolist()], {}
    for key in KEYS:
        if every.count(f"{key}.npy") != 1:
            raise ValueError(f"it holds {every.count(f'{key}.npy') or 'no'} {key}")
        records[key] = record = archive.getinfo(f"{key}.npy")
        if record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{key} is compressed in a way that numpy does not write")
        if record.compress_type == zipfile.ZIP_STORED and record.file_size > size:
            raise ValueError(f"{key} is said to be longer than the file")
    total = sum(record.file_size for record in records.values())
    if total > MODEST + RATIO * size:
        raise ValueError(f"{size:,} bytes are said to hold {total:,}")
    return records


def _array(archive, key, record):
    """The array of an entry, its CRC verified; ValueError, before memory is taken, where it is
    none of uint8 or int64, or its shape is not that of the entry's bytes."""
    with archive.open(record) as file:
        # The format's own description: magic, version, length of the header, header.
        start = file.read(8)
        if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
            raise ValueError(f"{key} is no .npy array")
        prefix = file.read(2 if start[6] == 1 else 4)
        length = int.from_bytes(prefix, "little")
        text = file.read(min(length, LONGEST)).decode("latin-1")
        found = HEADER.match(text)
        if length > LONGEST or not found:
            raise ValueError(f"{key} has no header that numpy writes")
        kind, fortran, shape = found.groups()
        dtype, shape = DTYPES.get(kind), [int(n) for n in shape.rstrip(", ").split(",") if n]
        if dtype is None or len(shape) > 4:
            raise ValueError(f"{key} is not {'int64 (N,)' if 'labels' in key else 'uint8'}")
        rest = record.file_size - 8 - len(prefix) - length
        if math.prod(shape) * dtype.itemsize != rest:
            raise ValueError(f"{key} has {rest:,} bytes, not those of its shape {tuple(shape)}")
        array = np.empty(shape[::-1] if fortran == "True" else shape, dtype)
        into, done = memoryview(array.reshape(-1).view(np.uint8)), 0
        while part := file.read(min(rest - done, CHUNK)):
            into[done : done + len(part)] = part
            done += len(part)
        if done < rest or file.read(1):  # the CRC was verified with the last byte
            raise ValueError(f"{key} is cut off")
    return array.T if fortran == "True" else array
