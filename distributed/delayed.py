"""Values of a device, and maxima over ranks, that the host gets without a wait for this step."""

from collections import deque

import torch

LAG = 4  # steps by which the host is ahead of a GPU


class DelayedReads:
    """The values of 0-dim tensors in the order of `put`, each read when `lag` others have followed.
    On a CPU they are there at once."""

    def __init__(self, device, lag=LAG):
        self.cuda = device.type == "cuda"
        self.lag, self.waiting, self.spare = lag if self.cuda else 0, deque(), []

    def put(self, tensor):
        """Returns the values that can be read by now."""
        event = None
        if self.cuda:
            if self.spare:
                host, event = self.spare.pop()
            else:
                with torch.inference_mode(False):  # training reuses what an evaluation has made
                    host = torch.empty((), dtype=tensor.dtype, pin_memory=True)
                event = torch.cuda.Event(blocking=True)  # a wait that leaves the core to others
            tensor = host.copy_(tensor, non_blocking=True)
            event.record()
        self.waiting.append((tensor, event))
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


class Glance:
    """The values of a small tensor on the host some time after they were asked for: nobody waits.
    On a CPU they are there at once."""

    def __init__(self, device):
        self.cuda, self.asked, self.host, self.event = device.type == "cuda", False, None, None

    def ask(self, tensor):
        """Begin to copy `tensor`, of the same shape and type each time, unless a copy is on its
        way."""
        if self.asked:
            return
        self.asked = True
        if not self.cuda:
            self.host = tensor
            return
        if self.host is None:
            with torch.inference_mode(False):
                self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.event = torch.cuda.Event()
        self.host.copy_(tensor, non_blocking=True)
        self.event.record()

    def answer(self):
        """The values as a list, once; None while there are no new ones."""
        if not self.asked or self.cuda and not self.event.query():
            return None
        self.asked = False
        return self.host.tolist()


class DelayedMax:
    """The maximum of the ranks' small whole numbers, which every rank gets in the same step:
    with one rank at once, with several a step or a few later."""

    def __init__(self, world):
        self.world, self.sent, self.later = world, deque(), DelayedReads(world.device)

    def cast(self, vote):
        """Vote in this step; returns the maximum that is known by now, 0 for nothing."""
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
