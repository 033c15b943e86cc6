"""VGG-16 with batch norm and a single linear layer (Simonyan and Zisserman, arXiv 1409.1556)."""

import torch.nn as nn
import torch.nn.functional as F

from architecture.padding import pad_to_32

# Widths of the 3x3 convolutions; each stage ends in a 2x2 max pool.
STAGES = [(64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)]


class VGG(nn.Module):
    """Images (batch, channels, height, width) of any side to (batch, classes)."""

    def __init__(self, channels, classes):
        super().__init__()
        layers = []
        for stage in STAGES:
            for width in stage:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width, affine=False),
                    nn.ReLU(inplace=True),
                ]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes, bias=False)

    def forward(self, x):
        x = self.features(pad_to_32(x))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
