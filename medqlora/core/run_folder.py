"""The run folder: what it may hold before a run, and which settings a resumed run may change."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from medqlora.core.config import Config
from medqlora.core.config_loading import dump_config
from medqlora.core.errors import RunError
from medqlora.core.files import (
    UNFINISHED,
    read_lines,
    remove,
    write_atomic,
    write_checked,
    write_json_lines,
)
from medqlora.core.reading import expand_path
from medqlora.core.run_lock import LOCK
from medqlora.core.run_origin import ORIGIN

LOG = "train_log.jsonl"
LAUNCH = "launch"  # the folder that launch/slurm_train.sbatch writes before the run exists
# A checkpoint or an adapter that a killed process has not finished.
UNFINISHED_FOLDER = re.compile(r"\.(step-[0-9]+|adapter)\.tmp")


def check_run(folder: Path, config: Config, resume: bool) -> None:
    """Check the output folder before any work; nothing is written.

    Args:
        folder: The output folder, which need not exist yet.
        config: The configuration of this run.
        resume: Whether the run in the folder is to be continued.

    Raises:
        RunError: The folder holds something and `resume` is off, or it holds a run of another
            configuration.
    """
    saved = expand_path(folder, "--output_dir") / "config.yaml"
    # A link to nowhere exists for mkdir, which is called only after the data are prepared.
    above = next(path for path in folder.absolute().parents if os.path.lexists(path))
    for path in (folder, above):
        if os.path.lexists(path) and not path.is_dir():
            raise RunError(f"--output_dir {folder}: {path} is a file; give a folder")
    if saved.is_file():
        if not resume:
            raise RunError(
                f"--output_dir {folder} holds a run; continue it with --resume or choose another"
                " folder"
            )
        try:
            old_tree = yaml.safe_load(saved.read_text(encoding="utf-8"))
        # A text that is no UTF-8 raises a ValueError.
        except (OSError, yaml.YAMLError, ValueError, RecursionError):
            old_tree = None
        if not isinstance(old_tree, dict):
            raise RunError(
                f"{saved} is not valid YAML; the run cannot be resumed, choose another --output_dir"
            )
        # The file of an older version lacks the keys that are new. Such a run did what their
        # defaults say. A file that is no longer valid is compared as it is.
        with contextlib.suppress(ValidationError):
            old_tree = yaml.safe_load(dump_config(Config.model_validate(old_tree)))
        # Both sides have come through YAML, so equal values also have equal types.
        for key, old, new in list_differences(old_tree, yaml.safe_load(dump_config(config))):
            if key not in FREE_TO_CHANGE:
                raise RunError(
                    f"--resume: {key} was {old!r} in {saved}, now {new!r}; give the same value or"
                    " another --output_dir"
                )
    elif folder.is_dir() and not all(is_leftover(path) for path in folder.iterdir()):
        raise RunError(
            f"--output_dir {folder} is not empty and holds no run; choose another folder"
        )


def is_leftover(path: Path) -> bool:
    """Say whether something in a run folder may be there before the run is opened."""
    # A kill while the run is opened leaves a lock that nobody holds, or a file that was not
    # finished.
    return path.name in (LAUNCH, LOCK) or UNFINISHED.fullmatch(path.name) is not None


def open_run(folder: Path, config: Config, origin: dict[str, Any]) -> None:
    """Make the run folder, and write its resolved configuration and what it began with.

    The lock of the folder must be held, because leftovers of killed processes are removed.

    Raises:
        RunError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"--output_dir {folder} cannot be made: {error.strerror}; choose another folder"
        ) from None
    for place in (folder, folder / "predictions", folder / "checkpoints"):
        for path in place.iterdir() if place.is_dir() else ():
            if UNFINISHED.fullmatch(path.name) or UNFINISHED_FOLDER.fullmatch(path.name):
                remove(path)
    # This file makes the folder a run, which a kill from here on leaves to --resume.
    write_atomic(folder / "config.yaml", dump_config(config))
    write_checked(folder / ORIGIN, origin)


# A resumed run may change these keys, because the losses of the remaining steps do not depend on
# them.
FREE_TO_CHANGE = {
    "training.save_steps",
    "training.keep_checkpoints",
    "training.log_with",
    "data.cache_dir",
}


def list_differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Return the dotted key, the old value and the new value of each difference of two trees."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [(key, old, new)]
    differences = []
    for name in dict.fromkeys([*old, *new]):
        dotted = f"{key}.{name}" if key else name
        differences += list_differences(old.get(name), new.get(name), dotted)
    return differences


def rewind_log(path: Path, step: int) -> None:
    """Drop the log's rows after a step; the resumed run writes them again.

    Checkpoints of older versions have no copy of the log, and runs without a checkpoint begin anew.
    """
    # The whole file is written again, which also takes out a last line that a kill cut short. A row
    # that is appended to such a line would be lost with it.
    rows = [row for row in read_lines(path) if isinstance(row, dict) and row.get("step", 0) <= step]
    if path.is_file():
        write_json_lines(path, rows)
