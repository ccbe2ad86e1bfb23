"""What a run began with: the hashes of its data, base and prompts, and the versions of packages.

The first start writes them to origin.json. Every resumed start compares itself with them and adds
itself to the list of resumptions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medqlora.core.errors import RunError
from medqlora.core.files import read_checked

ORIGIN = "origin.json"
ENVIRONMENT = "environment.json"

# Each hash stands for one of these; causes come before their effects.
MEANINGS = {
    "base_files_sha256": "the files of model.base",
    "tokenizer_sha256": "the tokenizer or its chat template",
    "prompt_sha256": "the prompts",
    "data_sha256": "the rows of data.train",
    "eval_sha256": "the rows of data.eval",
    "test_sha256": "the questions of data.test",
    "tokens_sha256": "the tokens of the training and evaluation rows",
    "row_losses_sha256": "the base's losses of the training rows",
    "steps_sha256": "the rows of the steps",
}
# Another version of a package may write the same rows or the same tokenizer in another form. These
# hashes then differ, although the tokens that are trained on are the same.
OF_A_FORM = {"tokenizer_sha256", "data_sha256", "eval_sha256", "test_sha256"}
REMEDY = (
    "restore what the run began with, choose another --output_dir, or continue all the same with"
    " --resume_changed"
)


@dataclass(frozen=True)
class Changes:
    """What is otherwise than when a run began.

    Args:
        hashes: The keys of the hashes that differ, in the order of MEANINGS.
        versions: For each package that differs, the version then and now (None for none).
        harmless: Whether the tokens of all rows, the prompts and the base are still the same, so
            that other versions alone explain the difference.
    """

    hashes: list[str]
    versions: dict[str, list[str | None]]
    harmless: bool


def read_origin(folder: Path, accept_changes: bool = False) -> dict[str, Any]:
    """Read what the run in a folder began with.

    Args:
        folder: The run folder.
        accept_changes: Whether a damaged or missing record stops nobody; it is then empty.

    Returns:
        The content of origin.json, or what environment.json of an older version tells. It is empty
        for a run that has not begun to train.

    Raises:
        RunError: The record is damaged, or it is missing beside checkpoints.
    """
    path = folder / ORIGIN
    if path.exists():
        origin = read_checked(path)
    elif (folder / ENVIRONMENT).is_file():
        origin = read_older_origin(folder / ENVIRONMENT)
    else:
        # A run that was killed while it was opened has neither, and nothing has been trained.
        origin = None if any(folder.glob("checkpoints/step-*")) else {}
    if origin is not None:
        return origin
    if accept_changes:
        return {}
    raise RunError(
        f"--resume: {path} is damaged or missing, and nothing else tells whether data, base and"
        f" prompts are those of the run; {REMEDY}"
    )


def read_older_origin(path: Path) -> dict[str, Any] | None:
    """Return what environment.json of a version without origin.json says, or None if damaged."""
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
        step = environment.get("step_plan", {})
        return {
            **{key: environment[key] for key in MEANINGS if key in environment},
            "versions": environment.get("versions", {}),
            # Still older versions packed rows into the micro-batches of their processes.
            "packed_tokens": step.get("packed_tokens", step.get("max_tokens_per_batch")),
            "init_adapter": environment.get("base", {}).get("init_adapter"),
        }
    except (ValueError, AttributeError, RecursionError):
        return None


def find_changes(
    origin: Mapping[str, Any], hashes: Mapping[str, str], versions: Mapping[str, str | None]
) -> Changes:
    """Compare a start with what the run began with; what the record lacks is not compared.

    Args:
        origin: The result of read_origin.
        hashes: The hashes of this start, by the keys of MEANINGS.
        versions: The versions of this start, by package.
    """
    changed = [key for key in MEANINGS if origin.get(key, hashes.get(key)) != hashes.get(key)]
    before = origin.get("versions", versions)
    differing = {
        name: [before.get(name), versions.get(name)]
        for name in dict.fromkeys([*before, *versions])
        if before.get(name) != versions.get(name)
    }
    harmless = bool(differing) and "tokens_sha256" in origin and OF_A_FORM.issuperset(changed)
    return Changes(changed, differing, harmless)


def describe_changes(
    changes: Changes,
    origin: Mapping[str, Any],
    hashes: Mapping[str, str],
    accept_changes: bool,
) -> list[str]:
    """Return warnings about what is otherwise than when the run began.

    Raises:
        RunError: The remaining steps would not be those of the run, and `accept_changes` is off.
    """
    named = [f"{name} {old} -> {new}" for name, (old, new) in changes.versions.items()]
    versions = ", ".join(named)
    warnings = []
    if versions:
        warnings.append(f"other versions than when the run began: {versions}")
    if not changes.hashes:
        return warnings
    texts = [
        f"{MEANINGS[key]} ({key} was {str(origin[key])[:12]}, now {str(hashes.get(key))[:12]})"
        for key in changes.hashes
    ]
    listed = f"{', '.join(texts)} changed since the run began"
    if changes.harmless:
        return [*warnings, f"{listed}; the tokens of all rows are the same, so it goes on"]
    if accept_changes:
        return [*warnings, f"--resume_changed: {listed}"]
    cause = f", by a file or by another version ({versions})" if versions else ", by a file"
    raise RunError(f"--resume: {listed}{cause}; {REMEDY}")
