"""Load the frozen base model, quantized or not."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
)

from medqlora.core.config import Model
from medqlora.core.hub import explain_hub
from medqlora.core.reading import expand_path, read_object, shorten
from medqlora.model.attention.backends import IMPLEMENTATIONS, choose_backend
from medqlora.model.base_weights import (
    check_files,
    check_loaded,
    check_quantizable,
    describe_quantized,
)
from medqlora.model.hardware import choose_dtype, read_capability
from medqlora.model.overrides import BASE_OVERRIDES, apply_overrides, make_rotary_overrides
from medqlora.model.quantization import keep_quantized_layout, quantization_config
from medqlora.model.weight_files import ModelError


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """Return the transformers causal LM inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(causal: torch.nn.Module) -> torch.nn.Module:
    """Return the model without its head; adapters belong to it."""
    # transformers names the attribute here; it is "model" in Llama and "transformer" in GPT-2. The
    # text model of Llama 4 names one that it does not have.
    return getattr(causal, causal.base_model_prefix, None) or causal.model


def compute_hidden(
    causal: torch.nn.Module,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    **packing: Any,
) -> torch.Tensor:
    """Run a model without its head, which would make logits at every position.

    Args:
        causal: A transformers causal LM.
        input_ids: int64 [1, tokens].
        position_ids: int64 [1, tokens]; they begin from 0 in each document.
        packing: Arguments of the attention (see packed_batch.packing_arguments).

    Returns:
        Hidden states, [1, tokens, hidden].
    """
    # No mask and no cache may be given: with either one, transformers lets packed rows see each
    # other without a word.
    return backbone_of(causal)(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=None,
        use_cache=False,
        **packing,
    ).last_hidden_state


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
    folder = find_model(base)
    if folder is not None:
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
        read_object(folder / "config.json", f"model {base}", ModelError, infinite=True)
    try:
        config = AutoConfig.from_pretrained(
            folder or base,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    # A value that is no valid one may fail in any line of any architecture's code.
    except Exception as error:  # noqa: BLE001
        reason = explain_hub(error, base) or f"its config cannot be read: {describe(error)}"
        raise ModelError(f"model {base}: {reason}") from None
    # torch counts nothing that is larger. -1 positions stand for a model without a limit.
    for key, least in (("num_hidden_layers", 1), ("max_position_embeddings", -1)):
        size = getattr(config.get_text_config(), key, least)
        if isinstance(size, int) and not least <= size < 2**31:
            raise ModelError(f"model {base}: its config has {key} {size}; fetch the model again")
    return config


def find_model(base: str) -> Path | None:
    """Return a model's folder, or None for an id of the hub.

    Raises:
        ModelError: It is neither.
    """
    folder = expand_path(base, "model")
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"model {base}: a file; give the folder of a transformers model")
    # A hub id has one slash at most and does not begin like a path.
    if not base or base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ModelError(
            f"model {base}: no such folder; give an existing folder or a hub id (owner/name)"
        )
    return None


