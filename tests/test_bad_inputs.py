"""What a user may get wrong, and what is said to it: a sentence, and the exit code 2."""

import json
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import main as program
from data import prepare
from runs.checkpoint import pack, unpack
from scripts import experiments, plot, reproduce, scaling
from scripts.benchmark import __main__ as benchmark
from tests.conftest import ROOT

PROGRAMS = {
    "main": program.main, "plot": plot.main, "prepare": prepare.main, "reproduce": reproduce.main,
    "scaling": scaling.main, "experiments": experiments.main, "benchmark": benchmark.main,
}  # fmt: skip
SMALL = "--cpu --depth 2 --width 4 --epochs 1 --train_bs 2 --out {tmp}/out"
DIGITS = f"main --dataset digits {SMALL} --train_bs 64 --train_examples 128 --test_examples 64"
ON = f"{DIGITS} --epochs 3"  # goes on from `ran`
FOLDER = f"main --dataset folder:{{tmp}}/images {SMALL} --image_size 32 --workers 0"
NPZ = f"main --dataset npz:set.npz --data_dir {{tmp}} {SMALL}"
CLASSES = ("cat", "dog")
held = []  # the locks of `locked`


class Case(NamedTuple):
    command: str  # in which {tmp} is the folder that `prepare` is given
    words: str  # of what is said
    prepare: object = lambda tmp: None
    code: int = 2
    marks: object = ()


# What is prepared.


def text(name, content="some text\n"):
    """f(tmp) that writes a file."""

    def write(tmp):
        path = tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def both(*prepares):
    def prepare_all(tmp):
        for each in prepares:
            each(tmp)

    return prepare_all


def images(tmp, splits=("train", "val"), classes=CLASSES):
    for split in splits:
        for name in classes:
            folder = tmp / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 40), (90 * i, 80, 70)).save(folder / f"{i}.jpg")


def changed(change):
    """f(tmp) that lays out images and changes the folder of a class in train/."""

    def prepare_images(tmp):
        images(tmp)
        change(tmp / "images" / "train" / "cat")

    return prepare_images


def bomb(folder):
    """A PNG of 0.2 kB that claims 30,000 x 30,000 pixels."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    png = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(90_001))) + chunk(b"IEND", b"")
    (folder / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)


def circle(folder):
    (folder / "again").symlink_to(folder, target_is_directory=True)


def renamed(folder):
    return (folder / "0.jpg").rename(folder / os.fsdecode(b"\xff\xfe.jpg"))


def unreadable(folder):
    folder.chmod(0)


def arrays(tmp, **changes):
    """set.npz as it should be, but for `changes`; None leaves a key out."""
    of = {}
    for split, n in (("train", 8), ("test", 4)):
        of[f"{split}_images"] = np.zeros((n, 8, 8, 1), np.uint8)
        of[f"{split}_labels"] = np.arange(n) % 2
    np.savez(tmp / "set.npz", **{k: x for k, x in (of | changes).items() if x is not None})


def npz(**changes):
    return lambda tmp: arrays(tmp, **changes)


def cut(tmp):
    arrays(tmp)
    path = tmp / "set.npz"
    path.write_bytes(path.read_bytes()[:-300])


def huge(tmp):
    """An array of a few bytes whose header claims a terabyte."""
    arrays(tmp, train_images=None)
    shape = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**9}, 32, 32, 1), }}"
    head = b"\x93NUMPY\1\0" + struct.pack("<H", len(shape) + 1) + shape.encode() + b"\n"
    with zipfile.ZipFile(tmp / "set.npz", "a") as archive:
        archive.writestr("train_images.npy", head + bytes(64))


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """The folder of a run of two epochs."""
    tmp = tmp_path_factory.mktemp("ran")
    assert run(f"{DIGITS} --epochs 2", tmp) == 0
    return tmp / "out"


def log(out):
    return next((out / "logs").glob("*.jsonl"))


def checkpoint(out):
    return next((out / "checkpoints").glob("*.pt"))


def relogged(change):
    """f(tmp, ran) that changes the lines of the run's log."""

    def prepare_log(tmp, ran):
        out = shutil.copytree(ran, tmp / "out")
        lines = log(out).read_bytes().splitlines(keepends=True)
        log(out).write_bytes(b"".join(change(lines)))

    return prepare_log


