"""The plans for a GPU, rehearsed on a CPU, and what a check that goes wrong costs the others."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch

from scripts import gpu_checks
from scripts.gpu_checks import PLANS, Check
from tests.conftest import ROOT, interpreter_fails
from tests.test_gpu import worst

HANG = """-c '"{folder}"; import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(99)'"""
SLOW = "-c 'import time; time.sleep(99)'"
CRASH = "-c 'import ctypes; ctypes.string_at(0)'"
RAISE = "-c 'import sys; sys.stderr.write(\"x\" * 9000 + \"the reason\"); raise ValueError'"
FINE = """-c 'open("{folder}/a.jsonl", "w").write("no log"); open("{folder}/b.json", "w").write(
"{{\\"ratios\\": {{\\"a / b\\": 1.5}}}}"); print("done")'"""
LOG = """open("{folder}/run.jsonl", "w").write(
"{{\\"kind\\": \\"run\\", \\"flags\\": {{}}, \\"settings\\": {{}}, \\"cuda_graph\\": true}}\\n"
"{{\\"kind\\": \\"epoch\\", \\"epoch\\": 1, \\"train_loss\\": 1, \\"train_acc\\": 0, "
"\\"test_loss\\": 1, \\"test_acc\\": 0, \\"eta_mean\\": 1, \\"seconds\\": 2}}\\n")"""
STOP = """-c '"{long}"; import time; %s
try: time.sleep(99)
except KeyboardInterrupt: raise SystemExit(130)'"""
TIME_UP = """-c '"--time_limit {long}"; %s; print("%s"); raise SystemExit(75)'"""


def results(out):
    """(What was found, the names of the files in the archive), both whole."""
    with tarfile.open(out / "gpu_checks.tgz") as archive:
        files = [x for x in archive if x.isfile()]
        assert all(len(archive.extractfile(x).read()) == x.size for x in files)
    names = {x.name.removeprefix("./") for x in files}
    return json.loads((out / "gpu_checks.json").read_text()), names


def test_a_plan_is_rehearsed_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "scripts.gpu_checks", "--plan", "first", "--device", "cpu",
               "--budget", "0.1"]  # fmt: skip
    where = ["--work", tmp_path / "work", "--out", tmp_path / "out"]
    done = subprocess.run([*command, *where], cwd=ROOT, capture_output=True, text=True)
    found, names = results(tmp_path / "out")
    assert list(found) == [check.name for check in PLANS["first"][1]], done.stdout
    bad = {name: x for name, x in found.items() if x["status"] not in ("passed", "stopped")}
    # A machine that is busy with other things may take a run's time away, and nothing else.
    assert all(x["status"] == "timeout" for x in bad.values()), bad
    assert done.returncode == bool(bad), done.stdout + done.stderr
    assert found["machine"]["found"]["device"] == "cpu"
    if not interpreter_fails():
        assert found["kernels"]["found"]["largest relative difference"] < 1e-5
    assert found["graphs"]["found"]["fcn"]["largest difference"] == 0
    run = "resnet18-cifar10-mse-bs128-agd-seed0"
    assert found["resnet18"]["found"][run]["epoch"] == 2
    assert len(found["fig5"]["found"]) == 16 and len(found["fig7"]["found"]) == 12
    assert len(found["fig1"]["found"]) == 4
    assert f"resnet18/logs/{run}.jsonl" in names and "fig5/output.txt" in names
    assert not [name for name in names if name.endswith((".pt", ".npz", ".tgz", ".partial"))]


@pytest.fixture
def plan(monkeypatch):
    """f(Checks) makes them the first plan, of a minute."""

    def set_plan(*checks, seconds=60):
        monkeypatch.setitem(PLANS, "first", (seconds, list(checks)))
        monkeypatch.setattr(gpu_checks, "ALL", {check.name: check for check in checks})
        for name, value in (("LEAST", 3), ("GRACE", 2), ("BEGAN", time.monotonic())):
            monkeypatch.setattr(gpu_checks, name, value)

    return set_plan


def call(out, *flags):
    return gpu_checks.main(["--device", "cpu", "--work", str(out), *flags])


def test_what_hangs_crashes_or_raises_costs_the_others_nothing(plan, tmp_path, capfd):
    plan(Check("hang", 1, HANG), Check("slow", 1, SLOW), Check("crash", 1, CRASH),
         Check("raise", 1, RAISE), Check("stop", 1, STOP % LOG), Check("idle", 1, STOP % "0"),
         Check("up", 1, TIME_UP % (LOG, "")), Check("broken", 1, TIME_UP % (LOG, "x failed: y")),
         Check("short", 1, FINE.replace('print("done")', "raise SystemExit(130)")),
         Check("fine", 15, FINE), seconds=30)  # fmt: skip
    assert call(tmp_path) == 1
    found, names = results(tmp_path)
    assert {name: x["status"] for name, x in found.items()} == {
        "hang": "timeout", "slow": "timeout", "crash": "failed", "raise": "failed",
        "stop": "stopped", "idle": "timeout", "up": "stopped", "broken": "failed",
        "short": "failed", "fine": "passed",
    }  # fmt: skip
    assert found["stop"]["found"]["run"]["cuda_graph"] and not found["idle"]["found"]
    assert found["hang"]["code"] in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert found["hang"]["seconds"] < found["hang"]["budget"] + 2 + 3
    assert "KeyboardInterrupt" in found["slow"]["output"]
    assert found["crash"]["code"] in (-signal.SIGSEGV, 128 + signal.SIGSEGV)
    assert "Segmentation fault" in found["crash"]["output"]
    assert "string_at" in found["crash"]["output"]  # where it was
    assert "the reason" in found["raise"]["output"] and len(found["raise"]["output"]) == 2000
    assert found["fine"]["found"] == {"ratios": {"a / b": 1.5}} and found["fine"]["output"] == ""
    assert {"fine/b.json", "crash/output.txt"} <= names
    told = capfd.readouterr().out
    assert "Not well or not run: hang, slow, crash, raise, idle, broken, short" in told


