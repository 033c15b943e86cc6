"""Runs that are broken at every possible place, and what ends a run."""

import os
import signal

import pytest
import torch
from PIL import Image

import main as program
from agd import init_weights
from architecture import build
from architecture.fcn import FCN
from data import load
from tests.conftest import with_norms
from tests.program import LOOKS, QUICK, SMALL, STEPS, call, equal, only, rows, same, train, weights
from training.control import ANNOUNCED, NOTHING, SAVE, STOP, Requests
from training.losses import mse
from training.nonfinite import first_nonfinite
from training.trainer import Trainer


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


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_images_that_batch_norm_reads_again_are_not_counted_again(workers, tmp_path, monkeypatch):
    """Workers read ahead, and one image of the first batches is bad. Without --skip_bad_images it
    ends the run, and the same command tries again."""
    folder = tmp_path / "små images"  # a name that needs care
    for split, count in (("train", 24), ("val", 6)):
        for i in range(count):
            path = folder / split / "ab"[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (10 * i, 9 * i % 250, 0)).save(path)
    (folder / "train" / "b" / "05.png").write_bytes(b"no image")

    def small(*args, **sizes):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 4, 4, bias=False), torch.nn.BatchNorm2d(4, affine=False),
            torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 2, bias=False),
        )  # fmt: skip

    monkeypatch.setattr(program, "build", small)
    flags = ["--dataset", f"folder:{folder}", "--image_size", 32, "--train_bs", 2, "--test_bs", 2,
             "--workers", workers, "--optimizer", "spectral", "--epochs", 2, "--cpu",
             "--log_steps"]  # fmt: skip
    for _ in range(2):
        assert train(*flags, "--out", tmp_path / "bad") == 2
        end = rows(tmp_path / "bad")[-1]
        assert "05.png" in end["stopped"] and not end["final"]
    flags.append("--skip_bad_images")
    code, plan = call(*flags, "--out", tmp_path / "whole")
    assert (code, plan.looks) == (0, 2 * (12 + 3))
    first, *_, end = rows(tmp_path / "whole")
    assert "skip" in first["name"] and first["train_examples"] == 24 and end["bad_images"] == 1
    assert round(end["train_acc"] * 23, 6).is_integer()
    assert round(end["test_acc"] * 6, 6).is_integer()
    for k in (7, 12, 13, 14, 16, 28):
        assert train(*flags, "--out", tmp_path / str(k), asked={k: STOP}) == 130
        assert train(*flags, "--out", tmp_path / str(k)) == 0
        same(tmp_path / str(k), tmp_path / "whole")


def test_a_run_that_is_stopped_again_and_again_is_the_unbroken_one(tmp_path):
    flags = [*SMALL, "--epochs", 3]
    assert train(*flags, "--out", tmp_path / "whole") == 0
    codes = [train(*flags, "--out", tmp_path / "parts", asked={5: STOP}) for _ in range(9)]
    first = codes.index(0)
    assert set(codes[:first]) == {130} and set(codes[first:]) == {0}
    same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("optimizer, norms", [
    ("agd", False), ("spectral", False), ("sgd", False), ("adam", False), ("agd", True),
])  # fmt: skip
def test_a_run_by_graphs_is_the_run_without(optimizer, norms, replays, tmp_path, monkeypatch):
    """A run by graphs has the same bits, wherever it stops, and resumes with graphs or without."""
    if norms:
        monkeypatch.setattr(program, "build", with_norms)
    flags = [*QUICK, "--epochs", 2, "--log_steps", "--log_updates", "--optimizer", optimizer]
    off = ["--cuda_graph", "off"]
    assert train(*flags, *off, "--out", tmp_path / "whole") == 0
    assert train(*flags, *off, "--epochs", 1, "--out", tmp_path / "1") == 0
    assert not replays
    assert train(*flags, "--out", tmp_path / "0") == 0
    assert len(replays) == 2 * STEPS - (3 + 2)  # the ragged batch comes twice
    for k, then in ((0, []), (1, []), (7, []), (STEPS, off), (STEPS + 3, [])):
        out = tmp_path / str(k)
        if k > 1:
            assert train(*flags, "--out", out, asked={k: STOP}) == 130
        assert train(*flags, *then, "--out", out) == 0
        same(out, tmp_path / "whole")
    assert rows(tmp_path / "0")[0]["cuda_graph"] is True
    assert rows(tmp_path / "1")[0]["resumed"][0]["cuda_graph"] is True


