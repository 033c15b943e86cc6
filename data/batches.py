"""The common part of the batches of arrays, folders and texts."""

import numpy as np
import torch


class Batches:
    """See the package's docstring."""

    missing = epoch = first = position = 0
    workers = 0  # processes that prepare the batches
    unshared = 0  # batches that found no room in shared memory

    def __init__(self, examples, batch_size, device, shuffle=False, seed=0, rank=0, size=1):
        self.examples, self.batch_size, self.device = examples, batch_size, device
        self.shuffle, self.seed, self.rank, self.size = shuffle, seed, rank, size

    def __len__(self):
        return -(-self.examples // self.batch_size)

    def set_epoch(self, epoch, start=0):
        self.epoch, self.first, self.position = epoch, start, start

    def advance(self):
        self.position += 1

    def order(self, rng=None):
        rng = rng or np.random.default_rng((self.seed, self.epoch))
        return rng.permutation(self.examples) if self.shuffle else np.arange(self.examples)

    def shares(self):
        """The slice of `order` that this rank takes of each batch, from `first` on."""
        for i in range(self.first * self.batch_size, self.examples, self.batch_size):
            yield slice(i + self.rank, min(i + self.batch_size, self.examples), self.size)

    def close(self):
        pass


class ImageBatches(Batches):
    """Batches of images, normalised; `mean` and `std` of each channel are in units of 0..1."""

    def __init__(self, examples, batch_size, mean, std, *args):
        super().__init__(examples, batch_size, *args)
        # Normalised as (x/255 - mean) / std, in two passes over the batch.
        mean, std = torch.tensor(np.array([mean, std]), dtype=torch.float64).view(2, -1, 1, 1)
        self.shift = (mean * 255).to(device=self.device, dtype=torch.float32)
        self.scale = (1 / (std * 255)).to(device=self.device, dtype=torch.float32)

    def normalised(self, images):
        """float32 (N, C, H, W) of uint8 images."""
        images = images.to(torch.float32, memory_format=torch.contiguous_format)
        return images.sub_(self.shift).mul_(self.scale)
