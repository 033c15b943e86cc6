"""The crash test strikes where it says, and finds what a broken run has lost."""

import copy
import os
import random
import re
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
from tests.fuzz import READERS

SMALL = ("--arch", "fcn", "--depth", "3", "--width", "64", "--dataset", "digits")
DIGITS = Case("digits", SMALL, 6, 12)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(DIGITS, tmp_path_factory.mktemp("crash") / "digits")
    lab.run_unbroken()
    return lab


def broken_by(lab, how, *moments, group=False):
    """The Report of one run that meets these moments, (kind, k, more), one after the other."""
    plans = [{"kind": kind, "k": k, "signal": int(SIGNALS[how]), "group": group, **dict(more)}
             for kind, k, *more in moments]  # fmt: skip
    report = lab.break_runs(how, len(plans), lambda rest: strike(lab, plans.pop(0)))
    assert not plans and (report.hits, report.rounds) == (len(moments), 1)
    return report


@pytest.mark.slow
@pytest.mark.parametrize(("how", "moments"), [
    ("KILL", [("write", 2, ("bytes", 9999)), ("rename", 2), ("row", 1, ("bytes", 9)), ("log", 2),
              ("fsync", 3), ("evaluation", 3), ("time", 0, ("at", 1.0))]),
    ("TERM", [("step", 4)]), ("INT", [("evaluation", 2)]), ("USR1", [("step", 20)]),
])  # fmt: skip
def test_a_run_that_is_struck_ends_equal(how, moments, lab):
    report = broken_by(lab, how, *moments)
    assert report.faults == [] and report.equal == 1
    assert (report.longest > 0) == (how in ("TERM", "INT"))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "group"), [("KILL", False), ("TERM", True)])
def test_workers_end_with_the_run(how, group, tmp_path):
    make_images(tmp_path / "images", 0)
    lab = Lab(make_cases([1], tmp_path / "images")[0]._replace(epochs=2), tmp_path / "lab")
    lab.run_unbroken()
    assert broken_by(lab, how, ("step", 12), group=group).faults == []


@pytest.mark.slow
def test_the_command_breaks_disks(capsys):
    assert main(["--disk", "--cases", "adam", "--kills", "1"]) == 0
    assert "limit 1/1" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "place"), [
    ("import torch; torch.nn.Module.load_state_dict = lambda *a, **k: None", "net.layers"),
    # The log keeps the rows that were written after the checkpoint.
    ("os.replace = lambda a, b, f=os.replace: "
     "None if str(b).endswith('.jsonl') and os.path.exists(b) else f(a, b)", "row."),
])  # fmt: skip
def test_what_is_not_restored_is_found(fault, place, lab, tmp_path):
    sabotaged, program = copy.copy(lab), tmp_path / "sabotaged.py"
    run = f"runpy.run_path({str(ROOT / 'main.py')!r}, run_name='__main__')"
    program.write_text(f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{fault}\n{run}")
    sabotaged.program = str(program)
    report = broken_by(sabotaged, "KILL", ("create", 10))  # after a row
    assert report.equal == 0 and place in "".join(report.faults)


@pytest.mark.slow
def test_nothing_outlives_an_interrupted_crash_test(tmp_path):
    test = subprocess.Popen(
        [sys.executable, "-m", "tests.crash"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while test.poll() is None and not list(tmp_path.glob("crash-*/case0/stdout")):
            time.sleep(0.05)
        test.send_signal(signal.SIGINT)
        assert "interrupted" in test.communicate(timeout=60)[1] and test.returncode == 130
    finally:
        test.kill()
    commands = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in commands and not list(tmp_path.glob("crash-*"))


@pytest.mark.parametrize(("device", "visible"), [("cpu", ""), ("cuda:0", "3")])
def test_a_run_on_a_gpu_sees_it(device, visible, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (tmp_path / "x.py").write_text("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    lab = Lab(DIGITS, tmp_path / "lab", tmp_path / "x.py", device)
    assert Child(lab).end("").stdout == f"{visible}\n"


def write_run(out, weight=0.0, loss=0.5, rows=1, more="checkpoints/a.lock", dtype=torch.float32):
    for name in ("logs", "checkpoints"):
        (out / name).mkdir(parents=True)
    net = {"w": torch.full((2,), weight, dtype=dtype)}
    torch.save({"epoch": 1, "net": net}, out / "checkpoints" / "a.pt")
    row = f'{{"kind": "epoch", "seconds": {time.time()}, "loss": {loss}}}\n'
    (out / "logs" / "a.jsonl").write_text(row * rows)
    (out / more).touch()
    return snapshot(out)


@pytest.mark.parametrize(("change", "line"), [
    ({}, ""), ({"weight": -0.0}, "checkpoint.net.w is"), ({"dtype": torch.float64}, "float64"),
    ({"loss": 0.25}, "row.1.loss is 0.25, not 0.5"), ({"rows": 2}, "row.2.loss is 0.5, not absent"),
    ({"more": "checkpoints/a.pt.partial"}, "a.pt.partial is 'there', not absent"),
])  # fmt: skip
def test_what_differs_is_named(change, line, tmp_path):
    lines = differences(write_run(tmp_path / "a"), write_run(tmp_path / "b", **change))
    assert line in "\n".join(lines) and bool(lines) == bool(change)


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
    rngs = random.Random(0), random.Random(0), random.Random(1)
    one, same, other = ([draw(lab, "KILL", rng, 0.5) for _ in range(200)] for rng in rngs)
    assert one == same != other and {plan["kind"] for plan in one} == {"time", *KINDS}


def test_no_case_begins_when_the_time_is_up(capsys):
    assert main(["--seconds", "0"]) == 0
    printed = capsys.readouterr().out
    assert "**0 hits, 0 of 0 ends equal**" in printed and printed.count("the time was up") == 7


def test_the_page_names_files_that_are_there_and_figures_without_faults():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`(test_\w+\.py)`", page))
    assert len(names) > 15 and not [x for x in names if not (ROOT / "tests" / x).exists()]
    ends = re.findall(r"(\d+) of (\d+)(?: ends equal| \|)", page)
    assert len(ends) > 5 and all(equal == rounds for equal, rounds in ends)
    assert len(re.findall(r"\| none \| \d+ \|", page)) == len(READERS)
