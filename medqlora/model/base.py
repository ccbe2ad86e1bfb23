"""Load the frozen base model, quantized or not."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
)

from medqlora.core.config import Model
from medqlora.core.errors import UserError
from medqlora.model.attention.backends import IMPLEMENTATIONS, choose_backend
from medqlora.model.hardware import choose_dtype, read_capability
from medqlora.model.overrides import BASE_OVERRIDES, apply_overrides
from medqlora.model.quantization import keep_quantized_layout, quantization_config


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers causal LM inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(causal: torch.nn.Module) -> torch.nn.Module:
    """The model without its head, adapters included."""
    return getattr(causal, causal.base_model_prefix)


class ModelError(UserError):
    """A model, adapter or quantization that cannot be used here."""


def read_model_config(
    base: str, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Architecture facts, without weights.

    Raises: ModelError: no such model, no safetensors weights, or a GPTQ/AWQ model where only plain
        weights can be used.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            hint = (
                "; this is an adapter, give its base"
                if (folder / "adapter_config.json").is_file()
                else ""
            )
            raise ModelError(
                f"model {base}: no config.json in this folder; expected a transformers model{hint}"
            )
        if not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"model {base}: no .safetensors file; convert the weights (pickled weights are not"
                " loaded)"
            )
    elif base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ModelError(
            f"model {base}: no such folder; give an existing folder or a hub id (owner/name)"
        )
    try:
        return AutoConfig.from_pretrained(
            folder if folder.is_dir() else base,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"model {base}: its config cannot be read: {reason}") from None


def load_tokenizer(base: str, revision: str | None = None, trust_remote_code: bool = False):
    """The base model's own tokenizer.

    Raises:
        ModelError: none, or none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(
            Path(base).expanduser() if Path(base).expanduser().is_dir() else base,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model {base}: its tokenizer cannot be read: {' '.join(str(error).split())[:200]}"
        ) from None


def check_hardware(model: Model, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what this machine cannot run, before any weight loads.

    Raises:
        ModelError: with what to use instead.
    """
    if model.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization {model.quantization} needs the bitsandbytes package; install it or"
            " use none"
        )
    if device.type == "cpu" and dtype is torch.float16:
        raise ModelError(
            "model.dtype float16 is not trainable on a CPU; use auto, bfloat16 or float32"
        )
    if model.quantization == "int8" and device.type == "cuda" and read_capability(device) < (7, 5):
        raise ModelError(
            "model.quantization int8 needs a GPU of compute capability 7.5 or newer; use nf4 or"
            " none"
        )


def check_length(config: PretrainedConfig, length: int, key: str = "data.max_length") -> None:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and length > longest:
        raise ModelError(
            f"{key} {length} is over the model's {longest} positions; lower it to {longest} or less"
        )


def load_base(
    model: Model, device: torch.device, storage: torch.dtype = torch.uint8
) -> tuple[torch.nn.Module, str]:
    """Load the frozen base in its storage format on one device. storage: dtype that 4-bit weights
    are packed in (strategies.choose_storage).

    Returns:
        the transformers model in eval mode, and the resolved attention backend.

    Raises:
        ModelError, AttentionError: see check_hardware, read_model_config, choose_backend.
    """
    dtype = choose_dtype(model.dtype, device)
    check_hardware(model, device, dtype)
    config = read_model_config(model.base, model.revision, model.trust_remote_code)
    backend = choose_backend(model.attention, device, dtype, config).backend
    folder = Path(model.base).expanduser()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder if folder.is_dir() else model.base,
            revision=model.revision,
            dtype=dtype,
            use_safetensors=True,
            quantization_config=quantization_config(model, dtype, storage),
            attn_implementation=IMPLEMENTATIONS[backend],
            trust_remote_code=model.trust_remote_code,
            device_map={"": device},
        )
    except KeyError as error:
        if str(error).strip("'") not in IMPLEMENTATIONS.values():
            raise
        raise ModelError(
            f"model {model.base}: its attention cannot be replaced by {backend}; use"
            " --model.attention sdpa"
        ) from None
    freeze(loaded, model, dtype)
    return loaded, backend


def freeze(base: torch.nn.Module, model: Model, dtype: torch.dtype) -> None:
    """Nothing of a base is trained, and its layers are made lighter; dtype: of computing."""
    base.requires_grad_(False)
    if model.upcast_embeddings:
        for embedding in (base.get_input_embeddings(), base.get_output_embeddings()):
            embedding.to(torch.float32)
    keep_quantized_layout(base)
    if model.quantization == "int8":
        # bitsandbytes would say of every product that its input is cast to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    apply_overrides(base.modules(), BASE_OVERRIDES, dtype)


def find_layers(causal: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers, in order."""
    count = causal.config.get_text_config().num_hidden_layers
    return list(
        next(m for m in causal.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    )
