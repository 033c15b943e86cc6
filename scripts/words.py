"""How networks, data sets, optimisers and numbers are written for people."""

import math
import re
from pathlib import PurePath

from architecture import GPTS
from data import is_text

ARCHITECTURES = {"vgg": "VGG-16", "resnet18": "ResNet-18", "resnet50": "ResNet-50"}
GPT_NAMES = {"gpt": "GPT", "gpt2": "GPT-2"}
DATASETS = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100",
            "imagenet": "ImageNet", "shakespeare": "Shakespeare"}  # fmt: skip
# Images other than their file's name says, by the checksum of the training images.
JPEG = {"2926c671": "JPEG CIFAR-10"}
OPTIMIZERS = {"agd": "AGD", "spectral": "SpectralAGD", "adam": "Adam", "sgd": "SGD"}
LOSSES = {"mse": "square loss", "xent": "cross-entropy"}


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


def described(first):
    """A run's settings in words, {quantity: (words, whether they are the default)}, in the order of
    a title. `first`: the first row of its log. Raises AttributeError, TypeError or ValueError where
    the settings are not main.py's."""
    settings = dict(first["settings"])

    def take(key, default=None):
        value = settings.pop(key, None)
        return default if value is None else value

    source, dataset = take("data") or first.get("data"), take("dataset", "")
    if not dataset or dataset.endswith(":"):  # the settings leave out where a folder lies
        dataset = first["flags"].get("dataset", dataset)
    network = network_name(take("arch", "?"), take("depth"), take("width"))
    images, tests = take("train_examples"), take("test_examples")
    rate, gain, layers = take("lr"), take("gain", 1), take("layers")
    weights, start = take("weights"), first["flags"].get("weights")
    freeze, size, precision = take("freeze"), take("image_size"), take("precision", "fp32")
    augment = take("augment", "default")
    gpt = first["settings"].get("arch") in GPTS  # which has biases and gains by default
    bias, affine = (take(key, gpt) for key in ("bias", "affine"))
    tied, decay, warmup, schedule = map(take, ("tied", "weight_decay", "warmup", "schedule"))
    rule = [optimizer_name(take("optimizer", "?"), rate)]
    rule += [] if decay is None else [f"decay {decay:g}"]
    rule += [] if schedule is None else [f"{schedule} over {take('epochs')} epochs"]
    rule += [] if warmup is None else [f"warm-up {warmup}"]
    examples = "windows" if is_text(first["settings"].get("dataset") or "") else "images"
    words = {
        "network": (network, False),
        "bias": ("biases" if bias else "no biases", bias == gpt),
        "affine": ("affine norms" if affine else "plain norms", affine == gpt),
        "tied": ("head as usual" if tied is None else "tied head" if tied else "untied head",
                 tied is None),
        "weights": (f"from {PurePath(start or weights).name}" if weights else "drawn", not weights),
        "freeze": (f"{freeze} frozen", False) if freeze else ("nothing frozen", True),
        "data": (data_name(dataset, source), False),
        "images": (f"{images:,} images" if images else "all images", not images),
        "tests": (f"{tests:,} test {examples}" if tests else f"all test {examples}", True),
        "size": (f"{size} pixels" if size else "images as they are", not size),
        "augment": (f"augmentation {augment}", augment == "default"),
        "bad": ("bad images left out", False) if take("skip_bad_images") else ("all read", True),
        "loss": (LOSSES.get(settings.get("loss"), str(take("loss", "objective"))), True),
        "batch": (f"batch {take('train_bs', '?')}", False),
        "optimizer": (", ".join(rule), False),
        "gain": (f"gain {gain:g}", gain == 1),
        "layers": (f"L by {layers}" if layers else "L as usual", not layers),
        "precision": (precision, precision == "fp32"),
        "sync_bn": ("--sync_bn", False) if take("sync_bn") else ("batch norm a rank", True),
        "seed": (f"seed {take('seed', '?')}", False),
    }  # fmt: skip
    for key, value in settings.items():
        words[key] = (f"{key.replace('_', ' ')} {value}"[:50], value in (None, False))
    return words


def short_name(figure):
    """The name of a figure in a table: fig. 5, phases."""
    return f"fig. {figure[3:]}" if figure.startswith("fig") else figure


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
