"""Signals that end a training with a checkpoint, and how one rank's program ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from medqlora.core.command import MISTAKE
from medqlora.core.errors import UserError
from medqlora.training.processes import AgreedError, settle

HURRY = 3.0  # seconds after the first signal from which a Ctrl-C ends training at once


def catch_signals() -> list[int]:
    """A list to which SIGTERM, SIGINT and SIGUSR1 (a scheduler's warning) are appended.

    The training loop looks at it after each step. Launcher and scheduler may both send a signal,
    so only a Ctrl-C some seconds after the first one ends training at once.
    """
    caught: list[int] = []
    times: list[float] = []

    def remember(number, frame):
        if number == signal.SIGINT and times and time.monotonic() - times[0] > HURRY:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.append(number)
        times.append(time.monotonic())

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, remember)
    return caught


def exit_code(caught: list[int]) -> int:
    """128 + the first signal; another rank's signal counts as SIGTERM."""
    return 128 + (caught[0] if caught else signal.SIGTERM)


def run_rank(main: Callable[..., int], environ: Mapping[str, str], *arguments: Any) -> int:
    """Run one rank's main function on `arguments` -> its exit code.

    What all ranks agree on is raised on rank 0 alone;
    the others end with the same code in silence.
    """
    try:
        return main(*arguments)
    except UserError as error:
        # The launcher ends the other ranks, and each is ending with this code already.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        settle(environ)
        if isinstance(error, AgreedError) and environ.get("RANK", "0") != "0":
            return MISTAKE
        raise
    except Exception as error:
        get_error_handler().record_exception(error)  # The launcher shows it with the rank.
        raise
