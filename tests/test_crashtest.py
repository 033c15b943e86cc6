import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from scripts.crashtest import __main__ as crashtest
from scripts.crashtest import disk
from scripts.crashtest.breaking import Lab, break_runs, draw
from scripts.crashtest.cases import SAVE_EVERY, Case, make_cases, make_images
from scripts.crashtest.child import ROOT
from scripts.crashtest.remains import Remains, differences, good_checkpoint
from scripts.crashtest.victim import KINDS

SAVES = SAVE_EVERY if "--save_every" in (ROOT / "flags.py").read_text() else None
DIGITS = ("--arch", "fcn", "--depth", "3", "--width", "64", "--dataset", "digits")


def quiet(line):
    pass


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The digits for six epochs, of which the unbroken run is there."""
    folder = tmp_path_factory.mktemp("crashtest") / "digits"
    lab = Lab(Case("digits", DIGITS, 6, 12), folder, SAVES, say=quiet)
    lab.run_unbroken()
    lab.count_moments()
    return lab


def at(kind, k, number=signal.SIGKILL, **plan):
    return {"kind": kind, "k": k, "signal": int(number), "group": False, **plan}


def broken_by(lab, name, *plans):
    """The Report of a run that meets these plans, one after the other."""
    plans = list(plans)
    report = break_runs(lab, name, len(plans), lambda done: plans.pop(0))
    assert not plans and report.rounds
    return report


def test_a_run_that_is_killed_ends_as_if_it_had_not_been(lab):
    """Within the file of a checkpoint, before its second rename, within a row of the log, while the
    log is cut, in the middle of an evaluation, and while it is starting."""
    report = broken_by(
        lab, "KILL", at("write", 2, bytes=lab.size // 2), at("rename", 2), at("row", 1, bytes=9),
        at("log", 2), at("evaluation", 3),
        {"kind": "time", "at": 1.0, "signal": int(signal.SIGKILL), "group": True},
    )  # fmt: skip
    assert report.faults == []
    assert (report.hits, report.equal, report.rounds) == (6, 1, 1)


@pytest.mark.parametrize(("name", "kind"), [("TERM", "step"), ("INT", "evaluation")])
def test_a_run_that_is_asked_to_end_saves_and_goes_on(name, kind, lab):
    report = broken_by(lab, name, at(kind, 4, getattr(signal, f"SIG{name}")))
    assert report.faults == []
    assert (report.hits, report.equal, report.rounds) == (1, 1, 1)
    assert report.longest > 0 and report.lost <= 0


def test_a_run_that_is_asked_to_save_goes_on(lab):
    report = broken_by(lab, "USR1", at("step", 20, signal.SIGUSR1))
    assert report.faults == []
    assert (report.hits, report.equal, report.rounds) == (1, 1, 1)


def test_workers_end_with_the_run(tmp_path):
    """Whether the run alone is killed, or all of its processes are asked to end."""
    images = tmp_path / "images"
    make_images(images, 0)
    case = make_cases([1], images)[0]
    case.epochs = 2
    lab = Lab(case, tmp_path / "lab", SAVES, say=quiet)
    lab.run_unbroken()
    for name, group in (("KILL", False), ("TERM", True)):
        number = getattr(signal, f"SIG{name}")
        report = broken_by(lab, name, at("step", 12, number, group=group))
        assert report.faults == []
        assert (report.hits, report.equal, report.rounds) == (1, 1, 1)


def test_a_disk_that_takes_nothing_for_a_while(tmp_path):
    case = Case("digits", DIGITS, 4, 12)
    ways = disk.break_disks(
        case, tmp_path, 1, 0, SAVES, lambda: True, quiet, ways=("errors", "limit")
    )
    for report in ways:
        assert report.faults == []
        assert (report.hits, report.equal, report.rounds) == (1, 1, 1)


SABOTAGE = """
import os, runpy, sys
sys.path.insert(0, {root!r})
{fault}
runpy.run_path({root!r} + "/main.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        # The weights that a checkpoint holds are not those that the run goes on with.
        ("import torch; torch.nn.Module.load_state_dict = lambda *a, **k: None", "net.layers"),
        # The log keeps what was written after the checkpoint.
        ("import runs.log as run; run.os.replace = lambda a, b, f=os.replace: "
         "None if str(b).endswith('.jsonl') and os.path.exists(b) else f(a, b)", "rows, not"),
    ],
)  # fmt: skip
def test_what_is_not_restored_is_found(fault, found, lab, tmp_path):
    program = tmp_path / "sabotaged.py"
    program.write_text(SABOTAGE.format(root=str(ROOT), fault=fault))
    broken = copy.copy(lab)
    broken.program = str(program)
    report = broken_by(broken, "KILL", at("create", 10))  # after a row
    assert report.equal == 0
    assert any(found in fault for fault in report.faults), report.faults


