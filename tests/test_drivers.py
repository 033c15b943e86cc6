"""AGD and SpectralAGD inside other programs' training loops: the loss falls, a run that is resumed
from their checkpoint gives the weights of the one that was not interrupted, and the average is what
is evaluated."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, TensorDataset

from agd import AGD, SpectralAGD
from tests.stock import assert_falls, characters, digits, gpt2

# What AGD warns of: nothing here gives it a reason.
pytestmark = [
    pytest.mark.filterwarnings(f"error:{message}:UserWarning")
    for message in ("AGD could not read", "the norm of all gradients", "the gradient summary",
                    "a scheduler has changed")
]  # fmt: skip
both = pytest.mark.parametrize("rule", [AGD, SpectralAGD])


class Run(NamedTuple):
    """What four epochs, or the last two of them, give."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list  # of each step
    tested: list  # the mean loss of each test
    test: Callable  # the mean loss at the weights that the network holds


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


def mean_loss(net, batches, loss=lambda net, x, y: F.cross_entropy(net(x), y)):
    """f() -> the mean loss in evaluation mode; the network's mode stays as it is."""

    def test():
        mode = net.training
        net.eval()
        with torch.no_grad():
            losses = [loss(net, x, y).item() for x, y in batches]
        net.train(mode)
        return sum(losses) / len(losses)

    return test


def by_lightning(rule, path, seed, resume):
    """Lightning calls no optimiser's eval() and train() by itself: a callback does."""
    lightning = pytest.importorskip("lightning")

    class Average(lightning.Callback):
        def on_validation_start(self, trainer, module):
            for optimizer in trainer.optimizers:
                optimizer.eval()

        def on_validation_end(self, trainer, module):
            for optimizer in trainer.optimizers:
                optimizer.train()

    class Module(lightning.LightningModule):
        def __init__(self):
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

    module, batches = Module(), loader()
    saver = lightning.pytorch.callbacks.ModelCheckpoint(path, "{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", logger=False,
                                callbacks=[saver] + [Average()] * hasattr(rule, "eval"),
                                enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, batches, batches, weights_only=False,
                ckpt_path=path / "epoch=1.ckpt" if resume else None)  # fmt: skip
    last = sum(module.tested[-4:]) / 4
    return Run(module.net, trainer.optimizers[0], module.losses, [last],
               mean_loss(module.net, batches))  # fmt: skip


