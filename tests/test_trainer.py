"""Runs that are broken at every possible place, and what ends a run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import main as program
from agd import init_weights
from architecture import build
from architecture.fcn import FCN
from data import load
from runs.checkpoint import unpack
from tests.conftest import ROOT, with_norms
from tests.test_main import QUICK, comparable, rows, weights
from training.control import ANNOUNCED, NOTHING, SAVE, STOP, Requests
from training.losses import mse
from training.nonfinite import first_nonfinite
from training.trainer import Trainer

STEPS = 12  # an epoch of the digits
SMALL = ["--dataset", "digits", "--train_examples", "90", "--test_examples", "60", "--train_bs",
         "25", "--test_bs", "25", "--depth", "3", "--width", "16", "--epochs", "2",
         "--log_steps", "--log_updates"]  # fmt: skip
LOOKS = 2 * (4 + 3)  # at the requests, after every batch of training and testing


class Plan(Requests):
    """Requests that come at given looks, counted from 1."""

    def __init__(self, asked):
        super().__init__()
        self.asked, self.looks = asked, 0

    def take(self):
        self.looks += 1
        return self.asked.get(self.looks, NOTHING)


def call(*flags, asked=None):
    plan = Plan(asked or {})
    return program.main([str(flag) for flag in flags], plan), plan


def only(out):
    (name,) = [path.stem for path in (out / "logs").glob("*.jsonl")]
    return name


def same(one, other):
    name = only(one)
    assert comparable(rows(one, name))[1:] == comparable(rows(other, name))[1:]
    a, b = (unpack((out / "checkpoints" / f"{name}.pt").read_bytes()) for out in (one, other))
    assert a["optimizer"].keys() == b["optimizer"].keys()
    for key, x in b["net"].items():
        assert torch.equal(a["net"][key], x), key
    for key, x in b["optimizer"].get("state", {}).items():
        for part, value in x.items():
            assert torch.equal(torch.as_tensor(a["optimizer"]["state"][key][part]),
                               torch.as_tensor(value)), (key, part)  # fmt: skip
    return a


@pytest.mark.parametrize("optimizer, norms", [
    ("agd", False), ("adam", False), ("spectral", False), ("spectral", True),
    ("tests.reference.Averaging", False),
])  # fmt: skip
def test_a_run_that_is_stopped_at_any_look_is_the_unbroken_one(
    optimizer, norms, tmp_path, capsys, monkeypatch
):
    """Two optimisers train other weights than those that are tested, and of one of them batch norm
    takes its statistics anew."""
    flags = [*SMALL, "--optimizer", optimizer]
    if norms:
        monkeypatch.setattr(program, "build", with_norms)
    code, plan = call(*flags, "--out", tmp_path / "whole")
    assert (code, plan.looks) == (0, LOOKS)
    for k in range(1, LOOKS + 1):
        out = tmp_path / str(k)
        code, plan = call(*flags, "--out", out, asked={k: STOP})
        assert (code, plan.looks) == (130, k)
        end = rows(out, only(out))[-1]
        assert end["stopped"] == "interrupted" and not end["final"]
        capsys.readouterr()
        assert call(*flags, "--out", out)[0] == 0
        said = capsys.readouterr().out
        epoch, look = divmod(k - 1, 7)
        assert f"Going on after epoch {epoch}, step {min(look + 1, 4)} of 4, of" in said
        same(out, tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_batch_norm_reads_again_are_not_counted_again(workers, tmp_path, monkeypatch):
    """Of a folder with a bad one among the first batches, which workers read ahead."""
    for split, count in (("train", 24), ("val", 6)):
        for i in range(count):
            path = tmp_path / "set" / split / "ab"[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (10 * i, 9 * i % 250, 0)).save(path)
            if (split, i) == ("train", 5):
                path.write_bytes(b"no image")

    def small(*args):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 4, 4, bias=False), torch.nn.BatchNorm2d(4, affine=False),
            torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 2, bias=False),
        )  # fmt: skip

    monkeypatch.setattr(program, "build", small)
    flags = ["--dataset", f"folder:{tmp_path / 'set'}", "--image_size", 32, "--train_bs", 2,
             "--test_bs", 2, "--workers", workers, "--skip_bad_images", "--optimizer", "spectral",
             "--epochs", 2, "--cpu", "--log_steps"]  # fmt: skip
    code, plan = call(*flags, "--out", tmp_path / "whole")
    assert (code, plan.looks) == (0, 2 * (12 + 3))
    first, *_, end = rows(tmp_path / "whole", only(tmp_path / "whole"))
    assert end["bad_images"] == 1 and round(end["train_acc"] * 23, 6).is_integer()
    for k in (7, 12, 13, 14, 16, 28):
        assert call(*flags, "--out", tmp_path / str(k), asked={k: STOP})[0] == 130
        assert call(*flags, "--out", tmp_path / str(k))[0] == 0
        same(tmp_path / str(k), tmp_path / "whole")


def test_a_run_that_is_stopped_again_and_again_is_the_unbroken_one(tmp_path):
    flags = [*SMALL, "--epochs", 3]
    assert call(*flags, "--out", tmp_path / "whole")[0] == 0
    codes = [call(*flags, "--out", tmp_path / "parts", asked={5: STOP})[0] for _ in range(9)]
    first = codes.index(0)
    assert set(codes[:first]) == {130} and set(codes[first:]) == {0}
    same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["agd", "spectral", "sgd", "adam"])
def test_a_run_by_graphs_is_the_run_without(optimizer, tmp_path, monkeypatch):
    """To the bit, stopped and resumed anywhere; graphs have a stand-in here."""
    flags = [*QUICK, "--epochs", 2, "--log_steps", "--log_updates", "--optimizer", optimizer]
    assert call(*flags, "--out", tmp_path / "whole")[0] == 0
    assert call(*flags, "--epochs", 1, "--out", tmp_path / "1")[0] == 0
    replayed = []

    def recorder():
        return lambda work: lambda: (replayed.append(1), work())

    monkeypatch.setattr("flags.no_graph", lambda args: None)
    monkeypatch.setattr("training.cuda_graph.cuda_recorder", recorder)
    # Adam counts on the device in a graph, and not on a CPU.
    monkeypatch.setattr("training.trainer.set_capturable", lambda *args: None)
    assert call(*flags, "--out", tmp_path / "0")[0] == 0
    assert len(replayed) == 2 * STEPS - (3 + 2)  # the ragged batch comes twice
    for k in (0, 1, 7, STEPS, STEPS + 3):
        out = tmp_path / str(k)
        if k > 1:
            assert call(*flags, "--out", out, asked={k: STOP})[0] == 130
        assert call(*flags, "--out", out)[0] == 0
        same(out, tmp_path / "whole")
    assert rows(tmp_path / "0", only(tmp_path / "0"))[0]["cuda_graph"] is True
    assert rows(tmp_path / "1", only(tmp_path / "1"))[0]["resumed"][0]["cuda_graph"] is True


def test_fewer_epochs_than_the_checkpoint_has_are_no_result(tmp_path, capsys):
    flags = [*SMALL, "--out", tmp_path]
    assert call(*flags, "--epochs", 3, asked={16: STOP})[0] == 130  # within the third
    capsys.readouterr()
    assert call(*flags, "--epochs", 2)[0] == 0
    assert "The checkpoint is in epoch 3 already, past --epochs 2" in capsys.readouterr().out
    assert [row["kind"] for row in rows(tmp_path, only(tmp_path))].count("end") == 0
    assert call(*flags, "--epochs", 3)[0] == 0
    assert call(*SMALL, "--epochs", 3, "--out", tmp_path / "whole")[0] == 0
    same(tmp_path, tmp_path / "whole")


@pytest.mark.parametrize("launcher", ["SLURM", "TORCHELASTIC"])
def test_a_job_that_starts_over_does_so_once(launcher, tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--fresh", "--out", tmp_path]
    assert call(*flags, asked={3: STOP})[0] == 130
    monkeypatch.setenv(f"{launcher}_RESTART_COUNT", "0")
    assert call(*flags, asked={2: STOP})[0] == 130
    monkeypatch.setenv(f"{launcher}_RESTART_COUNT", "1")
    capsys.readouterr()
    assert call(*flags)[0] == 0
    assert "Going on after epoch 0, step 2 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--micro_bs", "20"]])
def test_what_memory_allowed_stays_unless_something_else_is_asked(
    flags, tmp_path, monkeypatch, capsys
):
    forward, limit = FCN.forward, [6]

    def small(net, x):
        if net.training and len(x) > limit[0]:
            raise torch.OutOfMemoryError("out of memory")
        return forward(net, x)

    monkeypatch.setattr(FCN, "forward", small)
    run = [*SMALL, *flags, "--out", tmp_path]
    assert call(*run, asked={2: STOP})[0] == 130
    assert call(*run[:-1], tmp_path / "whole")[0] == 0
    assert capsys.readouterr().out.count("Memory ran out: ") == 1
    limit[0] = 1000
    assert call(*run, asked={9: STOP})[0] == 130
    epoch = rows(tmp_path, only(tmp_path))[-2]
    assert epoch["kind"] == "epoch" and epoch["lowered"]
    assert epoch["micro_bs"] == (5 if flags else 4)
    assert call(*SMALL, "--micro_bs", 11, "--out", tmp_path)[0] == 0
    epoch = rows(tmp_path, only(tmp_path))[-2]
    assert (epoch["micro_bs"], epoch["lowered"]) == (11, False)
    told = rows(tmp_path, only(tmp_path))[0]["resumed"][-1]
    assert told["flags"] == {"micro_bs": 11}


def test_checkpoints_come_as_often_as_is_asked(tmp_path, monkeypatch):
    written, write = [], Trainer.save

    def save(self, totals):
        write(self, totals)
        written.append((self.epoch, self.step))

    monkeypatch.setattr(Trainer, "save", save)
    assert call(*SMALL, "--out", tmp_path / "a")[0] == 0
    assert written == [(1, 0), (2, 0)]
    written.clear()
    assert call(*SMALL, "--save_every", 3, "--out", tmp_path / "b")[0] == 0
    assert written == [(0, 3), (1, 0), (1, 2), (2, 0)]
    written.clear()
    assert call(*SMALL, "--save_every", "0.000001s", "--out", tmp_path / "c")[0] == 0
    assert (0, 1) in written and (1, 4) in written
    same(tmp_path / "b", tmp_path / "a")
    same(tmp_path / "c", tmp_path / "a")
    written.clear()
    assert call(*SMALL, "--out", tmp_path / "d", asked={2: SAVE, 9: ANNOUNCED})[0] == 0
    assert written == [(0, 2), (1, 0), (1, 2), (2, 0)]
    same(tmp_path / "d", tmp_path / "a")


@pytest.mark.parametrize("taken", [True, False])
def test_a_job_whose_time_is_nearly_up_goes_back_to_the_queue(taken, tmp_path, monkeypatch, capsys):
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        + ("" if taken else "echo slurm_requeue error: no >&2\nexit 1\n")
    )
    (bin / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert call(*SMALL, "--out", tmp_path / "whole")[0] == 0
    capsys.readouterr()
    code, plan = call(*SMALL, "--out", tmp_path, asked={6: ANNOUNCED})
    said = capsys.readouterr().out
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    if taken:
        assert (code, plan.looks) == (130, 6)
        assert rows(tmp_path, only(tmp_path))[-1]["stopped"] == "requeued"
        assert "The job is back in the queue after 0 whole epochs, in step 4 of 4" in said
        assert call(*SMALL, "--out", tmp_path)[0] == 0
    else:
        assert (code, plan.looks) == (0, LOOKS)
        assert "SLURM does not take the job back (slurm_requeue error: no): going on" in said
    same(tmp_path, tmp_path / "whole")


def test_signals_are_noted_once_a_run_listens():
    """A second one that comes at once is the first, which a launcher has passed on."""
    requests = Requests()
    with pytest.raises(KeyboardInterrupt):
        requests._end(signal.SIGINT, None)
    requests._end(signal.SIGTERM, None)
    requests = Requests()
    requests.announce(signal.SIGUSR1, None)
    requests.listening = True
    assert requests.take() == ANNOUNCED and requests.take() == NOTHING
    requests._end(signal.SIGTERM, None)
    requests._end(signal.SIGINT, None)
    assert requests.take() == STOP
    requests.since -= 2
    with pytest.raises(KeyboardInterrupt):
        requests._end(signal.SIGINT, None)


def begun(path):
    """Wait for the first epoch."""
    end = time.monotonic() + 60
    while not (path.exists() and b'"epoch", "epoch": 2' in path.read_bytes()):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_usr1_saves_and_the_run_goes_on(tmp_path):
    flags = [*QUICK[:-1], "3000", "--out", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "SLURM_JOB_ID"}
    process = subprocess.Popen(
        [sys.executable, "main.py", *flags], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        begun(tmp_path / "logs" / "fcn3x32-digits-mse-bs128-agd-seed0.jsonl")
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            process.send_signal(number)
            time.sleep(0.3)
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 130
    finally:
        process.kill()
    assert rows(tmp_path)[-1]["stopped"] == "interrupted"


def test_the_state_of_the_next_step_follows_from_seed_and_step(tmp_path):
    """What an optimiser draws from torch's generator, too."""
    package = tmp_path / "noisy.py"
    package.write_text(
        "import torch\n\n\nclass Noisy(torch.optim.SGD):\n    def step(self):\n"
        "        for group in self.param_groups:\n            for p in group['params']:\n"
        "                p.grad += 1e-3 * torch.randn_like(p)\n        super().step()\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        flags = [*SMALL, "--optimizer", "noisy.Noisy", "--lr", 0.1]
        assert call(*flags, "--out", tmp_path / "whole")[0] == 0
        assert call(*flags, "--out", tmp_path / "parts", asked={2: STOP})[0] == 130
        assert call(*flags, "--out", tmp_path / "parts", asked={5: STOP})[0] == 130
        assert call(*flags, "--out", tmp_path / "parts")[0] == 0
    finally:
        sys.path.remove(str(tmp_path))
    same(tmp_path / "parts", tmp_path / "whole")


def test_a_checkpoint_of_another_network_names_the_layer(tmp_path, capsys):
    assert call(*SMALL, "--out", tmp_path, asked={3: STOP})[0] == 130
    path = tmp_path / "checkpoints" / f"{only(tmp_path)}.pt"
    good = torch.load(path, weights_only=True)

    def refused(**changes):
        torch.save({**good, **changes}, path)
        capsys.readouterr()
        assert call(*SMALL, "--out", tmp_path)[0] == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        return captured.err

    wide = {**good["net"], "layers.1.weight": torch.zeros(16, 17)}
    assert "layers.1.weight is float32 (16, 17) there, and float32 (16, 16) h" in refused(net=wide)
    assert "layers.9.weight is in one of them alone" in refused(
        net={**good["net"], "layers.9.weight": torch.zeros(2, 2)}
    )
    assert "step 5 of 4" in refused(step=5)
    assert "no checkpoint of a run" in refused(step="3")
    assert "no checkpoint of a run" in refused(epoch=-1)
    assert "lacks epochs" in refused(epoch=7)
    for forged in ({"totals": {}}, {"totals": None}, {"optimizer": {}}, {"net": 3},
                   {"not_finite": 7}, {"bad_images": "["}, {"generators": [torch.zeros(3)]},
                   {"seconds": "x"}, {"seconds": float("nan")}, {"missing": "x"}, {"missing": -1},
                   {"micro_bs": "x"}, {"micro_bs": [None, 0]}, {"not_finite": ["ab"]},
                   {"totals": {**good["totals"], "eta": good["totals"]["eta"][:, None]}},
                   {"totals": {**good["totals"], "counts": ["25"] * 3}},
                   {"totals": {**good["totals"], "losses": good["totals"]["losses"] * 1j}},
                   {"optimizer": {**good["optimizer"], "param_groups": [
                       {**good["optimizer"]["param_groups"][0], "lr": 7.0}]}},
                   {"totals": {**good["totals"], "counts": [1]}},
                   {"totals": {**good["totals"], "losses": torch.zeros(9)}}):  # fmt: skip
        assert "of another network or optimiser" in refused(**forged), forged
    settings = json.loads(good["settings"])
    assert "(width 7 then, 16 now)" in refused(settings=json.dumps({**settings, "width": 7}))


@pytest.mark.parametrize("rule", ["agd", "spectral"])
def test_twenty_steps_without_a_gradient_end_the_run(rule, tmp_path, monkeypatch, capsys):
    """From the 5th step on; the checkpoint before stays, and the log says which images."""
    forward, calls = FCN.forward, [-1 if rule == "spectral" else 0]  # which reads its paths first

    def spoiled(net, x):
        calls[0] += net.training
        y = forward(net, x)
        return y * float("nan") if net.training and calls[0] > 4 else y

    monkeypatch.setattr(FCN, "forward", spoiled)
    flags = [*QUICK, "--save_every", 3, "--optimizer", rule, "--out", tmp_path]
    assert call(*flags)[0] == 1
    name = only(tmp_path)
    end = rows(tmp_path, name)[-1]
    assert end["stopped"].startswith(
        "20 steps in a row had no finite gradient, the last of them epoch 2, step 12: the first "
        "that is not finite is "
    )
    assert end["final"] and end["skipped_steps"] == 20
    places = [(x["epoch"], x["step"]) for x in end["not_finite"]["steps"]]
    assert places == [(1, i) for i in range(5, 13)] + [(2, i) for i in range(1, 13)]
    train = load("digits", "", 128, 128, torch.device("cpu")).train
    for x in end["not_finite"]["steps"]:
        train.set_epoch(x["epoch"])
        first = 128 * (x["step"] - 1)
        assert x["indices"] == train.order()[first : first + 128].tolist()
    epoch = rows(tmp_path, name)[1]
    assert epoch["skipped_steps"] == 8 and epoch["train_loss"] is None
    assert epoch.get("turn") is None and ("length" in epoch) == (rule == "spectral")
    assert all(x.isfinite().all() for x in weights(tmp_path, name).values())
    said = capsys.readouterr().out
    assert "Stopped: 20 steps in a row" in said and "20 steps were skipped" in said
    assert call(*flags)[0] == 1 and "Already ended: 20 steps" in capsys.readouterr().out


def test_the_count_of_bad_steps_outlives_a_break_and_ends_with_a_good_one(tmp_path, monkeypatch):
    forward, calls, bad = FCN.forward, [0], set(range(5, 24)) | set(range(25, 44))

    def spoiled(net, x):
        calls[0] += net.training
        y = forward(net, x)
        return y * float("inf") if net.training and calls[0] in bad else y

    monkeypatch.setattr(FCN, "forward", spoiled)
    assert call(*QUICK, "--out", tmp_path / "whole")[0] == 0
    assert rows(tmp_path / "whole")[-1]["skipped_steps"] == 38
    calls[0] = 0
    bad.add(24)  # in the other half
    assert call(*QUICK, "--out", tmp_path / "parts", asked={15: STOP})[0] == 130
    assert call(*QUICK, "--out", tmp_path / "parts")[0] == 1
    assert len(rows(tmp_path / "parts")[-1]["not_finite"]["steps"]) == 20


@pytest.mark.parametrize("arch", ["fcn", "vgg"])
def test_the_culprit_is_named(arch):
    torch.manual_seed(0)
    net = build(arch, (3, 32, 32), 10, depth=4, width=64)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    x, y = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert first_nonfinite(net, mse, x, y) is None
    assert first_nonfinite(net, mse, x, y, micro_bs=5) is None
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is None for p in net.parameters())
    (name, weight), (after, other) = list(net.named_parameters())[-2:]
    with torch.no_grad():
        weight.mul_(1e25 if arch == "fcn" else 1)  # batch norm would take it back
        other.mul_(1e25)
    found = f"the output of {after.removesuffix('.weight')}"
    assert first_nonfinite(net, mse, x, y) == ("the loss" if arch == "vgg" else found)
    with torch.no_grad():
        weight[0, 0] = float("nan")
    assert first_nonfinite(net, mse, x, y) == f"the weights of {name}"
    net.load_state_dict(before)
    large = first_nonfinite(net, lambda outputs, labels: mse(outputs, labels) * 1e38 * 1e3, x, y)
    assert large == "the loss"
