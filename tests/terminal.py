"""A terminal for tests: what its screen holds after a command has printed to it."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import termios


class Terminal(io.StringIO):
    """A standard output of this process that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def screen(printed, columns):
    """The lines that a terminal of so many columns holds: it wraps, and knows \\r, \\n and the
    escape sequences to go up and to clear."""
    lines, row, column, text = [[]], 0, 0, iter(printed)
    for c in text:
        if c == "\r":
            column = 0
        elif c == "\n":
            row += 1
        elif c == "\x1b":
            assert next(text) == "["
            sequence = next(x for x in text if x.isalpha())
            assert sequence in "AK"
            row -= sequence == "A"
            if sequence == "K":
                del lines[row][column:]
        else:
            row, column = (row + 1, 0) if column == columns else (row, column)
        lines += [[] for _ in range(row + 1 - len(lines))]
        if c.isprintable():
            line = lines[row]
            line += " " * (column - len(line))
            line[column : column + 1] = c
            column += 1
    return ["".join(line).rstrip() for line in lines]


def start(command, columns, **options):
    """(The Popen, the controlling end) of a command in a terminal of so many columns, in a session
    of its own, so that Ctrl-C reaches it."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), **options,
    )  # fmt: skip
    os.close(terminal)
    return process, controller


def printed(controller, until=None):
    """What the command prints, to its end or up to a text."""
    content = b""
    while until is None or until.encode() not in content:
        try:
            part = os.read(controller, 1 << 16)
        except OSError:  # Linux's end of the file
            break
        if not part:
            break
        content += part
    return content.decode()
