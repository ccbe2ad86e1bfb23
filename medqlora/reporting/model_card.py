"""The model card of an adapter or of a merged model: the README.md that the hub shows.

It is made of the files of the run, so its numbers are those of metrics.json.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medqlora import __version__
from medqlora.core.config import Config
from medqlora.core.errors import ConfigError
from medqlora.core.files import read_lines, write_atomic
from medqlora.core.yaml_reading import parse_yaml
from medqlora.model.adapter_metadata import Metadata, read_metadata
from medqlora.reporting.card_metadata import (
    is_hub_id,
    make_front_matter,
    make_name,
    read_base_license,
    shorten_path,
)
from medqlora.reporting.card_tables import (
    RUN_FILES,
    clean_cell,
    describe_change,
    describe_file,
    list_data,
    list_examples,
    list_hashes,
    list_kinds,
    list_machine,
    list_settings,
    tabulate_results,
    tabulate_subjects,
)
from medqlora.reporting.kept import Results, check_kept
from medqlora.reporting.rendering import render_text
from medqlora.reporting.run_files import collect_run, find_predictions
from medqlora.reporting.runs import ReportError, Run

CARD = "README.md"
# The hash tells a card that a person has edited from one that may be written again.
MARK = re.compile(r"\n<!-- medqlora card sha256 ([0-9a-f]{64}) -->\n\Z")


@dataclass(frozen=True)
class Merge:
    """How a merged model was made and checked.

    Attributes:
        base_weights: the weights that the adapter was merged into: dequantized or original.
        check: what merging.compare_logits found; None where it was not asked for.
    """

    base_weights: str
    check: dict[str, float] | None


def write_run_card(folder: Path, keep_edited: bool = False) -> str:
    """Write the model card of a run's adapter, or of its fully tuned model.

    Args:
        folder: the run folder, with its metrics.json.
        keep_edited: leaves a card that a person has edited without an error.

    Returns:
        Where the card is and how the folder is published, in words.

    Raises:
        ReportError: the run has no adapter, a file of the run is not what a run writes, or the
            card was edited.
        PredictionError: a file in predictions/ cannot be scored.
    """
    kinds = [kind for kind in ("adapter", "model") if (folder / kind).is_dir()]
    if not kinds:
        raise ReportError(
            f"{folder} has neither adapter/ nor model/; a card is made after training"
        )
    target = folder / kinds[0]
    if keep_edited and is_edited(target / CARD):
        return f"model card: {target / CARD} was edited by hand and is kept"
    others = [path for path in find_predictions(folder) if path.stem not in RUN_FILES]
    run = collect_run(make_name(folder.resolve().name), folder, {})
    rows = [describe_file(path) for path in others]
    text = make_card(run.name, kinds[0], read_metadata(target), run, folder, rows)
    write_card(target, text)
    return describe_upload(target, run.name)


def write_merged_card(folder: Path, name: str, adapter: Path, merge: Merge) -> str | None:
    """Write the model card of a merged model.

    Args:
        folder: the merged model, with its medqlora.json.
        name: its name.
        adapter: the adapter's folder; the files of its run are read where it lies in one.
        merge: how it was made.

    Returns:
        Why the card tells nothing of a run, in words; None where it does.
    """
    metadata = read_metadata(folder)
    where = adapter.resolve().parent
    name = make_name(name)
    run, reason = None, f"{adapter} lies in no run folder"
    try:
        run = find_run(adapter, read_metadata(adapter))
        text = make_card(name, "merged", metadata, run, where, [], merge)
    # The weights are merged by now, and they are of use without a run.
    except (ReportError, ConfigError) as error:
        run, reason = None, str(error)
        text = make_card(name, "merged", metadata, None, where, [], merge)
    write_card(folder, text)
    return None if run is not None else reason


def find_run(adapter: Path, metadata: dict[str, Any]) -> Run | None:
    """Return the run that an adapter is from; None where its folder is no run.

    Raises:
        ReportError: the folder's files are of another adapter, or not what a run writes.
    """
    folder = adapter.resolve().parent
    if not (folder / "metrics.json").is_file() or not (folder / "config.yaml").is_file():
        return None
    run = collect_run(folder.name, folder, {})
    if run.metrics.get("best_step") != metadata.get("step"):
        raise ReportError(
            f"{folder / 'metrics.json'} is of step {run.metrics.get('best_step')}, and {adapter} of"
            f" step {metadata.get('step')}"
        )
    return run


def write_card(folder: Path, text: str) -> None:
    """Write a card, with a hash at its end; one that a person has edited is kept.

    Raises:
        ReportError: the card that is there was edited.
    """
    path = folder / CARD
    text = text.rstrip() + "\n"
    if is_edited(path):
        raise ReportError(
            f"{path} was edited or is not of this program, and is kept; move it away to have a new"
            " one written by eval/report.py --card"
        )
    write_atomic(path, f"{text}\n<!-- medqlora card sha256 {hash_text(text)} -->\n")


def is_edited(path: Path) -> bool:
    """Whether there is a card that is another one than write_card has written."""
    if not path.exists():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    mark = MARK.search(text)
    return mark is None or mark[1] != hash_text(text[: mark.start()])


def hash_text(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def describe_upload(folder: Path, name: str) -> str:
    """Return where a card is, and the command that publishes its folder."""
    command = shlex.join(["hf", "upload", f"OWNER/{make_name(name)}", str(folder)])
    return f"model card: {folder / CARD}; read it, then publish the folder with: {command}"


def make_card(
    name: str,
    kind: str,
    metadata: dict[str, Any],
    run: Run | None,
    folder: Path,
    rows: Sequence[list[str]],
    merge: Merge | None = None,
) -> str:
    """Return the text of a model card.

    Args:
        name: of the model.
        kind: "adapter", "merged" or "model".
        metadata: content of medqlora.json; empty for an adapter of another program.
        run: the run; None where it is not known.
        folder: the run folder.
        rows: further evaluations, see describe_file.
        merge: how a merged model was made.
    """
    config = None if run is None else read_config(run.config, folder)
    metrics = {} if run is None else check_kept(folder / "metrics.json", run.metrics, Results)
    base, revision = metadata.get("base"), metadata.get("revision")
    license = read_base_license(base, revision)
    # What was measured on the adapter holds for a merged model that was compared with it.
    same = merge is None or (merge.base_weights == "dequantized" and merge.check is not None)
    return render_text(
        "model_card.md",
        front=make_front_matter(name, kind, base, license, config, metrics if same else {}),
        name=name,
        kind=kind,
        base=shorten_path(base) or "BASE",
        base_on_hub=base is not None and is_hub_id(base),
        quote=shlex.quote,
        metadata=dict.fromkeys(Metadata.model_fields) | {"init_adapter": None} | metadata,
        merge=merge,
        same=same,
        others=rows,
        license=license.get("license_name") or license.get("license"),
        **describe_run(run, config, metrics, folder),
        version=__version__,
        cell=clean_cell,
    )


def describe_run(
    run: Run | None, config: Config | None, metrics: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Return what the template says of a run; its tables are empty where there is none.

    Args:
        run, config, metrics: the run, its configuration, and what its metrics.json says.
        folder: the run folder.
    """
    environment = {} if run is None else run.environment
    asked = [] if config is None else list_kinds(config)
    return {
        "measured": run is not None,
        "config": config,
        # Which scores there are depends on the questions; the template reads all of them.
        "metrics": dict.fromkeys(Results.model_fields) | metrics,
        "results": tabulate_results(metrics),
        "change": describe_change(metrics, folder),
        "subjects": [] if run is None else tabulate_subjects(run),
        "data": [] if config is None else list_data(config, environment),
        "notes": environment.get("data") or [],
        "removed": 0 if run is None else len(read_lines(folder / "removed.jsonl")),
        "hashes": list_hashes(config, environment),
        "asked": asked,
        "examples": list_examples(asked, environment),
        "settings": [] if config is None else list_settings(config),
        "machine": list_machine(run),
    }


def read_config(text: str, folder: Path) -> Config:
    """Return the configuration of a run.

    Raises:
        ReportError: the file is missing, or is not valid in this version.
    """
    path = folder / "config.yaml"
    tree, _ = parse_yaml(text, str(path))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ReportError(
            f"{path}: {key or 'the file'}: {problem['msg'].lower()}; restore the run's own file"
        ) from None
