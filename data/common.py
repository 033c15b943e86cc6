"""What the modules of this package share."""

import os

from cli import UserError


class DataError(UserError):
    """The images are missing or damaged; the message says what to do about it."""


def default_data_dir():
    """$AGD_DATA, or ~/.cache/agd."""
    return os.environ.get("AGD_DATA") or "~/.cache/agd"


def reason(error):
    """The message of an exception as one short line, the same each time."""
    message = getattr(error, "strerror", None) or str(error)
    return " ".join(message.split())[:200] or type(error).__name__
