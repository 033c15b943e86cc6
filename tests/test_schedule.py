"""The rates of a baseline's steps, and that a run which is broken goes on with them to the bit."""

import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flags import no_graph, parse
from runs.name import name_and_settings
from tests.program import SMALL, only, rows, same, train
from training.control import STOP
from training.schedule import Cosine, cosine

FLAGS = [*SMALL, "--cpu", "--schedule", "cosine"]  # 2 epochs of 4 steps
ADAM = ["--optimizer", "adam", "--lr", 0.01]
ADAMW = ["--optimizer", "adamw", "--lr", 0.01, "--weight_decay", 0.1, "--bias"]


@pytest.fixture
def rates():
    """The rates of all groups in each step of any optimiser from now on."""
    seen = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    yield seen
    hook.remove()


def test_the_rate_of_each_step_is_the_formulas(rates, tmp_path):
    assert train(*FLAGS, *ADAM, "--warmup", 3, "--out", tmp_path) == 0
    half = [(1 + math.cos(math.pi * i / 5)) / 2 for i in range(1, 6)]
    assert [group for (group,) in rates] == pytest.approx(
        [0.01 * factor for factor in (1 / 3, 2 / 3, 1, *half)], abs=1e-17
    )
    assert rates[-1] == [0.0]
    epochs = [row for row in rows(tmp_path) if row["kind"] == "epoch"]
    assert [row["lr"] for row in epochs] == [rates[3][0], 0.0]


def test_every_group_has_the_factor(rates, tmp_path):
    assert train(*FLAGS, *ADAMW, "--out", tmp_path) == 0
    steps = rates[-8:]  # the others are those of the trial
    assert steps == [[0.01 * cosine(step, 8, 0)] * 2 for step in range(8)]
    assert 0.01 > steps[0][0] > steps[1][0]  # of so short a run no step is a warm-up


def test_a_warm_up_is_a_twentieth_of_the_run():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    schedule = Cosine(optimizer, 1500)
    factors = [schedule.rates(step)[0] / 2 for step in range(1500)]
    assert factors[:75] == pytest.approx([(step + 1) / 75 for step in range(75)])
    assert all(a > b for a, b in zip(factors[74:], factors[75:])) and factors[-1] == 0
    assert schedule.rates(1500) == [0.0]  # of a step past the last one
    for step in (1499, 3, 800):  # in any order
        schedule.set(step)
        assert optimizer.param_groups[0]["lr"] == 2 * factors[step]


@pytest.mark.parametrize("flags", [
    ADAM, [*ADAM, "--warmup", 3, "--micro_bs", 10], ADAMW,
    ["--optimizer", "sgd", "--weight_decay", 0.01, "--warmup", 0],
])  # fmt: skip
def test_a_broken_run_goes_on_to_the_bit(flags, tmp_path):
    """Within either epoch, and between them."""
    assert train(*FLAGS, *flags, "--out", tmp_path / "whole") == 0
    for asked, code in (({2: STOP}, 130), ({3: STOP}, 130), ({5: STOP}, 130), ({}, 0)):
        assert train(*FLAGS, *flags, "--out", tmp_path / "parts", asked=asked) == code
    same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("name", ["prodigyopt.Prodigy", "schedulefree.AdamWScheduleFree"])
@pytest.mark.parametrize("flags", [[], ["--schedule", "cosine", "--weight_decay", 0.1]])
def test_optimisers_with_rates_of_their_own_take_a_schedule(name, flags, tmp_path):
    pytest.importorskip(name.split(".")[0])
    flags = [*SMALL, "--cpu", "--optimizer", name, *flags, "--out"]
    assert train(*flags, tmp_path / "whole") == 0
    assert train(*flags, tmp_path / "parts", asked={6: STOP}) == 130
    assert train(*flags, tmp_path / "parts") == 0
    same(tmp_path / "parts", tmp_path / "whole")


def test_the_length_of_a_run_is_a_setting_where_its_rate_ends_with_it(tmp_path, capsys):
    """Another number of epochs is another run; a constant rate goes on."""
    flags = [*FLAGS, *ADAM, "--out", tmp_path]
    assert train(*flags) == 0
    assert "-adam-lr0.01-cosine2-seed0" in only(tmp_path)
    assert train(*flags, "--epochs", 3) == 0
    assert "lr 0" in capsys.readouterr().out
    assert len(list((tmp_path / "logs").glob("*-cosine3-*.jsonl"))) == 1

    def named(*flags):
        return name_and_settings(vars(parse([*map(str, flags), "--cpu"])))

    name, settings = named(*ADAMW, "--schedule", "cosine", "--warmup", 50, "--epochs", 9)
    assert "-torch.optim.AdamW-lr0.01-decay0.1-cosine9-warmup50-seed0" in name
    given = {"weight_decay": 0.1, "schedule": "cosine", "warmup": 50, "epochs": 9}
    assert given.items() <= settings.items()
    name, settings = named(*ADAM, "--schedule", "constant", "--epochs", 9)
    assert (name, settings) == named(*ADAM)
    assert name == "fcn10x256-cifar10-mse-bs128-adam-lr0.01-seed0"
    assert not {"weight_decay", "schedule", "warmup", "epochs"} & settings.keys()
    assert named("--schedule", "constant") == named()  # it holds for AGD, too


def test_a_run_shorter_than_its_warm_up_is_refused(tmp_path, capsys):
    """Before it leaves a file, and by --check."""
    for warmup, code in ((6, 0), (7, 2), (8, 2), (100, 2)):
        flags = [*FLAGS, *ADAM, "--warmup", warmup, "--out", tmp_path / str(warmup)]
        assert train(*flags) == code
        error = capsys.readouterr().err
        assert f"has 8 with a --warmup of {warmup}" in error if code else not error
        assert (tmp_path / str(warmup)).exists() == (code == 0)
    assert train(*flags, "--check") == 1
    assert "has 8 with a --warmup of 100: train longer" in capsys.readouterr().out
    assert train(*SMALL, *ADAM, "--cpu", "--schedule", "cosine", "--train_bs", 90, "--epochs", 1,
                 "--out", tmp_path / "one") == 2  # fmt: skip
    assert "and the run has 1" in capsys.readouterr().err


def test_a_schedule_rules_out_a_cuda_graph():
    args = parse(["--device", "cuda", *map(str, ADAM), "--schedule", "cosine"], check=False)
    assert "changes the rate in every step" in no_graph(args)
