"""AGD and SpectralAGD inside other programs' training loops: the loss falls, a run that is resumed
from their checkpoint gives the weights of the one that was not interrupted, and the average is what
is evaluated."""

import argparse
import importlib
import os

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from agd import AGD, SpectralAGD
from tests.stock import assert_falls, characters, digits, gpt2

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is downloaded
# What AGD warns of: nothing here gives it a reason.
pytestmark = [
    pytest.mark.filterwarnings(f"error:{message}:UserWarning")
    for message in ("AGD could not read", "the norm of all gradients", "the gradient summary",
                    "a scheduler has changed")
]  # fmt: skip


@pytest.fixture(params=[AGD, SpectralAGD])
def rule(request):
    return request.param


def small(seed=0):
    """A network with biases, gains and statistics, of its own draw."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.GroupNorm(2, 16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def loader(images=64, batch=16):
    return DataLoader(TensorDataset(*digits(8, images, channels=1)), batch_size=batch)


def assert_same(net, other):
    """Parameters and statistics, bit for bit."""
    theirs = other.state_dict()
    for name, x in net.state_dict().items():
        assert torch.equal(x, theirs[name]), name


def assert_same_optimiser(optimizer, other):
    assert torch.equal(optimizer.eta, other.eta) and torch.equal(optimizer.G, other.G)
    assert optimizer.L == other.L
    ours, theirs = (x.state_dict()["state"] for x in (optimizer, other))
    assert ours.keys() == theirs.keys()
    for i, entries in ours.items():
        assert entries.keys() == theirs[i].keys()
        for key, x in entries.items():
            same = torch.equal(x, theirs[i][key]) if torch.is_tensor(x) else x == theirs[i][key]
            assert same, (i, key)


def test_torch_resumes_from_a_state_dict(rule, tmp_path):
    """A network of another draw has other scales: those that training began with are saved."""
    batches = list(loader())

    def steps(net, optimizer, batches):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()

    whole = small()
    reference = rule(whole)
    steps(whole, reference, batches)

    net = small()
    optimizer = rule(net)
    steps(net, optimizer, batches[:2])
    torch.save({"net": net.state_dict(), "agd": optimizer.state_dict()}, tmp_path / "saved.pt")
    net = small(seed=1)
    optimizer, saved = rule(net), torch.load(tmp_path / "saved.pt", weights_only=True)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["agd"])
    steps(net, optimizer, batches[2:])
    assert_same(net, whole)
    assert_same_optimiser(optimizer, reference)


def loss_of(net, batches):
    """The mean loss in evaluation mode, the network's mode left as it is."""
    mode = net.training
    net.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(net(images), labels).item() for images, labels in batches]
    net.train(mode)
    return sum(losses) / len(losses)


def assert_is_of_the_average(loss, net, optimizer, batches):
    """Not of the weights that training holds."""
    optimizer.train()
    held = loss_of(net, batches)
    optimizer.eval()
    average = loss_of(net, batches)
    assert loss == pytest.approx(average, rel=1e-5) and loss != pytest.approx(held, rel=1e-4)


def test_lightning(rule, tmp_path):
    """Lightning calls no optimiser's eval() and train() by itself: README's callback does."""
    lightning = pytest.importorskip("lightning")
    modes = hasattr(rule, "eval")

    class Average(lightning.Callback):
        def on_validation_start(self, trainer, module):
            for optimizer in trainer.optimizers:
                optimizer.eval()

        def on_validation_end(self, trainer, module):
            for optimizer in trainer.optimizers:
                optimizer.train()

    class Module(lightning.LightningModule):
        def __init__(self, seed):
            super().__init__()
            self.net, self.losses, self.tested = small(seed), [], []

        def training_step(self, batch):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch):
            self.tested.append(F.cross_entropy(self.net(batch[0]), batch[1]).item())

        def configure_optimizers(self):
            return rule(self.net)

    def fit(seed, epochs, resume=None):
        module = Module(seed)
        saver = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False,
                                    callbacks=[saver] + [Average()] * modes,
                                    enable_progress_bar=False,
                                    enable_model_summary=False)  # fmt: skip
        trainer.fit(module, loader(), loader(), ckpt_path=resume, weights_only=False)
        return module, trainer.optimizers[0]

    whole, reference = fit(0, 5)
    assert_falls(whole.losses)
    resumed, optimizer = fit(1, 5, resume=tmp_path / "epoch=1.ckpt")
    assert resumed.losses == whole.losses[8:] and resumed.tested[-4:] == whole.tested[-4:]
    assert_same(resumed, whole)
    assert_same_optimiser(optimizer, reference)
    if modes:
        last = sum(whole.tested[-4:]) / 4
        assert_is_of_the_average(last, whole.net, reference, list(loader()))


@pytest.mark.parametrize("rule, mode", [(AGD, None), (SpectralAGD, "train"), (SpectralAGD, "eval")])
def test_accelerate(rule, mode, tmp_path):
    """It hands on the modes, which it does not call; a checkpoint of either mode goes on."""
    accelerate = pytest.importorskip("accelerate")

    def prepare(seed):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        net = small(seed)
        own = rule(net)
        net, optimizer, batches = accelerator.prepare(net, own, loader())
        return accelerator, net, optimizer, batches, own

    def epochs(count, accelerator, net, optimizer, batches, own):
        losses = []
        if mode:
            optimizer.train()
        for _ in range(count):
            for images, labels in batches:
                with accelerator.accumulate(net):
                    loss = F.cross_entropy(net(images), labels)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    run = prepare(0)
    losses = epochs(2, *run)
    accelerator, net, optimizer, batches, own = run
    if mode:
        optimizer.eval()
        assert_is_of_the_average(loss_of(net, batches), net, own, batches)
        getattr(optimizer, mode)()
    accelerator.save_state(tmp_path)
    resumed = prepare(1)
    resumed[0].load_state(tmp_path)
    assert_same(resumed[1], net)
    losses += epochs(2, *run)
    assert_falls(losses)
    assert epochs(2, *resumed) == losses[8:]
    assert_same(resumed[1], net)
    assert_same_optimiser(resumed[4], own)


