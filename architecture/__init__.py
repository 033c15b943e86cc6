"""The networks, by name: the four that the AGD paper trains, and those of libraries."""

from cli import UserError

__all__ = ["LIBRARIES", "NETWORKS", "SUFFIXES", "Unfit", "build", "is_library", "with_vectors"]

LIBRARIES = ("torchvision:", "timm:")  # prefixes of the names of their networks
SUFFIXES = (".safetensors", ".pt", ".pth")  # of files of weights


class Unfit(UserError):
    """A network, or weights of a file, that do not fit the images or the network."""


# torch is imported within the functions: it takes a second, which a wrong name need not wait for.


def _fcn(shape, classes, depth, width):
    from architecture.fcn import FCN

    return FCN(depth, width, shape.numel(), classes)


def _vgg(shape, classes, depth, width):
    from architecture.vgg import VGG

    return VGG(shape[0], classes)


def _resnet(layers):
    def make(shape, classes, depth, width):
        from architecture.resnet import ResNet

        return ResNet(layers, shape, classes)

    return make


# name -> f(shape (channels, height, width), classes, depth, width) -> network, without biases and
# affine norm parameters, as the paper trains it
NETWORKS = {"fcn": _fcn, "vgg": _vgg, "resnet18": _resnet(18), "resnet50": _resnet(50)}


def is_library(arch):
    """Whether a library holds the network `arch`."""
    return arch.startswith(LIBRARIES)


def build(arch, shape, classes, depth=10, width=256, bias=False, affine=False):
    """The network `arch`, one of NETWORKS or a library's, for images of `shape` (channels, height,
    width). Weights are PyTorch's default draw from the global generator, the same with and without
    biases and affine norms. Raises Unfit where a library's network cannot take such images.

    depth, width: of the fully connected network.
    """
    import torch

    if is_library(arch):
        from architecture import libraries

        return libraries.build(arch, shape, classes)
    return with_vectors(NETWORKS[arch](torch.Size(shape), classes, depth, width), bias, affine)


def with_vectors(net, bias, affine):
    """`net` with biases of 0 in its linear and convolutional layers, if `bias`, and with gains of 1
    and biases of 0 in its norms, if `affine`."""
    import torch
    import torch.nn as nn

    for module in net.modules():
        if bias and isinstance(module, (nn.Linear, nn.Conv2d)):
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0]))
        if affine and isinstance(module, nn.BatchNorm2d):
            module.affine = True
            module.weight = nn.Parameter(torch.ones(module.num_features))
            module.bias = nn.Parameter(torch.zeros(module.num_features))
    return net
