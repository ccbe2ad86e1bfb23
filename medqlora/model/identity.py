"""The identity of a base and an adapter: hashes and metadata that are saved with results."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from medqlora.core.files import hash_file, hash_json
from medqlora.core.hub import explain_hub
from medqlora.core.reading import expand_path
from medqlora.model.adapter_metadata import read_metadata
from medqlora.model.base import describe, find_model, read_model_config
from medqlora.model.weight_files import ModelError, open_weights

# These keys of the adapter metadata decide how a model is asked.
PROMPT_KEYS = ("prompt_style", "completion", "template_arguments", "lowercase", "retrieval")


def read_merged_metadata(model: str) -> dict[str, Any]:
    """Return what decides the prompts that a merged model was trained with.

    Another model has none, and the result is empty. A model of training.method full is also
    evaluated in the dtype that its training computed in, as an adapter is.
    """
    metadata = read_metadata(expand_path(model, "model"))
    keys = (*PROMPT_KEYS, "dtype") if metadata.get("method") == "full" else PROMPT_KEYS
    return {key: metadata[key] for key in keys if key in metadata}


def describe_model(model: str, revision: str | None, adapter: Path | None) -> dict[str, Any]:
    """Return what tells a model from every other one.

    That is the hash of its architecture, samples of a folder's weights or a hub id with its
    revision, and the hashes of the adapter's files.
    """
    folder = expand_path(model, "model")
    identity = {"config": architecture_hash(read_model_config(model, revision)), "adapter": None}
    # The id and revision of the hub name the weights, but a folder's files may change under the
    # same name.
    if folder.is_dir():
        identity["weights"] = sample_weights(folder)
    else:
        identity |= {"hub": model, "revision": revision}
    if adapter is not None:
        names = ("adapter_model.safetensors", "adapter_config.json")
        files = [Path(adapter) / name for name in names]
        identity["adapter"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return identity


def architecture_hash(config: PretrainedConfig) -> str:
    """Return the SHA-256 of those config keys that determine the shapes of a model's weights.

    Changes of the config that leave the shapes as they are do not change it.
    """
    text = config.get_text_config()
    # Every saved adapter holds this hash. Were a key added, removed or moved, check_adapter would
    # refuse all earlier adapters.
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
    values = [getattr(text, key, None) for key in keys]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def resolve_base(base: str, revision: str | None = None) -> Path:
    """Return the local folder with the base's safetensors and tokenizer.

    A base on the hub is downloaded to the hub's cache first.

    Raises:
        ModelError: the hub does not give it.
    """
    folder = find_model(base)
    if folder is not None:
        return folder.resolve()
    from huggingface_hub import snapshot_download

    try:
        # Pickled weights are left out of the download.
        found = snapshot_download(
            base,
            revision=revision,
            allow_patterns=[
                *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"),
                # These say under which licence the base stands.
                *("README.md", "LICENSE*"),
            ],
        )
    # The hub's errors, and those of connections and disks, have no other class in common.
    except OSError as error:
        reason = explain_hub(error, base) or f"it cannot be downloaded: {describe(error)}"
        raise ModelError(f"model {base}: {reason}") from None
    return Path(found)


def hash_base(folder: Path) -> str:
    """Return a SHA-256 of every byte of the files that decide what a base computes.

    These are its weights, its config and its code. Unlike sample_weights, it sees a single changed
    bit. The files are read in threads, at several GB per second where the disk gives them; loading
    reads the same bytes afterwards from the page cache.
    """
    patterns = ("*.safetensors", "*.safetensors.index.json", "config.json", "*.py")
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    # hashlib releases the interpreter's lock while it hashes.
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(hash_file, files))
    names = [path.name for path in files]
    return hash_json(list(zip(names, digests, strict=True)))


def sample_weights(folder: Path) -> str:
    """Return a SHA-256 that tells a model from its fine-tuned variants without reading all of it.

    It covers the header and the size of each safetensors file, and 1 KiB from the start and the
    middle of each tensor. The format is described in the documentation of safetensors.
    """
    # Saved adapters hold this hash, so it must go on reading the same bytes in the same order.
    digest = hashlib.sha256()
    # The order must not depend on the file system.
    for path in sorted(folder.glob("*.safetensors")):
        # The library refuses a header that is damaged or does not fit the file's length.
        with open_weights(path), path.open("rb") as file:
            # The first 8 bytes are the length of the JSON header that follows.
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size)
            digest.update(header + path.stat().st_size.to_bytes(8, "little"))
            for entry in json.loads(header).values():
                # The entry "__metadata__" is no tensor.
                if "data_offsets" not in entry:
                    continue
                start, end = entry["data_offsets"]
                for position in (start, (start + end) // 2):
                    # Offsets count from the end of the header.
                    file.seek(8 + size + position)
                    digest.update(file.read(min(1_024, end - position)))
    return digest.hexdigest()
