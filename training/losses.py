"""The losses of each example: (outputs (B, C), labels (B,)) -> (B,).

Of a text the outputs are (B, T, C) and the labels (B, T), and the loss is the mean over its tokens.
"""

import math

import torch
import torch.nn.functional as F

from training import choices


def mse(outputs, labels):
    """Square loss of each example, (B,), in the AGD paper's normalisation.

    The target is one-hot times sqrt(C), the loss the mean over the C classes of the squared
    difference. outputs (B, C), labels (B,), or of a text (B, T, C), (B, T).
    """
    C = outputs.shape[-1]
    onehot = (labels[..., None] == torch.arange(C, device=labels.device)).to(outputs.dtype)
    return of_examples((outputs - onehot * math.sqrt(C)).square().mean(-1))


def xent(outputs, labels):
    """Cross-entropy of each example, (B,), in nats. outputs (B, C), labels (B,), or of a text
    (B, T, C), (B, T)."""
    losses = F.cross_entropy(outputs.flatten(0, -2), labels.flatten(), reduction="none")
    return of_examples(losses.view(labels.shape))


def of_examples(losses):
    """The mean over the tokens of each text, (B,), of losses (B, T); losses (B,) as they are."""
    return losses if losses.ndim == 1 else losses.mean(1)


LOSSES = dict(zip(choices.LOSSES, (mse, xent)))
