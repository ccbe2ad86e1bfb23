"""Prepared rows and plans on disk, memory-mapped, named by a hash of what they are made of."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from medqlora.batches.plan import Plan, PlanError, make_plan
from medqlora.core.config import Config, Data
from medqlora.core.files import hash_json
from medqlora.data.examples import MultipleChoice, Removal
from medqlora.prompts.encoding import TokenTable


def save_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """One .npy file per array in `folder`, which must not exist; complete or absent."""
    aside = folder.with_name(f"{folder.name}.{np.random.default_rng().integers(2**32):08x}.tmp")
    try:
        aside.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array)
        if not folder.is_dir():  # else another process was first, with the same content
            aside.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise PlanError(
                f"data.cache_dir: cannot write {folder}: {error.strerror or error}; free space or"
                " name another folder"
            ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_arrays(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Memory-mapped, read-only."""
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}


@dataclass(frozen=True)
class Prepared:
    """train, eval: tokenized rows (eval None without data.eval); repeats float [rows]: times each
    training row is seen per epoch; test: labelled multiple-choice examples; removals: everything
    dropped; mixture: rows, tokens per source; hashes: of data, prompt, tokenizer; folders: of the
    tables in the cache."""

    train: TokenTable
    eval: TokenTable | None
    repeats: np.ndarray
    test: list[MultipleChoice]
    removals: list[Removal]
    mixture: list[dict[str, Any]]
    hashes: dict[str, str]
    folders: dict[str, str]


def load_table(folder: Path) -> tuple[TokenTable, list[Removal]]:
    notes = json.loads(str(np.load(folder / "names.npy")))
    arrays = load_arrays(folder, ["ids", "offsets", "prompt_lengths"])
    return TokenTable(**arrays, names=notes["names"]), [
        Removal(**removal) for removal in notes["removals"]
    ]


def save_prepared(data: Data, prepared: Prepared) -> str:
    """Keep what other processes need in the cache; -> name of the folder, for load_prepared."""
    facts = {
        "folders": prepared.folders,
        "hashes": prepared.hashes,
        "mixture": prepared.mixture,
        "test": [asdict(example) for example in prepared.test],
        "removals": [asdict(removal) for removal in prepared.removals],
    }
    key = hash_json([facts, hashlib.sha256(prepared.repeats.tobytes()).hexdigest()])
    folder = Path(data.cache_dir).expanduser() / f"prepared-{key[:24]}"
    if not folder.is_dir():
        save_arrays(folder, {"repeats": prepared.repeats, "facts": np.array(json.dumps(facts))})
    return folder.name


def load_prepared(data: Data, name: str) -> Prepared:
    """What another process prepared; its arrays are memory-mapped."""
    cache = Path(data.cache_dir).expanduser()
    facts = json.loads(str(np.load(cache / name / "facts.npy")))
    tables = {role: load_table(cache / folder)[0] for role, folder in facts["folders"].items()}
    test = [
        MultipleChoice(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in row.items()
            }
        )
        for row in facts["test"]
    ]
    removals = [Removal(**removal) for removal in facts["removals"]]
    repeats = load_arrays(cache / name, ["repeats"])["repeats"]
    return Prepared(
        tables["train"],
        tables.get("eval"),
        repeats,
        test,
        removals,
        facts["mixture"],
        facts["hashes"],
        facts["folders"],
    )


def prepare_plan(
    config: Config, prepared: Prepared, ranks: int, packed_tokens: int | None = None
) -> tuple[Plan, str]:
    """The training plan (memory-mapped from the cache) and its name, which holds its hash.

    config: with training.max_tokens_per_batch decided, a rank's micro-batch; packed_tokens: of the
    bins that rows are packed in (plan.choose_packing), default the same.
    """
    training = config.training
    data = config.data
    settings = {
        "capacity": packed_tokens or training.max_tokens_per_batch,
        "micro_tokens": training.max_tokens_per_batch,
        "global_tokens": training.global_batch_tokens,
        "ranks": ranks,
        "epochs": training.epochs,
        "max_steps": training.max_steps,
        "window": data.packing_window,
        "seed": training.seed,
        "packing": data.packing,
    }
    lengths = prepared.train.lengths
    key = hash_json(
        [settings, hashlib.sha256(lengths.tobytes() + prepared.repeats.tobytes()).hexdigest()]
    )
    folder = Path(data.cache_dir).expanduser() / f"plan-{key[:24]}"
    if not folder.is_dir():
        plan = make_plan(lengths, repeats=prepared.repeats, **settings)
        save_arrays(folder, asdict(plan))
    return load_plan(data, folder.name), folder.name


def load_plan(data: Data, name: str) -> Plan:
    """The plan of that name in the cache, memory-mapped."""
    return Plan(
        **load_arrays(
            Path(data.cache_dir).expanduser() / name, [field.name for field in fields(Plan)]
        )
    )
