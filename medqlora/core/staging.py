"""Make a folder aside and give it its name when it is whole.

A kill at any moment leaves the whole folder under the final name, or nothing there. What a killed
process left aside is recognised by its name and by a lock that nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from medqlora.core.errors import RunError

# Linux draws this number when the machine starts. On a network file system a lock may be seen by
# the processes of one machine only, so a folder with another number is named and never removed.
BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def stage_folder(output: Path, flag: str = "--output") -> Iterator[Path]:
    """Yield a new folder beside `output`, and rename it to `output` at the end of the block.

    An error or an interrupt within the block removes the new folder, and `output` does not exist.

    Args:
        output: The folder to make, which must not exist.
        flag: The flag that named it, for messages.

    Raises:
        RunError: The disk refuses, within the block too, or `output` has come into being.
    """
    start = f".{output.name}.unfinished-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output.parent, start)
        # The folder lies on the same file system, so the rename at the end is one step. The random
        # part keeps apart processes that make the same folder, on any machines.
        aside = output.with_name(f"{start}{read_boot()}-{secrets.token_hex(8)}")
        aside.mkdir()
        try:
            with contextlib.ExitStack() as held:
                with contextlib.suppress(OSError):  # Some file systems have no locks.
                    held.enter_context(lock_folder(aside))
                yield aside
                # A rename would replace an empty folder without a word.
                if os.path.lexists(output):
                    raise RunError(f"{flag} {output} has come into being; give a new folder")
                aside.rename(output)
        # Ctrl-C and an exit must leave no folder behind either.
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    except OSError as error:
        raise RunError(
            f"{flag} {output} cannot be written: {error.strerror or error}; free space or choose"
            " another folder"
        ) from None


def read_boot() -> str:
    """Return the number of this machine's start; "unknown" where the system has none."""
    return BOOT.read_text(encoding="ascii").strip() if BOOT.is_file() else "unknown"


def remove_leftovers(folder: Path, start: str) -> None:
    """Remove what killed processes of this machine left; a warning names what others left.

    Args:
        folder: The folder that holds the leftovers.
        start: The beginning of their names.
    """
    pattern = re.compile(re.escape(start) + "([a-z0-9-]+)-[0-9a-f]{16}")
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        if match[1] == read_boot() != "unknown" and remove_unlocked(path):
            continue
        warnings.warn(
            f"{path} is unfinished work of another process; remove it if that was killed",
            stacklevel=2,
        )


def remove_unlocked(folder: Path) -> bool:
    """Remove a folder of stage_folder, and return whether that was possible."""
    try:
        with lock_folder(folder):
            shutil.rmtree(folder)
    # A living process holds the lock, or the system refuses.
    except OSError:
        return False
    return True


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the system frees when the process ends in any way.

    Raises:
        OSError: Another process holds it, or the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