def by_accelerate(rule, path, seed, resume):
    """It hands on the modes, which it does not call; the checkpoint is of eval mode."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = small(seed)
    own = rule(net)
    net, optimizer, batches = accelerator.prepare(net, own, loader())
    losses, tested, test = [], [], mean_loss(net, batches)
    if resume:
        accelerator.load_state(path)
    for epoch in range(2 * resume, 4):
        if hasattr(rule, "eval"):
            optimizer.train()
        for images, labels in batches:
            with accelerator.accumulate(net):
                loss = F.cross_entropy(net(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        if hasattr(rule, "eval"):
            optimizer.eval()
        tested.append(test())
        if epoch == 1:
            accelerator.save_state(path)
    return Run(net, own, losses, tested, test)


def by_timm(rule, path, seed, resume):
    """Its scaler, its checkpoints, and its loop: scaled gradients are unscaled before the step."""
    timm = pytest.importorskip("timm")
    from timm.models import resume_checkpoint
    from timm.scheduler import create_scheduler_v2
    from timm.utils import CheckpointSaver, NativeScaler

    torch.manual_seed(seed)
    net, batches = timm.create_model("test_resnet", in_chans=1, num_classes=10), loader()
    optimizer, scaler, losses = rule(net), NativeScaler(device="cpu"), []
    assert create_scheduler_v2(optimizer, sched="none", num_epochs=4)[0] is None
    saver = CheckpointSaver(net, optimizer, argparse.Namespace(model="test_resnet"),
                            amp_scaler=scaler, decreasing=True, checkpoint_dir=str(path),
                            recovery_dir=str(path))  # fmt: skip
    if resume:
        saved = str(path / "checkpoint-1.pth.tar")
        assert resume_checkpoint(net, saved, optimizer, scaler, log_info=False) == 2
    for epoch in range(2 * resume, 4):
        net.train()
        for images, labels in batches:
            loss = F.cross_entropy(net(images), labels)
            scaler(loss, optimizer, parameters=net.parameters(), need_update=True)
            optimizer.zero_grad()
            losses.append(loss.item())
        if not resume:
            saver.save_checkpoint(epoch, losses[-1])
    return Run(net, optimizer, losses, [], None)


def by_transformers(rule, path, seed, resume):
    """Its Trainer calls eval() and train() by itself, and saves in either mode."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(seed)
    net = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    optimizer, codes = rule(net), characters(32, 24)
    texts = [{"input_ids": x, "labels": x} for x in codes]
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    arguments = transformers.TrainingArguments(
        str(path), max_steps=20, save_steps=10, eval_steps=5, eval_strategy="steps",
        max_grad_norm=0, per_device_train_batch_size=8, per_device_eval_batch_size=8,
        logging_strategy="steps", logging_steps=1, use_cpu=True, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(net, arguments, train_dataset=texts, eval_dataset=texts,
                                   optimizers=(optimizer, constant))  # fmt: skip
    trainer.train(resume_from_checkpoint=str(path / "checkpoint-10") if resume else None)
    losses, tested = ([float(row[key]) for row in trainer.state.log_history if key in row]
                      for key in ("loss", "eval_loss"))  # fmt: skip
    assert (len(losses), len(tested)) == (20, 4)
    counted = 31 / 32  # by Trainer, each first label too, which nothing predicts
    return Run(net, optimizer, losses, tested, mean_loss(
        net, [(codes, codes)], lambda net, x, y: net(input_ids=x, labels=y).loss * counted))


@pytest.mark.parametrize("driver", [by_lightning, by_accelerate, by_timm, by_transformers])
@both
def test_a_loop_trains_and_its_checkpoint_goes_on_to_the_bit(driver, rule, tmp_path):
    """In a network of another draw, which has other scales; and tests are of the average, not of
    the weights that training holds."""
    whole = driver(rule, tmp_path, 0, False)
    assert_falls(whole.losses)
    resumed = driver(rule, tmp_path, 1, True)
    for ours, theirs in ((resumed.losses, whole.losses), (resumed.tested, whole.tested)):
        assert ours == theirs[len(theirs) - len(ours) :]
    states = [(run.net.state_dict(), run.optimizer.state_dict()) for run in (resumed, whole)]
    leaves, shapes = zip(*map(tree_flatten, states))
    assert shapes[0] == shapes[1]
    assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(*leaves))
    assert torch.equal(resumed.optimizer.eta, whole.optimizer.eta)
    assert resumed.optimizer.L == whole.optimizer.L
    if hasattr(rule, "eval") and whole.test:
        whole.optimizer.train()
        held = whole.test()
        whole.optimizer.eval()
        assert whole.tested[-1] == pytest.approx(whole.test(), rel=1e-5)
        assert whole.tested[-1] != pytest.approx(held, rel=1e-4)


@both
def test_accumulation_of_accelerate_is_the_mean_over_its_micro_batches(rule):
    accelerate = pytest.importorskip("accelerate")
    etas = []
    for parts in (1, 4):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts)
        net = nn.Sequential(nn.Flatten(), small()[-1], nn.ReLU(), nn.Linear(10, 10))
        images, labels = digits(16, 16, channels=1)
        own = rule(net)
        net, optimizer = accelerator.prepare(net, own)
        for part in zip(images.chunk(parts), labels.chunk(parts)):
            with accelerator.accumulate(net):
                accelerator.backward(F.cross_entropy(net(part[0]), part[1]))
                optimizer.step()
                optimizer.zero_grad()
        etas.append(own.eta.item())
    assert etas[1] == pytest.approx(etas[0], rel=1e-5)
