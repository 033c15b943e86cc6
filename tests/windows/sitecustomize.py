"""What Windows lacks and refuses, for a process of Linux: with this folder in PYTHONPATH its
interpreter, and those that it starts, read this first.

For the code of this repository modules, functions and signals of POSIX are gone, and sys.platform
is win32; the standard library and torch have other code for Windows, and see what they need. For
all of them processes are spawned; an open file is neither replaced nor removed, and no name is
taken twice; names that Windows refuses are; folders are not opened, nor linked to; text files have
the encoding and the line ends of Windows.
"""

import builtins
import errno
import io
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import types
import weakref

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
ABSENT = {
    "import": "fcntl grp pwd resource syslog termios triton",
    os: """chown fork forkpty geteuid getegid getgid getloadavg getpgid getpgrp getpriority getuid
    killpg lchown mkfifo nice O_DIRECTORY O_NOFOLLOW O_NONBLOCK pread pwrite register_at_fork
    sched_getaffinity sched_setaffinity sendfile setpgid setsid statvfs sysconf uname wait wait3
    wait4""",
    signal: """SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1
    SIGUSR2 alarm getitimer pause pthread_kill pthread_sigmask setitimer sigpending sigwait""",
    time: "tzset",
}
# A group of processes on Windows gets Ctrl-Break; here another signal stands in for it.
OTHER = {
    (sys, "platform"): "win32", (os, "name"): "nt", (signal, "SIGBREAK"): signal.SIGUSR1,
    (signal, "CTRL_BREAK_EVENT"): signal.SIGUSR1,
}  # fmt: skip
INVALID = re.compile(r'[<>:"|?*\\\x00-\x1f]|[ .]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.I)
ENCODING = "cp1252"
PLACES = "/dev/", "/proc/", "/sys/", "/etc/"
OPEN = weakref.WeakSet()  # files


class Guarded(types.ModuleType):
    """A module of which the code of this repository sees what Windows has."""

    def __new__(cls, *args):
        return types.ModuleType(*args)  # an import makes type(sys)(name)

    def __getattribute__(self, name):
        other = OTHER.get((self, name))
        if (other or name in gone[self]) and is_ours(sys._getframe(1).f_globals):
            if other:
                return other
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return super().__getattribute__(name)


def is_ours(variables):
    return os.path.abspath(variables.get("__file__") or "").startswith(ROOT)


def import_module(name, globals=None, *more, **rest):
    if name in gone["import"] and is_ours(globals or {}):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return system["import"](name, globals, *more, **rest)


def named(path):
    return os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else ""


def check_name(path):
    if bad := [x for x in named(path).split(os.sep) if INVALID.search(x)]:
        raise OSError(errno.EINVAL, f"no name of Windows: {bad[0]}", os.fspath(path))


def check_closed(path):
    own = named(path)
    if any(named(file.name) == own for file in OPEN if not file.closed):
        raise PermissionError(errno.EACCES, "used by another process", own)


def open_file(
    file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *more, **rest
):
    if named(file).startswith(PLACES) and named(file) != os.devnull:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)
    if {*"wax"} & {*mode}:
        check_name(file)
    if "b" not in mode:
        encoding = ENCODING if encoding in (None, "locale") else encoding
        newline = "\r\n" if newline is None and {*"wax"} & {*mode} else newline
    opened = system["open"](file, mode, buffering, encoding, errors, newline, *more, **rest)
    if named(file):
        OPEN.add(opened)
    return opened


def open_number(path, flags, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return system["open_number"](path, flags, *args, **kwargs)


def replace(source, target, **kwargs):
    check_name(target)
    check_closed(source)
    check_closed(target)
    return system["replace"](source, target, **kwargs)


def rename(source, target, **kwargs):
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "Cannot create a file when it already exists", target)
    return replace(source, target, **kwargs)


def remove(path, **kwargs):
    check_closed(path)
    return system["remove"](path, **kwargs)


def make(path, *args, **kwargs):
    check_name(path)
    return system["mkdir"](path, *args, **kwargs)


def link(*args, **kwargs):
    raise OSError(errno.EPERM, "A required privilege is not held by the client")


def usage(path):
    if named(path).startswith(PLACES):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return system["disk_usage"](path)


system = {
    "import": builtins.__import__, "open": io.open, "open_number": os.open, "replace": os.replace,
    "remove": os.remove, "mkdir": os.mkdir, "disk_usage": shutil.disk_usage,
}  # fmt: skip
builtins.open = io.open = open_file
os.open, os.replace, os.rename, os.mkdir = open_number, replace, rename, make
os.remove = os.unlink = remove
os.symlink, shutil.disk_usage, shutil._use_fd_functions = link, usage, False
multiprocessing.set_start_method("spawn")
gone = {module: {*names.split()} for module, names in ABSENT.items()} | {sys: set()}
builtins.__import__ = import_module
for module in (os, signal, time, sys):
    module.__class__ = Guarded
