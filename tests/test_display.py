"""What a run shows on a terminal and in a file, and streams that die."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cli import Guarded, command, guard_streams
from distributed.delayed import Glance
from flags import parse, settings
from tests.conftest import ROOT
from tests.program import QUICK, only, rows, train
from tests.terminal import Terminal, printed, screen, start
from training import display

PYTHON = sys.executable
EPOCH = r"epoch %d/%d  loss \d\.\d{3}  train [\d.]+%%  test [\d.]+%%"


@pytest.fixture
def terminal(monkeypatch):
    """f(columns) -> a standard output that says it is a terminal of that size."""

    def make(columns=80):
        stream = Terminal()
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(display, "width", lambda: columns)
        return stream

    return make


def shown(stream):
    """The texts of the bar, in the order in which they were shown."""
    lines = re.split(r"[\r\n]+|\x1b\[A", stream.getvalue())
    bar = r"epoch \d+/\d+  (step|testing) |\d+/\d+  loss "
    return [line for line in lines if re.match(bar, line)]


# The terminal.


@pytest.mark.parametrize(("columns", "optimizer", "rest"), [
    (80, "agd", r"  η \d\.\d{3}  [\d,]+ img/s  \d\.\d\d s$"), (60, "agd", r"  η \d\.\d{3}$"),
    (40, "agd", ""), (80, "adam", r"  [\d,]+ img/s  \d\.\d\d s$"),
    (80, "spectral", r"  η \d\.\d{3}  turn \d\.\d+  \d\.\d\d s$"),
])  # fmt: skip
def test_a_line_an_epoch_stays_and_nothing_is_wider_than_the_terminal(
    columns, optimizer, rest, terminal, tmp_path, monkeypatch
):
    monkeypatch.setattr(display, "TENTH", 0)
    stream = terminal(columns)
    assert train(*QUICK, "--optimizer", optimizer, "--out", tmp_path) == 0
    held = screen(stream.getvalue(), columns)
    lines = [line for line in held if line.startswith("epoch ")]
    if columns >= 60:
        assert all(re.match(EPOCH % (i, 4) + rest, x) for i, x in enumerate(lines, 1)), lines
    assert len(lines) == 4 and not any("step" in line for line in held)
    texts = shown(stream)
    assert max(map(len, texts)) <= columns - 3  # ^C has room
    if columns == 40:  # the figures before the step
        wanted = ("1/4  loss ", "4/4  loss ")
        assert all("  η " in x for x in texts if x.startswith("4/4"))
    else:
        wanted = "epoch 1/4  step 12/12", "epoch 4/4  testing 0/1", "epoch 4/4  testing 1/1"
        assert all("  loss " in x for x in texts if x.startswith("epoch 4/4"))
    for text in wanted:
        assert any(x.startswith(text) for x in texts), text


@pytest.mark.parametrize(("optimizer", "graph"), [
    ("agd", False), ("agd", True), ("adam", False), ("adam", True),
])  # fmt: skip
def test_the_bar_has_the_means_of_the_steps_so_far(
    optimizer, graph, terminal, tmp_path, monkeypatch, request
):
    """From the first step on, in a resumed epoch too, whatever takes the steps."""
    if graph:
        request.getfixturevalue("replays")
    monkeypatch.setattr(display, "SECOND", 0)
    flags = [*QUICK, "--epochs", 2, "--optimizer", optimizer, "--log_steps", "--out", tmp_path]
    stream = terminal()
    assert train(*flags, asked={18: 3}) == 130  # in step 5 of epoch 2, after 12 steps and a test
    assert train(*flags) == 0
    texts = [x for x in shown(stream) if "step" in x and "loss" in x]
    steps = [row for row in rows(tmp_path) if row["kind"] == "step"]
    places = [re.match(r"epoch (\d)/2  step (\d+)/12  loss ([\d.]+)(?:  η ([\d.]+))?", x)
              for x in texts]  # fmt: skip
    assert {(int(x[1]), int(x[2])) for x in places} == {(r["epoch"], r["step"]) for r in steps}
    sizes = [128] * 11 + [29]
    for place in places:
        now = [r for r in steps if r["epoch"] == int(place[1])][: int(place[2])]
        loss = np.average([r["loss"] for r in now], weights=sizes[: len(now)])
        assert float(place[3]) == pytest.approx(loss, abs=6e-4)
        assert (place[4] is None) == (optimizer == "adam")
        if optimizer == "agd":
            assert float(place[4]) == pytest.approx(np.mean([r["eta"] for r in now]), abs=6e-4)


def test_loss_and_eta_are_read_once_a_second_and_for_a_terminal_alone(
    terminal, tmp_path, monkeypatch
):
    asked, ask = [], Glance.ask
    monkeypatch.setattr(Glance, "ask", lambda *x: (asked.append(time.monotonic()), ask(*x)))
    assert train(*QUICK, "--out", tmp_path / "file") == 0
    assert not asked
    terminal()
    assert train(*QUICK, "--epochs", 30, "--out", tmp_path / "terminal") == 0  # 360 steps
    assert asked and all(b - a > 0.9 for a, b in zip(asked, asked[1:]))


def test_a_file_gets_a_line_a_minute_of_long_epochs(tmp_path, monkeypatch, capsys):
    assert train(*QUICK, "--epochs", 1, "--out", tmp_path / "quick") == 0
    assert "in epoch" not in capsys.readouterr().out
    monkeypatch.setattr(display, "MINUTE", 0)
    assert train(*QUICK, "--epochs", 2, "--test_bs", 100, "--out", tmp_path) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("in epoch ")]
    assert len(lines) == 2 * (12 + 1 + 4)
    figures = r"  loss \d\.\d{4}  η \d\.\d{4}  00:0\d left"
    assert re.fullmatch(r"in epoch 1/2  step 7/12" + figures, lines[6])
    assert re.fullmatch(r"in epoch 2/2  testing 3/4" + figures, lines[-2])


def test_ctrl_c_leaves_whole_lines(tmp_path):
    """In a real terminal, which echoes ^C into the bar."""
    flags = ["--cpu", *QUICK[:-1], "1000", "--train_bs", "2", "--out", str(tmp_path)]
    process, controller = start([PYTHON, "main.py", *flags], 80, cwd=ROOT)
    before = printed(controller, until="epoch 1/1000  loss")
    os.write(controller, b"\x03")
    held = screen(before + printed(controller), 80)
    assert process.wait(60) == 130
    begin = next(i for i, line in enumerate(held) if re.match(EPOCH % (1, 1000), line))
    last = next(i for i, line in enumerate(held) if line.startswith("Interrupted after "))
    between = [x for x in held[begin:last] if x and not re.match(r"epoch \d+/1000  loss ", x)]
    assert between == ["Stopping after this step; Ctrl-C again, a second later: at once"]


def test_the_settings_are_those_off_their_defaults():
    def names(*flags):
        return dict(settings(parse(["--cpu", *flags])))

    assert names() == {"device": "cpu"}
    given = names("--dataset", "digits", "--seed", "3", "--bias", "--optimizer", "adam")
    assert given == {"device": "cpu", "dataset": "digits", "seed": 3, "bias": "on",
                     "optimizer": "adam", "lr": 0.001}  # fmt: skip
    assert names("--test_bs", "7") == {"device": "cpu", "test_bs": 7}
    assert names("--epochs", "200", "--depth", "10") == {"device": "cpu"}


@pytest.mark.parametrize(("depth", "lines"), [(3, 3), (12, 12), (13, 10)])
def test_of_a_long_network_the_ends_are_printed(depth, lines, tmp_path, capsys):
    flags = ["--dataset", "digits", "--train_examples", 64, "--test_examples", 8, "--width", 8,
             "--epochs", 1, "--depth", depth, "--out", tmp_path]  # fmt: skip
    assert train(*flags) == 0
    table = re.search(r"^Layer .*?^\n", capsys.readouterr().out, re.M | re.S)[0]
    assert len(table.strip().splitlines()) == 2 + lines
    assert "layers.0.weight" in table and f"layers.{depth - 1}.weight" in table
    assert (f"... {depth - 9} more" in table) == (depth > 12)


@pytest.mark.parametrize(("size", "noted"), [(1437, False), (1438, True), (10**9, True)])
def test_a_batch_larger_than_the_training_set_is_noted(size, noted, tmp_path, capsys):
    assert train(*QUICK, "--epochs", 1, "--train_bs", size, "--out", tmp_path) == 0
    text = f"Note: --train_bs {size} is more than the training images"
    assert (text in capsys.readouterr().out) == noted


# Hints.


@pytest.mark.parametrize("folder", ["root", "elsewhere", "gone"])
def test_a_hint_is_a_command_for_the_folder_one_is_in(folder, tmp_path, monkeypatch, capsys):
    place = ROOT if folder == "root" else tmp_path / "my runs"
    place.mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    if folder == "gone":
        place.rmdir()
    out = tmp_path / "it's here"
    assert train(*QUICK, "--epochs", 1, "--out", out) == 0
    line = re.search("^Curves +(.*)$", capsys.readouterr().out, re.M)[1]
    start, *words = shlex.split(line)
    assert start == "python" and words[-2:] == ["-o", "curves.png"]
    assert Path(words[-3]) == out / "logs" / f"{only(out)}.jsonl"
    if folder == "root":
        assert words[:-3] == ["-m", "scripts.plot"] and command("main") == "python main.py"
    else:
        assert words[:-3] == [str(ROOT / "scripts" / "plot.py")]
        assert command("main", "--out", "a b") == f"python {ROOT}/main.py --out 'a b'"


# Streams that die: the command's streams, in the words of a shell.

WAYS = {
    "stdout full": ">/dev/full",
    "both full": ">/dev/full 2>&1",
    "stdout closed": ">&-",
    "all closed": "<&- >&- 2>&-",
    "stderr closed": "2>&- >/dev/null",
    "the reader is gone": "| true",
    "the reader of both is gone": "2>&1 | true",
}
RUN = (f"main.py --cpu {shlex.join(QUICK)} --train_examples 256 --test_examples 100 --out {{tmp}}")
COMMANDS = {
    RUN: 0,
    f"-u {RUN}": 0,
    f"{RUN} --check": 0,
    "main.py --help": 0,
    "main.py --no_such_flag": 2,
    "-m scripts.experiments": 0,
    "-m scripts.reproduce all --list --out {tmp}": 0,
    "-m scripts.suite --list --out {tmp}": 0,
    "-m data.prepare --help": 0,
    "-m data.prepare mnist --resize 64": 2,
    "-m scripts.plot --help": 0,
}
QUICKLY = [("-m scripts.experiments", way) for way in WAYS]
QUICKLY += [("-m data.prepare mnist --resize 64", way) for way in ("both full", "all closed")]
QUICKLY += [(RUN, "the reader of both is gone")]


def dies(words, way, tmp_path):
    """The exit code of `python words` while its streams die."""
    line = f"{shlex.quote(PYTHON)} {words.format(tmp=shlex.quote(str(tmp_path)))}"
    begin = "sleep 0.2; " if way.startswith("the reader") else ""  # until `true` has ended
    done = subprocess.run(
        ["bash", "-c", f"({begin}exec {line}) {WAYS[way]}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT,
        stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    return done.returncode


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize(("words", "way"), [
    pytest.param(words, way, marks=[] if (words, way) in QUICKLY else pytest.mark.slow)
    for words in COMMANDS for way in WAYS
])  # fmt: skip
def test_no_failed_print_ends_a_command(words, way, tmp_path):
    assert dies(words, way, tmp_path) == COMMANDS[words]
    if RUN in words and "--check" not in words:
        assert [row["kind"] for row in rows(tmp_path)] == ["run", *["epoch"] * 4, "end"]


PRINTER = """
import logging, os, subprocess, sys, warnings
from tqdm import tqdm
from cli import guard_streams
guard_streams()
file = open({file!r}, "w")
for i in tqdm(range(300), file=sys.stdout, mininterval=0):
    print("x" * 100, flush=i % 2)
    print("é \\udc80", file=sys.stderr)
    sys.stdout.writelines(["a", "b"])
    tqdm.write("y")
