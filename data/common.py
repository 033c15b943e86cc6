"""What the modules of this package share."""

import os


class DataError(RuntimeError):
    """The images cannot be had, or one is damaged; the message says what to do about it."""

    def __init__(self, message):
        super().__init__(printable(message))


def printable(text):
    """`text` for any terminal and any encoding: what cannot be printed, such as the bytes of a
    file name that is not UTF-8, or control characters, stands there with a backslash."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def default_data_dir():
    """$AGD_DATA, or ~/.cache/agd."""
    return os.environ.get("AGD_DATA") or "~/.cache/agd"
