"""The gradient of the mean loss over a batch: in passes that fit, over any number of ranks."""

import math
import threading
from contextlib import nullcontext

import torch

from cli import UserError


class OutOfMemory(UserError):
    """A batch does not fit, and nothing can be done about it here; the message says what can."""

    exit_code = 1


class LoneImage(UserError):
    """A single image at a time, where batch norm has no other number; the message says what to do.
    """

    exit_code = 1


class CompileError(UserError):
    """torch.compile cannot work here; the message says why."""

    exit_code = 1


class Gradient:
    """The gradient of the mean loss over a batch, in passes of at most `micro_bs` images a rank.

    `world` has the ranks' `size` and their `sum`, `sum_later` and `most`; with more than one, `net`
    is a DistributedDataParallel, and the mean is that over the images of all the ranks, however
    many each of them holds, none included. But for their number, nothing is sent before the last of
    the passes.

    Where a batch does not fit in memory, `micro_bs` is halved for good (`lowered`), and the same
    batch goes
    through again; with several ranks in the first two batches only, in which the gradients are sent
    after all the passes, so that no rank waits for one that starts again. A later batch that does
    not fit raises OutOfMemory, and so does a single image. Batch-norm statistics are those of each
    pass, as they are of each rank.

    `compiled` is what torch.compile made of `net`: it takes the first pass of a batch of `whole`
    images (None: of the first batch) and those of its size, and `net` itself the others, so that
    there is one compilation. `span("forward")` and `span("backward")` are contexts around the two,
    for a profile. `tried`: the batches of this run that went through before it was broken.
    """

    def __init__(
        self, net, loss_fn, world=None, micro_bs=None, sync_bn=False, compiled=None,
        span=nullcontext, whole=None, tried=0,
    ):  # fmt: skip
        self.net, self.loss_fn, self.micro_bs = net, loss_fn, micro_bs
        self.compiled, self.compiled_size, self.span = compiled, None, span
        self.world = world if world is not None and world.size > 1 else None
        self.sync_bn = sync_bn and self.world is not None
        self.whole, self.lowered = whole, False
        self.trials = max(0, 2 - tried) if self.world is not None else 0
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
            done = self.world.all_reduce_async(count)

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
            found = self._attempt(self.parts(inputs, labels, share), count, counted)
            too_large = float(size) if found is None else 0.0
            if self.trials:
                # One that did not fit, on any rank, has all of them start again.
                vote = torch.full((), too_large, device=labels.device)
                self.world.all_reduce_max(vote)
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
                    self.world.all_reduce(p.grad)
                    p.grad /= self.world.size
        return found

    def parts(self, inputs, labels, share=None):
        """The [(inputs, labels)] of the passes of a batch; `share` as of a call."""
        share = max(share or len(labels), 1)
        passes = -(-share // min(self.micro_bs or share, share))
        parts = list(zip(inputs.tensor_split(passes), labels.tensor_split(passes)))
        if not self.sync_bn:  # which needs as many passes on every rank
            parts = [part for part in parts if len(part[1])] or parts[:1]
        return parts

    def _attempt(self, parts, count, counted):
        """What a call returns, or None where it did not fit."""
        found = []
        try:
            for i, (x, y) in enumerate(parts):
                last = i == len(parts) - 1 and not self.trials
                together = self.world is None or last
                with nullcontext() if together else self.net.no_sync():
                    found.append(self._pass(x, y, count, counted))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise LoneImage(
                "batch norm needs more than one image at a time where its inputs are 1×1: another "
                "--train_bs, which leaves no single image over (--train_examples, --micro_bs and "
                "the number of ranks count, too), or larger images"
            ) from error
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if self.world is not None and (self.sync_bn or not self.trials):
                raise OutOfMemory(
                    f"out of memory with {len(x)} images at a time on a rank; start again with "
                    f"--micro_bs {max(1, len(x) // 2)}"
                ) from error
            return None
        return found[0] if len(found) == 1 else tuple(torch.cat(column) for column in zip(*found))

    def once(self, inputs, labels):
        """The same in a single pass of a single process, whether or not it fits: what a CUDA graph
        can hold."""
        return self._pass(inputs, labels, float(len(labels)))

    def _pass(self, x, y, count, counted=None):
        with self.span("forward"):
            losses, outputs = self._forward(x, y)
            loss = losses.sum()
        if self.world is not None:
            counted()
            loss = loss * self.world.size  # of whose gradients the mean is taken
        with self.span("backward"):
            (loss / count).backward()
        return losses.detach(), outputs.detach()

    def _forward(self, x, y):
        resting = self.norms if not len(y) else []  # no images, no statistics
        for norm in resting:
            norm.eval()
        try:
            outputs = self._outputs(x)
        finally:
            for norm in resting:
                norm.train()
        return self.loss_fn(outputs, y), outputs

    def _outputs(self, x):
        if self.compiled_size is None:
            whole = self.whole or len(x)
            passes = -(-whole // min(self.micro_bs or whole, whole))
            self.compiled_size = -(-whole // passes)
        if self.compiled is None or len(x) != self.compiled_size:
            return self.net(x)
        try:
            return self.compiled(x)
        except torch._dynamo.exc.TorchDynamoException as error:
            lines = [x for x in str(error).splitlines() if x.strip() and not x.endswith("raised:")]
            reason = lines[0] if lines else type(error).__name__
            raise CompileError(
                f"the network cannot be compiled here ({reason}); start again without --compile"
            ) from error

    def _halve(self, size):
        if size <= 1:
            raise OutOfMemory("out of memory with a single image at a time")
        self.micro_bs, self.lowered, self.compiled_size = math.ceil(size / 2), True, None
        free_memory()


# CUDA records one graph at a time in a process, and gives no memory back meanwhile.
RECORDING = threading.RLock()


def free_memory():
    """Give back what torch keeps of a GPU's memory for later."""
    if torch.cuda.is_available():
        with RECORDING:
            torch.cuda.empty_cache()


BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
NO_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED",
    "unable to find an engine",  # cuDNN, where no algorithm's workspace fits
)  # fmt: skip


def is_out_of_memory(error):
    """Whether a RuntimeError of torch says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(x in str(error) for x in NO_MEMORY)
