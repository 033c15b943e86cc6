"""Trains a run, epoch by epoch, from its last checkpoint to its end or to a reason to stop.

The state after a step is a function of the seed and of the step's number, and a checkpoint holds
all of it: a run that resumes is, on the same hardware, to the bit the run that never stopped.
"""

import json
import math
import random
import sys
import time
from collections import deque
from contextlib import nullcontext
from itertools import count, islice
from typing import NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

import agd
from cli import UserError
from data.workers import SHM, lost, undisturbed
from distributed import RankError
from distributed.delayed import DelayedReads, Glance
from distributed.slurm import in_a_job, requeue
from distributed.sync_bn import average_statistics
from runs.checkpoint import validate
from runs.log import ANEW, RunError
from training import display
from training.control import ANNOUNCED, NOTHING, STOP
from training.cuda_graph import GraphedSteps
from training.foreign import SEEDING, generators, load_state, set_generators
from training.gradient import Gradient, compile_network
from training.losses import xent
from training.metrics import Totals, epoch_row, least, step_rows
from training.nonfinite import first_nonfinite
from training.optimizers import set_capturable
from training.precision import refused
from training.step import Step, evaluate, largest_share, set_training, show_average, take_steps

IN_A_ROW = 20  # steps without a finite gradient after which a run ends
RECALIBRATING = 8  # batches from which batch norm takes the statistics of the average


class Ending(NamedTuple):
    """How a run ended. `reason`: None at its last epoch, "interrupted", "requeued", or a sentence.
    `final`: the same command has nothing left to do. `facts` go into the last row of the log."""

    reason: str | None = None
    final: bool = True
    facts: dict = {}
    exit_code: int = 0
    failed: bool = False  # by an exception
    told: bool = False  # the reason has been printed, here or by another rank
    bad_images: tuple = ()  # paths of images that could not be decoded


class Ended(Exception):
    """All ranks end the run here, as they have agreed; `ending` says how."""

    def __init__(self, reason, final=False, exit_code=1, **facts):
        super().__init__(reason)
        self.ending = Ending(reason, final, facts, exit_code=exit_code)


