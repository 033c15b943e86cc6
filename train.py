"""The losses, one epoch of training, one evaluation, and the totals that both return."""

import math

import torch
import torch.nn.functional as F


def mse(outputs, labels):
    """Square loss of each example, (B,), in the AGD paper's normalisation.

    The target is one-hot times sqrt(C), the loss the mean over the C classes of the squared
    difference. outputs (B, C), labels (B,).
    """
    C = outputs.shape[1]
    onehot = (labels[:, None] == torch.arange(C, device=labels.device)).to(outputs.dtype)
    return (outputs - onehot * math.sqrt(C)).square().mean(1)


def xent(outputs, labels):
    """Cross-entropy of each example, (B,), in nats. outputs (B, C), labels (B,)."""
    return F.cross_entropy(outputs, labels, reduction="none")


LOSSES = {"mse": mse, "xent": xent}


class Totals:
    """Sums and counts of an epoch, a column a step, on the device until `read`."""

    def __init__(self):
        self.columns, self.etas = [], []

    def add(self, losses, outputs, labels, eta=None):
        """One batch: its losses (B,), outputs (B, C) and labels (B,)."""
        correct = (outputs.argmax(1) == labels).sum()
        self.columns.append((losses.detach().sum(), correct, labels.shape[0]))
        if eta is not None:
            self.etas.append(eta)

    def read(self, reduce=None):
        """The figures of the epoch, in one transfer from the device.

        `reduce` adds up a tensor over ranks, in place. Returns a dict: "loss" and "acc", the means
        over all examples; "examples", their number; "steps", a dict of lists with "loss", "acc" and
        "eta" of each step ("eta": None without AGD).
        """
        losses, correct, counts = zip(*self.columns)
        # One row a step. Float32 holds the counts of a batch exactly; the sums are in float64.
        table = torch.stack([torch.stack(losses), torch.stack(correct).to(losses[0])], 1)
        table = torch.cat([table, torch.tensor(counts).to(table)[:, None]], 1)
        if reduce is not None:
            reduce(table)
        if self.etas:
            table = torch.cat([table, torch.stack(self.etas).to(table)[:, None]], 1)
        loss, correct, counts, *eta = table.cpu().double().t().tolist()
        examples = round(sum(counts))
        return {
            "loss": sum(loss) / examples,
            "acc": round(sum(correct)) / examples,
            "examples": examples,
            "steps": {
                "loss": [x / n for x, n in zip(loss, counts)],
                "acc": [x / n for x, n in zip(correct, counts)],
                "eta": eta[0] if eta else None,
            },
        }


def train_epoch(net, batches, loss_fn, optimizer, reduce=None, size=1, on_step=None):
    """One epoch of `batches` (inputs, labels); returns its Totals. Reads nothing from the device.

    The gradient is that of the mean over the batch. Over `size` ranks whose gradients are averaged
    by DistributedDataParallel, `reduce` adds up a tensor over ranks in place, and the mean is that
    over the whole batch, however its examples lie on the ranks.
    """
    net.train()
    totals = Totals()
    agd = isinstance(getattr(optimizer, "eta", None), torch.Tensor)
    for inputs, labels in batches:
        outputs = net(inputs)
        losses = loss_fn(outputs, labels)
        examples = labels.shape[0]
        if size > 1:
            examples = torch.full((), float(examples), device=labels.device)
            reduce(examples)
            examples = examples / size
        (losses.sum() / examples).backward()
        optimizer.step()
        optimizer.zero_grad()
        totals.add(losses, outputs, labels, optimizer.eta if agd else None)
        if on_step is not None:
            on_step()
    return totals


@torch.inference_mode()
def evaluate(net, batches, loss_fn):
    """The Totals of `batches`, each example once, with the network in evaluation mode."""
    net.eval()
    totals = Totals()
    for inputs, labels in batches:
        outputs = net(inputs)
        totals.add(loss_fn(outputs, labels), outputs, labels)
    return totals
