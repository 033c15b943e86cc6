"""The losses of each example: (outputs (B, C), labels (B,)) -> (B,)."""

import math

import torch
import torch.nn.functional as F

from training import choices


def mse(outputs, labels):
    """Square loss of each example, (B,), in the AGD paper's normalisation.

    The target is one-hot times sqrt(C), the loss the mean over the C classes of the squared
    difference. outputs (B, C), labels (B,).
    """
    C = outputs.shape[1]
    onehot = (labels[:, None] == torch.arange(C, device=labels.device)).to(outputs.dtype)
    return (outputs - onehot * math.sqrt(C)).square().mean(1)


def xent(outputs, labels):
    """Cross-entropy of each example, (B,), in nats. outputs (B, C), labels (B,)."""
    return F.cross_entropy(outputs, labels, reduction="none")


LOSSES = dict(zip(choices.LOSSES, (mse, xent)))
