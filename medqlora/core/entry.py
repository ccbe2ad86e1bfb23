"""The first moments of a command, before it has read its arguments and imported anything large.

This module needs Python's own library only, so that it can say what is missing.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from pathlib import Path
from types import TracebackType

MISTAKE = 2  # This is the exit code after a mistake of the user.
INTERRUPTED = 128 + 2  # A shell reports a program that SIGINT ended in this form.
BROKEN_PIPE = 128 + 13  # A shell reports a program whose reader has gone in this form.
LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # accelerate launch sets this variable for every process.
# recipes/train_stages.py sets this variable for a stage: the id of the launcher's process.
LAUNCHER = "MEDQLORA_LAUNCHER"
END_SECONDS = 5.0  # The time that a command has after Ctrl-C, to close its files.
LAUNCHER_SECONDS = 10.0  # The time in which a launcher ends after its process.
ROOT = Path(__file__).parents[2]


def enter() -> None:
    """Begin a command: every script calls this before it imports other packages.

    A package that is missing is then one line, Ctrl-C ends the imports without a traceback, and a
    terminal that lacks a character shows a question mark in its place.
    """
    # A program in the background ignores SIGINT, and stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop_at_once)
    sys.excepthook = report_missing
    for stream in (sys.stdout, sys.stderr):
        # A test or a notebook may have put an object in the stream's place.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def stop_at_once(number: int, frame: object) -> None:
    """End the program; while packages are imported there is nothing to finish.

    An exception would be raised inside a package, which may turn it into another.
    """
    os._exit(INTERRUPTED)


def interrupt(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt, and end the program if that leads nowhere; a second Ctrl-C does too.

    Some packages catch every exception while they are imported or called, this one included.
    """
    signal.signal(signal.SIGINT, stop_at_once)
    last_word = threading.Timer(END_SECONDS, os._exit, [INTERRUPTED])
    last_word.daemon = True
    last_word.start()
    raise KeyboardInterrupt


def report_missing(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Say in one line that a package is missing, and show every other error as Python does."""
    if not isinstance(error, ModuleNotFoundError):
        sys.__excepthook__(kind, error, trace)
        return
    activate = ". .venv/bin/activate" if os.name == "posix" else r".venv\Scripts\activate"
    advice = "make one with `bash launch/demo.sh`, or install with `pip install -e .`"
    if (ROOT / ".venv").is_dir():
        advice = f"activate the one of this checkout: cd {ROOT} && {activate}"
    print(
        f"the Python package {error.name} is not installed for {sys.executable}; medqlora runs in"
        f" an environment of its own: {advice}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(MISTAKE)


def say(line: str) -> None:
    """Print a mistake of the user; under `accelerate launch` it is the last thing, too.

    accelerate adds a traceback of its own when a process has failed, and the line would stand
    above it. A copy of this process therefore waits for the launcher's end.
    """
    # A name or a value in the message may hold a line break.
    line = " ".join(line.splitlines())
    print(line, file=sys.stderr, flush=True)
    if LAUNCHED not in os.environ or not hasattr(os, "pidfd_open"):
        return
    launcher = os.pidfd_open(int(os.environ.get(LAUNCHER, os.getppid())))
    if os.fork():
        return
    # The launcher ends the session of its processes, and this one has to outlive it.
    os.setsid()
    # The descriptor of a process can be read when it has ended. A launcher that starts its
    # processes again does not end, and its last word comes later.
    ended, _, _ = select.select([launcher], [], [], LAUNCHER_SECONDS)
    if ended:
        os.write(2, f"{line}\n".encode(errors="replace"))
    os._exit(0)
