"""The losses, one epoch of training, one evaluation, and their totals."""

import math

import torch
import torch.nn.functional as F

from gradient import Gradient, OutOfMemory, is_out_of_memory


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
        """The figures of the epoch, in two transfers from the device.

        `reduce` adds up a tensor over ranks, in place. Returns a dict: "loss" and "acc", the means
        over all examples; "examples", their number; "steps", a dict of lists with "loss", "acc",
        "eta" and "update" of each step (the last two None where they were not measured).
        """
        losses, correct, counts = zip(*self.columns)
        # One row a step; counts are integers all the way.
        sums, correct = torch.stack(losses), torch.stack(correct)
        counts = torch.stack([correct, torch.tensor(counts).to(correct)])
        if reduce is not None:
            reduce(sums)
            reduce(counts)
        measured = [key for key, values in self.extras.items() if values]
        columns = [torch.stack(self.extras[key]).to(sums) for key in measured]
        loss, *extras = torch.stack([sums, *columns]).cpu().double().tolist()
        correct, counts = counts.tolist()
        extras, examples = dict(zip(measured, extras)), sum(counts)
        return {
            "loss": sum(loss) / max(examples, 1),
            "acc": sum(correct) / max(examples, 1),
            "examples": examples,
            "steps": {
                "loss": [x / max(n, 1) for x, n in zip(loss, counts)],
                "acc": [x / max(n, 1) for x, n in zip(correct, counts)],
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
    net, batches, loss_fn, optimizer, gradient=None, on_step=None, log_updates=False
):  # fmt: skip
    """One epoch of `batches` (inputs, labels); returns its Totals. Reads nothing from the device,
    but for the first two batches of several ranks, in which they agree on what fits.

    `gradient` is the Gradient of `net` and `loss_fn`; None makes one, of a single process and whole
    batches. Over several ranks each has its share of every batch, none included.

    `log_updates` measures the relative update of each step, at the price of a copy of the weights.
    An optimiser that trains other weights than it answers with (`train` and `eval`, as the
    schedule-free ones have) answers when this returns; batch-norm statistics stay those of the
    weights that it trained.
    """
    net.train()
    if hasattr(optimizer, "train"):
        optimizer.train()
    gradient = gradient or Gradient(net, loss_fn)
    totals, update = Totals(), None
    weights = [p.detach() for p in net.parameters()]
    before = [torch.empty_like(p) for p in weights] if log_updates else []
    agd = isinstance(getattr(optimizer, "eta", None), torch.Tensor)
    for i, (inputs, labels) in enumerate(batches):
        losses, outputs = gradient(inputs, labels, largest_share(batches, i))
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


def largest_share(batches, i):
    """The most images of batch `i` that any rank has, where `batches` tells, else None."""
    if not hasattr(batches, "batch_size"):
        return None
    images = min(batches.batch_size, batches.examples - i * batches.batch_size)
    return -(-images // batches.size)


@torch.inference_mode()
def evaluate(net, batches, loss_fn, micro_bs=None):
    """The Totals of `batches`, each example once, with the network in evaluation mode; at most
    `micro_bs` images at a time."""
    net.eval()
    totals = Totals()
    for inputs, labels in batches:
        try:
            outputs = torch.cat([net(x) for x in inputs.split(micro_bs or max(len(labels), 1))])
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise OutOfMemory("out of memory in testing: a smaller --test_bs") from error
            raise
        totals.add(loss_fn(outputs, labels), outputs, labels)
    return totals
