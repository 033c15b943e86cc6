"""Windows, macOS and Apple's GPUs, as far as Linux can stand in for them: what they lack and refuse
is gone, by tests/windows/sitecustomize.py and tests/pretended.py."""

import ast
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from agd import AGD, SpectralAGD, depth, init_weights
from flags import parse
from runs.name import name_and_settings, run_name
from tests.conftest import ROOT
from tests.pretended import MPS, pretended_mps
from tests.program import QUICK, call, comparable, equal, only, rows, same, train, weights
from training.control import STOP

LONGEST = ".best.pt.partial"  # what a run appends to its name
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.I)
TEXTS = {"read_text", "write_text", "open", "fdopen"}
BINARY = {"archive", "gzip", "Image", "io", "os", "tarfile", "webbrowser", "zipfile"}  # their open


# Windows.


@pytest.fixture
def windows(tmp_path):
    """f(*words, code) -> what a Python of a Windows without a compiler and git prints."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CC", "AGD_NO_COMPILER")
    } | {"PYTHONPATH": str(ROOT / "tests" / "windows"), "PYTHONIOENCODING": "cp1252",
         "PATH": str(tmp_path), "HOME": str(tmp_path / "home")}  # fmt: skip

    def run(*words, code=0):
        done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        printed = done.stdout.decode("cp1252")
        assert done.returncode == code and "Traceback" not in printed, printed
        return printed

    run.environment = environment
    return run


@pytest.mark.slow
def test_a_run_on_windows_is_that_of_linux(windows, tmp_path, monkeypatch):
    """It resumes, is checked, drawn and replayed, without compiled kernels."""
    monkeypatch.setenv("AGD_NO_COMPILER", "1")
    flags, out = [*QUICK, "--cpu", "--keep_best"], tmp_path / "out"
    windows("main.py", *flags, "--out", out, "--epochs", "2")
    assert "Going on after epoch 2" in windows("main.py", *flags, "--out", out)
    assert train(*flags, "--out", tmp_path / "here") == 0
    same(out, tmp_path / "here")
    assert "No fault found" in windows("main.py", *flags, "--check", "--out", tmp_path / "new")
    windows("-m", "scripts.plot", out, "-o", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    (record,) = out.glob("logs/*.run.json")
    printed = windows("main.py", "--replay", record, "--cpu", "--out", tmp_path / "again")
    assert "The same bits" in printed
    assert b"\r" not in b"".join(path.read_bytes() for path in out.glob("logs/*"))


@pytest.mark.slow
def test_workers_are_spawned_on_windows(windows, tmp_path, monkeypatch):
    """And files have names in other letters. The batches are those of a single process."""
    monkeypatch.setenv("AGD_NO_COMPILER", "1")
    rng, out = np.random.default_rng(0), tmp_path / "out"
    for i, place in enumerate(4 * ["train/katze", "train/ハト", "val/katze", "val/ハト"]):
        folder = tmp_path / "größer" / place
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        image.save(folder / f"{i} ü.png")
    flags = ["--dataset", f"folder:{tmp_path / 'größer'}", "--depth", "2", "--width", "8", "--cpu",
             "--image_size", "32", "--train_bs", "4", "--epochs", "2"]  # fmt: skip
    windows("main.py", *flags, "--workers", "1", "--out", out)
    assert train(*flags, "--workers", "0", "--out", tmp_path / "here") == 0
    name = only(out)
    assert equal(weights(out, name), weights(tmp_path / "here", name))


@pytest.mark.slow
def test_a_text_is_prepared_and_trained_on_on_windows(windows, tmp_path):
    """Token files are the same bytes: none has the line ends of Windows, nor its encoding."""
    (tmp_path / "grün.txt").write_bytes("Grüße, η × 2\n".encode() * 300)
    prepare = ["-m", "data.prepare", "text", "--from", tmp_path / "grün.txt", "--encoding", "bytes"]
    windows(*prepare, "--jobs", "1", "--data_dir", tmp_path / "there")
    subprocess.run([sys.executable, *prepare, "--data_dir", tmp_path / "here"], cwd=ROOT,
                   check=True, capture_output=True)  # fmt: skip
    there, here = (sorted((tmp_path / x / "grün-bytes").iterdir()) for x in ("there", "here"))
    assert [path.name for path in there] == [path.name for path in here]
    for one, other in zip(there, here):
        if one.suffix == ".bin":
            assert one.read_bytes() == other.read_bytes()
    flags = ["--arch", "gpt", "--depth", "1", "--width", "16", "--heads", "2", "--context", "16",
             "--epochs", "1", "--epoch_steps", "3", "--cpu", "--out", tmp_path / "out"]  # fmt: skip
    windows("main.py", "--dataset", f"tokens:{there[0].parent}", *flags)
    assert windows("-m", "scripts.sample", next((tmp_path / "out" / "logs").glob("*.jsonl")),
                   "--tokens", "9").strip()  # fmt: skip


STOPPING = """
import os, sys, time
from pathlib import Path
from scripts.runner import Process

