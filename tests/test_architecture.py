"""The networks: the paper's four, by oneDNN and with vectors, the libraries', weights of a file,
frozen parameters; and the flags of main.py that name them."""

import hashlib
import json
import math
import sys

import pytest
import torch
import torch.nn as nn
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import agd
import main as program
from agd import AGD, init_weights
from architecture import NETWORKS, Unfit, build, onednn
from architecture.padding import pad_to_32
from architecture.weights import start
from distributed import RankError, World

SMALL = "torchvision:mobilenet_v3_small"  # which has dropout
SHUFFLE = "torchvision:shufflenet_v2_x0_5"


def drawn(arch, classes=10, shape=(1, 8, 8), seed=0, **options):
    torch.manual_seed(seed)
    return build(arch, shape, classes, depth=3, width=16, **options)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)


# The paper's networks


@pytest.mark.parametrize("arch, shape, classes, weights, tensors", [
    ("fcn", (3, 32, 32), 10, 1_313_280, 10), ("fcn", (1, 28, 28), 10, 727_552, 10),
    ("vgg", (3, 32, 32), 10, 14_715_584, 14), ("vgg", (3, 32, 32), 100, 14_761_664, 14),
    ("resnet18", (3, 32, 32), 10, 11_164_352, 21), ("resnet50", (3, 32, 32), 10, 23_467_712, 54),
    ("resnet18", (3, 224, 224), 1000, 11_678_912, 21),
    ("resnet50", (3, 224, 224), 1000, 25_502_912, 54),
])  # fmt: skip
def test_weights_are_the_papers(arch, shape, classes, weights, tensors):
    with torch.device("meta"):
        parameters = list(build(arch, shape, classes).parameters())
    assert sum(p.numel() for p in parameters) == weights
    assert len(parameters) == tensors and all(p.ndim >= 2 for p in parameters)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 40, 40), (3, 96, 64)])
