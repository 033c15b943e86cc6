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

from scripts import gpu_checks
from scripts.gpu_checks import PLANS, Check
from tests.conftest import ROOT

HANG = """-c '"{folder}"; import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(99)'"""
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
TELL = """-c 'import os; print(os.environ.get("AGD_NO_COMPILER"), "{how}")'"""
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


def results(out):
    """(results, the names of the files in the archive), both whole."""
    with tarfile.open(out / "gpu_checks.tgz") as archive:
        files = [x for x in archive if x.isfile()]
        assert all(len(archive.extractfile(x).read()) == x.size for x in files)
    names = {x.name.removeprefix("./") for x in files}
    return json.loads((out / "gpu_checks.json").read_text()), names


def command(*flags):
    return subprocess.run([sys.executable, "-m", "scripts.gpu_checks", *map(str, flags)], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip


@pytest.mark.slow
def test_a_plan_is_rehearsed_without_a_gpu(tmp_path):
    done = command("--plan", "first", "--device", "cpu", "--budget", "0.1", "--work",
                   tmp_path / "work", "--out", tmp_path / "out")  # fmt: skip
    checks, names = results(tmp_path / "out")
    assert list(checks) == [check.name for check in PLANS["first"][1]], done.stdout
    bad = {name: x for name, x in checks.items() if x["status"] not in ("passed", "stopped")}
    # A busy machine may take a run's time away, and nothing else.
    assert all(x["status"] == "timeout" for x in bad.values()), bad
    assert done.returncode == bool(bad), done.stdout + done.stderr
    assert checks["machine"]["found"]["device"] == "cpu"
    assert checks["graphs"]["found"]["fcn, AGD"]["largest difference"] == 0
    run = "resnet18-cifar10-mse-bs128-agd-seed0"
    assert checks["resnet18"]["found"][run]["epoch"] == 2
    found = [len(checks[name]["found"]) for name in ("threads", "fig5", "fig7", "fig1")]
    assert found == [12, 12, 4, 4]
    assert f"resnet18/logs/{run}.jsonl" in names and "fig5/output.txt" in names
    assert not [name for name in names if name.endswith((".pt", ".npz", ".tgz", ".partial"))]


@pytest.mark.slow
def test_the_plan_of_text_is_rehearsed_without_a_gpu(tmp_path):
    done = command("--plan", "text", "--device", "cpu", "--budget", "0.4", "--work", tmp_path)
    checks, names = results(tmp_path)
    assert list(checks) == [check.name for check in PLANS["text"][1]], done.stdout
    bad = {name: x for name, x in checks.items() if x["status"] != "passed"}
    assert all(x["status"] == "timeout" for x in bad.values()), bad
    for name, epochs in (("gpt", 6), ("gpt2-agd", 2), ("gpt2-spectral", 2), ("gpt2-adamw", 2)):
        if name not in bad:
            (run,) = checks[name]["found"].values()
            assert run["epoch"] == epochs and run["tokens_per_second"] > 0
    assert not [name for name in names if name.endswith(".bin")]


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


def test_a_check_that_crashes_or_raises_costs_the_others_nothing(plan, tmp_path, capfd):
    plan(Check("crash", 1, CRASH), Check("threads", 1, RAISE), Check("up", 1, TIME_UP % (LOG, "")),
         Check("broken", 1, TIME_UP % (LOG, "x failed: y")), Check("fine", 15, FINE),
         Check("tell", 1, TELL))  # fmt: skip
    assert call(tmp_path) == 1
    checks, names = results(tmp_path)
    assert {name: x["status"] for name, x in checks.items()} == {
        "crash": "failed", "threads": "failed", "up": "stopped", "broken": "failed",
        "fine": "passed", "tell": "passed"}  # fmt: skip
    assert checks["crash"]["code"] in (-signal.SIGSEGV, 128 + signal.SIGSEGV)
    assert "string_at" in checks["crash"]["output"]  # where it was
    assert "the reason" in checks["threads"]["output"] and len(checks["threads"]["output"]) == 2000
    assert checks["fine"]["found"] == {"ratios": {"a / b": 1.5}} and checks["fine"]["output"] == ""
    assert {"fine/b.json", "crash/output.txt"} <= names
    assert "Not well or not run: crash, threads, broken" in capfd.readouterr().out
    # Runs share no process once threads have failed.
    assert (tmp_path / "tell" / "output.txt").read_text() == "None off\n"


@pytest.mark.slow
def test_a_check_that_hangs_takes_its_own_time_and_what_is_left_is_the_others(plan, tmp_path):
    plan(Check("fine", 30, FINE), Check("hang", 1, HANG), Check("stop", 1, STOP % LOG),
         Check("idle", 1, STOP % "0"), Check("late", 1, FINE), seconds=15)  # fmt: skip
    assert call(tmp_path, "--budget", "0.5") == 1
    checks, _ = results(tmp_path)
    assert {name: x["status"] for name, x in checks.items() if name != "late"} == {
        "fine": "passed", "hang": "timeout", "stop": "stopped", "idle": "timeout"}  # fmt: skip
    assert checks["hang"]["code"] in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert checks["hang"]["seconds"] < checks["hang"]["budget"] + 2 + 3
    assert checks["stop"]["found"]["run"]["cuda_graph"] and not checks["idle"]["found"]
    assert checks["hang"]["budget"] >= 3 and checks["stop"]["budget"] >= 3  # of 18 seconds in all


def test_the_same_command_goes_on_with_what_failed_last(plan, tmp_path, capfd, monkeypatch):
    """Data and kernels keep their places, which other checks need. An archive over the limit
    stays as it was."""
    plan(Check("kernels", 1, RAISE), Check("bad", 1, RAISE), Check("fine", 1, TELL))
    assert call(tmp_path) == 1
    assert (tmp_path / "fine" / "output.txt").read_text() == "1 on\n"  # without kernels
    assert results(tmp_path)[0]["fine"]["without kernels"]
    plan(gpu_checks.DATA, Check("bad", 1, FINE), Check("kernels", 1, FINE), Check("fine", 1, RAISE),
         Check("new", 1, FINE))  # fmt: skip
    capfd.readouterr()
    monkeypatch.setattr(gpu_checks, "ARCHIVE", 1)
    assert call(tmp_path) == 0
    printed = capfd.readouterr().out
    lines = [line.split()[0] for line in printed.splitlines()]
    assert lines[:4] == ["data", "kernels", "new", "bad"] and "stays as it was" in printed
    checks, names = results(tmp_path)
    assert not checks["new"]["without kernels"] and "new/b.json" not in names
    assert call(tmp_path, "--only", "fine") == 1  # even where it has passed
    assert results(tmp_path)[0]["fine"]["status"] == "failed"


def running(folder):
    """The ids of the processes whose commands name the folder."""
    lines = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in lines.splitlines() if str(folder) in line]


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_is_ended_leaves_whole_results(tmp_path, kind):
    """Ctrl-C ends its check too; after a kill the check has its own time limit."""
    where = ["--device", "cpu", "--work", tmp_path / "work", "--out", tmp_path / "out"]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *where], cwd=ROOT, text=True,
                               stderr=subprocess.PIPE)  # fmt: skip
    try:
        wait_for(lambda: running(tmp_path / "work" / "hang"))
        process.send_signal(kind)
        assert process.wait(10) == (130 if kind == signal.SIGINT else -kind)
        if kind == signal.SIGINT:
            wait_for(lambda: not running(tmp_path))
            assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        for left in running(tmp_path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
    checks, names = results(tmp_path / "out")
    assert checks.keys() == {"fine"} and "fine/b.json" in names


def test_refusals_are_a_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_checks, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="2"):
        gpu_checks.main(["--work", str(tmp_path / "work")])
    assert "no GPU here; --device cpu" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
    (tmp_path / "file").touch()
    done = command("--device", "cpu", "--work", tmp_path / "file" / "work")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "file/work" in done.stderr
