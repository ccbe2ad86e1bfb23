"""What an adapter does to each tensor of its base."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from medqlora.model.adapter_settings import read_settings
from medqlora.model.checkpoint_names import PREFIX, map_names
from medqlora.model.weight_files import MergeError, load_weights

# The rows of an embedding that were trained by themselves; older versions of PEFT have no
# token_adapter in the name.
TOKEN_ROWS = re.compile(r"(?:\.token_adapter)?\.trainable_tokens_delta$")


class AdapterTensors:
    """The tensors of an adapter by the base's modules and parameters.

    `modules` holds for each adapted module its float32 tensors: "A" [r, in], "B" [out, r], with
    lora_bias "B.bias" [out], and with DoRA "magnitude_vector" [out]. An embedding counts as a layer
    from the vocabulary to the hidden size. `replaced` holds whole parameters that were trained with
    the adapter or saved beside it, and `rows` token ids and rows of embeddings.
    """

    def __init__(self, folder: Path, model: torch.nn.Module):
        """Read a PEFT adapter.

        Args:
            folder: The adapter's folder.
            model: The base without weights, as checkpoint_names.make_skeleton returns it.

        Raises:
            ModelError: The adapter is of a kind that cannot be merged.
            MergeError: The adapter has a tensor for which the base has no place.
        """
        self.settings = read_settings(folder, "merge")
        self.modules: dict[str, dict[str, torch.Tensor]] = {}
        self.replaced: dict[str, torch.Tensor] = {}
        self.rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        known = dict(model.named_modules())
        for key, tensor in load_weights(folder / "adapter_model.safetensors").items():
            name = key.removeprefix(PREFIX)
            module, update, part = name.partition(".lora_")
            if update:
                module = find_module(module, model, known)
                parts = self.modules.setdefault(module, {})
                parts[part.removesuffix(".weight").removeprefix("embedding_")] = tensor.float()
            elif TOKEN_ROWS.search(name):
                module = find_module(TOKEN_ROWS.sub("", name), model, known)
                self.rows[module] = (find_tokens(self.settings, module), tensor.float())
            else:
                module, _, parameter = name.rpartition(".")
                module = find_module(module.removesuffix(".base_layer"), model, known)
                self.replaced[f"{module}.{parameter}"] = tensor.float()

        for module, parts in self.modules.items():
            check_factors(folder, module, parts, read_rank(self.settings, module))

    def changed(self) -> set[str]:
        """Return the names of the base's parameters that the adapter changes."""
        names = {f"{module}.weight" for module in [*self.modules, *self.rows]}
        names |= {f"{module}.bias" for module, parts in self.modules.items() if "B.bias" in parts}
        return names | set(self.replaced)

    def scale(self, module: str) -> float:
        """Return the factor of a module's update.

        It is alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023, arXiv 2312.03732).
        """
        # PEFT's own function decides which pattern is a module's.
        patterns = self.settings.get("alpha_pattern") or {}
        key = get_pattern_key(patterns.keys(), module)
        alpha = patterns.get(key, self.settings["lora_alpha"])
        rank = len(self.modules[module]["A"])
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def apply(self, name: str, tensor: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Return a parameter of the base as the adapter makes it.

        Args:
            name: The parameter's name in the base.
            tensor: Its float32 values, which are changed.
            transposed: Whether the weight is stored as [in, out], as that of an embedding is.

        Raises:
            MergeError: The weight has another shape than the adapter's base.
        """
        module, _, parameter = name.rpartition(".")
        tensor = self.replaced.get(name, tensor)
        parts = self.modules.get(module, {})
        if parameter == "bias" and "B.bias" in parts:
            tensor = tensor + self.scale(module) * parts["B.bias"]
        elif parameter == "weight" and parts:
            # The view has the layout [out, in], and what is added to it arrives in the tensor.
            self.update(module, tensor.T if transposed else tensor)
        if parameter == "weight" and module in self.rows:
            tokens, rows = self.rows[module]
            tensor[tokens] = rows
        return tensor

    def update(self, module: str, weight: torch.Tensor) -> None:
        """Add the adapter's update to a module's weight, in place.

        DoRA also scales each row (Liu et al., 2024, arXiv 2402.09353, equation 5).

        Args:
            module: The name of the module in the base.
            weight: float32 [out, in].

        Raises:
            MergeError: The weight has another shape than the adapter's base.
        """
        parts = self.modules[module]
        expected = [parts["B"].shape[0], parts["A"].shape[1]]
        if list(weight.shape) != expected:
            raise MergeError(
                f"tensor {module}.weight is {list(weight.shape)} in the base, {expected} in the"
                " adapter; this is not the base that was trained on"
            )
        # The sum is made in float32 and rounded once, when it is written.
        weight.addmm_(parts["B"], parts["A"], alpha=self.scale(module))
        if "magnitude_vector" in parts:
            # DoRA takes the norm of the weight with its update, so this follows the sum.
            row_scale = parts["magnitude_vector"].view(-1) / weight.norm(dim=1)  # [out]
            weight.mul_(row_scale[:, None])


def read_rank(settings: dict[str, Any], module: str) -> int:
    """Return the rank that the settings give a module."""
    patterns = settings.get("rank_pattern") or {}
    # PEFT's own function decides which pattern is a module's.
    return patterns.get(get_pattern_key(patterns.keys(), module), settings["r"])


def check_factors(folder: Path, module: str, parts: dict[str, torch.Tensor], rank: int) -> None:
    """Refuse a module without two factors of the rank that scales their product.

    Raises:
        MergeError: The message names the module.
    """
    sizes = {name: list(tensor.shape) for name, tensor in parts.items() if name in ("A", "B")}
    right = all(len(size) == 2 for size in sizes.values()) and len(sizes) == 2
    if not right or not sizes["A"][0] == sizes["B"][1] == rank:
        raise MergeError(
            f"adapter {folder}: {module} has factors {sizes}, expected A [{rank}, inputs] and B"
            f" [outputs, {rank}] as adapter_config.json says; restore the folder"
        )


def find_module(module: str, model: torch.nn.Module, known: dict[str, torch.nn.Module]) -> str:
    """Return the base's name of a module that the adapter names.

    Another version of transformers may have given the module the name that it has in the files.

    Raises:
        MergeError: The base has no such module.
    """
    if module in known:
        return module
    renamed = map_names(model, [f"{module}.weight"])[f"{module}.weight"]
    if renamed is None:
        raise MergeError(
            f"tensor {module} of the adapter is not in the base; this is not the base that was"
            " trained on"
        )
    return renamed.removesuffix(".weight")


def find_tokens(settings: dict[str, Any], module: str) -> torch.Tensor:
    """Return the ids of the tokens whose rows were trained, int64 [tokens]."""
    tokens = settings["trainable_token_indices"]
    if isinstance(tokens, dict):
        # The keys are ends of module names.
        tokens = next(ids for name, ids in tokens.items() if f".{module}".endswith(f".{name}"))
    return torch.tensor(tokens)