def test_fewer_epochs_than_the_checkpoint_has_are_no_result(tmp_path, capsys):
    flags = [*SMALL, "--out", tmp_path]
    assert train(*flags, "--epochs", 3, asked={16: STOP}) == 130  # within the third
    capsys.readouterr()
    assert train(*flags, "--epochs", 2) == 0
    assert "The checkpoint is in epoch 3 already, past --epochs 2" in capsys.readouterr().out
    assert "end" not in [row["kind"] for row in rows(tmp_path)]
    assert train(*flags, "--epochs", 3) == 0
    assert train(*SMALL, "--epochs", 3, "--out", tmp_path / "whole") == 0
    same(tmp_path, tmp_path / "whole")


@pytest.mark.parametrize("launcher", ["SLURM", "TORCHELASTIC"])
def test_a_job_that_starts_over_does_so_once(launcher, tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--fresh", "--out", tmp_path]
    assert train(*flags, asked={3: STOP}) == 130
    monkeypatch.setenv(f"{launcher}_RESTART_COUNT", "0")
    assert train(*flags, asked={2: STOP}) == 130
    monkeypatch.setenv(f"{launcher}_RESTART_COUNT", "1")
    capsys.readouterr()
    assert train(*flags) == 0
    assert "Going on after epoch 0, step 2 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("flags, micro_bs", [([], 4), (["--micro_bs", "20"], 5)])
def test_the_micro_batch_that_memory_allowed_stays_until_another_is_requested(
    flags, micro_bs, replays, tmp_path, monkeypatch, capsys
):
    """Micro-batches run without graphs, which hold whole batches."""
    forward, limit = FCN.forward, [6]

    def small(net, x):
        if net.training and len(x) > limit[0]:
            raise torch.OutOfMemoryError("out of memory")
        return forward(net, x)

    def last_epoch():
        return [row for row in rows(tmp_path) if row["kind"] == "epoch"][-1]

    monkeypatch.setattr(FCN, "forward", small)
    run = [*SMALL, *flags, "--out"]
    assert train(*run, tmp_path, asked={2: STOP}) == 130
    assert train(*run, tmp_path / "whole") == 0
    assert capsys.readouterr().out.count("Memory ran out: ") == 1
    limit[0] = 1000
    assert train(*run, tmp_path, asked={9: STOP}) == 130
    assert (last_epoch()["micro_bs"], last_epoch()["lowered"]) == (micro_bs, True)
    assert train(*SMALL, "--micro_bs", 11, "--out", tmp_path) == 0
    assert (last_epoch()["micro_bs"], last_epoch()["lowered"]) == (11, False)
    assert rows(tmp_path)[0]["resumed"][-1]["flags"] == {"micro_bs": 11} and not replays


def test_checkpoints_come_as_often_as_requested(tmp_path, monkeypatch):
    written, save = [], Trainer.save

    def saved(trainer, totals):
        save(trainer, totals)
        written.append((trainer.epoch, trainer.step))

    monkeypatch.setattr(Trainer, "save", saved)
    three, all_steps = ["--save_every", 3], ["--save_every", "0.000001s"]
    for out, flags, asked, expected in (
        ("whole", [], {}, [(1, 0), (2, 0)]),
        ("steps", three, {}, [(0, 3), (1, 0), (1, 2), (2, 0)]),
        ("seconds", all_steps, {}, None),
        ("signals", [], {2: SAVE, 9: ANNOUNCED}, [(0, 2), (1, 0), (1, 2), (2, 0)]),
    ):
        written.clear()
        assert train(*SMALL, *flags, "--out", tmp_path / out, asked=asked) == 0
        assert written == expected if expected else {(0, 1), (1, 4)} < set(written)
        same(tmp_path / out, tmp_path / "whole")


@pytest.mark.parametrize("taken", [True, False])
def test_a_job_whose_time_is_nearly_up_goes_back_to_the_queue(taken, tmp_path, monkeypatch, capsys):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    refusal = "" if taken else "echo slurm_requeue error: no >&2\nexit 1\n"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{refusal}')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert train(*SMALL, "--out", tmp_path / "whole") == 0
    capsys.readouterr()
    code, plan = call(*SMALL, "--out", tmp_path, asked={6: ANNOUNCED})
    printed = capsys.readouterr().out
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    if taken:
        assert (code, plan.looks) == (130, 6)
        assert rows(tmp_path)[-1]["stopped"] == "requeued"
        assert "The job is back in the queue after 0 whole epochs, in step 4 of 4" in printed
        assert train(*SMALL, "--out", tmp_path) == 0
    else:
        assert (code, plan.looks) == (0, LOOKS)
        assert "SLURM does not take the job back (slurm_requeue error: no): going on" in printed
    same(tmp_path, tmp_path / "whole")


def test_signals_are_noted_once_a_run_listens(monkeypatch):
    """A second one that comes at once is the first, which a launcher has passed on."""
    handlers, requests = {}, Requests()
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    requests.install()

    def send(number):
        handlers[number](number, None)
        return requests.take()

    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert [send(x) for x in (signal.SIGUSR1, signal.SIGUSR2)] == [ANNOUNCED] * 2
    assert requests.take() == send(signal.SIGTERM) == NOTHING  # one of the launcher's
    requests = Requests()
    requests.install()
    requests.listening = True
    assert [send(x) for x in (signal.SIGTERM, signal.SIGINT)] == [STOP] * 2
    assert signal.SIGHUP in handlers
    handlers.clear()
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)  # nohup
    Requests().install()
    assert signal.SIGTERM in handlers and signal.SIGHUP not in handlers
    requests.install()
    requests.since -= 2
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_the_state_of_the_next_step_follows_from_seed_and_step(tmp_path, monkeypatch):
    """An optimiser that draws from torch's generator draws the same numbers after a break."""
    (tmp_path / "noisy.py").write_text(
        "import torch\n\n\nclass Noisy(torch.optim.SGD):\n    def step(self):\n"
        "        for group in self.param_groups:\n            for p in group['params']:\n"
        "                p.grad += 1e-3 * torch.randn_like(p)\n        super().step()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = [*SMALL, "--optimizer", "noisy.Noisy", "--lr", 0.1, "--out"]
    assert train(*flags, tmp_path / "whole") == 0
    for asked, code in (({2: STOP}, 130), ({5: STOP}, 130), ({}, 0)):
        assert train(*flags, tmp_path / "parts", asked=asked) == code
    same(tmp_path / "parts", tmp_path / "whole")


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(tmp_path, capsys):
    """A checkpoint within an epoch; test_bad_inputs.py has checkpoints between epochs."""
    assert train(*SMALL, "--out", tmp_path, asked={3: STOP}) == 130
    path = tmp_path / "checkpoints" / f"{only(tmp_path)}.pt"
    good = torch.load(path, weights_only=True)
    net, totals, (group,) = good["net"], good["totals"], good["optimizer"]["param_groups"]
    faster = {**good["optimizer"], "param_groups": [{**group, "lr": 7.0}]}
    other = "of another network or optimiser"
    for changes, words in (
        ({"net": {**net, "layers.1.weight": torch.zeros(16, 17)}},
         "layers.1.weight is float32 (16, 17) there, and float32 (16, 16) h"),
        ({"net": {**net, "layers.9.weight": torch.zeros(2, 2)}},
         "layers.9.weight is in one of them alone"),
        ({"optimizer": faster}, other), ({"generators": [torch.zeros(3)]}, other),
        ({"not_finite": 7}, other), ({"totals": None}, other),
        ({"totals": {**totals, "eta": totals["eta"][:, None]}}, other),
        ({"totals": {**totals, "counts": ["25"] * 3}}, other),
        ({"totals": {**totals, "losses": torch.zeros(9)}}, other),
    ):  # fmt: skip
        torch.save({**good, **changes}, path)
        capsys.readouterr()
        assert train(*SMALL, "--out", tmp_path) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, changes


def spoil(monkeypatch, factor, bad):
    """Multiply the outputs of the training passes whose numbers, from 1, are in `bad`. Returns a
    list of one, the number of the last pass."""
    forward, passes = FCN.forward, [0]

    def spoiled(net, x):
        passes[0] += net.training
        y = forward(net, x)
        return y * factor if net.training and passes[0] in bad else y

    monkeypatch.setattr(FCN, "forward", spoiled)
    return passes


@pytest.mark.parametrize("rule", ["agd", "spectral"])
def test_twenty_steps_without_a_gradient_end_the_run(rule, tmp_path, monkeypatch, capsys):
    """The checkpoint before the 5th step stays, and the log has the images of the skipped steps."""
    passes = spoil(monkeypatch, float("nan"), range(5, 10**6))
    passes[0] -= rule == "spectral"  # which reads its paths first
    flags = [*QUICK, "--save_every", 3, "--optimizer", rule, "--out", tmp_path]
    assert train(*flags) == 1
    _, epoch, *_, end = rows(tmp_path)
    assert end["stopped"].startswith(
        "20 steps in a row had no finite gradient, the last of them epoch 2, step 12: the first "
        "that is not finite is "
    )
    assert end["final"] and end["skipped_steps"] == 20
    steps = end["not_finite"]["steps"]
    places = [(x["epoch"], x["step"]) for x in steps]
    assert places == [(1, i) for i in range(5, 13)] + [(2, i) for i in range(1, 13)]
    batches = load("digits", "", 128, 128, torch.device("cpu")).train
    for x in steps:
        batches.set_epoch(x["epoch"])
        first = 128 * (x["step"] - 1)
        assert x["indices"] == batches.order()[first : first + 128].tolist()
    assert epoch["skipped_steps"] == 8 and epoch["train_loss"] is None
    assert epoch.get("turn") is None and ("length" in epoch) == (rule == "spectral")
    assert all(x.isfinite().all() for x in weights(tmp_path).values())
    printed = capsys.readouterr().out
    assert "Stopped: 20 steps in a row" in printed and "20 steps were skipped" in printed
    assert train(*flags) == 1 and "Already ended: 20 steps" in capsys.readouterr().out


def test_the_count_of_bad_steps_outlives_a_break_and_ends_with_a_good_one(tmp_path, monkeypatch):
    bad = set(range(5, 24)) | set(range(25, 44))
    passes = spoil(monkeypatch, float("inf"), bad)
    assert train(*QUICK, "--out", tmp_path / "whole") == 0
    assert rows(tmp_path / "whole")[-1]["skipped_steps"] == 38
    passes[0] = 0
    bad.add(24)  # in the other half
    assert train(*QUICK, "--out", tmp_path / "parts", asked={15: STOP}) == 130
    assert train(*QUICK, "--out", tmp_path / "parts") == 1
    assert len(rows(tmp_path / "parts")[-1]["not_finite"]["steps"]) == 20


@pytest.mark.parametrize("arch", ["fcn", pytest.param("vgg", marks=pytest.mark.slow)])
def test_the_first_value_that_is_not_finite_is_named(arch):
    torch.manual_seed(0)
    net = build(arch, (3, 32, 32), 10, depth=4, width=64)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    x, y = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for micro_bs in (None, 5):
        assert first_nonfinite(net, mse, x, y, micro_bs) is None
    assert equal(net.state_dict(), before)
    assert all(p.grad is None for p in net.parameters())
    (name, weight), (last, other) = list(net.named_parameters())[-2:]
    with torch.no_grad():
        weight.mul_(1e25 if arch == "fcn" else 1)  # batch norm would take it back
        other.mul_(1e25)
    output = f"the output of {last.removesuffix('.weight')}"
    assert first_nonfinite(net, mse, x, y) == ("the loss" if arch == "vgg" else output)
    with torch.no_grad():
        weight[0, 0] = float("nan")
    assert first_nonfinite(net, mse, x, y) == f"the weights of {name}"
    net.load_state_dict(before)
    large = first_nonfinite(net, lambda outputs, labels: mse(outputs, labels) * 1e38 * 1e3, x, y)
    assert large == "the loss"
