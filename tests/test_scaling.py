import json
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from architecture import build
from scripts import costs, links, plan, scaling
from scripts.costs import Cluster, Network, Work, buckets, step
from scripts.figures import fingerprint


@pytest.fixture(scope="module")
def meta():
    with torch.device("meta"):
        return build("resnet50", (3, 224, 224), 1000)


@pytest.fixture(scope="module")
def counted():
    return costs.network("resnet50", 224)


@pytest.fixture(scope="module")
def default():
    return plan.Plan(scaling.parser().parse_args([]))


def test_weights_and_flops_are_the_networks_own(meta, counted):
    assert sum(counted.sizes) == 4 * sum(p.numel() for p in meta.parameters()) == 4 * 25502912
    assert len(counted.sizes) == len(list(meta.parameters()))
    with FlopCounterMode(display=False) as forward:
        outputs = meta(torch.empty(1, 3, 224, 224, device="meta"))
    with FlopCounterMode(display=False) as backward:
        outputs.sum().backward()
    assert sum(counted.flops) == forward.get_total_flops()
    assert 2 * sum(counted.flops) - counted.flops[0] == backward.get_total_flops()


def test_buckets_are_those_of_ddp(meta, counted):
    if not hasattr(dist, "_compute_bucket_assignment_by_size"):
        pytest.skip("this torch does not show how it fills buckets")
    weights = [torch.empty(n // 4, device="meta") for n in reversed(counted.sizes)]
    limits = [costs.FIRST_BUCKET, costs.BUCKET]
    groups, _ = dist._compute_bucket_assignment_by_size(weights, limits)
    theirs = [sum(4 * weights[i].numel() for i in group) for group in groups]
    ours = buckets(counted)
    assert [size for size, _ in ours] == theirs
    ready = [share for _, share in ours]
    assert ready == sorted(ready) and ready[-1] == pytest.approx(1)


def test_a_ring_by_hand():
    inside = Cluster(1.0, node_link=2.0, gpus_per_node=4, latency_base=0.0, latency_node=1e-3,
                     latency_inter=10e-3)  # fmt: skip
    assert inside.ring(10**9, 1) == inside.hierarchical(10**9, 1) == 0
    # Four GPUs: 6 of 4 quarters at 2 GB/s, 6 steps.
    assert inside.ring(10**9, 4) == pytest.approx(0.75 + 6e-3)
    assert inside.hierarchical(10**9, 4) == pytest.approx(0.75 + 6e-3)
    # Eight in two nodes: 14 of 8 eighths at 1 GB/s, 14 steps, of which two leave a node.
    assert inside.ring(10**9, 8) == pytest.approx(1.75 + 12e-3 + 20e-3)
    # The same in two stages: 0.75 s inside, then 2 (2-1)/2 at 1 GB/s.
    assert inside.hierarchical(10**9, 8) == pytest.approx(0.75 + 1 + 6e-3 + 20e-3)


def test_one_gpu_does_not_communicate(default):
    for work in default.works.values():
        for cluster in default.links.values():
            one = step(work, cluster, 1, 32)
            assert one.communication == one.exposed == 0 and one.total == one.compute


def test_no_cost_of_a_link_is_efficiency_one(default):
    ideal = Cluster(math.inf, math.inf, 8, 0.0, 0.0, 0.0)
    for work in default.works.values():
        assert default.weak(work, ideal, 1024, 32)[2] == 1
        no_launch = replace(work, t0=0.0, update=0.0)
        assert default.strong(no_launch, ideal, 1024, 8192)[2] == pytest.approx(1)


def test_what_shows_lies_between_the_last_bucket_and_all(default):
    for work in default.works.values():
        for cluster in default.links.values():
            for n in plan.GPUS[1:]:
                some = step(work, cluster, n, 32)
                every = step(work, cluster, n, 32, overlap=False)
                last = cluster.all_reduce(buckets(work.net)[-1][0], n)
                assert last < some.exposed <= every.exposed == every.communication


def test_overlap_by_hand():
    # Two layers of equal work; the second's gradient is ready half-way through the backward pass.
    net = Network([20 * 2**20, 30 * 2**20], [1, 1], 0, 0)
    work = Work(net, t0=0.0, rate=1.0, update=0.0)
    cluster = Cluster(1.0, 1.0, 2, 0.0, 0.0, 0.0)
    first, last = 30 * 2**20 / 1e9, 20 * 2**20 / 1e9
    slow = step(work, cluster, 2, 0.03)  # the backward pass: 0.02 s, the first all-reduce ends late
    assert slow.exposed == pytest.approx(0.01 + first + last - 0.02)
    fast = step(work, cluster, 2, 3.0)
    assert fast.exposed == pytest.approx(last)


def test_the_model_is_monotone(default):
    for work in default.works.values():
        for cluster in default.links.values():
            weak = [default.weak(work, cluster, n, 32) for n in plan.GPUS]
            strong = [default.strong(work, cluster, n, 8192) for n in plan.GPUS]
            for found in (weak, strong):
                efficiency = [x[2] for x in found]
                assert efficiency == sorted(efficiency, reverse=True)
            faster = replace(cluster, inter_link=2 * cluster.inter_link)
            assert step(work, faster, 64, 32).total <= step(work, cluster, 64, 32).total
            shows = [step(work, cluster, 64, 32 * k, k) for k in (1, 4, 16)]
            shares = [x.exposed / x.total for x in shows]
            assert shares == sorted(shares, reverse=True)


def test_a_rate_and_its_launches_give_back_the_rate(counted):
    work = Work.at(counted, 938, 256)
    assert work.t0 + 256 / work.rate == pytest.approx(256 / 938)
    fitted = Work.fitted(counted, {b: b / (0.01 + b / 900) for b in (8, 64, 256)})
    assert fitted.t0 == pytest.approx(0.01) and fitted.rate == pytest.approx(900)
    with pytest.raises(ValueError, match="no time for launches"):
        Work.at(counted, 1e6, 256)


def test_measurements_take_the_place_of_inputs(tmp_path):
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "data.json").write_text('{"images_per_second_per_core": 123.0}')
    found = {"device_name": "a GPU", "images per second": {"8": 400, "256": 900}}
    checks = {"rates": {"found": found}}
    (tmp_path / "benchmark" / "gpu_checks.json").write_text(json.dumps(checks))
    here = plan.Plan(scaling.parser().parse_args(["--results", str(tmp_path)]))
    assert list(here.works) == ["measured, a GPU"] and here.decode == 123
    (work,) = here.works.values()
    assert 256 / (work.t0 + 256 / work.rate) == pytest.approx(900)
    assert "A core decodes 123 images/s" in plan.tables(here)
    measured = {"ranks": 4, "all_reduce": {"4": 1e-4, "1000000004": 0.1501},
                "environment": {"device_name": "a GPU"}}  # fmt: skip
    (tmp_path / "found.json").write_text(json.dumps(measured))
    source = ["--from", str(tmp_path / "found.json"), "--inter_link", "10"]
    there = plan.Plan(scaling.parser().parse_args(source))
    (cluster,) = there.links.values()
    assert cluster.gpus_per_node == 4 and cluster.inter_link == 8
    assert cluster.ring(10**9, 4) == pytest.approx(0.1501)


def test_decoding_counts_images(tmp_path):
    paths = [tmp_path / name for name in ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg")]
    for i, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (80, 60), (i, 0, 0)).save(path)
    threads = torch.get_num_threads()
    found = links.decoding(tmp_path)
    torch.set_num_threads(threads)
    assert found["images_per_second_per_core"] > 0
    assert found["bytes_per_file"] == sum(p.stat().st_size for p in paths) / 3


def test_the_page_shows_what_the_script_computes(default):
    text = (scaling.DOCS / "scaling.md").read_text(encoding="utf-8")
    if f"torch {plan.VERSION} |" not in text:
        pytest.skip("the page was made with another torch, which counts its kernels differently")
    between = text.split(scaling.START)[1].split(scaling.END)[0].strip()
    assert between == plan.tables(default), "python -m scripts.scaling --write renews it"
    with Image.open(scaling.DOCS / "scaling.png") as picture:
        assert picture.info["Source"] == fingerprint(scaling.draw(default))
