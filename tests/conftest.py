import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

pytest.register_assert_rewrite("tests.program")

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT.parent / "shared" / "data"  # real images, where a checkout has them beside it


def with_norms(*args, **sizes):
    """A small network with batch norm for the digits; stands in for main.py's `build`."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3, bias=False), torch.nn.BatchNorm2d(6, affine=False),
        torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(216, 16, bias=False),
        torch.nn.BatchNorm1d(16, affine=False), torch.nn.Linear(16, 10, bias=False),
    )  # fmt: skip


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """f(name, ...) -> a data directory with those sets of real images; skips where they are not."""
    out = tmp_path_factory.mktemp("samples")

    def lay_out(*names):
        if not (SAMPLES / "unpack.py").exists():
            pytest.skip(f"the sample images ({', '.join(names)}) are not beside this checkout")
        subprocess.run(
            [sys.executable, str(SAMPLES / "unpack.py"), str(out), *names],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return out

    return lay_out


@pytest.fixture(scope="session")
def noise(tmp_path_factory):
    """A data directory with a few images of noise, sorted by class."""
    path, rng = tmp_path_factory.mktemp("data"), numpy.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (100, 32, 32, 3), dtype=numpy.uint8)
        arrays[f"{split}_labels"] = numpy.repeat(numpy.arange(10), 10)
    numpy.savez(path / "cifar10.npz", **arrays)
    return path


@pytest.fixture
def replays(monkeypatch):
    """Have main() train by stand-ins for CUDA graphs. Returns a list with an item a replay."""
    replays = []

    def record(work):
        return lambda: (replays.append(1), work())

    monkeypatch.setattr("flags.no_graph", lambda args: None)
    monkeypatch.setattr("training.cuda_graph.cuda_recorder", lambda: record)
    # Adam counts on the device in a graph, and not on a CPU.
    monkeypatch.setattr("training.trainer.set_capturable", lambda *args: None)
    return replays


@pytest.fixture(autouse=True)
def as_many_threads():
    """Restore torch's number of threads, which changes the last digits."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def run_main(tmp_path):
    """f(*flags, **options) -> a finished `python main.py ...` in a process of its own."""

    def run(*flags, out=tmp_path, env=None, cwd=ROOT, timeout=300, launcher=()):
        command = [sys.executable, *launcher, str(ROOT / "main.py"), "--out", str(out)]
        return subprocess.run(
            [*command, *map(str, flags)], cwd=cwd, timeout=timeout, text=True,
            capture_output=True, env={**os.environ, **(env or {})},
        )  # fmt: skip

    return run


# Triton's interpreter before the first version fails with NumPy from the second on.
INTERPRETERS = {(3, 3): (2, 0), (3, 7): (2, 5)}


def interpreter_fails():
    """The reason why Triton's interpreter cannot work here, or None."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed: AGD does without kernels"
    mine, numpys = (tuple(map(int, x.__version__.split(".")[:2])) for x in (triton, numpy))
    for least, first in INTERPRETERS.items():
        if mine < least and numpys >= first:
            return (f"the interpreter of Triton {triton.__version__} fails with NumPy "
                    f"{numpy.__version__}: it takes Triton {'.'.join(map(str, least))}")
    return None
