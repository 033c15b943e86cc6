"""The networks, by name: the four that the AGD paper trains, GPT-2, and those of libraries."""

from typing import NamedTuple

from cli import UserError

__all__ = [
    "GPTS", "LIBRARIES", "NETWORKS", "SUFFIXES", "Unfit", "build", "is_library", "sample",
    "with_vectors",
]  # fmt: skip

LIBRARIES = ("torchvision:", "timm:")  # prefixes of the names of their networks
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")  # of files of weights


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


class Size(NamedTuple):
    """The defaults of a GPT's sizes; `tied`: whether the head's weight is the embedding."""

    depth: int
    width: int
    heads: int
    context: int
    tied: bool


GPTS = {"gpt": Size(4, 128, 4, 64, False), "gpt2": Size(12, 768, 12, 1024, True)}


def is_library(arch):
    """Whether a library holds the network `arch`."""
    return arch.startswith(LIBRARIES)


def build(
    arch, shape, classes, depth=10, width=256, bias=None, affine=None, heads=4, dropout=0.0,
    tied=False,
):  # fmt: skip
    """The network `arch`: one of NETWORKS or a library's for images of `shape` (channels, height,
    width), one of GPTS for texts of `shape` (context,) and `classes` different tokens. Raises Unfit
    where it cannot take these.

    Weights of NETWORKS are PyTorch's default draw from the global generator, the same with and
    without biases and affine norms. `bias`, `affine`: whether these are there; None: they are in
    GPTS alone. depth, width: of the fully connected network, or the blocks and the residual stream
    of a GPT, which alone has heads, dropout and tied (see GPT).
    """
    import torch

    if arch in GPTS:
        from architecture.gpt import GPT

        try:
            return GPT(classes, *shape, depth, width, heads, dropout, tied, bias is not False,
                       affine is not False)  # fmt: skip
        except ValueError as error:
            raise Unfit(f"{arch} cannot be made: {error}") from error
    if is_library(arch):
        from architecture import libraries

        return libraries.build(arch, shape, classes)
    return with_vectors(NETWORKS[arch](torch.Size(shape), classes, depth, width), bias, affine)


def sample(shape, device=None, count=2):
    """`count` inputs of zeros, as a network for `shape` takes them."""
    import torch

    dtype = torch.int64 if len(shape) == 1 else torch.float32
    return torch.zeros(count, *shape, dtype=dtype, device=device)


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
