"""Writing and reading of checkpoints.

A checkpoint is written to a hidden folder, hashed, and renamed. A folder `step-N` is therefore
complete when it appears; its manifest of sizes and hashes shows damage that comes later.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from medqlora.core.errors import UserError

MANIFEST = "manifest.json"


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


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
) -> Path:
    """Write the folder `step-N`, then delete all but `keep` of the folders up to step N.

    Folders of later steps are damaged ones that a resumed run has passed over; they stay until
    their step is written again.

    Args:
        folder: The run's folder of checkpoints.
        step: Number of optimizer steps that are done.
        adapter: The adapter's whole tensors on the CPU, by PEFT name.
        optimizer: The optimizer's whole state tensors on the CPU, by parameter name.
        state: What the training loop restores; it must be JSON.
        keep: Number of checkpoints that stay on disk.

    Returns:
        The folder that was written.

    Raises:
        CheckpointError: The disk refused. The checkpoints of other steps are untouched.
    """
    target = folder / f"step-{step}"
    unfinished = folder / f".step-{step}.tmp"
    try:
        # A run that was killed while it wrote may have left this folder.
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        # The data is serialized in memory first, because the libraries' own writers report a full
        # disk as an error of their file format instead of an OSError.
        (unfinished / "adapter.safetensors").write_bytes(serialize(adapter))
        states = io.BytesIO()
        torch.save(optimizer, states)
        (unfinished / "optimizer.pt").write_bytes(states.getbuffer())
        saved_state = json.dumps({**state, "step": step})
        (unfinished / "state.json").write_text(saved_state, encoding="utf-8")
        # The manifest covers all files that are there by now. It cannot cover itself.
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in sorted(unfinished.iterdir())
        }
        manifest = json.dumps({"step": step, "files": files}, indent=2)
        (unfinished / MANIFEST).write_text(manifest, encoding="utf-8")
        # The contents must reach the disk before the new name does. Otherwise a power failure could
        # leave a complete name with empty files.
        for path in unfinished.iterdir():
            sync(path)
        if target.exists():  # A damaged checkpoint of the same step may be there.
            shutil.rmtree(target)
        unfinished.rename(target)
        # The new name itself stands in the parent folder.
        sync(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(unfinished)
        raise CheckpointError(
            f"checkpoint {target} cannot be written: {error.strerror or error}; free some space on"
            " this disk and continue with --resume"
        ) from None
    # Old checkpoints go only after the new one is in place, so there is always one to continue
    # from. The number in a name follows the five letters of `step-`.
    up_to_now = [path for path in list_checkpoints(folder) if int(path.name[5:]) <= step]
    for old in up_to_now[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders `step-N`, newest first, whether they are complete or not."""
    if not folder.is_dir():
        return []
    checkpoints = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(checkpoints, key=lambda path: -int(path.name[5:]))


def find_problem(path: Path) -> str | None:
    """Say what is wrong with a checkpoint; None means that every file matches the manifest."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, recorded in files.items():
            size = (path / name).stat().st_size
            if size != recorded["bytes"]:
                return f"{name} has {size} bytes, not {recorded['bytes']}"
            if hash_file(path / name) != recorded["sha256"]:
                return f"{name} does not have its recorded hash"
    # A manifest that is JSON of another form raises the last three.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest complete checkpoint.

    Returns:
        The checkpoint (None if there is no complete one), and a warning for each damaged
        checkpoint that was passed over.
    """
    warnings = []
    for path in list_checkpoints(folder):
        problem = find_problem(path)
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
