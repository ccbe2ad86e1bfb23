"""Writing and reading of checkpoints.

A checkpoint is written to a hidden folder, hashed, and renamed. A folder `step-N` is therefore
complete when it appears; its manifest of sizes and hashes shows damage that comes later.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from medqlora.core.errors import UserError
from medqlora.core.files import find_problem, remove, write_manifest

# The files of a checkpoint that a resumed run cannot do without.
NEEDED = ("adapter.safetensors", "optimizer.pt", "state.json")


class CheckpointError(UserError):
    """A checkpoint cannot be written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read from disk.

    Args:
        path: The folder `step-N`.
        adapter: The adapter's whole tensors on the CPU, by PEFT name.
        optimizer: The optimizer's whole state tensors on the CPU, by parameter name.
        state: The state of the training loop: `step`, `best_loss`, `best_step`, `patience` and
            `loss_scale`.
    """

    path: Path
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(
    folder: Path,
    step: int,
    adapter: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    keep: int,
    copies: Mapping[str, Path] = MappingProxyType({}),
) -> Path:
    """Write the folder `step-N`, then delete the folders up to step N that are not among the newest
    `keep` complete ones.

    Folders of later steps are damaged ones that a resumed run has passed over; they stay until
    their step is written again.

    Args:
        folder: The run's folder of checkpoints.
        step: Number of optimizer steps that are done.
        adapter: The adapter's whole tensors on the CPU, by PEFT name.
        optimizer: The optimizer's whole state tensors on the CPU, by parameter name.
        state: What the training loop restores; it must be JSON.
        keep: Number of complete checkpoints that stay on disk.
        copies: Files of the run, by the name of their copy in the checkpoint. One that does not
            exist is left out.

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
        # The data is serialized in memory first, because the libraries' own writers report a full
        # disk as an error of their file format instead of an OSError.
        (unfinished / "adapter.safetensors").write_bytes(serialize(adapter))
        states = io.BytesIO()
        torch.save(optimizer, states)
        (unfinished / "optimizer.pt").write_bytes(states.getbuffer())
        saved_state = json.dumps({**state, "step": step})
        (unfinished / "state.json").write_text(saved_state, encoding="utf-8")
        for name, source in copies.items():
            if source.is_file():
                (unfinished / name).write_bytes(source.read_bytes())
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
    prune(folder, step, keep)
    return target


def prune(folder: Path, step: int, keep: int) -> None:
    """Delete the checkpoints up to a step that are not among the newest `keep` complete ones."""
    # A damaged checkpoint must not count as one of those that are kept. Otherwise it could drive
    # out the only one that a run can continue from.
    complete = 0
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            continue
        if complete == keep:
            remove(path)
        elif find_problem(path, NEEDED) is None:
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


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest complete checkpoint.

    Returns:
        The checkpoint (None if there is no complete one), and a warning for each damaged
        checkpoint that was passed over.
    """
    warnings = []
    for path in list_checkpoints(folder):
        problem = find_problem(path, NEEDED)
        if problem is not None:
            warnings.append(f"checkpoint {path} is damaged ({problem}); using the one before it")
            continue
        checkpoint = Checkpoint(
            path=path,
            adapter=load_file(path / "adapter.safetensors"),
            # With weights_only, torch runs no code that the file may contain.
            optimizer=torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"),
            state=json.loads((path / "state.json").read_text(encoding="utf-8")),
        )
        return checkpoint, warnings
    return None, warnings
