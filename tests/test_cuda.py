"""The kernels of a GPU, without one: their results in Triton's interpreter (interpreted.py), their
machine code from Triton's compiler, their number and what they move from recorded launches."""

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

import agd_cuda
from agd_cuda import Plan
from architecture import build
from tests.conftest import ROOT, interpreter_fails

triton = pytest.importorskip("triton", reason="Triton is not installed: AGD takes the plain path")


@pytest.mark.skipif(bool(interpreter_fails()), reason=str(interpreter_fails()))
def test_the_kernels_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=ROOT, text=True,
        capture_output=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def kernels(monkeypatch):
    """f(call) -> the kernels, where a launch is call(name, kernel, grid, arguments, constants)."""
    real = agd_cuda._kernels()

    def stand_in(call):
        class Kernel:
            def __init__(self, name):
                self.name = name

            def __getitem__(self, grid):
                kernel = getattr(real, self.name)
                return lambda *xs, **constants: call(self.name, kernel, grid, xs, constants)

        names = ("upload", "squares", "norms", "summarise", "update")
        fake = SimpleNamespace(tl=real.tl, **{name: Kernel(name) for name in names})
        monkeypatch.setattr(agd_cuda, "_kernels", lambda: fake)

    return stand_in


def zero():
    return torch.zeros((), dtype=torch.int64)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", agd_cuda.DTYPES, ids=str)
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
    ws = [torch.zeros(s, dtype=dtype) for s in [(64, 64), (64, 64, 3, 3), (64, 64, 3, 3), (9, 3)]]
    ws[2] = ws[2].to(memory_format=torch.channels_last)
    plan = Plan.of(ws, [1.0] * 4, 1, [0] * 4)
    plan.step([torch.zeros_like(w) for w in ws], [1.0], zero())
    ways = Counter(name for name, _ in code)
    assert ways == {"upload": 1, "squares": 3, "norms": 1, "summarise": 1, "update": 3}
    for step in range(3):  # other addresses and gains, and a plan of another size
        grads = [torch.zeros(w.numel() + 1, dtype=dtype)[1:].view(w.shape) for w in ws]
        plan.step(grads, [[0.0, 0.5, torch.tensor(1.0)][step]], zero())
    ws = [w.clone() for w in ws for _ in range(5)]
    plan = Plan.of(ws, [1.0] * 20, 37, list(range(20)))
    plan.step(ws, [1.0] * 20, zero())
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
        ("resnet18", (3, 32, 32), False, 21, 6, 3, 0.032),
        ("resnet50", (3, 224, 224), False, 54, 8, 7, 0.016),
        ("resnet50", (3, 224, 224), True, 54, 8, 7, 0.001),
    ],
)
def test_launches_and_bytes(
    kernels, arch, shape, channels_last, weights, launches, uploads, partials
):
    """Of a step: how many kernels, how often each element is read or written, and the partial norms
    as a part of the weights' bytes. Of a step with other addresses: the uploads besides."""
    calls, touched, scratch = [], Counter(), set()

    def record(name, kernel, grid, xs, constants):
        calls.append(name)
        if name in ("squares", "update"):
            tiles = xs[1]
            assert grid == (len(tiles),)
            sizes = tiles[:, 4] * (tiles[:, 5] if constants["RUNS"] else 1)
            touched[name] += sizes.sum().item()
        if name == "squares":
            scratch.add(xs[2].numel() * 8)

    kernels(record)
    net = build(arch, shape, 10 if shape[1] == 32 else 1000)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    ws = [w.detach() for w in net.parameters()]
    assert len(ws) == weights
    plan = Plan.of(ws, [1.0] * weights, weights, [0] * weights)
    plan.step(ws, [1.0], zero())
    assert calls.count("upload") == -(-(2 * weights + 1) // 16) == uploads
    calls.clear(), touched.clear()
    plan.step(ws, [1.0], zero())
    assert len(calls) == launches
    # `squares` reads a gradient; `update` reads it again, reads the weight and writes it.
    elements = sum(w.numel() for w in ws)
    assert touched == {"squares": elements, "update": elements}
    assert len(scratch) == 1 and scratch.pop() <= partials * 4 * elements


def test_a_captured_graph_has_addresses_of_its_own(kernels, monkeypatch):
    """While a CUDA graph is captured every address is written, to memory of the graph's own, and
    the table of the steps outside stays as it was."""
    tables = []
    kernels(lambda name, kernel, grid, xs, constants: tables.append((name, xs[0])))
    ws, capturing = [torch.zeros(4, 3)], [True]
    monkeypatch.setattr(agd_cuda, "_capturing", lambda device: capturing[0])
    assert Plan.of(ws, [1.0], 1, [0]) is None
    capturing[0] = False
    plan = Plan.of(ws, [1.0], 1, [0])
    capturing[0] = True
    assert plan.step(ws, [1.0], zero()) is None and not tables  # no kernel is loaded yet
    capturing[0] = False
    for captured, uploads in [(False, 1), (True, 1), (True, 1), (False, 0)]:
        tables.clear()
        capturing[0] = captured
        plan.step(ws, [1.0], zero())
        assert [name for name, _ in tables].count("upload") == uploads
        ours = [table for name, table in tables if name in ("upload", "squares", "update")]
        assert all((table is plan.table) != captured and table is ours[0] for table in ours)
        assert (ws[0] in agd_cuda.CAPTURED) == (captured or uploads == 0)
    # A graph's tables outlive the plan, and last as long as the weights that the graph changes.
    tables = weakref.ref(plan.segments)
    ours.clear()
    del plan
    gc.collect()
    assert tables() is not None
    ws.clear()
    gc.collect()
    assert tables() is None and not agd_cuda.CAPTURED
