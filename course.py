"""How far a run is: when a checkpoint is written, what is in it, and when the run has to end."""

import json
import time
from collections import deque

import torch

from distributed.queue import in_a_job, requeue
from distributed.votes import Later, Votes
from interrupt import ANNOUNCED, NOTHING, SAVE, STOP
from run import RunError
from train import Totals

IN_A_ROW = 20  # steps without a finite gradient after which a run ends


class Ended(Exception):
    """All the ranks of a run end here, as they have agreed.

    `reason` is "interrupted", "requeued" or a sentence; with `final`, the same command would come
    no further; `facts` go into the last row of the log.
    """

    def __init__(self, reason, final=False, **facts):
        super().__init__(reason)
        self.reason, self.final, self.facts = reason, final, facts


class Course:
    """The place of a run in its epochs. `epoch` counts those that are whole; of the next one,
    `step` counts the batches that have gone through.

    The state after a step is a function of the seed and of that step's number: nothing else is
    kept from batch to batch but what a checkpoint has, so that a run which goes on from one is, on
    the same hardware, to the bit the run that was never broken.

    Args:
        run: the Run, of the first rank; None for the others, who take part in every call.
        requests: the interrupt.Requests of this process.
        every: ("steps", n) or ("seconds", s) between two checkpoints, beside one an epoch.
        note: a function that shows a line of text.
    """

    def __init__(self, world, run, data, net, optimizer, loss_fn, requests, every, note):
        self.world, self.run, self.data, self.loss_fn = world, run, data, loss_fn
        self.net, self.optimizer, self.requests, self.note = net, optimizer, requests, note
        self.gradient = None  # which the run makes once it knows what a checkpoint says
        kind, least = every
        self.steps = least if kind == "steps" else None
        self.seconds = least if kind == "seconds" else None
        self.epoch = self.step = self.missing = 0
        self.totals, self.before, self.micro_bs, self.tried = None, 0.0, None, 0
        self.votes, self.etas, self.places = Votes(world), Later(world.device), deque()
        self.not_finite = []  # (epoch, step) of the last steps in a row without a finite gradient
        self.so_far = self.seconds_before = None  # set as an epoch goes on
        self.failure, self.saving = None, 0.0  # why the last checkpoint failed; seconds for all
        self.saved_at = self.began = time.monotonic()
        self.here = [world.size, str(world.device.type), torch.__version__]

    def restore(self, checkpoint):
        """Go on from a checkpoint; RunError where it does not fit this network."""
        now, then = self.net.state_dict(), checkpoint["net"]
        try:
            for name in sorted(set(now) ^ set(then)):
                raise ValueError(f"{name} is in one of them alone")
            for name, x in now.items():
                if x.shape != then[name].shape or x.dtype != then[name].dtype:
                    raise ValueError(f"{name} is {_kind(then[name])} there, and {_kind(x)} here")
            self.net.load_state_dict(then)
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.epoch, self.step = checkpoint["epoch"], checkpoint.get("step", 0)
            self.missing = int(checkpoint.get("missing", 0))
            self.before = float(checkpoint.get("seconds", 0.0))
            self.not_finite = [tuple(place) for place in checkpoint.get("not_finite", [])]
            self.micro_bs = checkpoint.get("micro_bs")
            if self.micro_bs is not None and not (type(self.micro_bs) is int and self.micro_bs > 0):
                raise ValueError("micro_bs is no number of images")
            state, steps = checkpoint.get("totals"), len(self.data.train)
            if self.step > steps or (self.step > 0) != (state is not None):
                raise ValueError(f"step {self.step} of {steps}")
            if state is not None and len({len(column) for column in state.values()}) != 1:
                raise ValueError("its totals are of different lengths")
            if checkpoint.get("here") == self.here:
                self.tried = self.epoch * steps + self.step
            if state is not None:
                if self.world.rank:  # the sums over the ranks are the first one's
                    state = {**state, "losses": torch.zeros_like(state["losses"]),
                             "correct": torch.zeros_like(state["correct"]),
                             "counts": [0] * len(state["counts"])}  # fmt: skip
                self.totals = Totals(state, self.world.device)
            if "generator" in checkpoint:
                torch.set_rng_state(checkpoint["generator"])
            for part, paths in zip(self.data[:2], json.loads(checkpoint.get("bad_images", "[]"))):
                if paths:
                    part.bad_images.update(paths)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError,
                OverflowError) as error:  # fmt: skip
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunError(
                f"the checkpoint is of another network or optimiser ({reason}); --fresh starts over"
            ) from error

    def begin(self, epoch):
        """Set the training data to an epoch, or to what is left of it; returns the Totals of what
        has gone through, None at its start."""
        if epoch != self.epoch + 1:
            raise ValueError(f"epoch {epoch} after epoch {self.epoch}")
        self.data.train.set_epoch(epoch, self.step)
        self.began = time.monotonic()
        return self.totals

    def after_step(self, eta, so_far):
        """To be called after every step; raises Ended."""
        self.step, self.so_far = self.data.train.position, so_far
        if eta is not None:
            self.places.append((self.epoch + 1, self.step))
            self._count(self.etas.put(eta))
        step = self.epoch * len(self.data.train) + self.step
        self._decide(SAVE if self.steps and step % self.steps == 0 else NOTHING)

    def after_epoch(self, totals):
        """To be called once all the steps of an epoch are done, before it is evaluated."""
        self.step, self.so_far = len(self.data.train), lambda: totals
        self._count(self.etas.rest())
        self.seconds_before = self.before
        self.before, self.began = self.seconds_of_epoch(), None

    def after_test_batch(self):
        """To be called after every batch of the evaluation; raises Ended."""
        self._decide(NOTHING)

    def finish(self):
        """The epoch is whole, and its row is logged: save."""
        self.epoch, self.step, self.totals = self.epoch + 1, 0, None
        self.before = self.missing = 0
        self.save(None)

    def seconds_of_epoch(self):
        """Seconds of training in this epoch so far, those before a break included."""
        return self.before + (0.0 if self.began is None else time.monotonic() - self.began)

    def _decide(self, decided):
        """Do what signals, the clock or this step ask for, once all the ranks know of it."""
        vote, now = self.requests.take(), time.monotonic()
        if self.run and self.seconds is not None and now - self.saved_at > self.seconds:
            vote = max(vote, SAVE)
            self.saved_at = now
        decided = max(decided, self.votes.cast(vote))
        if decided == NOTHING:
            return
        self.save(self.so_far())
        if decided == STOP:
            raise Ended("interrupted")
        if decided == ANNOUNCED and in_a_job():
            refusal = self.world.agree(requeue() if self.run else None)
            if refusal is None:
                raise Ended("requeued")
            self.note(f"SLURM does not take the job back ({refusal}): going on")

    def save(self, totals):
        """Write a checkpoint of this moment; `totals` are those of the epoch under way."""
        self._count(self.etas.rest())
        state = None if totals is None else totals.state(self.world.sum_in_order)
        seconds = 0.0 if totals is None else self.seconds_of_epoch()
        missing, bad = self.missing, [set(), set()]
        if hasattr(self.data.train, "bad_images"):
            found = [(part.missing, part.bad_images) for part in self.data[:2]]
            found = self.world.gather(found)
            bad = [sorted(set().union(*(rank[i][1] for rank in found))) for i in range(2)]
            if totals is not None:
                missing += sum(rank[0][0] for rank in found)
        if not self.run:
            return
        began = time.monotonic()
        # What a baseline has spoiled does not replace what is good.
        if not all(bool(p.isfinite().all()) for p in self.net.parameters()):
            return
        failure = self.run.save({
            "epoch": self.epoch, "step": self.step, "totals": state, "missing": missing,
            "seconds": seconds, "not_finite": self.not_finite,
            "micro_bs": self.gradient.micro_bs if self.gradient.lowered else None,
            "bad_images": json.dumps(bad, default=sorted), "here": self.here,
            "generator": torch.get_rng_state(), "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        })  # fmt: skip
        self.saved_at = time.monotonic()
        self.saving += self.saved_at - began
        if failure is not None and self.failure is None:
            self.note(f"No checkpoint: {failure}. Going on; the last good one stays")
            self.run.log({"kind": "unsaved", "epoch": self.epoch + 1, "reason": str(failure)})
        elif failure is None and self.failure is not None:
            self.note("Checkpoints are written again")
        self.failure = failure

    def _count(self, etas):
        """Look at the automatic learning rates of steps: NaN is one that was skipped."""
        for eta in etas:
            place = self.places.popleft()
            if eta == eta:
                self.not_finite = []
                continue
            self.not_finite.append(place)
            if len(self.not_finite) >= IN_A_ROW:
                self._end_not_finite()

    def _end_not_finite(self):
        train, steps = self.data.train, []
        for epoch, step in self.not_finite:
            train.set_epoch(epoch)
            batch = slice((step - 1) * train.batch_size, step * train.batch_size)
            steps.append({"epoch": epoch, "step": step, "indices": train.order()[batch].tolist()})
        epoch, step = self.not_finite[-1]
        train.set_epoch(epoch, step - 1)
        found = culprit(self.net, self.loss_fn, *next(iter(train)), self.gradient.micro_bs)
        found = next((x for x in self.world.gather(found) if x is not None), None)
        raise Ended(
            f"{IN_A_ROW} steps in a row had no finite gradient, the last of them epoch {epoch}, "
            f"step {step}" + (f": the first that is not finite is {found}" if found else ""),
            final=True, not_finite={"where": found, "steps": steps},
        )  # fmt: skip


def culprit(net, loss_fn, inputs, labels, micro_bs=None):
    """What is first not finite in the passes of a batch, in words, or None where all is finite:
    weights, the output of a layer, the loss or, from the last layer on, a gradient.

    The network is left as it was, but for gradients.
    """
    for name, p in net.named_parameters():
        if not p.isfinite().all():
            return f"the weights of {name}"
    found, state = [], {key: x.clone() for key, x in net.state_dict().items()}
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: _look(found, f"the output of {name}", output)
        )
        for name, module in net.named_modules()
        if not list(module.children())
    ]
    try:
        size = max(micro_bs or len(labels), 1)
        for x, y in zip(inputs.split(size), labels.split(size)):
            net.zero_grad()
            losses = loss_fn(net(x), y)
            _look(found, "the loss", losses)
            if not found:
                losses.mean().backward()
                for name, p in reversed(list(net.named_parameters())):
                    if p.grad is not None:
                        _look(found, f"the gradient of {name}", p.grad)
            if found:
                return found[0]
    finally:
        for hook in hooks:
            hook.remove()
        net.zero_grad()
        net.load_state_dict(state)
    return None


def _look(found, name, tensor):
    if not found and isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
        found.append(name)


def _kind(x):
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
