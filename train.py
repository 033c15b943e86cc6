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
        self.columns, self.extras = [], {"eta": [], "update": []}

    def add(self, losses, outputs, labels, **extras):
        """One batch: its losses (B,), outputs (B, C) and labels (B,); of `extras`, scalars that
        are the same on every rank, "eta" and "update", those that are not None."""
        correct = (outputs.argmax(1) == labels).sum()
        self.columns.append((losses.detach().sum(), correct, labels.shape[0]))
        for key, value in extras.items():
            if value is not None:
                self.extras[key].append(value)

    def read(self, reduce=None):
        """The figures of the epoch, in one transfer from the device.

        `reduce` adds up a tensor over ranks, in place. Returns a dict: "loss" and "acc", the means
        over all examples; "examples", their number; "steps", a dict of lists with "loss", "acc",
        "eta" and "update" of each step (the last two None where they were not measured).
        """
        losses, correct, counts = zip(*self.columns)
        # One row a step. Float32 holds the counts of a batch exactly; the sums are in float64.
        table = torch.stack([torch.stack(losses), torch.stack(correct).to(losses[0])], 1)
        table = torch.cat([table, torch.tensor(counts).to(table)[:, None]], 1)
        if reduce is not None:
            reduce(table)
        measured = [key for key, values in self.extras.items() if values]
        columns = [torch.stack(self.extras[key]).to(table)[:, None] for key in measured]
        table = torch.cat([table, *columns], 1)
        loss, correct, counts, *extras = table.cpu().double().t().tolist()
        extras = dict(zip(measured, extras))
        examples = round(sum(counts))
        return {
            "loss": sum(loss) / examples,
            "acc": round(sum(correct)) / examples,
            "examples": examples,
            "steps": {
                "loss": [x / n for x, n in zip(loss, counts)],
                "acc": [x / n for x, n in zip(correct, counts)],
                "eta": extras.get("eta"),
                "update": extras.get("update"),
            },
        }


def relative_update(before, after):
    """The mean over layers of |dW|_F / |W|_F, a 0-dim tensor; W is `before`, which is overwritten.

    Lists of weights of one device. A layer of zeros that has moved makes it infinite.
    """
    sizes = torch._foreach_norm(before)
    torch._foreach_sub_(before, after)
    return torch.stack(torch._foreach_div(torch._foreach_norm(before), sizes)).mean()


def train_epoch(
    net, batches, loss_fn, optimizer, reduce=None, size=1, on_step=None, log_updates=False
):
    """One epoch of `batches` (inputs, labels); returns its Totals. Reads nothing from the device.

    The gradient is that of the mean over the batch. Over `size` ranks whose gradients are averaged
    by DistributedDataParallel, `reduce` adds up a tensor over ranks in place, and the mean is that
    over the whole batch, however its examples lie on the ranks.

    `log_updates` measures the relative update of each step, at the price of a copy of the weights.
    An optimiser that trains other weights than it answers with (`train` and `eval`, as the
    schedule-free ones have) answers when this returns; batch-norm statistics stay those of the
    weights that it trained.
    """
    net.train()
    if hasattr(optimizer, "train"):
        optimizer.train()
    totals, update = Totals(), None
    weights = [p.detach() for p in net.parameters()]
    before = [torch.empty_like(p) for p in weights] if log_updates else []
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
        if log_updates:
            torch._foreach_copy_(before, weights)
        optimizer.step()
        if log_updates:
            update = relative_update(before, weights)
        optimizer.zero_grad()
        totals.add(losses, outputs, labels, eta=optimizer.eta if agd else None, update=update)
        if on_step is not None:
            on_step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
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
