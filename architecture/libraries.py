"""The classifiers of torchvision and timm, for images of any shape and any number of classes.

They keep their library's own layers, start and names of parameters.
"""

import importlib

import torch

from architecture import Unfit

SIDES = (16, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 299, 384, 448)  # tried for a message


def names(library):
    """The names of a library's classifiers, timm's names of published weights included."""
    package = _import(library)
    if library == "torchvision":
        return package.models.list_models(module=package.models)
    return [*package.list_models(), *package.list_models(pretrained=True)]


def build(arch, shape, classes):
    """The network `arch`, LIBRARY:NAME, drawn by its library from the global generator.

    shape: (channels, height, width) of an image. torchvision's networks take three channels: grey
    images are repeated, which keeps the first layer that published weights fit. timm adapts the
    first layer. Raises Unfit where a forward pass, on the meta device if possible, fails.
    """
    library, _, name = arch.partition(":")
    channels, height, width = shape
    if library == "torchvision" and channels not in (1, 3):
        raise Unfit(f"{arch} takes images of 1 or 3 channels, not {channels}")
    make, package, net = _torchvision if library == "torchvision" else _timm, _import(library), None
    try:
        net = make(package, name, shape, classes)
        error = refusal(net, shape, classes)
    except Exception as raised:  # of any type: the code is the library's
        error = raised
    if error is None:
        return net
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in str(error):
        raise error
    side = next((x for x in SIDES if net is not None and x > min(height, width)
                 and refusal(net, (channels, x, x), classes) is None), None)  # fmt: skip
    hint = f" (a side of {side} would do)" if side else ""
    reason = next((x.strip() for x in str(error).splitlines() if x.strip()), type(error).__name__)
    raise Unfit(f"{arch} cannot take images of {height}×{width}{hint}: "
                f"{reason[:200].rstrip('.')}") from error  # fmt: skip


def refusal(net, shape, classes):
    """The error that two images of `shape` raise in `net`, or None where its outputs are (2,
    classes). The network is left as it was."""
    training, state = net.training, {**dict(net.named_parameters()), **dict(net.named_buffers())}
    net.eval()
    try:
        with torch.no_grad():
            try:
                state = {name: torch.empty_like(x, device="meta") for name, x in state.items()}
                with torch.device("meta"):
                    outputs = torch.func.functional_call(net, state, (torch.empty(2, *shape),))
            except Exception:  # some networks read values of their own
                outputs = net(torch.zeros(2, *shape))
        size = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs)
        if size != (2, classes):
            raise ValueError(f"2 images give {size}, and not (2, {classes})")
    except Exception as error:
        return error
    finally:
        net.train(training)
    return None


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
    options = {"pretrained": False, "num_classes": classes, "in_chans": shape[0]}
    try:
        return timm.create_model(name, **options, img_size=tuple(shape[1:]))
    except TypeError as error:  # networks that take every side have no such argument
        if "img_size" not in str(error):
            raise
    return timm.create_model(name, **options)


def _import(library):
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise Unfit(f"{library}:NAME needs the package {library} ({error}): pip install {library}"
                    ) from error  # fmt: skip
