"""The kernels of a GPU, without one: their results in Triton's interpreter, their machine code from
Triton's compiler, their number and what they move from recorded launches."""

import gc
import os
import re
import subprocess
import sys
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import agd
import agd_kernels
from agd import AGD
from agd_kernels import cuda
from architecture import build
from tests.conftest import ROOT, interpreter_fails
from tests.test_agd import Reads

triton = pytest.importorskip("triton", reason="Triton is not installed: AGD does without kernels")


@pytest.mark.skipif(bool(interpreter_fails()), reason=str(interpreter_fails()))
def test_the_kernels_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_backends.py",
         "tests/test_properties.py", "tests/test_roles.py::test_a_step_of_every_role"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=ROOT, text=True,
        capture_output=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100


@pytest.fixture
def kernels(monkeypatch):
    """f(call): AGD takes the kernels for the CPU, and a launch is call(name, kernel, grid,
    arguments, constants)."""
    real = cuda._kernels()

    def stand_in(call):
        class Kernel:
            def __init__(self, name):
                self.name = name

            def __getitem__(self, grid):
                kernel = getattr(real, self.name)
                return lambda *xs, **constants: call(self.name, kernel, grid, xs, constants)

        names = ("upload", "squares", "norms", "middle", "update")
        fake = SimpleNamespace(tl=real.tl, **{name: Kernel(name) for name in names})
        monkeypatch.setattr(cuda, "_kernels", lambda: fake)
        monkeypatch.setattr(agd, "_on_host", lambda x: False)
        monkeypatch.setenv("AGD_NO_COMPILER", "0")
        monkeypatch.setattr(agd_kernels, "MODULES", {"cpu": "cuda"})
        monkeypatch.setattr(agd_kernels, "TRUSTED", {torch.device("cpu"): True})

    return stand_in


