import argparse
import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from agd import init_weights
from architecture import build
from cli import UserError
from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import draw, epoch, many, measure, step
from scripts.figures import fingerprint
from tests.conftest import ROOT
from tests.reference import reference_step

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--depth", "2", "--width", "8", "--batch_size", "8"]


def run(case, out, *flags):
    """The result of a case, by its command."""
    assert benchmark.main([case, *SMALL, "--out", str(out), *map(str, flags)]) == 0
    return json.loads((out / "benchmark" / f"{case}.json").read_text())


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
    told = measure.compared({"a": [1.0, 4.0, 30.0], "b": [1.0, 2.0, 10.0]}, [("a", "b")])
    assert told["ratios"] == {"a / b": 2} and told["quartiles"] == {"a / b": [1.5, 2.5]}
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


def test_a_step_of_a_gpu_is_timed_by_the_clock_and_as_a_graph(monkeypatch):
    monkeypatch.setattr(step, "by_clock", lambda *args: lambda work: 2.0)
    monkeypatch.setattr(step, "by_graph", lambda device: lambda work: 1.0)
    args, gpu = argparse.Namespace(repeats=3, clock="wall"), argparse.Namespace(type="cuda")
    works = dict.fromkeys(("AGD", step.YARDSTICK, "AdamW, foreach"))
    told = step.compare(works, args, gpu, "", graphed=["AGD", step.YARDSTICK])
    assert told["ratios"] == {"AGD": 1, "AdamW, foreach": 1}
    assert told["ratios as a CUDA graph"] == {"AGD": 1}


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


def test_the_conventional_loop_takes_the_papers_step():
    net = build("fcn", (1, 4, 4), 3, depth=3, width=8).double()
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    weights = list(net.parameters())
    net(torch.randn(5, 1, 4, 4, dtype=torch.float64)).square().mean().backward()
    expected, eta, _ = reference_step(weights, [p.grad for p in weights])
    assert epoch.plain_agd_step(weights) == pytest.approx(eta, rel=1e-12)
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(weights, expected))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["step", "spectral", "many"])
def test_a_case_is_measured_and_written(case, images, capsys):
    result = run(case, images, "--quick", "--repeats", 2, "--data_dir", images, "--counts", 2)
    assert list(result)[0] == "ratios" and result["date"] and result["environment"]["processor"]
    assert result["flags"]["repeats"] == 2 and "median of the ratios" in capsys.readouterr().out
    published = json.loads((ROOT / "results" / "benchmark" / f"{case}.json").read_text())
    assert result.keys() == published.keys()


@pytest.mark.slow
def test_an_epoch_is_measured_and_written(images, monkeypatch):
    monkeypatch.setattr(epoch, "IMAGES", 32)
    monkeypatch.setattr(epoch, "GROWTH", {"width": (4, 8), "depth": (2, 3), "batch_size": (4, 8)})
    result = run("epoch", images, "--repeats", 2, "--data_dir", images)
    published = json.loads((ROOT / "results" / "benchmark" / "epoch.json").read_text())
    for key in ("ratios", "seconds", "growth"):
        assert result[key].keys() == published[key].keys()
    assert all(0 < low <= x <= high for x, low, high in result["seconds"].values())


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


@pytest.mark.slow
def test_a_start_ends_with_the_first_step_and_a_failed_one_says_why(images):
    args = benchmark.parse(["epoch", *SMALL, "--data_dir", str(images)])
    assert epoch.first_step(args, CPU) > 0
    args.batch_size = 256  # more images than there are
    with pytest.raises(UserError, match="64 images"):
        epoch.first_step(args, CPU)


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
    assert "Images a second a core" in capsys.readouterr().out


