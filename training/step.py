"""One step of training, from a batch to new weights; an evaluation."""

import torch

import agd
from training.gradient import Gradient, OutOfMemory, free_memory
from training.memory import is_out_of_memory, shortage
from training.metrics import Totals, hits, relative_update


class Step:
    """One step of training, from a batch to new weights. Reads nothing from the device, except in
    the first two batches of several ranks, which agree on the micro-batch that fits.

    `gradient` is the Gradient of `net` and `loss_fn`; None makes one, of a single process and whole
    batches. `log_updates` measures the relative update, at the price of a copy of the weights.
    """

    def __init__(self, net, loss_fn, optimizer, gradient=None, log_updates=False):
        self.net, self.optimizer = net, optimizer
        self.gradient = gradient or Gradient(net, loss_fn)
        self.span = self.gradient.span
        # Without biases and gains: those that start at zero have no relative update.
        trained = [p for p in net.parameters() if p.requires_grad]
        self.weights = [p.detach() for p in trained if p.ndim > 1] or [p.detach() for p in trained]
        self.before = [torch.empty_like(p) for p in self.weights] if log_updates else None
        self.automatic = isinstance(optimizer, agd.AGD)

    def __call__(self, inputs, labels, share=None):
        """Take a step with inputs (B, ...) and labels (B,); of several ranks, `share` is the
        largest B. Returns (losses (B,), their hits, {"eta": ..., "update": ...}), the last two
        0-dim tensors, None where they are not measured."""
        return self._update(*self.gradient(inputs, labels, share))

    def once(self, inputs, labels):
        """Take a step in a single pass, whether or not it fits: one that a CUDA graph can hold."""
        return self._update(*self.gradient.once(inputs, labels))

    def _update(self, losses, correct):
        update = None
        with self.span("optimiser"):
            if self.before is not None:
                torch._foreach_copy_(self.before, self.weights)
            self.optimizer.step()
            if self.before is not None:
                update = relative_update(self.before, self.weights)
            self.optimizer.zero_grad()
        eta = self.optimizer.eta if self.automatic else None
        return losses, correct, {"eta": eta, "update": update}


def take_steps(step, batches, totals):
    """Take a step with each batch, add it to `totals`, and yield its eta (None of a baseline)."""
    iterator = iter(batches)
    while True:
        with step.span("data"):
            batch = next(iterator, None)
        if batch is None:
            return
        inputs, labels = batch
        losses, correct, extras = step(inputs, labels, largest_share(batches))
        with step.span("sums"):
            totals.add(losses, correct, **extras)
        yield extras["eta"]


def train_epoch(net, batches, loss_fn, optimizer, log_updates=False):
    """Train one epoch of `batches` (inputs, labels) in a single process, without a Trainer: for
    scripts. Returns its Totals.

    An optimiser with `train` and `eval`, as SpectralAGD and the schedule-free ones, shows the
    weights of its answer when this returns; batch-norm statistics stay those of training.
    """
    totals = Totals()
    set_training(net, optimizer)
    for _ in take_steps(Step(net, loss_fn, optimizer, log_updates=log_updates), batches, totals):
        pass
    show_average(optimizer)
    return totals


def set_training(net, optimizer):
    """Put the network and an optimiser that has modes into training mode."""
    net.train()
    if hasattr(optimizer, "train"):
        optimizer.train()


def show_average(optimizer):
    """Have an optimiser that has modes put the weights to evaluate into the network."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()


def largest_share(batches):
    """The most examples of the last batch that any rank has; None of batches that cannot tell."""
    if not hasattr(batches, "batch_size"):
        return None
    before = (batches.position - 1) * batches.batch_size
    examples = min(batches.batch_size, batches.examples - before)
    return -(-examples // batches.size)


@torch.inference_mode()
def evaluate(net, batches, loss_fn, micro_bs=None, on_batch=None):
    """The Totals of `batches`, each example once, with the network in evaluation mode; at most
    `micro_bs` of them at a time, and fewer where memory runs out. Calls on_batch() after each."""
    net.eval()
    totals = Totals()
    for inputs, labels in batches:
        results = None
        while results is None:
            size = min(micro_bs or len(labels), len(labels))
            pairs = zip(inputs.split(max(size, 1)), labels.split(max(size, 1)))
            try:
                parts = [_judged(net(x), y, loss_fn) for x, y in pairs]
                results = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size <= 1:
                    raise OutOfMemory(
                        f"out of memory in testing with a single example{shortage(error)}"
                    ) from error
                micro_bs = -(-size // 2)
            if results is None:  # the error, and the memory that it kept, are gone by now
                parts = None
                free_memory()
        totals.add(*results)
        if on_batch is not None:
            on_batch()
    return totals


def _judged(outputs, labels, loss_fn):
    return loss_fn(outputs, labels), hits(outputs, labels)
