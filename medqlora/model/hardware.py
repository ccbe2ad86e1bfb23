"""Compute capability, and the compute dtype that follows from it."""

from __future__ import annotations

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
AMPERE = (8, 0)  # bfloat16 tensor cores and torch's flash attention begin here
# A forecast for a GPU that is not here takes it to be of 2020 or later, unless it is told
# otherwise.
ASSUMED_CAPABILITY = AMPERE


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability (major, minor) of this machine's GPU, or the one that is assumed of a GPU
    that is not here.
    """
    return (
        torch.cuda.get_device_capability(device)
        if torch.cuda.is_available()
        else ASSUMED_CAPABILITY
    )


def name_capability(capability: tuple[int, int]) -> str:
    """(7, 5) -> "7.5", as NVIDIA writes it."""
    return ".".join(map(str, capability))


def choose_dtype(
    requested: str, device: torch.device, capability: tuple[int, int] | None = None
) -> torch.dtype:
    """Compute dtype; "auto" is bfloat16 where the hardware multiplies it natively, else float16
    (GPU) or float32 (CPU).

    capability: of a GPU that is not here; default this machine's, see read_capability.
    """
    if requested != "auto":
        return DTYPES[requested]
    if device.type == "cuda":
        return (
            torch.bfloat16 if (capability or read_capability(device)) >= AMPERE else torch.float16
        )
    return (
        torch.bfloat16
        if torch.ops.mkldnn._is_mkldnn_bf16_supported() and has_bf16_units()
        else torch.float32
    )


def has_bf16_units() -> bool:
    """AVX512-BF16 or AMX: without them bfloat16 on a CPU is slower than float32, not faster."""
    return bool(
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        or torch.cpu._is_amx_tile_supported()
    )
