"""How networks, data sets, optimisers and numbers are written for people."""

import math
import re
from pathlib import PurePath

from architecture import GPTS

ARCHITECTURES = {"vgg": "VGG-16", "resnet18": "ResNet-18", "resnet50": "ResNet-50"}
GPT_NAMES = {"gpt": "GPT", "gpt2": "GPT-2"}
DATASETS = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100",
            "imagenet": "ImageNet", "shakespeare": "Shakespeare"}  # fmt: skip
# Images other than their file's name says, by the checksum of the training images.
JPEG = {"2926c671": "JPEG CIFAR-10"}
OPTIMIZERS = {"agd": "AGD", "spectral": "SpectralAGD", "adam": "Adam", "sgd": "SGD"}


def network_name(arch, depth=None, width=None):
    """The network of these flags, by default of its own size."""
    if arch == "fcn":
        return f"FCN {depth}×{width}"
    if arch in GPTS:
        return f"{GPT_NAMES[arch]} {depth or GPTS[arch].depth}×{width or GPTS[arch].width}"
    return ARCHITECTURES.get(arch, arch.rpartition(":")[-1])


def data_name(dataset, source=None):
    """The name of images or a text: of the data set, unless a log's checksums say otherwise."""
    crc = (source or {}).get("crc32")
    crc = crc.get("train_images") if isinstance(crc, dict) else None  # of a text it is a word
    own = PurePath(dataset.partition(":")[-1]).name.removesuffix(".npz")  # of npz:, folder:, text:
    return JPEG.get(crc) or DATASETS.get(dataset) or own or dataset


def optimizer_name(optimizer, rate=None):
    """An optimiser, with its learning rate where it has one: Adam lr 1e-3."""
    name = OPTIMIZERS.get(optimizer, optimizer.rpartition(".")[-1])
    return name if rate is None else f"{name} lr {rate_name(rate)}"


def rate_name(rate):
    """A learning rate: 1e-3, 2.5e-4, 0.1, 10."""
    if 0.01 <= rate < 1e4 or not rate:
        return f"{rate:g}"
    return exponent(re.sub(r"\.?0*e", "e", f"{rate:.2e}"))


def number(x, digits=5):
    """A number with so many digits at most, and four decimals at most: 0.6225, 13.852, 90,387,
    5.0e34, 1.2e-5; "not finite" where it is not."""
    if not math.isfinite(x):
        return "not finite"
    if x and not 1e-3 <= abs(x) < 1e6:
        return exponent(f"{x:.1e}")
    whole = len(f"{abs(x):.0f}")
    return f"{x:,.{max(0, min(4, digits - whole))}f}"


def significant(x, digits):
    """A number with so many significant figures at most: 3.77e-5, 0.25, 1437."""
    return exponent(f"{x:.{digits}g}")


def exponent(text):
    """The text of a number with its exponent as people write it: 1e-05 as 1e-5, 1e+34 as 1e34."""
    return re.sub(r"e([+-])0*(\d)", lambda part: f"e{part[1].strip('+')}{part[2]}", text)