def test_runs_at_once_are_measured_beside_one(monkeypatch):
    def runs_at_once(commands, epochs, device, args):
        assert len({command[-1] for command in commands}) == len(commands)  # seeds
        k = len(commands)
        return 2.0 * k, [[9.0] + [0.5 * k**0.5] * (epochs - 1)] * k  # the first one warms up

    monkeypatch.setattr(many, "runs_at_once", runs_at_once)
    args = benchmark.parse(["many", "--device", "cpu", "--repeats", "2", "--counts", "2", "4"])
    result = many.case(args, CPU)
    assert result["ratios"] == {"2 at once / one": pytest.approx(2**0.5), "4 at once / one": 2}
    assert result["ratios with the start"] == {"2 at once / one": 1, "4 at once / one": 1}
    assert result["epochs a second"]["1"] == [2, 2, 2]


@pytest.mark.parametrize(("error", "code"), [
    (UserError("no images"), 2), (OSError("no images"), 1), (KeyboardInterrupt(), 130),
])  # fmt: skip
def test_a_case_that_fails_keeps_the_others(error, code, tmp_path, capsys, monkeypatch):
    def failing(args, device):
        raise error

    cases = {"x": lambda args, device: {"ratios": {"a / b": 1.5}, "rounds": args.repeats}}
    cases |= {"y": failing, "z": cases["x"]}
    monkeypatch.setattr(benchmark, "CASES", {name: (x, 7, 2) for name, x in cases.items()})
    monkeypatch.setenv("HOME", str(tmp_path))
    where = ["--out", str(tmp_path), "--data_dir", str(tmp_path / "sets")]
    assert benchmark.main(["all", "--device", "cpu", *where]) == code
    assert code == 130 or "y: no images" in capsys.readouterr().err
    files = sorted(path.name for path in (tmp_path / "benchmark").iterdir())
    assert files == (["x.json"] if code == 130 else ["x.json", "z.json"])
    text = (tmp_path / "benchmark" / "x.json").read_text()
    assert json.loads(text)["rounds"] == 7 and "~/sets" in text and f"{tmp_path}/" not in text


def test_a_quick_look_replaces_no_published_number():
    assert benchmark.parse(["--quick"]).out != benchmark.parse([]).out == "results"


def test_the_published_tables_and_pictures_are_those_of_the_files():
    folder = ROOT / "results" / "benchmark"
    between = draw.PAGE.read_text(encoding="utf-8").split(draw.START)[1].split(draw.END)[0].strip()
    assert between == draw.block(folder), "python -m scripts.benchmark draw --out results renews it"
    results = draw.read(folder, "cpu")
    for words in ("| 1.57 |", "| 1.55 / 0.52 |", "| 0.89 |", "4 at once / one | 1.50 |"):
        assert words in between
    figure = draw.draw(results)
    with Image.open(folder / "benchmark.png") as picture:
        assert picture.info["Source"] == fingerprint(figure)
    plt.close(figure)
    assert all(path.stat().st_size < 20_000 for path in folder.glob("*.json"))
    assert not results["checkpoint"]["flags"]["quick"]
    assert all(0 < x <= 2 for x in results["checkpoint"][epoch.PERCENT].values())


def test_a_gpu_has_tables_and_a_picture_of_its_own(tmp_path):
    """Of steps as CUDA graphs, without the cases that were not run."""
    result = draw.read(ROOT / "results" / "benchmark", "cpu")["step"]
    del result["growth"]  # as of --nets
    for kind, times in (("ratios", lambda x: 10 * x), ("quartiles", lambda x: [10 * y for y in x])):
        result[f"{kind} as a CUDA graph"] = {
            net: {peer: times(x) for peer, x in peers.items() if peer != "AdamW, foreach"}
            for net, peers in result[kind].items()}  # fmt: skip
    (tmp_path / draw.file_name("step", "cuda")).write_text(json.dumps(result))
    assert draw.write(tmp_path) == [tmp_path / "benchmark-cuda.png"]  # and not the page
    text = draw.block(tmp_path)
    assert "| 1.57 |" in text and "| 15.71 |" in text and "benchmark-cuda.png" in text
    figure = draw.draw({"step": result})
    assert [ax.axison for ax in figure.axes] == [True] + 5 * [False]
    plt.close(figure)
