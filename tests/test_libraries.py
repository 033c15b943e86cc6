"""Any network: biases and norms of the paper's four, the classifiers of libraries, weights of a
file, frozen parameters."""

import hashlib
import json
import sys

import pytest
import torch

import agd
import main as program
from architecture import NETWORKS, Unfit, build, libraries
from architecture.weights import freeze, load_weights, start
from distributed import RankError, World
from runs.name import name_and_settings
from tests.test_distributed import TORCHRUN
from training.step import Step

DIGITS = ["--dataset", "digits", "--train_examples", 24, "--test_examples", 8, "--train_bs", 8,
          "--epochs", 1, "--cpu"]  # fmt: skip
SMALL = "torchvision:mobilenet_v3_small"  # which has dropout
SHUFFLE = "torchvision:shufflenet_v2_x0_5"
pytest.importorskip("torchvision")


def parse(*flags, check=True):
    return flags.parse([*map(str, flags), "--cpu"], check=check)


def name_of(*flags):
    return name_and_settings(vars(parse(*flags)))[0]


def call(*flags, out):
    return program.main([*map(str, [*DIGITS, *flags, "--out", out])])


def refused(capsys, *flags):
    """What is said of a command line that is not taken."""
    with pytest.raises(SystemExit) as exit:
        parse(*flags)
    assert exit.value.code == 2
    return capsys.readouterr().err


def rows(out):
    (log,) = (out / "logs").glob("*.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()]


def weights(out):
    (path,) = (out / "checkpoints").glob("*.pt")
    return torch.load(path, weights_only=True)["net"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)


def drawn(arch, classes=10, shape=(1, 8, 8), seed=0, **options):
    torch.manual_seed(seed)
    return build(arch, shape, classes, depth=3, width=16, **options)


# Flags and names


def test_a_run_without_these_flags_is_named_set_and_logged_as_before():
    args = parse()
    name, settings = name_and_settings(vars(args))
    assert name == "fcn10x256-cifar10-mse-bs128-agd-seed0"
    assert sorted(settings) == [
        "arch", "dataset", "depth", "gain", "image_size", "loss", "lr", "optimizer", "seed",
        "skip_bad_images", "test_examples", "train_bs", "train_examples", "width",
    ]  # fmt: skip
    for key in ("bias", "affine", "layers", "weights", "freeze"):
        assert getattr(args, key) is None  # which a record takes for what it does not have


@pytest.mark.parametrize("flags, words, settings", [
    (["--bias"], "fcn10x256-bias-cifar10-", {"bias": True}),
    (["--arch", "vgg", "--bias", "--affine"], "vgg-bias-affine-cifar10-",
     {"bias": True, "affine": True}),
    (["--layers", "paths"], "-agd-paths-seed0", {"layers": "paths"}),
    (["--arch", SHUFFLE, "--layers", "count"], "-agd-count-seed0", {"layers": "count"}),
    (["--arch", SHUFFLE], "torchvision_shufflenet_v2_x0_5-cifar10-", {"arch": SHUFFLE}),
    (["--freeze", "layers.0.weight"], "-freeze_layers.0.weight-", {"freeze": "layers.0.weight"}),
    (["--freeze", "a", "--freeze", "b,a"], "-freeze_a_b-", {"freeze": "a,b"}),
])  # fmt: skip
def test_what_shapes_a_run_is_in_its_name_and_settings(flags, words, settings):
    name, found = name_and_settings(vars(parse(*flags)))
    assert words in f"{name}-" and ":" not in name
    assert {key: found[key] for key in settings} == settings


def test_a_default_that_is_given_has_the_same_name():
    assert name_of("--layers", "count") == name_of()
    assert name_of("--arch", SHUFFLE, "--layers", "paths") == name_of("--arch", SHUFFLE)


@pytest.mark.parametrize("flags, words", [
    (["--affine"], "the fcn has none"),
    (["--arch", SHUFFLE, "--bias"], "has biases of its own"),
    (["--arch", SHUFFLE, "--affine"], "has norms of its own"),
    (["--layers", "paths", "--optimizer", "adam"], "--layers is AGD's"),
    (["--layers", "path"], "did you mean paths?"),
    (["--arch", "torchvision:resnet19"], "did you mean resnet18?"),
    (["--arch", "torchvision:"], "no 'torchvision:' among"),
    (["--arch", "torchvison:resnet18"], "did you mean torchvision:?"),
    (["--weights", "nowhere.pt"], "there is no file nowhere.pt"),
    (["--weights", "weights.onnx"], "is none of .safetensors, .pt, .pth"),
])  # fmt: skip
def test_contradictions_and_typos_are_refused_in_a_sentence(flags, words, capsys):
    said = refused(capsys, *flags)
    assert words in said and len(said.splitlines()) == 2


def test_a_library_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "needs the package timm" in refused(capsys, "--arch", "timm:resnet18")
    assert parse("--arch", "timm:resnet18", check=False).arch == "timm:resnet18"


def test_timm_suggests_what_was_meant(capsys):
    pytest.importorskip("timm")
    assert "did you mean resnet18?" in refused(capsys, "--arch", "timm:resnett18")
    assert "did you mean resnet18" in refused(capsys, "--arch", "timm:resnet18.a1_in1j")
    assert parse("--arch", "timm:resnet18.a1_in1k").arch == "timm:resnet18.a1_in1k"


# Networks


@pytest.mark.parametrize("arch", NETWORKS)
def test_biases_and_affine_norms_leave_the_draw_and_the_function(arch):
    plain = drawn(arch).eval()
    both = drawn(arch, bias=True, affine=arch != "fcn").eval()
    assert all(torch.equal(both.get_parameter(n), p) for n, p in plain.named_parameters())
    added = {n: p for n, p in both.named_parameters() if p.ndim == 1}
    layers = sum(p.ndim > 1 for p in plain.parameters())
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in plain.modules())
    assert len(added) == layers + 2 * norms
    assert all(p.ndim > 1 for p in plain.parameters())
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(plain(x), both(x), atol=1e-6)
        for p in added.values():
            p += 0.5
        assert not torch.allclose(plain(x), both(x), atol=1e-2)