out = Path(sys.argv[1])
def saved(number):
    return (out / str(number)).glob("checkpoints/*.pt")
runs = [Process([*sys.argv[2:], "--out", str(out / str(i))], out / f"{i}.txt", os.environ)
        for i in range(2)]
end = time.monotonic() + 200
while not all(any(saved(i)) for i in range(2)) and time.monotonic() < end:
    time.sleep(0.1)
runs[0].stop()
print(runs[0].wait())
runs[1].kill()
print(runs[1].poll() is not None)
"""


@pytest.mark.slow
def test_a_runner_stops_its_runs_on_windows(windows, tmp_path):
    """By Ctrl-Break, after which a run saves and exits with 130; or at once."""
    printed = windows("-c", STOPPING, tmp_path, *QUICK, "--epochs", "100000", "--cpu")
    assert printed.split() == ["130", "True"]
    end = rows(tmp_path / "0")[-1]
    assert end["kind"] == "end" and end["stopped"] == "interrupted"


# Names of files.


def valid(name):
    """Whether Windows, too, has a file of the name of a run, with all that a run appends to it."""
    return (re.fullmatch(r"[A-Za-z0-9.+_-]*", name) and not RESERVED.match(f"{name}.")
            and len((name + LONGEST).encode()) <= 255)  # fmt: skip


FLAGS = st.fixed_dictionaries({}, optional={
    "--dataset": st.one_of(
        st.sampled_from(["digits", "shakespeare"]),
        st.builds("{}:{}".format, st.sampled_from(["npz", "folder", "text", "tokens"]),
                  st.text(min_size=1).filter(lambda x: "\0" not in x))),
    "--arch": st.sampled_from(["fcn", "gpt", "timm:vit.in1k", "torchvision:vgg11"]),
    "--optimizer": st.sampled_from(["agd", "spectral", "adam", "torch.optim.NAdam"]),
    "--lr": st.floats(1e-300, 1e300).map(str), "--gain": st.floats(0, 1e300).map(str),
    "--seed": st.integers(0, 2**63).map(str), "--weights": st.just(str(ROOT / "data/digits.npz")),
})  # fmt: skip


@given(FLAGS)
@settings(deadline=None, max_examples=200)
def test_names_of_runs_are_names_on_every_system(given):
    flags = vars(parse([])) | {key.removeprefix("--"): value for key, value in given.items()}
    flags |= {key: float(flags[key]) for key in ("lr", "gain") if flags[key] is not None}
    assert valid(name_and_settings(flags)[0])


@given(st.lists(st.text(), min_size=2))
@settings(deadline=None)
def test_names_of_anything_are_names_on_every_system(parts):
    assert valid(run_name("fcn", *parts))


def test_runs_whose_names_differ_in_case_alone_are_kept_apart(tmp_path, capsys):
    """Windows and macOS take the file of one for that of the other, which is refused by its
    settings."""
    flags = ["--cpu", "--depth", "2", "--width", "8", "--epochs", "1"]
    rng = np.random.default_rng(0)
    names = []
    for folder, name in (("a", "Set"), ("b", "set")):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / f"{name}.npz", **{
            f"{part}_{what}": x for part in ("train", "test") for what, x in (
                ("images", rng.integers(0, 256, (8, 8, 8), np.uint8)),
                ("labels", np.arange(8) % 2))})  # fmt: skip
        data = ["--dataset", f"npz:{tmp_path / folder / name}.npz"]
        assert train(*flags, *data, "--out", tmp_path / folder) == 0
        names.append(only(tmp_path / folder))
    assert names[0] != names[1] and names[0].lower() == names[1].lower()
    for path in list((tmp_path / "a").glob("*/*")):
        if path.name.startswith(names[0]):
            path.rename(path.with_name(path.name.replace(names[0], names[1])))
    before = (tmp_path / "a" / "logs" / f"{names[1]}.jsonl").read_bytes()
    capsys.readouterr()
    assert train(*flags, *data, "--epochs", "2", "--out", tmp_path / "a") == 2
    assert "is of another run of this name (dataset" in capsys.readouterr().err
    assert (tmp_path / "a" / "logs" / f"{names[1]}.jsonl").read_bytes() == before


# Encodings.


def test_texts_are_opened_with_their_encoding():
    """Which is another one on Windows, where nobody says so."""
    wrong = []
    for path in ROOT.glob("**/*.py"):
        if path.relative_to(ROOT).parts[0] in ("tests", ".venv", "build"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and not named(node):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def named(call):
    """Whether a call names an encoding, or needs none."""
    options = {x.arg: x.value for x in call.keywords}
    if "encoding" in options:
        return True
    if any(getattr(options.get(x), "value", None) is True for x in ("text", "universal_newlines")):
        return False
    name = getattr(call.func, "id", getattr(call.func, "attr", None))
    of = getattr(getattr(call.func, "value", None), "id", None)
    if name not in TEXTS or name == "open" and of in BINARY:
        return True
    modes = [x.value for x in [*call.args, *options.values()] if isinstance(x, ast.Constant)]
    return any(isinstance(x, str) and re.fullmatch("[rwax]?b[+]?|[rwax][+]?b", x) for x in modes)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437"])
@pytest.mark.parametrize("words", [
    pytest.param(["main.py", "--help"]), pytest.param(["-m", "scripts.reproduce", "--help"]),
    *[pytest.param(x, marks=pytest.mark.slow) for x in (
        ["main.py", *QUICK, "--cpu", "--epochs", "1", "--out"],
        ["main.py", *QUICK, "--cpu", "--check", "--out"],
        ["-m", "scripts.reproduce", "all", "--list", "--out"], ["-m", "scripts.suite", "--list"])],
], ids=" ".join)  # fmt: skip
def test_screens_of_other_encodings_show_every_command(words, encoding, tmp_path):
    """Where they have no letter, its escape. No file is opened in an encoding of the system's."""
    words = [*words, tmp_path] if words[-1] == "--out" else words
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONWARNDEFAULTENCODING": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    printed = done.stdout.decode(encoding)
    assert done.returncode == 0 and "Traceback" not in printed, printed
    assert not re.search(rf"{re.escape(str(ROOT))}\S*: EncodingWarning", printed), printed


