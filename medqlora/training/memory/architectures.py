"""Reading of architectures from a config.json, and the memory that serving them takes."""

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
    """Forecast the memory that serving a model takes.

    A layer with a sliding window keeps keys and values for at most the tokens of its window.

    Args:
        architecture: Configuration of the base model.
        dtype: The dtype of computing, of keys and of values.
        tokens: Length of the one sequence that is served.

    Returns:
        Bytes of the `weights`, stored as config.model says, and of `keys_and_values`.
    """
    text = architecture.get_text_config()
    base = make_base(architecture, config.model, META, dtype)
    tracker = Tracker(text.vocab_size)
    sort_resident(tracker, base, base)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        kinds = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    positions = 0  # This counts all layers.
    for kind in kinds:
        slides = window and kind == "sliding_attention"
        positions += min(tokens, window) if slides else tokens
    keys_and_values = positions * 2 * heads * width * dtype.itemsize  # 2: keys and values
    return {"weights": tracker.total, "keys_and_values": keys_and_values}


def read_architecture(base: str, shipped: Path, revision: str | None = None) -> PretrainedConfig:
    """Read the configuration of a model, without its weights.

    Args:
        base: A folder with a config.json, a JSON file, the name of a file in `shipped`, or a hub
            id. A hub id that a file in `shipped` lists under `hub_ids` needs no download.
        shipped: Folder of the configuration files that come with this package.
        revision: Revision on the hub.

    Raises:
        ForecastError: No such model is found, or transformers does not understand its file.
    """
    path = Path(base).expanduser()
    files = {path.stem: path for path in sorted(shipped.glob("*.json"))}
    # A file of the user goes before a shipped file of the same name.
    if (path / "config.json").is_file():
        return parse_architecture(path / "config.json")
    if path.suffix == ".json":
        return parse_architecture(path)
    for name, file in files.items():
        hub_ids = json.loads(file.read_text(encoding="utf-8"))["hub_ids"]
        if base == name or base in hub_ids:
            return parse_architecture(file)
    try:
        return read_model_config(base, revision)
    except ModelError as error:
        raise ForecastError(
            f"{error}; these models need no download: {', '.join(files)}; or give a config.json or"
            " its folder"
        ) from None


def parse_architecture(path: Path) -> PretrainedConfig:
    """Make a transformers configuration from a JSON file."""
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
        keys.pop("hub_ids", None)  # This key is ours.
        keys.pop("quantization_config", None)  # The recipe quantizes by itself.
        return AutoConfig.for_model(**keys)
    except OSError as error:
        raise ForecastError(
            f"architecture {path}: {error.strerror}; give a config.json of transformers"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ForecastError(
            f"architecture {path}: not a config.json of transformers"
            f" ({' '.join(str(error).split())[:200]}); give one, or the folder of one"
        ) from None
