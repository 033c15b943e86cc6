import fcntl
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import architecture
import check
import main
from tests.conftest import ROOT

DIGITS = ["--dataset", "digits", "--depth", "3", "--width", "16"]
SMALL = ["--arch", "fcn", "--depth", "2", "--width", "8", "--image_size", "32", "--workers", "0"]
LOG = "fcn3x16-digits-mse-bs128-agd-seed0"
LAUNCHERS = ("SLURM", "OMPI_", "PMI", "MPI_", "PBS_", "LSB_", "MASTER_", "RANK", "LOCAL_", "WORLD_",
             "TORCHELASTIC_", "IMAGENET_PATH")  # fmt: skip
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(check.resources, "TIMING", 0.1)
    monkeypatch.setattr(check, "MEETING", 2)


@pytest.fixture
def look(tmp_path, capsys):
    """f(*flags) -> (exit code, what was printed, the lines about faults)."""

    def run(*flags):
        flags = [str(x) for x in flags]
        flags += [] if "--out" in flags else ["--out", str(tmp_path / "results")]
        flags += [] if "--data_dir" in flags else ["--data_dir", str(tmp_path)]
        code = main.main([*flags, "--cpu", "--check"])
        printed = capsys.readouterr().out
        return code, printed, [x for x in printed.splitlines() if x.startswith("fault")]

    return run


def images(root, classes=("a", "b"), each=3, splits=("train", "val")):
    for split in splits:
        for name in classes:
            for i in range(each):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(path)
    return root


def prepared(path, classes=10):
    labels = np.arange(20) % classes
    pixels = np.zeros((20, 32, 32, 3), np.uint8)
    np.savez(path, train_images=pixels, train_labels=labels, test_images=pixels,
             test_labels=labels)  # fmt: skip
    return path


def trained(tmp_path, epochs=1):
    main.main([*DIGITS, "--epochs", str(epochs), "--cpu", "--out", str(tmp_path / "results")])
    return tmp_path / "results" / "logs" / f"{LOG}.jsonl"


def folder(change=lambda root: None, **options):
    """(a folder of images with a change, the flags that name it)."""
    return (lambda tmp: change(images(tmp / "set", **options)),
            [*SMALL, "--dataset", "folder:TMP/set"])  # fmt: skip


def flip(path):
    content = bytearray(path.read_bytes())
    content[5000] ^= 255
    path.write_bytes(content)


def empty_class(root):
    for split in ("train", "val"):
        (root / split / "c").mkdir()


def other_width(tmp):
    log = trained(tmp)
    log.write_text(log.read_text().replace('"width": 16', '"width": 17'))


def nothing(tmp):
    """No file is laid."""


# What is laid, the flags, and words of the one fault.
LAID = {
    "nothing prepared": (nothing, ["--dataset", "cifar10"], "there is no|cifar10.npz|data.prepare"),
    "damaged file": (lambda tmp: flip(prepared(tmp / "cifar10.npz")), ["--dataset", "cifar10"],
                     "cifar10.npz is damaged|makes it anew"),
    "class count": (lambda tmp: prepared(tmp / "cifar10.npz", classes=7), ["--dataset", "cifar10"],
                    "do not run from 0 to 9"),
    "no folder": (nothing, [*SMALL, "--dataset", "folder:TMP/none"], "there is no folder|none"),
    "no val/": (*folder(splits=["train"]), "there is no folder|set/val"),
    "other classes": (*folder(lambda root: (root / "val/b").rename(root / "val/c")),
                      "class folders: b, c"),
    "an empty class": (*folder(empty_class), "have none: c"),
    "no image": (*folder(lambda root: (root / "train/b/1.png").write_bytes(b"no image")),
                 "b/1.png|--skip_bad_images"),
    "2 of 1,000 classes": (lambda tmp: images(tmp / "imagenet"), [*SMALL, "--dataset", "imagenet"],
                           "2 class folders, not ImageNet's 1,000"),
    "too many asked for": (nothing, [*DIGITS, "--train_examples", 9999], "1437 images|not 9999"),
    "a file for --out": (lambda tmp: (tmp / "file").write_text(""), [*DIGITS, "--out", "TMP/file"],
                         "file/logs cannot be written|another --out"),
    "other settings": (other_width, DIGITS, "of this name|width 17 then, 16 now|--fresh"),
    "a damaged log": (lambda tmp: trained(tmp).write_text("{}\n"), DIGITS,
                      "no log of a run|--fresh"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAID)
def test_a_fault_in_files_is_named_with_its_remedy(name, look, tmp_path, capsys):
    lay, flags, words = LAID[name]
    lay(tmp_path)
    capsys.readouterr()
    alone(look(*(str(x).replace("TMP", str(tmp_path)) for x in flags)), words)


def alone(seen, words):
    """There is this fault, and nothing that follows from it."""
    code, printed, faults = seen
    assert code == 1 and len(faults) == 1, printed
    assert all(word in faults[0] for word in words.split("|")), faults


def set_all(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# A fault of the machine each: f(tmp_path, monkeypatch) makes it, and returns flags and words.
def no_imagenet_path(tmp_path, monkeypatch):
    set_all(monkeypatch, IMAGENET_PATH=str(tmp_path / "nowhere"))
    return [*SMALL, "--dataset", "imagenet"], "nowhere, which $IMAGENET_PATH names"


def full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 1000))
    return DIGITS, "1.0 kB free|checkpoints take|make room"


