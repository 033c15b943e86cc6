"""`python -m scripts.plot`, README's command."""

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
    rows = [json.loads(line) for line in logs[0].read_text().splitlines()[1:4]]
    assert list(loss.lines[0].get_ydata()) == [row["train_loss"] for row in rows]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(names)) == 3 and any("adam" in name for name in names)
    path = tmp_path / "curves.pdf"
    command = [sys.executable, "-m", "scripts.plot", *map(str, logs), "-o", str(path)]
    assert subprocess.run(command, cwd=ROOT).returncode == 0 and path.stat().st_size > 5000


def test_plot_of_a_cut_log_of_one_epoch_whose_loss_is_not_finite(logs, tmp_path):
    first, epoch, *_ = logs[0].read_text().splitlines()
    row = {**json.loads(epoch), "train_loss": None, "test_loss": None}
    path = tmp_path / "one.jsonl"
    path.write_text("\n".join([first, json.dumps(row), '{"kind": "epo']))
    assert math.isnan(*plot.draw([path]).axes[0].lines[0].get_ydata())
    plot.main([str(path), "-o", str(tmp_path / "curves.png")])


@pytest.mark.parametrize("content", [None, "", "text", '{"kind": "run"}', "[1]", "\x00"])
def test_plot_names_what_is_no_log(content, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(path), "-o", str(tmp_path / "x.png")])
    assert "bad.jsonl" in capsys.readouterr().err
