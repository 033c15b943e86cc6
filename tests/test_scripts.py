"""Commands that are started from any folder; `python -m scripts.plot`; numbers for people."""

import json
import math
import re
import subprocess
import sys

import pytest

import main as program
from cli import command
from runs.log import RunError
from scripts import plot
from scripts.words import number, rate_name, significant
from tests.conftest import ROOT
from tests.test_structure import COMMANDS


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "my runs"  # "above" has no others
    for flags in (["--seed", "0"], ["--seed", "1"], ["--optimizer", "adam"]):
        program.main(["--dataset", "digits", "--depth", "3", "--width", "16", "--epochs", "3",
                      "--out", str(out), *flags])  # fmt: skip
    return sorted((out / "logs").glob("*.jsonl"))


def drawn(*paths):
    return plot.draw(plot.logs(paths)[0])


def edited(log, path, *, data=None, **settings):
    """A copy of a log with other settings in its first row."""
    first, *rest = log.read_text().splitlines()
    first = json.loads(first)
    first["settings"] |= settings | ({"data": data} if data else {})
    path.write_text("\n".join([json.dumps(first), *rest]))
    return path


def test_plot_draws_loss_accuracy_and_eta(logs, tmp_path):
    """By its path, in another folder, from a folder with a space in its name."""
    figure = drawn(*logs)
    loss, accuracy, eta = figure.axes
    assert len(loss.lines) == len(accuracy.lines) == 6  # three runs, train and test
    assert len(eta.lines) == 2  # Adam has no eta
    rows = [json.loads(line) for line in logs[0].read_text().splitlines()[1:4]]
    assert list(loss.lines[0].get_ydata()) == [row["train_loss"] for row in rows]
    path = tmp_path / "curves.pdf"
    line = [sys.executable, ROOT / "scripts" / "plot.py", logs[0].parents[1], "-o", path.name]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "Drawn: curves.pdf\n" and not done.stderr
    assert path.stat().st_size > 5000


def test_each_epoch_of_a_long_run_is_drawn_and_small_numbers_in_decimals(logs, tmp_path):
    first, row = map(json.loads, logs[-1].read_text().splitlines()[:2])
    rows = [{**row, "epoch": n, "train_loss": 0.8 * 0.97**n} for n in range(1, 81)]
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(map(json.dumps, [first, *rows])))
    loss, _, eta = drawn(path).axes
    assert list(loss.lines[0].get_ydata()) == [row["train_loss"] for row in rows]
    assert [*loss.lines[0].get_xdata()] == [*eta.lines[0].get_xdata()] == list(range(1, 81))
    loss.figure.draw_without_rendering()
    labels = {label.get_text() for label in loss.get_yticklabels()}
    assert {"0.1", "0.2", "0.5"} <= labels and not any("10^" in label for label in labels)


@pytest.fixture(scope="module")
def text_logs(tmp_path_factory):
    out = tmp_path_factory.mktemp("texts")
    for flags in ([], ["--optimizer", "adamw", "--schedule", "cosine", "--weight_decay", "0.1"]):
        program.main(["--arch", "gpt", "--dataset", "shakespeare", "--depth", "1", "--width", "16",
                      "--heads", "2", "--context", "8", "--epoch_steps", "2", "--train_bs", "4",
                      "--epochs", "2", "--test_examples", "20", "--out", str(out), *flags])
    return sorted((out / "logs").glob("*.jsonl"))


def test_a_text_is_drawn_in_nats_and_bits_with_its_validation(logs, text_logs, tmp_path):
    figure = drawn(*text_logs)
    loss, accuracy, eta = figure.axes
    rows = [json.loads(line) for line in text_logs[0].read_text().splitlines()[1:3]]
    assert list(loss.lines[1].get_ydata()) == [row["test_loss"] for row in rows]
    assert loss.get_ylabel() == "loss (nats a token)" and len(eta.lines) == 1
    (bits,) = loss.child_axes
    assert bits.get_ylabel() == "bits a byte"
    figure.draw_without_rendering()
    assert bits.get_ylim() == pytest.approx([y / math.log(2) for y in loss.get_ylim()])
    words = [x.get_text() for x in accuracy.get_legend().get_texts()]
    assert words == ["train", "validation"]
    title, labels = plot.titles(plot.logs(text_logs)[0])
    assert title.startswith("GPT 1×16, Shakespeare") and "biases" not in title
    assert labels == ["AGD", "AdamW, decay 0.1, cosine over 2 epochs"]
    # Beside images it has no unit of its own; nor bits where bytes are unknown.
    assert drawn(text_logs[0], logs[0]).axes[0].get_ylabel() == "objective"
    bare = tmp_path / "bare.jsonl"
    bare.write_text("\n".join(json.dumps({k: v for k, v in json.loads(line).items()
                    if "bits" not in k}) for line in text_logs[0].read_text().splitlines()))
    assert not drawn(bare).axes[0].child_axes


