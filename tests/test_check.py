import errno
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
from data.folders import FolderBatches
from data.workers import SHM
from tests.conftest import ROOT

DIGITS = "--dataset digits --depth 3 --width 16"
SMALL = "--arch fcn --depth 2 --width 8 --image_size 32 --workers 0"
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
    """f(flags), with TMP for the test's folder -> (exit code, what was printed, the faults)."""

    def run(flags):
        flags = f"--out TMP/results --data_dir TMP {flags} --cpu --check"
        capsys.readouterr()
        code = main.main(flags.replace("TMP", str(tmp_path)).split())
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
    main.main([*DIGITS.split(), f"--epochs={epochs}", "--cpu", "--out", str(tmp_path / "results")])
    return tmp_path / "results" / "logs" / f"{LOG}.jsonl"


def folder(change=lambda root: None, **options):
    """(a folder of images with a change, the flags that name it)."""
    return lambda tmp: change(images(tmp / "set", **options)), f"{SMALL} --dataset folder:TMP/set"


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
LAID = [
    (nothing, "--dataset cifar10", "there is no|cifar10.npz|data.prepare"),
    (lambda tmp: flip(prepared(tmp / "cifar10.npz")), "--dataset cifar10",
     "cifar10.npz is damaged|makes it anew"),
    (lambda tmp: prepared(tmp / "cifar10.npz", classes=7), "--dataset cifar10",
     "from 0 to 9"),
    (nothing, f"{SMALL} --dataset folder:TMP/none", "there is no folder|none"),
    (*folder(splits=["train"]), "there is no folder|set/val"),
    (*folder(lambda root: (root / "val/b").rename(root / "val/c")), "class folders: b, c"),
    (*folder(empty_class), "have none: c"),
    (*folder(lambda root: (root / "train/b/1.png").write_bytes(b"no image")),
     "b/1.png|--skip_bad_images"),
    (lambda tmp: images(tmp / "imagenet"), f"{SMALL} --dataset imagenet",
     "2 class folders, not ImageNet's 1,000"),
    (nothing, f"{DIGITS} --train_examples 9999", "1437 images|not 9999"),
    (lambda tmp: (tmp / "file").write_text(""), f"{DIGITS} --out TMP/file",
     "file/logs cannot be written|another --out"),
    (other_width, DIGITS, "of this name|width 17 then, 16 now|--fresh"),
    (lambda tmp: trained(tmp).write_text("{}\n"), DIGITS, "no log of a run|--fresh"),
]  # fmt: skip


@pytest.mark.parametrize(("lay", "flags", "words"), LAID, ids=[words for *_, words in LAID])
def test_a_fault_in_files_is_named_with_its_remedy(lay, flags, words, look, tmp_path):
    lay(tmp_path)
    alone(look(flags), words)


def alone(seen, words):
    """There is this fault, and nothing that follows from it."""
    code, printed, faults = seen
    assert code == 1 and len(faults) == 1, printed
    assert all(word in faults[0] for word in words.split("|")), faults


def free(monkeypatch, disk=None, memory=None, shared=None):
    """Bytes that are free, in the place of the machine's."""
    if disk is not None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, disk))
    if memory is not None:
        monkeypatch.setattr(check.resources, "bytes_free", lambda device: memory)
    if shared is not None:
        real = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda path: (
            Usage(1, 1, shared) if path == SHM else real(path)))  # fmt: skip


def refused_parameter(tmp, monkeypatch):
    def build(shape, classes, depth, width):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes, bias=False))
        net[1].nothing = nn.Parameter(torch.empty(0, 3))
        return net

    monkeypatch.setitem(architecture.NETWORKS, "fcn", build)


def run_going_on(tmp, monkeypatch):
    trained(tmp)
    monkeypatch.lock = open(tmp / "results" / "checkpoints" / f"{LOG}.lock", "a")
    fcntl.flock(monkeypatch.lock, fcntl.LOCK_EX)


def taken_port(tmp, monkeypatch):
    monkeypatch.server = socket.create_server(("", 0))
    monkeypatch.setenv("MASTER_PORT", str(monkeypatch.server.getsockname()[1]))


def no_processes(tmp, monkeypatch):
    def refuse(part, workers):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    images(tmp / "set")
    monkeypatch.setattr(FolderBatches, "start", refuse)


def variables(**values):
    def set_all(tmp, monkeypatch):
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_all


SLURM = {"PROCID": 0, "NTASKS": 2, "LOCALID": 0, "STEP_ID": 0, "NNODES": 1,
         "JOB_ID": f"{os.getpid()}-check"}  # fmt: skip
