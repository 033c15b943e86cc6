"""The losses, the gradient of a batch, one epoch of training, one evaluation, and their totals."""

import math
from contextlib import nullcontext

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


class OutOfMemory(RuntimeError):
    """A batch does not fit, and nothing can be done about it here; the message says what can."""


class Gradient:
    """The gradient of the mean loss over a batch, in passes of at most `micro_bs` images a rank.

    `world` has the ranks' `size` and their `sum`, `sum_later` and `most`; with more than one, `net`
    is a DistributedDataParallel, and the mean is that over the images of all the ranks, however
    many each of them holds, none included. But for their number, nothing is sent before the last of
    the passes.

    Where a batch does not fit in memory, `micro_bs` is halved for good, and the same batch goes
    through again; with several ranks in the first two batches only, in which the gradients are sent
    after all the passes, so that no rank waits for one that starts again. A later batch that does
    not fit raises OutOfMemory, and so does a single image. Batch-norm statistics are those of each
    pass, as they are of each rank.
    """

    def __init__(self, net, loss_fn, world=None, micro_bs=None, sync_bn=False):
        self.net, self.loss_fn, self.micro_bs = net, loss_fn, micro_bs
        self.world = world if world is not None and world.size > 1 else None
        self.sync_bn = sync_bn and self.world is not None
        self.trials = 2 if self.world is not None else 0
        self.norms = [m for m in net.modules() if isinstance(m, BATCH_NORMS)]
        if self.sync_bn:
            self.norms = []

    def __call__(self, inputs, labels, share=None):
        """Fill the weights' .grad, which has to be None, from inputs (B, ...) and labels (B,).

        `share` is the largest B of any rank. Returns (losses (B,), outputs (B, C)), detached.
        """
        share = max(share or len(labels), 1)
        count, counted = float(len(labels)), None
        if self.world is not None:
            count = torch.full((), count, device=labels.device)
            done = self.world.sum_later(count)

            def counted():
                nonlocal done
                if done is not None:
                    done()
                    count.clamp_(min=1)  # no rank may have an image that can be read
                    done = None
        # What a pass changes beside the gradient, by dtype: one kernel for many small tensors.
        buffers = {}
        for x in self.net.buffers() if self.world is None or self.trials else ():
            buffers.setdefault(x.dtype, []).append(x)
        before = {dtype: torch._foreach_mul(xs, 1) for dtype, xs in buffers.items()}
        while True:
            size = min(self.micro_bs or share, share)
            passes = -(-share // size)
            found = self._attempt(inputs, labels, passes, count, counted)
            too_large = float(size) if found is None else 0.0
            if self.trials:
                # One that did not fit, on any rank, has all of them start again.
                vote = torch.full((), too_large, device=labels.device)
                self.world.most(vote)
                too_large = vote.item()
            if not too_large:
                break
            self._halve(too_large)
            for p in self.net.parameters():
                p.grad = None
            for dtype, xs in buffers.items():
                torch._foreach_copy_(xs, before[dtype])
        if self.trials:
            self.trials -= 1
            for p in self.net.parameters():
                if p.grad is not None:
                    self.world.sum(p.grad)
                    p.grad /= self.world.size
        return found

    def _attempt(self, inputs, labels, passes, count, counted):
        """What a call returns, or None where it did not fit."""
        parts = list(zip(inputs.tensor_split(passes), labels.tensor_split(passes)))
        if not self.sync_bn:  # which needs as many passes on every rank
            parts = [part for part in parts if len(part[1])] or parts[:1]
        found = []
        try:
            for i, (x, y) in enumerate(parts):
                last = i == len(parts) - 1 and not self.trials
                together = self.world is None or last
                with nullcontext() if together else self.net.no_sync():
                    losses, outputs = self._forward(x, y)
                    loss = losses.sum()
                    if self.world is not None:
                        counted()
                        loss = loss * self.world.size  # of whose gradients the mean is taken
                    (loss / count).backward()
                found.append((losses.detach(), outputs.detach()))
                del losses, outputs
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if self.world is not None and (self.sync_bn or not self.trials):
                raise OutOfMemory(
                    f"out of memory with {len(x)} images at a time on a rank; start again with "
                    f"--micro_bs {max(1, len(x) // 2)}"
                ) from error
            return None
        return tuple(torch.cat(column) for column in zip(*found))

    def _forward(self, x, y):
        resting = self.norms if not len(y) else []  # no images, no statistics
        for norm in resting:
            norm.eval()
        try:
            outputs = self.net(x)
        finally:
            for norm in resting:
                norm.train()
        return self.loss_fn(outputs, y), outputs

    def _halve(self, size):
        if size <= 1:
            raise OutOfMemory("out of memory with a single image at a time")
        self.micro_bs = math.ceil(size / 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error):
    """Whether a RuntimeError of torch says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(x in str(error) for x in NO_MEMORY)


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
