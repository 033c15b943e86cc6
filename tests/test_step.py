import math

import numpy as np
import pytest
import torch

from agd import AGD, init_weights
from architecture import build
from data import load
from tests.reference import Averaging
from tests.test_agd import Reads
from training.gradient import OutOfMemory, is_out_of_memory
from training.losses import LOSSES, mse, xent
from training.metrics import Totals
from training.step import evaluate, train_epoch

CPU = torch.device("cpu")


def digits(train_bs=128, test_bs=100, **options):
    return load("digits", "", train_bs, test_bs, CPU, **options)


def network(data, seed=0):
    net = build("fcn", data.shape, data.classes, depth=3, width=64)
    init_weights(net.parameters(), torch.Generator().manual_seed(seed))
    return net


def test_losses_by_hand():
    outputs = torch.tensor([[1.0, 2.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    labels = torch.tensor([1, 3])
    # The target is 2 at the label, sqrt of 4 classes; the mean is over classes.
    assert mse(outputs, labels).tolist() == pytest.approx([(1 + 0 + 0 + 1) / 4, 4 / 4])
    expected = [math.log(math.e + math.e**2 + 1 + 1 / math.e) - 2, math.log(4)]
    assert xent(outputs, labels).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_has_the_gradient_of_the_mean(loss):
    data = digits()
    net = network(data)
    ours = AGD(net.parameters(), gain=0.0)
    inputs, labels = next(iter(data.train))
    seen = []

    class Spy:
        def step(self):
            seen.extend(p.grad.clone() for p in net.parameters())

        def zero_grad(self):
            ours.zero_grad()

    train_epoch(net, [(inputs, labels)], LOSSES[loss], Spy())
    outputs = net(inputs)
    onehot = torch.nn.functional.one_hot(labels, 10) * math.sqrt(10)
    expected = {"mse": (outputs - onehot).square().mean(),
                "xent": torch.nn.functional.cross_entropy(outputs, labels)}[loss]  # fmt: skip
    for p, g in zip(torch.autograd.grad(expected, list(net.parameters())), seen):
        assert torch.allclose(p, g, atol=1e-6)


def test_an_epoch_and_an_evaluation_read_nothing_back():
    data = digits()
    net = network(data)
    optimizer = AGD(net.parameters(), fused=False)
    train_epoch(net, data.train, mse, optimizer)  # torch's own first-time set-up
    data.train.set_epoch(1)
    with Reads() as reads:
        totals = train_epoch(net, data.train, mse, optimizer)
        tested = evaluate(net, data.test, mse)
    assert reads.count == 0
    assert reads.kernels > 1000
    assert math.isfinite(totals.read()["loss"] + tested.read()["loss"])


def test_the_count_of_reads_can_fail():
    with Reads() as reads:
        x = torch.ones(2)
        x.sum().item()
        float(x[0])
        bool(x[0] > 0)
        x[x > 0]
        x.tolist()
        x.cpu()
    assert reads.count == 6
    x.tolist()
    assert reads.count == 6


def test_totals_weigh_every_example_alike():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(10, 4, generator=generator)
    labels = torch.randint(4, (10,), generator=generator)
    totals = Totals()
    for part in (slice(0, 7), slice(7, 10)):
        outs, ys = outputs[part], labels[part]
        totals.add(mse(outs, ys), outs, ys, eta=torch.ones(()))
    figures = totals.read()
    assert figures["examples"] == 10
    assert figures["loss"] == pytest.approx(mse(outputs, labels).mean().item(), rel=1e-6)
    assert figures["acc"] == (outputs.argmax(1) == labels).sum().item() / 10
    steps = figures["steps"]
    assert steps["loss"][1] == pytest.approx(mse(outputs[7:], labels[7:]).mean().item(), rel=1e-6)
    assert steps["eta"] == [1.0, 1.0]


def test_accuracy_does_not_depend_on_the_test_batch():
    net = network(digits())
    figures = [evaluate(net, digits(test_bs=n).test, mse).read() for n in (1, 7, 128, 1000)]
    assert {f["examples"] for f in figures} == {360}
    assert len({f["acc"] for f in figures}) == 1


def test_a_test_batch_that_does_not_fit_is_halved_until_it_does():
    net, sizes = network(digits()), []
    expected = evaluate(net, digits(test_bs=360).test, mse).read()
    forward = net.forward

    def small(x):
        sizes.append(len(x))
        if len(x) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x)

    net.forward = small
    found = evaluate(net, digits(test_bs=200).test, mse).read()
    assert sizes == [200, 100, 100, 100, 60]
    assert (found["examples"], found["acc"]) == (expected["examples"], expected["acc"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)

    def none(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    net.forward = none
    with pytest.raises(OutOfMemory, match="a single image"):
        evaluate(net, digits(test_bs=200).test, mse)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("GET was unable to find an engine to execute this computation", True),  # cuDNN's
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_what_counts_as_memory_that_runs_out(text, expected):
    assert is_out_of_memory(RuntimeError(text)) == expected


def test_batch_norm_trains_in_training_and_rests_in_evaluation():
    data = digits(test_bs=90)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, bias=False), torch.nn.BatchNorm2d(8, affine=False),
        torch.nn.Flatten(), torch.nn.Linear(288, 10, bias=False),
    )  # fmt: skip
    statistics = net[1].running_mean
    before = statistics.clone()
    train_epoch(net, data.train, mse, AGD(net.parameters()))
    trained = statistics.clone()
    assert not torch.equal(trained, before)
    seen = []
    net.register_forward_hook(lambda net, inputs, outputs: seen.append(outputs))
    figures = evaluate(net, data.test, mse).read()
    assert torch.equal(statistics, trained)
    assert all(outputs.is_inference() for outputs in seen)
    assert evaluate(net, digits(test_bs=7).test, mse).read()["acc"] == figures["acc"]


def test_agd_learns_the_digits():
    data = digits()
    net = network(data)
    optimizer = AGD(net.parameters())
    losses = []
    for epoch in range(1, 9):
        data.train.set_epoch(epoch)
        losses.append(train_epoch(net, data.train, mse, optimizer).read()["loss"])
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.3 * losses[0]
    assert evaluate(net, data.test, mse).read()["acc"] > 0.9


PAIRS = [
    (arch, dataset)
    for dataset in ("digits", "mnist", "cifar10", "cifar100", "imagenet", "folder")
    for arch in ("fcn", "vgg", "resnet18", "resnet50")
]


FAST = [("fcn", "digits"), ("vgg", "cifar10"), ("resnet18", "folder"), ("resnet50", "mnist")]


@pytest.fixture(scope="module")
def every_set(samples, tmp_path_factory):
    """A data directory with all sets: real images, of Tiny-ImageNet in CIFAR-100's place."""
    root = samples("mnist", "cifar10", "tiny100", "imagenet1k-sample", "tiny-imagenet-20")
    out = tmp_path_factory.mktemp("every")
    for name, link in (("cifar10.npz", "cifar10.npz"), ("tiny100.npz", "cifar100.npz"),
                       ("MNIST", "MNIST"), ("tiny-imagenet-20", "folder")):  # fmt: skip
        (out / link).symlink_to(root / name)
    (out / "imagenet").mkdir()
    for split in ("train", "val"):
        (out / "imagenet" / split).symlink_to(root / "imagenet1k-sample" / "train")
    return out


@pytest.mark.parametrize("arch, dataset", [
    pair if pair in FAST else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS
])  # fmt: skip
def test_every_network_trains_two_steps_on_every_set(arch, dataset, every_set):
    name = f"folder:{every_set / 'folder'}" if dataset == "folder" else dataset
    batch = 2 if dataset == "imagenet" else 4
    data = load(name, every_set, batch, batch, CPU, image_size=64 if dataset == "folder" else None)
    torch.manual_seed(0)
    net = build(arch, data.shape, data.classes)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in net.parameters()]
    batches = iter(data.train)
    two = [next(batches), next(batches)]
    figures = train_epoch(net, two, mse, AGD(net.parameters())).read()
    assert figures["examples"] == 2 * batch
    assert np.isfinite(figures["steps"]["loss"] + figures["steps"]["eta"]).all()
    assert min(figures["steps"]["eta"]) > 0
    assert all(not torch.equal(p, b) for p, b in zip(net.parameters(), before))
    tested = evaluate(net, [next(iter(data.test))], mse).read()
    assert tested["examples"] == batch


def test_relative_updates_are_the_mean_over_layers_of_each_step():
    data = digits(train_bs=500)
    nets = [network(data) for _ in range(2)]
    optimizers = [AGD(net.parameters()) for net in nets]
    found = train_epoch(
        nets[0], data.train, mse, optimizers[0], log_updates=True
    ).read()["steps"]["update"]
    plain, expected = nets[1], []

    class Spy(AGD):
        def step(self):
            before = [p.detach().clone() for p in plain.parameters()]
            super().step()
            sizes = [((p - w).norm() / w.norm()).item()
                     for p, w in zip(plain.parameters(), before)]  # fmt: skip
            expected.append(sum(sizes) / len(sizes))

    figures = train_epoch(plain, data.train, mse, Spy(plain.parameters())).read()
    assert len(found) == 3 and found == pytest.approx(expected, rel=1e-5)
    assert figures["steps"]["update"] is None
    for p, q in zip(*(net.parameters() for net in nets)):
        assert torch.equal(p, q)  # to measure changes nothing


def test_updates_of_convolutions_and_baselines_are_measured():
    torch.manual_seed(0)
    net = build("resnet18", (1, 32, 32), 3)
    batch = [(torch.randn(2, 1, 32, 32), torch.tensor([0, 2]))]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    steps = train_epoch(net, batch, mse, optimizer, log_updates=True).read()["steps"]
    assert steps["update"] == [0.0] and steps["eta"] is None


def test_no_update_is_read_back():
    data = digits(train_bs=500)
    net = network(data)
    optimizer = AGD(net.parameters(), fused=False)
    train_epoch(net, data.train, mse, optimizer, log_updates=True)
    with Reads() as reads:
        totals = train_epoch(net, data.train, mse, optimizer, log_updates=True)
    assert reads.count == 0
    assert len(totals.read()["steps"]["update"]) == 3


def test_an_optimiser_with_two_sets_of_weights_trains_with_one_and_answers_with_the_other():
    data = digits()
    net = network(data)
    optimizer = Averaging(net.parameters())
    for _ in range(2):
        train_epoch(net, data.train, mse, optimizer)
    assert optimizer.modes == ["train", "eval"] * 2
    assert optimizer.param_groups[0]["halved"]
