"""The suite: its protocol on invented rows, its workloads, its command, its published rows."""

import functools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from scripts import style
from scripts.suite import __main__ as suite
from scripts.suite import page, protocol, timing, train
from scripts.suite.methods import METHODS, NADAMW, TRIALS
from scripts.suite.protocol import Task
from scripts.suite.rows import Rows, RowsError
from scripts.suite.workloads import NAMES
from tests.conftest import ROOT

PUBLISHED = ROOT / "results"


def row(method="agd", seed=0, scores=(1.0, 0.5), setting=None, workload="gpt", steps=None):
    """A run whose score after every 10 steps, a second, is the next of `scores`."""
    curve = [[0, 0.0, 2.0, None]] + [[10 * i, float(i), x, x] for i, x in enumerate(scores, 1)]
    return {"workload": workload, "method": method, "seed": seed, "setting": setting or {},
            "steps": steps or 10 * len(scores), "curve": curve, "failed": None,
            "date": "2026-11-27", "made": {"torch": "2.14.1", "commit": "0" * 40}}  # fmt: skip


def trials(winner=3, workload="gpt"):
    """The ten trials of a workload: that of number `winner` is the best at three quarters, another
    one at the end."""
    rows = []
    for i, setting in enumerate(TRIALS):
        scores = (1, 0.9, 0.3 if i == winner else 0.8, 0.1 if i == winner + 1 else 0.7)
        rows.append(row("adamw", 0, scores, setting, workload))
    return rows


def test_the_tuned_method_is_chosen_and_sets_the_target_at_three_quarters():
    rows = trials()
    assert protocol.choice(rows[:-1], "gpt") is None
    assert dict(protocol.choice(rows, "gpt")) == TRIALS[3]
    assert protocol.target(rows, "gpt") is None  # seeds 1 and 2 are missing
    rows += [row("adamw", 1, (1, 0.4, 0.35, 0.2), TRIALS[3]),
             row("adamw", 2, (1, 0.2, 0.9, 0.2), TRIALS[3])]  # fmt: skip
    assert protocol.target(rows, "gpt") == 0.3  # of 0.3, 0.35 and 0.2
    assert protocol.steps(rows, "gpt", "adamw") == [30, 40, 20]


def test_what_is_needed_follows_from_what_is_there():
    trials_first = protocol.needed([], ["gpt"], ["adamw", "agd"])
    assert [x.method for x in trials_first] == ["adamw"] * 10 + ["agd"] * 3
    rows = [*trials(), row("agd", 1)]
    rest = protocol.needed(rows, ["gpt"], ["adamw", "agd"])
    chosen = tuple(sorted(TRIALS[3].items()))
    assert rest == [Task("gpt", "adamw", 1, chosen), Task("gpt", "adamw", 2, chosen),
                    Task("gpt", "agd", 0), Task("gpt", "agd", 2)]  # fmt: skip
    assert protocol.needed(rows, ["gpt"], ["agd"])[0].method == "agd"


def test_the_steps_are_those_of_the_first_score_at_the_target_or_below():
    assert protocol.steps_to(row(scores=(1, 0.5, 0.6)), 0.5) == 20
    assert protocol.steps_to(row(scores=(1, 0.5)), 0.4) == math.inf
    assert protocol.steps_to(row(scores=()), 3) == math.inf  # the start does not count


def test_the_median_of_three_seeds_with_two_misses_is_a_miss():
    rows = trials() + [row("adamw", s, (1, 0.9, 0.3, 0.2), TRIALS[3]) for s in (1, 2)]
    rows += [row("agd", s, (1, 0.9, 0.9, x)) for s, x in enumerate((0.1, 0.8, 0.8))]
    rows += [row("spectral", s, (1, 0.9, 0.9, x)) for s, x in enumerate((0.1, 0.1, 0.8))]
    table = protocol.medians(rows, ["gpt"])
    ratios = functools.partial(protocol.ratios, workloads=["gpt"])
    assert ratios({"adamw": table["adamw"]}) == {}  # beside no other
    assert protocol.ratios(table, ["gpt", "vit"]) == protocol.ratios(table, []) == {}
    assert table["agd"]["gpt"] == math.inf and table["spectral"]["gpt"] == 40
    assert ratios(table) == {"agd": [math.inf], "spectral": [40 / 30], "adamw": [1.0]}
    seconds = protocol.in_seconds(table, {"gpt": {"agd": 1.0, "spectral": 0.5, "adamw": 1.0}})
    assert seconds["spectral"] == {"gpt": 20} and seconds["agd"] == {"gpt": math.inf}
    assert ratios(seconds) == {"agd": [math.inf], "spectral": [1.0], "adamw": [1.5]}
    assert ratios(protocol.in_seconds(table, {})) == {}  # no step was timed
    assert "spectral" not in ratios(
        protocol.in_seconds(table, {"gpt": {"agd": 1.0, "adamw": 2.0}}))  # fmt: skip


