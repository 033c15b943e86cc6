import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main as program
from flags import parse
from runs.log import read_rows
from scripts import experiments, reproduce, results, runner
from scripts.experiments import FIGURES, PEERS, RULES, SCALES, SPECTRAL, Experiment
from scripts.results import Results, log_name
from tests.conftest import ROOT

DIGITS = "--arch fcn --depth 3 --width 16 --dataset digits --log_updates"


def small_table(scale, epochs=3):
    """Figure 5 on digits: four runs of a second each."""
    rows = []
    for curve, rate in (("AGD", None), ("Adam", "1e-3"), ("Adam", "1e-1"), ("SGD", "1e-1")):
        words = [*shlex.split(DIGITS), "--optimizer", curve.lower()]
        words += ["--lr", rate] if rate else []
        rows.append(Experiment("fig5", "fcn", curve, epochs, (*words, "--seed", "0")))
    return rows


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(results, "experiments", small_table)


def call(*argv):
    return reproduce.main([str(x) for x in argv])


def start(out, *argv, epochs=3):
    """The command in a process of its own, over the small table."""
    code = (
        "import sys; from scripts import results; from tests import test_reproduce as t; "
        f"results.experiments = lambda scale: t.small_table(scale, {epochs}); "
        "from scripts import reproduce; sys.exit(reproduce.main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "fig5", "--out", str(out), "--device", "cpu", *argv],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # their number has a say in the last digits
    )  # fmt: skip


def logs(out, scale="quick"):
    return {path.stem: read_rows(path) for path in (Path(out) / scale / "logs").glob("*.jsonl")}


def lasting(rows):
    """What does not differ from run to run."""
    drop = {"seconds", "images_per_second", "date", "flags", "saving_seconds"}
    return [{k: v for k, v in row.items() if k not in drop} for row in rows]


def test_every_row_of_the_table_parses():
    for scale in SCALES:
        for row in experiments.experiments(scale):
            assert row.figure in FIGURES and row.epochs >= 1
            argv = [*row.flags, "--epochs", str(row.epochs), "--device", "cpu"]
            args = parse(argv, check=row.curve not in PEERS)
            expected = {**RULES, **PEERS}.get(row.curve, row.curve.lower())
            assert args.optimizer == expected and args.epochs == row.epochs
            if row.curve in ("Adam", "SGD"):
                assert args.lr == float(row.flag("--lr"))


@pytest.mark.parametrize("scale", SCALES)
def test_a_name_of_a_run_means_one_set_of_flags(scale):
    table = experiments.experiments(scale)
    flags = {}
    for row in table:
        assert flags.setdefault(log_name(row.flags), row.flags) == row.flags
    assert len(set(table)) == len(table)


def test_the_table_is_the_papers():
    table = experiments.experiments("full")
    assert {row.figure for row in table} == set(FIGURES) - {"fig2"}
    assert len([row for row in table if row.figure == "fig6"]) == 30
    middle = [row for row in table if row[:3] == ("fig1", "rates", "SGD")]
    assert [float(row.flag("--lr")) for row in middle] == [10.0**k for k in range(-7, 2)]
    for figure, panel, curve in (("fig5", "fcn", "SGD"), ("fig4", "resnet18", "Adam")):
        grid = [row for row in table if row[:3] == (figure, panel, curve)]
        assert [float(row.flag("--lr")) for row in grid] == [10.0**k for k in range(-5, 0)]
    for figure, seeds in (("fig5", 3), ("fig8", 3), ("fig11", 1)):
        spectral = [row for row in table if row[:3] == (figure, "fcn", SPECTRAL)]
        assert len(spectral) == seeds
    batches = {row.flag("--train_bs") for row in table if row.figure == "fig7"}
    assert batches == {"32", "128", "1024", "4096"}


