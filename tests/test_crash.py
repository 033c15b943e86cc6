"""The crash test strikes where it says, and finds what a broken run has lost."""

import copy
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tests.crash.__main__ import main
from tests.crash.lab import ROOT, Case, Child, Lab
from tests.crash.remains import differences, saved, snapshot
from tests.crash.victim import KINDS
from tests.crash.ways import SIGNALS, draw, make_cases, make_images, strike

DIGITS = ("--arch", "fcn", "--depth", "3", "--width", "64", "--dataset", "digits")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(Case("digits", DIGITS, 6, 12), tmp_path_factory.mktemp("crash") / "digits")
    lab.run_unbroken()
    return lab


def at(name, kind, k, **plan):
    return {"kind": kind, "k": k, "signal": int(SIGNALS[name]), "group": False, **plan}


def broken_by(lab, how, *plans):
    """The Report of one run that meets these plans, one after the other."""
    plans = list(plans)
    report = lab.break_runs(how, len(plans), lambda rest: strike(lab, plans.pop(0)))
    assert not plans and report.rounds == 1
    return report


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "plans"),
    [
        ("KILL", [("write", 2, {"bytes": 9999}), ("rename", 2), ("row", 1, {"bytes": 9}),
                  ("log", 2), ("fsync", 3), ("evaluation", 3), ("time", 0, {"at": 1.0})]),
        ("TERM", [("step", 4)]),
        ("INT", [("evaluation", 2)]),
        ("USR1", [("step", 20)]),
    ],
)  # fmt: skip
def test_a_run_that_is_struck_ends_equal(name, plans, lab):
    plans = [at(name, kind, k, **(more[0] if more else {})) for kind, k, *more in plans]
    report = broken_by(lab, name, *plans)
    assert report.faults == []
    assert (report.hits, report.equal) == (len(plans), 1)
    assert (report.longest > 0) == (name in ("TERM", "INT"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "group"), [("KILL", False), ("TERM", True)])
def test_workers_end_with_the_run(name, group, tmp_path):
    make_images(tmp_path / "images", 0)
    lab = Lab(make_cases([1], tmp_path / "images")[0]._replace(epochs=2), tmp_path / "lab")
    lab.run_unbroken()
    report = broken_by(lab, name, at(name, "step", 12, group=group))
    assert report.faults == [] and report.equal == 1


@pytest.mark.slow
def test_the_command_breaks_disks(tmp_path, capsys):
    assert main(["--disk", "--cases", "adam", "--kills", "1", "--out", str(tmp_path / "x")]) == 0
    assert "limit 1/1" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "place"), [
    ("import torch; torch.nn.Module.load_state_dict = lambda *a, **k: None", "net.layers"),
    # The log keeps the rows that were written after the checkpoint.
    ("os.replace = lambda a, b, f=os.replace: "
     "None if str(b).endswith('.jsonl') and os.path.exists(b) else f(a, b)", "row."),
])  # fmt: skip
def test_what_is_not_restored_is_found(fault, place, lab, tmp_path):
    program = tmp_path / "sabotaged.py"
    run = f"runpy.run_path({str(ROOT / 'main.py')!r}, run_name='__main__')"
    program.write_text(f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{fault}\n{run}")
    sabotaged = copy.copy(lab)
    sabotaged.program = str(program)
    report = broken_by(sabotaged, "KILL", at("KILL", "create", 10))  # after a row
    assert report.equal == 0
    assert any(place in fault for fault in report.faults), report.faults


@pytest.mark.slow
def test_nothing_outlives_an_interrupted_crash_test(tmp_path):
    test = subprocess.Popen(
        [sys.executable, "-m", "tests.crash"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while test.poll() is None and not list(tmp_path.glob("crashtest-*/case0/stdout")):
            time.sleep(0.05)
        test.send_signal(signal.SIGINT)
        assert "interrupted" in test.communicate(timeout=60)[1]
    finally:
        test.kill()
    assert test.returncode == 130 and not list(tmp_path.glob("crashtest-*"))
    commands = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in commands


@pytest.mark.parametrize(("device", "visible"), [("cpu", ""), ("cuda", "3"), ("cuda:0", "3")])
def test_a_run_on_a_gpu_sees_it(device, visible, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    program = tmp_path / "program.py"
    program.write_text("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    lab = Lab(Case("digits", DIGITS, 6, 12), tmp_path / "lab", program, device)
    assert Child(lab).end("").stdout == f"{visible}\n"


def write_run(out, weight=0.0, loss=0.5, rows=1, more=(), dtype=torch.float32):
    for name in ("logs", "checkpoints"):
        (out / name).mkdir(parents=True)
    net = {"w": torch.full((2,), weight, dtype=dtype)}
    torch.save({"epoch": 1, "net": net}, out / "checkpoints" / "a.pt")
    row = f'{{"kind": "epoch", "seconds": {time.time()}, "loss": {loss}}}\n'
    (out / "logs" / "a.jsonl").write_text(row * rows)
    for name in more:
        (out / name).touch()
    return snapshot(out)


def test_what_differs_is_named(tmp_path):
    one = write_run(tmp_path / "0")
    assert differences(one, write_run(tmp_path / "1", more=["checkpoints/a.lock"])) == []
    for i, (change, line) in enumerate([
        ({"weight": -0.0}, "checkpoint.net.w is"), ({"dtype": torch.float64}, "float64"),
        ({"loss": 0.25}, "row.1.loss is 0.25, not 0.5"), ({"rows": 2}, "row.2.loss is 0.5"),
        ({"more": ["checkpoints/a.pt.partial"]}, "a.pt.partial is 'there', not absent"),
    ], 2):  # fmt: skip
        assert line in "\n".join(differences(one, write_run(tmp_path / str(i), **change)))


def test_a_good_checkpoint_is_looked_for_in_two_files(tmp_path):
    assert saved(tmp_path) == (0, 0)
    write_run(tmp_path / "a")
    path = tmp_path / "a" / "checkpoints" / "a.pt"
    path.rename(path.with_name("a.pt.previous"))  # between the two renames
    assert saved(tmp_path / "a") == (1, 0)
    path.write_bytes(b"half")
    assert saved(tmp_path / "a") == (1, 0)
    path.with_name("a.pt.previous").unlink()
    with pytest.raises(Exception):  # noqa: B017 torch raises many kinds
        saved(tmp_path / "a")


def test_the_moments_are_those_of_the_seed():
    lab = SimpleNamespace(census=dict.fromkeys(KINDS, 9), start=1.0, seconds=2.0, size=999)

    def plans(name, seed):
        return [draw(lab, name, random.Random(seed + i), 0.5) for i in range(200)]

    assert plans("KILL", 0) == plans("KILL", 0) != plans("KILL", 1000)
    assert {plan["kind"] for plan in plans("KILL", 0)} == {"time", *KINDS}
    assert not {"write", "row"} & {plan["kind"] for plan in plans("TERM", 0)}


def test_no_case_begins_when_the_time_is_up(tmp_path, capsys):
    assert main(["--seconds", "0", "--out", str(tmp_path / "x.json")]) == 0
    assert "**0 hits, 0 of 0 ends equal**" in capsys.readouterr().out
    assert (tmp_path / "x.json").read_text().count("the time was up") == 7