def weights_like(tensors, offset=0):
    """Weights with gradients of their strides, whose storage begins somewhere."""
    weights = []
    for x in tensors:
        W = torch.nn.Parameter(x)
        flat = torch.zeros(x.numel() + offset, dtype=x.dtype)[offset:]
        W.grad = flat.as_strided(x.shape, x.stride(), offset)
        weights.append(W)
    return weights


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_machine_code(kernels, monkeypatch, tmp_path, capability, dtype):
    """Every kernel of a step compiles, once, whatever changes from step to step; it reads and
    writes 16 bytes at a time, has float64 to the last digit, and rounds to the nearest."""
    from triton.backends.compiler import GPUTarget

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton is set to interpret")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device = SimpleNamespace(
        get_current_device=lambda: capability,  # Triton keeps what it compiled by device
        get_current_stream=lambda index: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    code = {}  # by name and compiled variant

    def compile_only(name, kernel, grid, xs, constants):
        compiled = kernel.warmup(*xs, grid=grid, **constants)
        code[name, compiled.hash] = compiled.asm["ptx"]

    kernels(compile_only)
    driver = triton.runtime.driver
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", device)
    tensors = [torch.zeros(s, dtype=dtype) for s in [(64, 64), (64, 64, 3, 3), (64, 64, 3, 3)]]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    tensors.append(torch.zeros(9, 3, dtype=dtype))
    AGD(weights_like(tensors), fused=True).step()
    ways = Counter(name for name, _ in code)
    assert ways == {"upload": 1, "squares": 3, "norms": 1, "middle": 1, "update": 3}
    for gain in (0.0, 0.5, torch.tensor(1.0)):  # other addresses and gains, and another number
        AGD(weights_like(tensors, offset=1), gain=gain).step()
        AGD(weights_like([x.clone() for x in tensors for _ in range(5)])).step()
    assert Counter(name for name, _ in code) == ways
    wide = "v2.b64" if dtype == torch.float64 else "v4.b32"
    for (name, _), ptx in code.items():
        assert ".local" not in ptx and not re.search(r"(sqrt|lg2|ex2|div)\.(approx|full)", ptx)
        if name in ("squares", "update"):
            loads, stores = (ptx.count(f"{op}.global.{wide}") for op in ("ld", "st"))
            assert loads and stores == (loads // 2 if name == "update" else 0)
        if name == "update" and dtype.itemsize == 2:
            kind = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
            assert re.search(rf"cvt\.rn\.{kind}", ptx)


@pytest.mark.parametrize(
    "arch, shape, channels_last, weights, launches, uploads, partials",
    [
        ("fcn", (3, 32, 32), False, 10, 4, 2, 0.0006),
        ("resnet18", (3, 32, 32), False, 21, 6, 4, 0.032),
        ("resnet50", (3, 224, 224), False, 54, 8, 8, 0.016),
        ("resnet50", (3, 224, 224), True, 54, 8, 8, 0.001),
    ],
)
def test_launches_and_bytes(
    kernels, arch, shape, channels_last, weights, launches, uploads, partials
):
    """Of a step: how many kernels, how often each element is read or written, and the partial norms
    as a part of the weights' bytes. Of the first one: the uploads besides. No number is read."""
    calls, touched, scratch = [], Counter(), set()

    def record(name, kernel, grid, xs, constants):
        calls.append(name)
        if name in ("squares", "update"):
            tiles = xs[-2]
            assert grid == (len(tiles),)
            sizes = tiles[:, 4] * (tiles[:, 5] if constants["RUNS"] else 1)
            touched[name] += sizes.sum()
        if name == "squares":
            scratch.add(xs[2].numel() * 8)

    kernels(record)
    net = build(arch, shape, 10 if shape[1] == 32 else 1000)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    ws = weights_like([w.detach() for w in net.parameters()])
    assert len(ws) == weights
    optimizer = AGD(ws, fused=True)
    optimizer.step()
    assert calls.count("upload") == 2 * -(-weights // 16) == uploads
    calls.clear(), touched.clear()
    with Reads() as reads:
        optimizer.step()
    assert reads.count == 0
    assert len(calls) == launches
    # `squares` reads a gradient; `update` reads it again, reads the weight and writes it.
    elements = sum(w.numel() for w in ws)
    assert touched == {"squares": elements, "update": elements}
    assert len(scratch) == 1 and scratch.pop() <= partials * 4 * elements


def test_a_captured_graph_has_addresses_of_its_own(kernels, monkeypatch):
    """While a CUDA graph is captured every address is written, to memory of the graph's own, and
    the tables of the steps outside stay as they were."""
    uploads, tables = [], []
    kernels(lambda name, kernel, grid, xs, constants: (
        uploads if name == "upload" else tables).append(xs[0]))  # fmt: skip
    capturing = [False]
    monkeypatch.setattr(cuda, "_capturing", lambda device: capturing[0])
    monkeypatch.setattr(agd, "_capturing", lambda x: capturing[0])
    weights, outside = weights_like([torch.zeros(4, 3)]), None
    optimizer = AGD(weights, fused=True)
    for captured, number in [(False, 2), (True, 3), (True, 3), (False, 0)]:
        uploads.clear(), tables.clear()
        capturing[0] = captured
        optimizer.step()
        assert len(uploads) == number
        outside = tables[0] if outside is None else outside
        assert (tables[0] is outside) != captured
        if captured:
            assert all(any(table is x for x in uploads) for table in (tables[0], tables[-1]))
        assert (weights[0] in agd.CAPTURED) == (captured or number == 0)
    tables.clear()
    # What a graph reads outlives the optimiser, and lasts as long as the graph's first weight.
    (part,) = optimizer._parts
    kept = [weakref.ref(x) for x in (part.scales, part.backend.segments)]
    del optimizer, part
    gc.collect()
    assert all(x() is not None for x in kept)
    weights.clear()
    gc.collect()
    assert all(x() is None for x in kept) and not agd.CAPTURED


def test_a_graph_of_other_weights_keeps_nothing(kernels, monkeypatch):
    """Kernels cannot be loaded during a capture: torch's operations take the step, for once."""
    launches = []
    kernels(lambda name, *args: launches.append(name))
    monkeypatch.setattr(agd, "_capturing", lambda x: True)
    (W,) = weights_like([torch.zeros(4, 3)])
    W.grad = torch.ones(4, 3)
    optimizer = AGD([W])
    optimizer.step()
    assert not launches and optimizer._parts is None and (W < 0).all()
    monkeypatch.setattr(agd, "_capturing", lambda x: False)
    optimizer.step()
    assert launches and optimizer._parts is not None
