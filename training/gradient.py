"""The gradient of the mean loss over a batch, in micro-batches that fit, over all ranks."""

import math
import threading
from contextlib import nullcontext

import torch

from cli import UserError
from training.memory import is_out_of_memory, shortage
from training.metrics import hits


class OutOfMemory(UserError):
    """A batch does not fit into memory; the message says which flag helps."""

    exit_code = 1


class LoneImage(UserError):
    """Batch norm got a single value a channel; the message says which flags change that."""

    exit_code = 1


class CompileError(UserError):
    """torch.compile cannot work here; the message says why."""

    exit_code = 1


class Gradient:
    """The gradient of the mean loss over a batch, in micro-batches of at most `micro_bs` examples a
    rank. It alone knows that number: `requested` by the command, and as memory has allowed.

    Of several ranks (`world.size` > 1) `net` is a DistributedDataParallel, and the mean is over the
    examples of all ranks, which may hold different numbers of them, or none. Ranks communicate
    twice a batch: the number of examples first, the gradients in the last micro-batch.

    If a micro-batch does not fit in memory, `micro_bs` is halved for good and the batch starts
    again. Several ranks do so in their first two batches only, and never with `sync_bn`: they send
    these gradients after the last micro-batch, so no rank waits for another. A later batch that
    does not fit raises OutOfMemory, and so does a single example. Batch norm takes the statistics
    of each micro-batch, as it does of each rank.

    `compiled` is what torch.compile made of `net`: it takes the micro-batches of one size, that of
    a batch of `whole` examples (None: the first batch), and `net` takes the others, so that there
    is one compilation. `span("forward")` and `span("backward")` are contexts for a profile.
    """

    def __init__(
        self, net, loss_fn, world=None, micro_bs=None, sync_bn=False, compiled=None,
        span=nullcontext, whole=None,
    ):  # fmt: skip
        self.net, self.loss_fn, self.requested, self.micro_bs = net, loss_fn, micro_bs, micro_bs
        self.compiled, self.compiled_size, self.span = compiled, None, span
        self.world = world if world is not None and world.size > 1 else None
        self.sync_bn = sync_bn and self.world is not None
        self.whole, self.shortage = whole, ""
        self.trials = 2 if self.world is not None else 0
        self.norms = [m for m in net.modules() if isinstance(m, BATCH_NORMS)]
        if self.sync_bn:
            self.norms = []

    @property
    def lowered(self):
        """Whether memory has allowed fewer examples than requested."""
        return self.micro_bs != self.requested

    def resume(self, requested, allowed, tried):
        """Go on with the micro-batch that memory `allowed`, unless another one is requested now;
        `tried` batches have gone through on this hardware."""
        if requested == self.requested:
            self.micro_bs = allowed
        self.trials = max(0, self.trials - tried)

    def __call__(self, inputs, labels, share=None):
        """Fill the weights' .grad, which has to be None, from inputs (B, ...) and labels (B,).

        `share` is the largest B of any rank. Returns (losses (B,), their hits), detached.
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

        # Buffers change in a pass, too; by dtype, one kernel for many small tensors.
        buffers = {}
        for x in self.net.buffers() if self.world is None or self.trials else ():
            buffers.setdefault(x.dtype, []).append(x)
        before = {dtype: torch._foreach_mul(xs, 1) for dtype, xs in buffers.items()}
        while True:
            size = min(self.micro_bs or share, share)
            results = self._attempt(self.parts(inputs, labels, share), count, counted)
            too_large = float(size) if results is None else 0.0
            if self.trials:
                # Where it did not fit on one rank, all of them start again.
                largest = torch.full((), too_large, device=labels.device)
                self.world.all_reduce_max(largest)
                too_large = largest.item()
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
        return results

    def parts(self, inputs, labels, share=None):
        """The micro-batches [(inputs, labels)] of a batch; `share` as in a call."""
        share = max(share or len(labels), 1)
        passes = -(-share // min(self.micro_bs or share, share))
        parts = list(zip(inputs.tensor_split(passes), labels.tensor_split(passes)))
        if not self.sync_bn:  # which needs as many passes on every rank
            parts = [part for part in parts if len(part[1])] or parts[:1]
        return parts

    def _attempt(self, parts, count, counted):
        """(losses, hits), or None where a micro-batch did not fit."""
        results = []
        try:
            for i, (x, y) in enumerate(parts):
                last = i == len(parts) - 1 and not self.trials
                together = self.world is None or last
                with nullcontext() if together else self.net.no_sync():
                    results.append(self._pass(x, y, count, counted))
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
                    f"out of memory with {len(x)} examples at a time on a rank{shortage(error)}; "
                    f"start again with --micro_bs {max(1, len(x) // 2)}"
                ) from error
            self.shortage = shortage(error)
            return None
        if len(results) == 1:
            return results[0]
        return tuple(torch.cat(column) for column in zip(*results))

    def once(self, inputs, labels):
        """The same in a single pass of a single process, whether or not it fits, as a CUDA graph
        needs it."""
        return self._pass(inputs, labels, float(len(labels)))

    def _pass(self, x, y, count, counted=None):
        with self.span("forward"):
            losses, correct = self._forward(x, y)
            loss = losses.sum()
        if self.world is not None:
            counted()
            loss = loss * self.world.size  # DDP takes the mean over ranks
        with self.span("backward"):
            (loss / count).backward()
        return losses.detach(), correct

    def _forward(self, x, y):
        resting = self.norms if not len(y) else []  # no images, no statistics
        for norm in resting:
            norm.eval()
        try:
            outputs = self._outputs(x)
        finally:
            for norm in resting:
                norm.train()
        return self.loss_fn(outputs, y), hits(outputs, y)

    def _outputs(self, x):
        if self.compiled_size is None:
            whole = max(self.whole or len(x), 1)
            passes = -(-whole // min(self.micro_bs or whole, whole))
            self.compiled_size = -(-whole // passes)
        if self.compiled is None or len(x) != self.compiled_size:
            return self.net(x)
        try:
            return self.compiled(x)
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:
            raise _not_compiled(error) from error

    def _halve(self, size):
        if size <= 1:
            raise OutOfMemory(f"out of memory with a single example at a time{self.shortage}")
        self.micro_bs, self.compiled_size = math.ceil(size / 2), None
        free_memory()


def compile_network(net):
    """What torch.compile makes of `net`, for batches of one size. Raises CompileError."""
    try:
        return torch.compile(net, dynamic=False)
    except OSError as error:  # it makes a folder for its cache
        raise _not_compiled(error) from error


def _not_compiled(error):
    lines = [x for x in str(error).splitlines() if x.strip() and not x.endswith("raised:")]
    reason = lines[0] if lines else type(error).__name__
    folder = "; $TORCHINDUCTOR_CACHE_DIR and $TMPDIR name its folders" * isinstance(error, OSError)
    return CompileError(f"the network cannot be compiled here ({reason}{folder}); start again "
                        "without --compile")  # fmt: skip


# A process captures one CUDA graph at a time, and gives back no memory meanwhile.
RECORDING = threading.RLock()


def free_memory():
    """Return the GPU memory that torch has cached."""
    if torch.cuda.is_available():
        with RECORDING:
            torch.cuda.empty_cache()


BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
