import math
import re

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from architecture import build
from scripts import scaling
from scripts.markdown import block
from scripts.scaling import LINKS, Model, all_reduce, buckets, count

NODE = (235, 8)
IDEAL = (math.inf, math.inf, 8)


@pytest.fixture(scope="module")
def weights():
    return count(224)


def test_weights_and_flops_are_the_networks_own(weights):
    with torch.device("meta"):
        net = build("resnet50", (3, 224, 224), 1000)
    with FlopCounterMode(display=False) as forward:
        net(torch.empty(1, 3, 224, 224, device="meta"))
    assert sum(size for size, _ in weights) == 4 * 25502912
    assert sum(flops for _, flops in weights) == forward.get_total_flops()


def test_messages_are_those_of_ddp(weights):
    if not hasattr(dist, "_compute_bucket_assignment_by_size"):
        pytest.skip("this torch does not show how it fills buckets")
    tensors = [torch.empty(size // 4, device="meta") for size, _ in reversed(weights)]
    groups, _ = dist._compute_bucket_assignment_by_size(tensors, list(scaling.BUCKETS))
    theirs = [sum(4 * tensors[i].numel() for i in group) for group in groups]
    assert [size for size, _ in buckets(weights)] == theirs
    ready = [share for _, share in buckets(weights)]
    assert ready == sorted(ready) and ready[-1] == pytest.approx(1)


def test_an_all_reduce_by_hand():
    assert all_reduce(10**9, 1, 1, 2, 4) == 0
    # Four GPUs of a node: 6 of 4 quarters at 2 GB/s, 6 steps. Eight in two nodes: 1 GB/s between.
    inside = 0.75 + 6 * 3.4e-6 + 8.4e-6
    assert all_reduce(10**9, 4, 1, 2, 4) == pytest.approx(inside, rel=1e-9)
    assert all_reduce(10**9, 8, 1, 2, 4) == pytest.approx(inside + 1 + 2 * 9.6e-6, rel=1e-9)


@pytest.mark.parametrize("link", LINKS.values())
def test_the_model_is_sound(weights, link):
    """One GPU sends nothing; what shows lies between the last message and all; the efficiency
    falls with the number of GPUs; free links lose nothing; the rate given is the rate got."""
    model = Model(weights, 938, 256, (0.8 * link, *NODE))
    assert model.t0 + 256 / model.rate == pytest.approx(256 / 938)
    assert model.step(1, 32)[1:3] == (0, 0)
    last = all_reduce(model.buckets[-1][0], 64, 0.8 * link, *NODE)
    _, sent, shows, _ = model.step(64, 32)
    assert last < shows <= model.step(64, 32, overlap=False)[2] <= sent * (1 + 1e-9)
    for case in ((32, False), (8192, True)):
        falling = [model.efficiency(n, *case)[2] for n in scaling.GPUS]
        assert falling == sorted(falling, reverse=True)
    assert Model(weights, 938, 256, IDEAL).efficiency(8, 32, False)[2] == pytest.approx(1, abs=1e-2)


def test_the_page_shows_what_the_script_prints(capsys):
    scaling.main([])
    text = block(scaling.PAGE, *scaling.MARKS)
    assert text == capsys.readouterr().out.strip(), "python -m scripts.scaling --write renews it"


def test_flags_change_the_tables_and_a_rate_that_cannot_be_is_refused(capsys):
    scaling.main("--images_per_second 400 --inter_link 10 --batch_per_gpu 64 --batch 512".split())
    text = capsys.readouterr().out
    assert "| given | 10 GB/s |" in text and "64 a GPU" in text and "TF32 |" not in text.split(
        "### A step")[1]  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--images_per_second", "1e6"])
    assert re.search("no time for launches", capsys.readouterr().err)