def test_what_is_common_is_the_title_and_what_differs_the_legend(logs, tmp_path):
    def told(*paths):
        return plot.titles(plot.logs(paths)[0])

    network = "FCN 3×16, digits, batch 128"
    assert told(logs[0]) == (f"{network}, Adam lr 1e-3, seed 0", [""])
    assert told(*logs) == (network, ["Adam lr 1e-3, seed 0", "AGD, seed 0", "AGD, seed 1"])
    figure = drawn(*logs[:2])
    assert figure.get_suptitle() == f"{network}, seed 0"
    assert [x.get_text() for x in figure.legends[0].get_texts()] == ["Adam lr 1e-3", "AGD"]
    assert not drawn(logs[0]).legends
    jpeg = {"file": "cifar10.npz", "crc32": {"train_images": "2926c671"}}
    others = [
        edited(logs[1], tmp_path / "a.jsonl", dataset="cifar10", data=jpeg, lr=1e-3,
               optimizer="adam"),
        edited(logs[1], tmp_path / "b.jsonl", arch="resnet18", dataset="cifar10", loss="xent",
               optimizer="spectral", precision="bf16", depth=None, width=None),
        edited(logs[1], tmp_path / "c.jsonl", arch="timm:vit_tiny", dataset="folder:/a/birds",
               optimizer="prodigyopt.Prodigy", later="on", train_examples=1000),
    ]  # fmt: skip
    title, labels = told(*others)
    assert title == "batch 128, seed 0"
    assert labels[0].startswith("FCN 3×16, JPEG CIFAR-10, all images, square loss, Adam lr 1e-3")
    assert "ResNet-18, CIFAR-10, all images, cross-entropy, SpectralAGD, bf16" in labels[1]
    assert labels[2].startswith("vit_tiny, birds, 1,000 images") and "later on" in labels[2]
    assert "Prodigy" in labels[2] and "later as usual" in labels[0]
    with pytest.raises(RunError, match="odd.jsonl has settings that are not main.py's"):
        told(edited(logs[1], tmp_path / "odd.jsonl", gain="much"))
    # Copies of one run are told apart by their places.
    copy = tmp_path / "copy" / "logs"
    copy.mkdir(parents=True)
    (copy / logs[1].name).write_text(logs[1].read_text())
    title, labels = told(logs[1], copy / logs[1].name)
    assert title == f"{network}, AGD, seed 0" and len(set(labels)) == 2 and "copy" in labels[1]


@pytest.mark.parametrize("count", [1, 2, 5, 12, 43])
def test_a_picture_is_a_column_wide_whatever_the_number_of_runs(count, logs, tmp_path):
    """All words are inside; up to 42 runs have lines of their own and a legend."""
    name = "torchvision:" + "a_very_long_name_of_a_network" * 3
    paths = [edited(logs[1], tmp_path / f"{i}.jsonl", seed=i, arch=name) for i in range(count)]
    figure = drawn(*paths)
    assert figure.get_size_inches()[0] == pytest.approx(80 / 25.4)
    figure.draw_without_rendering()
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.x1
    assert len(figure.legends) == (1 < count <= plot.MOST)
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert len(legend.get_texts()) == count and box.x0 >= 0 and box.x1 <= figure.bbox.x1
        lines = {(line.get_color(), line.get_marker()) for line in legend.get_lines()}
        assert len(lines) == count
    assert min(ax.get_window_extent().height for ax in figure.axes) > figure.dpi  # an inch


def test_a_folder_is_its_logs_and_a_record_its_log(logs, tmp_path):
    out = logs[0].parents[1]
    assert [*plot.logs([out])[0]] == [*plot.logs([out / "logs", logs[0]])[0]] == logs
    record = logs[0].with_name(logs[0].stem + ".run.json")
    assert [*plot.logs([record, *logs])[0]] == logs
    begun = tmp_path / "logs" / "begun.jsonl"
    begun.parent.mkdir()
    begun.write_text(logs[0].read_text().splitlines()[0] + "\n")
    with pytest.raises(RunError, match="holds no finished epoch"):
        plot.logs([tmp_path])
    whole = begun.with_name("whole.jsonl")
    whole.write_text(logs[0].read_text())
    some, notes = plot.logs([tmp_path])
    assert [*some] == [whole] and notes == [f"left out: {begun} holds no finished epoch"]


