"""What a network starts from: weights of a file, and frozen parameters."""

import fnmatch
import importlib
import pickle

import torch

from architecture import Unfit
from cli import near

WITHIN = ("net", "state_dict", "model")  # keys of the weights in checkpoints; the first is ours


def start(net, weights=None, frozen=None):
    """Load the file `weights` into `net`, and freeze the parameters that `frozen` names, patterns
    separated by commas. Returns sentences about the loaded tensors. Raises Unfit."""
    notes = [] if weights is None else load_weights(net, weights)
    if frozen is not None:
        freeze(net, frozen.split(","))
    return notes


def freeze(net, patterns):
    """Freeze the parameters whose names match one of `patterns`, as a shell's.

    Raises Unfit for a pattern that matches none, and where nothing is left to train.
    """
    parameters = dict(net.named_parameters())
    for pattern in patterns:
        matches = fnmatch.filter(parameters, pattern)
        if not matches:
            raise Unfit(f"--freeze {pattern} matches none of {_some(parameters)}"
                        f"{near(pattern, parameters)}")  # fmt: skip
        for name in matches:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise Unfit(f"--freeze {','.join(patterns)} leaves no parameter to train")


def load_weights(net, path):
    """Load the tensors of a file whose name and shape fit into `net`. Returns sentences: how many
    fitted, and which did not.

    path: .safetensors, or .pt or .pth, a state dict or a checkpoint that holds one; no code in it
    is run. Tensors of another shape, as a head for other classes, stay as drawn. Raises Unfit where
    the file cannot be read, or no parameter fits.
    """
    tensors, own, parameters = _read(path), net.state_dict(), dict(net.named_parameters())
    other = [name for name in own if name in tensors and tensors[name].shape != own[name].shape]
    fitting = {name: tensors[name] for name in own if name in tensors and name not in other}
    if not parameters.keys() & fitting.keys():
        raise Unfit(f"nothing in {path} fits the network: it has {_some(tensors)}, and the network "
                    f"{_some(parameters)}")  # fmt: skip
    for name, x in fitting.items():
        if not x.isfinite().all():
            raise Unfit(f"{path} has numbers that are not finite in {name}")
    net.load_state_dict(fitting, strict=False)
    kinds = {
        "of another shape there, and drawn anew": other,
        "not there, and drawn anew": [name for name in own if name not in tensors],
        "not in the network": [name for name in tensors if name not in own],
    }
    return [f"{len(fitting)} of {len(own)} tensors are those of {path}",
            *(f"{kind}: {_some(names)}" for kind, names in kinds.items() if names)]  # fmt: skip


def _read(path):
    """The tensors of a file, by name."""
    try:
        if str(path).endswith(".safetensors"):
            content = importlib.import_module("safetensors.torch").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except ImportError as error:
        raise Unfit(f"reading {path} needs a package ({error}): pip install safetensors") from error
    except pickle.UnpicklingError as error:  # torch's message is how to load it all the same
        raise Unfit(f"{path} holds other things than weights, or is damaged") from error
    except Exception as error:  # both packages raise errors of many types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Unfit(f"{path} cannot be read: {lines[0]}") from error
    content = content if isinstance(content, dict) else {}
    content = next((content[x] for x in WITHIN if isinstance(content.get(x), dict)), content)
    tensors = {name: x for name, x in content.items() if isinstance(x, torch.Tensor)}
    if not tensors:
        raise Unfit(f"{path} holds no weights by name")
    wrapped = all(name.startswith("module.") for name in tensors)  # a DistributedDataParallel
    return {name.removeprefix("module.") if wrapped else name: x for name, x in tensors.items()}


def _some(names, most=4):
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