RANKS = f"{DIGITS} --distribute"
# What is wrong with the machine, the flags, and words of the one fault.
FAULTS = [
    (variables(IMAGENET_PATH="/nowhere"), f"{SMALL} --dataset imagenet",
     "nowhere, which $IMAGENET_PATH names"),
    (lambda tmp, patch: free(patch, disk=1000), DIGITS, "1.0 kB free|checkpoints take|make room"),
    (no_processes, f"{SMALL} --workers 2 --dataset folder:TMP/set",
     "workers|no worker process|ulimit -u|--workers 0"),
    (lambda tmp, patch: free(patch, memory=2_000_000),
     "--dataset digits --width 1000000 --optimizer spectral",
     "does not fit into memory|weights are 32 TB|are free"),
    (variables(RANK=1, WORLD_SIZE=2), DIGITS, "2 processes were started|--distribute"),
    (lambda tmp, patch: free(patch, memory=2_000_000), "--dataset digits --arch vgg",
     "2.0 MB that are free|not even one image"),
    (lambda tmp, patch: free(patch, memory=400_000_000),
     "--dataset digits --arch vgg --train_bs 1000", "400 MB that are free|--micro_bs"),
    (refused_parameter, DIGITS, "the optimiser refuses|1.nothing|no elements"),
    (run_going_on, f"{DIGITS} --epochs 5", "another process is making"),
    (taken_port, RANKS, "MASTER_PORT|cannot be used|choose another"),
    (variables(**{f"SLURM_{name}": x for name, x in SLURM.items()}), RANKS, "ranks|2"),
    (variables(RANK=3, WORLD_SIZE=2, LOCAL_RANK=0), RANKS, "RANK|3|WORLD_SIZE|2"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "flags", "words"), FAULTS, ids=[words for *_, words in FAULTS])
def test_a_fault_of_the_machine_is_named_with_its_remedy(
    make, flags, words, look, tmp_path, monkeypatch
):
    make(tmp_path, monkeypatch)
    alone(look(flags), words)


@pytest.mark.parametrize("flags", [
    DIGITS, "--dataset digits --arch resnet18", "--dataset cifar10 --arch vgg",
    "--dataset cifar10 --optimizer adam", "--dataset cifar10 --arch vgg --optimizer spectral",
    "--dataset npz:own.npz --loss xent", f"{DIGITS} --train_examples 100 --test_examples 10",
    f"{SMALL} --dataset folder:TMP/set", f"{SMALL} --dataset folder:TMP/set --workers 2",
    f"{SMALL} --dataset folder:TMP/bad --skip_bad_images",
    "--dataset folder:TMP/set --arch resnet50 --train_bs 4",
    "--dataset cifar10 --train_bs 100000 --micro_bs 10", RANKS, f"{DIGITS} --out TMP/a/b",
])  # fmt: skip
def test_no_alarm_where_nothing_is_wrong(flags, look, tmp_path):
    for name in ("set", "bad"):
        images(tmp_path / name)
    (tmp_path / "bad/train/b/1.png").write_bytes(b"no image")
    prepared(tmp_path / "cifar10.npz")
    prepared(tmp_path / "own.npz", classes=4)
    code, printed, faults = look(flags)
    assert code == 0 and not faults, printed
    for what in ("data", "network", "results", "memory", "time"):
        assert f"ok     {what}" in printed, what
    assert "nothing was trained" in printed
    assert not list(tmp_path.rglob("*.jsonl")) and not (tmp_path / "a").exists()


def test_workers_whose_batches_find_no_room_are_noted(look, tmp_path, monkeypatch):
    """The run goes on, more slowly."""
    images(tmp_path / "set")
    free(monkeypatch, shared=10)
    code, printed, _ = look(f"{SMALL} --workers 2 --dataset folder:TMP/set")
    assert code == 0 and printed.count(SHM) == 1, printed
    assert "has 10 B free, and the batches of 2 workers may fill 74 kB" in printed


def test_runs_that_are_there_are_no_fault(look, tmp_path):
    log = trained(tmp_path, epochs=2)
    before = log.read_bytes()
    for epochs, words in ((2, "is finished"), (9, "goes on after 2 epochs")):
        code, printed, _ = look(f"{DIGITS} --epochs {epochs}")
        assert code == 0 and words in printed
    assert log.read_bytes() == before


@pytest.mark.parametrize("out, code", [
    pytest.param("new", 0, marks=pytest.mark.slow), ("file", 1),
])  # fmt: skip
def test_ranks_are_looked_at_together(out, code, tmp_path):
    """Printed by one of them, faults included."""
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "main.py", "--check", "--cpu", *RANKS.split(), "--out", str(tmp_path / out),
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
    numbers, pixels = 4 * (16 * 64 + 16 * 16 + 16 * 10), (1437 + 360) * 16 * 16
    monkeypatch.setattr(check.resources, "bytes_an_image", lambda *args: 0.0)
    for least, what in ((3 * disk * numbers, "disk"), (memory * numbers + pixels, "memory")):
        for bytes_free, code in ((least - 1, 1), (least, 0)):
            free(monkeypatch, **{"disk": 10**9, "memory": 10**9, what: bytes_free})
            assert look(f"{DIGITS} --optimizer {optimizer}")[0] == code


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
        assert check.resources.bytes_free(torch.device("cpu"), tmp_path, groups) == free
