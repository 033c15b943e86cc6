"""scripts.benchmark, by its command; its clocks; the published tables."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from architecture import build
from cli import UserError
from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import draw, epoch, many, measure, step
from scripts.markdown import block
from tests.conftest import ROOT

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--depth", "2", "--width", "8", "--batch_size", "8"]
# What commit 5444306 measured beside the rest.
ANSWERED = {"growth", "bytes a second", "without Muon, which takes matrices alone", "seconds",
            "ratios of whole steps", "ratios to a matrix product", "operations a second",
            "ratios with the start", "quartiles with the start",
            "epochs a second with the start"}  # fmt: skip


def run(case, out, *flags):
    """The result of a case, by its command."""
    small = {"data": SMALL[:2], "step": SMALL[:2], "spectral": SMALL[:2], "many": SMALL[:6]}
    assert benchmark.main([case, *small.get(case, SMALL), "--out", str(out), *map(str, flags)]) == 0
    return json.loads((out / "benchmark" / f"{case}.json").read_text())


def published(case):
    return json.loads((ROOT / "results" / "benchmark" / f"{case}.json").read_text())


@pytest.fixture
def images(tmp_path):
    """A data directory with a small cifar10.npz."""
    rng, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 64), ("test", 128)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n) % 10
    np.savez(tmp_path / "cifar10.npz", **arrays)
    return tmp_path


def test_peers_take_turns_in_changing_order_and_the_first_round_does_not_count():
    calls, clock = [], itertools.count()
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = measure.take_turns(works, 4, lambda work: work() or next(clock), warm=1)
    rounds = [calls[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(x) == ["a", "b", "c"] for x in rounds) and len(set(map(tuple, rounds))) > 1
    assert sorted(itertools.chain(*seconds.values())) == list(range(3, 15))


def test_ratios_are_of_a_round_then_their_median():
    times = measure.compared({"a": [1.0, 4.0, 30.0], "b": [1.0, 2.0, 10.0]}, [("a", "b")])
    assert times["ratios"] == {"a / b": 2} and times["quartiles"] == {"a / b": [1.5, 2.5]}
    assert measure.spread({"x": [5.0]}) == {"x": [5, 5, 5]}


def test_peers_of_a_step_share_their_weights_and_layout():
    net = build("resnet18", (3, 32, 32), 10).to(memory_format=torch.channels_last)
    weights = step.with_gradients(net)
    made = step.peers(weights)
    assert made["AGD"].fused is None and made["AGD, fused=False"].fused is False
    assert {"SGD, fused", "SGD with momentum, foreach", "AdamW, fused"} <= set(made) - {"Muon"}
    for p in weights:
        if p.ndim == 4 and p.shape[2] > 1:
            assert p.is_contiguous(memory_format=torch.channels_last)
            assert p.grad.stride() == p.stride()
    for optimizer in made.values():
        optimizer.step()
    assert all(p.isfinite().all() for p in weights)
    fcn = step.peers(step.with_gradients(build("fcn", (3, 32, 32), 10)))
    assert ("Muon" in fcn) == hasattr(torch.optim, "Muon")


def test_the_memory_of_a_step_is_the_most_at_a_time():
    def work():
        torch.empty(3000)  # given back at once
        a, b = torch.empty(1000), torch.empty(1000)
        del a
        torch.empty(1500), b

    assert step.held(work, CPU) == (12000, 0)
    lasting = []
    assert step.held(lambda: lasting.append(torch.empty(700)), CPU) == (2800, 2800)


def test_bare_passes_are_those_of_the_network():
    net = build("fcn", (1, 4, 4), 3, depth=4, width=8)
    plain, x = epoch.PlainFCN(net), torch.randn(5, 1, 4, 4)
    both = [module(x) for module in (net, plain)]
    grads = [torch.autograd.grad(y.square().mean(), list(net.parameters())) for y in both]
    for a, b in zip([both[0], *grads[0]], [both[1], *grads[1]]):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["step", "spectral", "epoch", "many"])
def test_a_case_is_measured_and_written(case, images, capsys):
    more = {"epoch": [], "many": ["--quick", "--counts", 2]}.get(case, ["--quick"])
    result = run(case, images, *more, "--repeats", 2, "--data_dir", images)
    assert list(result)[0] == "ratios" and result["date"] and result["environment"]["processor"]
    assert result["flags"]["repeats"] == 2 and "median of the ratios" in capsys.readouterr().out
    there = published(case)
    assert result.keys() <= there.keys() and there.keys() - result.keys() <= ANSWERED
    if case == "epoch":
        assert {k for k in there["ratios"] if "conventional" not in k} == result["ratios"].keys()
        assert all(0 < low <= x <= high for x, low, high in result["seconds"].values())


@pytest.mark.slow
def test_checkpoints_are_timed_by_the_log_of_a_run(images, monkeypatch):
    monkeypatch.setattr(epoch, "RUNS", {"a part": ("fcn", "adam", 32, 64)})
    result = run("checkpoint", images, "--repeats", 1, "--data_dir", images)
    low, high = result["quartiles"]["a part"]
    assert 0 < low <= result[epoch.PERCENT]["a part"] <= high
    seconds = result["seconds"]["a part"]
    share = 100 * (1 + seconds["epoch"][0] / 600) * seconds["checkpoint"][0] / seconds["epoch"][0]
    assert result[epoch.PERCENT]["a part"] == pytest.approx(share, rel=2e-3)
    assert result["bytes"]["a part"] > 3 * 3072 * 8 * 4  # two numbers a weight beside it
    assert sorted(x.name for x in images.iterdir()) == ["benchmark", "cifar10.npz"]


def test_a_run_that_fails_says_why(images):
    args = benchmark.parse(["epoch", *SMALL, "--data_dir", str(images), "--batch_size", "256"])
    with pytest.raises(UserError, match="64 images") as error:
        epoch.first_step(args, CPU)
    assert error.value.exit_code == 2


def test_a_folder_is_read(tmp_path, capsys):
    for i in range(12):
        path = tmp_path / "set" / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 70), (20 * i, 0, 0)).save(path)
    threads, where = torch.get_num_threads(), tmp_path / "set"
    result = run("data", tmp_path, "--folder", where, "--image_size", 32, "--repeats", 2)
    assert torch.get_num_threads() == threads and result["environment"]["threads"] == 1
    assert result["images"] == 12 and set(result["seconds"]) == {"ours", "conventional"}
    rate = 12 / result["seconds"]["ours"][0]
    assert result["images_per_second_per_core"] == pytest.approx(rate, rel=1e-3)
    assert "conventional / ours" in capsys.readouterr().out


def test_runs_at_once_are_measured_beside_one(monkeypatch):
    def runs_at_once(commands, epochs, device, args):
        assert len({command[-1] for command in commands}) == len(commands)  # seeds
        k = len(commands)
        return [[9.0] + [0.5 * k**0.5] * (epochs - 1)] * k  # the first epoch warms up

    monkeypatch.setattr(many, "runs_at_once", runs_at_once)
    args = benchmark.parse(["many", "--device", "cpu", "--repeats", "2", "--counts", "2", "4"])
    result = many.case(args, CPU)
    assert result["ratios"] == {"2 at once / one": pytest.approx(2**0.5), "4 at once / one": 2}
    assert result["epochs a second"]["1"] == [2, 2, 2]


@pytest.mark.parametrize(("error", "code"), [
    (UserError("no images"), 2), (OSError("no images"), 1), (KeyboardInterrupt(), 130),
])  # fmt: skip
def test_a_case_that_fails_keeps_the_others(error, code, tmp_path, capsys, monkeypatch):
    def failing(args, device):
        raise error

    cases = {"x": lambda args, device: {"ratios": {"a / b": 1.54321}, "rounds": args.repeats}}
    cases |= {"y": failing, "z": cases["x"]}
    monkeypatch.setattr(benchmark, "FUNCTIONS", cases)
    monkeypatch.setattr(benchmark, "CASES", dict.fromkeys(cases, (7, 2)))
    monkeypatch.setenv("HOME", str(tmp_path))
    where = ["--out", str(tmp_path), "--data_dir", str(tmp_path / "sets")]
    assert benchmark.main(["all", "--device", "cpu", *where]) == code
    assert code == 130 or "y: no images" in capsys.readouterr().err
    files = sorted(path.name for path in (tmp_path / "benchmark").iterdir())
    assert files == (["x.json"] if code == 130 else ["x.json", "z.json"])
    text = (tmp_path / "benchmark" / "x.json").read_text()
    assert "~/sets" in text and f"{tmp_path}/" not in text
    assert json.loads(text)["rounds"] == 7 and json.loads(text)["ratios"] == {"a / b": 1.543}


def test_a_run_replaces_no_published_number():
    assert benchmark.parse(["--quick"]).out == benchmark.parse([]).out == "reproduced"


def test_the_published_tables_are_those_of_the_files(capsys):
    text = block(draw.PAGE, *draw.MARKS)
    assert text == draw.block(ROOT / "results" / "benchmark"), (
        "python -m scripts.benchmark draw --out results renews it")  # fmt: skip
    for words in ("| 1.57 |", "| 1.55 / 0.52 |", "| 0.89 |", "4 at once / one | 1.50 |"):
        assert words in text
    assert not published("checkpoint")["flags"]["quick"]
    assert all(0 < x <= 2 for x in published("checkpoint")[epoch.PERCENT].values())


def test_a_gpu_has_tables_of_its_own(tmp_path, capsys):
    """Of steps as CUDA graphs, without the cases that were not run; the page stays as it is."""
    result, page = published("step"), draw.PAGE.read_text()
    result["ratios as a CUDA graph"] = {
        net: {peer: 10 * x for peer, x in peers.items() if peer != "AdamW, foreach"}
        for net, peers in result["ratios"].items()}  # fmt: skip
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / draw.file_name("step", "cuda")).write_text(json.dumps(result))
    assert benchmark.main(["draw", "--device", "cpu", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| 1.57 |" in text and "| 15.71 |" in text and draw.PAGE.read_text() == page
