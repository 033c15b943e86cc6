"""AGD with timm's pieces of training, and η as `lr` in its summary: `python -m
examples.timm_digits`.

Needs `pip install timm`. 97 % of the test digits after some seconds on a CPU.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tempfile

import timm
import timm.utils
import torch
import torch.nn.functional as F

from agd import AGD
from data import load


def main(epochs=8, folder=None):
    """Leaves timm's summary.csv in `folder`. Returns (mean loss, test accuracy, eta) of each
    epoch."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load("digits", None, 64, 360, device, train_examples=1408)  # whole batches
    net = timm.create_model("test_resnet", in_chans=1, num_classes=10).to(device)
    optimizer = AGD(net)  # in the place of create_optimizer_v2, and without a scheduler
    scaler = timm.utils.NativeScaler(device=device.type)  # unscales before the step
    rows = []
    with tempfile.TemporaryDirectory() as own:
        for epoch in range(1, epochs + 1):
            losses, top1 = timm.utils.AverageMeter(), timm.utils.AverageMeter()
            net.train()
            data.train.set_epoch(epoch)
            for images, labels in data.train:
                optimizer.zero_grad()
                loss = F.cross_entropy(net(images), labels)
                scaler(loss, optimizer)  # without clip_grad
                losses.update(loss.item(), len(images))
            net.eval()
            with torch.no_grad():
                for images, labels in data.test:
                    top1.update(timm.utils.accuracy(net(images), labels)[0].item(), len(images))
            eta = optimizer.eta.item()  # timm's train.py has the lr of param_groups: the gain, 1
            print(f"epoch {epoch}: loss {losses.avg:.3f}, test accuracy {top1.avg:.1f}%, "
                  f"eta {eta:.3f}")  # fmt: skip
            timm.utils.update_summary(epoch, {"loss": losses.avg}, {"top1": top1.avg},
                                      f"{folder or own}/summary.csv", lr=eta,
                                      write_header=epoch == 1)  # fmt: skip
            rows.append((losses.avg, top1.avg / 100, eta))
    return rows


if __name__ == "__main__":
    main()