def test_runs_draws_and_skips_what_is_finished(small, tmp_path, capsys):
    assert call("fig5", "--out", tmp_path, "--jobs", 2, "--device", "cpu") == 0
    assert "4 runs: 0 finished, 4 to do" in capsys.readouterr().out
    before = logs(tmp_path)
    assert len(before) == 4
    for rows in before.values():
        assert [row["epoch"] for row in rows if row["kind"] == "epoch"] == [1, 2, 3]
    for suffix in ("png", "pdf"):
        assert (tmp_path / "quick" / "figures" / f"fig5.{suffix}").stat().st_size > 5000
    page = (tmp_path / "README.md").read_text()
    assert "quick/figures/fig5.png" in page and "FCN 3×16, digits, Adam at 1e-3" in page
    kept = list((tmp_path / "quick" / "logs").iterdir())
    times = [path.stat().st_mtime_ns for path in kept]
    assert call("fig5", "--out", tmp_path) == 0
    assert "4 runs: 4 finished, 0 to do" in capsys.readouterr().out
    assert times == [path.stat().st_mtime_ns for path in kept]


def test_a_run_alone_is_the_run_of_the_table(small, tmp_path):
    """What is reproduced is what main.py does by itself, but for the number of threads."""
    assert call("fig5", "--out", tmp_path / "a", "--runs", "agd", "--device", "cpu") == 0
    row = small_table("quick")[0]
    out = tmp_path / "b" / "quick"
    program.main([*row.flags, "--epochs", "3", "--out", str(out), "--device", "cpu"])
    ((name, ours),) = logs(tmp_path / "a").items()
    theirs = logs(tmp_path / "b")[name]
    threads = ("threads",)  # one job of many has one thread, and main.py all of them
    assert [{**r, **dict.fromkeys(threads)} for r in lasting(ours)[:1]] == [
        {**r, **dict.fromkeys(threads)} for r in lasting(theirs)[:1]
    ]
    for mine, other in zip(ours[1:], theirs[1:]):
        if mine["kind"] == "epoch":
            assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def processes(out):
    """Those that have the folder on their command line, this one's own children aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"scripts.worker" in words and any(str(out).encode() in word for word in words):
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks at /proc")
def test_killed_it_takes_its_runs_along_and_goes_on(tmp_path):
    """SIGKILL loses an epoch of a run at most, and what comes out is what would have."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(killed, "--jobs", "1", epochs=60)
    path = killed / "quick" / "logs" / f"{log_name(small_table('')[0].flags)}.jsonl"
    end = time.monotonic() + 120
    while results.epochs_done(path) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = results.epochs_done(path)
    assert done >= 3
    end = time.monotonic() + 30
    while processes(killed) and time.monotonic() < end:
        time.sleep(0.05)
    assert not processes(killed)
    again = start(killed, "--jobs", "2", epochs=60)
    assert again.wait(300) == 0, again.stdout.read()
    output = (killed / "quick" / "output" / f"{path.stem}.txt").read_text()
    if done < 60:
        went_on = int(output.split("Going on after epoch ")[1].split(",")[0])
        assert went_on >= done - 1
    unbroken = start(whole, "--jobs", "2", epochs=60)
    assert unbroken.wait(300) == 0
    for name, rows in logs(whole).items():
        ours = [row for row in lasting(logs(killed)[name]) if row["kind"] == "epoch"]
        assert ours == [row for row in lasting(rows) if row["kind"] == "epoch"]


def test_a_time_limit_stops_cleanly_and_the_command_goes_on(tmp_path):
    process = start(tmp_path, "--jobs", "1", "--time_limit", "14s", epochs=5000)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == reproduce.TIME_IS_UP, said
    assert "The time is up" in said and "Traceback" not in said
    (rows,) = logs(tmp_path).values()
    assert rows[-1]["kind"] == "end" and rows[-1]["stopped"] == "interrupted"
    done = sum(row["kind"] == "epoch" for row in rows)
    again = start(tmp_path, "--jobs", "4", "--epochs", str(done + 1), epochs=5000)
    said = again.communicate(timeout=200)[0]
    assert again.returncode == 0, said
    assert {len(rows) for rows in logs(tmp_path).values()} == {done + 3}


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_and_says_how_to_go_on(ending, tmp_path, samples):
    data_dir = samples("cifar10")
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.reproduce", "phases", "--out", str(tmp_path),
         "--device", "cpu", "--data_dir", str(data_dir)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    path = tmp_path / "quick" / "logs"
    wait_for(lambda: path.exists() and any(map(results.epochs_done, path.glob("*.jsonl"))))
    process.send_signal(ending)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command goes on" in said
    assert "Traceback" not in said
    (rows,) = logs(tmp_path).values()
    assert rows[-1]["stopped"] == "interrupted"


