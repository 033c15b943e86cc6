"""`python -m scripts.reproduce` on a small table: figure 5 on the digits, runs of a second each."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import main as program
from data import DataError
from data.workers import usable_cores
from flags import parse
from runs.log import read_rows
from scripts import experiments, reproduce, results, runner
from scripts.experiments import ADAMW, FIGURES, PEERS, RULES, SCALES, Experiment
from scripts.results import Results, epochs_done, log_name
from tests.conftest import ROOT

DIGITS = "--arch fcn --depth 3 --width 16 --dataset digits --log_updates"
IMAGENET = "--arch resnet50 --dataset imagenet --optimizer agd --seed 0"
NAME = "fcn3x16-digits-mse-bs128-agd-seed0-updates"
TOGETHER = pytest.mark.parametrize("together", [
    "off", pytest.param("on", marks=pytest.mark.slow),
])  # fmt: skip


def small_table(scale, epochs=3):
    table = []
    for curve, rate in (("AGD", None), ("Adam", "1e-3"), ("Adam", "1e-1"), ("SGD", "1e-1")):
        words = [*shlex.split(DIGITS), "--optimizer", curve.lower()]
        words += ["--lr", rate] if rate else []
        table.append(Experiment("fig5", "fcn", curve, epochs, (*words, "--seed", "0")))
    return table


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(results, "experiments", small_table)


def call(*argv):
    return reproduce.main([str(x) for x in argv])


def start(out, *argv, epochs=10**5, **options):
    """The command in a process of its own, over the small table."""
    code = (
        "import runpy; from scripts import results; "
        "from tests import test_reproduce as t; "
        f"results.experiments = lambda scale: t.small_table(scale, {epochs}); "
        "runpy.run_module('scripts.reproduce', run_name='__main__', alter_sys=True)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "fig5", "--out", str(out), "--device", "cpu", *argv],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **options,  # threads change the last digits
    )  # fmt: skip


def logs(out, scale="quick"):
    return {path.stem: read_rows(path) for path in (Path(out) / scale / "logs").glob("*.jsonl")}


def lasting(rows):
    """What does not differ from run to run."""
    drop = {"seconds", "images_per_second", "date", "flags", "saving_seconds"}
    return [{k: v for k, v in row.items() if k not in drop} for row in rows]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def processes(out):
    """The ids of the processes that have a file in a folder open."""
    ids = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link).startswith(str(out)):
                ids.add(int(link.parts[2]))
    return ids


def epochs_in(out):
    """The epochs so far, of all runs."""
    return sum(map(epochs_done, (out / "quick" / "logs").glob("*.jsonl")))


def run_alone(out, epochs, row=0):
    """A run of the table, in this process; returns the path of its log."""
    flags = [*small_table("")[row].flags, "--epochs", str(epochs), "--device", "cpu"]
    assert program.main([*flags, "--out", str(out / "quick")]) == 0
    return next((out / "quick" / "logs").glob("*.jsonl"))


@pytest.mark.parametrize("scale", SCALES)
def test_the_table_parses_and_each_name_is_one_set_of_flags(scale):
    table, flags = experiments.experiments(scale), {}
    assert len(set(table)) == len(table)
    for row in table:
        assert flags.setdefault(log_name(row), row.flags) == row.flags
        argv = [*row.flags, "--epochs", str(row.epochs), "--device", "cpu"]
        args = parse(argv, check=row.curve not in PEERS)
        names = {**RULES, **PEERS, ADAMW: "torch.optim.AdamW"}
        assert args.optimizer == names.get(row.curve, row.curve.lower())
    assert {row.figure for row in table} == set(FIGURES) - {"fig2"}


def test_runs_go_on_are_drawn_and_are_skipped_when_finished(monkeypatch, tmp_path, capsys):
    """Figures that share a run read as much of it as they show; a run is main.py's own."""
    agd, adam, *_ = small_table("")
    table = [agd._replace(figure="fig8", epochs=1), agd, adam]
    monkeypatch.setattr(results, "experiments", lambda scale: table)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert call("fig8", "--out", tmp_path, "--device", "cpu") == 0
    assert call("fig5", "--out", tmp_path, "--jobs", 2, "--device", "cpu") == 0
    output = capsys.readouterr().out
    assert "2 runs: 0 finished, 2 to do" in output
    assert len(re.findall(r"[12] of 2  \S+  loss \d\.\d+  test \S+%  \S+ left", output)) == 2
    there = Results(tmp_path, "quick")
    assert [len(x.epochs) for x in there.of("fig8") + there.of("fig5")] == [1, 3, 3]
    assert all(x.finished for x in there.of("fig8") + there.of("fig5"))
    rows = logs(tmp_path)
    adam = next(some for name, some in rows.items() if "lr0.001" in name)
    assert len(rows) == 2 and adam[0]["threads"] == max(1, usable_cores() // 2)
    own = read_rows(run_alone(tmp_path / "own", 3, row=1))
    for mine, other in zip(adam[1:4], own[1:4], strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    for suffix in ("png", "pdf"):
        assert (tmp_path / "quick" / "figures" / f"fig5.{suffix}").stat().st_size > 5000
    assert "FCN 3×16, digits, Adam at 1e-3" in (tmp_path / "README.md").read_text()
    times = [path.stat().st_mtime_ns for path in (tmp_path / "quick" / "logs").iterdir()]
    assert call("fig5", "--out", tmp_path) == 0
    assert "2 runs: 2 finished, 0 to do" in capsys.readouterr().out
    assert times == [path.stat().st_mtime_ns for path in (tmp_path / "quick" / "logs").iterdir()]


def test_figure_10_runs_its_texts_and_writes_their_losses(monkeypatch, tmp_path, capsys):
    """A schedule makes a run of its own length, which --epochs leaves whole."""
    text = ("--arch gpt --dataset shakespeare --depth 1 --width 16 --heads 2 --context 8 "
            "--epoch_steps 3 --train_bs 4 --test_examples 20 --seed 0 --optimizer")  # fmt: skip
    tuned = "adamw --schedule cosine --weight_decay 0.1 --lr"
    table = [Experiment("fig10", "gpt", curve, 2, tuple(shlex.split(f"{text} {how}")))
             for curve, how in (("AGD", "agd"), (ADAMW, f"{tuned} 1e-3"), (ADAMW, f"{tuned} 1e-2"))]
    monkeypatch.setattr(results, "experiments", lambda scale: table)
    there = Results(tmp_path, "quick")
    assert {x.curve: x.epochs for x in runner.tasks(there, ["fig10"], 1)} == {"AGD": 1, ADAMW: 2}
    for row in table[:2]:
        program.main([*row.flags, "--epochs", "2", "--device", "cpu", "--out", str(there.folder)])
    assert call("10", "--out", tmp_path, "--device", "cpu") == 0
    output = capsys.readouterr().out
    assert "3 runs: 2 finished, 1 to do" in output and "/fig10.png" in output
    assert re.search(r"1 of 1  \S+  loss \d\.\d+  validation \d\.\d+  ", output)
    page, best = (tmp_path / "README.md").read_text(), there.tuned("fig10", "gpt", ADAMW)
    row = next(x for x in page.splitlines() if x.startswith("| GPT 1×16, Shakespeare, AdamW at"))
    cells = [x.strip() for x in row.split("|")[1:-1]]
    assert cells[1:4] == [f"{best.test_loss:.3f}", f"{best.last['test_bits']:.3f}",
                          f"{100 * best.last['test_acc']:.1f}"]  # fmt: skip
    rate = best.experiment.flag("--lr")
    assert rate in cells[0] and cells[5] == "2" and f"--lr {rate} --epochs 2`" in cells[-1]
    assert "| train loss, validation loss | " in page and "#### Figure 10: characters of" in page


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@TOGETHER
def test_killed_it_takes_its_runs_along_and_goes_on(together, tmp_path):
    how = ["--jobs", "2", "--together", together]
    process = start(tmp_path, *how)
    wait_for(lambda: epochs_in(tmp_path) > 2)
    assert len(processes(tmp_path)) == (2 if together == "off" else 1)
    process.kill()
    process.communicate()
    wait_for(lambda: not processes(tmp_path), 10)
    most = max(map(epochs_done, (tmp_path / "quick" / "logs").glob("*.jsonl"))) + 1
    again = start(tmp_path, *how, "--epochs", str(most))
    assert again.wait(300) == 0, again.stdout.read()
    assert {len(rows) for rows in logs(tmp_path).values()} == {most + 2}
    output = (tmp_path / "quick" / "output" / f"{NAME}.txt").read_text()
    assert int(output.split("Going on after epoch ")[1].split(",")[0]) >= 1


@pytest.mark.slow
@TOGETHER
def test_a_time_limit_stops_cleanly_and_the_command_goes_on(together, tmp_path):
    began = time.monotonic()
    how = ["--jobs", "4", "--together", together]
    process = start(tmp_path, *how, "--time_limit", "20s")
    output = process.communicate(timeout=120)[0]
    assert time.monotonic() - began < 60  # the runs take minutes
    assert process.returncode == reproduce.TIME_IS_UP, output
    assert "The time is up" in output and "Traceback" not in output
    ends = [rows[-1] for rows in logs(tmp_path).values()]
    assert [end["stopped"] for end in ends] == ["interrupted"] * 4
    most = max(end["epochs"] for end in ends) + 1
    again = start(tmp_path, *how, "--epochs", str(most))
    output = again.communicate(timeout=200)[0]
    assert again.returncode == 0, output
    assert {len(rows) for rows in logs(tmp_path).values()} == {most + 2}


def test_a_limit_in_which_nothing_can_be_done_says_so(small, monkeypatch, tmp_path, capsys):
    """The time counts from the start of the command."""
    monkeypatch.setattr(reproduce, "BEGAN", time.monotonic() - 2)
    assert call("fig5", "--out", tmp_path, "--time_limit", "1s") == reproduce.TIME_IS_UP
    assert "give it a longer one" in capsys.readouterr().out
    assert not (tmp_path / "quick").exists()


def ignore_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize("ending, nohup", [
    (signal.SIGINT, False),
    pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_signal_stops_the_runs_and_says_how_to_go_on(ending, nohup, tmp_path):
    options = {"preexec_fn": ignore_interrupts} if nohup else {}
    process = start(tmp_path, "--jobs", "1", **options)
    wait_for(lambda: epochs_in(tmp_path))
    process.send_signal(ending)
    output = process.communicate(timeout=runner.GRACE)[0]
    assert process.returncode == 130 and "the same command goes on" in output
    assert "Traceback" not in output
    (rows,) = logs(tmp_path).values()
    assert rows[-1]["stopped"] == "interrupted"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@TOGETHER
def test_a_run_that_is_killed_is_named(together, tmp_path):
    process = start(tmp_path, "--runs", "0", "--together", together)
    wait_for(lambda: epochs_in(tmp_path))
    os.kill(*processes(tmp_path), signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "killed by SIGKILL (see " in output, output


def on_cifar10(flags):
    return tuple("cifar10" if word == "digits" else word for word in flags)


def refusing(fetched):
    """A stand-in for data.prepare.prepare without a network; lists what it was asked for."""

    def prepare(name, data_dir, source=None):
        fetched.append(name)
        raise DataError(f"{name} could not be fetched: no network\nmore words")

    return prepare


def test_what_is_not_at_hand_is_left_out_named_and_an_exit_code(monkeypatch, tmp_path, capsys):
    """Part of the data: what can be run and drawn is. --list and --draw fetch nothing."""
    fetched, agd = [], small_table("")[0]
    lost = agd._replace(figure="fig8", flags=on_cifar10(agd.flags))
    imagenet = agd._replace(figure="fig4", flags=tuple(shlex.split(IMAGENET)))
    monkeypatch.setattr(results, "experiments", lambda scale: [agd, lost, imagenet])
    monkeypatch.setattr("data.prepare.prepare", refusing(fetched))
    flags = ["--out", tmp_path / "out", "--data_dir", tmp_path, "--device", "cpu"]
    assert call("all", "--list", *flags) == 0
    assert f"no {tmp_path}/cifar10.npz yet: the first run fetches it" in capsys.readouterr().out
    assert call("fig8", "--draw", *flags) == 1 and not fetched
    assert "fig8: nothing to draw yet" in capsys.readouterr().out
    assert call("fig8", *flags) == 1 and fetched == ["cifar10"]
    output, error = capsys.readouterr()
    (line,) = error.splitlines()
    assert "cifar10 could not be fetched: no network; `python -m data.prepare cifar10 -" in line
    assert line.startswith("error: left out: 1 run of fig8 (") and "All of it" not in output
    assert call("fig4", "fig5", "fig8", *flags) == 1
    output, error = capsys.readouterr()
    assert "3 runs: 0 finished, 1 to do, 2 left out" in output and "/fig5.png" in output
    assert f"left out, 1 run of fig4: there is no folder {tmp_path}/imagenet" in output
    assert "1 run of fig8 (cifar10" in error and "1 run of fig4 (there is no folder" in error
    assert call("fig5", *flags) == 0 and not capsys.readouterr().err


def test_a_data_set_that_is_not_there_is_fetched_before_the_runs(small, monkeypatch, tmp_path):
    """As main.py would at first use."""
    rows = [x._replace(flags=on_cifar10(x.flags)) for x in small_table("")[:1]]
    monkeypatch.setattr(results, "experiments", lambda scale: rows)
    begun = []
    monkeypatch.setattr("data.prepare.prepare", lambda name, data_dir: begun.append(name))
    monkeypatch.setattr(reproduce, "run", lambda args, todo, _: begun.append(todo) or 1)
    assert call("fig5", "--out", tmp_path, "--data_dir", tmp_path, "--device", "cpu") == 1
    assert begun == ["cifar10", rows]


def test_a_package_that_is_not_there_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ["--out", tmp_path, "--data_dir", tmp_path]
    (tmp_path / "cifar10.npz").write_bytes(b"")
    assert call("fig8", "--list", *flags) == 0
    output = capsys.readouterr().out
    assert output.count("pip install") == 3 and "pip install prodigyopt" in output
    assert call("fig8", "--runs", "prodigy", *flags) == 1
    assert "1 run of fig8 (pip install prodigyopt)" in capsys.readouterr().err


def test_the_stand_in_gives_way_to_cifar100(tmp_path, capsys):
    for name, state in (("tiny100", "0/6 epochs"), ("cifar100", "CIFAR-100 itself is here")):
        (tmp_path / f"{name}.npz").write_bytes(b"")
        call("fig4", "--list", "--out", tmp_path / "out", "--data_dir", tmp_path)
        lines = [line for line in capsys.readouterr().out.splitlines() if "tiny100" in line]
        assert len(lines) == 6 and all(line.endswith(state) for line in lines)


def test_tasks_are_distinct_and_begin_with_the_longest():
    there = Results("nowhere", "quick")
    fig6 = runner.tasks(there, ["fig6"])
    assert fig6[0].panel == "32x512" and fig6[-1].panel == "2x64"
    assert max(task.epochs for task in runner.tasks(there, ["fig6"], 2)) == 2
    both = runner.tasks(there, ["fig1", "fig5"])
    assert len({task.flags for task in both}) == len(both)
    assert max(x.epochs for x in both if "--log_updates" in x.flags) == 14  # figure 1 reads 5


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("1.5h", 5400), ("1h30m", 5400)])
def test_duration(text, seconds):
    assert reproduce.duration(text) == seconds


@pytest.mark.parametrize("argv, noun", [
    ("--time_limit 0s", "no time"), ("--time_limit 9", "no time"),
    ("--scale ful", "did you mean full"), ("--jobs 0", "whole number"), ("--runs ''", "no numbers"),
    ("--sbatch=--gres=gpu:1", "--submit slurm"), ("--fresh --submit slurm", "--fresh"),
    ("""--sbatch "--x 'y" --submit slurm""", "--sbatch"),
    ("--submit slurm --draw", "--draw"), ("--drw", "did you mean --draw"),
    ("--device cuda:99", "cuda:99"),
])  # fmt: skip
def test_a_wrong_command_is_one_sentence(argv, noun, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        call("fig5", "--out", tmp_path, *shlex.split(argv))
    error = capsys.readouterr().err
    assert noun in error and "Traceback" not in error and " --help lists the flags" in error


def test_submit_sends_an_array_of_what_is_missing_and_draws_after_it(
    small, tmp_path, monkeypatch, capsys
):
    run_alone(tmp_path, 3, row=1)
    spool, bin = tmp_path / "spool", tmp_path / "bin"
    spool.mkdir()
    bin.mkdir()
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(bin))
    assert call("fig5", "--out", tmp_path, "--submit", "slurm") == 2
    assert "no sbatch here" in capsys.readouterr().err
    monkeypatch.setenv("PATH", f"{bin}:{path}")
    sbatch = bin / "sbatch"
    sbatch.write_text("#!/bin/sh\necho bad >&2\necho partition >&2\nexit 1")
    sbatch.chmod(0o755)
    assert call("fig5", "--out", tmp_path, "--submit", "slurm") == 2
    assert capsys.readouterr().err == "error: the queue refused the job: bad partition\n"
    monkeypatch.setenv("SPOOL", str(spool))
    sbatch.write_text('#!/bin/sh\nn=$(ls "$SPOOL" | wc -l)\n'
                      'echo "$AGD_PYTHON" "$@" > "$SPOOL/$n"\necho $((40 + n))')  # fmt: skip
    flags = ["--submit", "slurm", "--jobs", 2, "--epochs", 3, "--sbatch=--gres=gpu:1 --time 1:00"]
    assert call("fig5", "--out", tmp_path, *flags) == 0
    array, draw = ((spool / str(i)).read_text() for i in (0, 1))
    assert "--array=0,2,3%2" in array and "--gres=gpu:1 --time 1:00" in array
    assert f"--output={tmp_path}/quick/output/" in array and "--draw" not in array
    for words in (array, draw):
        assert f" {ROOT}/scripts/slurm/array.sh fig5 " in words and f"--out {tmp_path}" in words
        assert "--epochs 3" in words and words.split()[0] == sys.executable
    assert "--dependency=afterany:40" in draw and draw.endswith(" --draw\n")
    assert "Job 40, an array of 3 runs" in capsys.readouterr().out


def test_a_run_is_finished_with_the_end_row_behind_it(small, tmp_path, capsys):
    """The last checkpoint is written before that row, and may have failed."""
    path = run_alone(tmp_path, 3)
    lines = path.read_text().splitlines(keepends=True)
    open_end = lines[-1].replace('"final": true', '"final": false')
    for end, state in ((lines[-1], "finished"), ("", "3/3 epochs"), (open_end, "3/3 epochs"),
                       ('{"kind": "end"}\n', "3/3 epochs")):  # fmt: skip
        path.write_text("".join(lines[:-1]) + end)
        capsys.readouterr()
        call("fig5", "--out", tmp_path, "--list")
        assert f"{NAME}  {state}\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["log", "checkpoint", "no checkpoint"])
def test_damage_fails_alone_and_fresh_starts_over(damage, small, tmp_path, capsys):
    path = run_alone(tmp_path, 2)
    checkpoint = tmp_path / "quick" / "checkpoints" / f"{NAME}.pt"
    if damage == "log":
        path.write_text("no log\n")
    else:  # and the one before
        for path in (checkpoint, checkpoint.with_name(f"{NAME}.pt.previous")):
            content = path.read_bytes()
            path.unlink()
            if damage == "checkpoint":
                path.write_bytes(content[:1000])
    flags = ["fig5", "--out", tmp_path, "--device", "cpu"]
    assert call(*flags) == (2 if damage == "log" else 1)
    error = capsys.readouterr().err
    assert "--fresh starts over" in error and "Traceback" not in error
    others = (tmp_path / "quick" / "logs").glob("*lr*.jsonl")
    assert [read_rows(other)[-1]["epochs"] for other in others] == [3] * 3
    assert call(*flags, "--fresh") == 0
    assert [rows[-1]["epochs"] for rows in logs(tmp_path).values()] == [3] * 4


def test_what_is_somebody_elses_stays(small, tmp_path, capsys):
    """A page, and the log of another run."""
    page = tmp_path / "README.md"
    page.write_text("# Mine\n")
    assert call("fig5", "--out", tmp_path, "--draw") == 2
    assert page.read_text() == "# Mine\n" and "choose another --out" in capsys.readouterr().err
    path = run_alone(tmp_path, 1)
    first, *lines = path.read_text().splitlines()
    first = json.loads(first)
    first["settings"]["width"] = 999
    path.write_text("\n".join([json.dumps(first), *lines]) + "\n")
    page.unlink()
    assert call("fig5", "--out", tmp_path, "--draw") == 2 and not page.exists()
