"""Writing and reading of checkpoints.

A checkpoint is written to a hidden folder, hashed, and renamed. A folder `step-N` is therefore
complete when it appears; its manifest of sizes and hashes shows damage that comes later.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file

from medqlora.core.errors import UserError
from medqlora.core.files import find_problem, remove, write_manifest
from medqlora.model.weight_files import ShardWriter

# The files of a checkpoint that a resumed run cannot do without, beside that of the weights.
NEEDED = ("optimizer.pt", "state.json")


class CheckpointError(UserError):
    """A checkpoint cannot be written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read from disk.

    Args:
        path: The folder `step-N`.
        weights: The whole trained tensors on the CPU, by PEFT name for an adapter and by parameter
            name for a whole model. They are mapped from the file, and so are those of the
            optimizer: the processes of one machine share them.
        optimizer: The optimizer's whole state tensors on the CPU, by parameter name.
        state: The state of the training loop: `step`, `best_loss`, `best_step`, `patience` and
            `loss_scale`.
    """

    path: Path
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_file(source: Path, target: Path) -> None:
    """Write a file's content under another name."""
    target.write_bytes(source.read_bytes())


def save_checkpoint(
    folder: Path,
    step: int,
    weights: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    keep: int,
    weights_file: str,
    copies: Mapping[str, Path] = MappingProxyType({}),
    keep_file: Callable[[Path, Path], None] = copy_file,
    log: Path | None = None,
) -> Path:
    """Write the folder `step-N`, then delete the folders up to step N that are not among the newest
    `keep` complete ones.

    Folders of later steps are damaged ones that a resumed run has passed over; they stay until
    their step is written again.

    Args:
        folder: The run's folder of checkpoints.
        step: Number of optimizer steps that are done.
        weights: The whole trained tensors on the CPU, by name.
        optimizer: The optimizer's whole state tensors on the CPU, by parameter name.
        state: What the training loop restores; it must be JSON.
        keep: Number of complete checkpoints that stay on disk.
        weights_file: The name of the file of the weights.
        copies: Files of the best adapter or model, by the name of their copy in the checkpoint. One
            that does not exist is left out.
        keep_file: Gives the checkpoint one of these files: the file, and its copy.
        log: The run's log, which is copied because it grows in place.

    Returns:
        The folder that was written.

    Raises:
        CheckpointError: The disk refused. The checkpoints of other steps are untouched.
    """
    target = folder / f"step-{step}"
    unfinished = folder / f".step-{step}.tmp"
    try:
        # A run that was killed while it wrote may have left this folder.
        remove(unfinished)
        unfinished.mkdir(parents=True)
        # The library's own writer reports a full disk as an error of its file format instead of an
        # OSError, and needs memory for a second copy of all weights.
        layout = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in weights.items()}
        writer = ShardWriter(unfinished / weights_file, layout)
        for name, tensor in weights.items():
            writer.write(name, tensor)
        writer.close()
        # torch writes into an open file without a copy in memory, and lets its OSError through.
        with (unfinished / "optimizer.pt").open("wb") as file:
            torch.save(optimizer, file)
        saved_state = json.dumps({**state, "step": step})
        (unfinished / "state.json").write_text(saved_state, encoding="utf-8")
        for name, source in copies.items():
            if source.is_file():
                keep_file(source, unfinished / name)
        if log is not None and log.is_file():
            copy_file(log, unfinished / log.name)
        # The manifest covers all files that are there by now. It cannot cover itself.
        write_manifest(unfinished, {"step": step})
        # The contents must reach the disk before the new name does. Otherwise a power failure could
        # leave a complete name with empty files.
        for path in unfinished.iterdir():
            sync(path)
        remove(target)  # A damaged checkpoint of the same step may be there.
        unfinished.rename(target)
        # The new name itself stands in the parent folder.
        sync(folder)
    except OSError as error:
        remove(unfinished)
        raise CheckpointError(
            f"checkpoint {target} cannot be written: {error.strerror or error}; free some space on"
            " this disk and continue with --resume"
        ) from None
    prune(folder, step, keep, weights_file)
    return target


def prune(folder: Path, step: int, keep: int, weights_file: str) -> None:
    """Delete the checkpoints up to a step that are not among the newest `keep` complete ones."""
    # A damaged checkpoint must not count as one of those that are kept. Otherwise it could drive
    # out the only one that a run can continue from.
    complete = 0
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            continue
        if complete == keep:
            remove(path)
        elif find_problem(path, (weights_file, *NEEDED)) is None:
            complete += 1


def step_of(path: Path) -> int:
    """Return N of a folder `step-N`."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders `step-N`, newest first, whether they are complete or not."""
    if not folder.is_dir():
        return []
    checkpoints = [path for path in folder.iterdir() if re.fullmatch(r"step-[0-9]+", path.name)]
    return sorted(checkpoints, key=step_of, reverse=True)


def load_newest(folder: Path, weights_file: str) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest complete checkpoint.

    Args:
        folder: The run's folder of checkpoints.
        weights_file: The name of the file of the weights.

    Returns:
        The checkpoint (None if there is no complete one), and a warning for each damaged
        checkpoint that was passed over.
    """
    warnings = []
    for path in list_checkpoints(folder):
        problem = find_problem(path, (weights_file, *NEEDED))
        if problem is not None:
            warnings.append(f"checkpoint {path} is damaged ({problem}); using the one before it")
            continue
        checkpoint = Checkpoint(
            path=path,
            weights=load_file(path / weights_file),
            # With weights_only, torch runs no code that the file may contain.
            optimizer=torch.load(
                path / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True
            ),
            state=json.loads((path / "state.json").read_text(encoding="utf-8")),
        )
        return checkpoint, warnings
    return None, warnings