def worker(out, *flags, **options):
    words = [*shlex.split(DIGITS), *map(str, flags), "--out", str(out), "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.worker", *words], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_a_worker_ends_quietly_and_with_mains_exit_code(tmp_path):
    """Its standard input stays open until then."""
    good, bad = worker(tmp_path, "--epochs", 1), worker(tmp_path, "--lr", 1)
    assert (good.wait(120), good.stderr.read()) == (0, "")
    assert bad.wait(120) == 2


def ignore_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.skipif(sys.platform == "win32", reason="preexec_fn")
@pytest.mark.parametrize("early", [False, True])
def test_a_worker_stops_when_it_is_asked_to(early, tmp_path):
    """Also while it is starting, and where Ctrl-C is ignored, as under nohup."""
    process = worker(tmp_path, "--epochs", 100000, preexec_fn=ignore_interrupts)
    path = tmp_path / "logs"
    if not early:
        wait_for(lambda: path.exists() and any(map(results.epochs_done, path.glob("*.jsonl"))))
    process.stdin.write("s")
    process.stdin.flush()
    assert process.wait(60) == 130
    assert "Traceback" not in process.stderr.read()


def test_a_worker_ends_with_the_process_that_holds_its_input(tmp_path):
    process = worker(tmp_path, "--epochs", 100000)
    wait_for(lambda: list(tmp_path.glob("logs/*.jsonl")))
    process.stdin.close()
    assert process.wait(60) == 1


def test_a_run_that_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    bad = Experiment("fig5", "fcn", "AGD", 3, ("--arch", "fcn", "--depth", "3", "--width", "16",
        "--dataset", "npz:broken.npz", "--optimizer", "agd", "--seed", "7"))  # fmt: skip
    monkeypatch.setattr(results, "experiments", lambda scale: [bad, *small_table(scale)[1:]])
    code = call("fig5", "--out", tmp_path, "--data_dir", tmp_path, "--device", "cpu")
    assert code == 1
    said = capsys.readouterr()
    assert "broken.npz is damaged" in said.err and "Traceback" not in said.err
    assert len(logs(tmp_path)) == 3


def test_what_is_not_at_hand_is_left_out_by_name(monkeypatch, tmp_path, capsys):
    from data import DataError

    def refuse(name, data_dir, source=None):
        raise DataError(f"{name} could not be fetched: no network\nmore words")

    monkeypatch.setattr("data.prepare.prepare", refuse)
    table = experiments.experiments("full")
    table = [row for row in table if row.figure in ("fig1", "fig3", "fig8")]
    monkeypatch.setattr(results, "experiments", lambda scale: table)
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    assert call("all", "--scale", "full", "--out", tmp_path, "--data_dir", tmp_path) == 0
    said = capsys.readouterr().out
    assert "of fig1, fig3, fig8: cifar10 could not be fetched: no network; `python -m data" in said
    assert f"left out, 2 of fig1: there is no folder {tmp_path}/imagenet" in said
    assert "0 to do" in said and "fig1: nothing to draw yet" in said
    # The data there, the optional packages not.
    (tmp_path / "cifar10.npz").write_bytes(b"")
    flags = ["--scale", "full", "--out", tmp_path, "--data_dir", tmp_path]
    assert call("fig8", "--list", *flags) == 0
    said = capsys.readouterr().out
    assert said.count("pip install") == 3 and "pip install prodigyopt" in said