def no_shared_memory(tmp_path, monkeypatch):
    images(tmp_path / "set")
    monkeypatch.setattr(check.surroundings, "SHM", str(tmp_path))
    real = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: Usage(1, 1, 10) if p == str(tmp_path) else real(p)
    )
    flags = [*SMALL, "--workers", 2, "--dataset", f"folder:{tmp_path}/set"]
    return flags, "10 B free|2 workers|--shm-size"


def no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(check.resources, "free_memory", lambda device: 2_000_000)
    return ["--dataset", "digits", "--arch", "vgg"], "2.0 MB that are free|not even one image"


def no_memory_for_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(check.resources, "free_memory", lambda device: 400_000_000)
    flags = ["--dataset", "digits", "--arch", "vgg", "--train_bs", 1000]
    return flags, "400 MB that are free|--micro_bs"


def refused_parameter(tmp_path, monkeypatch):
    def build(shape, classes, depth, width):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes, bias=False))
        net[1].nothing = nn.Parameter(torch.empty(0, 3))
        return net

    monkeypatch.setitem(architecture.NETWORKS, "fcn", build)
    return DIGITS, "the optimiser refuses|1.nothing|no elements"


def run_going_on(tmp_path, monkeypatch):
    trained(tmp_path)
    path = tmp_path / "results" / "checkpoints" / f"{LOG}.lock"
    monkeypatch.lock = open(path, "a")
    fcntl.flock(monkeypatch.lock, fcntl.LOCK_EX)
    return [*DIGITS, "--epochs", 5], "another process is making"


def taken_port(tmp_path, monkeypatch):
    monkeypatch.server = socket.create_server(("", 0))
    port = monkeypatch.server.getsockname()[1]
    set_all(monkeypatch, MASTER_PORT=str(port))
    return [*DIGITS, "--distribute"], f"MASTER_PORT {port} cannot be used|choose another"


def rank_missing(tmp_path, monkeypatch):
    job = f"{os.getpid()}-check"
    set_all(monkeypatch, SLURM_PROCID="0", SLURM_NTASKS="2", SLURM_LOCALID="0", SLURM_STEP_ID="0",
            SLURM_NNODES="1", SLURM_JOB_ID=job)  # fmt: skip
    return [*DIGITS, "--distribute"], "ranks|2"


def contradictory_variables(tmp_path, monkeypatch):
    set_all(monkeypatch, RANK="3", WORLD_SIZE="2", LOCAL_RANK="0")
    return [*DIGITS, "--distribute"], "RANK|3|WORLD_SIZE|2"


FAULTS = [
    no_imagenet_path, full_disk, no_shared_memory, no_memory, no_memory_for_the_batch,
    refused_parameter, run_going_on, taken_port, rank_missing, contradictory_variables,
]  # fmt: skip


