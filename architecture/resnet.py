"""ResNet-18 and ResNet-50, in the two forms that the AGD paper trains.

Images with a side under 64 go through pre-activation blocks (He et al., arXiv 1603.05027) behind a
3x3 stem; the shortcut projects the activated input, and no norm stands before the pooling. Larger
ones go through post-activation blocks (He et al., arXiv 1512.03385) behind a 7x7 stem and a max
pool, with the stride on the 3x3 convolution (version 1.5).
"""

import torch.nn as nn
import torch.nn.functional as F

from architecture.padding import pad_to_32

BASIC = [(3, 1), (3, 1)]  # a block's convolutions: kernel, multiple of the stage's width
BOTTLENECK = [(1, 1), (3, 1), (1, 4)]
BLOCKS = {18: (BASIC, [2, 2, 2, 2]), 50: (BOTTLENECK, [3, 4, 6, 3])}
WIDTHS = [64, 128, 256, 512]


class ResNet(nn.Module):
    """Images (batch, *shape), shape (channels, height, width), to (batch, classes)."""

    def __init__(self, depth, shape, classes):
        super().__init__()
        block, counts = BLOCKS[depth]
        if min(shape[1:]) < 64:
            self.stem, make = conv(shape[0], 64, 3), PreActivation
        else:
            make, stem = PostActivation, conv(shape[0], 64, 7, stride=2)
            self.stem = nn.Sequential(stem, norm(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        blocks, inputs = [], 64
        for width, count in zip(WIDTHS, counts):
            for i in range(count):
                stride = 2 if i == 0 and width > 64 else 1
                blocks.append(make(inputs, width, block, stride))
                inputs = width * block[-1][1]
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(inputs, classes, bias=False)

    def forward(self, x):
        x = self.blocks(self.stem(pad_to_32(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Block(nn.Module):
    """The convolutions of one residual block, its projection where the shape changes, and its
    norms, of the convolutions' inputs (pre-activation) or outputs."""

    def __init__(self, inputs, width, block, stride):
        super().__init__()
        sizes = [inputs] + [width * multiple for _, multiple in block]
        first_3x3 = [kernel for kernel, _ in block].index(3)
        self.convs = nn.ModuleList(
            conv(sizes[i], sizes[i + 1], kernel, stride if i == first_3x3 else 1)
            for i, (kernel, _) in enumerate(block)
        )
        self.project = None
        if stride != 1 or sizes[0] != sizes[-1]:
            self.project = conv(sizes[0], sizes[-1], 1, stride)
        post = isinstance(self, PostActivation)
        self.norms = nn.ModuleList(norm(size) for size in (sizes[1:] if post else sizes[:-1]))
        if post and self.project is not None:
            self.project = nn.Sequential(self.project, norm(sizes[-1]))


class PreActivation(Block):
    def forward(self, x):
        y = F.relu(self.norms[0](x), inplace=True)
        shortcut = x if self.project is None else self.project(y)
        y = self.convs[0](y)
        for norm_i, conv_i in zip(self.norms[1:], self.convs[1:]):
            y = conv_i(F.relu(norm_i(y), inplace=True))
        return y + shortcut


class PostActivation(Block):
    def forward(self, x):
        y = x
        for i, (conv_i, norm_i) in enumerate(zip(self.convs, self.norms)):
            y = norm_i(conv_i(y if i == 0 else F.relu(y, inplace=True)))
        return F.relu(y + (x if self.project is None else self.project(x)), inplace=True)


def conv(inputs, outputs, kernel, stride=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def norm(size):
    return nn.BatchNorm2d(size, affine=False)
