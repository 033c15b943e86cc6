"""AGD in a module of Lightning, on the handwritten digits: `python -m examples.lightning_digits`.

Needs lightning (requirements-libraries.txt); some seconds on a CPU.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import lightning
import torch
import torch.nn.functional as F
from torch import nn

from agd import AGD
from data import load


class Classifier(lightning.LightningModule):
    """A small convolutional network, with the biases and gains that torch gives it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 16, 10),
        )  # fmt: skip
        self.losses = []

    def training_step(self, batch):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def on_train_epoch_end(self):
        eta = self.trainer.optimizers[0].eta
        accuracy = self.trainer.callback_metrics["accuracy"]
        print(f"epoch {self.current_epoch}: loss {self.losses[-1]:.3f}, test accuracy "
              f"{accuracy:.1%}, eta {eta:.3f}")  # fmt: skip

    def configure_optimizers(self):
        return AGD(self.net)  # no scheduler, and no gradient_clip_val in the trainer


def main(epochs=3):
    """Returns the loss of each step."""
    lightning.seed_everything(0, verbose=False)
    data, module = load("digits", None, 64, 180, torch.device("cpu")), Classifier()
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False,
                                enable_progress_bar=False, enable_checkpointing=False,
                                enable_model_summary=False)  # fmt: skip
    trainer.fit(module, data.train, data.test)
    return module.losses


if __name__ == "__main__":
    main()
