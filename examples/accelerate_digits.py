"""AGD with Accelerate, accumulated gradients, and η as `lr` in its trackers: `python -m
examples.accelerate_digits`, or under `accelerate launch -m`.

Needs `pip install accelerate`. 98 % of the test digits after some seconds on a CPU.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agd import AGD
from data import load


class Lines(GeneralTracker):
    """Prints. In its place: log_with="wandb", "tensorboard", "trackio", ..., which need these."""

    name, requires_logging_directory, main_process_only = "lines", False, True
    tracker = None

    def log(self, values, step=None, **others):
        print("epoch {}: loss {loss:.3f}, test accuracy {accuracy:.1%}, eta {lr:.3f}".format(
            step, **values))  # fmt: skip


def main(epochs=6, tracker=None):
    """Returns (mean loss, test accuracy, eta) of each epoch."""
    torch.manual_seed(0)
    data = load("digits", None, 1437, 360, torch.device("cpu"))  # all images in one batch
    train, test = (TensorDataset(*next(iter(part))) for part in (data.train, data.test))
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GroupNorm(4, 64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 10),
    )  # fmt: skip
    # backward() divides by the number of micro-batches: AGD needs the gradient of the mean.
    accelerator = Accelerator(
        cpu=True,  # these few images; without it on GPUs
        gradient_accumulation_steps=2, log_with=tracker or Lines(),
    )  # fmt: skip
    accelerator.init_trackers("digits")
    agd = AGD(net)  # accelerator.prepare wraps it: optimizer.optimizer is agd
    net, optimizer, train, test = accelerator.prepare(
        net, agd, DataLoader(train, batch_size=32, shuffle=True, drop_last=True),
        DataLoader(test, batch_size=360),
    )  # fmt: skip
    rows = []
    for epoch in range(1, epochs + 1):
        net.train()
        losses = []
        for images, labels in train:
            with accelerator.accumulate(net):
                loss = F.cross_entropy(net(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        net.eval()
        correct = []
        with torch.no_grad():
            for images, labels in test:
                correct.append(accelerator.gather_for_metrics(net(images).argmax(1) == labels))
        loss = accelerator.reduce(torch.stack(losses).mean(), "mean")  # of all processes
        means = loss.item(), torch.cat(correct).float().mean().item()
        rows.append((*means, agd.eta.item()))  # read once an epoch: item() waits for a GPU
        accelerator.log(dict(zip(("loss", "accuracy", "lr"), rows[-1])), step=epoch)
    accelerator.end_training()
    return rows


if __name__ == "__main__":
    main()