class Trainer:
    """Trains `net` to `epochs` epochs. `epoch` counts those that are completed, `step` the batches
    of the current one. Every rank calls the same methods; only rank 0 has a log and writes.

    Args:
        world: the ranks; data: the Data; control: the Control; progress: a display.Progress.
        log: the opened RunLog of rank 0; rows: the epoch rows in it.
        micro_bs: examples that a rank takes at a time, None for all that fit.
        graphs: "on", "auto", or None for no CUDA graphs.
        log_steps: epochs whose steps have rows in the log.
        foreign: whether the optimiser is of someone else's class: it may draw random numbers, from
            torch's generator, and change its learning rate.
        schedule: the Cosine of a baseline's rate, None of one that stays.
        seed: of the random numbers that the network draws in training, as dropout does, or None.
        profile: a Profile of the first whole epoch, or None.
        keep_best: keep the checkpoint of the epoch with the least test loss.
    """

    def __init__(
        self, world, data, net, optimizer, loss_fn, control, progress, log=None, rows=(), *,
        epochs, micro_bs=None, sync_bn=False, compiled=False, graphs=None, log_steps=0,
        log_updates=False, foreign=False, schedule=None, seed=None, profile=None, keep_best=False,
    ):  # fmt: skip
        self.world, self.data, self.net, self.optimizer = world, data, net, optimizer
        self.loss_fn, self.control, self.progress, self.log = loss_fn, control, progress, log
        self.epochs, self.log_steps, self.profile = epochs, log_steps, profile
        self.foreign, self.schedule, self.seed = foreign, schedule, seed
        self.rows, self.done = list(rows), len(rows)
        self.epoch = self.step = self.missing = 0
        self.batches = len(data.train)  # of an epoch
        self.totals, self.seconds, self.began = None, 0.0, None  # of the current epoch
        self.etas, self.places = DelayedReads(world.device), deque()
        self.glance = Glance(world.device)  # at the means of the current epoch, for the terminal
        self.not_finite = []  # (epoch, step) of the last steps, while they have no finite gradient
        self.refused = self.unshared = False
        self.failure, self.saving_seconds = None, 0.0  # why the last checkpoint failed
        self.keep_best, self.unkept = keep_best, None  # why the best one could not be kept
        self.here = [world.size, str(world.device.type), torch.__version__]

        model = world.wrap(net, sync_bn)
        whole = min(data.train.batch_size, data.train.examples)
        self.gradient = Gradient(
            model, loss_fn, world, micro_bs, sync_bn,
            compile_network(model) if compiled else None,
            profile.span if profile else nullcontext,
            whole=len(range(world.rank, whole, world.size)),
        )  # fmt: skip
        self.model = model
        self.one_step = Step(model, loss_fn, optimizer, self.gradient, log_updates)
        self.graphs = self.graphed = None
        if graphs is not None:
            self.graphs = graphs
            required = graphs == "on" or control.requests.shared
            eager = profile.last if profile else 0  # a profile shows kernels
            self.graphed = GraphedSteps(self.one_step, data.train, required, after=eager)

    def resume(self, checkpoint):
        """Go on from a checkpoint. Raises RunError where it does not fit this network."""
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
            # Those of a class may be its own, and those of a schedule are set in each step.
            if rates[0] != rates[1] and not self.foreign and self.schedule is None:
                raise ValueError(f"lr {rates[1]} there, and {rates[0]} here")
            state = validate(checkpoint, self.batches)
            self.net.load_state_dict(then)
            load_state(self.optimizer, checkpoint["optimizer"])
            self.epoch, self.step, totals = state["epoch"], state["step"], state["totals"]
            self.missing, self.seconds = state["missing"], state["seconds"]
            self.not_finite = [tuple(place) for place in state["not_finite"]]
            tried = self.epoch * self.batches + self.step if state["here"] == self.here else 0
            self.gradient.resume(*state["micro_bs"], tried)
            if totals is not None:
                if self.world.rank:  # the sums over the ranks are rank 0's
                    totals = {**totals, "losses": torch.zeros_like(totals["losses"]),
                              "correct": torch.zeros_like(totals["correct"]),
                              "counts": [0] * len(totals["counts"])}  # fmt: skip
                self.totals = Totals(totals, self.world.device)
            if state["generators"]:
                with SEEDING:
                    set_generators(state["generators"], self.world.device)
            for part, paths in zip(self.data[:2], json.loads(state["bad_images"])):
                if paths:
                    part.bad_images.update(paths)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError,
                OverflowError) as error:  # fmt: skip
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunError(
                f"the checkpoint is of another network or optimiser ({reason}); "
                f"{ANEW.format('it')}"
            ) from error

    def save(self, totals):
        """Write a checkpoint; `totals`: the Totals of the current epoch, None between epochs."""
        self._count_skipped(self.etas.rest())
        state = None if totals is None else totals.state(self.world.all_reduce_in_order)
        seconds = 0.0 if totals is None else self.seconds_of_epoch()
        missing, bad = self.missing, [[], []]
        if hasattr(self.data.train, "bad_images"):
            ranks = [(part.missing, part.bad_images) for part in self.data[:2]]
            ranks = self.world.all_gather_object(ranks)
            bad = [sorted(set().union(*(rank[i][1] for rank in ranks))) for i in range(2)]
            if totals is not None:
                missing += sum(rank[0][0] for rank in ranks)
        if not self.log:
            return
        began = time.monotonic()
        # Weights that a baseline has spoiled do not replace good ones.
        if not all(bool(p.isfinite().all()) for p in self.net.parameters()):
            self.progress.note("No checkpoint: there are weights that are not finite; the last one "
                               "stays")  # fmt: skip
            return
        failure = self.log.save({
            "epoch": self.epoch, "step": self.step, "totals": state, "missing": missing,
            "seconds": seconds, "not_finite": self.not_finite,
            "micro_bs": [self.gradient.requested, self.gradient.micro_bs],
            "bad_images": json.dumps(bad), "here": self.here,
            "generators": generators(self.world.device) if self.foreign else [],
            "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
        })  # fmt: skip
        self.control.saved_at = time.monotonic()
        self.saving_seconds += self.control.saved_at - began
        if failure is not None and self.failure is None:
            self.progress.note(f"No checkpoint: {failure}. Going on; the last good one stays")
            self.log.log({"kind": "unsaved", "epoch": self.epoch + 1, "reason": failure})
        elif failure is None and self.failure is not None:
            self.progress.note("Checkpoints are written again")
        self.failure = failure

    def _keep_best(self):
        """Keep the checkpoint of the last epoch, where its test loss is the least so far. What is
        kept already may be kept again: a run may have ended just before."""
        best = least(self.rows) if self.keep_best and self.log else None
        if best is None or not (best["epoch"], 0) == (self.epoch, self.step) == self.log.saved:
            return
        failure = self.log.keep_best()
        if failure is not None and self.unkept is None:
            self.progress.note(f"The best checkpoint is not kept: {failure}. Going on")
        self.unkept = failure

    def seconds_of_epoch(self):
        """Seconds of training in the current epoch, before an interruption included."""
        return self.seconds + (0.0 if self.began is None else time.monotonic() - self.began)

    def run(self):
        """Train the remaining epochs. Returns the Ending; an exception becomes one, too."""
        if not self.foreign:
            set_capturable(self.optimizer, self.graphs is not None, self.world.device)
        if self.profile and self.graphed:
            self.progress.note("The steps of the profile run one kernel at a time, without a CUDA "
                               "graph")  # fmt: skip
        whole = self.epoch + 1 + (self.step > 0)  # the first epoch that this command trains whole
        self.progress.begin(self.epoch, self.step)
        self._keep_best()
        ending = Ending()
        try:
            self.control.requests.listening = True
            while self.epoch < self.epochs and ending.reason is None:
                reason = self._run_epoch(self.profile if self.epoch + 1 == whole else None)
                ending = Ending(reason, exit_code=int(reason is not None))
            bad = set().union(*self.world.all_gather_object(self._bad_images()))
        except Ended as ended:
            ending, bad = ended.ending, self._bad_images()
        except (Exception, KeyboardInterrupt) as error:
            with undisturbed():  # by the ends of worker processes
                workers = any(part.workers for part in self.data[:2])
                error = refused(error) or workers and lost(error) or error
                ending, bad = self._failed(error), self._bad_images()
        finally:
            self.progress.close()
            if self.graphed is not None:
                self.graphed.close()
            self.data.close()
        if ending.reason is None and self.failure is not None:
            ending = Ending(
                f"all {self.epochs} epochs are done, but not saved: {self.failure}. Once it can be "
                "written, the same command goes on from the last checkpoint",
                final=False, exit_code=1,
            )  # fmt: skip
        return ending._replace(bad_images=tuple(sorted(bad)))

    def _failed(self, error):
        self.progress.close()  # nothing is printed into the bar
        failure = self.world.failed(error)
        code = error.exit_code if isinstance(error, UserError) else 1
        code = 130 if failure.reason == "interrupted" else code
        # The summary of a single process has the reason; of several, a launcher may end this one.
        told = self.world.size > 1 or code == UserError.exit_code
        if told and failure.first:
            display.error(failure.reason, failure.trace)
        elif failure.trace and failure.first:
            print(failure.trace, end="", file=sys.stderr)
        return Ending(failure.reason, False, {}, code, failed=True, told=told)

    def _run_epoch(self, profile):
        """Train, test, log and save one epoch. Returns why the run cannot go on, or None."""
        epoch, began, data, world = self.epoch + 1, time.perf_counter(), self.data, self.world
        micro_bs, failure = self.gradient.micro_bs, self.graphed and self.graphed.failure
        earlier = self.seconds
        positions = data.positions
        trained = self._train_epoch(epoch, profile).read(world.all_reduce_in_order, positions)
        if self.graphed and self.graphed.failure != failure:
            self.progress.note(f"No CUDA graph of a step: {self.graphed.failure}")
        if self.gradient.micro_bs != micro_bs:
            self.progress.note(f"Memory ran out: {self.gradient.micro_bs} {data.noun}s at a time "
                               "from now on")  # fmt: skip
        if data.train.unshared and not self.unshared:
            self.unshared = True
            self.progress.note(f"{data.train.unshared} batches of this epoch had no room in {SHM} "
                               "and went through pipes, more slowly")  # fmt: skip
        check_every_image_seen(trained, data.train, world, self.missing)
        clock = read_clock(self.optimizer, trained["steps"]["eta"])
        with profile.evaluation() if profile else nullcontext():
            if isinstance(self.optimizer, agd.SpectralAGD):
                recalibrate(self.net, data.train, self.gradient, world, epoch)
            world.broadcast(self.net.buffers())  # batch-norm statistics: those of rank 0
            done = count()
            self.progress.testing(epoch, next(done), len(data.test))

            def on_batch():
                self.progress.testing(epoch, next(done), len(data.test))
                self._decide()

            tested = evaluate(
                self.net, data.test, self.loss_fn, self.gradient.micro_bs, on_batch
            ).read(world.all_reduce_in_order, positions)
        check_every_image_seen(tested, data.test, world)
        check_ranks_agree(self.net, epoch, world)
        seconds = earlier + time.perf_counter() - began
        text = None
        if len(data.shape) == 1:
            text = positions, data.bytes_a_token if self.loss_fn is xent else None
        row = epoch_row(epoch, trained, tested, seconds, self.seconds_of_epoch(), clock, text)
        if self.schedule is not None:  # of the last step
            row["lr"] = float(self.schedule.rates(epoch * self.batches - 1)[0])
        if self.graphed and self.graphed.failure:
            row["no_cuda_graph"] = self.graphed.failure
        if self.gradient.micro_bs is not None:
            row |= {"micro_bs": self.gradient.micro_bs, "lowered": self.gradient.lowered}
        if self.log:
            self.log.log(*(step_rows(epoch, trained["steps"]) if epoch <= self.log_steps else []),
                         row)  # fmt: skip
            self.progress.epoch(row)
            if profile:
                profile.write()
                self.progress.profile(profile)
        self.rows.append(row)
        reason = None if self.one_step.automatic else diverged(epoch, trained["steps"]["loss"])
        if reason is None:
            self.epoch, self.step, self.totals = epoch, 0, None
            self.seconds, self.missing = 0.0, 0
            self.save(None)
            self._keep_best()
        return reason

    def _train_epoch(self, epoch, profile):
        """Train the steps of an epoch from the current one on. Returns the Totals of the epoch."""
        self.data.train.set_epoch(epoch, self.step)
        self._before_step()
        self.began = time.monotonic()
        if profile:
            profile.step()
        totals = self.totals or Totals()
        if self.step < self.batches:
            set_training(self.model, self.optimizer)
            if self.graphed is not None:
                etas, self.so_far = self.graphed.steps(totals), self.graphed.totals
                means = self.graphed.means
            else:
                etas = take_steps(self.one_step, self.data.train, totals)
                self.so_far, means = lambda: totals, totals.means
            self.glance.answer()  # of the epoch before
            for eta in etas:
                if self.progress.asks():
                    self.glance.ask(means())
                self.progress.step(epoch, self.data.train.position, self.glance.answer())
                if profile:
                    profile.step()
                self._after_step(eta)
            totals = self.so_far()
        show_average(self.optimizer)
        self.so_far = lambda: totals
        self._count_skipped(self.etas.rest())
        self.seconds, self.began = self.seconds_of_epoch(), None
        return totals

    def _after_step(self, eta):
        self.step = self.data.train.position
        if eta is not None:
            self.places.append((self.epoch + 1, self.step))
            self._count_skipped(self.etas.put(eta))
        self._before_step()
        self._decide(self.epoch * self.batches + self.step)

    def _decide(self, step=None):
        """Save, requeue or end, if signals, the clock or this step ask for it. Raises Ended."""
        decision = self.control.decide(step)
        if decision == NOTHING:
            return
        self.save(self.so_far())
        if decision == STOP:
            raise Ended("interrupted", exit_code=130)
        if decision == ANNOUNCED and in_a_job() and not self.refused:
            refusal = self.world.broadcast_object(requeue() if self.log else None)
            if refusal is None:
                raise Ended("requeued", exit_code=130)
            self.progress.note(f"SLURM does not take the job back ({refusal}): going on")
            self.refused = True
        elif decision == ANNOUNCED and self.log and self.failure is None:
            self.progress.note(f"Saved in epoch {self.epoch + 1}, after step {self.step}")

    def _before_step(self):
        """Set the next step's rate, and seed the random numbers that the network draws in it by the
        seed, that step and the rank: nothing of either has to be saved."""
        step, device = self.epoch * self.batches + self.step, self.world.device
        if self.schedule is not None:
            self.schedule.set(step)
        if self.seed is None:
            return
        generator = torch.default_generator
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            generator = torch.cuda.default_generators[index]
        draw = random.Random(f"{self.seed} {step} {self.world.rank}")
        generator.manual_seed(draw.getrandbits(63))

    def _count_skipped(self, etas):
        """Look at the learning rates of steps: NaN is a step that was skipped."""
        for eta in etas:
            place = self.places.popleft()
            if eta == eta:
                self.not_finite = []
                continue
            self.not_finite.append(place)
            if len(self.not_finite) >= IN_A_ROW:
                self._end_not_finite()

    def _end_not_finite(self):
        train, rows = self.data.train, []
        for epoch, step in self.not_finite:
            train.set_epoch(epoch)
            batch = slice((step - 1) * train.batch_size, step * train.batch_size)
            rows.append({"epoch": epoch, "step": step, "indices": train.order()[batch].tolist()})
        epoch, step = self.not_finite[-1]
        train.set_epoch(epoch, step - 1)
        batch = next(iter(train))
        if self.gradient.sync_bn:
            self.net.eval()  # where the ranks do not wait for one another
        where = first_nonfinite(self.net, self.loss_fn, *batch, self.gradient.micro_bs)
        where = next((x for x in self.world.all_gather_object(where) if x is not None), None)
        raise Ended(
            f"{IN_A_ROW} steps in a row had no finite gradient, the last of them epoch {epoch}, "
            f"step {step}" + (f": the first that is not finite is {where}" if where else ""),
            final=True, not_finite={"where": where, "steps": rows},
        )  # fmt: skip

    def _bad_images(self):
        """The paths of the images that could not be decoded on this rank."""
        return sorted(set().union(*(getattr(part, "bad_images", ()) for part in self.data[:2])))


