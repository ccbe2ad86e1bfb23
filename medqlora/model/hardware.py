"""The compute capability of a GPU, and the compute dtype that follows from it."""

from __future__ import annotations

from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
AMPERE = (8, 0)  # the first capability with bfloat16 tensor cores and torch's flash attention
# On a machine without a GPU, forecasts assume this capability unless they are told another.
ASSUMED_CAPABILITY = AMPERE


def name_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype as the configuration spells it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def default_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def explain_idle_gpu(devices: Path = Path("/dev")) -> str | None:
    """Return why torch cannot use this machine's NVIDIA GPU; None if it can, or there is none.

    Args:
        devices: The folder in which Linux lists a GPU as a file such as nvidia0.
    """
    if torch.cuda.is_available() or not any(devices.glob("nvidia[0-9]*")):
        return None
    cause = f"torch {torch.__version__} is built for CPUs alone"
    if torch.version.cuda is not None:
        cause = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            cause += f", and {(str(error).splitlines() or ['its start failed'])[0]}"
    return (
        f"this machine has an NVIDIA GPU that torch cannot use ({cause}), so training runs on the"
        " CPU; compare the CUDA version that nvidia-smi shows with that of torch, and install the"
        " driver or the torch that fits"
    )


def read_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability (major, minor) of this machine's GPU.

    A machine without a GPU returns ASSUMED_CAPABILITY, for forecasts.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability(device)
    return ASSUMED_CAPABILITY


def name_capability(capability: tuple[int, int]) -> str:
    """Return a capability as NVIDIA writes it; (7, 5) becomes "7.5"."""
    return ".".join(map(str, capability))


def choose_dtype(
    requested: str, device: torch.device, capability: tuple[int, int] | None = None
) -> torch.dtype:
    """Return the compute dtype.

    Args:
        requested: A key of DTYPES, or "auto". That is bfloat16 where the hardware multiplies it
            natively, else float16 on a GPU and float32 on a CPU.
        device: The device that is computed on.
        capability: The compute capability of a GPU that this machine lacks; this machine's by
            default (see read_capability).
    """
    if requested != "auto":
        return DTYPES[requested]
    if device.type == "cuda":
        capability = capability or read_capability(device)
        return torch.bfloat16 if capability >= AMPERE else torch.float16
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() and has_bf16_units():
        return torch.bfloat16
    return torch.float32


def has_bf16_units() -> bool:
    """Whether the CPU has AVX512-BF16 or AMX, without which bfloat16 is slower than float32."""
    has_avx512_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(has_avx512_bf16() or torch.cpu._is_amx_tile_supported())