def load_tokenizer(base: str, revision: str | None = None, trust_remote_code: bool = False):
    """Load the base model's own tokenizer; the arguments are those of read_model_config.

    Raises:
        ModelError: There is none that can be read.
    """
    folder = find_model(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder or base,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        tokenizer("a")  # Some settings of a wrong type are noticed when they are used.
    # The tokenizers library raises plain Exceptions, and transformers what its code meets.
    except Exception as error:  # noqa: BLE001
        reason = explain_hub(error, base) or f"its tokenizer cannot be read: {describe(error)}"
        raise ModelError(f"model {base}: {reason}") from None
    return tokenizer


def describe(error: Exception) -> str:
    """Return what a library raised, in one line."""
    return shorten(" ".join(str(error).split()) or type(error).__name__, 200)


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
        WeightsError: The weights may not be quantized (see check_quantizable).
        AttentionError: The attention backend cannot run (see choose_backend).
    """
    # What can be refused without the weights is refused before the long download and loading.
    dtype = choose_dtype(model.dtype, device)
    check_hardware(model, device, dtype)
    config = read_model_config(model.base, model.revision, model.trust_remote_code)
    check_quantizable(model, config)
    backend = choose_backend(model.attention, device, dtype, config).backend
    folder = find_model(model.base)
    quantization = quantization_config(model, dtype, storage)
    # Even None would replace what the config says of weights that are quantized in the files, and
    # their codes would be loaded as if they were the weights.
    settings = {} if quantization is None else {"quantization_config": quantization}
    if folder is not None:
        check_files(folder, config)
    try:
        # use_safetensors also refuses pickled weights of the hub, which read_model_config does not
        # see.
        loaded, found = AutoModelForCausalLM.from_pretrained(
            folder or model.base,
            revision=model.revision,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=IMPLEMENTATIONS[backend],
            trust_remote_code=model.trust_remote_code,
            device_map={"": device},
            output_loading_info=True,
            **settings,
        )
    except torch.OutOfMemoryError:
        raise
    # A config that does not suit the weights may fail in any line of an architecture's code.
    except Exception as error:  # noqa: BLE001
        advice = explain_attention(error, backend) or explain_hub(error, model.base)
        advice = advice or explain_quantized(error, config)
        advice = advice or f"it cannot be loaded: {describe(error)}; fetch the whole model again"
        raise ModelError(f"model {model.base}: {advice}") from None
    check_loaded(model.base, loaded, found)
    freeze(loaded, model, dtype)
    return loaded, backend


def explain_quantized(error: Exception, config: PretrainedConfig) -> str | None:
    """Return why weights that are quantized in the files cannot be loaded; None for other errors.

    Args:
        error: What transformers raised.
        config: The model's config.
    """
    kind = describe_quantized(config)
    # Such weights need packages and hardware of their own. Full memory is another matter.
    if kind is None or isinstance(error, (KeyError, torch.OutOfMemoryError)):
        return None
    return (
        f"its {kind} weights cannot be loaded here: {' '.join(str(error).split())[:200]}; give the"
        " unquantized model that it was made from"
    )


def explain_attention(error: Exception, backend: str) -> str | None:
    """Return what to do where transformers refuses a backend for a model; None for other errors.

    Args:
        error: What transformers raised when it made the model.
        backend: The attention backend.
    """
    text = str(error)
    # transformers looks our attention's name up among those that a model supports, and says of its
    # own that a model "does not support an attention implementation".
    if isinstance(error, KeyError) and text.strip("'") == IMPLEMENTATIONS[backend]:
        others = "sdpa or eager"
    elif "does not support an attention implementation" in text:
        others = "eager"
    else:
        return None
    return f"its attention cannot be replaced by {backend}; use --model.attention {others}"


def freeze(base: torch.nn.Module, model: Model, dtype: torch.dtype) -> None:
    """Freeze all parameters of a base and apply the overrides that suit it.

    Args:
        base: A transformers causal LM, which is changed.
        model: The configuration's section.
        dtype: The compute dtype.
    """
    # The replaced head and LoRA layers compute no gradients of the base's weights. Where there are
    # none of them, full_model.unfreeze lets the weights train again.
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
    apply_overrides(base.modules(), (*BASE_OVERRIDES, *make_rotary_overrides(base)), dtype)


def find_layers(causal: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the decoder layers, in order.

    They are the first module list of as many modules as the config names layers.

    Raises:
        ModelError: There is no such list.
    """
    for module in causal.modules():
        if is_layer_list(causal, module):
            return list(module)
    raise ModelError(
        f"{type(causal).__name__} has no list of as many decoder layers as its config names; set"
        " --training.gradient_checkpointing none"
    )


def is_layer_list(causal: torch.nn.Module, module: torch.nn.Module) -> bool:
    """Whether a module of a model is a list of as many modules as the config names layers."""
    count = getattr(causal.config.get_text_config(), "num_hidden_layers", None)
    return isinstance(module, torch.nn.ModuleList) and len(module) == count


def list_untrained(causal: torch.nn.Module) -> list[str]:
    """Return the names of modules whose linear layers `all-linear` leaves alone.

    They are everything beside the language model, such as towers for images and sound and the
    projectors behind them; layers that return more than a matrix product, as Llama 4's routers; and
    the last layers of Mamba mixers, whose kernels read the weight and pass an adapter by.
    """
    decoder, language = find_language(causal)
    kept = {causal, decoder, causal.get_output_embeddings()}
    names: list[str] = []
    for name, module in causal.named_modules():
        if module in kept or (names and name.startswith(f"{names[-1]}.")):
            continue
        if module in language:
            if isinstance(module, torch.nn.Linear) and not trains_by_product(causal, name):
                names.append(name)
        # A module around the decoder is looked into instead.
        elif decoder not in set(module.modules()) and has_linear(module):
            names.append(name)
    return names


def find_language(causal: torch.nn.Module) -> tuple[torch.nn.Module, set[torch.nn.Module]]:
    """Return the language model of a causal LM, and all modules in it."""
    decoder = causal.get_decoder()
    language = set(decoder.modules())
    # A module that transformers takes for the decoder may be a part of the text's model.
    layers = {module for module in causal.modules() if is_layer_list(causal, module)}
    if not layers & language:
        decoder, language = causal, set(causal.modules())
    return decoder, language


def list_towers(causal: torch.nn.Module) -> list[str]:
    """Return the names of the modules with weights beside the language model: towers for images or
    sound, and the projectors behind them. A model of text alone has none.
    """
    if causal.config.get_text_config() is causal.config:
        return []
    decoder, language = find_language(causal)
    kept = language | {causal, causal.get_output_embeddings()}
    names: list[str] = []
    for name, module in causal.named_modules():
        if module in kept or (names and name.startswith(f"{names[-1]}.")):
            continue
        # A module around the decoder is looked into instead.
        if decoder not in set(module.modules()) and next(module.parameters(), None) is not None:
            names.append(name)
    return names


def has_linear(module: torch.nn.Module) -> bool:
    """Whether a module has a linear layer in it."""
    return any(isinstance(part, torch.nn.Linear) for part in module.modules())


def trains_by_product(causal: torch.nn.Module, name: str) -> bool:
    """Whether an adapter on the linear layer of a name takes effect: the layer is called, and its
    result is one tensor.
    """
    mixer, _, last = name.rpartition(".")
    # Falcon-H1's class does not say that it is a Mamba mixer, but its attribute does.
    title = f"{type(causal.get_submodule(mixer)).__name__} {mixer.rpartition('.')[2]}"
    if last == "out_proj" and "mamba" in title.lower():
        return False
    linear = causal.get_submodule(name)
    if not type(linear).__module__.startswith("transformers."):
        return True
    x = torch.zeros((1, linear.in_features), dtype=linear.weight.dtype, device=linear.weight.device)
    try:
        with torch.no_grad():
            return torch.is_tensor(linear(x))
    # DeepSeek-V4's grouped layers take inputs of another shape.
    except RuntimeError:
        return False