def recalibrate(net, train, gradient, world, epoch):
    """Take batch-norm statistics of the weights in `net` from the first batches of an epoch, over
    several ranks the mean. The place of the batches stays."""
    if not any(isinstance(module, _BatchNorm) for module in net.modules()):
        return
    position, missing = train.position, train.missing
    train.set_epoch(epoch)

    def inputs():
        for batch in islice(train, RECALIBRATING):
            for x, labels in gradient.parts(*batch, largest_share(train)):
                if len(labels) or gradient.sync_bn:
                    yield x

    try:
        agd.recalibrate(net, inputs())
    finally:
        train.set_epoch(epoch, position)
        train.missing = missing
    if not gradient.sync_bn:
        average_statistics(net, world)


def read_clock(optimizer, etas):
    """{"length", "turn"} of an optimiser with a clock, after the last step of an epoch; else {}."""
    if not isinstance(optimizer, agd.SpectralAGD):
        return {}
    # As logged: a run that resumes after that step has no other.
    optimizer.eta = torch.full_like(optimizer.eta, etas[-1])
    return dict(zip(("length", "turn"), torch.stack(optimizer.clock()).tolist()))


def diverged(epoch, losses):
    """Why a baseline cannot go on after these losses, or None. AGD skips such steps."""
    step = next((i for i, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if step is None:
        return None
    return f"the loss was {losses[step - 1]} at epoch {epoch}, step {step}; try a smaller --lr"


def check_every_image_seen(metrics, batches, world, missing=0):
    """Raise RankError unless the ranks together saw every example once; `missing` of them could not
    be decoded before the batches began."""
    missing += sum(world.all_gather_object(batches.missing))
    if metrics["examples"] + missing != batches.examples:
        raise RankError(
            f"{metrics['examples']} examples went through the network and {missing} could not be "
            f"read, of {batches.examples}: the ranks' shares are not the whole"
        )
    if not metrics["examples"]:
        raise RankError(f"none of the {batches.examples} images can be decoded")


def check_ranks_agree(net, epoch, world):
    """Raise RankError unless all ranks hold the same weights, to the bit."""
    odd = world.ranks_that_differ(net.parameters())
    if not odd:
        return
    ranks = f"rank {odd[0]} holds other weights than the rest"
    if len(odd) > 1:
        ranks = f"ranks {', '.join(map(str, odd))} hold other weights than the rest"
    if world.size == 2:
        ranks = "ranks 0 and 1 hold different weights"
    raise RankError(
        f"{ranks} after epoch {epoch}: nodes of different hardware or software, or faulty memory"
    )


def _kind(x):
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
