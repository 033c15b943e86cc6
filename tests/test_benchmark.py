import argparse
import contextlib
import itertools
import json
import os
import types

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from agd import AGD, init_weights
from architecture import build
from data import DataError
from runs.log import RunError
from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import checkpoint, draw, epoch, many, measure, program, step
from scripts.figures import fingerprint
from tests.conftest import ROOT
from tests.reference import reference_step

CPU = torch.device("cpu")


def images(folder, train, test):
    """A small cifar10.npz."""
    rng = np.random.default_rng(0)
    counts = {"train": train, "test": test}
    np.savez(
        folder / "cifar10.npz",
        **{f"{split}_images": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
           for split, n in counts.items()},
        **{f"{split}_labels": np.arange(n) % 10 for split, n in counts.items()},
    )  # fmt: skip


def test_peers_take_turns_in_changing_order_and_the_first_round_does_not_count():
    calls, clock = [], itertools.count()
    works = {name: lambda name=name: calls.append(name) for name in "abc"}

    def timer(work):
        work()
        return next(clock)

    seconds = measure.take_turns(works, 4, timer, warm=1)
    rounds = [calls[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(x) == ["a", "b", "c"] for x in rounds) and len(set(map(tuple, rounds))) > 1
    assert sorted(itertools.chain(*seconds.values())) == list(range(3, 15))


def test_ratios_are_of_a_round_then_their_median():
    seconds = {"a": [1.0, 4.0, 30.0], "b": [1.0, 2.0, 10.0]}
    each = measure.ratios(seconds, [("a", "b")])
    assert each == {"a / b": [1, 2, 3]} and measure.medians(each) == {"a / b": 2}
    assert measure.quartiles(each) == {"a / b": [1.5, 2.5]}
    assert measure.spread({"x": [5.0]}) == {"x": [5, 5, 5]}


def test_what_is_written_is_short_json():
    value = {"ratios": {"a": 1.23456, "b": {"c": [1e-7 / 3, 2]}}, "flags": {"x": None}}
    text = measure.as_json(measure.rounded(value))
    told = {"ratios": {"a": 1.235, "b": {"c": [3.333e-8, 2]}}, "flags": {"x": None}}
    assert json.loads(text) == told and len(text.splitlines()) == 9


def test_a_step_has_all_its_peers():
    fcn = step.weights_of("fcn", (3, 32, 32), 10, CPU)
    names = set(step.peers(fcn))
    assert {"AGD", "SGD, fused", "SGD with momentum, foreach", "AdamW, fused"} <= names
    assert ("Muon" in names) == hasattr(torch.optim, "Muon")
    for name, optimizer in step.peers(fcn).items():
        for form in ("fused", "foreach"):
            assert not name.endswith(form) or optimizer.defaults[form]
    net = step.weights_of("resnet18", (3, 32, 32), 10, CPU, channels_last=True)
    assert "Muon" not in step.peers(net)
    for p in net:
        if p.ndim == 4 and p.shape[2] > 1:
            for x in (p, p.grad):
                assert x.is_contiguous(memory_format=torch.channels_last)
    for optimizer in step.peers(net).values():
        optimizer.step()
    assert all(p.isfinite().all() for p in net)


def test_agd_without_kernels_is_a_peer():
    made = step.peers(step.with_gradients([torch.randn(4, 4, requires_grad=True)]))
    assert made["AGD"].fused is None and made["AGD, fused=False"].fused is False


def test_a_step_is_told_beside_fused_sgd():
    weights = step.with_gradients([torch.randn(8, 8, requires_grad=True) for _ in range(3)])
    args = argparse.Namespace(repeats=4, clock="wall")
    told = step.compare(weights, step.peers(weights), args, CPU, "")
    assert set(told["seconds"]) == {*told["ratios"], step.YARDSTICK}
    for name, (low, high) in told["quartiles"].items():
        assert 0 < low <= told["ratios"][name] <= high


def test_a_step_of_a_gpu_is_told_by_the_clock_and_as_a_graph(monkeypatch):
    weights = step.with_gradients([torch.randn(8, 8, requires_grad=True)])
    optimizers = {"AGD": AGD(weights), step.YARDSTICK: torch.optim.SGD(weights),
                  "AdamW, foreach": torch.optim.AdamW(weights)}  # fmt: skip
    monkeypatch.setattr(step, "by_clock", lambda *args: lambda work: 2.0)
    monkeypatch.setattr(step, "by_graph", lambda device: lambda work: 1.0)
    args, gpu = argparse.Namespace(repeats=3, clock="wall"), argparse.Namespace(type="cuda")
    told = step.compare(weights, optimizers, args, gpu, "")
    assert told["ratios"] == {"AGD": 1, "AdamW, foreach": 1}
    assert told["ratios as a CUDA graph"] == {"AGD": 1}  # AdamW counts its steps on the host
    assert told["seconds as a CUDA graph"]["AGD"] == [1, 1, 1]


def test_a_step_is_timed_in_a_graph_that_runs_once_before(monkeypatch):
    """With stand-ins for CUDA: three calls as they are, then twenty in a graph, which is replayed
    before each mark."""
    done = []

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            done.append("replay")

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            done.append("mark")

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 40.0

    stands = {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "Event": Event,
              "stream": contextlib.nullcontext, "graph": contextlib.nullcontext}  # fmt: skip
    for name, stand in stands.items():
        monkeypatch.setattr(torch.cuda, name, stand)
    timer = measure.by_graph(torch.device("cuda"))

    def work():
        done.append("call")

    for _ in range(2):
        assert timer(work) == pytest.approx(0.002)
    assert done == ["call"] * 23 + ["replay", "mark"] * 4


def test_the_memory_of_a_step_is_the_most_at_a_time():
    def work():
        torch.empty(3000)  # given back at once
        a, b = torch.empty(1000), torch.empty(1000)
        del a
        torch.empty(1500), b

    assert step.held(work, CPU) == (12000, 0)
    lasting = []
    assert step.held(lambda: lasting.append(torch.empty(700)), CPU) == (2800, 2800)
    weights = step.with_gradients([torch.randn(50, 20, requires_grad=True) for _ in range(2)])
    optimizers = {"adamw": torch.optim.AdamW(weights), "sgd": torch.optim.SGD(weights, fused=True)}
    told = step.memory(weights, optimizers, CPU)
    assert (told["largest weight"], told["weights"]) == (4000, 8000)
    assert told["scratch"]["sgd"] == told["kept"]["sgd"] == 0
    assert 16000 <= told["kept"]["adamw"] < 16100  # two moments a weight
    assert told["scratch"]["adamw"] < 16000  # they are there before the second step


def test_steps_against_the_number_of_weights_go_as_far_as_memory(monkeypatch):
    args = argparse.Namespace(repeats=2, clock="wall", quick=True)
    monkeypatch.setattr(step, "free_memory", lambda device: 8 * 4 * 1e5)
    found = step.growth(args, CPU)
    assert found["weights"] == [100_000]
    assert all(len(x) == 1 and len(x[0]) == 3 for x in found["seconds"].values())


def test_the_bare_passes_are_those_of_the_network():
    net = build("fcn", (1, 4, 4), 3, depth=4, width=8)
    plain, x = epoch.PlainFCN(net), torch.randn(5, 1, 4, 4)
    found = []
    for module in (net, plain):
        outputs = module(x)
        grads = torch.autograd.grad(outputs.square().mean(), list(net.parameters()))
        found.append([outputs, *grads])
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    kinds = {type(module) for module in plain.modules()}
    assert kinds == {epoch.PlainFCN, torch.nn.ModuleList, torch.nn.Linear}


def test_the_conventional_loop_takes_the_papers_step():
    """The peer is an honest one."""
    net = build("fcn", (1, 4, 4), 3, depth=3, width=8).double()
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    weights = list(net.parameters())
    net(torch.randn(5, 1, 4, 4, dtype=torch.float64)).square().mean().backward()
    expected, eta, _ = reference_step(weights, [p.grad for p in weights])
    assert epoch.plain_agd_step(weights) == pytest.approx(eta, rel=1e-12)
    for p, q in zip(weights, expected):
        assert torch.allclose(p, q, rtol=1e-12)


def test_an_epoch_is_measured_and_written(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torchvision")
    images(tmp_path, 1024, 256)
    monkeypatch.setattr(program, "first_step", lambda *args: 3.0)
    monkeypatch.setattr(program, "importing", lambda: 2.0)
    small = ["epoch", "--quick", "--depth", "3", "--width", "16", "--repeats", "2"]
    place = ["--device", "cpu", "--data_dir", str(tmp_path), "--out", str(tmp_path)]
    assert benchmark.main(small + place) == 0
    found = json.loads((tmp_path / "benchmark" / "epoch.json").read_text())
    assert list(found)[0] == "ratios" and set(found["ratios"]) == {
        "ours, training / bare", "ours / bare", "conventional / ours", "conventional / bare",
        "ours, training / bare, our network",
    }  # fmt: skip
    for median, low, high in found["seconds"].values():
        assert 0 < low <= median <= high
    assert found["seconds"]["main.py, to its first step"] == [3, 3, 3]
    for key in epoch.GROWTH:
        told = found["growth"][key]
        assert len(told["values"]) == len(told["ratios"]) == len(told["bare"]) == 2
    assert found["environment"]["processor"] and found["date"]
    assert "median of the ratios" in capsys.readouterr().out


def test_a_start_ends_with_the_first_step_and_a_failed_one_is_told(tmp_path):
    images(tmp_path, 16, 128)
    flags = {"dataset": "cifar10", "arch": "fcn", "depth": 2, "width": 8, "batch_size": 8}
    args = argparse.Namespace(**flags, data_dir=tmp_path)
    assert program.first_step(args, CPU) > 0
    args.batch_size = 32  # more images than there are
    with pytest.raises(RunError, match="has 16 images"):
        program.first_step(args, CPU)


def test_a_folder_is_read(tmp_path, capsys):
    pytest.importorskip("torchvision")
    for i in range(12):
        path = tmp_path / "set" / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 70), (20 * i, 0, 0)).save(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert benchmark.main(["data", "--folder", str(tmp_path / "set"), "--image_size", "32",
                           "--repeats", "2", "--out", str(tmp_path)]) == 0  # fmt: skip
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "benchmark" / "data.json").read_text())
    assert found["images"] == 12 and set(found["seconds"]) == {"ours", "conventional"}
    rate = 12 / found["seconds"]["ours"][0]
    assert found["images_per_second_per_core"] == pytest.approx(rate, rel=1e-3)
    assert found["environment"]["threads"] == 1
    assert "Images a second a core" in capsys.readouterr().out
    assert benchmark.main(["data", "--folder", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_runs_at_once_are_runs_of_main(tmp_path):
    commands = [["--arch", "fcn", "--depth", "2", "--width", "8", "--dataset", "digits", "--seed",
                 str(seed)] for seed in range(2)]  # fmt: skip
    args = benchmark.parse(["many", "--device", "cpu", "--out", str(tmp_path)])
    seconds, runs = many.runs_at_once(commands, 3, CPU, args)
    assert [len(run) for run in runs] == [3, 3]
    assert all(0 < sum(run) < seconds for run in runs)
    with pytest.raises(RunError, match="did not come to their end.*output"):
        many.runs_at_once([[*commands[0], "--train_examples", "99999"]], 3, CPU, args)
    (said,) = (tmp_path / "output").glob("*.txt")
    assert "1437 images" in said.read_text()


def test_runs_at_once_are_told_beside_one(monkeypatch):
    def runs_at_once(commands, epochs, device, args):
        assert len({command[-1] for command in commands}) == len(commands)  # seeds
        k = len(commands)
        return 2.0 * k, [[9.0] + [0.5 * k**0.5] * (epochs - 1)] * k  # the first one warms up

    monkeypatch.setattr(many, "runs_at_once", runs_at_once)
    monkeypatch.setattr(many, "free_memory", lambda device: 5 * many.A_RUN)
    args = benchmark.parse(["many", "--device", "cpu", "--repeats", "2"])
    found = many.case(args, CPU)
    assert found["ratios"] == {"2 at once / one": pytest.approx(2**0.5), "4 at once / one": 2}
    assert found["ratios with the start"] == {"2 at once / one": 1, "4 at once / one": 1}
    assert found["epochs a second"]["1"] == [2, 2, 2]
    args = benchmark.parse(["many", "--device", "cpu", "--repeats", "1", "--counts", "3"])
    assert list(many.case(args, CPU)["ratios"]) == ["3 at once / one"]


@pytest.fixture
def cases(monkeypatch):
    """Three cases; the second one cannot be run here."""

    def lacking(args, device):
        raise DataError("there are no images")

    runs = [lambda args, device: {"ratios": {"a / b": 1.5}, "rounds": args.repeats}, lacking]
    runs += runs[:1]
    monkeypatch.setattr(benchmark, "CASES", {
        name: (types.SimpleNamespace(case=run), 7, 2) for name, run in zip("xyz", runs)
    })  # fmt: skip
    return benchmark.CASES


def test_a_case_that_cannot_be_run_keeps_none_of_the_others(tmp_path, capsys, cases):
    assert benchmark.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "y: there are no images" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "benchmark")) == ["x.json", "z.json"]
    assert json.loads((tmp_path / "benchmark" / "x.json").read_text())["rounds"] == 7


