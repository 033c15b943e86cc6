"""The networks, by name: the four that the AGD paper trains, and those of libraries."""

import torch
import torch.nn as nn

from architecture import libraries
from architecture.fcn import FCN
from architecture.libraries import Unfit, is_library
from architecture.resnet import ResNet
from architecture.vgg import VGG

__all__ = ["NETWORKS", "Unfit", "build", "is_library"]

# name -> f(shape (channels, height, width), classes, depth, width) -> network, without biases and
# affine norm parameters, as the paper trains it
NETWORKS = {
    "fcn": lambda shape, classes, depth, width: FCN(depth, width, shape.numel(), classes),
    "vgg": lambda shape, classes, depth, width: VGG(shape[0], classes),
    "resnet18": lambda shape, classes, depth, width: ResNet(18, shape, classes),
    "resnet50": lambda shape, classes, depth, width: ResNet(50, shape, classes),
}


def build(arch, shape, classes, depth=10, width=256, bias=False, affine=False):
    """The network `arch`, one of NETWORKS or a library's, for images of `shape` (channels, height,
    width). Weights are PyTorch's default draw from the global generator, the same with and without
    biases and affine norms. Raises Unfit where a library's network cannot take such images.

    depth, width: of the fully connected network.
    """
    if is_library(arch):
        return libraries.build(arch, shape, classes)
    return with_vectors(NETWORKS[arch](torch.Size(shape), classes, depth, width), bias, affine)


def with_vectors(net, bias, affine):
    """`net` with biases of 0 in its linear and convolutional layers, if `bias`, and with gains of 1
    and biases of 0 in its norms, if `affine`."""
    for module in net.modules():
        if bias and isinstance(module, (nn.Linear, nn.Conv2d)):
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0]))
        if affine and isinstance(module, nn.BatchNorm2d):
            module.affine = True
            module.weight = nn.Parameter(torch.ones(module.num_features))
            module.bias = nn.Parameter(torch.zeros(module.num_features))
    return net
