"""An adapter of an earlier run that a training begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PretrainedConfig

from medqlora.core.config import Lora, Model
from medqlora.core.reading import expand_path, read_object
from medqlora.model.adapter import read_adapter_metadata, restore_adapter
from medqlora.model.adapter_preview import Preview
from medqlora.model.base import ModelError
from medqlora.model.identity import architecture_hash, resolve_base, sample_weights
from medqlora.model.weight_files import load_weights, read_shapes

# These settings scale or change an update beside its tensors: the keys of adapter_config.json with
# those of the configuration.
SCALES = {"r": "r", "lora_alpha": "alpha", "use_rslora": "variant", "use_dora": "variant"}


def check_initial(model: Model, lora: Lora, config: PretrainedConfig, preview: Preview) -> None:
    """Refuse an adapter that would not be on this base what it was on its own.

    Args:
        model, lora: The configuration's sections.
        config: The config of the base.
        preview: The result of preview_adapter for them.

    Raises:
        ModelError: The folder holds no adapter of a run, or one of another base or other settings.
    """
    folder = expand_path(lora.init_adapter, "lora.init_adapter")
    place = f"lora.init_adapter {lora.init_adapter}"
    metadata = read_adapter_metadata(folder)
    if not metadata:
        raise ModelError(
            f"{place}: no medqlora.json, so its base is unknown; give the adapter folder of a run"
        )
    for key in ("quantization", "double_quantization"):
        old, new = metadata.get(key), getattr(model, key)
        # Only 4-bit types have constants that can be quantized too.
        if old != new and (key == "quantization" or model.quantization in ("nf4", "fp4")):
            raise ModelError(f"{place} was trained with model.{key} {old}, not {new}; set it so")
    if metadata["architecture_sha256"] != architecture_hash(config):
        raise ModelError(
            f"{place} was trained on {metadata['base']}, and model.base {model.base} has another"
            " architecture; give that base"
        )
    check_settings(place, folder, preview)
    # A base on the hub is downloaded here, so this comes last.
    if metadata.get("base_sha256") != sample_weights(resolve_base(model.base, model.revision)):
        raise ModelError(
            f"{place} was trained on {metadata['base']}, and the weights of model.base"
            f" {model.base} are others; give that base"
        )


def check_settings(place: str, folder: Path, preview: Preview) -> None:
    """Refuse an adapter of other settings or tensors than the configuration's.

    Raises:
        ModelError: The message names the first difference.
    """
    saved = read_object(folder / "adapter_config.json", place, ModelError)
    for key, name in SCALES.items():
        if saved.get(key) != preview.settings[key]:
            raise ModelError(
                f"{place} has {key} {saved.get(key)}, not {preview.settings[key]}; set lora.{name}"
                " as in that run"
            )
    shapes = read_shapes(folder / "adapter_model.safetensors")
    for name in sorted(set(shapes) ^ set(preview.tensors)):
        where = "is in the folder only" if name in shapes else "is not in the folder"
        raise ModelError(
            f"{place}: tensor {name} {where}; set lora.target_modules as in that run"
            f" ({', '.join(sorted(saved['target_modules']))})"
        )
    for name, shape in shapes.items():
        if shape != preview.tensors[name]:
            raise ModelError(
                f"{place}: tensor {name} is {shape}, expected {preview.tensors[name]}; give the"
                " base that it was trained on"
            )


def load_initial(model: PeftModel, lora: Lora) -> None:
    """Begin with the weights of lora.init_adapter.

    Args:
        model: The model with its new adapter, whose weights are replaced.
        lora: The configuration's section.

    Raises:
        ModelError: The folder holds no adapter, or one with other tensors.
    """
    folder = Path(lora.init_adapter).expanduser()
    read_adapter_metadata(folder)
    restore_adapter(model, load_weights(folder / "adapter_model.safetensors"))


def describe_initial(lora: Lora) -> dict[str, Any]:
    """Return what the new adapter's metadata say of lora.init_adapter."""
    metadata = read_adapter_metadata(Path(lora.init_adapter).expanduser())
    return {
        "folder": lora.init_adapter,
        **{key: metadata.get(key) for key in ("weights_sha256", "base", "step")},
    }
