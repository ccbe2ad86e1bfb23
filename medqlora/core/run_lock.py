"""The lock of a run folder: one training at a time writes to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from medqlora.core.errors import RunError

LOCK = "run.lock"
RETRY = 0.5  # seconds between two attempts


@contextlib.contextmanager
def hold_run(folder: Path, patience: float = 0.0) -> Iterator[str | None]:
    """Hold the lock of a run folder, which is made if it does not exist.

    The kernel gives the lock back when its process ends in any way, so a killed training blocks
    nobody. Folders that were made here and are still empty at the end are removed again.

    Args:
        folder: The run folder.
        patience: Seconds to wait for a training that is ending.

    Yields:
        None, or a warning where the file system has no locks.

    Raises:
        RunError: Another process holds the lock, or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file, warning = lock_file(folder / LOCK, patience)
    except OSError as error:
        raise RunError(
            f"--output_dir {folder} cannot be written: {error.strerror}; choose another folder"
        ) from None
    try:
        yield warning
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        file.close()
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def lock_file(path: Path, patience: float) -> tuple[IO[str], str | None]:
    """Open and lock a file, and write this process into it for the message of another one.

    Returns:
        The open file, and a warning where the file system has no locks.

    Raises:
        RunError: Another process holds the lock.
        OSError: The file cannot be opened.
    """
    deadline = time.monotonic() + patience
    warning = None
    while True:
        # This mode does not cut off what the present holder has written.
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = " ".join(file.read(200).split()) or "another process"
            file.close()
            if time.monotonic() < deadline:
                time.sleep(RETRY)
                continue
            raise RunError(
                f"--output_dir {path.parent} is in use by {holder}; wait until it has ended, or"
                " choose another folder"
            ) from None
        except OSError as error:
            warning = (
                f"the file system of {path.parent} has no locks ({error.strerror}); a second"
                " training in this folder would not be noticed"
            )
        # The holder before may have removed the file after it was opened here. A lock on a file
        # without a name would keep nobody out.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                return file, warning
        file.close()
