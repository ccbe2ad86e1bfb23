"""Which base, which adapter: hashes and metadata that travel with results."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from medqlora.model.base import read_model_config


def read_merged_metadata(model: str) -> dict[str, Any]:
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
