"""The name of a run, and the settings that shape its result."""

import os
import re
import zlib
from decimal import Decimal
from pathlib import Path

from runs.provenance import data_sha256

SHAPING = ("arch", "dataset", "loss", "train_bs", "optimizer", "lr", "gain", "seed", "image_size",
           "train_examples", "test_examples", "skip_bad_images")  # fmt: skip
SIZED = ("fcn", "gpt", "gpt2")  # networks whose depth and width are settings
# settings that a run without them does not have: they came later
LATER = ("sync_bn", "precision", "bias", "affine", "layers", "freeze", "augment", "heads",
         "context", "dropout", "tied", "epoch_steps", "vocab", "weight_decay",
         "schedule", "warmup")  # fmt: skip
# the parts of a name, in order: flag -> (its form, the value for which it is left out)
PARTS = {
    "arch": ("{}", ""), "heads": ("heads{}", None), "context": ("context{}", None),
    "tied": ("{}", None), "bias": ("{}", None), "affine": ("{}", None),
    "dropout": ("dropout{}", 0), "weights": ("from_{}", None), "freeze": ("freeze_{}", None),
    "dataset": ("{}", ""), "image_size": ("{}", None), "augment": ("augment_{}", "default"),
    "vocab": ("vocab{}", None), "train_examples": ("train{}", None),
    "test_examples": ("test{}", None), "loss": ("{}", ""), "train_bs": ("bs{}", ""),
    "epoch_steps": ("epoch{}", None), "optimizer": ("{}", ""), "layers": ("{}", None),
    "gain": ("gain{}", 1), "lr": ("lr{}", None), "weight_decay": ("decay{}", None),
    "schedule": ("{}", "constant"), "warmup": ("warmup{}", None), "seed": ("seed{}", ""),
    "skip_bad_images": ("skip", False), "sync_bn": ("syncbn", False), "precision": ("{}", "fp32"),
    "log_steps": ("steps{}", None), "log_updates": ("updates", False),
}  # fmt: skip


def name_and_settings(flags):
    """(name, settings) of a run; `flags` is a dict of all of main.py's, by name.

    Runs that agree in the settings have the same weights after the same epoch, up to rounding, and,
    where there is dropout, or batch norm without --sync_bn, up to the number of ranks and of
    micro-batches.
    """
    sized = flags["arch"] in SIZED
    keys = (*SHAPING, "depth", "width") if sized else SHAPING
    settings = {key: flags[key] for key in keys}
    settings |= {key: flags[key] for key in LATER if flags[key] != PARTS[key][1]}
    words, dataset = dict(flags), flags["dataset"]
    if sized:
        between = "_" if flags["arch"][-1].isdigit() else ""
        words["arch"] = "{arch}{0}{depth}x{width}".format(between, **flags)
    for key in ("tied", "bias", "affine"):
        words[key] = f"{'' if flags[key] else 'no'}{key}"
    words["arch"] = words["arch"].replace(":", "_")
    if flags["schedule"] != "constant":  # which ends with the run: a longer one is another
        settings["epochs"] = flags["epochs"]
        words["schedule"] = "{schedule}{epochs}".format(**flags)
    if flags["weights"] is not None:  # wherever they are
        settings["weights"] = data_sha256(flags["weights"])["sha256"]
        words["weights"] = Path(flags["weights"]).stem
    kind, _, place = dataset.partition(":")
    if kind in ("folder", "tokens"):  # its last part, for people, and a sum that tells paths apart
        last = os.path.basename(place)
        settings["dataset"] = f"{kind}:{last}"
        words["dataset"] = f"{last}_{zlib.crc32(dataset.encode()):08x}"
    if kind in ("npz", "text"):  # its checksums are settings
        settings["dataset"] = wherever(dataset)
        words["dataset"] = settings["dataset"].replace(":", "_").removesuffix(".npz")
    for key in ("gain", "lr", "weight_decay"):  # without an exponent: 1e-05 as 0.00001
        words[key] = words[key] if flags[key] is None else format(Decimal(repr(flags[key])), "f")
    if flags["log_steps"] == "all":
        words["log_steps"] = ""
    parts = [form.format(words[key]) for key, (form, off) in PARTS.items() if flags[key] != off]
    return run_name(*parts), settings


def wherever(dataset):
    """A --dataset without the place of its files: "folder:", "tokens:", "npz:FILE", "text:FILE", or
    the name that it is."""
    kind, colon, path = dataset.partition(":")
    return kind + colon + (os.path.basename(path) if kind in ("npz", "text") else "")


def run_name(*parts):
    """A file name for every system from strings."""
    words = [re.sub(r"[^A-Za-z0-9.+]+", "_", part).strip("_.") for part in parts]
    name = "-".join(words)
    # What was replaced or cut still tells runs apart; systems allow 255 bytes with the suffix.
    if words != [*parts] or len(name) > 120:
        name = f"{name[:110]}-{zlib.crc32(repr([*parts]).encode()):08x}"
    return name
