"""ResNet with batch norm, digits in clutter"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock

from data import load

METRIC = "validation error rate"
BATCH, STEPS = 32, 2400
SIDE, TRAINING, VALIDATION = 16, 24000, 1536
FRAGMENTS = 2  # of other digits, in an image
NOISE = 0.1  # its standard deviation; a stroke is 1 at most
WIDTHS, BLOCKS = (16, 32, 64), 2  # of the stages, and in each


def warped(images, span, generator):
    """Images (N, 1, h, w) under random rotations, shears, scales and shifts, SIDE x SIDE. `span`:
    the limits of the scale, relative to an image that fills the frame."""
    n = len(images)
    angle, shear, size, x, y = torch.rand(5, n, generator=generator) * 2 - 1
    angle, shear = angle * math.pi / 6, shear * 0.3
    size = span[0] + (span[1] - span[0]) * (size + 1) / 2
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    # Shifts keep the image within the frame, up to the corners that a rotation turns outwards.
    x, y = x * (1 - size), y * (1 - size)
    rows = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], 1).view(n, 2, 2)
    shift = -(rows @ torch.stack([x, y], 1)[:, :, None])
    grid = F.affine_grid(torch.cat([rows, shift], 2), (n, 1, SIDE, SIDE), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def scenes(digits, count, seed):
    """(images (count, 1, SIDE, SIDE), labels): digits between fragments of others, with random
    contrast and noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randint(len(digits.labels), (count,), generator=generator)

    images, rows = digits.images.float() / 16, draw()
    windows = images.unfold(2, 4, 1).unfold(3, 4, 1)  # (N, 1, top, left, 4, 4)
    scene = warped(images[rows], (0.6, 0.9), generator)
    for _ in range(FRAGMENTS):
        top, left = torch.randint(0, 5, (2, count), generator=generator)
        fragment = windows[draw(), :, top, left]
        scene = torch.maximum(scene, warped(fragment, (0.25, 0.4), generator))
    contrast = 0.5 + 0.5 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = torch.randn(scene.shape, generator=generator)
    return contrast * scene + NOISE * noise, torch.from_numpy(digits.labels)[rows]


def data():
    digits = load("digits", None, 1, 1, torch.device("cpu"))
    return scenes(digits.train, TRAINING, 0), scenes(digits.test, VALIDATION, 1)


def network():
    inputs, layers = WIDTHS[0], []
    for width in WIDTHS:
        for _ in range(BLOCKS):
            stride, project = 1, None
            if width != inputs:
                stride = 2
                project = nn.Sequential(
                    nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
                )
            layers.append(BasicBlock(inputs, width, stride, project))
            inputs = width
    stem = nn.Conv2d(1, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
    return nn.Sequential(
        *stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)
    )


def loss(net, images, labels):
    return F.cross_entropy(net(images), labels)


def score(net, images, labels):
    return (net(images).argmax(1) != labels).float()
