"""The one list of PEFT's adapter settings and of what computes each of them right.

Adapters of other programs may have any of them. One that is passed over gives wrong numbers without
an error, so a setting that is not in this list is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from medqlora.core.reading import check_types, read_object
from medqlora.model.weight_files import ModelError

# What an adapter is wanted for: the transformers engine, a merge, or vLLM.
Use = Literal["hf", "merge", "vllm"]
EVERYWHERE = frozenset(("hf", "merge", "vllm"))
NO_VLLM = frozenset(("hf", "merge"))
HF_ONLY = frozenset(("hf",))

# The transformers engine calls the model inside PEFT's wrapper, so it computes the types that
# replace modules. Types that prepend virtual tokens live in the wrapper.
TYPES = {"LORA": EVERYWHERE} | dict.fromkeys(
    ("IA3", "LOHA", "LOKR", "LN_TUNING", "OFT", "VERA"), HF_ONLY
)
# Settings of a LoRA adapter that change what is computed.
SETTINGS = {
    "use_rslora": EVERYWHERE,
    "exclude_modules": EVERYWHERE,
    "layers_to_transform": EVERYWHERE,
    "layers_pattern": EVERYWHERE,
    "use_dora": NO_VLLM,
    "rank_pattern": NO_VLLM,
    "alpha_pattern": NO_VLLM,
    "bias": NO_VLLM,
    "lora_bias": NO_VLLM,
    "modules_to_save": NO_VLLM,
    "trainable_token_indices": NO_VLLM,
    # PEFT itself turns it round where it does not suit the layer.
    "fan_in_fan_out": EVERYWHERE,
    "ensure_weight_tying": HF_ONLY,
    "layer_replication": HF_ONLY,
    "target_parameters": HF_ONLY,
}
# Settings that change nothing by themselves in a trained adapter.
NEUTRAL = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    )
)
# Initial values that leave the base's weights as they are. PiSSA and OLoRA take a part out of them,
# which PEFT repeats when it loads such an adapter; the other ways are not repeatable.
PLAIN_INITIAL = (True, False, "gaussian", "eva", "orthogonal", None)
REPEATED_INITIAL = ("pissa", "olora")
Names = str | list[str] | None
Rank = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class LoraTypes(BaseModel):
    """The types of a LoRA adapter's settings; PEFT takes any, and computes with what it got."""

    model_config = ConfigDict(strict=True, extra="allow")

    r: Rank
    lora_alpha: Factor
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, Factor] = {}
    target_modules: Names = None
    exclude_modules: Names = None
    layers_pattern: Names = None
    layers_to_transform: int | list[int] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


REFUSALS = {
    "hf": "cannot be evaluated; merge it with the program that trained it and give the result as"
    " --model",
    "merge": "cannot be merged; evaluate the adapter without merging, or merge it with the program"
    " that trained it",
    "vllm": "is not served by vLLM; ",
}


def read_settings(folder: Path, use: Use) -> dict[str, Any]:
    """Return the content of adapter_config.json, if all of it is computed right.

    Args:
        folder: The folder of a PEFT adapter.
        use: What the adapter is wanted for.

    Raises:
        ModelError: The adapter is of a type or has a setting that is not computed.
    """
    settings = read_object(folder / "adapter_config.json", f"adapter {folder}", ModelError)
    kind = str(settings.get("peft_type"))
    refuse_unless(use in TYPES.get(kind, ()), folder, f"peft_type {kind}", TYPES.get(kind, ()), use)
    task = settings.get("task_type")
    refuse_unless(task in (None, "CAUSAL_LM"), folder, f"task_type {task}", (), use)
    if kind != "LORA":
        return settings
    check_types(settings, LoraTypes, f"adapter {folder}: adapter_config.json", ModelError)
    for key, value in settings.items():
        known = key in SETTINGS or key == "init_lora_weights"
        # PEFT takes an empty list or object of an unknown key for a setting.
        absent = value is None or value is False or (known and not value)
        if key in NEUTRAL or absent or (key, value) == ("bias", "none"):
            continue
        uses = find_initial_uses(value) if key == "init_lora_weights" else SETTINGS.get(key, ())
        refuse_unless(use in uses, folder, f"{key} {value}", uses, use)
    return settings


def find_initial_uses(value: Any) -> Iterable[str]:
    """Return what computes an adapter with these initial values."""
    if value in PLAIN_INITIAL:
        return EVERYWHERE
    return HF_ONLY if value in REPEATED_INITIAL else ()


def refuse_unless(right: bool, folder: Path, what: str, uses: Iterable[str], use: Use) -> None:
    """Raise ModelError unless a setting is computed right, and say what to do instead.

    Args:
        right: Whether it is.
        folder: The adapter's folder.
        what: The setting with its value.
        uses: What computes it right.
        use: What the adapter is wanted for.
    """
    if right:
        return
    reason = REFUSALS[use]
    if use == "vllm" and "merge" in uses:
        reason += "merge the adapter first (recipes/merge_adapter.py)"
    elif use == "vllm":
        reason += "use --engine hf" if "hf" in uses else "merge it with the program that trained it"
    raise ModelError(f"adapter {folder}: {what[:80]} in adapter_config.json {reason}")
