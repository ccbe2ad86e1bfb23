"""The choice of the attention backend, with its reason."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from medqlora.core.errors import UserError
from medqlora.model.attention.documents import DOCUMENTS
from medqlora.model.attention.kernels import ALIGNED
from medqlora.model.hardware import AMPERE, name_capability, read_capability

# The backends, each with the name of the attention function that transformers calls for it.
IMPLEMENTATIONS = {
    "varlen": DOCUMENTS,
    "grouped": DOCUMENTS,
    "flash": "flash_attention_2",
    "flex": "flex_attention",
    "sdpa": "sdpa",
    "eager": "eager",
}


class AttentionError(UserError):
    """A backend that cannot run here, or that lets packed documents see each other."""


class Choice(NamedTuple):
    """The name of a backend and the reason why it was chosen."""

    backend: str
    reason: str


def choose_backend(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    architecture: PretrainedConfig,
    capability: tuple[int, int] | None = None,
) -> Choice:
    """Choose the attention backend.

    Args:
        requested: The value of model.attention. "auto" means varlen where its kernel runs, else the
            flash-attn package, else grouped.
        device: The device that is computed on.
        dtype: The compute dtype.
        architecture: The config of the model.
        capability: The compute capability of a GPU that this machine lacks; this machine's by
            default (see hardware.read_capability).

    Raises:
        AttentionError: The requested backend cannot run.
    """
    text = architecture.get_text_config()
    softcap = getattr(text, "attn_logit_softcapping", None)
    gpu = device.type == "cuda"
    flash_obstacle = explain_flash(device, dtype, text, capability)
    varlen_obstacle = None
    # On a CPU varlen stands for grouped, which nothing prevents.
    if gpu:
        varlen_obstacle = flash_obstacle or explain_varlen(text)
    obstacles = {
        "varlen": varlen_obstacle,
        "flash": flash_obstacle or "the flash-attn package is not installed",
        "grouped": None,
        "flex": None if gpu else "a CPU",
        "sdpa": None if softcap is None else "attention softcap",
        "eager": None,
    }
    # The import of the package takes seconds, so it is tried only where the answer matters.
    if flash_obstacle is None and (requested == "flash" or varlen_obstacle):
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


def set_attention(causal: torch.nn.Module, implementation: str) -> None:
    """Let a model compute with another of transformers' attention functions.

    Args:
        causal: A transformers causal LM.
        implementation: A value of IMPLEMENTATIONS.

    Raises:
        ValueError, KeyError: The model does not support the function.
    """
    if causal.config._attn_implementation == implementation:
        return
    causal.set_attn_implementation(implementation)
    # BLOOM has one attention of its own, and transformers leaves the name alone, with only a
    # warning. But the name decides which mask the model makes for that attention.
    causal.config._attn_implementation = implementation


def choose_automatically(gpu: bool, obstacles: dict[str, str | None]) -> Choice:
    """Choose a backend for "auto" from what prevents each."""
    if not gpu:
        return Choice("grouped", "a CPU has no variable-length kernel")
    if not obstacles["varlen"]:
        return Choice("varlen", "torch's variable-length flash kernel runs here")
    reason = f"torch's variable-length kernel cannot run: {obstacles['varlen']}"
    if not obstacles["flash"]:
        return Choice("flash", reason)
    # A package that is installed but broken deserves a word; one that is missing does not.
    if "import" in obstacles["flash"]:
        reason += f"; flash-attn is passed over: {obstacles['flash']}"
    return Choice("grouped", reason)


def explain_flash(
    device: torch.device,
    dtype: torch.dtype,
    text: PretrainedConfig,
    capability: tuple[int, int] | None,
) -> str | None:
    """Return why flash attention (Dao, 2023, arXiv 2307.08691) cannot run, or None where it can.

    The conditions are those of torch's kernel (pytorch/aten/src/ATen/native/transformers/cuda,
    flash_attn/flash_api.cpp) and of the flash-attn package.

    Args:
        device: The device that is computed on.
        dtype: The compute dtype.
        text: The config of the language model.
        capability: As in choose_backend.
    """
    if device.type != "cuda":
        return "a CPU"
    capability = capability or read_capability(device)
    if capability < AMPERE:
        return f"compute capability {name_capability(capability)}, below {name_capability(AMPERE)}"
    if dtype not in (torch.float16, torch.bfloat16):
        return str(dtype).removeprefix("torch.")
    # A config without head_dim divides the hidden size evenly among the heads.
    width = getattr(text, "head_dim", None)
    if width is None and getattr(text, "num_attention_heads", None):
        width = text.hidden_size // text.num_attention_heads
    # A width that the config does not tell passes here; verify_isolation runs the kernel before any
    # training step does.
    if width and (width % ALIGNED or width > 256):
        return f"head width {width}, not a multiple of {ALIGNED} up to 256"
    return None


def explain_varlen(text: PretrainedConfig) -> str | None:
    """Return what in a model prevents torch's variable-length kernel, or None.

    The kernel has no softcap, and its values must be as wide as its queries.
    """
    # attend_documents hands no softcap to the kernel, so it would be left out silently.
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "attention softcap"
    values = getattr(text, "v_head_dim", None)
    queries = getattr(text, "qk_head_dim", None) or getattr(text, "head_dim", None)
    if values and queries and values != queries:
        return f"values {values} wide and queries {queries}"
    return None


def try_flash_package() -> str | None:
    """Return why the flash-attn package cannot be imported, or None where it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the flash-attn package is not installed"
    try:
        importlib.import_module("flash_attn")
    # A package that was built for another torch, Python or CUDA fails to load its binary, as an
    # ImportError, OSError, RuntimeError or AttributeError. Another backend computes the same, so
    # the reason is reported and the package is passed over.
    except Exception as error:  # noqa: BLE001
        return f"its import ends in {type(error).__name__} ({' '.join(str(error).split())[:120]})"
    return None
