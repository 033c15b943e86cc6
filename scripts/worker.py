"""A run of main.py that ends with the process that started it: `python -m scripts.worker FLAGS`.

Its standard input is a pipe that nobody else holds. A byte from there asks it to stop after this
step, as Ctrl-C would; the end of the pipe means that the other process is gone, however it went.
"""

import _thread
import os
import signal
import sys
import threading


def watch():
    while os.read(0, 1):
        _thread.interrupt_main(signal.SIGINT)
    os._exit(1)


def main():
    for ending in (signal.SIGINT, signal.SIGTERM):  # whatever they were inherited as
        signal.signal(ending, signal.default_int_handler)
    try:
        threading.Thread(target=watch, daemon=True).start()
        import main as program

        return program.main(sys.argv[1:])
    except KeyboardInterrupt:  # while it was starting
        return 130


if __name__ == "__main__":
    sys.exit(main())
