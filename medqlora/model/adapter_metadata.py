"""The adapter metadata: the content of medqlora.json, in an adapter's folder or a whole model's.

An adapter's names the base and holds its architecture's hash, the quantization, the prompt style,
the completion and the prompt's fingerprint. A merged model's also says which weights it holds, and
that of a model of training.method full says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from medqlora.core.config import Completion, Model, PromptStyle
from medqlora.core.errors import ModelError
from medqlora.core.reading import check_types, read_object

FILE = "medqlora.json"
LOADING = ("quantization", "double_quantization", "dtype")
Quantization = Model.model_fields["quantization"].annotation
Dtype = Model.model_fields["dtype"].annotation


class Retrieval(BaseModel):
    """What a model was shown with each question in training."""

    model_config = ConfigDict(strict=True, extra="forbid")

    path: str
    num_passages: int
    library_sha256: str


class Metadata(BaseModel):
    """The types of the keys that are read; the others are for people.

    A key may be missing, because versions have added some of them.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    base: str | None = None
    revision: str | None = None
    architecture_sha256: str | None = None
    base_sha256: str | None = None
    weights_sha256: str | None = None
    config_sha256: str | None = None
    prompt_sha256: str | None = None
    prompt_style: PromptStyle = "auto"
    completion: Completion = "letter"
    template_arguments: dict[str, Any] = {}
    lowercase: bool = False
    retrieval: Retrieval | None = None
    quantization: Quantization = "none"
    double_quantization: bool = True
    dtype: Dtype = "auto"
    merged_base_weights: Literal["dequantized", "original"] = "dequantized"
    method: Literal["adapter", "full"] = "adapter"


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata in a folder; an empty dictionary where it has none.

    Raises:
        ModelError: The file is damaged.
    """
    path = folder / FILE
    # A folder or a broken link of that name is no missing file.
    if not os.path.lexists(path):
        return {}
    tree = read_object(path, f"model {folder}", ModelError)
    check_types(tree, Metadata, f"model {folder}: {FILE}", ModelError)
    return tree


def check_present(folder: Path, metadata: dict[str, Any], keys: Iterable[str] = LOADING) -> None:
    """Refuse an adapter's metadata without one of some keys; those without any have none to lack.

    Args:
        folder: The adapter's folder, for messages.
        metadata: The result of adapter.read_adapter_metadata.
        keys: The keys; those that decide how the base is loaded by default.

    Raises:
        ModelError: The message names the key.
    """
    missing = [key for key in keys if metadata and metadata.get(key) is None]
    if missing:
        raise ModelError(f"adapter {folder}: {FILE} has no {missing[0]}; restore the file")
