"""Load a base model, quantized or not, and attach an adapter."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from medqlora.attention import IMPLEMENTATIONS, choose_backend, find_device
from medqlora.config import Lora, Model, UserError
from medqlora.hardware import choose_dtype, read_capability
from medqlora.layers import DroppedLinear, SeededDropout, lean_layers

# int8 layers multiply inputs over this magnitude in 16 bits; the value is the one that transformers
# sets.
INT8_THRESHOLD = BitsAndBytesConfig().llm_int8_threshold


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
    freeze(loaded, model)
    return loaded, backend


def freeze(base: torch.nn.Module, model: Model) -> None:
    base.requires_grad_(False)
    lean_layers(base)
    for part in base.modules():
        # packed rows have no padding; some models would look for it, waiting for the GPU each time
        if isinstance(part, PreTrainedModel):
            part.warn_if_padding_and_no_attention_mask = skip_padding_check
    if model.upcast_embeddings:
        for embedding in (base.get_input_embeddings(), base.get_output_embeddings()):
            embedding.to(torch.float32)
    keep_quantized_layout(base)
    # it would say of every product that the input is cast to float16
    if model.quantization == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def skip_padding_check(*_: Any) -> None:
    pass


def make_base(
    architecture: PretrainedConfig,
    model: Model,
    device: torch.device,
    dtype: torch.dtype,
    storage: torch.dtype = torch.uint8,
) -> torch.nn.Module:
    """A base as load_base gives it, with random weights: memory and speed depend on shapes alone.
    Tensors are made one at a time on `device`; on torch.device("meta") they have no content.

    Raises:
        ModelError: an architecture that transformers has no causal language model for.
    """
    try:
        with init_empty_weights(include_buffers=False):
            base = AutoModelForCausalLM.from_config(
                architecture, dtype=dtype, attn_implementation=IMPLEMENTATIONS["varlen"]
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if str(error).strip("'") in IMPLEMENTATIONS.values():
            error = (
                "its attention cannot be replaced, and that of transformers cannot be forecast;"
                " train with --model.attention sdpa"
            )
        raise ModelError(
            f"architecture {architecture.model_type}: cannot be built:"
            f" {' '.join(str(error).split())[:200]}"
        ) from None
    head = base.get_output_embeddings()
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if (
                type(child) in (torch.nn.Linear, Conv1D)
                and child is not head
                and model.quantization != "none"
            ):
                setattr(module, name, quantize_linear(child, model, device, dtype, storage))
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and device.type != "meta":
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                setattr(
                    module,
                    name,
                    torch.nn.Parameter(
                        value.normal_(std=0.02) if value.dim() > 1 else value.fill_(1)
                    ),
                )
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(
                name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set
            )
    base.tie_weights()
    base.is_loaded_in_4bit = model.quantization in ("nf4", "fp4")
    base.is_loaded_in_8bit = model.quantization == "int8"
    freeze(base, model)
    return base.eval()


def quantize_linear(
    linear: torch.nn.Linear | Conv1D,
    model: Model,
    device: torch.device,
    dtype: torch.dtype,
    storage: torch.dtype,
) -> torch.nn.Module:
    """The bitsandbytes layer that transformers would put in this layer's place, with random
    weights.
    """
    import bitsandbytes

    # kept for all later layers, real ones too: on the meta device, where the first might lie, it
    # would have no content
    bitsandbytes.functional.name2qmap.setdefault(
        "dynamic", bitsandbytes.functional.create_dynamic_map()
    )
    outputs, inputs = (
        reversed(linear.weight.shape) if type(linear) is Conv1D else linear.weight.shape
    )
    weight = torch.empty(outputs, inputs, dtype=dtype, device=device)
    if device.type != "meta":
        weight.normal_(std=0.02)
    sizes = {
        "input_features": inputs,
        "output_features": outputs,
        "bias": linear.bias is not None,
        "device": device,
    }
    if model.quantization == "int8":
        # Without content nothing can be an outlier; memory.list_inside counts what looking for them
        # takes.
        threshold = 0.0 if device.type == "meta" else INT8_THRESHOLD
        made = bitsandbytes.nn.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=threshold)
        made.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False)._quantize(device)
    else:
        given = {
            "compress_statistics": model.double_quantization,
            "quant_type": model.quantization,
            "quant_storage": storage,
        }
        made = bitsandbytes.nn.Linear4bit(**sizes, compute_dtype=dtype, **given)
        made.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, module=made, **given
        )._quantize(device)
    if linear.bias is not None:
        made.bias = torch.nn.Parameter(
            torch.zeros(outputs, dtype=dtype, device=device), requires_grad=False
        )
    return made


def list_constants(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """What a quantized weight needs beside itself: scales and code tables; nothing for another
    weight.
    """
    state = getattr(parameter, "quant_state", None)
    found = [getattr(parameter, "SCB", None)]
    if state is not None:
        found += [
            state.absmax,
            state.code,
            *([state.offset, state.state2.absmax, state.state2.code] if state.nested else []),
        ]
    return [tensor for tensor in found if torch.is_tensor(tensor)]


def quantization_config(
    model: Model, dtype: torch.dtype, storage: torch.dtype
) -> BitsAndBytesConfig | None:
    if model.quantization == "none":
        return None
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantization,
        bnb_4bit_use_double_quant=model.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def keep_quantized_layout(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on an AVX512-BF16 CPU:
    in that layout the gradient of the input is silently lost (bitsandbytes 0.50.2)."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def find_layers(causal: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers, in order."""
    count = causal.config.get_text_config().num_hidden_layers
    return list(
        next(m for m in causal.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    )


class GatheredMatMul(torch.autograd.Function):
    """x W^T for a 4-bit W that its layer holds only while it runs. bitsandbytes keeps the packed
    tensor for the backward pass, which ZeRO-3 has emptied by then, and gives a wrong gradient
    without a word; here backward reads the layer again.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        import bitsandbytes

        ctx.layer = layer
        return bitsandbytes.matmul_4bit(x, layer.weight.t(), quant_state=layer.weight.quant_state)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(ctx.layer.weight.data.view(-1, 1), ctx.layer.weight.quant_state)
        return gradient @ weight.to(gradient.dtype), None


def keep_gathered_weights(model: torch.nn.Module) -> None:
    """Make 4-bit layers read their weight again in the backward pass (see GatheredMatMul)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.forward = types.MethodType(forward_gathered, module)


def forward_gathered(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    result = GatheredMatMul.apply(x.to(layer.compute_dtype or x.dtype), layer).to(x.dtype)
    return result if layer.bias is None else result + layer.bias.to(x.dtype)


def attach_adapter(model: torch.nn.Module, lora: Lora, seed: int) -> PeftModel:
    """A fresh adapter with float32 weights (the compute dtype is cast to on use), initialised from
    `seed`.

    Raises:
        ModelError: a target name that no layer has.
    """
    torch.manual_seed(seed)
    targets = (
        lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    )
    try:
        adapted = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=targets,
                use_rslora=lora.variant == "rslora",
                use_dora=lora.variant == "dora",
            ),
        )
    except ValueError as error:
        raise ModelError(
            f"lora.target_modules {lora.target_modules}: {' '.join(str(error).split())[:200]}"
        ) from None
    lean_adapter(adapted)
    return adapted


