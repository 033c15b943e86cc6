"""What the modules of this package share."""

import os

from cli import UserError


class DataError(UserError):
    """The images cannot be had, or one is damaged; the message says what to do about it."""


def default_data_dir():
    """$AGD_DATA, or ~/.cache/agd."""
    return os.environ.get("AGD_DATA") or "~/.cache/agd"
