"""What a network starts from: weights of a file, and frozen parameters."""

import fnmatch
import importlib
import json
import pickle
import re
from contextlib import suppress

import torch

from architecture import GPTS, Unfit
from architecture.gpt import GPT
from cli import near

WITHIN = ("net", "state_dict", "model")  # keys of the weights in checkpoints; the first is ours
WRAPPED = ("module.", "_orig_mod.")  # before all names: DistributedDataParallel, torch.compile
SHARD = r"-\d{5}-of-(?!0*1\.)\d{5}\.\w+"  # at the end of the name that transformers gives one
LETTERS = 1000  # a vocabulary of more is of parts of words; a size within 2 % is the same, padded


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

    path: .safetensors, or .pt, .pth or .bin, a state dict or a checkpoint that holds one; no code
    in it is run. Tensors of another shape, as a head for other classes, stay as drawn. A GPT takes
    GPT-2 as transformers and nanoGPT save it. Raises Unfit where the file cannot be read, or no
    parameter fits.
    """
    (tensors, heads), own, parameters = _read(path), net.state_dict(), dict(net.named_parameters())
    notes = []
    if isinstance(net, GPT):
        tensors, notes = _of_gpt(net, tensors, heads, path)
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
    return [f"{len(fitting)} of {len(own)} tensors are those of {path}", *notes,
            *(f"{kind}: {_some(names)}" for kind, names in kinds.items() if names)]  # fmt: skip


def _of_gpt(net, tensors, heads, path):
    """(the tensors of a GPT-2's file as those of `net`, sentences about what was changed). heads:
    those that the file says it was trained with, or None.

    transformers' blocks have their weights as (in, out), with the causal masks beside them. A
    square weight does not show which way it lies; that of query, key and value does, for all. A
    part of a model is refused: its weights of blocks may be without one, or all others drawn.
    Files without a head have the embedding for one. Of the positions the first are taken. A
    vocabulary that was padded gets the mean row for each new token: it then takes at most the mean
    probability (Hewitt 2021, "Initializing new word embeddings for pretrained language models").
    Drawn rows would be far likelier than GPT-2's own, whose logits are -30 and below.
    """
    tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    tensors = {name: x for name, x in tensors.items()
               if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name)}  # fmt: skip
    notes, own, width, ours = [], net.state_dict(), net.wpe.embedding_dim, net.h[0].attn.heads
    qkv = [x for name, x in tensors.items() if re.fullmatch(r"h\.\d+\.attn\.c_attn\.weight", name)]
    matrices = [name for name, x in tensors.items()
                if re.fullmatch(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight", name) and x.ndim == 2]
    if matrices and not qkv or re.search(f"{SHARD}$", str(path)):
        raise Unfit(f"{path} has a part of a model: save it as one file, as by transformers' "
                    "save_pretrained with a larger max_shard_size")  # fmt: skip
    if qkv and qkv[0].ndim == 2:
        there, usual = min(qkv[0].shape), max(1, min(qkv[0].shape) // 64)
        if there != width:
            known = f"{usual} where it is GPT-2's" if heads is None else heads
            raise Unfit(f"{path} has depth {len(qkv)} and width {there}, and the network "
                        f"{len(net.h)} and {width}: give --depth {len(qkv)} --width {there}, and "
                        f"its --heads, {known}")  # fmt: skip
        if heads not in (None, ours):
            raise Unfit(f"{path} has {heads} heads, and the network {ours}: give --heads {heads}")
        if heads is None and ours != usual:
            notes.append(f"{path} does not say how many heads it was trained with: the network has "
                         f"{ours}, a GPT-2 of this width {usual}")  # fmt: skip
        if qkv[0].shape == (width, 3 * width):
            tensors |= {name: tensors[name].mT for name in matrices}
    if "lm_head.weight" not in tensors and "wte.weight" in tensors:
        tensors["lm_head.weight"] = tensors["wte.weight"]
    for name in ("wpe.weight", "wte.weight", "lm_head.weight"):
        x, (rows, _) = tensors.get(name), own[name].shape
        if x is None or x.ndim != 2 or x.shape[1] != width or len(x) == rows:
            continue
        if name == "wpe.weight" and len(x) < rows:
            raise Unfit(f"{path} has positions for a context of {len(x)}, not of {rows}: give "
                        f"--context {len(x)} at most")  # fmt: skip
        least = min(len(x), rows)
        if name != "wpe.weight" and (least < LETTERS or abs(len(x) - rows) > least // 50):
            continue  # another vocabulary
        if len(x) < rows:
            notes.append(f"{name} has {rows - len(x)} rows more, each the mean of those there")
            mean = x.mean(0, keepdim=True, dtype=torch.float32)
            x = torch.cat([x, mean.expand(rows - len(x), -1)])
        else:
            notes.append(f"{name} is cropped, to the first {rows} of {len(x)} rows")
        tensors[name] = x[:rows]
    both = [tensors.get(name) for name in ("wte.weight", "lm_head.weight")]
    if net.lm_head.weight is net.wte.weight and both[0] is not None:
        if both[1].shape == net.wte.weight.shape and not torch.equal(*both):
            raise Unfit(f"the head of {path} is not its embedding: give --tied off")
    return tensors, notes


def _read(path):
    """(the tensors of a file, by name; the heads of attention that it says they have, or None)."""
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
    heads = _heads(content)
    content = next((content[x] for x in WITHIN if isinstance(content.get(x), dict)), content)
    tensors = {name: x for name, x in content.items() if isinstance(x, torch.Tensor)}
    if not tensors:
        raise Unfit(f"{path} holds no weights by name")
    while prefix := next((x for x in WRAPPED if all(n.startswith(x) for n in tensors)), None):
        tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors, heads


def _heads(content):
    """The heads of attention that a checkpoint of nanoGPT, or of ours, says it has, or None."""
    heads = None
    with suppress(KeyError, TypeError, ValueError, RecursionError):
        if "model_args" in content:
            heads = content["model_args"]["n_head"]
        else:
            settings = json.loads(content["settings"])
            heads = settings.get("heads") or GPTS[settings["arch"]].heads
    return heads if type(heads) is int else None


def _some(names, most=4):
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
