"""How far a run is: when a checkpoint is written, what is in it, and when the run has to end."""

import json
import random
import threading
import time
from collections import deque

import torch

from distributed.delayed import DelayedMax, DelayedReads
from distributed.slurm import in_a_job, requeue
from runs.checkpoint import validate
from runs.log import RunError
from training.control import ANNOUNCED, NOTHING, SAVE, STOP
from training.metrics import Totals
from training.nonfinite import first_nonfinite

IN_A_ROW = 20  # steps without a finite gradient after which a run ends
SEEDING = threading.Lock()  # the global generator is that of all the threads


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
        micro_bs: what the command asks for; the attribute is what memory has been found to allow.
        draws: whether the optimiser may draw random numbers, of torch's own generator.
        seed: that of a network which draws in training, as dropout does; None for the others.
    """

    def __init__(
        self, world, run, data, net, optimizer, loss_fn, requests, every, note, micro_bs=None,
        draws=False, seed=None,
    ):  # fmt: skip
        self.world, self.run, self.data, self.loss_fn = world, run, data, loss_fn
        self.net, self.optimizer, self.requests, self.note = net, optimizer, requests, note
        self.gradient = None  # which the run makes once it knows what a checkpoint says
        kind, least = every
        self.steps = least if kind == "steps" else None
        self.seconds = least if kind == "seconds" else None
        self.epoch = self.step = self.missing = 0
        self.totals, self.before, self.tried = None, 0.0, 0
        self.asked = self.micro_bs = micro_bs
        self.draws, self.saved, self.refused, self.seed = draws, False, False, seed
        self.votes, self.etas, self.places = DelayedMax(world), DelayedReads(world.device), deque()
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
            rates = [[g.get("lr") for g in groups] for groups in (
                self.optimizer.param_groups, checkpoint["optimizer"]["param_groups"]
            )]  # fmt: skip
            if rates[0] != rates[1]:
                raise ValueError(f"lr {rates[1]} there, and {rates[0]} here")
            steps = len(self.data.train)
            rest = validate(checkpoint, steps)
            self.net.load_state_dict(then)
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.epoch, self.step, state = checkpoint["epoch"], rest["step"], rest["totals"]
            self.missing, self.before = rest["missing"], rest["seconds"]
            self.not_finite = [tuple(place) for place in rest["not_finite"]]
            if rest["micro_bs"][0] == self.micro_bs:  # what memory allowed, unless that is asked
                self.micro_bs = rest["micro_bs"][1]
            if rest["here"] == self.here:
                self.tried = self.epoch * steps + self.step
            if state is not None:
                if self.world.rank:  # the sums over the ranks are the first one's
                    state = {**state, "losses": torch.zeros_like(state["losses"]),
                             "correct": torch.zeros_like(state["correct"]),
                             "counts": [0] * len(state["counts"])}  # fmt: skip
                self.totals = Totals(state, self.world.device)
            if rest["generators"]:
                with SEEDING:
                    _set_generators(rest["generators"], self.world.device)
            for part, paths in zip(self.data[:2], json.loads(rest["bad_images"])):
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
        self._seed_step()
        self.began = time.monotonic()
        return self.totals

    def after_step(self, eta, so_far):
        """To be called after every step; raises Ended."""
        self.step, self.so_far = self.data.train.position, so_far
        if self.draws and not self.saved:  # a state that cannot be saved is told of now
            self.run and self.run.plain(self.optimizer.state_dict())
            self.saved = True
        if eta is not None:
            self.places.append((self.epoch + 1, self.step))
            self._count(self.etas.put(eta))
        self._seed_step()
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

    def _seed_step(self):
        """What the network draws in the next step is a function of the seed, that step and the
        rank: nothing of it has to be saved."""
        if self.seed is None:
            return
        step, device = self.epoch * len(self.data.train) + self.step, self.world.device
        generator = torch.default_generator
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            generator = torch.cuda.default_generators[index]
        draw = random.Random(f"{self.seed} {step} {self.world.rank}")
        generator.manual_seed(draw.getrandbits(63))

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
        if decided == ANNOUNCED and in_a_job() and not self.refused:
            refusal = self.world.broadcast_object(requeue() if self.run else None)
            if refusal is None:
                raise Ended("requeued")
            self.note(f"SLURM does not take the job back ({refusal}): going on")
            self.refused = True
        elif decided == ANNOUNCED and self.run and self.failure is None:
            self.note(f"Saved in epoch {self.epoch + 1}, after step {self.step}")

    def save(self, totals):
        """Write a checkpoint of this moment; `totals` are those of the epoch under way."""
        self._count(self.etas.rest())
        state = None if totals is None else totals.state(self.world.all_reduce_in_order)
        seconds = 0.0 if totals is None else self.seconds_of_epoch()
        missing, bad = self.missing, [set(), set()]
        if hasattr(self.data.train, "bad_images"):
            found = [(part.missing, part.bad_images) for part in self.data[:2]]
            found = self.world.all_gather_object(found)
            bad = [sorted(set().union(*(rank[i][1] for rank in found))) for i in range(2)]
            if totals is not None:
                missing += sum(rank[0][0] for rank in found)
        if not self.run:
            return
        began = time.monotonic()
        # What a baseline has spoiled does not replace what is good.
        if not all(bool(p.isfinite().all()) for p in self.net.parameters()):
            self.note("No checkpoint: there are weights that are not finite; the last one stays")
            return
        failure = self.run.save({
            "epoch": self.epoch, "step": self.step, "totals": state, "missing": missing,
            "seconds": seconds, "not_finite": self.not_finite,
            "micro_bs": [self.asked, self.gradient.micro_bs],
            "bad_images": json.dumps(bad, default=sorted), "here": self.here,
            "generators": _generators(self.world.device) if self.draws else [],
            "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
        })  # fmt: skip
        self.saved_at = time.monotonic()
        self.saving += self.saved_at - began
        if failure is not None and self.failure is None:
            self.note(f"No checkpoint: {failure}. Going on; the last good one stays")
            self.run.log({"kind": "unsaved", "epoch": self.epoch + 1, "reason": failure})
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
        batch = next(iter(train))
        if self.gradient.sync_bn:
            self.net.eval()  # where the ranks do not wait for one another
        found = first_nonfinite(self.net, self.loss_fn, *batch, self.gradient.micro_bs)
        found = next((x for x in self.world.all_gather_object(found) if x is not None), None)
        raise Ended(
            f"{IN_A_ROW} steps in a row had no finite gradient, the last of them epoch {epoch}, "
            f"step {step}" + (f": the first that is not finite is {found}" if found else ""),
            final=True, not_finite={"where": found, "steps": steps},
        )  # fmt: skip


def _generators(device):
    """The states of the generators that an optimiser may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_generators(states, device):
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _kind(x):
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
