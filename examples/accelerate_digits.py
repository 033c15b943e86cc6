"""AGD with Accelerate and accumulated gradients: `python -m examples.accelerate_digits`, or under
`accelerate launch -m`.

Needs accelerate (requirements-libraries.txt); some seconds on a CPU.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agd import AGD
from data import load


def main(epochs=3, cpu=True):
    """Returns the loss of each micro-batch."""
    torch.manual_seed(0)
    data = load("digits", None, 1437, 360, torch.device("cpu"))
    train = DataLoader(TensorDataset(*next(iter(data.train))), batch_size=32, shuffle=True)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GroupNorm(4, 64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 10),
    )  # fmt: skip
    # backward() divides by the number of micro-batches: AGD needs the gradient of the mean.
    accelerator = Accelerator(cpu=cpu, gradient_accumulation_steps=2)
    agd = AGD(net)
    net, optimizer, train = accelerator.prepare(net, agd, train)
    losses = []
    for epoch in range(1, epochs + 1):
        net.train()
        for images, labels in train:
            with accelerator.accumulate(net):
                loss = F.cross_entropy(net(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        net.eval()
        images, labels = (x.to(accelerator.device) for x in next(iter(data.test)))
        with torch.no_grad():
            accuracy = (net(images).argmax(1) == labels).float().mean()
        accelerator.print(f"epoch {epoch}: loss {losses[-1]:.3f}, test accuracy {accuracy:.1%}, "
                          f"eta {agd.eta:.3f}")  # fmt: skip
    return losses


if __name__ == "__main__":
    main()