@pytest.mark.parametrize("ratios, score", [
    ([1, 1], 1), ([4, math.inf], 0), ([1, math.inf], 0.5), ([2.5, 2.5, 2.5], 0.5), ([1, 2.5], 0.75),
])  # fmt: skip
def test_the_score_is_the_mean_of_the_profile(ratios, score):
    assert protocol.profile_score(ratios) == pytest.approx(score)
    taus = torch.linspace(1, protocol.TAU, 30_001).double()
    profile = sum((taus >= x).double() for x in ratios) / len(ratios)
    assert profile.mean().item() == pytest.approx(score, abs=1e-3)


def test_one_setting_is_calibrated_by_its_mean_rank():
    rows = trials(3) + trials(3, "vit") + trials(7, "lstm")
    assert protocol.calibrated(rows, ["gpt", "vit", "lstm"]) == TRIALS[3]
    assert protocol.calibrated(rows[1:], ["gpt", "vit", "lstm"]) is None


EACH = [pytest.param(name, marks=[] if name == "gpt" else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", EACH)
def test_a_workload_trains_and_is_the_same_each_time(name):
    """Its data come out alike, its score is one number an example, and a run repeats to the bit."""
    work = train.workload(name)
    lines = (ROOT / f"scripts/suite/workloads/{name}.py").read_text().splitlines()
    assert len(lines) <= 120
    data, again = work.data(), work.data()
    assert all(torch.equal(a, b) for a, b in zip(sum(data, ()), sum(again, ())))
    for part in data:
        assert len({len(x) for x in part}) == 1
    train_set, valid = data
    seen = set(map(_key, train_set[0][: 2**14]))
    assert sum(_key(x) in seen for x in valid[0]) <= 0.02 * len(valid[0])  # short sentences recur
    batch = tuple(x[: work.BATCH] for x in train_set)
    torch.manual_seed(0)
    net = work.network()
    assert work.loss(net, *batch).shape == ()
    assert work.score(net.eval(), *batch).shape == (work.BATCH,)
    first = train.run(name, "spectral", 0, steps=4)
    second = train.run(name, "spectral", 0, steps=4)
    scores = [x[2] for x in first["curve"]]
    assert scores == [x[2] for x in second["curve"]] and len(set(scores)) > 1
    assert [x[0] for x in first["curve"]] == [0, 1, 2, 3, 4] and first["failed"] is None


def _key(x):
    return x.numpy().tobytes()


def test_a_run_that_is_not_finite_ends_and_says_so():
    result = train.run("gpt", "adamw", 0, {"rate": 1e30, "decay": 0.0}, steps=32)
    assert "not finite" in result["failed"] and len(result["curve"]) < 33
    assert train.run("gpt", "agd", 0, steps=32, deadline=0) is None


class Spy(torch.optim.SGD):
    """An averaging method whose average is zero; it fails in its fifth step."""

    calls = []

    def train(self):
        self.calls.append("train")

    def eval(self):
        self.calls.append("eval")
        for p in self.param_groups[0]["params"]:
            p.data.zero_()

    def step(self):
        if self.calls.count("eval") == 4:
            raise RuntimeError("no fifth\nstep")
        super().step()


def test_an_averaging_method_is_evaluated_at_its_average(monkeypatch):
    """With its batch norms recalibrated there; an error of the method is a row."""
    method = METHODS["agd"]._replace(make=lambda net, steps: Spy(net.parameters(), 0.1))
    monkeypatch.setitem(METHODS, "agd", method)
    recalibrated = []
    monkeypatch.setattr(train, "recalibrate", lambda net, rows: recalibrated.append(
        (sum(p.abs().sum().item() for p in net.parameters()), len(list(rows)))))  # fmt: skip
    result = train.run("gpt", "agd", 0, steps=32)
    assert Spy.calls == ["train"] + ["eval", "train"] * 4
    assert recalibrated == [(0.0, train.CALIBRATION)] * 4
    assert result["failed"] == "step 5: no fifth" and len(result["curve"]) == 5
    assert result["curve"][1][2] == pytest.approx(math.log(65))  # of logits that are zero


def test_an_epoch_has_every_example_once_but_the_rest():
    stream = train.order(10, 4, 3)
    first, second = ([*next(stream).tolist(), *next(stream).tolist()] for _ in range(2))
    assert len(set(first)) == len(set(second)) == 8 and first != second
    assert next(train.order(10, 4, 3)).tolist() == first[:4]
    assert next(train.order(10, 4, 4)).tolist() != first[:4]


def call(*argv):
    return suite.main([str(x) for x in argv])


def test_the_command_goes_on_and_the_page_follows_from_the_rows(tmp_path, capsys):
    words = "gpt", "--quick", "--out", tmp_path
    assert call(*words, "--methods", "agd", "--jobs", 2) == 0
    rows = Rows(tmp_path / "suite", suite.STEPS).read()
    assert [x["seed"] for x in sorted(rows, key=lambda x: x["seed"])] == [0, 1, 2]
    assert all(x["steps"] == suite.STEPS and x["made"]["torch"] for x in rows)
    assert "3 of 3" in capsys.readouterr().out
    assert call(*words, "--methods", "agd") == 0  # nothing is left
    assert Rows(tmp_path / "suite", suite.STEPS).read() == rows
    assert call(*words, "--list", "--methods", "agd", "adamw") == 0
    text = capsys.readouterr().out
    assert text.count("finished") == 3 and text.count("to do") == 10
    first = (tmp_path / "suite.md").read_text()
    assert "AGD" in first and "| gpt" in first and "runs are missing" in first
    (tmp_path / "suite.md").write_text(first + "\nKept.\n")
    assert call("--draw", "--quick", "--out", tmp_path) == 0
    assert (tmp_path / "suite.md").read_text() == first + "\nKept.\n"


def test_steps_are_timed_in_turns_and_give_the_page_its_seconds(tmp_path, capsys, monkeypatch):
    """All methods of a workload at once; a workload that is timed again is timed anew."""
    monkeypatch.setattr(timing, "ROUNDS", 1), monkeypatch.setattr(timing, "STEPS", 2)
    # The optional packages count as absent, so that the test is the same with and without them.
    absent = [x for x in METHODS if METHODS[x].package]
    monkeypatch.setattr(suite, "missing", lambda name: "no" if name in absent else None)

    class Broken(torch.optim.SGD):
        def step(self):
            raise RuntimeError("no step\nhere")

    method = METHODS["muon"]._replace(make=lambda net, steps: Broken(net.parameters(), 0.1))
    monkeypatch.setitem(METHODS, "muon", method)
    steps = train.workload("gpt").STEPS
    rows = Rows(tmp_path / "suite")
    for setting in TRIALS:
        rows.add(row("adamw", 0, (1, 0.9, 0.3), setting) | {"steps": steps})
    for seed in protocol.SEEDS:
        rows.add(row("adamw", seed, (1, 0.9, 0.3), TRIALS[0]) | {"steps": steps})
        rows.add(row("spectral", seed, (1, 0.2)) | {"steps": steps})
    assert call("--draw", "--out", tmp_path) == 0
    assert "## Seconds" not in (tmp_path / "suite.md").read_text()
    assert call("gpt", "--time", "--out", tmp_path) == 1
    left_out = sorted(["muon on gpt (no step)", *(f"{x} (no)" for x in absent)])
    assert "".join(f"left out: {x}\n" for x in left_out) in capsys.readouterr().err
    first = rows.timed()["gpt"]["seconds"]
    assert set(first) == set(METHODS) - {"muon", *absent} and min(first.values()) > 0
    page_text = (tmp_path / "suite.md").read_text()
    for words in "## Seconds to the target", "## Milliseconds of a step", "Steps timed 20":
        assert words in page_text
    assert re.search(r"Spectral AGD \| none \| none \| 1.000 \| [01]\.\d{3} \|", page_text)
    call("gpt", "--time", "--out", tmp_path)
    assert rows.timed()["gpt"]["seconds"] != first
    capsys.readouterr()
    for wrong in "{", "[]", '{"gpt": {"seconds": {}}}', json.dumps({"gpt": {
            "seconds": [1], "date": "2026-11-27", "made": {}}}):  # fmt: skip
        (tmp_path / "suite" / "seconds.json").write_text(wrong)
        assert call("--draw", "--out", tmp_path) == 2
        assert "has no seconds of steps: delete it" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--methods", "agd"], ["--jobs", "2"], ["--quick"], ["--draw"]])
def test_timing_takes_turns_of_all_methods_on_one_core(flags, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        call("--time", *flags, "--out", tmp_path)
    assert stopped.value.code == 2


def test_the_command_stops_in_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "BEGAN", time.time())
    assert call("gpt", "--methods", "agd", "--out", tmp_path, "--time_limit", "12s") == 75
    assert "The time is up: 0 runs have ended; give it a longer one" in capsys.readouterr().out
    assert time.time() - suite.BEGAN < 60
    assert not list(tmp_path.glob("suite/*.jsonl"))


def test_rows_of_another_workload_or_budget_are_refused(tmp_path, capsys):
    steps = train.workload("gpt").STEPS
    rows, full, quick = Rows(tmp_path / "suite"), row(steps=steps), row(steps=suite.STEPS)
    rows.add(full)
    rows.add(full)  # as another command has it
    assert len(rows.read()) == 1
    other = row(method="spectral", steps=steps)
    other["curve"][0][2] = 2.1
    with pytest.raises(RowsError, match="another gpt"):
        rows.add(other)
    path = rows.path("gpt")
    for line in json.dumps(quick), "{", "[]", "{}", json.dumps({**full, "method": "lion"}):
        path.write_text(f"{json.dumps(full)}\n{line}\n")
        assert call("gpt", "--methods", "agd", "--out", tmp_path) == 2  # before the first run
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "line 2 is " in error


def test_a_method_without_its_package_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "missing", lambda name: "pip install it")
    words = "gpt", "--quick", "--out", tmp_path, "--methods", "prodigy"
    assert call(*words) == 1
    assert "left out: prodigy (pip install it)" in capsys.readouterr().err
    assert call(*words, "--list") == 0
    assert capsys.readouterr().out.count("pip install it") == 3
    assert call("--draw", "--out", tmp_path) == 1
    assert "left out" not in capsys.readouterr().err


def test_a_page_without_its_marks_is_refused(tmp_path, capsys):
    Rows(tmp_path / "suite").add(row(steps=train.workload("gpt").STEPS))
    (tmp_path / "suite.md").write_text("mine")
    assert call("--draw", "--out", tmp_path) == 2
    assert "lacks the marks" in capsys.readouterr().err
    assert (tmp_path / "suite.md").read_text() == "mine"


@pytest.mark.slow
def test_ctrl_c_keeps_the_rows_that_are_there(tmp_path):
    line = [sys.executable, "-m", "scripts.suite", "gpt", "--methods", "agd", "--out", tmp_path]
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(10)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == "\ninterrupted; the same command goes on\n"


def test_nothing_to_draw(tmp_path, capsys):
    assert call("--draw", "--out", tmp_path) == 1
    assert "nothing to draw" in capsys.readouterr().out


@pytest.mark.skipif(not list((PUBLISHED / "suite").glob("*.jsonl")), reason="no rows yet")
class TestPublished:
    """results/suite: all that it says follows from its rows, and its rows from this code."""

    rows, timed = Rows(PUBLISHED / "suite").read(), Rows(PUBLISHED / "suite").timed()

    def test_nadamw_has_the_calibrated_setting(self):
        assert protocol.calibrated(self.rows, NAMES) == NADAMW

    def test_the_page_and_the_picture_follow_from_the_rows(self, tmp_path):
        shutil.copytree(PUBLISHED / "suite", tmp_path / "suite")
        shutil.copy(PUBLISHED / "suite.md", tmp_path)
        drawn = page.picture(self.rows, self.timed)
        image = PUBLISHED / "suite" / "profile.png"
        assert image.exists() == (drawn is not None)
        if drawn:
            assert style.fingerprint(drawn) == Image.open(image).info["Source"]
        page.write(tmp_path, self.rows, self.timed)
        assert (tmp_path / "suite.md").read_bytes() == (PUBLISHED / "suite.md").read_bytes()

    def test_rows_name_a_commit_and_no_path(self):
        for row in [*self.rows, *self.timed.values()]:
            assert re.fullmatch("[0-9a-f]{40}", row["made"]["commit"])
            assert '"/' not in json.dumps(row)

    @pytest.mark.parametrize("name", EACH)
    def test_the_rows_are_of_this_workload(self, name):
        work = train.workload(name)
        _, valid = work.data()
        torch.manual_seed(0)
        start = train.evaluate(work, work.network(), valid)
        own = [x for x in self.rows if x["workload"] == name]
        assert {x["steps"] for x in own} == {work.STEPS}
        for x in (x for x in own if x["seed"] == 0):
            assert x["curve"][0][2] == pytest.approx(start, rel=0.01)
