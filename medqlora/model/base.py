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
    """Return the transformers causal LM inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(causal: torch.nn.Module) -> torch.nn.Module:
    """Return the model without its head; adapters belong to it."""
    # transformers names the attribute here; it is "model" in Llama and "transformer" in GPT-2.
    return getattr(causal, causal.base_model_prefix)


class ModelError(UserError):
    """A model, adapter or quantization that cannot be used."""


def read_model_config(
    base: str, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Read the config of a model, without its weights.

    Args:
        base: A folder or a hub id.
        revision: The hub's revision; the newest by default.
        trust_remote_code: Whether code of the hub may run.

    Raises:
        ModelError: There is no such model, or it has no safetensors weights.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            is_adapter = (folder / "adapter_config.json").is_file()
            hint = "; this is an adapter, give its base" if is_adapter else ""
            raise ModelError(
                f"model {base}: no config.json in this folder; expected a transformers model{hint}"
            )
        if not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"model {base}: no .safetensors file; convert the weights (pickled weights are not"
                " loaded)"
            )
    # A hub id has one slash at most and does not begin like a path.
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
    """Load the base model's own tokenizer; the arguments are those of read_model_config.

    Raises:
        ModelError: There is none that can be read.
    """
    folder = Path(base).expanduser()
    try:
        return AutoTokenizer.from_pretrained(
            folder if folder.is_dir() else base,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model {base}: its tokenizer cannot be read: {' '.join(str(error).split())[:200]}"
        ) from None


def check_hardware(model: Model, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what this machine cannot run, before any weight is loaded.

    Raises:
        ModelError: The quantization or the dtype cannot be used; the message says which can.
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
    """Refuse rows of more tokens than the model has positions.

    Args:
        config: The model's config.
        length: The number of tokens.
        key: The configuration key or flag that holds it, for the message.

    Raises:
        ModelError: The length is over the model's positions.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and length > longest:
        raise ModelError(
            f"{key} {length} is over the model's {longest} positions; lower it to {longest} or less"
        )


def load_base(
    model: Model, device: torch.device, storage: torch.dtype = torch.uint8
) -> tuple[torch.nn.Module, str]:
    """Load the frozen base model on one device, quantized as the configuration says.

    Args:
        model: The configuration's section.
        device: The device.
        storage: The dtype in which 4-bit weights are packed (see strategies.launch.choose_storage).

    Returns:
        The transformers model in eval mode, and the name of the attention backend.

    Raises:
        ModelError: The model cannot be used (see check_hardware and read_model_config).
        AttentionError: The attention backend cannot run (see choose_backend).
    """
    # What can be refused without the weights is refused before the long download and loading.
    dtype = choose_dtype(model.dtype, device)
    check_hardware(model, device, dtype)
    config = read_model_config(model.base, model.revision, model.trust_remote_code)
    backend = choose_backend(model.attention, device, dtype, config).backend
    folder = Path(model.base).expanduser()
    try:
        # use_safetensors also refuses pickled weights of the hub, which read_model_config does not
        # see.
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
        # transformers looks an attention's name up among those that a model supports. Any other
        # KeyError is not about attention.
        if str(error).strip("'") not in IMPLEMENTATIONS.values():
            raise
        raise ModelError(
            f"model {model.base}: its attention cannot be replaced by {backend}; use"
            " --model.attention sdpa"
        ) from None
    freeze(loaded, model, dtype)
    return loaded, backend


def freeze(base: torch.nn.Module, model: Model, dtype: torch.dtype) -> None:
    """Freeze all parameters of a base and apply the overrides that suit it.

    Args:
        base: A transformers causal LM, which is changed.
        model: The configuration's section.
        dtype: The compute dtype.
    """
    # The replaced norms, head and LoRA layers compute no gradients of the base's weights, so every
    # one of them must be frozen.
    base.requires_grad_(False)
    if model.upcast_embeddings:
        for embedding in (base.get_input_embeddings(), base.get_output_embeddings()):
            embedding.to(torch.float32)
    # This precedes every evaluation, because the first one would repack the weights for good.
    keep_quantized_layout(base)
    if model.quantization == "int8":
        # bitsandbytes would warn at every matrix product that its input is cast to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # Overrides come last, because each is proven on the weights and dtypes of the training.
    apply_overrides(base.modules(), BASE_OVERRIDES, dtype)


def find_layers(causal: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the decoder layers, in order.

    They are the first module list of as many modules as the config names layers.
    """
    count = causal.config.get_text_config().num_hidden_layers
    lists = (module for module in causal.modules() if isinstance(module, torch.nn.ModuleList))
    return list(next(layers for layers in lists if len(layers) == count))