# Apple's GPUs, which have no float64.


def trained(optimizer, device, **options):
    """A network with weights of every role, its start and its optimiser, after a few steps."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(9, 6), nn.Unflatten(1, (1, 4)), nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 5),
    ).to(device)  # fmt: skip
    x, y = torch.randint(9, (16, 4)).to(device), torch.randint(5, (16,)).to(device)
    init_weights(net, torch.Generator().manual_seed(0))
    start = [p.detach().clone() for p in net.parameters()]
    init_weights(net, inputs=x)
    used = optimizer(net, **options)
    for _ in range(20):  # until the gradients have been looked at
        used.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        used.step()
    return net, start, used, x


def here(x):
    return getattr(x, "inner", x).detach()


@pytest.mark.parametrize("optimizer", [AGD, SpectralAGD])
def test_optimisers_work_on_a_device_without_float64(optimizer):
    """They start from the weights of the CPU, to the bit, and agree with it to float32's rounding;
    a state goes from one to the other."""
    net, start, used, _ = trained(optimizer, "cpu", gain=0.5)
    with pretended_mps():
        net_there, start_there, used_there, x = trained(optimizer, MPS, gain=torch.tensor(0.5))
        assert used_there.eta.device.type == "mps" and used_there.eta.dtype == torch.float32
        assert used_there.L == used.L and int(used_there.skipped) == 0
        assert abs(used_there.eta.item() / used.eta.item() - 1) < 1e-3
        assert sum(depth(net_there, x).values()) == used.L
        used_there.load_state_dict(used.state_dict())
        used.load_state_dict(used_there.state_dict())
        if optimizer is SpectralAGD:
            assert used_there.clock()[0].item() == pytest.approx(used.clock()[0].item(), 1e-5)
            used_there.eval(), used_there.train()
    for p, q in zip(start, start_there):
        assert torch.equal(p, here(q))
    for p, q in zip(net.parameters(), net_there.parameters()):
        assert torch.allclose(p, here(q), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("flags", [
    ["--optimizer", "agd"], ["--optimizer", "spectral"],
    ["--dataset", "shakespeare", "--arch", "gpt", "--depth", "1", "--width", "16", "--heads", "2",
     "--context", "16", "--epoch_steps", "12", "--test_examples", "16"],
], ids=["agd", "spectral", "text"])  # fmt: skip
def test_a_run_on_a_device_without_float64(flags, tmp_path):
    """It goes on there in the middle of an epoch that began on the CPU, and back."""
    flags = [*QUICK, "--epochs", "2", "--log_steps", "--log_updates", *flags]
    assert train(*flags, "--cpu", "--out", tmp_path / "here") == 0
    there = [*flags, "--out", tmp_path / "there"]
    assert call(*there, "--cpu", asked={3: STOP})[0] == 130
    with pretended_mps():
        assert call(*there, "--device", "mps", asked={8: STOP})[0] == 130
    assert train(*there, "--cpu") == 0
    one, other = (comparable(rows(tmp_path / x)) for x in ("here", "there"))
    losses = [[row["loss"] for row in x if row["kind"] == "step"] for x in (one, other)]
    assert len(losses[0]) == 24 and np.allclose(*losses, rtol=1e-2)
    resumed = [change["device"] for change in other[0]["resumed"]]
    assert resumed == ["mps"]  # and the CPU is what it began on
