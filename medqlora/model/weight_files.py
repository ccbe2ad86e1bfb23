"""Safetensors files that are read and written one tensor at a time.

The writer of the safetensors library needs all tensors of a file at once.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open

from medqlora.core.errors import UserError

# The dtypes that can be merged, with their names in the headers of safetensors files.
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INDEX = "model.safetensors.index.json"


class MergeError(UserError):
    """An adapter and a base that cannot be merged."""


def list_shards(folder: Path) -> list[Path]:
    """Return the base's weight files.

    Raises:
        MergeError: A file that the index names is missing.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        # Without an index there is one file of the usual name, or files of other names.
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise MergeError(
            f"base {folder}: {INDEX} names {missing[0]}, which is missing; fetch the whole model"
        )
    return [folder / name for name in names]


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
        # numpy has no bfloat16, so the tensor is seen as bytes.
        self.file.write(tensor.contiguous().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_layout(path: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Return the dtype and the shape of each tensor of a weight file.

    Raises:
        MergeError: A tensor is of a dtype that cannot be merged.
    """
    dtypes = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
    with safe_open(path, "pt") as file:
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
    with safe_open(path, "pt") as file:
        return file.get_tensor(name).clone()
