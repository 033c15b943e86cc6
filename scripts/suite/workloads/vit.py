"""Vision transformer, shapes that a colour selects"""

import math

import torch
import torch.nn.functional as F
from torchvision.models import VisionTransformer

METRIC = "validation error rate"
BATCH, STEPS = 32, 3200
SIDE, TRAINING, VALIDATION = 24, 24000, 2048
PATCH, WIDTH, LAYERS, HEADS = 6, 64, 3, 4
NOISE = 0.1  # its standard deviation; the colour of an object is 1
RADII, TURN, JITTER = (4, 5.5), math.pi / 12, 2  # of the objects, in pixels and radians
# The signed distance to the outline, negative inside, in units of the radius.
SHAPES = (
    lambda x, y: torch.hypot(x, y) - 0.9,  # disc
    lambda x, y: (torch.hypot(x, y) - 0.7).abs() - 0.3,  # ring
    lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.8,  # square
    lambda x, y: torch.maximum(-y, (3**0.5 * x.abs() + y) / 2) - 0.5,  # triangle
    lambda x, y: torch.maximum(x.abs() - 0.4, y.abs() - 1),  # bar
    lambda x, y: torch.maximum(  # cross
        torch.minimum(x.abs(), y.abs()) - 0.25, torch.maximum(x.abs(), y.abs()) - 1
    ),
)


def coverage(shapes, centres, generator):
    """(N, SIDE, SIDE): the fraction of each pixel that an object covers. shapes (N,), centres
    (N, 2); the radius and the angle are random."""
    n, pixels = len(shapes), torch.arange(SIDE) + 0.5
    radius, angle = torch.rand(2, n, 1, 1, generator=generator)
    radius = RADII[0] + (RADII[1] - RADII[0]) * radius
    angle = TURN * (2 * angle - 1)
    result = torch.empty(n, SIDE, SIDE)
    for number, distance in enumerate(SHAPES):
        rows = shapes == number
        x, y = centres[rows, :, None, None].unbind(1)
        x, y = pixels - x, pixels[:, None] - y
        r, cos, sin = radius[rows], angle[rows].cos(), angle[rows].sin()
        x, y = (cos * x - sin * y) / r, (sin * x + cos * y) / r
        result[rows] = (0.5 - r * distance(x, y)).clamp_(0, 1)
    return result


def scenes(count, seed):
    """(images uint8 (count, 3, SIDE, SIDE), labels): a red, a green and a blue object in three of
    the quarters. A faint tint of the background names a colour; the label is the shape of the
    object with that colour."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.randint(len(SHAPES), (count, 3), generator=generator)
    quarters = torch.rand(count, 4, generator=generator).argsort(1)[:, :3]
    centres = torch.stack([quarters % 2, quarters // 2], 2) * SIDE / 2 + SIDE / 4
    centres += JITTER * (2 * torch.rand(count, 3, 2, generator=generator) - 1)
    colour = torch.randint(3, (count,), generator=generator)
    images = coverage(shapes.flatten(), centres.view(-1, 2), generator).view(count, 3, SIDE, SIDE)
    images += 0.2 * F.one_hot(colour, 3)[:, :, None, None]
    images += NOISE * torch.randn(images.shape, generator=generator)
    images = (images * 128 + 64).clamp_(0, 255).byte()
    return images, shapes.gather(1, colour[:, None])[:, 0]


def data():
    return scenes(TRAINING, 0), scenes(VALIDATION, 1)


def network():
    return VisionTransformer(
        SIDE, PATCH, LAYERS, HEADS, WIDTH, 4 * WIDTH, num_classes=len(SHAPES)
    )  # fmt: skip


def logits(net, images):
    return net(images / 64 - 1)


def loss(net, images, labels):
    return F.cross_entropy(logits(net, images), labels)


def score(net, images, labels):
    return (logits(net, images).argmax(1) != labels).float()