def test_what_is_left_of_the_time_is_the_others_until_it_is_up(plan, tmp_path, capfd):
    plan(Check("fine", 30, FINE), Check("stop", 5, STOP % LOG), Check("late", 1, FINE), seconds=7)
    assert call(tmp_path, "--budget", "0.5") == 1
    found, _ = results(tmp_path)
    # Of twelve seconds, which a CPU gives three checks, one gets what another leaves; then less is
    # left than the last one has to have.
    assert 8 < found["stop"]["budget"] <= 10 and list(found) == ["fine", "stop"]
    assert "Not well or not run: late" in capfd.readouterr().out


def test_the_same_command_goes_on_with_what_failed_last(plan, tmp_path, capfd):
    plan(Check("bad", 1, RAISE), Check("fine", 1, FINE))
    assert call(tmp_path) == 1
    plan(Check("bad", 1, FINE), Check("fine", 1, RAISE), Check("new", 1, FINE))
    capfd.readouterr()
    assert call(tmp_path) == 0
    lines = [line.split()[0] for line in capfd.readouterr().out.splitlines()]
    assert lines[:2] == ["new", "bad"]
    assert call(tmp_path, "--only", "fine") == 1  # even where it has passed
    assert results(tmp_path)[0]["fine"]["status"] == "failed"


@pytest.mark.parametrize("status", ["passed", "failed"])
def test_without_kernels_and_threads_the_rest_goes_on_and_says_so(plan, tmp_path, status):
    tell = """-c 'import os; print(os.environ.get("AGD_NO_COMPILER"), "{how}")'"""
    first = FINE if status == "passed" else RAISE
    plan(Check("kernels", 1, first), Check("threads", 1, first), Check("tell", 1, tell))
    call(tmp_path)
    found, _ = results(tmp_path)
    said = (tmp_path / "tell" / "output.txt").read_text()
    assert said == ("None on\n" if status == "passed" else "1 off\n")
    assert found["tell"]["without kernels"] == (status == "failed")
    assert not found["kernels"]["without kernels"]


KILLED = """
import sys
from scripts import gpu_checks as g
from tests import test_gpu_checks as t
g.PLANS["first"] = 80, [g.Check("fine", 1, t.FINE), g.Check("hang", 9, t.HANG)]
try:
    sys.exit(g.main(sys.argv[1:]))
except KeyboardInterrupt:
    sys.exit(130)
"""


def where(folder):
    return ["--device", "cpu", "--work", folder / "work", "--out", folder / "out"]


def wait_for(condition, process=None):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.05)


def running(folder):
    """The ids of the processes whose commands name the folder."""
    told = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in told.splitlines() if str(folder) in line]


def test_a_parent_that_is_killed_leaves_whole_results(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", KILLED, *where(tmp_path)], cwd=ROOT)
    try:
        wait_for(lambda: running(tmp_path / "work" / "hang"), parent)
    finally:
        parent.kill()
        parent.wait()
    found, names = results(tmp_path / "out")
    assert found.keys() == {"fine"} and "fine/b.json" in names
    left = running(tmp_path)
    assert left  # until its own time limit
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_checks, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="2"):
        gpu_checks.main(["--work", str(tmp_path / "work")])
    assert "no GPU here; --device cpu" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "scripts.gpu_checks", "--device", "cpu", "--work"]
    done = subprocess.run([*command, tmp_path / "file" / "work"], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "file/work" in done.stderr


def test_ctrl_c_stops_the_check_and_keeps_what_was_found(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, *where(tmp_path)], cwd=ROOT,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        wait_for(lambda: running(tmp_path / "work" / "hang"), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130 and "Traceback" not in process.stderr.read()
    finally:
        process.kill()
    assert results(tmp_path / "out")[0].keys() == {"fine"}
    wait_for(lambda: not running(tmp_path))


def test_data_and_kernels_are_not_put_off(plan, tmp_path, capfd):
    """Other checks need them, also where they have failed, or passed on another day."""
    checks = [Check("kernels", 1, RAISE), Check("new", 1, FINE), gpu_checks.DATA]
    plan(*checks)
    call(tmp_path)
    plan(gpu_checks.DATA, Check("kernels", 1, FINE), Check("bad", 1, RAISE), Check("last", 1, FINE))
    capfd.readouterr()
    call(tmp_path)
    lines = [line.split()[0] for line in capfd.readouterr().out.splitlines()]
    assert lines[:4] == ["data", "kernels", "bad", "last"]
    assert not results(tmp_path)[0]["last"]["without kernels"]


def test_an_archive_that_is_too_large_stays_as_it_was(plan, tmp_path, monkeypatch, capfd):
    plan(Check("fine", 1, FINE), Check("new", 1, FINE))
    call(tmp_path, "--only", "fine")
    monkeypatch.setattr(gpu_checks, "ARCHIVE", 1)
    assert call(tmp_path) == 0
    found, names = results(tmp_path)
    assert "new" in found and "fine/b.json" in names and "new/b.json" not in names
    assert "stays as it was" in capfd.readouterr().out


def test_a_nan_is_a_difference():
    """In what a GPU's tests compare."""
    x, nan = torch.ones(3), torch.full((3,), torch.nan)
    assert worst([x, x], [x, x]) == 0
    for ours in ([x, nan], [nan, x]):
        assert not worst(ours, [x, x]) < 1
