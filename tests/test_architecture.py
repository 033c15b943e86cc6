import math

import pytest
import torch
import torch.nn as nn
import torch.utils.checkpoint

from agd import AGD, init_weights
from architecture import NETWORKS, build, fcn
from architecture.padding import pad_to_32


@pytest.mark.parametrize(
    "arch, shape, classes, weights, tensors",
    [
        ("fcn", (3, 32, 32), 10, 1_313_280, 10),
        ("fcn", (1, 28, 28), 10, 727_552, 10),
        ("vgg", (3, 32, 32), 10, 14_715_584, 14),
        ("vgg", (3, 32, 32), 100, 14_761_664, 14),
        ("resnet18", (3, 32, 32), 10, 11_164_352, 21),
        ("resnet50", (3, 32, 32), 10, 23_467_712, 54),
        ("resnet50", (3, 224, 224), 1000, 25_502_912, 54),
        ("resnet18", (3, 224, 224), 1000, 11_678_912, 21),
    ],
)
def test_weights_are_the_papers(arch, shape, classes, weights, tensors):
    with torch.device("meta"):
        parameters = list(build(arch, shape, classes).parameters())
    assert sum(p.numel() for p in parameters) == weights
    assert len(parameters) == tensors
    assert all(p.ndim >= 2 for p in parameters)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 40, 40), (3, 96, 64)])
@pytest.mark.parametrize("arch", NETWORKS)
def test_every_network_takes_every_shape(arch, shape):
    net = build(arch, shape, 7, depth=3, width=32).eval()
    with torch.inference_mode():
        assert net(torch.randn(2, *shape)).shape == (2, 7)


def test_fcn_keeps_the_size_of_activations():
    """Orthogonal layers and sqrt(2) relu: no growth and no decay over 30 layers."""
    net = build("fcn", (1, 16, 16), 256, depth=30, width=256)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    x = torch.randn(64, 1, 16, 16)
    assert 0.5 < (net(x).norm() / x.norm()).item() < 2


def test_fcn_by_hand():
    net = build("fcn", (3, 4, 4), 5, depth=3, width=16)
    x = torch.randn(7, 3, 4, 4)
    first, second, third = [layer.weight for layer in net.layers]
    hidden = (x.flatten(1) @ first.T).relu() * math.sqrt(2)
    hidden = (hidden @ second.T).relu() * math.sqrt(2)
    assert torch.allclose(net(x), hidden @ third.T, atol=1e-6)


def test_padding_is_even_zeros():
    x = torch.randn(2, 1, 8, 20)
    y = pad_to_32(x)
    assert y.shape == (2, 1, 32, 32)
    assert torch.equal(y[:, :, 12:20, 6:26], x)
    assert y.count_nonzero() == x.count_nonzero()
    assert pad_to_32(y) is y


def test_pre_activation_block_by_hand():
    net = build("resnet18", (3, 32, 32), 10).eval()
    block = net.blocks[2]  # the first with a projection
    x = torch.randn(2, 64, 8, 8)
    relu, bn = nn.functional.relu, nn.functional.batch_norm
    stats = [(n.running_mean, n.running_var) for n in block.norms]
    y = relu(bn(x, *stats[0]))
    hidden = relu(bn(block.convs[0](y), *stats[1]))
    expected = block.convs[1](hidden) + block.project(y)
    assert torch.allclose(block(x), expected, atol=1e-5)
    assert block.convs[0].stride == block.project.stride == (2, 2)
    # nothing but a mean stands between the last block and the linear layer
    images = torch.randn(2, 3, 32, 32)
    features = net.blocks(net.stem(images)).mean((2, 3))
    assert torch.allclose(net(images), net.linear(features), atol=1e-4)


def test_resnet50_of_large_images_strides_in_the_3x3():
    net = build("resnet50", (3, 224, 224), 10)
    strided = [b for b in net.blocks if b.convs[1].stride == (2, 2)]
    assert len(strided) == 3
    assert all(b.convs[0].stride == (1, 1) for b in net.blocks)


@pytest.mark.parametrize("arch, shape", [("resnet50", (3, 64, 64)), ("resnet18", (3, 64, 64))])
def test_post_activation_matches_torchvision(arch, shape):
    torchvision = pytest.importorskip("torchvision")
    ours = build(arch, shape, 10).eval()
    # Fresh norms have a gain of 1 and a bias of 0: as ours, which have neither.
    theirs = getattr(torchvision.models, arch)(num_classes=10).eval()
    theirs.fc.bias = None
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    with torch.no_grad():
        for a, b in zip(ours.parameters(), matrices, strict=True):
            assert a.shape == b.shape
            b.copy_(a)
        x = torch.randn(2, *shape)
        assert torch.allclose(ours(x), theirs(x), atol=1e-4)


