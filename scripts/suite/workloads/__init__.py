"""The workloads, a module each:

    the docstring's first line   what it is, for tables
    METRIC                       what `score` is, for tables
    BATCH, STEPS                 examples of a training batch, and the budget
    data()                       (training, validation): tuples of tensors with one row an example,
                                 the same at every call
    network()                    a new network, from the start that its library gives it
    loss(net, *batch)            the loss of a training batch: 0-dim
    score(net, *batch)           of validation examples, one number each, of which less is better

A batch is the data's tuple at some rows. torch's generator is seeded before network(); data() has
generators of its own.
"""

from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
