"""Signals that end a training with a checkpoint, and the exit code of one rank's program."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from medqlora.core.command import MISTAKE
from medqlora.core.errors import UserError

# A Ctrl-C this many seconds after the first signal ends the training at once.
FORCE_DELAY = 3.0


def catch_signals() -> list[int]:
    """Catch SIGTERM, SIGINT and SIGUSR1 (the warning of a scheduler) from now on.

    Launcher and scheduler may both send a signal. Therefore a second signal ends the training at
    once only if it is a Ctrl-C and comes FORCE_DELAY seconds after the first one.

    Returns:
        A list to which the number of each signal is appended. The training loop looks at it after
        each step.
    """
    caught: list[int] = []
    times: list[float] = []

    def remember(number, frame):
        if number == signal.SIGINT and times and time.monotonic() - times[0] > FORCE_DELAY:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.append(number)
        times.append(time.monotonic())

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, remember)
    return caught


def name_signal(caught: list[int]) -> str:
    """Say which signal ends the training; where it came to another rank, only that."""
    return f"signal {caught[0]}" if caught else "signal on another rank"


def exit_code(caught: list[int]) -> int:
    """Return 128 + the first signal of this rank, or 128 + SIGTERM if another rank had it."""
    return 128 + (caught[0] if caught else signal.SIGTERM)


def run_rank(main: Callable[..., int], environ: Mapping[str, str], *arguments: Any) -> int:
    """Run the main function of one rank on `arguments` and return its exit code.

    Only rank 0 raises an error that all ranks agree on; the others end silently with the code of a
    user's mistake.

    Raises:
        UserError: A mistake of the user, except for an AgreedError on another rank than 0.
    """
    # These import torch, and a search catches signals without it.
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from medqlora.training.processes import AgreedError, wait_for_gloo

    try:
        return main(*arguments)
    except UserError as error:
        # When one rank has ended, the launcher sends SIGTERM to the others. They are ending with
        # this code already, and SIGTERM would replace it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait_for_gloo(environ)
        if isinstance(error, AgreedError) and environ.get("RANK", "0") != "0":
            return MISTAKE
        raise
    # Any other exception is a fault of the program. It is only recorded here and raised again. The
    # launcher shows the record together with the rank.
    except Exception as error:
        get_error_handler().record_exception(error)
        raise
