"""Architectures from a config.json, and what serving them takes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from medqlora.core.config import Config
from medqlora.model.base import ModelError, read_model_config
from medqlora.model.random_base import make_base
from medqlora.training.memory.sharding import sort_resident
from medqlora.training.memory.tracker import META, ForecastError, Tracker


def forecast_serving(
    config: Config, architecture: PretrainedConfig, dtype: torch.dtype, tokens: int
) -> dict[str, int]:
    """Bytes to serve: weights (of the base as config.model stores it), and the keys and values of
    one sequence of `tokens`. Layers with a sliding window keep at most that many."""
    text = architecture.get_text_config()
    base = make_base(architecture, config.model, META, dtype)
    tracker = Tracker(text.vocab_size)
    sort_resident(tracker, base, base)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    window = getattr(text, "sliding_window", None)
    kinds = (
        getattr(text, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    )
    kept = sum(
        min(tokens, window) if window and kind == "sliding_attention" else tokens for kind in kinds
    )
    return {"weights": tracker.total, "keys_and_values": kept * 2 * heads * width * dtype.itemsize}


def read_architecture(base: str, shipped: Path, revision: str | None = None) -> PretrainedConfig:
    """A model's shape, without weights: of a folder with config.json, a JSON file, a file in
    `shipped` that names this hub id or is called so, or the hub.

    Raises:
        ForecastError, ModelError: nothing there, or no file that transformers understands.
    """
    place = Path(base).expanduser()
    files = {path.stem: path for path in sorted(shipped.glob("*.json"))}
    if (place / "config.json").is_file():
        return parse_architecture(place / "config.json")
    if place.suffix == ".json":
        return parse_architecture(place)
    for name, path in files.items():
        if base == name or base in json.loads(path.read_text(encoding="utf-8"))["hub_ids"]:
            return parse_architecture(path)
    try:
        return read_model_config(base, revision)
    except ModelError as error:
        raise ForecastError(
            f"{error}; shapes that need no download: {', '.join(files)}, or a folder or file of a"
            " config.json"
        ) from None


def parse_architecture(path: Path) -> PretrainedConfig:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(
            **{
                key: value
                for key, value in facts.items()
                if key not in ("hub_ids", "quantization_config")
            }
        )
    except OSError as error:
        raise ForecastError(
            f"architecture {path}: {error.strerror}; give a config.json of transformers"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ForecastError(
            f"architecture {path}: not a config.json of transformers:"
            f" {' '.join(str(error).split())[:200]}"
        ) from None