@pytest.mark.parametrize("arch", NETWORKS)
def test_every_network_takes_every_shape(arch, shape):
    net = build(arch, shape, 7, depth=3, width=32).eval()
    with torch.inference_mode():
        assert net(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("arch", NETWORKS)
def test_biases_and_affine_norms_leave_the_draw_and_the_function(arch):
    plain = drawn(arch).eval()
    both = drawn(arch, bias=True, affine=arch != "fcn").eval()
    assert all(torch.equal(both.get_parameter(n), p) for n, p in plain.named_parameters())
    added = {n: p for n, p in both.named_parameters() if p.ndim == 1}
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert len(added) == len(list(plain.parameters())) + 2 * norms
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(plain(x), both(x), atol=1e-6)
        for p in added.values():
            p += 0.5
        assert not torch.allclose(plain(x), both(x), atol=1e-2)


def test_fcn_by_hand():
    """And orthogonal layers with sqrt(2) relu neither grow nor decay over 30 layers."""
    net = build("fcn", (3, 4, 4), 5, depth=3, width=16)
    x = torch.randn(7, 3, 4, 4)
    first, second, third = [layer.weight for layer in net.layers]
    hidden = (x.flatten(1) @ first.T).relu() * math.sqrt(2)
    hidden = (hidden @ second.T).relu() * math.sqrt(2)
    assert torch.allclose(net(x), hidden @ third.T, atol=1e-6)
    net = build("fcn", (1, 16, 16), 256, depth=30, width=256)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    x = torch.randn(64, 1, 16, 16)
    assert 0.5 < (net(x).norm() / x.norm()).item() < 2


def test_padding_is_even_zeros():
    x = torch.randn(2, 1, 8, 20)
    y = pad_to_32(x)
    assert y.shape == (2, 1, 32, 32) and torch.equal(y[:, :, 12:20, 6:26], x)
    assert y.count_nonzero() == x.count_nonzero() and pad_to_32(y) is y


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


@pytest.mark.parametrize("arch, shape", [("resnet50", (3, 64, 64)), ("resnet18", (3, 64, 64))])
def test_post_activation_matches_torchvision(arch, shape):
    """With the stride in the 3x3 convolution."""
    torchvision = pytest.importorskip("torchvision")
    ours = build(arch, shape, 10).eval()
    # Fresh norms have a gain of 1 and a bias of 0: as ours, which have neither.
    theirs = getattr(torchvision.models, arch)(num_classes=10).eval()
    theirs.fc.bias = None
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    with torch.no_grad():
        for a, b in zip(ours.parameters(), matrices, strict=True):
            b.copy_(a)
        x = torch.randn(2, *shape)
        assert torch.allclose(ours(x), theirs(x), atol=1e-4)


# oneDNN


class Products(TorchDispatchMode):
    """Counts oneDNN's products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_linear_pointwise" in str(func)
        return func(*args, **(kwargs or {}))


def by_onednn_and_mkl(monkeypatch, case):
    """What case() gives by oneDNN and by MKL, after the same draws."""
    state, results = torch.get_rng_state(), []
    for enabled in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        torch.set_rng_state(state)
        results.append(case())
    return results


needs_onednn = pytest.mark.skipif(not onednn.AVAILABLE, reason="its products are MKL's")


@needs_onednn
def test_fcn_by_onednn_trains_as_by_mkl(monkeypatch):
    """20 steps: the gradients to each weight and to the images, and a small last batch."""
    counts = []

    def case():
        net = build("fcn", (3, 16, 16), 10, depth=4, width=128)
        init_weights(net.parameters(), torch.Generator().manual_seed(1))
        optimizer = AGD(net.parameters())
        with Products() as products:
            for step in range(20):
                images = torch.randn(20 if step == 19 else 40, 3, 16, 16, requires_grad=True)
                optimizer.zero_grad()
                (net(images)[:, 0] - 1).square().mean().backward()
                optimizer.step()
        counts.append(products.count)
        return [images.grad, *[p.detach() for p in net.parameters()]]

    errors = [((a - b).norm() / b.norm()).item()
              for a, b in zip(*by_onednn_and_mkl(monkeypatch, case))]  # fmt: skip
    assert max(errors) < 1e-5
    assert counts == [20 * 3 * 3, 0]  # forward, to the input, to the weight
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    net, seen = build("fcn", (3, 16, 16), 10, depth=4, width=128), []
    net.layers[1].register_forward_hook(lambda *x: seen.append(x))
    with Products() as products:  # what it does not take: no images, a layer that somebody watches
        assert net(torch.empty(0, 3, 16, 16)).shape == (0, 10)
        net(torch.randn(20, 3, 16, 16))
    assert len(seen) == 2 and products.count == 0


@needs_onednn
@pytest.mark.parametrize("case", [
    *[(frozen, to_images, bad) for frozen in ([], [0], [1], [0, 1, 2]) for to_images in (0, 1)
      for bad in ("", "images", "weight", "gradient")],
    "second", "checkpointed", "transformed", "hooked", "biased"], ids=str)  # fmt: skip
def test_fcn_by_onednn_is_as_flexible(monkeypatch, case):
    """It has the gradients that are asked for, keeps what is not finite in its places, and takes
    second derivatives, checkpoints, function transforms, biases, hooks of every kind."""
    net = build("fcn", (3, 8, 8), 10, depth=4, width=64)
    images = torch.randn(32, 3, 8, 8, requires_grad=True)
    frozen, to_images, bad = case if isinstance(case, tuple) else ([], 1, "")
    for i in frozen:
        net.layers[i].weight.requires_grad_(False)
    if bad == "images":
        images.data[3, 0, 0, 0], images.data[5, 1] = math.nan, math.inf
    if bad == "weight":
        net.layers[1].weight.data[7] = math.nan
    if case == "biased":
        net.layers[1] = nn.Linear(64, 64)
    images.requires_grad_(bool(to_images))

    def results():
        if case == "second":
            square = net(images).square().sum()
            first = torch.autograd.grad(square, [*net.parameters(), images], create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in first), net.parameters())
        if case == "checkpointed":
            outputs = torch.utils.checkpoint.checkpoint(net, images, use_reentrant=False)
            return torch.autograd.grad(outputs.square().sum(), net.parameters())
        if case == "transformed":
            return [torch.func.vmap(net)(images.detach().unflatten(0, (2, 16))),
                    torch.func.grad(lambda x: net(x).sum())(images.detach())]  # fmt: skip
        if case == "hooked":
            seen, module = [], nn.modules.module
            handles = [net.layers[0].register_forward_pre_hook(lambda *x: seen.append(x)),
                       module.register_module_forward_hook(lambda *x: seen.append(x))]  # fmt: skip
            net(images)
            for handle in handles:
                handle.remove()
            assert len(seen) > 4  # one layer's, and every module's
        net.zero_grad()
        images.grad, outputs = None, net(images)
        outputs.backward(torch.full_like(outputs, math.inf if bad == "gradient" else 1.0))
        return [outputs, *[p.grad for p in (*net.parameters(), images)]]

    ours, theirs = by_onednn_and_mkl(monkeypatch, results)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a.isfinite(), b.isfinite())
            a, b = (torch.where(b.isfinite(), x, 0) for x in (a, b))
            assert (a - b).norm() <= 1e-4 * b.norm()
    if isinstance(case, tuple):
        assert (ours[-1] is None) != to_images
        assert (not bad) is all(x is None or x.isfinite().all() for x in ours)


# Libraries


def test_grey_images_are_repeated():
    grey, colours = drawn(SHUFFLE).eval(), drawn(SHUFFLE, shape=(3, 8, 8)).eval()
    assert same(grey.state_dict(), colours.state_dict())
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(grey(x), colours(x.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("arch, shape", [
    (SHUFFLE, (3, 32, 32)), ("timm:resnet18", (1, 8, 8)),
    ("timm:vit_tiny_patch16_224", (3, 32, 32)),
    *[pytest.param(*x, marks=pytest.mark.slow) for x in (
        ("torchvision:googlenet", (3, 32, 32)), ("torchvision:vit_b_32", (1, 64, 64)))],
])  # fmt: skip
def test_classes_channels_and_sides_are_adapted(arch, shape):
    """And the trial by two images leaves the network in training, its buffers as they were."""
    pytest.importorskip(arch.split(":")[0])
    net = drawn(arch, 7, shape)
    assert net.training and all(x == 0 for n, x in net.named_buffers() if n.endswith("tracked"))
    assert net(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("arch, shape, words", [
    ("torchvision:alexnet", (3, 32, 32), ["images of 32×32", "a side of 64 would do"]),
    ("torchvision:vit_b_16", (1, 28, 28), ["images of 28×28", "patch size"]),
    ("torchvision:vit_b_16", (3, 32, 64), ["square images"]),
    ("torchvision:resnet18", (2, 32, 32), ["1 or 3 channels, not 2"]),
    ("timm:inception_v3", (3, 32, 32), ["images of 32×32", "a side of 80 would do"]),
    pytest.param("torchvision:inception_v3", (3, 64, 64),
                 ["images of 64×64", "a side of 80 would do"], marks=pytest.mark.slow),
])  # fmt: skip
def test_images_that_do_not_fit_are_refused_in_a_sentence(arch, shape, words):
    pytest.importorskip(arch.split(":")[0])
    with pytest.raises(Unfit) as error:
        build(arch, shape, 10)
    assert all(word in str(error.value) for word in [arch, *words])
    assert len(str(error.value).splitlines()) == 1


def test_batch_norms_that_do_more_are_not_exchanged():
    """Which would lose their activation, without a word."""
    pytest.importorskip("timm")
    net = drawn("timm:efficientnet_lite0", shape=(3, 32, 32))
    with pytest.raises(RankError, match="--sync_bn does not know .* BatchNormAct2d"):
        World(torch.device("cpu"), size=2).wrap(net, sync_bn=True)


# Weights of a file


def test_weights_are_those_whose_shape_fits(tmp_path):
    """A head for other classes stays as it was drawn; what does not fit is named."""
    source, net = drawn(SHUFFLE, 5, seed=1), drawn(SHUFFLE, 10)
    head = net.fc.weight.clone()
    torch.save({"state_dict": {f"module.{k}": x for k, x in source.state_dict().items()}},
               tmp_path / "w.pth")  # fmt: skip
    first, other = start(net, tmp_path / "w.pth")
    theirs, own = source.state_dict(), net.state_dict()
    assert first.startswith(f"{len(own) - 2} of {len(own)} tensors")
    assert "another shape" in other and other.endswith("fc.weight, fc.bias")
    assert torch.equal(net.fc.weight, head)
    assert all(torch.equal(own[key], theirs[key]) for key in own if not key.startswith("fc."))
    net = drawn("fcn")
    torch.save({"layers.1.weight": net.layers[1].weight.detach() + 1, "old": torch.ones(1)},
               tmp_path / "w.pt")  # fmt: skip
    _, missing, unexpected = start(net, tmp_path / "w.pt")
    assert missing.endswith("layers.0.weight, layers.2.weight") and unexpected.endswith(": old")


def test_safetensors(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    with monkeypatch.context() as patch, pytest.raises(Unfit, match="pip install safetensors"):
        patch.setitem(sys.modules, "safetensors.torch", None)
        start(drawn("fcn"), path)
    source, net = drawn("fcn", seed=1), drawn("fcn")
    pytest.importorskip("safetensors.torch").save_file(source.state_dict(), path)
    assert start(net, path)[0].startswith("3 of 3 tensors")
    assert same(net.state_dict(), source.state_dict())


@pytest.mark.parametrize("content, words", [
    ({"conv.weight": torch.ones(2, 2)}, "nothing in .* fits the network: it has conv.weight"),
    ({"layers.0.weight": torch.full((16, 64), torch.nan)}, "not finite in layers.0.weight"),
    ([1, 2], "holds no weights by name"), ({"epoch": 3}, "holds no weights by name"),
    (nn.Linear(1, 1), "other things than weights"), (b"no archive", "w.pt"),
])  # fmt: skip
def test_files_without_weights_are_refused(content, words, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / "w.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "w.pt")
    with pytest.raises(Unfit, match=words) as error:
        start(drawn("fcn"), tmp_path / "w.pt")
    assert len(str(error.value).splitlines()) == 1


def test_frozen_names_are_patterns():
    net = drawn(SHUFFLE)
    start(net, frozen="conv1.*,stage?.0.*.weight")
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert {"conv1.0.weight", "conv1.1.bias", "stage2.0.branch1.0.weight"} <= set(frozen)
    assert not any(x.startswith("fc") or ".1.branch" in x for x in frozen)
    assert "stage2.0.branch1.1.bias" not in frozen
    with pytest.raises(Unfit, match="layers.0.wieght matches none of .*mean layers.0.weight"):
        start(drawn("fcn"), frozen="layers.0.wieght")
    with pytest.raises(Unfit, match="leaves no parameter to train"):
        start(drawn("fcn"), frozen="*")


# Runs

DIGITS = ["--dataset", "digits", "--train_examples", 24, "--test_examples", 8, "--train_bs", 8,
          "--epochs", 1, "--cpu"]  # fmt: skip


def call(*flags, out):
    small = () if "--arch" in flags else ("--depth", 3, "--width", 16)
    return program.main([*map(str, [*DIGITS, *small, *flags, "--out", out])])


def rows(out):
    (log,) = (out / "logs").glob("*.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()]


def weights(out):
    (path,) = (out / "checkpoints").glob("*.pt")
    return torch.load(path, weights_only=True)["net"]


@pytest.mark.parametrize("flags, words, settings, default", [
    ([], "fcn3x16-digits-train24-test8-mse-bs8-agd-seed0", {}, ["--layers", "count"]),
    (["--bias", "--layers", "paths"], "-bias-", {"bias": True, "layers": "paths"}, []),
    pytest.param(["--arch", "resnet18", "--bias", "--affine"], "resnet18-bias-affine-digits-",
                 {"bias": True, "affine": True}, [], marks=pytest.mark.slow),
    (["--arch", SHUFFLE], "torchvision_shufflenet_v2_x0_5-digits-", {"arch": SHUFFLE},
     ["--layers", "paths"]),
    (["--arch", SHUFFLE, "--layers", "count"], "-agd-count-seed0", {"layers": "count"}, []),
    (["--freeze", "layers.0.*", "--freeze", "layers.2.*,layers.0.*", "--log_updates", "--bias"],
     "-freeze_layers.0._layers.2-", {"freeze": "layers.0.*,layers.2.*"}, []),
    (["--arch", "timm:resnet18"], "timm_resnet18-", {"arch": "timm:resnet18"}, []),
    (["--bias", "--optimizer", "spectral"], "-spectral-", {"bias": True}, []),
    (["--arch", SHUFFLE, "--optimizer", "spectral"], "-spectral-", {}, []),
])  # fmt: skip
def test_a_run_of_any_network(flags, words, settings, default, tmp_path):
    """Name and settings have the flags that shape the run, except defaults; all vectors train."""
    if "timm:resnet18" in flags:
        pytest.importorskip("timm")
    assert call(*flags, out=tmp_path) == 0
    assert call(*flags, *default, out=tmp_path) == 0  # the same run, which has finished
    first, epoch, end = rows(tmp_path)
    (log,) = (tmp_path / "logs").glob("*.jsonl")
    assert words in f"{log.stem}-" and ":" not in log.stem
    keys = {"bias", "affine", "layers", "weights", "freeze"}
    own = first["settings"]
    assert {key: own[key] for key in settings} == settings
    assert keys & own.keys() == keys & settings.keys() or "freeze" in settings
    assert end["stopped"] is None and end["skipped_steps"] == 0 and 0 < epoch["eta_min"]
    paths = "spectral" in flags or "paths" in flags or "arch" in settings
    assert ("paths" in first) == paths
    if "--log_updates" in flags:  # of weights that train
        assert 0 < epoch["update_min"] <= epoch["update_max"] < 1
    moved = [x for key, x in weights(tmp_path).items() if key.endswith(".bias")]
    assert "freeze" in settings or all(x.abs().max() > 0 for x in moved)


@pytest.mark.parametrize("flags, words", [
    (["--affine"], "the fcn has none"),
    (["--arch", SHUFFLE, "--bias"], "has biases of its own"),
    (["--arch", SHUFFLE, "--affine"], "has norms of its own"),
    (["--layers", "paths", "--optimizer", "adam"], "--layers is AGD's"),
    (["--layers", "path"], "did you mean paths?"),
    (["--arch", "torchvision:resnet19"], "did you mean resnet18?"),
    (["--arch", "torchvision:"], "no 'torchvision:' among"),
    (["--arch", "torchvison:resnet18"], "did you mean torchvision:NAME?"),
    (["--arch", "timm:resnett18"], "did you mean resnet18?"),
    (["--arch", "timm:resnet18.a1_in1j"], "did you mean resnet18"),
    (["--weights", "nowhere.pt"], "there is no file nowhere.pt"),
    (["--weights", "weights.onnx"], "is none of .safetensors, .pt, .pth, .bin"),
    (["--weights", "docs"], "of a model in a folder give model.safetensors, and save one in"),
    (["--weights", "model.safetensors.index.json"], "shards as one file (max_shard_size)"),
])  # fmt: skip
def test_contradictions_and_typos_are_refused_in_a_sentence(flags, words, tmp_path, capsys):
    if "timm:" in flags[-1]:
        pytest.importorskip("timm")
    with pytest.raises(SystemExit) as exit:
        call(*flags, out=tmp_path)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and words in message and len(message.splitlines()) == 2


def test_what_cannot_be_trained_is_said_before(tmp_path, capsys, monkeypatch):
    """A missing package too; a single image left over, of which batch norm has no deviation."""
    for flags, code, words in (
        (["--arch", "torchvision:alexnet"], 2, "images of 8×8 (a side of 64 would do)"),
        (["--arch", "torchvision:alexnet", "--check"], 1, "a side of 64 would do"),
        (["--freeze", "layers.*"], 2, "leaves no parameter to train"),
    ):  # fmt: skip
        assert call(*flags, out=tmp_path) == code
        assert words in "".join(capsys.readouterr())
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SystemExit):
        call("--arch", "timm:resnet18", out=tmp_path)
    assert "needs the package timm" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
    assert call("--arch", SHUFFLE, "--train_examples", 9, out=tmp_path) == 1
    assert "more than one image at a time" in "".join(capsys.readouterr())


@pytest.mark.parametrize("flags, words", [
    (["--arch", "resnet18", "--bias", "--affine"], "11,174,794 weights in 21 layers"),
    (["--arch", SMALL, "--freeze", "features.*"], "agd takes them"),
])  # fmt: skip
@pytest.mark.slow
def test_the_check_knows_these_networks(flags, words, tmp_path, capsys):
    assert call(*flags, "--check", out=tmp_path) == 0
    text = capsys.readouterr().out
    assert words in text and "fault" not in text.replace("No fault", "")


@pytest.mark.parametrize("rule", ["agd", pytest.param("spectral", marks=pytest.mark.slow)])
def test_a_network_that_draws_goes_on_bit_for_bit(rule, tmp_path):
    """Dropout is a function of the seed and the step, not of what was drawn before; in the batches
    from which batch norm takes its statistics anew, too."""
    whole, parts, flags = tmp_path / "whole", tmp_path / "parts", ["--arch", SMALL]
    flags += ["--optimizer", rule]
    assert call(*flags, "--epochs", 2, out=whole) == 0
    for epochs in (1, 2):
        torch.rand(epochs)
        assert call(*flags, "--epochs", epochs, out=parts) == 0
    assert same(weights(parts), weights(whole))
    assert [x.get("train_loss") for x in rows(parts)] == [x.get("train_loss") for x in rows(whole)]
    assert rows(whole)[0]["paths"] > 1


@pytest.mark.parametrize("rule", ["agd", pytest.param("spectral", marks=pytest.mark.slow)])
def test_a_run_from_weights_with_frozen_ones(rule, tmp_path, capsys):
    """It resumes and is replayed, to the bit, with the same weights alone."""
    path, out = tmp_path / "five.pt", tmp_path / "out"
    torch.save(drawn(SHUFFLE, 5, seed=1).state_dict(), path)
    flags = ["--arch", SHUFFLE, "--optimizer", rule, "--weights", path]
    flags += ["--freeze", "conv1.*,stage*", "--epochs"]
    assert call(*flags, 1, out=out) == 0
    text = capsys.readouterr().out
    assert "drawn anew: fc.weight, fc.bias" in text and "(24, 3, 3, 3)  frozen" in text
    then, now, first = torch.load(path), weights(out), rows(out)[0]
    frozen = {key: p for key, p in drawn(SHUFFLE).named_parameters()
              if key.startswith(("conv1.", "stage"))}  # fmt: skip
    assert all(torch.equal(now[key], then[key]) for key in frozen)
    assert not torch.equal(now["conv5.0.weight"], then["conv5.0.weight"])
    assert first["settings"]["weights"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert first["frozen_weights"] == sum(p.numel() for p in frozen.values())
    (record,) = (out / "logs").glob("*.run.json")
    assert json.loads(record.read_text())["settings"]["weights"] == first["settings"]["weights"]
    replay = ["--replay", str(record), "--out", str(tmp_path / "replayed")]
    assert program.main(replay) == 0 and "The same bits" in capsys.readouterr().out
    assert call(*flags, 2, out=out) == 0
    torch.save(drawn(SHUFFLE, 5, seed=2).state_dict(), path)
    capsys.readouterr()
    assert call(*flags, 3, out=out) == 2
    assert "another run of this name (weights" in capsys.readouterr().err
    assert program.main(replay) == 2
    text = capsys.readouterr()
    assert "weights" in text.out and "other inputs" in text.err


@pytest.mark.slow
def test_ranks_train_a_frozen_network_as_one_process(run_main, tmp_path):
    """L is that of the network, and the ranks' first pass is not."""
    flags = [*DIGITS, "--arch", "torchvision:resnet18", "--freeze", "layer[123].*"]
    flags += ["--train_bs", 12, "--gain", 0.01]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = run_main(*flags, "--distribute", out=tmp_path / "two", launcher=torchrun,
                   env={"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert program.main([*map(str, flags), "--out", str(tmp_path / "one")]) == 0
    one, others = rows(tmp_path / "one"), rows(tmp_path / "two")
    net = drawn("torchvision:resnet18")
    start(net, frozen="layer[123].*")
    paths = sum(agd.depth(net, torch.zeros(2, 1, 8, 8)).values())
    assert one[0]["paths"] == others[0]["paths"] == pytest.approx(paths) and paths < 10
    # Up to batch norm, whose statistics are each rank's own.
    assert others[1]["train_loss"] == pytest.approx(one[1]["train_loss"], rel=0.2)
    before, now = drawn("torchvision:resnet18").state_dict(), weights(tmp_path / "two")
    assert torch.equal(now["layer1.0.conv1.weight"], before["layer1.0.conv1.weight"])
    assert not torch.equal(now["fc.weight"], before["fc.weight"])
