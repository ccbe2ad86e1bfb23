"""Which attention runs here, and why."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from medqlora.core.errors import UserError
from medqlora.model.attention.documents import DOCUMENTS
from medqlora.model.attention.kernels import ALIGNED
from medqlora.model.hardware import AMPERE, name_capability, read_capability

IMPLEMENTATIONS = {
    "varlen": DOCUMENTS,
    "grouped": DOCUMENTS,
    "flash": "flash_attention_2",
    "flex": "flex_attention",
    "sdpa": "sdpa",
}


class AttentionError(UserError):
    """A backend that does not exist here, or that mixes packed documents."""


class Choice(NamedTuple):
    """A backend's name, and why it was taken."""

    backend: str
    reason: str


def choose_backend(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    architecture: PretrainedConfig,
    capability: tuple[int, int] | None = None,
) -> Choice:
    """Backend of config.Model.attention, "auto" resolved: varlen where its kernel runs, else the
    flash-attn package, else grouped.

    capability: of a GPU that is not here; default this machine's (hardware.read_capability).

    Raises:
        AttentionError: the asked backend cannot run here.
    """
    text = architecture.get_text_config()
    softcap = getattr(text, "attn_logit_softcapping", None)
    gpu = device.type == "cuda"
    old = explain_flash(device, dtype, text, capability)
    obstacles = {
        "varlen": (
            None
            if not gpu
            else old or ("attention softcap" if softcap is not None else explain_widths(text))
        ),
        "flash": old or "the flash-attn package is not installed",
        "grouped": None,
        "flex": None if gpu else "a CPU",
        "sdpa": None if softcap is None else "attention softcap",
    }
    # Importing the package takes seconds.
    if old is None and (requested == "flash" or obstacles["varlen"]):
        obstacles["flash"] = try_flash_package()
    if requested == "auto":
        return choose_automatically(gpu, obstacles)
    if obstacles[requested]:
        needs = {
            "varlen": (
                "a GPU of compute capability 8.0, a 16-bit dtype, heads of a multiple of 8 up to"
                " 256 and no softcap"
            ),
            "flash": (
                "a GPU of compute capability 8.0, a 16-bit dtype, heads of a multiple of 8 up to"
                " 256 and the flash-attn package"
            ),
            "flex": "a GPU",
            "sdpa": "a model without attention softcap",
        }[requested]
        raise AttentionError(
            f"model.attention {requested} needs {needs}; here is {obstacles[requested]}; use auto"
        )
    if requested == "varlen" and not gpu:
        return Choice("grouped", "a CPU has no variable-length kernel")
    return Choice(requested, "model.attention asks for it")


def choose_automatically(gpu: bool, obstacles: dict[str, str | None]) -> Choice:
    if not gpu:
        return Choice("grouped", "a CPU has no variable-length kernel")
    if not obstacles["varlen"]:
        return Choice("varlen", "torch's variable-length flash kernel runs here")
    reason = f"torch's variable-length kernel cannot run: {obstacles['varlen']}"
    if not obstacles["flash"]:
        return Choice("flash", reason)
    broken = (
        f"; flash-attn is passed over: {obstacles['flash']}"
        if "import" in obstacles["flash"]
        else ""
    )
    return Choice("grouped", reason + broken)


def explain_flash(
    device: torch.device,
    dtype: torch.dtype,
    text: PretrainedConfig,
    capability: tuple[int, int] | None,
) -> str | None:
    """Why flash attention, torch's or the package's, cannot run; None where it can
    (pytorch/aten/src/ATen/native/transformers/cuda, flash_attn/flash_api.cpp)."""
    if device.type != "cuda":
        return "a CPU"
    capability = capability or read_capability(device)
    if capability < AMPERE:
        return f"compute capability {name_capability(capability)}, below {name_capability(AMPERE)}"
    if dtype not in (torch.float16, torch.bfloat16):
        return str(dtype).removeprefix("torch.")
    width = getattr(text, "head_dim", None)
    if width is None and getattr(text, "num_attention_heads", None):
        width = text.hidden_size // text.num_attention_heads
    if width and (width % ALIGNED or width > 256):
        return f"head width {width}, not a multiple of {ALIGNED} up to 256"
    return None


def explain_widths(text: PretrainedConfig) -> str | None:
    """Why torch's variable-length kernel cannot run on a model whose values are of another width
    than its queries.
    """
    values = getattr(text, "v_head_dim", None)
    queries = getattr(text, "qk_head_dim", None) or getattr(text, "head_dim", None)
    return (
        f"values {values} wide and queries {queries}"
        if values and queries and values != queries
        else None
    )


def try_flash_package() -> str | None:
    """Why the flash-attn package cannot be used. One that was built for another torch ends its
    import in one of many errors.
    """
    if importlib.util.find_spec("flash_attn") is None:
        return "the flash-attn package is not installed"
    try:
        importlib.import_module("flash_attn")
    # ImportError, OSError or RuntimeError, by what does not match
    except Exception as error:  # noqa: BLE001
        return f"its import ends in {type(error).__name__} ({' '.join(str(error).split())[:120]})"
    return None
