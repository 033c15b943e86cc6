"""One step of training, an epoch of steps, an evaluation."""


import torch

from training.gradient import Gradient, OutOfMemory, free_memory, is_out_of_memory
from training.metrics import Totals, relative_update


class Step:
    """One step of training, from a batch to new weights. Reads nothing from the device, but for the
    first two batches of several ranks, in which they agree on what fits.

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
        self.agd = isinstance(getattr(optimizer, "eta", None), torch.Tensor)

    def __call__(self, inputs, labels, share=None):
        """One step with inputs (B, ...) and labels (B,); of several ranks, `share` is the largest
        B. Returns (losses (B,), outputs (B, C), {"eta": ..., "update": ...}), the last two 0-dim
        tensors, None where they are not measured."""
        return self._update(*self.gradient(inputs, labels, share))

    def once(self, inputs, labels):
        """The same in a single pass, whether or not it fits: what a CUDA graph can hold."""
        return self._update(*self.gradient.once(inputs, labels))

    def _update(self, losses, outputs):
        update = None
        with self.span("optimiser"):
            if self.before is not None:
                torch._foreach_copy_(self.before, self.weights)
            self.optimizer.step()
            if self.before is not None:
                update = relative_update(self.before, self.weights)
            self.optimizer.zero_grad()
        eta = self.optimizer.eta if self.agd else None
        return losses, outputs, {"eta": eta, "update": update}


def train_epoch(
    net, batches, loss_fn, optimizer, gradient=None, on_step=None, log_updates=False, replay=None,
    totals=None,
):  # fmt: skip
    """One epoch of `batches` (inputs, labels); returns its Totals, which are `totals` of what came
    before the batches, where they begin later. Over several ranks each has its share of every
    batch, none included. See Step for the rest of the arguments, and for what is read from the
    device; `replay` is a GraphedSteps of such steps, which then takes them.

    After each step on_step(eta, so_far) is called: eta of the step, None for a baseline, and a
    function that gives the Totals up to it.

    An optimiser that trains other weights than it answers with (`train` and `eval`, as the
    schedule-free ones have) answers when this returns; batch-norm statistics stay those of the
    weights that it trained.
    """
    net.train()
    if hasattr(optimizer, "train"):
        optimizer.train()
    totals = totals or Totals()
    if replay is not None:
        totals = replay.epoch(on_step, totals)
    else:
        step = Step(net, loss_fn, optimizer, gradient, log_updates)
        for inputs, labels in spanned(batches, step.span):
            losses, outputs, extras = step(inputs, labels, largest_share(batches))
            with step.span("sums"):
                totals.add(losses, outputs, labels, **extras)
            if on_step is not None:
                on_step(extras["eta"], lambda: totals)
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return totals


def spanned(batches, span):
    """`batches`, each made within span("data")."""
    batches = iter(batches)
    while True:
        with span("data"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def largest_share(batches):
    """The most images of the last batch that any rank has, where `batches` tells, else None."""
    if not hasattr(batches, "batch_size"):
        return None
    before = (batches.position - 1) * batches.batch_size
    images = min(batches.batch_size, batches.examples - before)
    return -(-images // batches.size)


@torch.inference_mode()
def evaluate(net, batches, loss_fn, micro_bs=None, on_batch=None):
    """The Totals of `batches`, each example once, with the network in evaluation mode; at most
    `micro_bs` images at a time, and fewer where memory runs out. After each batch on_batch() is
    called."""
    net.eval()
    totals = Totals()
    for inputs, labels in batches:
        outputs = None
        while outputs is None:
            size = min(micro_bs or len(labels), len(labels))
            try:
                parts = [net(x) for x in inputs.split(max(size, 1))]
                outputs = parts[0] if len(parts) == 1 else torch.cat(parts)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size <= 1:
                    raise OutOfMemory("out of memory in testing with a single image") from error
                micro_bs = -(-size // 2)
            if outputs is None:  # the error, and what it held, are gone by now
                parts = None
                free_memory()
        totals.add(loss_fn(outputs, labels), outputs, labels)
        if on_batch is not None:
            on_batch()
    return totals
