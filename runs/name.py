"""The name of a run, and the settings that shape its result."""

import os
import re
import zlib
from decimal import Decimal
from pathlib import Path

from runs.provenance import data_sha256


def name_and_settings(args):
    """The run's name, and the settings that shape its result: runs that agree in them have the same
    weights after the same epoch, up to rounding, and, where there is batch norm without --sync_bn,
    up to the number of ranks and micro-batches."""
    keys = ["arch", "dataset", "loss", "train_bs", "optimizer", "lr", "gain", "seed", "image_size"]
    keys += ["train_examples", "test_examples", "skip_bad_images"]
    keys += (["depth", "width"] if args.arch == "fcn" else [])
    settings = {key: getattr(args, key) for key in keys}
    if args.sync_bn:
        settings["sync_bn"] = True
    if args.precision != "fp32":
        settings["precision"] = args.precision
    for key in ("bias", "affine", "layers", "freeze"):
        if getattr(args, key) is not None:
            settings[key] = getattr(args, key)
    if args.weights is not None:  # wherever they lie
        settings["weights"] = data_sha256(args.weights)["sha256"]
    arch, dataset = args.arch, args.dataset
    if dataset.startswith("folder:"):  # its last part, for people, and what tells paths apart
        dataset = f"{os.path.basename(dataset)}_{zlib.crc32(dataset.encode()):08x}"
    if dataset.startswith("npz:"):  # its checksums are settings, wherever it lies
        file = os.path.basename(dataset[len("npz:") :])
        settings["dataset"], dataset = f"npz:{file}", f"npz_{file.removesuffix('.npz')}"
    name = run_name(
        f"{arch}{args.depth}x{args.width}" if arch == "fcn" else arch.replace(":", "_"),
        "bias" if args.bias else None,
        "affine" if args.affine else None,
        None if args.weights is None else f"from_{Path(args.weights).stem}",
        None if args.freeze is None else f"freeze_{args.freeze}",
        dataset,
        args.image_size,
        None if args.train_examples is None else f"train{args.train_examples}",
        None if args.test_examples is None else f"test{args.test_examples}",
        args.loss,
        f"bs{args.train_bs}",
        args.optimizer,
        args.layers,
        None if args.gain == 1 else f"gain{decimal(args.gain)}",
        None if args.lr is None else f"lr{decimal(args.lr)}",
        f"seed{args.seed}",
        "skip" if args.skip_bad_images else None,
        "syncbn" if args.sync_bn else None,
        None if args.precision == "fp32" else args.precision,
        {None: None, "all": "steps"}.get(args.log_steps, f"steps{args.log_steps}"),
        "updates" if args.log_updates else None,
    )
    return name, settings


def decimal(x):
    """A float without an exponent: 1e-05 as 0.00001."""
    return format(Decimal(repr(x)), "f")


def run_name(*parts):
    """A file name for every system from words and numbers; None is left out."""
    parts = [str(part) for part in parts if part is not None]
    words = [re.sub(r"[^A-Za-z0-9.+]+", "_", part).strip("_.") for part in parts]
    name = "-".join(words)
    # What was replaced or cut still tells runs apart; systems allow 255 bytes with the suffix.
    if words != parts or len(name) > 120:
        name = f"{name[:110]}-{zlib.crc32(repr(parts).encode()):08x}"
    return name
