"""The networks, by name: no biases, no affine norm parameters, as the AGD paper trains them."""

from architecture.fcn import FCN
from architecture.resnet import ResNet
from architecture.vgg import VGG

__all__ = ["NETWORKS", "build"]


def _fcn(shape, classes, depth, width):
    channels, height, side = shape
    return FCN(depth, width, channels * height * side, classes)


# name -> f(shape (channels, height, width), classes, depth, width) -> network
NETWORKS = {
    "fcn": _fcn,
    "vgg": lambda shape, classes, depth, width: VGG(shape[0], classes),
    "resnet18": lambda shape, classes, depth, width: ResNet(18, shape, classes),
    "resnet50": lambda shape, classes, depth, width: ResNet(50, shape, classes),
}


def build(arch, shape, classes, depth=10, width=256):
    """The network `arch` for images of `shape` (channels, height, width).

    Depth and width are the fully connected network's. Weights are PyTorch's default draw from the
    global generator.
    """
    return NETWORKS[arch](shape, classes, depth, width)
