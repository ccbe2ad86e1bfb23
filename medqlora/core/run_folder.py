"""The run folder: what it may hold before a run, and what a resumed run may change."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from medqlora.core.config import Config
from medqlora.core.config_loading import dump_config
from medqlora.core.errors import RunError
from medqlora.core.files import read_lines, write_atomic, write_json_lines

LOG = "train_log.jsonl"
LAUNCH = "launch"  # written by launch/slurm_train.sbatch before the run exists


def check_run(folder: Path, config: Config, resume: bool) -> None:
    """Say what is wrong with the output folder before any work is done; nothing is written.

    Raises: RunError: the folder holds something and `resume` is off, or it holds a run of another
        configuration.
    """
    saved = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--output_dir {folder} is a file; give a folder")
    if saved.is_file():
        if not resume:
            raise RunError(
                f"--output_dir {folder} holds a run; continue it with --resume or choose another"
                " folder"
            )
        try:
            before = yaml.safe_load(saved.read_text(encoding="utf-8"))
        except yaml.YAMLError:
            raise RunError(
                f"{saved} is not valid YAML; the run cannot be resumed, choose another --output_dir"
            ) from None
        # A run of an older version lacks the keys that are new; what it did is their default.
        with contextlib.suppress(ValidationError):
            before = yaml.safe_load(dump_config(Config.model_validate(before)))
        for key, old, new in list_differences(before, yaml.safe_load(dump_config(config))):
            if key not in FREE_TO_CHANGE:
                raise RunError(
                    f"--resume: {key} was {old!r} in {saved}, now {new!r}; give the same value or"
                    " another --output_dir"
                )
    elif folder.is_dir() and any(path.name != LAUNCH for path in folder.iterdir()):
        raise RunError(
            f"--output_dir {folder} is not empty and holds no run; choose another folder"
        )


def open_run(folder: Path, config: Config) -> None:
    """Make the run folder with its resolved configuration.

    Raises:
        RunError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"--output_dir {folder} cannot be made: {error.strerror}; choose another folder"
        ) from None
    write_atomic(folder / "config.yaml", dump_config(config))


# What a resumed run may change: nothing that the remaining steps' losses depend on.
FREE_TO_CHANGE = {
    "training.save_steps",
    "training.keep_checkpoints",
    "training.log_with",
    "data.cache_dir",
}


def list_differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = list(dict.fromkeys([*old, *new]))
        return [
            d
            for n in names
            for d in list_differences(old.get(n), new.get(n), f"{key}.{n}" if key else n)
        ]
    return [] if old == new else [(key, old, new)]


def rewind_log(path: Path, step: int) -> None:
    """Drop what was logged after `step`: the resumed run writes those lines again."""
    rows = [row for row in read_lines(path) if row["step"] <= step]
    if path.is_file():
        write_json_lines(path, rows)
