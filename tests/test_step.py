"""A step, an epoch and an evaluation: what they compute, and that the host waits for none."""

import math

import numpy as np
import pytest
import torch

from agd import AGD, init_weights
from architecture import build
from data import load
from tests.conftest import with_norms
from tests.reference import Averaging
from tests.test_agd import Reads
from training.gradient import OutOfMemory
from training.losses import LOSSES, mse, xent
from training.memory import is_out_of_memory
from training.metrics import Totals, hits
from training.step import evaluate, train_epoch

CPU = torch.device("cpu")


def digits(train_bs=128, test_bs=100):
    return load("digits", "", train_bs, test_bs, CPU)


def network(data):
    net = build("fcn", data.shape, data.classes, depth=3, width=64)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    return net


def test_losses_by_hand():
    outputs = torch.tensor([[1.0, 2.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    labels = torch.tensor([1, 3])
    # The target is 2 at the label, sqrt of 4 classes; the mean is over classes.
    assert mse(outputs, labels).tolist() == pytest.approx([(1 + 0 + 0 + 1) / 4, 4 / 4])
    expected = [math.log(math.e + math.e**2 + 1 + 1 / math.e) - 2, math.log(4)]
    assert xent(outputs, labels).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_takes_the_gradient_of_the_mean_loss(loss):
    data = digits()
    net = network(data)
    inputs, labels = next(iter(data.train))
    outputs = net(inputs)
    onehot = torch.nn.functional.one_hot(labels, 10) * math.sqrt(10)
    mean = {"mse": (outputs - onehot).square().mean(),
            "xent": torch.nn.functional.cross_entropy(outputs, labels)}[loss]  # fmt: skip
    gradients = torch.autograd.grad(mean, list(net.parameters()))
    expected = [(p - g).detach() for p, g in zip(net.parameters(), gradients)]
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    train_epoch(net, [(inputs, labels)], LOSSES[loss], optimizer)
    for p, q in zip(net.parameters(), expected):
        assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize("log_updates", [False, True])
def test_an_epoch_and_an_evaluation_read_nothing_back(log_updates):
    data = digits()
    net = network(data)
    optimizer = AGD(net.parameters(), fused=False)
    train_epoch(net, data.train, mse, optimizer, log_updates)  # torch sets itself up
    data.train.set_epoch(1)
    with Reads() as reads:
        totals = train_epoch(net, data.train, mse, optimizer, log_updates)
        tested = evaluate(net, data.test, mse)
        means = totals.means()
        assert reads.count == 0 and reads.kernels > 300
        metrics = [totals.read(), tested.read()]
        assert reads.count > 0
    assert np.isfinite([x["loss"] for x in metrics]).all()
    assert means.tolist() == pytest.approx(
        [metrics[0]["loss"], np.mean(metrics[0]["steps"]["eta"])], rel=1e-5)
    assert log_updates == (metrics[0]["steps"]["update"] is not None)


def test_totals_weigh_every_example_alike():
    torch.manual_seed(0)
    outputs, labels, totals = torch.randn(10, 4), torch.randint(4, (10,)), Totals()
    for part in (slice(0, 7), slice(7, 10)):
        x, y = outputs[part], labels[part]
        totals.add(mse(x, y), hits(x, y), eta=torch.ones(()))
    metrics, losses = totals.read(), mse(outputs, labels)
    assert metrics["examples"] == 10 and metrics["steps"]["eta"] == [1.0, 1.0]
    assert metrics["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert metrics["steps"]["loss"][1] == pytest.approx(losses[7:].mean().item(), rel=1e-6)
    assert metrics["acc"] == (outputs.argmax(1) == labels).sum().item() / 10


def test_an_evaluation_depends_on_no_batch_and_leaves_batch_norm_alone():
    data = digits()
    net = with_norms()
    statistics = net[1].running_mean
    before = statistics.clone()
    train_epoch(net, data.train, mse, AGD(net.parameters()))
    trained = statistics.clone()
    assert not torch.equal(trained, before)
    inference = []
    net.register_forward_hook(lambda net, inputs, outputs: inference.append(outputs.is_inference()))
    metrics = [evaluate(net, digits(test_bs=n).test, mse).read() for n in (1, 7, 128, 1000)]
    assert {x["examples"] for x in metrics} == {360} and len({x["acc"] for x in metrics}) == 1
    assert torch.equal(statistics, trained) and all(inference)


def test_a_test_batch_that_does_not_fit_is_halved_until_it_does():
    net, sizes, limit = network(digits()), [], [100]
    expected = evaluate(net, digits(test_bs=360).test, mse).read()
    forward = net.forward

    def small(x):
        sizes.append(len(x))
        if len(x) > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x)

    net.forward = small
    metrics = evaluate(net, digits(test_bs=200).test, mse).read()
    assert sizes == [200, 100, 100, 100, 60]
    assert (metrics["examples"], metrics["acc"]) == (expected["examples"], expected["acc"])
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    limit[0] = 0
    with pytest.raises(OutOfMemory, match="a single example"):
        evaluate(net, digits(test_bs=200).test, mse)


@pytest.mark.parametrize(("text", "expected"), [
    ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
    ("GET was unable to find an engine to execute this computation", True),  # cuDNN's
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", True),
    ("CUDA error: an illegal memory access was encountered", False),
])  # fmt: skip
def test_what_counts_as_memory_that_runs_out(text, expected):
    assert is_out_of_memory(RuntimeError(text)) == expected


# Where a data directory has the real images of a set: {name in it: name in the unpacked sample}.
FILES = {
    "digits": {},
    "mnist": {"MNIST": "MNIST"},
    "cifar10": {"cifar10.npz": "cifar10.npz"},
    "cifar100": {"cifar100.npz": "tiny100.npz"},
    "imagenet": {f"imagenet/{split}": "imagenet1k-sample/train" for split in ("train", "val")},
    "folder": {"folder": "tiny-imagenet-20"},
}
FAST = [("fcn", "digits"), ("vgg", "mnist"), ("resnet18", "folder"), ("resnet50", "digits")]


@pytest.mark.parametrize("arch, dataset", [
    pytest.param(arch, dataset, marks=[] if (arch, dataset) in FAST else pytest.mark.slow)
    for dataset in FILES for arch in ("fcn", "vgg", "resnet18", "resnet50")
])  # fmt: skip
def test_every_network_trains_two_steps_on_every_set(arch, dataset, samples, tmp_path):
    for link, file in FILES[dataset].items():
        (tmp_path / link).parent.mkdir(exist_ok=True)
        sample = file.split("/")[0].removesuffix(".npz").replace("MNIST", "mnist")
        (tmp_path / link).symlink_to(samples(sample) / file)
    name, size = (f"folder:{tmp_path}/folder", 64) if dataset == "folder" else (dataset, None)
    batch = 2 if dataset == "imagenet" else 4
    data = load(name, tmp_path, batch, batch, CPU, image_size=size)
    torch.manual_seed(0)
    net = build(arch, data.shape, data.classes)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in net.parameters()]
    batches = iter(data.train)
    two = [next(batches), next(batches)]
    metrics = train_epoch(net, two, mse, AGD(net.parameters())).read()
    assert metrics["examples"] == 2 * batch
    assert np.isfinite(metrics["steps"]["loss"] + metrics["steps"]["eta"]).all()
    assert min(metrics["steps"]["eta"]) > 0
    assert all(not torch.equal(p, b) for p, b in zip(net.parameters(), before))
    assert evaluate(net, [next(iter(data.test))], mse).read()["examples"] == batch


def test_relative_updates_are_the_mean_over_layers_of_each_step():
    data = digits(train_bs=500)
    nets, expected = [network(data) for _ in range(2)], []
    weights = list(nets[1].parameters())

    class Spy(AGD):
        def step(self):
            before = [p.detach().clone() for p in weights]
            super().step()
            sizes = [((p - w).norm() / w.norm()).item() for p, w in zip(weights, before)]
            expected.append(sum(sizes) / len(sizes))

    optimizer = AGD(nets[0].parameters())
    updates = train_epoch(nets[0], data.train, mse, optimizer, log_updates=True).read()
    assert train_epoch(nets[1], data.train, mse, Spy(weights)).read()["steps"]["update"] is None
    assert len(expected) == 3
    assert updates["steps"]["update"] == pytest.approx(expected, rel=1e-5)
    for p, q in zip(nets[0].parameters(), weights):
        assert torch.equal(p, q)  # to measure changes nothing


def test_updates_of_convolutions_and_baselines_are_measured():
    net = with_norms()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    batch = [(torch.randn(2, 1, 8, 8), torch.tensor([0, 2]))]
    steps = train_epoch(net, batch, mse, optimizer, log_updates=True).read()["steps"]
    assert steps["update"] == [0.0] and steps["eta"] is None


def test_an_optimiser_with_modes_is_in_eval_mode_after_each_epoch():
    data = digits()
    net = network(data)
    optimizer = Averaging(net.parameters())
    for _ in range(2):
        train_epoch(net, data.train, mse, optimizer)
    assert optimizer.modes == ["train", "eval"] * 2
    assert optimizer.param_groups[0]["halved"]