def test_an_interrupt_keeps_what_was_measured(tmp_path, capsys, monkeypatch, cases):
    def interrupted(args, device):
        raise KeyboardInterrupt

    monkeypatch.setattr(cases["y"][0], "case", interrupted)
    assert benchmark.main(["--device", "cpu", "--out", str(tmp_path), "--quick"]) == 130
    assert os.listdir(tmp_path / "benchmark") == ["x.json"]
    assert json.loads((tmp_path / "benchmark" / "x.json").read_text())["rounds"] == 2


def test_a_quick_look_replaces_no_published_number():
    assert benchmark.parse(["--quick"]).out != benchmark.parse([]).out == "results"


def test_files_say_nothing_of_a_home(tmp_path, monkeypatch, cases):
    monkeypatch.setenv("HOME", str(tmp_path))
    benchmark.main(["x", "--device", "cpu", "--out", str(tmp_path), "--data_dir",
                    str(tmp_path / "sets"), "--folder", str(tmp_path / "own")])  # fmt: skip
    text = (tmp_path / "benchmark" / "x.json").read_text()
    assert json.loads(text)["flags"]["folder"] == "~/own" and "~/sets" in text
    assert f"{tmp_path}/" not in text


def test_the_share_of_checkpoints_counts_those_between_two_epochs():
    seconds = {"training": [2.0, 1.0], "test": [1.0, 1.0], "checkpoint": [0.5, 0.25]}
    parts = {"training": 2 / 1198, "test": 1 / 2}  # of the first round, 1,200 s: 10 minutes, twice
    each, epochs = checkpoint.shares(seconds, parts)
    assert epochs == pytest.approx([1200, 601]) and checkpoint.every() == 600
    assert each == pytest.approx([3 * 0.5 / 1200, (1 + 601 / 600) * 0.25 / 601])