def test_accumulation_of_accelerate_is_the_mean_over_its_micro_batches(rule):
    accelerate = pytest.importorskip("accelerate")

    def train(parts):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts)
        net = nn.Sequential(nn.Flatten(), small()[-1], nn.ReLU(), nn.Linear(10, 10))
        images, labels = digits(16, 16, channels=1)
        agd = rule(net)
        net, optimizer = accelerator.prepare(net, agd)
        for part in zip(images.chunk(parts), labels.chunk(parts)):
            with accelerator.accumulate(net):
                accelerator.backward(F.cross_entropy(net(part[0]), part[1]))
                optimizer.step()
                optimizer.zero_grad()
        return agd

    whole, parts = train(1), train(4)
    assert parts.eta.item() == pytest.approx(whole.eta.item(), rel=1e-5)


def test_the_trainer_of_transformers(rule, tmp_path):
    """It calls eval() and train() by itself, and saves in either mode."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    texts = [{"input_ids": x, "labels": x} for x in characters(32, 24)]

    def trainer(seed):
        torch.manual_seed(seed)
        net = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        optimizer = rule(net)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=20, save_steps=10, eval_steps=5, eval_strategy="steps",
            max_grad_norm=0, per_device_train_batch_size=8, per_device_eval_batch_size=8,
            logging_strategy="steps", logging_steps=1, use_cpu=True, report_to="none",
            disable_tqdm=True,
        )  # fmt: skip
        return transformers.Trainer(net, arguments, train_dataset=texts, eval_dataset=texts,
                                    optimizers=(optimizer, constant)), optimizer  # fmt: skip

    whole, reference = trainer(0)
    whole.train()
    losses, tested = ([float(row[key]) for row in whole.state.log_history if key in row]
                      for key in ("loss", "eval_loss"))  # fmt: skip
    assert len(losses) == 20 and len(tested) == 4
    assert_falls(losses)
    resumed, optimizer = trainer(1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert_same(resumed.model, whole.model)
    assert_same_optimiser(optimizer, reference)
    if rule is SpectralAGD:
        assert reference.param_groups[0]["train_mode"] is False  # the last of all was an evaluation
        reference.train()
        held = [p.detach().clone() for p in whole.model.parameters()]
        assert whole.evaluate()["eval_loss"] == pytest.approx(tested[-1], rel=1e-6)
        assert not all(torch.equal(p, q) for p, q in zip(held, whole.model.parameters()))


def test_timm(rule, tmp_path):
    """Its scaler, its checkpoints, and its loop: scaled gradients are unscaled before the step."""
    timm = pytest.importorskip("timm")
    from timm.models import resume_checkpoint
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter, CheckpointSaver, NativeScaler

    batches = loader()

    def prepare(seed):
        torch.manual_seed(seed)
        net = timm.create_model("test_resnet", in_chans=1, num_classes=10)
        optimizer, scaler = rule(net), NativeScaler(device="cpu")
        scheduler, _ = create_scheduler_v2(optimizer, sched="none", num_epochs=4)
        assert scheduler is None
        return net, optimizer, scaler

    def epoch(net, optimizer, scaler):
        meter, losses = AverageMeter(), []
        net.train()
        for images, labels in batches:
            loss = F.cross_entropy(net(images), labels)
            scaler(loss, optimizer, parameters=net.parameters(), need_update=True)
            optimizer.zero_grad()
            meter.update(loss.item(), len(images))
            losses.append(loss.item())
        return meter.avg, losses

    net, optimizer, scaler = prepare(0)
    arguments = argparse.Namespace(model="test_resnet")
    saver = CheckpointSaver(net, optimizer, arguments, amp_scaler=scaler, decreasing=True,
                            checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))  # fmt: skip
    losses = []
    for number in range(4):
        mean, some = epoch(net, optimizer, scaler)
        saver.save_checkpoint(number, mean)
        losses += some
    assert_falls(losses)

    other, its_optimizer, its_scaler = prepare(1)
    saved = str(tmp_path / "checkpoint-1.pth.tar")
    assert resume_checkpoint(other, saved, its_optimizer, its_scaler, log_info=False) == 2
    for _ in range(2):
        epoch(other, its_optimizer, its_scaler)
    assert_same(other, net)
    assert_same_optimiser(its_optimizer, optimizer)


def test_a_scaled_gradient_is_unscaled_before_the_step(rule):
    timm_utils = pytest.importorskip("timm.utils")
    scaler = timm_utils.NativeScaler(device="cpu")

    etas = []
    for scaled in (False, True):
        net = small()
        optimizer, (images, labels) = rule(net), digits(8, channels=1)
        loss = F.cross_entropy(net(images), labels)
        if scaled:
            scaler(loss, optimizer)
        else:
            loss.backward()
            optimizer.step()
        etas.append(optimizer.eta.item())
    assert etas[1] == pytest.approx(etas[0], rel=1e-5)


@pytest.mark.parametrize(
    "name, library",
    [
        ("accelerate_digits", "accelerate"),
        ("lightning_digits", "lightning"),
        ("timm_digits", "timm"),
        pytest.param("trainer_text", "transformers", marks=pytest.mark.slow),
    ],
)
def test_an_example_trains(name, library, capsys):
    pytest.importorskip(library)
    losses = importlib.import_module(f"examples.{name}").main()
    assert losses[-1] < 0.9 * losses[0]
    assert "eta" in capsys.readouterr().out
