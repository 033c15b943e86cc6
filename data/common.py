"""What the modules of this package share."""

import os
from pathlib import Path

from cli import UserError, expand

# Names of the text, or of the folder, to validate on, beside one called train.
VALIDATION = ("val", "valid", "validation", "test")


class DataError(UserError):
    """The data are missing or damaged; the message says what to do about it."""


def default_data_dir():
    """$AGD_DATA, or ~/.cache/agd."""
    return os.environ.get("AGD_DATA") or "~/.cache/agd"


def data_folder(data_dir):
    """The Path of the directory of data sets. Raises DataError where there is no home for its ~."""
    try:
        return Path(expand(data_dir))
    except UserError as error:
        raise DataError(f"--data_dir: {error}, or set $AGD_DATA") from None


def reason(error):
    """The message of an exception as one short line, the same each time."""
    message = getattr(error, "strerror", None) or str(error)
    return " ".join(message.split())[:200] or type(error).__name__
