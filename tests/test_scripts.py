import json
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import main as program
from scripts import benchmark, plot
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for flags in (["--seed", "0"], ["--seed", "1"], ["--optimizer", "adam"]):
        program.main(["--dataset", "digits", "--depth", "3", "--width", "16", "--epochs", "3",
                      "--out", str(out), *flags])  # fmt: skip
    return sorted((out / "logs").iterdir())


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
def test_plot_names_what_is_no_log(content, tmp_path):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match="bad.jsonl"):
        plot.main([str(path), "-o", str(tmp_path / "x.png")])


def test_benchmark_measures_and_writes(tmp_path, capsys):
    pytest.importorskip("torchvision")
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "cifar10.npz",
        **{f"{split}_images": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
           for split, n in (("train", 64), ("test", 32))},
        **{f"{split}_labels": np.arange(n) % 10 for split, n in (("train", 64), ("test", 32))},
    )  # fmt: skip
    small = ["--depth", "3", "--width", "16", "--batch_size", "16", "--repeats", "2"]
    place = ["--device", "cpu", "--data_dir", str(tmp_path), "--out", str(tmp_path)]
    benchmark.main(small + place)
    result = json.loads((tmp_path / "benchmark" / "epoch.json").read_text())
    assert set(result["ratios"]) == {
        "ours / bare", "ours, training / bare", "conventional / ours",
    }  # fmt: skip
    for times in result["seconds"].values():
        assert 0 < times["min"] <= times["median"] <= times["max"]
    assert "Median of the ratios" in capsys.readouterr().out


def test_benchmark_of_a_folder(tmp_path, capsys):
    for i in range(12):
        path = tmp_path / "set" / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 70), (20 * i, 0, 0)).save(path)
    benchmark.main(["data", "--folder", str(tmp_path / "set"), "--image_size", "32", "--repeats",
                    "2", "--out", str(tmp_path)])  # fmt: skip
    result = json.loads((tmp_path / "benchmark" / "data.json").read_text())
    assert result["images"] == 12 and set(result["seconds"]) == {"ours", "conventional"}
    assert result["images_per_second_per_core"] == 12 / result["seconds"]["ours"]["median"]
    assert "Images a second a core" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no images under"):
        benchmark.main(["data", "--folder", str(tmp_path / "none"), "--out", str(tmp_path)])


def test_benchmarks_plain_loop_takes_the_papers_step():
    """The peer is an honest one."""
    import torch

    from agd import init_weights
    from architecture import build
    from tests.reference import reference_step

    net = build("fcn", (1, 4, 4), 3, depth=3, width=8).double()
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    weights = list(net.parameters())
    net(torch.randn(5, 1, 4, 4, dtype=torch.float64)).square().mean().backward()
    expected, eta, _ = reference_step(weights, [p.grad for p in weights])
    assert benchmark.plain_agd_step(weights) == pytest.approx(eta, rel=1e-12)
    for p, q in zip(weights, expected):
        assert torch.allclose(p, q, rtol=1e-12)


def test_gpu_checks_that_run_anywhere_hold(tmp_path):
    import argparse

    import torch

    from scripts import gpu_checks

    args = argparse.Namespace(device=torch.device("cpu"))
    assert gpu_checks.not_finite_and_scale(args)["worst difference of a direction"] < 1e-6


def test_gpu_checks_without_a_gpu_say_so(monkeypatch):
    import torch

    from scripts import gpu_checks

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        gpu_checks.main([])