def test_a_longer_figure_goes_on_from_a_shorter_one(monkeypatch, tmp_path):
    """Figures that share a run read as much of it as they show."""
    short = [row._replace(figure="fig8", epochs=1) for row in small_table("")]
    monkeypatch.setattr(results, "experiments", lambda scale: short + small_table(scale))
    assert call("fig8", "--out", tmp_path, "--device", "cpu") == 0
    assert call("fig5", "--out", tmp_path, "--device", "cpu") == 0
    there = Results(tmp_path, "quick")
    assert [len(x.epochs) for x in there.of("fig8")] == [1] * 4
    assert [len(x.epochs) for x in there.of("fig5")] == [3] * 4
    assert all(x.finished for x in there.of("fig8") + there.of("fig5"))


def test_the_tasks_of_a_figure_begin_with_the_longest():
    there = Results("nowhere", "quick")
    every = runner.tasks(there, ["fig6"])
    work = [runner.cost(task) * task.epochs for task in every]
    assert work == sorted(work, reverse=True)
    assert max(task.epochs for task in runner.tasks(there, ["fig6"], 2)) == 2
    both = runner.tasks(there, ["fig1", "fig5"])
    assert len({task.flags for task in both}) == len(both)


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("9m", 540), ("1.5h", 5400),
                                           ("1h30m", 5400)])  # fmt: skip
def test_duration(text, seconds):
    assert reproduce.duration(text) == seconds


@pytest.mark.parametrize(
    "argv, said",
    [
        (["fig9"], "did you mean fig"),
        ([], "FIGURE"),
        (["fig5", "--time_limit", "9"], "no time"),
        (["fig5", "--time_limit", "0s"], "no time"),
        (["fig5", "--scale", "ful"], "did you mean full"),
        (["fig5", "--jobs", "0"], "whole number"),
        (["fig5", "--runs", "99"], "the numbers 0 to 15"),
        (["fig5", "--runs", "0,-"], "'0,-' are no numbers"),
        (["fig5", "--runs", "resnet"], "no run of that name"),
        (["fig5", "--runs", ""], "no numbers"),
        (["fig5", "--sbatch=--gres=gpu:1"], "--submit slurm"),
        (["fig5", "--sbatch", "--x 'y", "--submit", "slurm"], "No closing quotation"),
        (["fig5", "--fresh", "--submit", "slurm"], "leave it out"),
        (["fig5", "--submit", "slurm", "--draw"], "leave out"),
        (["fig5", "--drw"], "did you mean --draw"),
    ],
)
def test_a_wrong_command_is_one_sentence(argv, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        call(*argv, "--out", tmp_path)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert "python -m scripts.reproduce --help" in error


def test_submit_sends_an_array_of_what_is_missing_and_draws_after_it(
    small, tmp_path, monkeypatch, capsys
):
    """With an sbatch that writes down what it gets."""
    assert call("fig5", "--out", tmp_path, "--runs", "1", "--device", "cpu") == 0
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\nn=$(ls "$SPOOL" | wc -l)\necho "$AGD_PYTHON" "$@" > "$SPOOL/$n"\n'
        "echo $((40 + n))\n"
    )
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setenv("SPOOL", str(spool))
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    flags = ["--submit", "slurm", "--jobs", 2, "--epochs", 3, "--sbatch=--gres=gpu:1 --time 1:00"]
    assert call("fig5", "--out", tmp_path, *flags) == 0
    array, draw = ((spool / str(i)).read_text() for i in (0, 1))
    assert "--array=0,2,3%2" in array and "--gres=gpu:1 --time 1:00" in array
    assert "--epochs 3" in array and "--epochs 3" in draw
    script = f" {ROOT}/scripts/slurm/array.sh fig5 "
    assert script in array and script in draw and array.split()[0] == sys.executable
    assert f"--out {tmp_path}" in array and f"--out {tmp_path}" in draw
    assert "--dependency=afterany:40" in draw and draw.endswith(" --draw\n")
    assert "--draw" not in array and f"--output={tmp_path}/quick/output/" in array
    assert "Job 40, an array of 3 runs" in capsys.readouterr().out


