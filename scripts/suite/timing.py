"""The seconds of a step: of all methods in one sitting, since rows come from several machines."""

import time
from statistics import median

import torch

from scripts.suite.methods import METHODS, TRIALS
from scripts.suite.protocol import SEEDS, TUNED
from scripts.suite.train import Loss, order, step, workload

ROUNDS = 9  # of which the median counts
STEPS = 8  # of a method in a round


def measure(name, methods):
    """{method: CPU seconds of a step with its passes, by one thread} on a workload, and {method:
    why it failed}. The methods take turns, so that whatever slows the machine slows all of them."""
    torch.set_num_threads(1)
    work = workload(name)
    train, _ = work.data()
    runs, turns, failed = {}, {method: [] for method in methods}, {}
    for method in methods:
        torch.manual_seed(SEEDS[0])
        net = work.network()
        setting = TRIALS[0] if method == TUNED else METHODS[method].setting
        optimizer = METHODS[method].make(net, work.STEPS, **setting)
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        stream = order(len(train[0]), work.BATCH, SEEDS[0])
        runs[method] = Loss(work, net, train), optimizer, stream
    for _ in range(ROUNDS + 1):
        for method, (loss_of, optimizer, stream) in runs.items():
            begun = time.process_time()
            try:
                for _ in range(STEPS):
                    step(loss_of, optimizer, next(stream))
            except (RuntimeError, ValueError) as error:
                failed.setdefault(method, str(error).splitlines()[0])
            turns[method].append((time.process_time() - begun) / STEPS)
    # The first round warms up.
    return {x: median(turn[1:]) for x, turn in turns.items() if x not in failed}, failed
