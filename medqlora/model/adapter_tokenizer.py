"""The tokenizer of an adapter: its base's, unless another one lies beside the adapter.

PEFT and TRL save the tokenizer of a training with its adapter. Most are equal to the base's. One
that is not belongs to the prompts that the adapter was trained with, so it must not be passed over.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from medqlora.model.base import ModelError, load_tokenizer, read_model_config
from medqlora.model.checkpoint_names import PREFIX, make_skeleton
from medqlora.model.weight_files import read_shapes

TEMPLATE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
# Files that hold a vocabulary. Without one, a folder can bring a chat template only.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_PREFIXES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges")


def choose_tokenizer(
    base: str, revision: str | None, adapter: Path | None, config: PretrainedConfig
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Return the tokenizer that an adapter was trained with, and how it differs from the base's.

    A warning says so where it differs.

    Args:
        base: The base's folder or hub id.
        revision: The hub's revision.
        adapter: The adapter's folder; None for a model without one.
        config: The base's config.

    Raises:
        ModelError: A tokenizer cannot be read, or the adapter's has tokens that the model lacks.
    """
    tokenizer = load_tokenizer(base, revision)
    own = read_own(tokenizer, adapter) if adapter is not None else None
    if own is None:
        return tokenizer, []
    differences = list_differences(tokenizer, own)
    if not differences:
        return tokenizer, []
    check_vocabulary(tokenizer, own, adapter, config)
    warnings.warn(
        f"adapter {adapter}: the tokenizer beside it differs from the base's in"
        f" {' and '.join(differences)}; the adapter's is used",
        stacklevel=2,
    )
    return own, differences


def read_own(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in an adapter's folder, or the base's with the folder's chat template.

    Raises:
        ModelError: It cannot be read.
    """
    if any((folder / name).is_file() for name in VOCABULARIES):
        try:
            # AutoTokenizer would look for the base in the adapter's config, and on the hub.
            return type(tokenizer).from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"adapter {folder}: its tokenizer cannot be read:"
                f" {' '.join(str(error).split())[:200]}; take its files out of the folder if they"
                " are the base's"
            ) from None
    template = None
    if (folder / TEMPLATE).is_file():
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
    elif (folder / SETTINGS).is_file():
        template = json.loads((folder / SETTINGS).read_text(encoding="utf-8")).get("chat_template")
    if template is None:
        return None
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def list_differences(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[str]:
    """Return what differs between two tokenizers, in words."""
    pairs = {
        "vocabulary": (one.get_vocab(), other.get_vocab()),
        "chat template": (one.chat_template, other.chat_template),
        "end token": (one.eos_token, other.eos_token),
        "beginning token": (one.bos_token, other.bos_token),
        "tokens around a text": (one("a")["input_ids"], other("a")["input_ids"]),
        "way of dividing a text": (read_rules(one), read_rules(other)),
    }
    return [name for name, (first, second) in pairs.items() if first != second]


def read_rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the rules by which a text is divided; None without a Rust backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = json.loads(backend.to_str())
    # Padding and truncation are left over from a training and are set by each call.
    model = {key: value for key, value in rules["model"].items() if key != "vocab"}
    return rules["normalizer"], rules["pre_tokenizer"], model


def check_vocabulary(
    base: PreTrainedTokenizerBase,
    own: PreTrainedTokenizerBase,
    adapter: Path,
    config: PretrainedConfig,
) -> None:
    """Refuse an adapter's vocabulary that is not the base's with tokens added.

    Raises:
        ModelError: A token has another id than in the base, or a row that no embedding has.
    """
    old, new = base.get_vocab(), own.get_vocab()
    if old == new:
        return
    moved = next((token for token, number in old.items() if new.get(token) != number), None)
    if moved is not None:
        raise ModelError(
            f"adapter {adapter}: the tokenizer beside it is not that of the base (token {moved!r}"
            f" is {new.get(moved)}, not {old[moved]}); give the base that it was trained on"
        )
    rows = count_rows(adapter, name_whole_embeddings(list_embeddings(make_skeleton(config))))
    rows = rows or config.get_text_config().vocab_size
    highest = max(new.values())
    if highest >= rows:
        token = next(token for token, number in new.items() if number == highest)
        raise ModelError(
            f"adapter {adapter}: the tokenizer beside it has token {token!r} with id {highest}, but"
            f" the embedding has {rows} rows and the adapter brings no larger one; merge it with"
            " the program that trained it"
        )


def list_embeddings(model: Any) -> list[str]:
    """Return the names of a model's embedding and head."""
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return [
        name for name, module in model.named_modules() if any(module is entry for entry in found)
    ]


def name_whole_embeddings(embeddings: Iterable[str]) -> set[str]:
    """Return PEFT's names of embeddings and heads that are saved whole with an adapter.

    Args:
        embeddings: The result of list_embeddings.
    """
    return {f"{PREFIX}{name}{inner}.weight" for name in embeddings for inner in ("", ".base_layer")}


def count_rows(adapter: Path, names: Collection[str]) -> int | None:
    """Return the rows of an embedding or head that is saved whole with an adapter, or None.

    Args:
        adapter: The adapter's folder.
        names: The result of name_whole_embeddings.
    """
    shapes = read_shapes(adapter / "adapter_model.safetensors")
    return next((shape[0] for key, shape in shapes.items() if key in names), None)


def save_tokenizer(base: Path, adapter: Path, output: Path) -> None:
    """Write the adapter's tokenizer into a merged model's folder, where it is not the base's."""
    config = read_model_config(str(base))
    # The base may have none that can be read, which does not matter to a merge without another one.
    if not any((adapter / name).is_file() for name in (*VOCABULARIES, TEMPLATE, SETTINGS)):
        return
    tokenizer, differences = choose_tokenizer(str(base), None, adapter, config)
    if not differences:
        return
    for path in output.iterdir():
        if path.name.startswith((*TOKENIZER_PREFIXES, "chat_template")):
            path.unlink()
    tokenizer.save_pretrained(output)