def row(**changes):
    """Of the log of a run, the row of the first epoch with `changes`; None takes a key out."""

    def change(lines):
        found = json.loads(lines[1]) | changes
        found = {key: x for key, x in found.items() if x is not None}
        return [lines[0], json.dumps(found).encode() + b"\n", *lines[2:]]

    return relogged(change)


def replaced(which, how):
    """f(tmp, ran) that has `how(path)` put something in the place of the log or checkpoint."""

    def prepare_file(tmp, ran):
        path = which(shutil.copytree(ran, tmp / "out"))
        path.unlink()
        how(path)

    return prepare_file


def recheckpointed(change):
    """f(tmp, ran) that changes the content of the checkpoints, in place or by what it returns."""

    def prepare_checkpoints(tmp, ran):
        newest = checkpoint(shutil.copytree(ran, tmp / "out"))
        for path in newest.parent.glob("*.pt*"):
            content = unpack(path.read_bytes())
            path.write_bytes(pack(change(content) or content))

    return prepare_checkpoints


def torn(tmp, ran):
    newest = checkpoint(shutil.copytree(ran, tmp / "out"))
    for path in newest.parent.glob("*.pt*"):
        path.write_bytes(path.read_bytes()[:-100])


class Canary:
    """Its pickle writes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def forged(tmp, ran):
    newest = checkpoint(shutil.copytree(ran, tmp / "out"))
    newest.with_name(f"{newest.name}.previous").write_bytes(pickle.dumps(Canary(f"{tmp}/canary")))
    newest.write_bytes(pack({"epoch": 1, "net": Canary(f"{tmp}/canary")}))


def of_another_network(tmp, ran):
    shutil.copytree(ran, tmp / "out")
    assert run(f"{DIGITS} --width 5 --out {{tmp}}/wide", tmp) == 0
    # The settings are made to agree: what is left to differ is the network itself.
    here, there = checkpoint(tmp / "out"), checkpoint(tmp / "wide")
    content = unpack(there.read_bytes()) | {"settings": unpack(here.read_bytes())["settings"]}
    for path in here.parent.glob("*.pt*"):
        path.write_bytes(pack(content))


def locked(tmp):
    import fcntl

    assert run(DIGITS, tmp) == 0
    (path,) = (tmp / "out" / "checkpoints").glob("*.lock")
    held.append(open(path))
    fcntl.flock(held[-1], fcntl.LOCK_EX)


posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such files")
no_root = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="nothing is forbidden to root"
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="file names are UTF-8 here")

CASES = {
    # flags
    "an unknown flag": Case(f"{DIGITS} --widht 3", "did you mean --width"),
    "a flag cut short": Case(f"{DIGITS} --epoch 3", "did you mean --epochs"),
    "a flag with =": Case(f"{DIGITS} --trainbs=3", "did you mean --train_bs"),
    "a word": Case("main digits", "no place for digits"),
    "a flag without its value": Case("main --epochs", "--epochs: expected one argument"),
    "no epochs": Case("main --epochs 0", "'0' is not a whole number from 1"),
    "epochs in words": Case("main --epochs many", "'many' is not a whole number"),
    "half an image": Case("main --train_bs 1.5", "'1.5' is not a whole number"),
    "a batch below nothing": Case("main --test_bs -8", "--test_bs: '-8' is not a whole number"),
    "one layer": Case("main --depth 1", "whole number from 2"),
    "a seed beyond 63 bits": Case(f"main --seed {10**19}", "--seed"),
    "digits beyond int()": Case(f"main --epochs {'9' * 5000}", "--epochs"),
    "more layers than anyone has": Case(f"main --depth {10**9}", "from 2 to 10000"),
    "more workers than anyone has": Case(f"main --workers {10**9}", "from 0 to 1024"),
    "a gain that is no number": Case("main --gain nan", "finite"),
    "a gain below 0": Case("main --gain -1", "from 0"),
    "a rate beyond float32": Case("main --optimizer sgd --lr 1e39", "from 0 to 1e+30"),
    "a rate without end": Case("main --optimizer sgd --lr inf", "finite"),
    "no such network": Case("main --arch resnet", "did you mean resnet"),
    "no such set": Case("main --dataset cifar", "did you mean cifar10"),
    "another spelling": Case("main --dataset CIFAR-10", "did you mean cifar10"),
    "no such kind of set": Case("main --dataset folders:/x", "did you mean folder:"),
    "a folder without a name": Case("main --dataset folder:", "folder:PATH"),
    "no such loss": Case("main --loss mes", "did you mean mse"),
    "no such optimiser": Case("main --optimizer adm", "did you mean adam"),
    "no such package": Case("main --optimizer nowhere.Class --dataset digits", "nowhere"),
    "no such class": Case("main --optimizer torch.optim.Adm --dataset digits", "mean Adam"),
    "no optimiser": Case("main --optimizer os.system --dataset digits", "no optimiser"),
    "an optimiser of several passes": Case(
        "main --optimizer torch.optim.LBFGS --dataset digits", "several passes a step"
    ),
    "an optimiser that is none yet": Case(
        f"{DIGITS} --optimizer torch.optim.Optimizer", "does not take these weights"
    ),
    "no module": Case("main --optimizer .SGD --dataset digits", "no optimiser"),
    "AGD as a package": Case("main --optimizer agd.AGD --dataset digits", "--optimizer agd"),
    "no such precision": Case("main --precision fp16", "fp32, tf32, bf16"),
    "a precision of GPUs": Case("main --cpu --precision tf32", "Ampere"),
    "a rate for AGD": Case("main --lr 0.1", "AGD has no learning rate"),
    "a rate for its other rule": Case(
        "main --optimizer spectral --lr 0.1", "SpectralAGD has no learning rate"
    ),
    "the rule by its class": Case(
        "main --optimizer agd.SpectralAGD", "--optimizer spectral is SpectralAGD, with its own"
    ),
    "a gain for Adam": Case("main --optimizer adam --gain 2", "--lr"),
    "two devices": Case("main --cpu --device cuda", "--cpu contradicts"),
    "no such device": Case("main --device gpu", "gpu"),
    "no such GPU": Case("main --device cuda:99", "cuda:99"),
    "a device without memory": Case("main --device meta", "meta"),
    "a side for arrays": Case("main --image_size 64", "folder:PATH"),
    "a graph on a CPU": Case("main --cpu --cuda_graph on", "it takes a CUDA device"),
    "no such mode": Case("main --cuda_graph yes", "auto, on, off"),
    "a part of a folder": Case("main --dataset folder:/x --train_examples 9", "prepared sets"),
    "steps of no epoch": Case("main --log_steps 0", "--log_steps"),
    "saving after 0 steps": Case("main --save_every 0", "neither a number of steps"),
    "saving in words": Case("main --save_every often", "neither a number of steps"),
    "saving in the past": Case("main --save_every=-5m", "neither a number of steps"),
    "saving after no number": Case("main --save_every nanm", "neither a number of steps"),
    "saving after the end of time": Case("main --save_every 1e400h", "neither a number"),
    "no launcher": Case("main --distribute --dataset digits", "torchrun"),
    "more images than there are": Case(f"{DIGITS} --train_examples 99999", "not 99999"),
    # beyond what the machine holds
    "a network of terabytes": Case(f"{DIGITS} --depth 3 --width {10**6}", "does not fit"),
    "batches of exabytes": Case(f"{DIGITS} --train_bs {2**62} --test_bs {2**62}", "", code=0),
    # places
    "data below a file": Case(
        "main --dataset cifar10 --data_dir {tmp}/file", "cifar10", text("file")
    ),
    "no such folder": Case(FOLDER, "there is no folder"),
    "no ImageNet": Case("main --dataset imagenet --data_dir {tmp}/nowhere", "no"),
    "--out is a file": Case(f"{DIGITS} --out {{tmp}}/file", "choose --out", text("file")),
    "--out below a file": Case(f"{DIGITS} --out {{tmp}}/file/x", "choose --out", text("file")),
    "--out of a long name": Case(f"{DIGITS} --out {{tmp}}/{'x' * 256}", "choose --out"),
    "--out behind a broken link": Case(
        f"{DIGITS} --out {{tmp}}/link", "choose --out",
        lambda tmp: (tmp / "link").symlink_to(tmp / "gone"), marks=posix,
    ),
    "--out that is forbidden": Case(
        f"{DIGITS} --out {{tmp}}/shut/out", "choose --out",
        lambda tmp: (tmp / "shut").mkdir(0o500), marks=no_root,
    ),
    "--out with a file called logs": Case(DIGITS, "choose --out", text("out/logs")),
    "a profile below a file": Case(f"{DIGITS} --profile", "--profile", text("out/profiles")),
    "a run that is going on": Case(f"{DIGITS} --epochs 2", "another process", locked, marks=posix),
    # folders of images
    "a file for a folder": Case(FOLDER, "there is no folder", text("images")),
    "no train/": Case(FOLDER, "train", lambda tmp: images(tmp, ["val"])),
    "no val/": Case(FOLDER, "val", lambda tmp: images(tmp, ["train"])),
    "a class without images": Case(
        FOLDER, "ant", changed(lambda folder: (folder.parent / "ant").mkdir())
    ),
    "a single class": Case(FOLDER, "only class", lambda tmp: images(tmp, classes=["cat"])),
    "no class": Case(
        FOLDER, "no folders", both(lambda tmp: images(tmp, ["val"]), text("images/train/x.jpg"))
    ),
    "classes that differ": Case(
        FOLDER, "differ in their class folders: cat, cow",
        changed(lambda folder: folder.rename(folder.with_name("cow"))),
    ),
    "text as an image": Case(
        FOLDER, "0.jpg cannot be decoded",
        changed(lambda folder: (folder / "0.jpg").write_text("not an image")),
    ),
    "an empty image": Case(
        FOLDER, "0.jpg cannot be decoded", changed(lambda folder: (folder / "0.jpg").write_text(""))
    ),
    "half an image file": Case(
        FOLDER, "0.jpg cannot be decoded",
        changed(lambda f: (f / "0.jpg").write_bytes((f / "1.jpg").read_bytes()[:400])),
    ),
    "a PNG that is a bomb": Case(FOLDER, "0.png cannot be decoded", changed(bomb)),
    "nothing but bad images": Case(
        f"{FOLDER} --skip_bad_images", "none of the 4 images",
        both(images, *(text(f"images/train/{c}/{i}.jpg") for c in CLASSES for i in range(2))),
    ),
    "links in a circle": Case(FOLDER, "again is a link", changed(circle), marks=posix),
    "a link to itself": Case(
        FOLDER, "x.jpg cannot be decoded",
        changed(lambda folder: (folder / "x.jpg").symlink_to("x.jpg")), marks=posix,
    ),
    "a broken link": Case(
        FOLDER, "x.jpg cannot be decoded",
        changed(lambda folder: (folder / "x.jpg").symlink_to("gone")), marks=posix,
    ),
    "a pipe": Case(
        FOLDER, "x.jpg cannot be decoded",
        changed(lambda folder: os.mkfifo(folder / "x.jpg")), marks=posix,
    ),
    "a class that is forbidden": Case(FOLDER, "cannot be read", changed(unreadable), marks=no_root),
    "a folder called x.jpg": Case(
        FOLDER, "", changed(lambda folder: (folder / "x.jpg").mkdir()), code=0
    ),
    "a name that is not UTF-8": Case(FOLDER, "", changed(renamed), code=0, marks=linux),
    "a bad image whose name is not UTF-8": Case(
        FOLDER, "\\udcff\\udcfe.jpg cannot be decoded",
        changed(lambda folder: renamed(folder).write_text("")), marks=linux,
    ),
    # arrays
    "no file of arrays": Case(NPZ, "there is no"),
    "text for arrays": Case(NPZ, "set.npz is damaged", text("set.npz")),
    "nothing for arrays": Case(NPZ, "set.npz is damaged", text("set.npz", "")),
    "a folder for arrays": Case(NPZ, "set.npz is damaged", lambda tmp: (tmp / "set.npz").mkdir()),
    "a pipe for arrays": Case(
        NPZ, "set.npz is damaged", lambda tmp: os.mkfifo(tmp / "set.npz"), marks=posix
    ),
    "arrays that are cut": Case(NPZ, "set.npz is damaged", cut),
    "arrays without labels": Case(NPZ, "train_labels", npz(train_labels=None)),
    "objects for labels": Case(NPZ, "train_labels", npz(train_labels=np.array([{}] * 8, object))),
    "images of floats": Case(NPZ, "train_images", npz(train_images=np.zeros((8, 8, 8, 1)))),
    "images without channels": Case(
        NPZ, "train_images", npz(train_images=np.zeros((8, 8, 8), np.uint8))
    ),
    "test images of another side": Case(
        NPZ, "test_images", npz(test_images=np.zeros((4, 9, 9, 1), np.uint8))
    ),
    "too few labels": Case(NPZ, "train_labels", npz(train_labels=np.arange(5) % 2)),
    "labels below 0": Case(NPZ, "train_labels", npz(train_labels=np.arange(8) % 2 - 1)),
    "labels beyond the classes": Case(NPZ, "test_labels", npz(test_labels=np.arange(4))),
    "one label alone": Case(NPZ, "train_labels", npz(train_labels=np.zeros(8, np.int64))),
    "no images in arrays": Case(
        NPZ, "train_images", npz(train_images=np.zeros((0, 8, 8, 1), np.uint8),
                                 train_labels=np.zeros(0, np.int64))
    ),  # fmt: skip
    "an array that claims a terabyte": Case(NPZ, "train_images", huge),
    # checkpoints
    "checkpoints that are cut": Case(ON, "--fresh", torn),
    "a checkpoint that is a program": Case(ON, "--fresh", forged),
    "a checkpoint of another network": Case(ON, "another network", of_another_network),
    "a checkpoint of another seed": Case(
        ON, "seed 7 then, 0 now",
        recheckpointed(lambda x: x | {"settings": x["settings"].replace('"seed": 0', '"seed": 7')}),
    ),
    "a checkpoint of weights alone": Case(ON, "no checkpoint", recheckpointed(lambda x: x["net"])),
    "a checkpoint of a list": Case(ON, "no checkpoint", recheckpointed(lambda x: [1, 2])),
    "a checkpoint of epoch -1": Case(
        ON, "no checkpoint", recheckpointed(lambda x: x | {"epoch": -1})
    ),
    "a checkpoint of too many steps": Case(
        ON, "step 9 of 2", recheckpointed(lambda x: x | {"step": 9})
    ),
    "a checkpoint without its optimiser": Case(
        ON, "another network or optimiser", recheckpointed(lambda x: x | {"optimizer": {}})
    ),
    "a checkpoint whose parts are of other types": Case(
        ON, "another network or optimiser", recheckpointed(lambda x: x | {"net": 3})
    ),
    "a checkpoint with words for numbers": Case(
        ON, "another network or optimiser", recheckpointed(lambda x: x | {"seconds": "many"})
    ),
    "a checkpoint with a batch of words": Case(
        ON, "another network or optimiser", recheckpointed(lambda x: x | {"micro_bs": "x"})
    ),
    "a checkpoint with endless counts": Case(
        ON, "another network or optimiser", recheckpointed(lambda x: x | {"missing": 1e400})
    ),
    "a checkpoint with a generator of another kind": Case(
        ON, "another network or optimiser", recheckpointed(lambda x: x | {"generators": "x"})
    ),
    "a pipe for a checkpoint": Case(ON, "", replaced(checkpoint, os.mkfifo), code=0, marks=posix),
    "a folder for a checkpoint": Case(
        ON, "", replaced(checkpoint, lambda path: path.mkdir()), code=0
    ),
    # logs
    "a log of bytes": Case(
        ON, "--fresh", replaced(log, lambda path: path.write_bytes(bytes(range(256)) * 9))
    ),
    "a folder for a log": Case(ON, "no log of a run", replaced(log, lambda path: path.mkdir())),
    "a pipe for a log": Case(ON, "no log", replaced(log, os.mkfifo), marks=posix),
    "a log of something else": Case(
        ON, "no log of a run", relogged(lambda lines: [b'{"level": "info"}\n'])
    ),
    "a log of numbers": Case(ON, "no log of a run", relogged(lambda lines: [b"1\n", b"2\n"])),
    "a log as deep as the stack": Case(
        ON, "no log of a run", relogged(lambda lines: [b"[" * 100_000 + b"\n"])
    ),
    "a log that is torn": Case(
        ON, "line 2", relogged(lambda lines: [lines[0], lines[1][:20] + b"\n", *lines[2:]])
    ),
    "a log without an epoch's number": Case(ON, "line 2 has no epoch", row(epoch=None)),
    "a log with words for numbers": Case(ON, "for train_loss", row(train_loss="small")),
    "a log without a figure": Case(ON, "line 2 has no seconds", row(seconds=None)),
    "a log that lacks an epoch": Case(
        ON, "lacks epochs", relogged(lambda lines: [lines[0], *lines[2:]])
    ),
    "a log of another seed": Case(
        ON, "seed 7 then, 0 now",
        relogged(lambda lines: [lines[0].replace(b'"seed": 0', b'"seed": 7'), *lines[1:]]),
    ),
    "a log whose last line is torn": Case(
        ON, "", relogged(lambda lines: [*lines[:-1], lines[-1][:20]]), code=0
    ),
    # records
    "replay: no file": Case("main --replay {tmp}/no.json", "no.json"),
    "replay: text": Case("main --replay {tmp}/x.json", "x.json", text("x.json")),
    "replay: bytes": Case("main --replay {tmp}/x.json", "x.json", text("x.json", b"\xff\0" * 9)),
    "replay: JSON of something else": Case(
        "main --replay {tmp}/x.json", "x.json", text("x.json", '{"name": [1, 2]}')
    ),
    "replay: a list": Case("main --replay {tmp}/x.json", "x.json", text("x.json", "[1, 2]")),
    "replay: as deep as the stack": Case(
        "main --replay {tmp}/x.json", "x.json", text("x.json", "[" * 100_000)
    ),
    "replay: a folder": Case("main --replay {tmp}", "TMP"),
    "replay: a pipe": Case(
        "main --replay {tmp}/x.json", "x.json", lambda tmp: os.mkfifo(tmp / "x.json"), marks=posix
    ),
    "replay: a log": Case(
        "main --replay {tmp}/x.jsonl", "x.jsonl",
        lambda tmp, ran: shutil.copyfile(log(ran), tmp / "x.jsonl"),
    ),
    "replay: a record and another flag": Case(
        "main --replay {tmp}/x.json --epochs 3", "--epochs",
        lambda tmp, ran: shutil.copyfile(next(ran.rglob("*.run.json")), tmp / "x.json"),
    ),
    "replay: a record of flags that are none": Case(
        "main --replay {tmp}/x.json", "argument --depth: 'two'",
        lambda tmp, ran: (tmp / "x.json").write_text(
            next(ran.rglob("*.run.json")).read_text().replace('"depth": 2', '"depth": "two"')),
    ),  # fmt: skip
    # the other programs
    "plot: no log": Case("plot {tmp}/no.jsonl", "no.jsonl is no log"),
    "plot: nothing": Case("plot", "required: RUN"),
    "plot: an unknown flag": Case("plot x.jsonl --outptu y", "--outptu"),
    "plot: no picture": Case("plot x.jsonl -o {tmp}/x.gif", ".png, .pdf or .svg"),
    "plot: text": Case("plot {tmp}/x.jsonl", "no log", text("x.jsonl")),
    "plot: a run without epochs": Case(
        "plot {tmp}/x.jsonl", "no finished epoch",
        text("x.jsonl", '{"kind": "run", "flags": {}, "settings": {}}\n'),
    ),
    "plot: a row without figures": Case(
        "plot {tmp}/x.jsonl", "line 2 has no",
        text("x.jsonl", '{"kind": "run", "flags": {}, "settings": {}}\n'
                        '{"kind": "epoch", "epoch": 1}\n'),
    ),  # fmt: skip
    "plot: a run without flags": Case(
        "plot {tmp}/x.jsonl", "does not say its --arch",
        lambda tmp, ran: (tmp / "x.jsonl").write_bytes(b"".join(
            [b'{"kind": "run", "flags": {}, "settings": {}}\n',
             *log(ran).read_bytes().splitlines(keepends=True)[1:]])),
    ),  # fmt: skip
    "plot: nowhere to draw": Case(
        "plot {tmp}/x.jsonl -o {tmp}/no/x.png", "x.png",
        lambda tmp, ran: shutil.copyfile(log(ran), tmp / "x.jsonl"),
    ),
    "prepare: no such set": Case("prepare cifar11", "cifar11"),
    "prepare: nothing": Case("prepare", "required"),
    "prepare: a flag of ImageNet's": Case("prepare cifar10 --resize 64", "--resize is for"),
    "prepare: no such copy": Case(
        "prepare cifar10 --data_dir {tmp} --from {tmp}/no.tar.gz", "there is no"
    ),
    "prepare: text for an archive": Case(
        "prepare cifar10 --data_dir {tmp} --from {tmp}/x.tar.gz", "is not the whole",
        text("x.tar.gz"),
    ),
    "prepare: another set": Case(
        "prepare cifar10 --data_dir {tmp} --from {tmp}/set.npz", "damaged or another", npz()
    ),
    "prepare: into a file": Case(
        "prepare cifar10 --data_dir {tmp}/file --from {tmp}/set.npz", "could not be prepared",
        both(npz(), text("file")),
    ),
    "prepare: no ImageNet": Case(
        "prepare imagenet --data_dir {tmp} --from {tmp}/no", "there is no folder"
    ),
    "prepare: a folder that is not ImageNet": Case(
        "prepare imagenet --data_dir {tmp} --from {tmp}/images", "2 class folders",
        lambda tmp: images(tmp),
    ),
    "reproduce: no such figure": Case("reproduce fig9", "fig9"),
    "reproduce: nothing": Case("reproduce", "required: FIGURE"),
    "reproduce: no time": Case("reproduce fig1 --time_limit soon", "'soon' is no time"),
    "reproduce: no numbers": Case("reproduce fig1 --runs 1,-", "are no numbers"),
    "reproduce: no such name": Case("reproduce fig1 --runs a,b", "no run of that name"),
    "reproduce: no such run": Case(
        "reproduce fig1 --runs 99999 --out {tmp}", "the list has the numbers"
    ),
    "reproduce: into a file": Case("reproduce fig1 --out {tmp}/file", "is a file", text("file")),
    "reproduce: below a file": Case(
        "reproduce fig1 --runs 0 --out {tmp}/file/x", "file/x", text("file")
    ),
    "scaling: no such rate": Case("scaling --images_per_second 1e6", "no time for launches"),
    "benchmark: no such case": Case("benchmark stpe", "invalid choice: 'stpe'"),
    "benchmark: no rounds": Case("benchmark step --repeats 0", "whole number from 1"),
    "benchmark: no such device": Case("benchmark step --device gpu", "no device 'gpu'"),
    "benchmark: no such folder": Case(
        "benchmark data --folder {tmp}/no --device cpu --out {tmp}", "train cannot be read"
    ),
    "experiments: no such scale": Case("experiments half", "half"),
}  # fmt: skip


def run(command, tmp):
    """The exit code of a command, run in this process."""
    name, *words = shlex.split(command.format(tmp=tmp))
    try:
        code = PROGRAMS[name](words)
    except SystemExit as end:
        code = end.code
    if isinstance(code, str):  # as the interpreter does
        print(code, file=sys.stderr)
        return 1
    return code or 0


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=case.marks) for name, case in CASES.items()]
)
def test_what_is_wrong_is_said_in_a_sentence(case, tmp_path, ran, capfd, monkeypatch):
    monkeypatch.delenv("IMAGENET_PATH", raising=False)
    arguments = [tmp_path, ran][: case.prepare.__code__.co_argcount]
    case.prepare(*arguments)
    capfd.readouterr()
    code = run(case.command, tmp_path)
    out, said = capfd.readouterr()
    said = said.replace(str(tmp_path), "TMP")
    assert code == case.code, said
    assert "Traceback" not in out + said and not (tmp_path / "canary").exists()
    if case.code == 0:
        assert "error" not in said
        return
    said = re.sub(r"\n +python [\w. -]+ --help lists the flags\n$", "\n", said)
    *before, sentence = said.strip().splitlines()
    assert sentence.startswith("error: ") and len(sentence) <= 400, sentence
    assert case.words in sentence
    assert all(line.startswith("Looking through") for line in before), said


@pytest.mark.parametrize("words", [("main.py", "digits"), ("-m", "scripts.experiments", "half")])
def test_a_process_ends_with_that_code(words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
