"""What a program runs in: versions, commit, hardware, the memory that it takes.

Nothing here imports torch when it is read, so that a script can set torch's variables before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import resource
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import psutil


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

    def read_peaks(self) -> dict[str, int]:
        """The peaks that a step is logged with."""
        if not self.cuda:
            return {"peak_memory_bytes": self.read_peak()}
        return {
            "peak_memory_bytes": self.read_peak(),
            "peak_reserved_bytes": self.read_reserved(),
        }

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


EXPAND = "expandable_segments:True"
# torch 2.11 and newer read both; older versions and other tools know only the second, which is the
# one that we set.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prefer_expandable_segments(environ: MutableMapping[str, str]) -> None:
    """Ask for segments that grow, before torch is imported: without them more memory is reserved
    than is in use. What a user has set stays; Windows has no such segments."""
    if sys.platform == "linux" and not any(environ.get(name) for name in VARIABLES):
        environ[VARIABLES[1]] = EXPAND
