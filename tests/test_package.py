"""What `pip install` makes of this repository: files, version, types, README's lines there."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import agd
from tests.conftest import ROOT

INSTALLED = {"agd/__init__.py": "agd.py", "agd/py.typed": "py.typed"} | {
    name: name for name in (
        "agd_kernels/__init__.py", "agd_kernels/cpu.c", "agd_kernels/cpu.py", "agd_kernels/cuda.py")
}  # fmt: skip
SOURCES = {*INSTALLED.values(), "pyproject.toml", "hatch_build.py", "README.md", "LICENSE"}
# README's lines, each block followed by steps of training.
USE = """
import math, sys, torch, agd, agd_kernels.cpu as kernels

assert all(x.__file__.startswith(sys.prefix) for x in (agd, kernels)), agd.__file__
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
batches = [(torch.randn(16, 8), torch.randint(2, (16,))) for _ in range(3)]
for block in sys.argv[2:]:
    exec(block)
    if isinstance(optimizer, agd.SpectralAGD):  # a block may end with eval()
        optimizer.train()
    for x, y in batches:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        assert math.isfinite(optimizer.eta) and optimizer.eta > 0
if sys.argv[1] == "compiled":
    agd.AGD(net, fused=True).step()
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with the sdist, and the wheel that is built of it, by what this Python has."""
    pytest.importorskip("hatchling", reason="what builds wheels")
    out = tmp_path_factory.mktemp("built")
    build = [sys.executable, "-m", "hatchling", "build", "-d", out, "-t"]
    subprocess.run([*build, "sdist"], cwd=ROOT, check=True, capture_output=True)
    shutil.unpack_archive(next(out.glob("*.tar.gz")), out)
    (source,) = (path for path in out.iterdir() if path.is_dir())
    subprocess.run([*build, "wheel"], cwd=source, check=True, capture_output=True)
    return out


def test_the_sdist_has_what_the_wheel_is_built_of(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        for name in SOURCES:
            content = archive.extractfile(f"{path.name.removesuffix('.tar.gz')}/{name}").read()
            assert content == (ROOT / name).read_bytes(), name
    assert names - SOURCES == {"PKG-INFO", ".gitignore"}


def test_the_wheel_has_the_optimisers_as_a_typed_package(built):
    """Of a module alone, type checkers would read no hints."""
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == {*INSTALLED}
        for name in names:
            assert archive.read(name) == (ROOT / INSTALLED[name]).read_bytes(), name
        (metadata,) = [x for x in archive.namelist() if x.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
        assert any(x.endswith("licenses/LICENSE") for x in archive.namelist())
    required = re.findall("^Requires-Dist: (.*)$", text, re.M)
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.6"]
    assert re.search("^Version: (.*)$", text, re.M)[1] == agd.__version__


def environment(folder, beside):
    """The interpreter of a new environment, `beside` the packages of this Python or without any."""
    venv.create(folder, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if beside:
        own = run(python, "-c", "import site; print(site.getsitepackages()[0])").strip()
        paths = [path for path in sys.path if path.endswith("-packages")]
        Path(own, "more.pth").write_text("\n".join(paths), encoding="utf-8")
    return python


def pip(python, *words):
    return subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet",
                           *words], capture_output=True, text=True)  # fmt: skip


@pytest.fixture(scope="module", params=["this torch", "a new torch"])
def python(request, built, tmp_path_factory):
    """The interpreter of an environment in which the wheel is installed, and mypy."""
    pytest.importorskip("mypy")
    folder, beside = tmp_path_factory.mktemp("environment"), request.param == "this torch"
    python, (wheel,) = environment(folder, beside), built.glob("*.whl")
    done = pip(python, "--no-deps" if beside else "mypy", wheel)
    if not beside and done.returncode and "CI" not in os.environ:
        pytest.skip(f"pip cannot install torch: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    yield python
    shutil.rmtree(folder)  # gigabytes, with torch


def run(python, *words):
    """The output of a Python that has nothing from this checkout or its environment's variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([python, *words], cwd=Path(python).parent, text=True, env=clean,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_the_lines_of_readme_train_where_the_wheel_is_installed(python):
    """With compiled kernels where there is a compiler."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    compiled = sys.platform == "linux" and compiler and not os.environ.get("AGD_NO_COMPILER")
    printed = run(python, "-c", USE, "compiled" if compiled else "", *blocks)
    assert len(blocks) == 3 and "6 parameters, L = 2" in printed


@pytest.mark.slow
def test_type_checkers_see_what_is_installed(python):
    strict = ["--strict", "--python-version", "3.10", "--cache-dir", os.devnull]
    assert "no issues" in run(python, "-m", "mypy", *strict, ROOT / "tests" / "typed.py")


@pytest.mark.slow
def test_the_public_face_is_typed():
    """Of agd.py, by [tool.mypy] of pyproject.toml."""
    pytest.importorskip("mypy")
    done = subprocess.run([sys.executable, "-m", "mypy", "--cache-dir", os.devnull], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_an_editable_install_is_the_checkout(tmp_path):
    pytest.importorskip("hatchling", reason="what installs")
    python = environment(tmp_path, beside=True)
    assert pip(python, "--no-deps", "--no-build-isolation", "-e", ROOT).returncode == 0
    code = "import agd, agd_kernels as k; print(agd.__file__, k.__file__, sep='\\n')"
    places = run(python, "-c", code).splitlines()
    assert places == [str(ROOT / "agd.py"), str(ROOT / "agd_kernels" / "__init__.py")]
