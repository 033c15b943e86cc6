"""U-Net, damaged images of digits"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import load

METRIC = "validation absolute error"
BATCH, STEPS = 16, 2300
SIDE, TRAINING, VALIDATION = 24, 24576, 360
HOLES, LARGEST = 3, 10  # of an image, and pixels of a hole's side
NOISE = 0.3


def data():
    """Damaged and original images, in units of the standard deviation of the original pixels. No
    digit of the training images is in a validation image."""
    generator, parts = torch.Generator().manual_seed(0), []
    digits = load("digits", None, 1, 1, torch.device("cpu"))[:2]
    for batches, count in zip(digits, (TRAINING, VALIDATION)):
        images = batches.images.float() / 16
        whole = enlarged(images[torch.arange(count) % len(images)], generator)
        parts.append((damaged(whole, generator), whole))
    std, mean = torch.std_mean(parts[0][1])
    return tuple(tuple((x - mean) / std for x in part) for part in parts)


def uniform(generator, low, high, *shape):
    return low + (high - low) * torch.rand(shape, generator=generator)


def enlarged(images, generator):
    """The images at SIDE pixels with sharp edges, each under its own affine map."""
    n = len(images)
    turn, slant = uniform(generator, -0.4, 0.4, 2, n)
    wide, high = uniform(generator, 0.9, 1.5, 2, n)
    shift = uniform(generator, -0.2, 0.2, n, 2, 1)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(n, 2, 2)
    stretch = torch.stack([wide, slant, torch.zeros(n), high], 1).view(n, 2, 2)
    grid = F.affine_grid(torch.cat([rotation @ stretch, shift], 2), (n, 1, SIDE, SIDE), False)
    return torch.sigmoid(12 * (F.grid_sample(images, grid, "bicubic", align_corners=False) - 0.5))


def damaged(images, generator):
    """The images with a blur of random width, HOLES missing rectangles and noise."""
    n, offsets = len(images), torch.arange(-3, 4)
    kernel = torch.exp(-0.5 * (offsets / uniform(generator, 0.5, 1.5, n, 1)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    images = images.view(1, n, SIDE, SIDE)
    images = F.conv2d(images, kernel.view(n, 1, 7, 1), padding=(3, 0), groups=n)
    images = F.conv2d(images, kernel.view(n, 1, 1, 7), padding=(0, 3), groups=n)
    images = images.view(n, 1, SIDE, SIDE)
    first = uniform(generator, -2, SIDE - 4, n, HOLES, 2, 1)
    size = uniform(generator, 3, LARGEST, n, HOLES, 2, 1)
    inside = (torch.arange(SIDE) >= first) & (torch.arange(SIDE) < first + size)
    hole = (inside[:, :, 0, :, None] & inside[:, :, 1, None, :]).any(1, keepdim=True)
    return images * ~hole + NOISE * torch.randn(images.shape, generator=generator)


def block(layer, inputs, outputs, *shape):
    return nn.Sequential(layer(inputs, outputs, *shape, bias=False), nn.InstanceNorm2d(outputs),
                         nn.LeakyReLU(0.2))  # fmt: skip


class UNet(nn.Module):
    """The U-Net of fastMRI in small. Strided convolutions replace its average pooling."""

    def __init__(self, width, depth):
        super().__init__()
        widths = [width * 2**i for i in range(depth + 1)]
        pairs = list(zip(widths, widths[1:]))
        self.first = block(nn.Conv2d, 1, width, 3, 1, 1)
        self.down = nn.ModuleList(
            nn.Sequential(block(nn.Conv2d, a, b, 3, 2, 1), block(nn.Conv2d, b, b, 3, 1, 1))
            for a, b in pairs
        )
        self.up = nn.ModuleList(block(nn.ConvTranspose2d, b, a, 2, 2) for a, b in pairs[::-1])
        self.merge = nn.ModuleList(block(nn.Conv2d, 2 * a, a, 3, 1, 1) for a, _ in pairs[::-1])
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        skips = [self.first(x)]
        for down in self.down:
            skips.append(down(skips[-1]))
        x = skips.pop()
        for up, merge in zip(self.up, self.merge):
            x = merge(torch.cat([up(x), skips.pop()], 1))
        return self.last(x)


def network():
    return UNet(width=16, depth=3)


def score(net, images, targets):
    """(B,): the mean absolute error of an image's pixels."""
    return (net(images) - targets).abs().mean((1, 2, 3))


def loss(net, images, targets):
    return F.l1_loss(net(images), targets)
