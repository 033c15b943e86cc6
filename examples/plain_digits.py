"""AGD in a training loop of your own, with η in your dashboard: `python -m examples.plain_digits`.

Needs nothing beyond requirements.txt. 99 % of the test digits after a few seconds on a CPU.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agd import AGD
from data import load

EVERY = 20  # steps between two looks at eta


def main(epochs=8, log=lambda numbers, step: None):
    """Trains. `log` takes ({name: number}, step=number), as wandb.log, trackio.log,
    mlflow.log_metrics and accelerator.log do; for a SummaryWriter of TensorBoard it is

        def log(numbers, step):
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

    Returns (mean loss, test accuracy, eta) of each epoch.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load("digits", None, 1437, 360, device)  # all images in one batch
    train, test = (TensorDataset(*next(iter(part))) for part in (data.train, data.test))
    train = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 10),
    ).to(device)  # fmt: skip
    optimizer = AGD(net)  # no learning rate, no schedule, no weight decay, no clipping
    rows, step = [], 0
    for epoch in range(1, epochs + 1):
        net.train()
        total = 0.0
        for images, labels in train:
            loss = F.cross_entropy(net(images), labels)  # a mean over the batch
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, step = total + loss.detach(), step + 1
            if step % EVERY == 0:  # item() waits for a GPU: not in every step
                log({"loss": loss.item(), "lr": optimizer.eta.item()}, step=step)
        net.eval()
        with torch.no_grad():
            accuracy = (net(test[:][0]).argmax(1) == test[:][1]).float().mean().item()
        rows.append((total.item() / len(train), accuracy, optimizer.eta.item()))
        print("epoch {}: loss {:.3f}, test accuracy {:.1%}, eta {:.3f}".format(epoch, *rows[-1]))
    return rows


if __name__ == "__main__":
    main()
