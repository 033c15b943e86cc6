"""The epochs of a run: each trained, tested, looked over, logged and saved."""

import math
import time
from contextlib import nullcontext
from itertools import islice

import torch
from torch.nn.modules.batchnorm import _BatchNorm

import agd
from distributed import RankError
from distributed.sync_bn import average_statistics
from training.optimizers import AUTOMATIC
from training.step import evaluate, largest_share, train_epoch

RECALIBRATING = 8  # batches from which batch norm takes statistics for other weights than trained


class Epochs:
    """What goes through the epochs of a run from where its Course stands. Of several ranks the
    first one, that of `course.run`, writes.

    Args:
        model: what trains; `course.net`, wrapped for many devices or not.
        rows: the epoch rows of the log so far, to which this adds.
        replay, profile: a GraphedSteps and a Profile, or None.
    """

    def __init__(self, args, course, model, rows, progress, replay=None, profile=None):
        self.args, self.course, self.model, self.rows = args, course, model, rows
        self.progress, self.replay, self.profile = progress, replay, profile
        self.profiled = course.epoch + 1 + (course.step > 0)  # the first epoch that is whole

    def run(self):
        """Go through all of them; returns why the last one was not to be, or None."""
        for epoch in range(self.course.epoch + 1, self.args.epochs + 1):
            stopped = self._epoch(epoch)
            if stopped is not None:
                return stopped
        return None

    def _epoch(self, epoch):
        course, began = self.course, time.perf_counter()
        world, net, data = course.world, course.net, course.data
        profile = self.profile if epoch == self.profiled else None
        trained = self._train(epoch, profile)
        complete(trained, data.train, world, course.missing)
        training_seconds, before = course.seconds_of_epoch(), course.seconds_before
        clock = read_clock(course.optimizer, trained["steps"]["eta"])
        with profile.evaluation() if profile else nullcontext():
            if isinstance(course.optimizer, agd.SpectralAGD):
                recalibrate(course, epoch)
            world.broadcast(net.buffers())  # batch-norm statistics: those of the first rank
            tested = evaluate(
                net, data.test, course.loss_fn, course.gradient.micro_bs, course.after_test_batch
            ).read(world.all_reduce_in_order)
        complete(tested, data.test, world)
        together(net, epoch, world)
        seconds = before + time.perf_counter() - began
        row = epoch_row(epoch, trained, tested, seconds, training_seconds, clock)
        if self.replay and self.replay.failure:
            row["no_cuda_graph"] = self.replay.failure
        if course.gradient.micro_bs is not None:
            row["micro_bs"] = course.gradient.micro_bs
            row["lowered"] = course.gradient.lowered
        stopped = not_finite(self.args, epoch, trained["steps"]["loss"])
        if course.run:
            steps = self.args.log_steps == "all" or epoch <= (self.args.log_steps or 0)
            course.run.log(*(step_rows(epoch, trained["steps"]) if steps else []), row)
            self.progress.epoch(row)
            if profile:
                profile.write()
                self.progress.profile(profile)
        self.rows.append(row)
        if stopped is None:
            course.finish()
        return stopped

    def _train(self, epoch, profile):
        """The figures of the training of an epoch, or of what is left of it."""
        course, gradient, replay = self.course, self.course.gradient, self.replay
        steps, train = len(course.data.train), course.data.train
        micro_bs, failure = gradient.micro_bs, replay and replay.failure

        def on_step(eta, so_far):
            self.progress.step((epoch - 1) * steps + train.position)
            if profile:
                profile.step()
            course.after_step(eta, so_far)

        totals = course.begin(epoch)
        if profile:
            profile.step()
        if course.step < steps:
            totals = train_epoch(
                self.model, train, course.loss_fn, course.optimizer, gradient, on_step,
                self.args.log_updates, replay, totals,
            )  # fmt: skip
        elif hasattr(course.optimizer, "eval"):  # as train_epoch leaves it
            course.optimizer.eval()
        course.after_epoch(totals)
        if replay and replay.failure != failure:
            self.progress.note(f"No CUDA graph of a step: {replay.failure}")
        if gradient.micro_bs != micro_bs:
            self.progress.note(
                f"Memory ran out: {gradient.micro_bs} images at a time from now on"
            )
        return totals.read(course.world.all_reduce_in_order)


