"""The run folder: who made it, from what, and logs that survive a kill."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import ValidationError

from medqlora.config import Config, UserError, dump_config

LOG = "train_log.jsonl"
PICTURES = (".png", ".svg", ".pdf")
LAUNCH = "launch"  # written by launch/slurm_train.sbatch before the run exists


class RunError(UserError):
    """An output folder that cannot be used."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write aside, flush to disk, rename: the file is the old one or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from None


def check_new(path: Path | None, flag: str = "--output") -> None:
    """Raises RunError where a file to be written exists, or its folder does not: before any work,
    nothing is written over.
    """
    if path is not None and path.exists():
        raise RunError(f"{flag} {path} exists; give a new file name")
    if path is not None and not path.parent.is_dir():
        raise RunError(f"{flag} {path}: no folder {path.parent}; make it first")
    if path is not None and not os.access(path.parent, os.W_OK):
        raise RunError(f"{flag} {path}: folder {path.parent} cannot be written to; give another")


def check_picture(path: Path | None) -> None:
    """Raises RunError where --plot names a file that exists, a format that is not drawn, or
    matplotlib is missing.
    """
    if path is None:
        return
    check_new(path, "--plot")
    if path.suffix not in PICTURES:
        raise RunError(f"--plot {path}: expected a name that ends in {', '.join(PICTURES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise RunError("--plot needs matplotlib; pip install 'medqlora[bench]', or leave it out")


def write_json(path: Path, tree: Any) -> None:
    write_atomic(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: list[dict]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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


def append_line(path: Path, row: dict) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; free space and continue with --resume"
        ) from None


def read_lines(path: Path) -> list[dict]:
    """All complete lines of an append-only log; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def rewind_log(path: Path, step: int) -> None:
    """Drop what was logged after `step`: the resumed run writes those lines again."""
    rows = [row for row in read_lines(path) if row["step"] <= step]
    if path.is_file():
        write_json_lines(path, rows)


def check_disk(folder: Path, needed: int, purpose: str) -> None:
    """Raises RunError where the folder's disk has less than `needed` bytes."""
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RunError(
            f"--output_dir {folder}: {purpose} needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f}"
            " MiB are free; free space, choose another folder, or lower training.keep_checkpoints"
        )


def read_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    packages = (
        "medqlora",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "datasets",
        "deepspeed",
        "flash-attn",
        "vllm",
    )
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def name_command(script: str, arguments: list[str]) -> list[str]:
    """A command as it is recorded: of absolute paths, which are one machine's, the last part."""
    return [
        script,
        *(
            Path(argument).name if Path(argument).is_absolute() else argument
            for argument in arguments
        ),
    ]


def describe_environment() -> dict[str, Any]:
    """Versions, commit and hardware."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": facts.name,
                    "memory_bytes": facts.total_memory,
                    "capability": f"{facts.major}.{facts.minor}",
                }
            )
    return {
        "versions": read_versions(),
        "git_commit": read_commit(),
        "hardware": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpus": gpus,
            "cuda": torch.version.cuda,
        },
    }


def read_commit() -> str | None:
    """Commit of the source tree this package runs from, with "-dirty" where files differ; None
    outside a checkout.
    """
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-dirty" if dirty.strip() else "")


def hash_json(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class MemoryMeter:
    """Peak memory in bytes: what tensors take of a GPU where one trains, else this process's
    resident memory.
    """

    def __init__(self, cuda: bool):
        self.cuda, self.process = cuda, psutil.Process()

    def now(self) -> int:
        """Bytes in use at this moment."""
        if self.cuda:
            import torch

            return torch.cuda.memory_allocated()
        return self.process.memory_info().rss

    def begin(self) -> None:
        """Count peaks from here on. Linux can do so for resident memory too."""
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def read_reserved(self) -> int:
        """Highest value of what CUDA's allocator held of the GPU since begin()."""
        import torch

        return torch.cuda.max_memory_reserved()

    def read_peak(self) -> int:
        """Highest value since begin(), or since the start of the process."""
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        return read_peak_resident()


def read_peak_resident() -> int:
    """Highest resident memory of this process in bytes. Linux's getrusage would count what the
    parent held at the fork.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return next(
            int(line.split()[1]) * 1024
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
