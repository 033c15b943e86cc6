"""SpectralAGD, which evaluates and saves an average of its weights: `python -m
examples.spectral_digits`.

Needs nothing beyond requirements.txt. 99 % of the test digits after a few seconds on a CPU.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import itertools
import tempfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agd import SpectralAGD, recalibrate
from data import load


def network():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(net, test):
    net.eval()
    return (net(test[:][0]).argmax(1) == test[:][1]).float().mean().item()


def main(epochs=5):
    """Returns (mean loss, test accuracy at the average, eta) of each epoch."""
    torch.manual_seed(0)
    data = load("digits", None, 1437, 360, torch.device("cpu"))  # all images in one batch
    train, test = (TensorDataset(*next(iter(part))) for part in (data.train, data.test))
    train = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    net = network()
    optimizer = SpectralAGD(net)
    rows = []
    for epoch in range(1, epochs + 1):
        optimizer.train()  # the network holds the weights to train
        net.train()
        total = 0.0
        for images, labels in train:
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        held = accuracy(net, test)
        optimizer.eval()  # the network holds the average
        recalibrate(net, itertools.islice(train, 8))  # batch norm has not seen these weights
        rows.append((total / len(train), accuracy(net, test), optimizer.eta.item()))
        print("epoch {}: loss {:.3f}, test accuracy {:.1%} ({:.1%} at the weights in training), "
              "eta {:.3f}".format(epoch, *rows[-1][:2], held, rows[-1][2]))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        # Between eval() and train(): the file is an ordinary network, and its user needs no agd.
        # A checkpoint to go on from has optimizer.state_dict() beside it, in either mode.
        torch.save(net.state_dict(), f"{folder}/net.pt")
        loaded = network()
        loaded.load_state_dict(torch.load(f"{folder}/net.pt"))
    print(f"the saved network: test accuracy {accuracy(loaded, test):.1%}")
    return rows


if __name__ == "__main__":
    main()
