"""AGD with timm's pieces of training, on the handwritten digits: `python -m examples.timm_digits`.

Needs timm (requirements-libraries.txt); some seconds on a CPU.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import timm.utils
import torch
import torch.nn.functional as F

from agd import AGD
from data import load


def main(epochs=3):
    """Returns the mean loss of each epoch."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    data = load("digits", None, 64, 180, device)
    net = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    optimizer = AGD(net)  # instead of create_optimizer_v2, and without a scheduler
    scaler = timm.utils.NativeScaler(device=device.type)  # scaled and unscaled before the step
    means = []
    for epoch in range(1, epochs + 1):
        losses, accuracy = timm.utils.AverageMeter(), timm.utils.AverageMeter()
        net.train()
        data.train.set_epoch(epoch)
        for images, labels in data.train:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            scaler(loss, optimizer, parameters=net.parameters())
            losses.update(loss.item(), len(images))
        net.eval()
        with torch.no_grad():
            for images, labels in data.test:
                accuracy.update(timm.utils.accuracy(net(images), labels)[0].item(), len(images))
        print(f"epoch {epoch}: loss {losses.avg:.3f}, test accuracy {accuracy.avg:.1f} %, "
              f"eta {optimizer.eta:.3f}")  # fmt: skip
        means.append(losses.avg)
    return means


if __name__ == "__main__":
    main()
