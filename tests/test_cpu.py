"""The compiled C: where it comes from, and what it leaves alone in the process."""

import os
import subprocess
import sys

import pytest
import torch

from agd import AGD
from tests.conftest import ROOT

STEP = """
import torch
from agd import AGD
W = torch.ones(200, 200, requires_grad=True)
W.grad = torch.ones(200, 200)
optimizer = AGD([W])
optimizer.step()
assert W[0, 0] < 1
try:
    AGD([W], fused=True)
    print("C")
except ValueError:
    print("torch")
"""


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.setenv("AGD_NO_COMPILER", "0")
    try:
        AGD([torch.zeros(2, 2)], fused=True)
    except ValueError:
        pytest.skip("no C compiler here")


def start(code=STEP, **env):
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def printed(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err, err
    return out.strip()


def test_without_a_compiler_torch_does_it_without_a_word(tmp_path):
    cache = str(tmp_path)
    assert printed(start(CC="/nonexistent", PATH="", XDG_CACHE_HOME=cache)) == "torch"
    assert printed(start(CC="", PATH="", XDG_CACHE_HOME=cache)) == "torch"
    assert printed(start(AGD_NO_COMPILER="1", XDG_CACHE_HOME=cache)) == "torch"
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiler_that_fails_is_passed_over(tmp_path):
    assert printed(start(CC="false", XDG_CACHE_HOME=str(tmp_path))) == "C"
    (library,) = (tmp_path / "agd" / "kernels").iterdir()  # no draft is left
    assert library.suffix == ".so"


def test_processes_that_compile_at_once_share_one_file(tmp_path):
    processes = [start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    assert [printed(x) for x in processes] == ["C", "C"]
    kept = tmp_path / "agd" / "kernels"
    (library,) = kept.iterdir()  # no drafts
    assert kept.stat().st_mode & 0o777 == 0o700
    before = library.stat()
    assert printed(start(XDG_CACHE_HOME=str(tmp_path))) == "C"
    assert library.stat().st_ino == before.st_ino  # not compiled again


@pytest.mark.parametrize("obstacle", ["a file", "open to all"])
def test_without_a_cache_a_temporary_directory_serves(tmp_path, obstacle):
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    temporary.mkdir()
    if obstacle == "a file":
        home.write_text("")
    else:
        (home / "agd" / "kernels").mkdir(parents=True)
        (home / "agd" / "kernels").chmod(0o777)
    assert printed(start(XDG_CACHE_HOME=str(home), TMPDIR=str(temporary))) == "C"
    assert not list(temporary.rglob("*.so"))
    assert not list(home.rglob("*.so"))


def test_the_threads_are_those_of_torch():
    """One OpenMP in the process, and as many threads of it after AGD's step as before."""
    code = """
import os
torch.set_num_threads(2)
torch.randn(2**20).exp()
def state():
    with open("/proc/self/maps") as f:
        return {x.split()[-1] for x in f if "omp" in x}, len(os.listdir("/proc/self/task"))
before = state()
optimizer.step()
assert optimizer._parts[0].backend.plan.threads == 2
assert state() == before, (state(), before)
"""
    assert printed(start(STEP + code)) == "C"
