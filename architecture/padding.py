"""Room for the convolutional networks, which halve the side up to five times."""

import torch.nn.functional as F


def pad_to_32(x):
    """Images (batch, channels, height, width), zero-padded evenly to a side of 32 at least."""
    rows, columns = max(0, 32 - x.shape[2]), max(0, 32 - x.shape[3])
    if rows == 0 and columns == 0:
        return x
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