@pytest.fixture(params=["empty", "above", "lonely record", "checkpoint", "previous", "nowhere"])
def nothing(request, logs, tmp_path):
    """(a path without a log, the words about it)."""
    if request.param == "empty":
        return tmp_path, "holds no logs, nor does its logs/"
    if request.param == "above":
        return logs[0].parents[2], f"holds no logs; {logs[0].parents[1]} does"
    if request.param == "lonely record":
        (tmp_path / "a.run.json").write_text("{}")
        return tmp_path / "a.run.json", f"there is no {tmp_path / 'a.jsonl'}"
    if request.param == "nowhere":
        return tmp_path / "output", "no log of a run: No such file"
    suffix = {"checkpoint": ".pt", "previous": ".pt.previous"}[request.param]
    path = logs[0].parents[1] / "checkpoints" / f"{logs[0].stem}{suffix}"
    return path, f"is a checkpoint: give its log, {logs[0]}"


def test_plot_names_what_stands_for_no_log(nothing, capsys):
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(nothing[0])])
    error = capsys.readouterr().err
    assert re.match("error: ", error) and nothing[1] in error


def test_plot_of_a_cut_log_of_one_epoch_whose_loss_is_not_finite(logs, tmp_path):
    first, epoch, *_ = logs[0].read_text().splitlines()
    row = {**json.loads(epoch), "train_loss": None, "test_loss": None}
    path = tmp_path / "one.jsonl"
    path.write_text("\n".join([first, json.dumps(row), '{"kind": "epo']))
    assert math.isnan(*drawn(path).axes[0].lines[0].get_ydata())
    plot.main([str(path), "-o", str(tmp_path / "curves.png")])


@pytest.mark.parametrize("content", [None, "", "text", '{"kind": "run"}', "[1]", "\x00"])
def test_plot_names_what_is_no_log(content, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(path), "-o", str(tmp_path / "x.png")])
    assert "bad.jsonl" in capsys.readouterr().err


def test_every_command_finds_the_repository_by_its_own_path():
    line = re.compile(r"sys.path\[0\] = str\(Path\(__file__\).resolve\(\).parents\[(\d)\]\)")
    files = [path for room in ("scripts", "data", "examples")
             for path in (ROOT / room).rglob("*.py")
             if re.search("^if __name__ ==", path.read_text(), re.M)]  # fmt: skip
    for path in [*files, ROOT / "tests" / "fuzz.py", ROOT / "tests" / "crash" / "__main__.py"]:
        assert path.parents[int(line.search(path.read_text())[1])] == ROOT, path
    assert len(files) >= 14


@pytest.mark.slow
@pytest.mark.parametrize("module", COMMANDS)
def test_each_command_starts_by_its_path_in_any_folder(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = command(module, "--help").replace("python", sys.executable, 1)
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "usage: python" in done.stdout


def test_commands_are_those_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert command("scripts.plot", "a b") == "python -m scripts.plot 'a b'"
    assert command("main") == "python main.py"
    monkeypatch.chdir(tmp_path)
    assert command("main", "--cpu") == f"python {ROOT}/main.py --cpu"
    assert command("data.prepare") == f"python {ROOT}/data/prepare.py"
    assert command("scripts.benchmark") == f"python {ROOT}/scripts/benchmark"


def test_numbers_are_written_as_people_write_them():
    values = [0.62251, 13.8516, 90386.6156, 49864303776062274313565195508645888.0, 1.0, 0, 1.2e-5]
    assert list(map(number, values)) == [
        "0.6225", "13.852", "90,387", "5.0e34", "1.0000", "0.0000", "1.2e-5"]  # fmt: skip
    assert [number(math.nan), number(math.inf), number(0.7943, 4)] == ["not finite"] * 2 + ["0.794"]
    rates = [1e-3, 3e-4, 2.5e-4, 0.1, 1.0, 10.0, 1e-7, 1e30]
    assert list(map(rate_name, rates)) == [
        "1e-3", "3e-4", "2.5e-4", "0.1", "1", "10", "1e-7", "1e30"]  # fmt: skip
    assert significant(8.943e-05, 4) == "8.943e-5" and significant(0.25, 4) == "0.25"
