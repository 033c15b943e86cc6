"""Worker processes on a machine that has too little for them."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError, load, workers
from tests.conftest import ROOT

FLAGS = ["--cpu", "--depth", "2", "--width", "8", "--train_bs", "4", "--test_bs", "4"]


@pytest.fixture
def pictures(tmp_path):
    """A folder of images of two classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def data(pictures):
    """f(workers) -> the Data of `pictures`, whose workers end with the test."""
    opened = []

    def open_data(workers):
        opened.append(load(f"folder:{pictures}", "", 4, 4, torch.device("cpu"), image_size=32,
                           workers=workers))  # fmt: skip
        return opened[-1]

    yield open_data
    for data in opened:
        for part in data[:2]:
            part.close()


class Part:
    """Stands in for the batches of a folder: a system that has `most` processes for it."""

    size, batch_size, examples, closed = 1, 4, 9, 0

    def __init__(self, most, number, wanted=8):
        self.most, self.number, self.workers = most, number, wanted

    def start(self, workers):
        if workers > self.most:
            raise OSError(self.number, os.strerror(self.number))

    def close(self, kill=False):
        self.closed += 1


@pytest.mark.parametrize("number, remedy", [
    (errno.EMFILE, "ulimit -n"), (errno.ENFILE, "ulimit -n"), (errno.EAGAIN, "ulimit -u"),
    (errno.EAGAIN, "ulimit -v"), (errno.ENOMEM, "memory"), (errno.ENOSPC, "--shm-size"),
])  # fmt: skip
def test_fewer_workers_where_the_system_has_no_more(number, remedy, monkeypatch):
    monkeypatch.setattr(workers, "_raise_limit", lambda: False)
    first, second = Part(8, number), Part(3, number)
    (note,) = workers.start([first, second], (3, 8, 8), 1)
    assert "2 of 8 --workers" in note and remedy in note
    assert first.workers == second.workers == 2 and first.closed == 2
    with pytest.raises(DataError, match=f"no worker process.*{remedy}.*--workers 0"):
        workers.start([Part(0, number)], (3, 8, 8), 1)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSYS, errno.ENOENT])
def test_no_workers_without_a_place_for_their_locks(number):
    with pytest.raises(DataError, match=f"{os.strerror(number)}; /dev/shm.*--workers 0"):
        workers.start([Part(4, number)], (3, 8, 8), 1)


def test_a_lower_limit_of_descriptors_is_raised_as_far_as_it_may_be(data):
    """In a child: fewer workers than wanted only where it may not."""
    for change, most in (("soft", 8), ("both", 4)):
        pid = os.fork()
        if pid == 0:
            try:
                opened = len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 20
                hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                low = opened + 70
                resource.setrlimit(
                    resource.RLIMIT_NOFILE, (low, hard if change == "soft" else low)
                )
                few = data(8)
                notes = few.start()
                right = (not notes) == (change == "soft") and few.train.workers <= most
                right &= sum(len(labels) for part in few[:2] for _, labels in part) == 24
                for part in few[:2]:
                    part.close()
                os._exit(0 if right else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, change


def test_as_many_workers_as_were_asked_for_are_no_warning(data):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert data(workers.usable_cores() + 1).start() == []
    assert not [x for x in caught if "DataLoader" in str(x.message)]


@pytest.mark.parametrize("limit", [30, 36])
def test_the_check_finds_the_workers_that_the_run_does(limit, pictures):
    """Of a limit of descriptors; a run that is refused leaves nothing behind."""
    printed, codes = [], []
    for more in ((), ("--check",)):
        process = run(pictures, "--workers", "2", "--epochs", "1", *more,
                      before=["bash", "-c", f'ulimit -n {limit}; exec "$@"', "x"])  # fmt: skip
        printed.append(process.communicate(timeout=100)[0])
        codes.append(process.returncode)
    found = [re.findall("o worker process can|No more than 1 of 2", text) for text in printed]
    assert found[0] == found[1], printed
    assert (codes, (pictures / "out").exists()) in (([2, 1], False), ([0, 0], True))


def test_batches_without_room_in_shared_memory_go_through_pipes(data, monkeypatch):
    """To the same numbers."""
    def no_room(images):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    whole = list(data(0).train)
    monkeypatch.setattr("data.folders.default_collate", no_room)
    several = data(2)
    assert several.start() == []
    for (x, y), (x2, y2) in zip(whole, several.train, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert several.train.unshared == 3


@pytest.mark.parametrize("fault", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
@pytest.mark.parametrize("processes", [0, 1])
def test_what_the_machine_lacks_is_no_fault_of_an_image(fault, processes, data, monkeypatch):
    """It is not left out with --skip_bad_images."""
    def decode(path):
        raise fault

    monkeypatch.setattr("data.folders.decode", decode)
    few = data(processes)
    few.train.skip_bad_images = True
    with pytest.raises(workers.WorkerError, match="png cannot be read here.*--workers"):
        list(few.train)
    assert not few.train.bad_images


@pytest.mark.parametrize("error, words", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "was killed"),
    (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "was killed"),
    (ConnectionRefusedError(111, "Connection refused"), "was killed"),
    (EOFError(), "was killed"),
    (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
    (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
    (RuntimeError("shapes cannot be multiplied"), None), (ValueError("x"), None),
    (DataError("Too many open files"), None),
])  # fmt: skip
def test_what_follows_from_a_lost_worker_is_one_sentence(error, words):
    found = workers.lost(error)
    assert (found is None) == (words is None)
    assert words is None or (words in str(found) and "--workers" in str(found))


def run(pictures, *flags, before=()):
    """A run of `pictures` in a process of its own."""
    return subprocess.Popen(
        [*before, sys.executable, "main.py", *FLAGS, "--dataset", f"folder:{pictures}",
         "--image_size", "32", "--out", str(pictures / "out"), *flags], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_killed_worker_ends_the_run_with_a_sentence(pictures):
    process, end = run(pictures, "--workers", "2", "--epochs", "10000"), time.monotonic() + 60
    saved = pictures / "out" / "checkpoints"
    try:
        while time.monotonic() < end and not list(saved.glob("*.pt")):
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        began = time.monotonic()
        printed = process.communicate(timeout=40)[0]
        assert time.monotonic() - began < 20
    finally:
        process.kill()
    assert process.returncode == 1 and "Traceback" not in printed, printed
    assert len(re.findall("Stopped: a process that decodes images was killed", printed)) == 1
    assert list(saved.glob("*.pt"))


def mounted(size):
    """The words before a command that give it a /dev/shm of that size."""
    return ["unshare", "-m", "bash", "-c",
            f'mount -t tmpfs -o size={size} tmpfs /dev/shm; exec "$@"', "x"]  # fmt: skip


@pytest.mark.parametrize("size, code, words", [
    ("60k", 2, "error: no worker process can be started .*--shm-size"),
    pytest.param("200k", 0, "had no room in /dev/shm", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_small_shared_memory(size, code, words, pictures):
    if subprocess.run([*mounted("1m"), "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount anything")
    flags = ["--workers", "2", "--epochs", "1", "--image_size", "224"]
    process = run(pictures, *flags, before=mounted(size))
    printed = process.communicate(timeout=100)[0]
    assert process.returncode == code and "Traceback" not in printed, printed
    assert re.search(words, printed), printed
