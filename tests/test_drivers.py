"""AGD inside other programs' training loops: the loss falls, and a run that is resumed from their
checkpoint gives the weights of the one that was not interrupted."""

import argparse
import importlib
import os

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from agd import AGD
from tests.stock import assert_falls, characters, digits
from tests.test_any_library import gpt2

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is downloaded
# What AGD warns of: nothing here gives it a reason.
pytestmark = [
    pytest.mark.filterwarnings(f"error:{message}:UserWarning")
    for message in ("AGD could not read", "the norm of all gradients", "the gradient summary",
                    "a scheduler has changed")
]  # fmt: skip


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
    assert optimizer.state_dict()["state"] == other.state_dict()["state"]


def test_torch_resumes_from_a_state_dict(tmp_path):
    """A network of another draw has other scales: those that training began with are saved."""
    batches = list(loader())

    def steps(net, optimizer, batches):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()

    whole = small()
    reference = AGD(whole)
    steps(whole, reference, batches)

    net = small()
    optimizer = AGD(net)
    steps(net, optimizer, batches[:2])
    torch.save({"net": net.state_dict(), "agd": optimizer.state_dict()}, tmp_path / "saved.pt")
    net = small(seed=1)
    optimizer, saved = AGD(net), torch.load(tmp_path / "saved.pt", weights_only=True)
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["agd"])
    steps(net, optimizer, batches[2:])
    assert_same(net, whole)
    assert_same_optimiser(optimizer, reference)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, seed):
            super().__init__()
            self.net, self.losses = small(seed), []

        def training_step(self, batch):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return AGD(self.net)

    def fit(seed, epochs, resume=None):
        module = Module(seed)
        saver = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False,
                                    callbacks=[saver], enable_progress_bar=False,
                                    enable_model_summary=False)  # fmt: skip
        trainer.fit(module, loader(), ckpt_path=resume, weights_only=False)
        return module, trainer.optimizers[0]

    whole, reference = fit(0, 5)
    assert_falls(whole.losses)
    resumed, optimizer = fit(1, 5, resume=tmp_path / "epoch=1.ckpt")
    assert resumed.losses == whole.losses[8:]
    assert_same(resumed, whole)
    assert_same_optimiser(optimizer, reference)


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def prepare(seed):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        net = small(seed)
        agd = AGD(net)
        net, optimizer, batches = accelerator.prepare(net, agd, loader())
        return accelerator, net, optimizer, batches, agd

    def epochs(count, accelerator, net, optimizer, batches, agd):
        losses = []
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
    run[0].save_state(tmp_path)
    losses += epochs(2, *run)
    assert_falls(losses)
    resumed = prepare(1)
    resumed[0].load_state(tmp_path)
    assert epochs(2, *resumed) == losses[8:]
    assert_same(resumed[1], run[1])
    assert_same_optimiser(resumed[4], run[4])


def test_accumulation_of_accelerate_is_the_mean_over_its_micro_batches():
    accelerate = pytest.importorskip("accelerate")

    def train(parts):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts)
        net = nn.Sequential(nn.Flatten(), small()[-1], nn.ReLU(), nn.Linear(10, 10))
        images, labels = digits(16, 16, channels=1)
        agd = AGD(net)
        net, optimizer = accelerator.prepare(net, agd)
        for part in zip(images.chunk(parts), labels.chunk(parts)):
            with accelerator.accumulate(net):
                accelerator.backward(F.cross_entropy(net(part[0]), part[1]))
                optimizer.step()
                optimizer.zero_grad()
        return agd

    whole, parts = train(1), train(4)
    assert parts.eta.item() == pytest.approx(whole.eta.item(), rel=1e-5)


def test_the_trainer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    texts = [{"input_ids": x, "labels": x} for x in characters(32, 24)]

    def trainer(seed):
        torch.manual_seed(seed)
        net = gpt2()
        optimizer = AGD(net)
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=20, save_steps=10, logging_steps=1, max_grad_norm=0,
            per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True,
            logging_strategy="steps",
        )  # fmt: skip
        return transformers.Trainer(net, arguments, train_dataset=texts,
                                    optimizers=(optimizer, constant)), optimizer  # fmt: skip

    whole, reference = trainer(0)
    whole.train()
    losses = [float(row["loss"]) for row in whole.state.log_history if "loss" in row]
    assert len(losses) == 20
    assert_falls(losses)
    resumed, optimizer = trainer(1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert_same(resumed.model, whole.model)
    assert_same_optimiser(optimizer, reference)


def test_timm(tmp_path):
    """Its scaler, its checkpoints, and its loop: scaled gradients are unscaled before the step."""
    timm = pytest.importorskip("timm")
    from timm.models import resume_checkpoint
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter, CheckpointSaver, NativeScaler

    batches = loader()

    def prepare(seed):
        torch.manual_seed(seed)
        net = timm.create_model("test_resnet", in_chans=1, num_classes=10)
        optimizer, scaler = AGD(net), NativeScaler(device="cpu")
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


def test_a_scaled_gradient_is_unscaled_before_the_step():
    timm_utils = pytest.importorskip("timm.utils")
    scaler = timm_utils.NativeScaler(device="cpu")

    etas = []
    for scaled in (False, True):
        net = small()
        optimizer, (images, labels) = AGD(net), digits(8, channels=1)
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
        ("trainer_text", "transformers"),
    ],
)
def test_an_example_trains(name, library, capsys):
    pytest.importorskip(library)
    losses = importlib.import_module(f"examples.{name}").main()
    assert losses[-1] < 0.9 * losses[0]
    assert "eta" in capsys.readouterr().out
