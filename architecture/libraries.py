"""The classifiers of torchvision and timm, for images of any shape and any number of classes.

They keep their library's own layers, start and names of parameters.
"""

import importlib

import torch

from cli import UserError

PREFIXES = ("torchvision:", "timm:")
SIDES = (16, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 299, 384, 448)  # tried for a message


class Unfit(UserError):
    """A network, or its weights, cannot be had for these images; the message says why."""


def is_library(arch):
    """Whether a library holds the network `arch`."""
    return arch.startswith(PREFIXES)


def names(library):
    """The names of a library's classifiers, those of its published weights included."""
    found = _import(library)
    if library == "torchvision":
        return found.models.list_models(module=found.models)
    return [*found.list_models(), *found.list_models(pretrained=True)]


def build(arch, shape, classes):
    """The network `arch`, LIBRARY:NAME, drawn by its library from the global generator.

    shape: (channels, height, width) of an image. torchvision's networks take three channels: grey
    images are repeated, which keeps the first layer that published weights fit. timm adapts the
    first layer. Raises Unfit where the network cannot take such images; one pass on no device that
    computes finds out.
    """
    library, _, name = arch.partition(":")
    channels, height, width = shape
    images = f"images of {height}×{width}"
    if library == "torchvision" and channels not in (1, 3):
        raise Unfit(f"{arch} takes images of 1 or 3 channels, not {channels}")
    try:
        make = _torchvision if library == "torchvision" else _timm
        net = make(_import(library), name, shape, classes)
    except Unfit:
        raise
    except Exception as error:  # of any type: the code is the library's
        _raise_if_memory(error)
        raise _unfit(arch, images, error) from error
    error = refusal(net, shape, classes)
    if error is not None:
        raise _unfit(arch, images + _smallest(net, shape, classes), error) from error
    return net


def refusal(net, shape, classes):
    """The error that two images of `shape` raise in `net`, or None where its outputs are (2,
    classes). The network is left as it was."""
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            try:
                outputs = _on_meta(net, shape)
            except Exception:  # which may be that of a network with values of its own to read
                outputs = net(torch.zeros(2, *shape))
        if not isinstance(outputs, torch.Tensor) or tuple(outputs.shape) != (2, classes):
            found = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs)
            raise ValueError(f"2 images give {found}, and not (2, {classes})")
    except Exception as error:
        _raise_if_memory(error)
        return error
    finally:
        net.train(training)
    return None


def _on_meta(net, shape):
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    state = {name: torch.empty_like(x, device="meta") for name, x in state.items()}
    with torch.device("meta"):
        return torch.func.functional_call(net, state, (torch.empty(2, *shape),))


def _smallest(net, shape, classes):
    """Words for the smallest side that would do, where there is one among SIDES."""
    for side in SIDES:
        if side > min(shape[1:]) and refusal(net, (shape[0], side, side), classes) is None:
            return f" (a side of {side} would do)"
    return ""


def _torchvision(torchvision, name, shape, classes):
    channels, height, width = shape
    sized = {}
    if name.startswith("vit_"):
        if height != width:
            raise ValueError("it takes square images")
        sized["image_size"] = height
    if name.startswith("maxvit_"):
        sized["input_size"] = (height, width)
    if name in ("googlenet", "inception_v3"):  # one tensor; and their own start, without a warning
        sized.update(aux_logits=False, transform_input=False, init_weights=True)
    net = torchvision.models.get_model(name, weights=None, num_classes=classes, **sized)
    if channels == 1:
        forward = net.forward
        net.forward = lambda x: forward(x.expand(-1, 3, -1, -1))
    return net


def _timm(timm, name, shape, classes):
    channels, height, width = shape
    options = {"pretrained": False, "num_classes": classes, "in_chans": channels}
    try:
        return timm.create_model(name, **options, img_size=(height, width))
    except TypeError as error:  # those that take every side have no such argument
        if "img_size" not in str(error):
            raise
    return timm.create_model(name, **options)


def _import(library):
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise Unfit(
            f"{library}:NAME needs the package {library} ({error}): pip install {library}"
        ) from error


def _unfit(arch, images, error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return Unfit(f"{arch} cannot take {images}: {reason[:200].rstrip('.')}")


def _raise_if_memory(error):
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in str(error):
        raise error
