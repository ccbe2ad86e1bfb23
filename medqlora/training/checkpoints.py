"""Checkpoints that are complete or not there: write aside, hash, rename; find the newest complete
one.
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
    """A checkpoint that could not be written."""


@dataclass(frozen=True)
class Checkpoint:
    """adapter: tensors by PEFT name; optimizer: its state_dict; state: step, best loss and what
    else the loop keeps.
    """

    path: Path
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


def hash_file(path: Path) -> str:
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
    """Write `folder/step-N`, then prune all but the newest `keep` complete ones.

    Raises:
        CheckpointError: the disk refused; nothing that was there before is touched.
    """
    target = folder / f"step-{step}"
    aside = folder / f".step-{step}.tmp"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        # through memory: the libraries' own writers report a full disk as errors of their format
        (aside / "adapter.safetensors").write_bytes(serialize(adapter))
        states = io.BytesIO()
        torch.save(optimizer, states)
        (aside / "optimizer.pt").write_bytes(states.getbuffer())
        (aside / "state.json").write_text(json.dumps({**state, "step": step}), encoding="utf-8")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in sorted(aside.iterdir())
        }
        (aside / MANIFEST).write_text(
            json.dumps({"step": step, "files": files}, indent=2), encoding="utf-8"
        )
        for path in aside.iterdir():
            sync(path)
        if target.exists():  # an incomplete or damaged one of the same step
            shutil.rmtree(target)
        aside.rename(target)
        sync(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(aside)
        raise CheckpointError(
            f"checkpoint {target} cannot be written: {error.strerror or error}; free space and"
            " continue with --resume"
        ) from None
    for old in list_checkpoints(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """step-N folders, newest first, complete or not."""
    found = (
        [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
        if folder.is_dir()
        else []
    )
    return sorted(found, key=lambda path: -int(path.name[5:]))


def find_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file has the size and hash of its
    manifest.
    """
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            if (size := (path / name).stat().st_size) != facts["bytes"]:
                return f"{name} has {size} bytes, not {facts['bytes']}"
            if hash_file(path / name) != facts["sha256"]:
                return f"{name} does not have its recorded hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint, and a warning for each damaged one that was passed over."""
    warnings = []
    for path in list_checkpoints(folder):
        problem = find_problem(path)
        if problem is not None:
            warnings.append(f"checkpoint {path} is damaged ({problem}); using the one before")
            continue
        return (
            Checkpoint(
                path,
                load_file(path / "adapter.safetensors"),
                torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"),
                json.loads((path / "state.json").read_text(encoding="utf-8")),
            ),
            warnings,
        )
    return None, warnings