def test_grey_images_are_repeated():
    grey, colours = drawn(SHUFFLE).eval(), drawn(SHUFFLE, shape=(3, 8, 8)).eval()
    assert same(grey.state_dict(), colours.state_dict())
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(grey(x), colours(x.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("arch, shape", [
    ("torchvision:googlenet", (3, 32, 32)), ("torchvision:vit_b_32", (1, 64, 64)),
    ("timm:resnet18", (1, 8, 8)), ("timm:vit_tiny_patch16_224", (3, 32, 32)),
])  # fmt: skip
def test_classes_channels_and_sides_are_adapted(arch, shape):
    pytest.importorskip(arch.split(":")[0])
    net = drawn(arch, 7, shape).train()
    assert net(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("arch, shape, words", [
    ("torchvision:alexnet", (3, 32, 32), ["images of 32×32", "a side of 64 would do"]),
    ("torchvision:inception_v3", (3, 64, 64), ["images of 64×64", "a side of 80 would do"]),
    ("torchvision:vit_b_16", (1, 28, 28), ["images of 28×28", "patch size"]),
    ("torchvision:vit_b_16", (3, 32, 64), ["square images"]),
    ("torchvision:resnet18", (2, 32, 32), ["1 or 3 channels, not 2"]),
    ("timm:inception_v3", (3, 32, 32), ["images of 32×32", "a side of 80 would do"]),
])  # fmt: skip
def test_images_that_do_not_fit_are_refused_in_a_sentence(arch, shape, words):
    pytest.importorskip(arch.split(":")[0])
    with pytest.raises(Unfit) as error:
        build(arch, shape, 10)
    assert all(word in str(error.value) for word in [arch, *words])
    assert len(str(error.value).splitlines()) == 1


def test_a_trial_leaves_the_network_as_it_was():
    net = drawn("torchvision:resnet18")
    before = {key: x.clone() for key, x in net.state_dict().items()}
    net.train()
    assert libraries.refusal(net, (1, 8, 8), 10) is None
    assert net.training and same(net.state_dict(), before)
    assert "not (2, 9)" in str(libraries.refusal(net, (1, 8, 8), 9))


# Weights of a file


def test_a_head_of_another_size_stays_as_it_was_drawn(tmp_path):
    source, net = drawn(SHUFFLE, 5, seed=1), drawn(SHUFFLE, 10)
    head = net.fc.weight.clone()
    torch.save({"state_dict": {f"module.{k}": x for k, x in source.state_dict().items()}},
               tmp_path / "w.pth")  # fmt: skip
    counted, other = load_weights(net, tmp_path / "w.pth")
    there, total = source.state_dict(), len(net.state_dict())
    assert counted == f"{total - 2} of {total} tensors are those of {tmp_path / 'w.pth'}"
    assert other == "of another shape there, and drawn anew: fc.weight, fc.bias"
    assert torch.equal(net.fc.weight, head)
    found = net.state_dict()
    assert all(torch.equal(found[key], there[key]) for key in found if not key.startswith("fc."))


def test_what_is_missing_and_what_is_too_much_is_said(tmp_path):
    net = drawn("fcn")
    torch.save({"layers.1.weight": net.layers[1].weight.detach() + 1, "old": torch.ones(1)},
               tmp_path / "w.pt")  # fmt: skip
    said = load_weights(net, tmp_path / "w.pt")
    assert said[1:] == ["not there, and drawn anew: layers.0.weight, layers.2.weight",
                        "not in the network: old"]  # fmt: skip


def test_safetensors_are_read(tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    source, net = drawn("fcn", seed=1), drawn("fcn")
    save(source.state_dict(), tmp_path / "w.safetensors")
    assert start(net, tmp_path / "w.safetensors")[0].startswith("3 of 3 tensors")
    assert same(net.state_dict(), source.state_dict())


def test_safetensors_without_their_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(Unfit, match="pip install safetensors"):
        load_weights(drawn("fcn"), tmp_path / "w.safetensors")


@pytest.mark.parametrize("content, words", [
    ({"conv.weight": torch.ones(2, 2)}, "nothing in .* fits the network: it has conv.weight"),
    ({"layers.0.weight": torch.full((16, 64), torch.nan)}, "not finite in layers.0.weight"),
    ([1, 2], "holds no weights by name"), ({"epoch": 3}, "holds no weights by name"),
    (torch.nn.Linear(1, 1), "other things than weights"), (b"no archive", "w.pt"),
])  # fmt: skip
def test_files_without_weights_are_refused(content, words, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / "w.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "w.pt")
    with pytest.raises(Unfit, match=words) as error:
        load_weights(drawn("fcn"), tmp_path / "w.pt")
    assert len(str(error.value).splitlines()) == 1


def test_frozen_names_are_patterns():
    net = drawn(SHUFFLE)
    freeze(net, ["conv1.*", "stage?.0.*.weight"])
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert {"conv1.0.weight", "conv1.1.bias", "stage2.0.branch1.0.weight"} <= set(frozen)
    assert not any(x.startswith("fc") or ".1.branch" in x for x in frozen)
    assert "stage2.0.branch1.1.bias" not in frozen
    with pytest.raises(Unfit, match="layers.0.wieght matches no parameter; .*layers.0.weight"):
        freeze(drawn("fcn"), ["layers.0.wieght"])
    with pytest.raises(Unfit, match="leaves no parameter to train"):
        freeze(drawn("fcn"), ["*"])


def test_updates_are_measured_of_the_weights_that_train():
    """A bias that starts at zero has no relative update, and a frozen weight none at all."""
    net = drawn("fcn", bias=True)
    net.layers[0].weight.requires_grad_(False)
    step = Step(net, None, None, log_updates=True)
    assert [x.data_ptr() for x in step.weights] == [x.weight.data_ptr() for x in net.layers[1:]]


# Runs


@pytest.mark.parametrize("flags", [
    ["--arch", "resnet18", "--bias", "--affine"],
    ["--depth", 3, "--width", 16, "--bias", "--layers", "paths", "--log_updates"],
    ["--arch", "timm:resnet18"],
])  # fmt: skip
@pytest.mark.parametrize("rule", ["agd", "spectral"])
def test_agd_trains_it(rule, flags, tmp_path):
    if "timm:resnet18" in flags:
        pytest.importorskip("timm")
    assert call(*flags, "--optimizer", rule, out=tmp_path) == 0
    first, epoch, end = rows(tmp_path)
    assert end["stopped"] is None and end["skipped_steps"] == 0 and 0 < epoch["eta_min"]
    paths = rule == "spectral" or "paths" in flags or "timm:resnet18" in flags
    assert ("paths" in first) == paths
    if "--log_updates" in flags:
        assert 0 < epoch["update_min"] <= epoch["update_max"] < 1
    moved = [x for key, x in weights(tmp_path).items() if key.endswith(".bias")]
    assert all(x.abs().max() > 0 for x in moved)


@pytest.mark.parametrize("rule", ["agd", "spectral"])
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


@pytest.mark.parametrize("rule", ["agd", "spectral"])
def test_a_run_from_weights_with_frozen_ones(rule, tmp_path, capsys):
    path, out = tmp_path / "five.pt", tmp_path / "out"
    torch.save(drawn(SHUFFLE, 5, seed=1).state_dict(), path)
    flags = ["--arch", SHUFFLE, "--optimizer", rule, "--weights", path]
    flags += ["--freeze", "conv1.*,stage*", "--epochs"]
    assert call(*flags, 1, out=out) == 0
    said = capsys.readouterr().out
    assert "drawn anew: fc.weight, fc.bias" in said and "of them frozen" in said
    assert "(24, 3, 3, 3)  frozen" in said
    then, now = torch.load(path), weights(out)
    parameters = dict(drawn(SHUFFLE).named_parameters())
    for key in parameters:
        if key.startswith(("conv1.", "stage")):
            assert torch.equal(now[key], then[key]), key
    assert not torch.equal(now["conv5.0.weight"], then["conv5.0.weight"])
    first = rows(out)[0]
    assert first["settings"]["weights"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert first["frozen_weights"] == sum(p.numel() for key, p in parameters.items()
                                          if key.startswith(("conv1.", "stage")))  # fmt: skip
    (record,) = (out / "logs").glob("*.run.json")
    assert json.loads(record.read_text())["settings"]["weights"] == first["settings"]["weights"]
    assert call(*flags, 2, out=out) == 0
    torch.save(drawn(SHUFFLE, 5, seed=2).state_dict(), path)
    capsys.readouterr()
    assert call(*flags, 3, out=out) == 2
    assert "is of another run of this name (weights" in capsys.readouterr().err
    assert program.main(["--replay", str(record), "--out", str(tmp_path / "replayed")]) == 2
    said = capsys.readouterr()
    assert "weights" in said.out and "other inputs than those of" in said.err


def test_a_replay_repeats_weights_and_frozen_ones(tmp_path, capsys):
    """And a run begins where a checkpoint of another one ended."""
    out = tmp_path / "out"
    assert call("--depth", 3, "--width", 16, out=tmp_path / "first") == 0
    (path,) = (tmp_path / "first" / "checkpoints").glob("*.pt")
    flags = ["--depth", 3, "--width", 16, "--weights", path, "--freeze", "layers.0.*",
             "--freeze", "layers.2.*"]  # fmt: skip
    assert call(*flags, out=out) == 0
    then, now = weights(tmp_path / "first"), weights(out)
    moved = [key for key in now if not torch.equal(now[key], then[key])]
    assert moved == ["layers.1.weight"]
    (record,) = (out / "logs").glob("*.run.json")
    capsys.readouterr()
    assert program.main(["--replay", str(record), "--out", str(tmp_path / "again")]) == 0
    assert "The same bits as those of" in capsys.readouterr().out


def test_what_cannot_be_trained_is_said_before(tmp_path, capsys):
    assert call("--arch", "torchvision:alexnet", out=tmp_path) == 2
    assert "cannot take images of 8×8 (a side of 64 would do)" in capsys.readouterr().err
    assert call("--freeze", "layers.*", out=tmp_path) == 2
    assert "leaves no parameter to train" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_a_single_image_left_over_is_said(tmp_path, capsys):
    """Batch norm of one value has no deviation."""
    assert call("--arch", SHUFFLE, "--train_examples", 9, out=tmp_path) == 1
    assert "more than one image at a time" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--arch", "resnet18", "--bias", "--affine"], "11,174,794 weights in 21 layers"),
    (["--arch", SMALL, "--freeze", "features.*"], "which agd takes"),
])  # fmt: skip
def test_the_check_knows_these_networks(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("check.resources.TIMING", 0.1)
    assert call(*flags, "--check", out=tmp_path) == 0
    said = capsys.readouterr().out
    assert words in said and "fault" not in said.replace("No fault", "")


def test_the_check_finds_what_does_not_fit(tmp_path, capsys):
    assert call("--arch", "torchvision:alexnet", "--check", out=tmp_path) == 1
    assert "a side of 64 would do" in capsys.readouterr().out


def test_batch_norms_that_do_more_are_not_exchanged():
    """Which would lose their activation, without a word."""
    pytest.importorskip("timm")
    net = drawn("timm:efficientnet_lite0", shape=(3, 32, 32))
    with pytest.raises(RankError, match="--sync_bn does not know .* BatchNormAct2d"):
        World(torch.device("cpu"), size=2).wrap(net, sync_bn=True)


def test_ranks_train_a_frozen_network_as_one_process(run_main, tmp_path):
    """L is that of the network, and the ranks' first pass is not."""
    flags = ["--arch", "torchvision:resnet18", "--freeze", "layer[123].*", "--train_bs", 12]
    flags = [*DIGITS, *flags, "--gain", 0.01]
    two = run_main(*flags, "--distribute", out=tmp_path / "two", launcher=[*TORCHRUN, "2"],
                   env={"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert program.main([*map(str, flags), "--out", str(tmp_path / "one")]) == 0
    one, others = rows(tmp_path / "one"), rows(tmp_path / "two")
    net = drawn("torchvision:resnet18")
    freeze(net, ["layer[123].*"])
    paths = sum(agd.depth(net, torch.zeros(2, 1, 8, 8)).values())
    assert one[0]["paths"] == others[0]["paths"] == pytest.approx(paths) and paths < 10
    # Up to batch norm, whose statistics are each rank's own.
    assert others[1]["train_loss"] == pytest.approx(one[1]["train_loss"], rel=0.2)
    before = drawn("torchvision:resnet18").state_dict()
    now = weights(tmp_path / "two")
    assert torch.equal(now["layer1.0.conv1.weight"], before["layer1.0.conv1.weight"])
    assert not torch.equal(now["fc.weight"], before["fc.weight"])