def test_checkpoints_are_timed_as_main_writes_them(tmp_path, monkeypatch):
    images(tmp_path, 96, 40)
    written, save = [], RunLog.save
    monkeypatch.setattr(RunLog, "save", lambda run, found: written.append(found) or save(run, found))
    monkeypatch.setattr(checkpoint, "RUNS", {
        "all of it": ("fcn", "agd", None, None), "a part": ("fcn", "adam", 1, 20),
    })  # fmt: skip
    flags = ["checkpoint", "--device", "cpu", "--data_dir", str(tmp_path), "--out", str(tmp_path),
             "--depth", "2", "--width", "4", "--batch_size", "32", "--repeats", "2"]  # fmt: skip
    assert benchmark.main(flags) == 0
    found = json.loads((tmp_path / "benchmark" / "checkpoint.json").read_text())
    assert set(found[checkpoint.PERCENT]) == {"all of it", "a part"}
    for label, percent in found[checkpoint.PERCENT].items():
        low, high = found["quartiles"][label]
        assert 0 < low <= percent <= high and found["bytes"][label] > 4 * 3072 * 4
    assert len(written) == 2 * 3 and set(written[-1]["optimizer"]["state"]) == {0, 1}
    assert os.listdir(tmp_path / "benchmark") == ["checkpoint.json"]
    assert sorted(os.listdir(tmp_path)) == ["benchmark", "cifar10.npz"]

    monkeypatch.setattr(RunLog, "save", lambda run, found: "the disk is full")
    assert benchmark.main(flags) == 1


