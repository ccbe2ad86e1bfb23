"""What is this GPU, and how fast does it copy and multiply?"""

import contextlib
import os
import subprocess
import sys

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads this variable when it is imported.

import torch

from medqlora.core.environment import describe_environment
from medqlora.model.attention.backends import try_flash_package
from medqlora.training.gpu_stage import Stage
from medqlora.training.memory.allocator import segments_expand


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    stage.figure("environment", describe_environment())
    stage.figure("driver", read_driver())
    stage.figure("expandable_segments", segments_expand())
    stage.figure("flash_attn", try_flash_package() or "can be imported")
    if stage.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        # A process takes so much before its first tensor. The forecast assumes
        # medqlora.training.memory.target.CONTEXT for it.
        stage.figure("context_bytes", total - free - torch.cuda.memory_reserved())
    size = 64 * 2**20 if stage.small else 2 * 2**30
    source = torch.randint(256, (size,), dtype=torch.uint8, device=stage.device)
    target = torch.empty_like(source)
    seconds = stage.time(lambda: target.copy_(source))
    # Each byte is read and written.
    stage.figure("copy_bytes_per_second", 2 * size / seconds)
    host = torch.empty(size // 4, dtype=torch.uint8, pin_memory=stage.device.type == "cuda")
    seconds = stage.time(lambda: host.copy_(source[: len(host)], non_blocking=True))
    stage.figure("copy_to_host_bytes_per_second", len(host) / seconds)
    width = 1024 if stage.small else 8192
    a = torch.randn(width, width, device=stage.device).to(torch.bfloat16)
    b = torch.randn(width, width, device=stage.device).to(torch.bfloat16)
    seconds = stage.time(lambda: a @ b)
    stage.figure("bfloat16_product", {"width": width, "flops_per_second": 2 * width**3 / seconds})
    return stage.finish()


def read_driver() -> str | None:
    """Name, driver and limits of the GPU from nvidia-smi; None where that does not run."""
    fields = "name,driver_version,power.limit,clocks.max.sm,memory.total"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    return None


if __name__ == "__main__":
    sys.exit(main())