warnings.warn("careful")
logging.error("careful")
try:
    os.write(1, b"what a C library prints")
except OSError:
    pass
child = "import sys; sys.exit(sys.stdout is None or sys.stderr is None)"
code = subprocess.run([sys.executable, "-c", child]).returncode
file.write(f"the end {{code}}")
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("way", WAYS)
def test_whatever_prints(way, tmp_path):
    """No file takes the number of a closed stream, and child processes have streams, too."""
    file, script = tmp_path / "log", tmp_path / "print.py"
    script.write_text(PRINTER.format(file=str(file)))
    assert dies(f"-c 'import runpy; runpy.run_path(\"{script}\")'", way, tmp_path) == 0
    assert file.read_text() == "the end 0"


def test_prints_come_again_once_the_disk_has_room(tmp_path, monkeypatch):
    class Disk(Terminal):
        full = True

        def write(self, text):
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    disk = Disk()
    monkeypatch.setattr(sys, "stdout", disk)
    guard_streams()
    guarded = sys.stdout
    guard_streams()
    assert sys.stdout is guarded and isinstance(guarded, Guarded) and guarded.isatty()
    print("lost", flush=True)
    disk.full = False
    print("kept", flush=True)
    disk.close()
    print("lost", flush=True)
    assert guarded.closed


@pytest.mark.slow
def test_a_terminal_that_closes_ends_no_run(tmp_path):
    """As when a connection drops: Ctrl-C and the bar have no terminal then."""
    flags = ["--cpu", *QUICK[:-1], "40", "--out", str(tmp_path)]
    code = ("import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
            "import main; sys.exit(main.main(sys.argv[1:]))")  # fmt: skip
    process, controller = start([PYTHON, "-c", code, *flags], 80, cwd=ROOT)
    printed(controller, until="epoch 3/40  loss")
    os.close(controller)
    assert process.wait(60) == 0
    assert [row["kind"] for row in rows(tmp_path)] == ["run", *["epoch"] * 40, "end"]