@pytest.fixture
def found():
    """What the cases write, made up."""

    def told(x):
        return [x, 0.9 * x, 1.1 * x]

    forms = {"": 1.0, ", channels_last": 2.0}
    peers = {name: i + 1.25 for i, name in enumerate(draw.COLOURS) if name != step.YARDSTICK}
    ratios = {f"{net}{form}": {peer: x * times for peer, x in peers.items()}
              for net in draw.SHOWN for form, times in forms.items()}  # fmt: skip
    where = {"environment": {"device_name": "a processor", "torch": "2.9.0+cpu"}}
    return {
        "step": {
            "ratios": ratios,
            "quartiles": {net: {peer: told(x)[1:] for peer, x in values.items()}
                          for net, values in ratios.items()},
            "memory in bytes": {draw.SHOWN[0]: {
                "largest weight": 3e6, "scratch": {"AGD": 1e6, "AdamW, fused": 12},
                "kept": {"AGD": 5e5, "AdamW, fused": 7.1e6}}},
            "growth": {"weights": [1e5, 1e6],
                       "seconds": {k: [told(1e-3), told(2e-3)] for k in step.GROWING}},
            **where,
        },
        "epoch": {
            "ratios": {"ours, training / bare": 1.17, "ours / bare": 1.28,
                       "conventional / ours": 5.39},
            "seconds": {"main.py, to its first step": told(3.21), "import torch": told(1.5)},
            "growth": {"images": 512, **dict.fromkeys(epoch.GROWTH, {
                "values": [2, 4], "ours": [told(2), told(3)], "bare": [told(1), told(2)]})},
            "flags": {"dataset": "cifar10", "depth": 10, "width": 256},
            "data": {},
            **where,
        },
        "many": {"ratios": {"2 at once / one": 1.61, "4 at once / one": 1.48},
                 "epochs a second": {"1": told(2.0), "2": told(3.2), "4": told(3.0)}, **where},
        "data": {"ratios": {"conventional / ours": 1.83}, **where},
        "checkpoint": {checkpoint.PERCENT: {"ResNet-18, AGD": 0.123}, **where},
    }  # fmt: skip


