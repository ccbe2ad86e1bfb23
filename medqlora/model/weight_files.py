"""Safetensors files that are read and written one tensor at a time.

The writer of the safetensors library needs all tensors of a file at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from medqlora.core.errors import ModelError, UserError
from medqlora.core.reading import read_object, shorten

# The dtypes that can be merged, with their names in the headers of safetensors files.
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INDEX = "model.safetensors.index.json"
# The base's files with these beginnings of names are copied to a model that is made of it.
COPIED_PREFIXES = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "vocab",
    "merges",
    "chat_template",
    "generation_config",
    "LICENSE",
)


class MergeError(UserError):
    """An adapter and a base that cannot be merged."""


def list_shards(folder: Path) -> list[Path]:
    """Return the base's weight files.

    Raises:
        ModelError: The index is damaged, or a file that it names is missing.
    """
    if not (folder / INDEX).is_file():
        single = folder / "model.safetensors"
        # Without an index there is one file of the usual name, or files of other names.
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    return [folder / name for name in sorted(set(read_weight_map(folder).values()))]


def read_weight_map(folder: Path) -> dict[str, str]:
    """Return the file's name of each tensor that the index of a folder names; {} without an index.

    Raises:
        ModelError: The index is damaged, or a file that it names is missing.
    """
    if not (folder / INDEX).is_file():
        return {}
    weight_map = read_object(folder / INDEX, f"model {folder}", ModelError).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
    # transformers would follow a name with a folder in it out of the model's folder.
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange or not names:
        raise ModelError(
            f"model {folder}: {INDEX} needs a weight_map from tensors to names of files in this"
            f" folder, got {shorten(strange[0] if strange else weight_map)}; fetch the whole model"
        )
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"model {folder}: {INDEX} names {missing[0]}, which is missing; fetch the whole model"
        )
    return weight_map


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file; its tensors are read when they are asked for.

    Raises:
        ModelError: The file is damaged or cannot be read, within the block too.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: no whole safetensors file ({shorten(error)}); it was cut or changed, restore"
            " it"
        ) from None


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file by name.

    Raises:
        ModelError: The file is damaged, or a value is NaN, infinite or no floating-point number.
    """
    with open_weights(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        # Codes of 8 bits would be taken for the numbers that they stand for.
        if tensor.dtype not in (*SAFETENSORS_NAMES, torch.float64) or not is_finite(tensor):
            raise ModelError(
                f"{path}: tensor {name} has values that are no numbers (NaN, infinite or"
                f" {tensor.dtype}); the training failed or the file was changed, give another"
            )
    return tensors


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor of a safetensors file by name.

    Raises:
        ModelError: The file is damaged.
    """
    with open_weights(path) as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


class ShardWriter:
    """Writes a safetensors file one tensor at a time.

    The writer of the safetensors library needs all tensors at once. A file is the length of the
    header in 8 bytes (little-endian), the header in JSON and the raw tensors, as the documentation
    of safetensors says.
    """

    def __init__(self, path: Path, layout: dict[str, tuple[torch.dtype, list[int]]]):
        """Open a file and write its header.

        Args:
            path: The file.
            layout: The dtype and the shape of each tensor, in the order in which they are written.
        """
        header = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in layout.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": SAFETENSORS_NAMES[dtype],
                "shape": shape,
                # Offsets count from the end of the header.
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # The tensors begin at a multiple of 8 bytes.
        self.names = iter(layout)
        self.size = offset  # bytes of all tensors
        self.file: BinaryIO = path.open("wb")
        self.file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor of the layout."""
        assert name == next(self.names), "tensors are written in the order of the layout"
        # numpy has no bfloat16, so bytes are written. A tensor without dimensions gets one first.
        self.file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Close the file when its content is on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def read_dtypes(path: Path) -> dict[str, str]:
    """Return the dtype of each tensor of a safetensors file by name, as its header spells it.

    Raises:
        ModelError: The file is damaged.
    """
    with open_weights(path) as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def read_layout(path: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Return the dtype and the shape of each tensor of a weight file.

    Raises:
        MergeError: A tensor is of a dtype that cannot be merged.
    """
    dtypes = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
    with open_weights(path) as file:
        layout = {}
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            # A slice tells dtype and shape without reading the tensor.
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in dtypes:
                raise MergeError(
                    f"{path.name}: tensor {name} is {tensor.get_dtype()}; merge from an unquantized"
                    " 16- or 32-bit base"
                )
            layout[name] = (dtypes[tensor.get_dtype()], list(tensor.get_shape()))
    return layout


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Return a copy of one tensor.

    The file is mapped into memory here only, so its pages do not stay resident.
    """
    with open_weights(path) as file:
        return file.get_tensor(name).clone()


def copy_companions(base: Path, output: Path) -> None:
    """Copy the tokenizer, chat template, generation config and licence of a base."""
    # The base's own weights must not stand beside the new ones.
    for path in base.iterdir():
        if (
            path.is_file()
            and path.suffix != ".safetensors"
            and path.name.startswith(COPIED_PREFIXES)
        ):
            shutil.copyfile(path, output / path.name)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinite values."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # torch does not compare numbers of 8 bits.
    # Both are NaN where one value is. Unlike isfinite(), this makes no copy of the tensor.
    return all(math.isfinite(value) for value in torch.aminmax(tensor.detach()))
