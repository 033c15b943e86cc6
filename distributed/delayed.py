"""What the ranks agree on while they train, and what the host reads of a device, without a wait for
the step that is under way."""

from collections import deque

import torch

LAG = 4  # steps after which a GPU's are read: so far ahead is what the host has it do


class DelayedReads:
    """The values of 0-dim tensors of a device, in the order in which they were put, each read when
    `lag` others have been put after it. On a CPU they are there at once."""

    def __init__(self, device, lag=LAG):
        self.cuda = device.type == "cuda"
        self.lag, self.waiting, self.spare = lag if self.cuda else 0, deque(), []

    def put(self, tensor):
        """Returns the values that can be read by now."""
        if self.cuda:
            if self.spare:
                host, event = self.spare.pop()
            else:
                with torch.inference_mode(False):  # an evaluation's is used in training again
                    host = torch.empty((), dtype=tensor.dtype, pin_memory=True)
                event = torch.cuda.Event(blocking=True)  # a wait that leaves the core to others
            host.copy_(tensor, non_blocking=True)
            event.record()
            self.waiting.append((host, event))
        else:
            self.waiting.append((tensor, None))
        return self._read(self.lag)

    def rest(self):
        """The values that have not been read."""
        return self._read(0)

    def _read(self, left):
        values = []
        while len(self.waiting) > left:
            host, event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
                self.spare.append((host, event))
            values.append(host.item())
        return values


class DelayedMax:
    """The greatest of the ranks' votes, small whole numbers, which every rank gets in the same
    step: of one rank at once, of several a step or a few after they were cast."""

    def __init__(self, world):
        self.world, self.sent, self.later = world, deque(), DelayedReads(world.device)

    def cast(self, vote):
        """This rank's vote in this step; returns what has been agreed on by now, 0 for nothing."""
        if self.world.size == 1:
            return vote
        tensor = torch.full((), vote, dtype=torch.int32, device=self.world.device)
        self.sent.append((tensor, self.world.all_reduce_max_async(tensor)))
        values = []
        while len(self.sent) > 1:
            tensor, done = self.sent.popleft()
            done()
            values += self.later.put(tensor)
        return max(values, default=0)