def recalibrate(course, epoch):
    """Batch-norm statistics of the weights that the network holds, from the first batches of an
    epoch in training; over several ranks the mean of theirs. Neither the batches' place nor their
    order changes."""
    net, gradient, train = course.net, course.gradient, course.data.train
    if not any(isinstance(module, _BatchNorm) for module in net.modules()):
        return

    def inputs():
        for batch in first(train, epoch, RECALIBRATING):
            for x, labels in gradient.parts(*batch, largest_share(train)):
                if len(labels) or gradient.sync_bn:
                    yield x

    agd.recalibrate(net, inputs())
    if not gradient.sync_bn:
        average_statistics(net, course.world)


def first(batches, epoch, count):
    """The first batches of an epoch; the place in it, and what was counted, are as before then."""
    position, missing = batches.position, batches.missing
    batches.set_epoch(epoch)
    try:
        yield from islice(batches, count)
    finally:
        batches.set_epoch(epoch, position)
        batches.position, batches.missing = position, missing


def read_clock(optimizer, etas):
    """{"length", "turn"} of an optimiser with a clock, after the last step of an epoch; else {}."""
    if not hasattr(optimizer, "clock"):
        return {}
    # As the log has it: a run that goes on behind that step has no other.
    optimizer.eta = torch.full_like(optimizer.eta, etas[-1])
    return dict(zip(("length", "turn"), torch.stack(optimizer.clock()).tolist()))


def spread(key, values):
    """The least, the mean and the greatest of an epoch's finite values, or None for each."""
    values = [x for x in values or [] if math.isfinite(x)]
    found = (min(values), sum(values) / len(values), max(values)) if values else (None,) * 3
    return dict(zip((f"{key}_min", f"{key}_mean", f"{key}_max"), found))


def epoch_row(epoch, train, test, seconds, training_seconds, clock):
    """The row of the log. Train figures are of the weights that train, test figures of those that
    the optimiser answers with; `clock` has the "length" of SpectralAGD's Z over its start's, and
    the "turn", the angle by which the last step has turned it, means over the hidden layers."""
    steps = train["steps"]
    skipped = sum(math.isnan(eta) for eta in steps["eta"] or [])
    return {
        "kind": "epoch",
        "epoch": epoch,
        "train_loss": train["loss"],
        "train_acc": train["acc"],
        "test_loss": test["loss"],
        "test_acc": test["acc"],
        **spread("eta", steps["eta"]),
        **clock,
        **(spread("update", steps["update"]) if steps["update"] else {}),
        **({"skipped_steps": skipped} if skipped else {}),
        "seconds": seconds,
        "images_per_second": train["examples"] / training_seconds,
    }


def step_rows(epoch, steps):
    columns = {key: values for key, values in steps.items() if values or key == "eta"}
    columns["eta"] = steps["eta"] or [None] * len(steps["loss"])
    return [
        {"kind": "step", "epoch": epoch, "step": i, **dict(zip(columns, values))}
        for i, values in enumerate(zip(*columns.values()), 1)
    ]


def not_finite(args, epoch, losses):
    """Why a run of a baseline has to end, or None; AGD leaves a step out, and Course counts."""
    step = next((i for i, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if step is None or args.optimizer in AUTOMATIC:
        return None
    return (
        f"the loss was {losses[step - 1]} at epoch {epoch}, step {step}; try a smaller --lr"
    )


def complete(figures, batches, world, missing=0):
    """Raises where an epoch did not see every image once, over all the ranks; `missing` of them
    could not be decoded before the batches began."""
    missing += sum(world.all_gather_object(batches.missing))
    if figures["examples"] + missing != batches.examples:
        raise RankError(
            f"{figures['examples']} images went through the network and {missing} could not be "
            f"decoded, of {batches.examples}: the ranks' shares are not the whole"
        )
    if not figures["examples"]:
        raise RankError(f"none of the {batches.examples} images can be decoded")


def together(net, epoch, world):
    """Raises where the ranks do not hold the same weights, to the bit."""
    drifted = world.ranks_that_differ(net.parameters())
    if drifted:
        ranks = f"rank {drifted[0]} holds other weights than the rest"
        if len(drifted) > 1:
            ranks = f"ranks {', '.join(map(str, drifted))} hold other weights than the rest"
        if world.size == 2:
            ranks = "ranks 0 and 1 hold different weights"
        raise RankError(
            f"{ranks} after epoch {epoch}: nodes of different hardware or software, or faulty "
            "memory"
        )