def test_submit_without_slurm_says_so(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call("fig5", "--out", tmp_path, "--submit", "slurm") == 2
    assert "no sbatch here" in capsys.readouterr().err
    fake = tmp_path / "sbatch"
    fake.write_text("#!/bin/sh\necho bad >&2\necho partition >&2\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert call("fig5", "--out", tmp_path, "--submit", "slurm") == 2
    assert capsys.readouterr().err == "error: the queue refused the job: bad partition\n"


def test_a_run_gets_its_share_of_the_cores_and_a_session_of_its_own(monkeypatch, tmp_path):
    seen = []

    class Process:
        def __init__(self, words, **options):
            seen.append((words, options))

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(runner, "cores", lambda: 8)
    there = Results(tmp_path, "quick")
    some = runner.Runner(there, 3, ["--device", "cpu"], None, "fig5")
    some._start(runner.tasks(there, ["fig5"])[0])
    ((words, options),) = seen
    assert options["env"]["OMP_NUM_THREADS"] == "2" and options["start_new_session"]
    assert words[1:3] == ["-m", "scripts.worker"] and words[-2:] == ["--device", "cpu"]


def test_the_time_left_is_that_of_the_work_left(monkeypatch, tmp_path):
    there = Results(tmp_path, "quick")
    some = runner.Runner(there, 1, [], None, "fig5")
    some.todo = runner.tasks(there, ["fig5"])[-4:]  # equally long
    done = dict.fromkeys(some.todo, 0)
    monkeypatch.setattr(some, "_epochs", done.__getitem__)
    some.at_start = dict(done)
    assert some.time_left() == "? left"
    n = some.todo[0].epochs
    done[some.todo[0]] = n
    some.began = time.monotonic() - 60
    assert some.time_left() == "3:00 left"
    some.ended.add(some.todo[1])  # broke off at once: its work is neither done nor left
    assert some.time_left() == "2:00 left"


def test_the_runs_stop_before_the_time_is_up(monkeypatch):
    monkeypatch.setattr(reproduce, "BEGAN", 100.0)
    for figures in (["fig5"], list(FIGURES)):
        for limit in (5, 60, 540):
            args = reproduce.parse([*figures, "--time_limit", f"{limit}s"])[1]
            assert 100 < reproduce.deadline(args) < 100 + limit
    assert reproduce.deadline(reproduce.parse(["fig5"])[1]) is None


def test_a_limit_in_which_nothing_can_be_done_says_so(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "BEGAN", time.monotonic() - 100)
    assert call("fig5", "--out", tmp_path, "--time_limit", "2s") == reproduce.TIME_IS_UP
    assert "give it a longer one" in capsys.readouterr().out
    assert not (tmp_path / "quick").exists()


def test_a_run_is_finished_with_the_end_row_behind_it(small, tmp_path):
    """The last checkpoint is written before that row, and may have failed."""
    assert call("fig5", "--out", tmp_path, "--runs", "0", "--device", "cpu") == 0
    (path,) = (tmp_path / "quick" / "logs").glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    task = runner.tasks(Results(tmp_path, "quick"), ["fig5"])[0]
    assert runner.is_finished(Results(tmp_path, "quick"), task)
    for end in ("", lines[-1].replace('"final": true', '"final": false'), '{"kind": "end"}\n'):
        path.write_text("".join(lines[:-1]) + end)
        assert not runner.is_finished(Results(tmp_path, "quick"), task)


@pytest.mark.parametrize("damage", ["no checkpoint", "checkpoint", "log"])
def test_what_is_damaged_fails_alone_and_fresh_starts_it_over(damage, small, tmp_path, capsys):
    flags = ["fig5", "--out", tmp_path, "--device", "cpu"]
    assert call(*flags, "--epochs", 2) == 0
    name = log_name(small_table("")[0].flags)
    checkpoint = tmp_path / "quick" / "checkpoints" / f"{name}.pt"
    if damage == "log":
        (tmp_path / "quick" / "logs" / f"{name}.jsonl").write_text("no log\n")
    else:  # and the one before
        for path in (checkpoint, checkpoint.with_name(f"{name}.pt.previous")):
            if damage == "no checkpoint":
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[:1000])
    assert call(*flags) == (2 if damage == "log" else 1)
    said = capsys.readouterr().err
    assert "--fresh starts over" in said and "Traceback" not in said
    assert sum(rows[-1]["epochs"] == 3 for n, rows in logs_but(tmp_path, name)) == 3
    assert call(*flags, "--fresh") == 0
    assert {rows[-1]["epochs"] for rows in logs(tmp_path).values()} == {3}


def logs_but(out, name):
    """The logs aside from one."""
    paths = (Path(out) / "quick" / "logs").glob("*.jsonl")
    return [(path.stem, read_rows(path)) for path in paths if path.stem != name]


def test_two_commands_do_not_make_the_same_run(tmp_path):
    first = worker(tmp_path, "--epochs", 100000)
    wait_for(lambda: any(map(results.epochs_done, tmp_path.glob("logs/*.jsonl"))))
    second = worker(tmp_path, "--epochs", 100000)
    assert second.wait(60) == 2
    assert "another process is making" in second.stderr.read()
    first.stdin.write("s")
    first.stdin.flush()
    assert first.wait(60) == 130


def test_the_reason_of_a_failure_is_one_that_tells(small, tmp_path):
    some = runner.Runner(Results(tmp_path, "quick"), 1, [], None, "fig5")
    task = runner.tasks(some.results, ["fig5"])[0]
    output = some._output(task)
    output.parent.mkdir(parents=True)
    output.write_text("epoch 3/60 loss 0.8\n\nStopped: OSError: no space.\nLog  x\nWeights  y\n")
    assert some._reason(1, task) == "Stopped: OSError: no space."
    assert some._reason(-9, task) == "killed by SIGKILL"


def test_a_page_of_somebody_elses_stays(small, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("# Mine\n")
    assert call("fig5", "--out", tmp_path, "--draw") == 2
    assert page.read_text() == "# Mine\n" and "choose another --out" in capsys.readouterr().err


def test_an_out_that_is_a_file_and_a_device_that_is_not_there(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for flags in (["--out", tmp_path / "file"], ["--out", tmp_path, "--device", "cuda:99"]):
        with pytest.raises(SystemExit) as exit:
            call("fig5", *flags)
        assert exit.value.code == 2
    said = capsys.readouterr().err
    assert "is a file" in said and "no device 'cuda:99' here" in said


def test_to_list_and_to_draw_fetches_nothing(monkeypatch, tmp_path, capsys):
    def fetch(*args):
        raise AssertionError("fetched")

    monkeypatch.setattr("data.prepare.prepare", fetch)
    for what in ("--list", "--draw"):
        assert call("fig5", what, "--out", tmp_path, "--data_dir", tmp_path / "none") == 0
    assert "cifar10.npz yet" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_the_stand_in_gives_way_to_cifar100(tmp_path):
    task = next(task for task in runner.tasks(Results(tmp_path, "quick"), ["fig4"])
                if "npz:tiny100.npz" in task.flags)  # fmt: skip
    (tmp_path / "tiny100.npz").write_bytes(b"")
    assert runner.Availability(tmp_path, False).lacking(task) is None
    (tmp_path / "cifar100.npz").write_bytes(b"")
    assert runner.Availability(tmp_path, False).lacking(task) == "CIFAR-100 itself is here"


def test_a_log_of_another_run_is_not_taken_for_this_one(small, tmp_path):
    assert call("fig5", "--out", tmp_path, "--runs", "0", "--device", "cpu") == 0
    (path,) = (tmp_path / "quick" / "logs").glob("*.jsonl")
    lines = path.read_text().splitlines()
    first = json.loads(lines[0])
    first["settings"]["width"] = 999
    path.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    assert call("fig5", "--out", tmp_path, "--draw") == 2
