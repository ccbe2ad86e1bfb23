"""The two values of training.method: what trains, what a checkpoint holds, what a run leaves.

All stages of a training ask a Method for what differs between an adapter and a whole model.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig

from medqlora.core.config import Config, Lora
from medqlora.core.files import write_atomic
from medqlora.model.adapter import (
    adapter_weights,
    attach_adapter,
    name_parameters,
    read_adapter_metadata,
    restore_adapter,
    save_adapter,
)
from medqlora.model.adapter_preview import Preview, preview_adapter
from medqlora.model.full_model import (
    check_writable,
    exchange,
    load_trained,
    preview_full,
    read_full_metadata,
    save_model,
    unfreeze,
)
from medqlora.model.hardware import name_dtype
from medqlora.model.identity import resolve_base
from medqlora.model.weight_files import load_weights
from medqlora.training.checkpoints import copy_file

BEST = "best_"  # A checkpoint's names of the files of the best model begin with this.


class Method(Protocol):
    """What training.method decides.

    Attributes:
        folder: The folder of the run that holds the best adapter or model.
        weights_file: The file of a checkpoint that holds the trained weights.
    """

    folder: str
    weights_file: str

    def preview(self, architecture: PretrainedConfig, config: Config) -> Preview:
        """Count what will be trained; no weight is loaded."""

    def check_base(self, base: Path, architecture: PretrainedConfig) -> None:
        """Refuse a local folder of a base that cannot be trained; only headers are read."""

    def attach(self, base: torch.nn.Module, config: Config) -> torch.nn.Module:
        """Return the model that trains, made of a frozen base."""

    def without_training(self, model: torch.nn.Module) -> AbstractContextManager:
        """Return the context in which a model that has taken no step is its base."""

    def list_tensors(
        self, model: torch.nn.Module, values: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors that a checkpoint holds, made of the weights by parameter name."""

    def restore(self, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Load a checkpoint's tensors into the whole model, before a strategy divides it."""

    def name_restored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what a checkpoint's tensors set after a strategy has divided the model."""

    def save(
        self,
        folder: Path,
        model: torch.nn.Module,
        config: Config,
        metadata: dict[str, Any],
        values: dict[str, torch.Tensor],
    ) -> None:
        """Write the best adapter or model.

        Args:
            folder: The folder.
            model: The model that trains.
            config: The configuration.
            metadata: The content of medqlora.json.
            values: The trained weights by parameter name.
        """

    def check(self, folder: Path) -> None:
        """Refuse a best adapter or model that is damaged."""

    def load(self, folder: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the weights of the best adapter or model by parameter name."""

    def list_best(self, folder: Path) -> dict[str, Path]:
        """Return the files of the best adapter or model, by the name of their copy."""

    def keep_file(self, source: Path, target: Path) -> None:
        """Give a checkpoint a file of the best adapter or model."""

    def put_back(self, copies: Path, folder: Path) -> None:
        """Make the best adapter or model that of a checkpoint; nothing if it holds none."""


class AdapterMethod:
    """A LoRA adapter on a frozen base: QLoRA where the base is quantized (a Method)."""

    folder = "adapter"
    weights_file = "adapter.safetensors"

    def preview(self, architecture: PretrainedConfig, config: Config) -> Preview:
        return preview_adapter(architecture, config.lora)

    def check_base(self, base: Path, architecture: PretrainedConfig) -> None:
        """Do nothing: an adapter is written beside the files of its base."""

    def attach(self, base: torch.nn.Module, config: Config) -> torch.nn.Module:
        return attach_adapter(base, config.lora, config.training.seed)

    def without_training(self, model: torch.nn.Module) -> AbstractContextManager:
        return model.disable_adapter()

    def list_tensors(
        self, model: torch.nn.Module, values: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return adapter_weights(model, values)

    def restore(self, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        restore_adapter(model, tensors)

    def name_restored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}  # restore has set all of them.

    def save(
        self,
        folder: Path,
        model: torch.nn.Module,
        config: Config,
        metadata: dict[str, Any],
        values: dict[str, torch.Tensor],
    ) -> None:
        save_adapter(folder, model, metadata, adapter_weights(model, values))

    def check(self, folder: Path) -> None:
        read_adapter_metadata(folder)

    def load(self, folder: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return name_parameters(model, load_weights(folder / "adapter_model.safetensors"))

    def list_best(self, folder: Path) -> dict[str, Path]:
        return {
            "best_adapter_config.json": folder / "adapter_config.json",
            "best_adapter_model.safetensors": folder / "adapter_model.safetensors",
            "best_medqlora.json": folder / "medqlora.json",
        }

    def keep_file(self, source: Path, target: Path) -> None:
        # A copy also outlives damage of the file in the run folder.
        copy_file(source, target)

    def put_back(self, copies: Path, folder: Path) -> None:
        for name, target in self.list_best(folder).items():
            if (copies / name).is_file():
                folder.mkdir(exist_ok=True)
                write_atomic(target, (copies / name).read_bytes())


class FullMethod:
    """Every weight of the language model (a Method).

    Checkpoints hold the float32 masters. The best model holds the weights that the forward pass
    computed with, in the compute dtype.
    """

    folder = "model"
    weights_file = "weights.safetensors"

    def preview(self, architecture: PretrainedConfig, config: Config) -> Preview:
        return preview_full(architecture)

    def check_base(self, base: Path, architecture: PretrainedConfig) -> None:
        check_writable(base, architecture)

    def attach(self, base: torch.nn.Module, config: Config) -> torch.nn.Module:
        return unfreeze(base)

    def without_training(self, model: torch.nn.Module) -> AbstractContextManager:
        # A resumed run answers with the base before name_restored replaces its weights.
        return contextlib.nullcontext()

    def list_tensors(
        self, model: torch.nn.Module, values: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return values

    def restore(self, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Do nothing: the model computes in 16 bits, and the checkpoint holds float32 masters."""

    def name_restored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors

    def save(
        self,
        folder: Path,
        model: torch.nn.Module,
        config: Config,
        metadata: dict[str, Any],
        values: dict[str, torch.Tensor],
    ) -> None:
        base = resolve_base(config.model.base, config.model.revision)
        save_model(folder, base, model.config, values, metadata)

    def check(self, folder: Path) -> None:
        read_full_metadata(folder)

    def load(self, folder: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return load_trained(folder, model.config)

    def list_best(self, folder: Path) -> dict[str, Path]:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        return {f"{BEST}{path.name}": path for path in files}

    def keep_file(self, source: Path, target: Path) -> None:
        # The files are never changed in place, so a second name of them takes no space.
        try:
            os.link(source, target)
        except OSError:  # Some file systems have no second names.
            shutil.copyfile(source, target)

    def put_back(self, copies: Path, folder: Path) -> None:
        files = sorted(copies.glob(f"{BEST}*"))
        if not files:
            return
        aside = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
        aside.mkdir()
        for path in files:
            self.keep_file(path, aside / path.name.removeprefix(BEST))
        exchange(aside, folder)


def choose_method(config: Config) -> Method:
    """Return the method of a configuration."""
    return {"adapter": AdapterMethod, "full": FullMethod}[config.training.method]()


def describe_trained(config: Config, preview: Preview, dtype: torch.dtype) -> str:
    """Say what trains and what does not, and in which dtypes."""
    frozen = f"beside {preview.frozen_parameters:,} frozen parameters"
    if config.training.method == "adapter":
        return f"{preview.trained_parameters:,} trainable {frozen}"
    masters = "which are their own float32 masters"
    if dtype is not torch.float32:
        masters = (
            f"computed with in {name_dtype(dtype)}, while the optimizer updates float32 masters and"
            " gradients add up in float32"
        )
    text = (
        f"training.method full: {preview.trained_parameters:,} weights train {frozen}, embeddings"
        f" and head included, {masters}"
    )
    # A recipe for an adapter may be run with --training.method full, and must not seem obeyed.
    unused = [
        f"lora.{key}"
        for key, value in config.lora.model_dump().items()
        if value != Lora.model_fields[key].default
    ]
    return f"{text}; not used: {', '.join(unused)}" if unused else text