def lean_adapter(model: PeftModel) -> None:
    """Give plain LoRA layers a forward without PEFT's defensive clone, dtype round trip and
    separate scale and add; and all of them dropout that keeps no mask."""
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for name, dropout in module.lora_dropout.items():
            if isinstance(dropout, torch.nn.Dropout):
                module.lora_dropout[name] = SeededDropout(dropout.p)
        if (
            len(module.lora_A) == 1
            and not module.lora_variant
            and isinstance(module.get_base_layer(), torch.nn.Linear)
        ):
            module.forward = types.MethodType(forward_lean, module)


def forward_lean(layer: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """base(x) + scaling * B A dropout(x); x [..., in] -> [..., out]. The update is added by the
    matrix product itself, in place: what a frozen base layer gives is needed by no backward
    pass."""
    flat = x.flatten(0, -2)  # [tokens, in]
    result = layer.base_layer(flat)
    if not layer.disable_adapters and not layer.merged:
        (name,) = layer.lora_A
        down = layer.lora_A[name].weight.to(x.dtype)
        up = layer.lora_B[name].weight.to(x.dtype)
        dropout = layer.lora_dropout[name]
        if isinstance(dropout, SeededDropout) and dropout.training:
            low = DroppedLinear.apply(flat, down, dropout.p)  # [tokens, r]
        else:
            low = F.linear(dropout(flat), down)
        result.addmm_(low, up.t(), alpha=layer.scaling[name])
    return result.view(*x.shape[:-1], result.shape[-1])


def set_checkpointing(model: torch.nn.Module, mode: str) -> int:
    """Recompute no, all, every k-th or the first k decoder layers in the backward pass (mode:
    training.gradient_checkpointing, not auto, which memory.plan_step decides); offload: all, and on
    a GPU their inputs wait in the host's memory; -> how many.
    """
    if mode == "none":
        return 0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kind, _, count = mode.partition("_")
    layers = [
        layer for layer in find_layers(model) if hasattr(layer, "_gradient_checkpointing_func")
    ]
    model.host_arena = HostArena()
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = {
            "full": True,
            "offload": True,
            "every": number % int(count or 1) == 0,
            "first": number < int(count or 0),
        }[kind]
        # the last layer's is needed at once
        if kind == "offload" and find_device(model).type != "cpu" and number < len(layers) - 1:
            layer._gradient_checkpointing_func = functools.partial(
                checkpoint_offloaded, arena=model.host_arena
            )
    return sum(layer.gradient_checkpointing for layer in layers)


@dataclass(eq=False)
class Waiting:
    """A tensor that waits in a HostArena, from byte `start` on."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    start: int


class HostArena:
    """Pinned memory of the host, used again in every step, for layer inputs that wait for the
    backward pass.

    It grows by chunks of a power of two, because that is what CUDA's host allocator rounds every
    block up to; a tensor may lie in several. A place is free again when its Waiting is gone. Copies
    run in the order of the GPU's own work, so a place that is taken again is written after it was
    read.
    """

    CHUNK = 32 * 2**20  # bytes

    def __init__(self):
        # They are uint8 and pinned; a forecast, which moves nothing, has none.
        self.chunks: list[torch.Tensor] = []
        self.capacity = 0  # bytes
        self.taken: dict[int, int] = {}  # start -> end of what waits

    def send(self, tensor: torch.Tensor) -> Waiting:
        """Copy a tensor to the host, without waiting for the copy."""
        start = max(self.taken.values(), default=0)
        size = tensor.numel() * tensor.itemsize
        waiting = Waiting(tensor.device, tensor.dtype, tensor.shape, start)
        if not size:
            return waiting
        self.grow(start + size, tensor)
        self.taken[start] = start + size
        weakref.finalize(waiting, self.taken.pop, start, None)
        if not tensor.is_meta:
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            for chunk, inside in self.cut(start, size):
                chunk.copy_(flat[inside], non_blocking=True)
        return waiting

    def fetch(self, waiting: Waiting) -> torch.Tensor:
        """The tensor on its device again."""
        tensor = torch.empty(waiting.shape, dtype=waiting.dtype, device=waiting.device)
        if not tensor.is_meta and tensor.numel():
            flat = tensor.view(-1).view(torch.uint8)
            for chunk, inside in self.cut(waiting.start, len(flat)):
                flat[inside].copy_(chunk, non_blocking=True)
        return tensor

    def grow(self, size: int, tensor: torch.Tensor) -> None:
        while self.capacity < size:
            self.capacity += self.CHUNK
            if not tensor.is_meta:
                self.chunks.append(
                    torch.empty(self.CHUNK, dtype=torch.uint8, pin_memory=tensor.is_cuda)
                )

    def cut(self, start: int, size: int) -> Iterator[tuple[torch.Tensor, slice]]:
        """The parts of the chunks that bytes start ... start + size lie in, each with its part of
        the tensor's bytes.
        """
        done = 0
        while done < size:
            number, offset = divmod(start + done, self.CHUNK)
            length = min(size - done, self.CHUNK - offset)
            yield self.chunks[number][offset : offset + length], slice(done, done + length)
            done += length


def find_arena(model: torch.nn.Module) -> HostArena:
    """Where a model's offloaded layer inputs wait; an empty one where none are offloaded."""
    return getattr(model, "host_arena", None) or HostArena()


def checkpoint_offloaded(
    function: Callable, *inputs: torch.Tensor, arena: HostArena | None = None
) -> torch.Tensor:
    """As torch's checkpoint, but a layer's input waits for the backward pass in the host's
    memory.
    """
    arena = arena or HostArena()
    with torch.autograd.graph.saved_tensors_hooks(arena.send, arena.fetch):
        return checkpoint(function, *inputs, use_reentrant=False)


def adapter_weights(
    model: PeftModel, values: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The adapter's tensors in PEFT's own names, on the CPU; values: by parameter name, where a
    strategy has gathered them.
    """
    return {
        key: value.detach().cpu().contiguous()
        for key, value in get_peft_model_state_dict(model, state_dict=values).items()
    }


def name_parameters(model: PeftModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of adapter_weights: PEFT's own names -> parameter names."""
    named = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    names = {id(parameter): name for name, parameter in named.items()}
    keys = get_peft_model_state_dict(model, state_dict=dict(named))
    return {names[id(parameter)]: weights[key] for key, parameter in keys.items()}


def restore_adapter(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Load tensors from `adapter_weights`.

    Raises:
        ModelError: missing, surplus or misshapen tensors.
    """
    expected = get_peft_model_state_dict(model)
    wrong = sorted(set(expected) ^ set(weights)) or [
        k for k in expected if expected[k].shape != weights[k].shape
    ]
    if wrong:
        raise ModelError(
            f"adapter does not fit this model: tensor {wrong[0]} is missing, surplus or of another"
            " shape"
        )
    set_peft_model_state_dict(model, weights)


def load_adapter(model: torch.nn.Module, folder: Path) -> PeftModel:
    """Attach a saved adapter for evaluation.

    Raises:
        ModelError: no adapter there, or one for another base.
    """
    check_adapter(folder, model.config)
    with warnings.catch_warnings():
        # we check it ourselves, below
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, folder)
    restore_adapter(adapted, load_file(folder / "adapter_model.safetensors"))
    lean_adapter(adapted)
    return adapted


def read_adapter_card(folder: Path) -> dict[str, Any]:
    """medqlora.json of an adapter: prompt style, completion, fingerprint, base id, architecture
    hash, quantization.

    Raises:
        ModelError: not an adapter folder, or one whose weights do not match the card.
    """
    folder = Path(folder)
    if (
        not (folder / "adapter_config.json").is_file()
        or not (folder / "adapter_model.safetensors").is_file()
    ):
        raise ModelError(
            f"adapter {folder}: no adapter_config.json and adapter_model.safetensors; give a run's"
            " adapter folder"
        )
    card = folder / "medqlora.json"
    if not card.is_file():
        return {}
    facts = json.loads(card.read_text(encoding="utf-8"))
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    if facts.get("weights_sha256") not in (None, digest):
        raise ModelError(
            f"adapter {folder}: adapter_model.safetensors is not the file medqlora.json describes;"
            " it was cut or changed"
        )
    return facts


def check_adapter(folder: Path, config: PretrainedConfig) -> dict[str, Any]:
    """The adapter's card, if it was trained on a base of this architecture.

    Raises:
        ModelError: adapter for another base.
    """
    card = read_adapter_card(folder)
    if card and card["architecture_sha256"] != architecture_hash(config):
        raise ModelError(
            f"adapter {folder} was trained on {card['base']}; this base has another architecture;"
            " give that one with --base or --model"
        )
    return card


def read_merged_card(model: str) -> dict[str, Any]:
    """How a merged model was trained to be asked; nothing for other models."""
    path = Path(model).expanduser() / "medqlora.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: facts[key] for key in ("prompt_style", "completion") if key in facts}


def describe_model(model: str, revision: str | None, adapter: Path | None) -> dict[str, Any]:
    """What tells this model from every other one: samples of its weights, or its hub id and commit;
    the adapter's hash.
    """
    folder = Path(model).expanduser()
    facts = {"config": architecture_hash(read_model_config(model, revision)), "adapter": None}
    facts |= (
        {"weights": sample_weights(folder)}
        if folder.is_dir()
        else {"hub": model, "revision": revision}
    )
    if adapter is not None:
        files = [
            Path(adapter) / name for name in ("adapter_model.safetensors", "adapter_config.json")
        ]
        facts["adapter"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return facts


def architecture_hash(config: PretrainedConfig) -> str:
    """SHA-256 of the shape-giving part of a model's config; a revision that only renames itself
    keeps it.
    """
    text = config.get_text_config()
    keys = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "tie_word_embeddings",
    )
    return hashlib.sha256(
        json.dumps([getattr(text, key, None) for key in keys]).encode()
    ).hexdigest()


def save_adapter(
    folder: Path,
    model: PeftModel,
    card: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a PEFT adapter with its card (see read_adapter_card). Each file is replaced whole; the
    card holds the weights' hash, so that a kill between two files is seen when the adapter is read.

    weights: of adapter_weights; default the model's own.

    Raises:
        ModelError: the disk refused.
    """
    try:
        write_adapter_files(
            folder, model, card, adapter_weights(model) if weights is None else weights
        )
    except OSError as error:
        raise ModelError(
            f"adapter {folder} cannot be written: {error.strerror or error}; free space and"
            " continue with --resume"
        ) from None


def write_adapter_files(
    folder: Path, model: PeftModel, card: dict[str, Any], weights: dict[str, torch.Tensor]
) -> None:
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    # its own writer reports a full disk as an error of the format
    content = serialize(weights, metadata={"format": "pt"})
    (aside / "adapter_model.safetensors").write_bytes(content)
    model.active_peft_config.save_pretrained(aside)
    digest = hashlib.sha256(content).hexdigest()
    (aside / "medqlora.json").write_text(
        json.dumps({**card, "weights_sha256": digest}, indent=2) + "\n", encoding="utf-8"
    )
    folder.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "medqlora.json"):
        os.replace(aside / name, folder / name)
    aside.rmdir()


def resolve_base(base: str, revision: str | None = None) -> Path:
    """The local folder with the base's safetensors and tokenizer; a hub id is fetched into the hub
    cache first.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder.resolve()
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            base,
            revision=revision,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"],
        )
    )


def sample_weights(folder: Path) -> str:
    """SHA-256 over header, size and the first and middle KiB of every tensor: tells a model from
    its fine-tuned siblings without reading 16 GB."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size)
            digest.update(header + path.stat().st_size.to_bytes(8, "little"))
            for facts in json.loads(header).values():
                if "data_offsets" in facts:
                    start, end = facts["data_offsets"]
                    for at in (start, (start + end) // 2):
                        file.seek(8 + size + at)
                        digest.update(file.read(min(1_024, end - at)))
    return digest.hexdigest()


def count_parameters(config: PretrainedConfig, lora: Lora) -> tuple[int, int]:
    """Parameters of the base and of an adapter on it, from the architecture alone (meta device)."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()  # on the meta device a shared embedding is two parameters until then
    head = model.get_output_embeddings()
    total = 0
    for name, module in model.named_modules():
        wanted = (
            lora.target_modules == "all-linear" or name.rpartition(".")[2] in lora.target_modules
        )
        if isinstance(module, torch.nn.Linear) and module is not head and wanted:
            total += lora.r * (module.in_features + module.out_features)
            total += module.out_features if lora.variant == "dora" else 0
    return sum(parameter.numel() for parameter in model.parameters()), total