@pytest.mark.parametrize("make", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_named_with_its_remedy(make, look, tmp_path, monkeypatch, capsys):
    flags, words = make(tmp_path, monkeypatch)
    capsys.readouterr()
    alone(look(*flags), words)


GOOD = {
    "digits": DIGITS,
    "a convolutional network": ["--dataset", "digits", "--arch", "resnet18"],
    "cifar10": ["--dataset", "cifar10", "--arch", "vgg"],
    "adam": ["--dataset", "cifar10", "--optimizer", "adam"],
    "the spectral rule": ["--dataset", "cifar10", "--arch", "vgg", "--optimizer", "spectral"],
    "a file of arrays": ["--dataset", "npz:own.npz", "--loss", "xent"],
    "a part": [*DIGITS, "--train_examples", 100, "--test_examples", 10],
    "a folder": [*SMALL, "--dataset", "folder:SET"],
    "workers": [*SMALL, "--dataset", "folder:SET", "--workers", 2],
    "bad images left out": [*SMALL, "--dataset", "folder:BAD", "--skip_bad_images"],
    "resnet50 at 224": ["--dataset", "folder:SET", "--arch", "resnet50", "--train_bs", 4],
    "micro-batches": ["--dataset", "cifar10", "--train_bs", 100_000, "--micro_bs", 10],
    "a port that is free": [*DIGITS, "--distribute"],
    "a new place": [*DIGITS, "--out", "OUT"],
}


@pytest.mark.parametrize("setup", GOOD)
def test_no_alarm_where_nothing_is_wrong(setup, look, tmp_path):
    images(tmp_path / "set")
    images(tmp_path / "bad")
    (tmp_path / "bad/train/b/1.png").write_bytes(b"no image")
    prepared(tmp_path / "cifar10.npz")
    prepared(tmp_path / "own.npz", classes=4)
    places = {"SET": "set", "BAD": "bad", "OUT": "a/b"}
    flags = [str(x) for x in GOOD[setup]]
    for name, place in places.items():
        flags = [x.replace(name, str(tmp_path / place)) for x in flags]
    code, printed, faults = look(*flags)
    assert code == 0 and not faults, printed
    assert "nothing was trained" in printed
    for what in ("data", "network", "results", "memory", "time"):
        assert f"ok     {what}" in printed, what
    assert not list(tmp_path.rglob("*.jsonl")) and not (tmp_path / "a").exists()


def test_runs_that_are_there_are_no_fault(look, tmp_path, capsys):
    log = trained(tmp_path, epochs=2)
    before = log.read_bytes()
    code, printed, _ = look(*DIGITS, "--epochs", 2)
    assert code == 0 and "is finished" in printed
    code, printed, _ = look(*DIGITS, "--epochs", 9)
    assert code == 0 and "goes on after 2 epochs" in printed
    assert log.read_bytes() == before


@pytest.mark.parametrize("out, code", [
    pytest.param("new", 0, marks=pytest.mark.slow), ("file", 1),
])  # fmt: skip
def test_ranks_are_looked_at_together(out, code, tmp_path):
    """Printed by one of them, faults included."""
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "main.py", "--check", "--distribute", "--cpu", *DIGITS, "--out", str(tmp_path / out),
         "--train_bs", "1"], cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.stdout.count("2 ranks, started by torchrun, 2 of them on this node") == 1
    assert (done.returncode == 0) == (code == 0), done.stderr
    assert done.stdout.count("note   ranks    --train_bs 1 is the batch of all the 2 ranks") == 1
    assert done.stdout.count("file/logs cannot be written") == code


@pytest.mark.parametrize("optimizer, disk, memory", [
    ("agd", 1, 4), ("adam", 3, 4), ("spectral", 4, 5),
])  # fmt: skip
def test_what_an_optimiser_keeps_is_counted(optimizer, disk, memory, look, monkeypatch):
    """Checkpoints of so many numbers a weight, three of them, and so many in a step: with the
    gradients, of the spectral rule with what it keeps and its directions."""
    numbers = 4 * (16 * 64 + 16 * 16 + 16 * 10)
    spaces = {3 * disk * numbers - 1: 1, 3 * disk * numbers: 0}
    for free, code in spaces.items():
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(1, 1, free))
        assert look(*DIGITS, "--optimizer", optimizer)[0] == code
    monkeypatch.setattr(check.resources, "bytes_an_image", lambda *args: 0.0)
    pixels = (1437 + 360) * 16 * 16
    for free, code in {memory * numbers + pixels - 1: 1, memory * numbers + pixels: 0}.items():
        monkeypatch.setattr(check.resources, "free_memory", lambda device, free=free: free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 10**9))
        assert look(*DIGITS, "--optimizer", optimizer)[0] == code


def test_the_bytes_of_an_image_are_those_that_backward_keeps():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1000, bias=False), nn.ReLU(),
                        nn.Linear(1000, 10, bias=False)).to("meta")  # fmt: skip
    # the inputs, the activations (once: relu keeps its result), the outputs' difference
    assert check.resources.bytes_an_image(net, "mse", (1, 8, 8)) == 1.25 * 4 * (64 + 1000 + 10)


def test_control_groups_of_both_versions_limit_memory(tmp_path):
    v2, v1 = tmp_path / "job/step", tmp_path / "memory/job"
    for at, names, most, now, cache in (
        (v2, ("memory.max", "memory.current", "inactive_file"), 900, 500, 100),
        (v2.parent, ("memory.max", "memory.current", "inactive_file"), "max", 500, 100),
        (v1, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), 80, 50, 7),
    ):
        at.mkdir(parents=True, exist_ok=True)
        (at / names[0]).write_text(f"{most}\n")
        (at / names[1]).write_text(f"{now}\n")
        (at / "memory.stat").write_text(f"anon 3\n{names[2]} {cache}\n")
    groups = tmp_path / "cgroup"
    for text, free in (("0::/job/step\n", 900 - 500 + 100), ("3:cpu:/x\n5:memory:/job\n", 37)):
        groups.write_text(text)
        assert check.resources.free_memory(torch.device("cpu"), tmp_path, groups) == free