@pytest.mark.skipif(not fcn.ONEDNN, reason="this processor's products are MKL's")
def test_fcn_by_onednn_trains_as_by_mkl(monkeypatch):
    """20 steps: the gradients to each weight and to the images, and a small last batch."""
    nets, products = [], []
    product = fcn.product
    monkeypatch.setattr(fcn, "product", lambda *x: products.append(x) or product(*x))
    for onednn in (True, False):
        monkeypatch.setattr(fcn, "ONEDNN", onednn)
        torch.manual_seed(0)
        net = build("fcn", (3, 16, 16), 10, depth=4, width=128)
        init_weights(net.parameters(), torch.Generator().manual_seed(1))
        optimizer = AGD(net.parameters())
        for step in range(20):
            images = torch.randn(20 if step == 19 else 40, 3, 16, 16, requires_grad=True)
            optimizer.zero_grad()
            (net(images)[:, 0] - 1).square().mean().backward()
            optimizer.step()
        nets.append((images.grad, *[p.detach() for p in net.parameters()]))
        assert len(products) == 20 * 3 * 3  # forward, to the input, to the weight
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(*nets)]
    assert 0 < max(errors) < 1e-5
    # what oneDNN does not take: no images, a layer that somebody watches
    monkeypatch.setattr(fcn, "ONEDNN", True)
    empty = net(torch.empty(0, 3, 16, 16))
    empty.sum().backward()
    seen = []
    net.layers[1].register_forward_hook(lambda *x: seen.append(x))
    net(torch.randn(20, 3, 16, 16))
    assert empty.shape == (0, 10) and len(seen) == 1 and len(products) == 180


@pytest.mark.skipif(not fcn.ONEDNN, reason="this processor's products are MKL's")
@pytest.mark.parametrize("frozen", [[], [0], [1], [2], [0, 1, 2]])
@pytest.mark.parametrize("to_images", [False, True])
def test_fcn_by_onednn_gives_the_gradients_that_are_asked_for(monkeypatch, frozen, to_images):
    net = build("fcn", (3, 8, 8), 10, depth=4, width=64)
    for i in frozen:
        net.layers[i].weight.requires_grad_(False)
    images, found = torch.randn(32, 3, 8, 8, requires_grad=to_images), []
    for onednn in (True, False):
        monkeypatch.setattr(fcn, "ONEDNN", onednn)
        net.zero_grad()
        images.grad = None
        net(images).square().mean().backward()
        found.append([p.grad for p in (*net.parameters(), images)])
    for a, b in zip(*found):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() < 1e-5 * b.norm()
    assert found[0][-1] is None or to_images


@pytest.mark.skipif(not fcn.ONEDNN, reason="this processor's products are MKL's")
def test_fcn_by_onednn_keeps_what_is_not_finite(monkeypatch):
    """In the images, the weights and the gradient, in the same places as by MKL."""
    for where in ("images", "weight", "none"):
        torch.manual_seed(0)
        net = build("fcn", (3, 8, 8), 10, depth=4, width=64)
        images = torch.randn(32, 3, 8, 8)
        with torch.no_grad():
            if where == "images":
                images[3, 0, 0, 0], images[5, 1] = math.nan, math.inf
            if where == "weight":
                net.layers[1].weight[7] = math.nan
        found = []
        for onednn in (True, False):
            monkeypatch.setattr(fcn, "ONEDNN", onednn)
            net.zero_grad()
            outputs = net(images)
            outputs.backward(torch.full_like(outputs, math.inf if where == "none" else 1.0))
            found.append([outputs, *[p.grad for p in net.parameters()]])
        for a, b in zip(*found):
            assert torch.equal(a.isfinite(), b.isfinite()), where
        assert not all(x.isfinite().all() for x in found[0])


@pytest.mark.skipif(not fcn.ONEDNN, reason="this processor's products are MKL's")
def test_fcn_by_onednn_is_as_flexible(monkeypatch):
    """Second derivatives, checkpoints, function transforms, biases, hooks of every kind."""
    torch.manual_seed(0)
    net = build("fcn", (3, 8, 8), 10, depth=4, width=64)
    images = torch.randn(32, 3, 8, 8, requires_grad=True)
    seen = []

    def second():
        first = torch.autograd.grad(
            net(images).square().sum(), [*net.parameters(), images], create_graph=True
        )
        return torch.autograd.grad(sum(x.square().sum() for x in first), net.parameters())

    def checkpointed():
        outputs = torch.utils.checkpoint.checkpoint(net, images, use_reentrant=False)
        return torch.autograd.grad(outputs.square().sum(), net.parameters())

    def transformed():
        return [
            torch.func.vmap(net)(images.detach().unflatten(0, (2, 16))),
            torch.func.grad(lambda x: net(x).sum())(images.detach()),
        ]

    def hooked():
        handles = [
            net.layers[0].register_forward_pre_hook(lambda *x: seen.append(x)),
            nn.modules.module.register_module_forward_hook(lambda *x: seen.append(x)),
        ]
        net(images).sum().backward()
        for handle in handles:
            handle.remove()
        assert len(seen) > 4  # one layer's, and every module's
        return [torch.tensor(float(len(seen)))]

    def biased():
        net.layers[1] = nn.Linear(64, 64)
        return [net(images)]

    for case in (second, checkpointed, transformed, hooked, biased):
        found = []
        for onednn in (True, False):
            seen.clear()
            state = torch.get_rng_state()
            monkeypatch.setattr(fcn, "ONEDNN", onednn)
            found.append(case())
            torch.set_rng_state(state)
        for a, b in zip(*found, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm(), case
