"""AGD in Lightning, with η as `lr` in the logger, and the average of SpectralAGD in validation and
checkpoints: `python -m examples.lightning_digits`.

Needs `pip install lightning`. 99 % of the test digits after some seconds on a CPU.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import itertools
import logging
import tempfile
import warnings

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agd import SpectralAGD, recalibrate
from data import load


class LogEta(lightning.Callback):
    """Logs η of AGD as `lr`, of several optimisers as `lr-0`, `lr-1`, ..., in each of the trainer's
    `log_every_n_steps` steps: a number of a GPU is not read in the others.

    LearningRateMonitor, which may stand beside it, logs the gain, 1, as `lr-AGD`.
    """

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        etas = [x.eta for x in trainer.optimizers if hasattr(x, "eta")]
        for i, eta in enumerate(etas):
            module.log(f"lr-{i}" if len(etas) > 1 else "lr", eta)


class Average(lightning.Callback):
    """Has the network hold SpectralAGD's average in validation, in the checkpoints after it, and
    when training is over.

    ModelCheckpoint saves after the validation, and after the on_validation_end of other callbacks:
    so the weights to train come back with the next batch of training, not there.
    """

    def on_validation_start(self, trainer, module):
        averaging = [x for x in trainer.optimizers if isinstance(x, SpectralAGD)]
        for optimizer in averaging:
            optimizer.eval()
        if averaging and not trainer.sanity_checking:  # with batch norm
            recalibrate(module.net, itertools.islice(trainer.train_dataloader, 8))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, SpectralAGD):
                optimizer.train()


class Classifier(lightning.LightningModule):
    def __init__(self, rule=SpectralAGD):
        super().__init__()
        self.rule = rule
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 16, 10),
        )  # fmt: skip

    def training_step(self, batch):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch):
        accuracy = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", accuracy, sync_dist=True)  # a mean over the GPUs

    def configure_optimizers(self):
        return self.rule(self.net)  # no scheduler, and no gradient_clip_val in the trainer


class Print(lightning.Callback):
    def on_train_epoch_end(self, trainer, module):
        print("epoch {}: loss {loss:.3f}, test accuracy {accuracy:.1%}, eta {lr:.3f}".format(
            trainer.current_epoch + 1, **trainer.callback_metrics))  # fmt: skip


def main(epochs=5, rule=SpectralAGD, folder=None):
    """Leaves metrics.csv and the checkpoint, last.ckpt, in `folder`. Returns the trainer."""
    lightning.seed_everything(0, verbose=False)
    data = load("digits", None, 1437, 360, torch.device("cpu"))  # all images in one batch
    train, test = (TensorDataset(*next(iter(part))) for part in (data.train, data.test))
    module = Classifier(rule)
    with tempfile.TemporaryDirectory() as own:
        folder = folder or own
        saver = ModelCheckpoint(folder, "last", enable_version_counter=False)
        trainer = lightning.Trainer(
            max_epochs=epochs, log_every_n_steps=10,
            accelerator="cpu",  # these few images; without it on GPUs
            logger=CSVLogger(folder, name=None, version=""), enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[LogEta(), Average(), Print(), saver],
        )  # fmt: skip
        trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True, drop_last=True),
                    DataLoader(test, batch_size=360))  # fmt: skip
    return trainer


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no remarks
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