def test_readmes_tables_are_what_was_found(found, tmp_path):
    folder = tmp_path / "results" / "benchmark"
    folder.mkdir(parents=True)
    for case, what in found.items():
        (folder / f"{case}.json").write_text(json.dumps(what))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{draw.START}\nold\n{draw.END}\nafter\n")
    paths = draw.write(folder, readme)
    assert paths == [folder / "benchmark.png", readme]
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    for words in ("| 1.25 / 2.50 |", "| 1.17 |", "| 1.28 |", "| 5.39 |", "| 1.83 |", "3.2 s; a",
                  "2 at once / one | 1.61 |",
                  "| checkpoints, of the time of an epoch, ResNet-18, AGD | 0.12 % |",
                  "| AGD 1.5 MB, fused AdamW 7.1 MB; the largest weight has 3.0 MB |",
                  "a processor, torch 2.9.0,", "(results/benchmark/benchmark.png)"):  # fmt: skip
        assert words in text, words
    with Image.open(folder / "benchmark.png") as picture:
        drawn = draw.draw(found)
        assert picture.info["Source"] == fingerprint(drawn)
    plt.close(drawn)


def test_a_gpu_has_tables_and_a_picture_of_its_own(found, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(found["data"]))
    queue = {net: {peer: 10 * x for peer, x in values.items()}
             for net, values in found["step"]["ratios"].items()}  # fmt: skip
    del found["step"]["growth"]  # as of --nets
    for values in queue.values():  # which no graph can hold
        values.pop("AdamW, foreach", None)
    found["step"] |= {"ratios as a CUDA graph": queue, "quartiles as a CUDA graph": {
        net: {peer: [x, x] for peer, x in values.items()} for net, values in queue.items()}}
    (tmp_path / draw.file_name("step", "cuda")).write_text(json.dumps(found["step"]))
    assert draw.write(tmp_path) == [tmp_path / "benchmark-cuda.png"]  # and not the README
    text = draw.block(tmp_path)
    assert "| 1.25 / 2.50 |" in text and "| 12.50 / 25.00 |" in text
    assert "benchmark-cuda.png" in text and "benchmark.png" not in text
    figure = draw.draw({"step": found["step"]})
    assert max(bar.get_y() + bar.get_height() for bar in figure.axes[0].patches) == 62.5
    plt.close(figure)


def test_the_picture_shows_what_is_there(found):
    del found["many"]
    figure = draw.draw(found)
    bars, growth, runs, *sizes = figure.axes
    assert len(bars.patches) == len(draw.SHOWN) * (len(draw.COLOURS) - 1)
    assert list(growth.lines[0].get_ydata()) == [1, 2]  # in ms
    assert not runs.axison and all(len(ax.lines) == 2 for ax in sizes)
    plt.close(figure)


def test_checkpoints_take_at_most_a_fiftieth_of_the_published_epochs():
    path = ROOT / "results" / "benchmark" / "checkpoint.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert set(found[checkpoint.PERCENT]) == set(checkpoint.RUNS) and not found["flags"]["quick"]
    assert all(0 < percent <= 2 for percent in found[checkpoint.PERCENT].values())


def test_the_published_numbers_are_those_that_were_measured():
    folder = ROOT / "results" / "benchmark"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    between = text.split(draw.START)[1].split(draw.END)[0].strip()
    assert between == draw.block(folder), "python -m scripts.benchmark draw --out results renews it"
    for device, suffix in draw.DEVICES.items():
        found = draw.read(folder, device)
        if "step" in found:
            figure = draw.draw(found)
            with Image.open(folder / f"benchmark{suffix}.png") as picture:
                assert picture.info["Source"] == fingerprint(figure)
            plt.close(figure)
        for case in found:
            assert (folder / draw.file_name(case, device)).stat().st_size < 20_000