@pytest.mark.parametrize(("device", "visible"), [("cpu", ""), ("cuda", "3"), ("cuda:0", "3")])
def test_a_run_on_a_gpu_sees_it(device, visible, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    program = tmp_path / "program.py"
    program.write_text("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    case = Case("digits", DIGITS, 6, 12)
    lab = Lab(case, tmp_path / "lab", program=str(program), device=device)
    assert lab.child().end(60).stdout == f"{visible}\n"


def remains(folder, weight=0.0, rows=(), more=(), dtype=torch.float32):
    """Remains made by hand."""
    for name in ("logs", "checkpoints"):
        (folder / name).mkdir(parents=True)
    content = {"epoch": 1, "net": {"w": torch.full((2,), weight, dtype=dtype)}, "optimizer": {}}
    torch.save(content, folder / "checkpoints" / "a.pt")
    end = '{"kind": "end", "final": true, "stopped": null}'
    (folder / "logs" / "a.jsonl").write_text("\n".join([*rows, end]) + "\n")
    for name in more:
        (folder / name).touch()
    return Remains(folder)


def test_what_differs_is_named(tmp_path):
    row = '{"kind": "epoch", "epoch": 1, "seconds": %s, "loss": %s}'
    one = remains(tmp_path / "one", rows=[row % (1, 0.5)])
    same = remains(tmp_path / "same", rows=[row % (2, 0.5)], more=["checkpoints/a.lock"])
    assert differences(one, same) == []
    assert one.sha256() == same.sha256()
    found = {
        "-0.0": (remains(tmp_path / "1", -0.0, [row % (1, 0.5)]), "checkpoint's net.w is"),
        "dtype": (remains(tmp_path / "2", rows=[row % (1, 0.5)], dtype=torch.float64), "float64"),
        "row": (remains(tmp_path / "3", rows=[row % (1, 0.25)]), "row 1 (epoch) of the log: loss"),
        "twice": (remains(tmp_path / "4", rows=[row % (1, 0.5)] * 2), "has 3 rows, not 2"),
        "left": (remains(tmp_path / "5", rows=[row % (1, 0.5)], more=["checkpoints/a.pt.partial"]),
                 "checkpoints/a.pt.partial is left over"),
    }  # fmt: skip
    for what, (other, words) in found.items():
        assert any(words in line for line in differences(one, other)), what
    assert found["-0.0"][0].sha256() != one.sha256()
    (tmp_path / "same" / "logs" / "a.jsonl").write_text(row % (1, 0.5))
    assert any("not say that the run has finished" in x
               for x in differences(one, Remains(tmp_path / "same")))  # fmt: skip


def test_the_last_good_checkpoint_is_looked_for_in_two_files(tmp_path):
    assert good_checkpoint(tmp_path) is None
    found = remains(tmp_path / "a", 1.0)
    assert found.place() == (1, 0)
    path = tmp_path / "a" / "checkpoints" / "a.pt"
    path.rename(path.with_name("a.pt.previous"))
    assert found.place() == (1, 0)  # between the two renames
    path.write_bytes(b"half")
    assert found.place() == (1, 0)
    path.with_name("a.pt.previous").unlink()
    with pytest.raises(Exception):  # noqa: B017 torch raises many kinds
        found.place()


def test_the_moments_are_those_of_the_seed(lab):
    def plans(seed):
        return [draw(lab, "KILL", random.Random(seed + i), 0.5) for i in range(200)]

    assert plans(0) == plans(0) != plans(1000)
    assert {plan["kind"] for plan in plans(0)} == {"time", *KINDS}
    soft = partial(draw, lab, "TERM")
    assert not {"write", "row"} & {soft(random.Random(i), 0.0)["kind"] for i in range(40)}


def test_nothing_outlives_an_interrupted_crash_test(tmp_path):
    command = [sys.executable, "-m", "scripts.crashtest", "--cases", "0 workers"]
    test = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("crashtest-*/case0/stdout")):
            assert test.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        test.send_signal(signal.SIGINT)
        assert "interrupted" in test.communicate(timeout=60)[1]
    finally:
        test.kill()
    assert test.returncode == 130
    assert not list(tmp_path.glob("crashtest-*"))
    commands = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in commands


def test_no_case_begins_when_the_time_is_up(tmp_path, monkeypatch, capsys):
    def begins(*_, **__):
        raise AssertionError("a case has begun")

    monkeypatch.setattr(crashtest, "Lab", begins)
    assert crashtest.main(["--seconds", "0", "--out", str(tmp_path / "told.json")]) == 0
    reports = json.loads((tmp_path / "told.json").read_text())["reports"]
    assert len(reports) == 7 and {x["note"] for x in reports} == {"the time was up"}
    assert "0 hits, 0 of 0 ends equal" in capsys.readouterr().out
