"""The runs that are broken: small networks, short epochs, checkpoints every few steps."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, TRAIN, VAL, SIDE = ("a", "b", "c"), 40, 20, 40  # images a class, pixels
SAVE_EVERY = "3"  # steps


@dataclass
class Case:
    """A command of main.py, but for --out and --save_every."""

    name: str
    flags: tuple
    epochs: int
    steps: int  # an epoch


def make_cases(workers, images):
    """The cases; those of a folder, `images`, with each number of workers."""
    small = ("--arch", "fcn", "--depth", "3", "--width", "64")
    folder = ("--dataset", f"folder:{images}", "--image_size", "32", "--train_bs", "16")
    cases = [
        Case(f"folder, {n} workers", (*small, *folder, "--workers", str(n), "--log_steps"), 15, 8)
        for n in workers
    ]
    digits = ("--dataset", "digits", "--log_updates")
    few = ("--train_examples", "64", "--test_examples", "32", "--train_bs", "16")
    return [
        *cases,
        Case("digits", (*small, *digits), 40, 12),
        Case("digits, adam", (*small, *digits, "--optimizer", "adam"), 40, 12),
        Case("digits, spectral", (*small, *digits, "--optimizer", "spectral"), 40, 12),
        Case("digits, batch norm", ("--arch", "resnet18", "--dataset", "digits", *few), 3, 4),
    ]


def make_images(root, seed):
    """A folder of images, train/ and val/, JPEG and PNG, of noise that differs by class."""
    rng = np.random.default_rng(seed)
    for split, number in (("train", TRAIN), ("val", VAL)):
        for level, name in enumerate(CLASSES):
            folder = Path(root, split, name)
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(level * 40, level * 40 + 160, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}.{'png' if i % 2 else 'jpg'}")
