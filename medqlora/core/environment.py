"""The environment of a program: versions, commit, hardware and the memory that it takes.

This module imports torch only inside functions, because torch reads some environment variables when
it is imported and a script must be able to set them before.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import psutil

STAGE = "MEDQLORA_STAGE"  # recipes/train_stages.py names the stage of a process in this variable.


def read_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    packages = (
        "medqlora",
        "torch",
        "transformers",
        "tokenizers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "numpy",
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


def was_restarted(environ: Mapping[str, str]) -> bool:
    """Say whether torch elastic or Slurm restarted this job, which must then resume by itself."""
    counters = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(environ.get(name) or 0) > 0 for name in counters)


def name_command(script: str, arguments: list[str]) -> list[str]:
    """Return a command in the form in which it is recorded.

    Absolute paths mean nothing on another machine, so only their last part is recorded.
    """
    recorded = [script]
    for argument in arguments:
        path = Path(argument)
        recorded.append(path.name if path.is_absolute() else argument)
    return recorded


def describe_environment() -> dict[str, Any]:
    """Return the versions, the commit and the hardware, as environment.json holds them."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "memory_bytes": properties.total_memory,
                    "capability": f"{properties.major}.{properties.minor}",
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
    """Return the commit of the source tree that this package runs from; None outside a checkout.

    The commit ends in "-dirty" where the tree has uncommitted changes.
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


class MemoryMeter:
    """Measures memory in bytes: that of tensors on the GPU, or the process's resident memory.

    Args:
        cuda: Whether the program computes on a GPU.
    """

    def __init__(self, cuda: bool):
        self.cuda = cuda
        self.process = psutil.Process()

    def now(self) -> int:
        """Return the bytes in use at this moment."""
        if self.cuda:
            import torch

            # This counts tensors alone, without the CUDA context and free blocks of the allocator.
            return torch.cuda.memory_allocated()
        return self.process.memory_info().rss

    def begin(self) -> None:
        """Count peaks from here on."""
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        # Linux resets the peak of resident memory so. Other systems have no such file, and their
        # peak counts from the start of the process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def read_peaks(self) -> dict[str, int]:
        """Return the peaks that are logged for a step."""
        if not self.cuda:
            return {"peak_memory_bytes": self.read_peak()}
        return {
            "peak_memory_bytes": self.read_peak(),
            "peak_reserved_bytes": self.read_reserved(),
        }

    def read_reserved(self) -> int:
        """Return the most GPU memory that torch's allocator has reserved since begin()."""
        import torch

        return torch.cuda.max_memory_reserved()

    def read_peak(self) -> int:
        """Return the most memory in use since begin(), or since the start of the process."""
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        return read_peak_resident()


def read_peak_resident() -> int:
    """Return the highest resident memory of this process in bytes."""
    # On Linux getrusage would count what the parent process held when it forked this one.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                kibibytes = int(line.split()[1])
                return kibibytes * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, other systems KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


EXPANDABLE = "expandable_segments:True"
# torch reads both from version 2.11 on. Older versions and other tools know only the second, so the
# second is set.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prefer_expandable_segments(environ: MutableMapping[str, str]) -> None:
    """Let torch's GPU allocator use segments that grow; to be called before torch is imported.

    With fixed segments the allocator reserves more memory than is in use. A setting of the user is
    kept. Only Linux has such segments.

    Args:
        environ: The environment variables, which are changed.
    """
    if sys.platform == "linux" and not any(environ.get(name) for name in VARIABLES):
        environ[VARIABLES[1]] = EXPANDABLE
