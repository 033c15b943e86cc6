"""LoRA's adapters, of peft, on a network that stays as it is: `python -m examples.lora_digits`.

A small vision transformer learns the digits; then its adapters learn the digits turned by 90°.
Needs `pip install peft transformers`. 94 % of the turned test digits, after some seconds on a CPU.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import warnings

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from agd import SpectralAGD
from data import load


def train(net, train, test, epochs, name):
    """Returns (mean loss, test accuracy, eta) of each epoch."""
    # Of an adapted network it takes the adapters, which alone require gradients; so does AGD.
    optimizer, rows = SpectralAGD(net), []
    batches = DataLoader(TensorDataset(*train), batch_size=64, shuffle=True, drop_last=True)
    for epoch in range(1, epochs + 1):
        losses = []
        optimizer.train()
        net.train()
        for images, labels in batches:
            loss = F.cross_entropy(net(pixel_values=images).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        optimizer.eval()  # the network holds the average, and keeps it after the last epoch
        rows.append((sum(losses) / len(losses), accuracy(net, *test), optimizer.eta.item()))
        print("{}, epoch {}: loss {:.3f}, test accuracy {:.1%}, eta {:.3f}".format(
            name, epoch, *rows[-1]))  # fmt: skip
    return rows


@torch.no_grad()
def accuracy(net, images, labels):
    net.eval()
    return (net(pixel_values=images).logits.argmax(1) == labels).float().mean().item()


def main(epochs=5):
    """Returns (mean loss, test accuracy, eta) of each epoch of the adapters."""
    torch.manual_seed(0)
    data = load("digits", None, 1437, 360, torch.device("cpu"))  # all images in one batch
    upright = [next(iter(part)) for part in (data.train, data.test)]
    turned = [(images.rot90(1, (2, 3)), labels) for images, labels in upright]
    net = ViTForImageClassification(ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=128, num_labels=10))  # fmt: skip
    train(net, *upright, 3, "upright")
    print(f"turned, no adapters: test accuracy {accuracy(net, *turned[1]):.1%}")
    adapted = get_peft_model(net, LoraConfig(r=8, target_modules="all-linear"))
    rows = train(adapted, *turned, epochs, "turned")
    with adapted.disable_adapter():  # the network below is as it was
        print(f"adapters off, upright: test accuracy {accuracy(adapted, *upright[1]):.1%}")
    merged = adapted.merge_and_unload()  # a network of transformers again
    print(f"adapters merged, turned: test accuracy {accuracy(merged, *turned[1]):.1%}")
    return rows


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # of peft's use of transformers
    main()
