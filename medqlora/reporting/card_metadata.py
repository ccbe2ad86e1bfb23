"""The front matter of a model card: what the hub reads of it, and the licences that are known."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache

from medqlora.core.config import Config, DataEntry
from medqlora.data.formats.registry import FORMATS

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Scores that a card gives, each with the key of its interval and its name for people.
METRICS = {
    "accuracy": ("accuracy_ci95", "accuracy"),
    "exact_match": ("exact_match_ci95", "exact match"),
    "f1": ("f1_ci95", "F1 of words"),
    "rouge_l": ("rouge_l_ci95", "ROUGE-L"),
}
# The license of a base's card may be "other", which these two explain.
LICENSE_KEYS = ("license", "license_name", "license_link")


def make_front_matter(
    name: str,
    kind: str,
    base: str | None,
    base_license: dict[str, str],
    config: Config | None,
    metrics: dict[str, Any],
) -> str:
    """Return the YAML of a model card, as the hub specifies it.

    The specification is huggingface.co/docs/hub/model-cards. What is not known is left out, because
    the hub takes every value for a fact.

    Args:
        name: of the model.
        kind: "adapter", "merged" or "model".
        base: folder or hub id of the base.
        base_license: what read_base_license returns.
        config: of the run; None where it is not known.
        metrics: content of metrics.json; only what holds for this very model.
    """
    train = [] if config is None else config.data.train
    known = [find_dataset(entry) for entry in train]
    languages = {FORMATS[entry.format].language for entry in train if entry.format in FORMATS}
    # A file may be in any language, whatever its format.
    sure = bool(known) and all(known) and None not in languages
    results = list_results(config, metrics)
    data = ModelCardData(
        base_model=base if base is not None and is_hub_id(base) else None,
        # The hub calls a model "merge" that was made of several models. Ours is the base with what
        # it has learned.
        base_model_relation="adapter" if kind == "adapter" else "finetune",
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        language=sorted(languages) if sure else None,
        tags=list_tags(kind, config),
        datasets=sorted({hub for hub in known if hub}) or None,
        # The name is the heading of the results, and no key of the hub without any.
        model_name=name if results else None,
        eval_results=results or None,
        **base_license,
    )
    return data.to_yaml().strip()


def list_tags(kind: str, config: Config | None) -> list[str]:
    """Return the tags by which the model is found on the hub."""
    tags = ["medical", "question-answering", "medqlora"]
    if config is not None and kind != "model":
        tags += ["lora", "qlora"] if config.model.quantization != "none" else ["lora"]
    return tags


def list_results(config: Config | None, metrics: dict[str, Any]) -> list[EvalResult]:
    """Return the results of metrics.json as the hub's index of results has them."""
    if config is None:
        return []
    results = []
    for key, (bounds, label) in METRICS.items():
        if metrics.get(key) is not None:
            results.append(
                EvalResult(
                    task_type="question-answering",
                    **name_data(config.data.test),
                    metric_type=key,
                    metric_name=label,
                    metric_value=metrics[key],
                    metric_args={"ci95": metrics[bounds], "n": metrics["n"]},
                )
            )
    if metrics.get("perplexity") is not None:
        results.append(
            EvalResult(
                task_type="text-generation",
                **name_data(config.data.eval),
                metric_type="perplexity",
                metric_name="perplexity per supervised token",
                metric_value=metrics["perplexity"],
            )
        )
    return results


def name_data(entries: list[DataEntry]) -> dict[str, str]:
    """Return type and name of the data that a result was measured on."""
    known = {find_dataset(entry) for entry in entries}
    # The type is the dataset's id on the hub, where all of the data are that dataset.
    single = known.pop() if len(known) == 1 else None
    return {
        "dataset_type": single or "custom",
        "dataset_name": ", ".join(describe_source(entry) for entry in entries) or "custom",
    }


def find_dataset(entry: DataEntry) -> str | None:
    """Return the hub id of an entry's data; None for a file, which may hold anything."""
    if entry.path is None:
        kind = FORMATS.get(entry.format)
        return kind.hub[0] if kind is not None and kind.hub is not None else None
    return entry.path if is_hub_id(entry.path) else None


def describe_source(entry: DataEntry) -> str:
    """Return where an entry's data are from: a hub id, or the format and name of a file."""
    return find_dataset(entry) or f"{entry.format} {shorten_path(entry.path or '')}".strip()


def describe_license(entry: DataEntry) -> str:
    """Return the licence of an entry's data in words; its format knows that of the dataset."""
    kind = FORMATS.get(entry.format)
    known = kind.license if kind is not None else None
    home = kind.hub[0] if kind is not None and kind.hub is not None else None
    if known is None:
        return "not known"
    if find_dataset(entry) == home:
        return known
    return f"not known; that of {home} itself is {known}"


def read_base_license(base: str | None, revision: str | None) -> dict[str, str]:
    """Return what the base's own model card says of its licence; nothing where it is not here.

    A card of the hub is read from the hub's cache, so nothing is asked of the network.
    """
    if base is None:
        return {}
    path: Any = Path(base) / "README.md"
    if not os.path.isdir(base):
        path = None
        if is_hub_id(base):
            path = try_to_load_from_cache(base, "README.md", revision=revision)
    if not isinstance(path, (str, Path)) or not os.path.isfile(path):
        return {}
    try:
        metadata = metadata_load(path) or {}
    # It is somebody else's file, and a card can be written without it.
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: str(metadata[key]) for key in LICENSE_KEYS if isinstance(metadata.get(key), str)}


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a repository on the hub and not that of a folder here."""
    return HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


def make_name(name: str) -> str:
    """Return a name as the hub allows it for a repository."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "model"


def shorten_path(value: Any) -> Any:
    """Return a value without the folders of an absolute path, which mean nothing elsewhere."""
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value
