import json
import math
import subprocess
import sys

import pytest

import main as program
from scripts import plot
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for flags in (["--seed", "0"], ["--seed", "1"], ["--optimizer", "adam"]):
        program.main(["--dataset", "digits", "--depth", "3", "--width", "16", "--epochs", "3",
                      "--out", str(out), *flags])  # fmt: skip
    return sorted((out / "logs").glob("*.jsonl"))


def test_plot_draws_loss_accuracy_and_eta(logs, tmp_path):
    figure = plot.draw(logs)
    loss, accuracy, eta = figure.axes
    assert len(loss.lines) == len(accuracy.lines) == 6  # three runs, train and test
    assert len(eta.lines) == 2  # Adam has no eta
    first, epochs = plot.read(logs[0])
    drawn = loss.lines[0].get_ydata()
    assert list(drawn) == [row["train_loss"] for row in epochs]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(names)) == 3 and any("adam" in name for name in names)
    for suffix in ("png", "pdf"):
        path = tmp_path / f"curves.{suffix}"
        done = subprocess.run(
            [sys.executable, "-m", "scripts.plot", *map(str, logs), "-o", str(path)], cwd=ROOT
        )
        assert done.returncode == 0 and path.stat().st_size > 5000


def test_plot_of_one_epoch_and_of_a_loss_that_is_not_finite(logs, tmp_path):
    lines = logs[0].read_text().splitlines()
    one = tmp_path / "one.jsonl"
    one.write_text("\n".join(lines[:2]) + "\n")
    assert plot.draw([one]).axes
    row = {**json.loads(lines[1]), "train_loss": None, "test_loss": None}
    one.write_text("\n".join([lines[0], json.dumps(row)]) + "\n")
    assert math.isnan(plot.draw([one]).axes[0].lines[0].get_ydata()[0])


def test_plot_reads_a_log_that_was_cut_off(logs, tmp_path):
    cut = tmp_path / "cut.jsonl"
    cut.write_text("\n".join(logs[0].read_text().splitlines()[:3]) + '\n{"kind": "epo')
    assert len(plot.read(cut)[1]) == 2


def test_plot_wants_a_picture_for_its_output(logs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        plot.main([str(logs[0]), "-o", str(tmp_path)])
    assert ".png, .pdf or .svg" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "text", '{"kind": "run"}', "[1]", "\x00"])
def test_plot_names_what_is_no_log(content, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(path), "-o", str(tmp_path / "x.png")])
    assert "bad.jsonl" in capsys.readouterr().err
