"""Several trainings one after the other: each begins with the adapter of the one before.

The list of stages is read and checked here as a whole, before any of them starts. Nothing here
imports torch, so that a mistake is said at once.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from medqlora.batches.entries import check_entries
from medqlora.core.config import Config
from medqlora.core.config_loading import (
    change,
    find_line,
    locate_value,
    parse_overrides,
    read_yaml,
    set_key,
    validate,
)
from medqlora.core.errors import ConfigError, RunError, UserError
from medqlora.core.files import read_checked
from medqlora.core.reading import expand_path
from medqlora.core.run_folder import LAUNCH, check_run
from medqlora.core.run_origin import ORIGIN

EXPECTED = "stages: [{name: NAME, config: FILE.yaml}, …]"
# An adapter has these values for life, so all stages must agree on them.
SHARED = {
    "model": ("base", "revision", "quantization", "double_quantization"),
    "lora": ("r", "alpha", "target_modules", "variant"),
}


@dataclass(frozen=True)
class Stage:
    """One training of several.

    Args:
        name: Its name, which is also that of its folder.
        config: Its configuration; lora.init_adapter is the adapter of the stage before.
        folder: Its run folder.
        replaced: The lora.init_adapter of its own configuration that another one took the place of;
            None where there was none.
    """

    name: str
    config: Config
    folder: Path
    replaced: str | None

    @property
    def adapter(self) -> Path:
        """The folder of the adapter that it leaves."""
        return self.folder / "adapter"


def read_stages(path: Path, overrides: list[str], output_dir: Path) -> list[Stage]:
    """Read and check a list of stages.

    Args:
        path: The YAML file. Its `config` is the path of a configuration, relative to this file, or
            a configuration itself.
        overrides: Arguments of the form ``--NAME.section.key VALUE``.
        output_dir: The folder that each stage has its run folder in.

    Raises:
        UserError: The file, a configuration or a data file cannot be used, or the stages do not
            agree on the adapter. The message is one line.
    """
    tree, root = read_yaml(path)
    entries = list_entries(path, tree, root)
    names = [entry["name"] for entry in entries]
    flags = parse_overrides(list(overrides))
    for keys, _ in flags:
        if keys[0] not in names:
            raise ConfigError(
                f"argument --{'.'.join(keys)}: no stage {keys[0]}; expected --NAME.section.key"
                f" VALUE with NAME one of {', '.join(names)}"
            )
    stages: list[Stage] = []
    for number, entry in enumerate(entries):
        name = entry["name"]
        own = [(keys[1:], value) for keys, value in flags if keys[0] == name]
        try:
            config = read_config(path, root, number, entry["config"], own)
            check_entries(config.data)
        except UserError as error:
            # The flags of a stage begin with its name.
            line = re.sub(r"(?<!\S)--(?=[a-z])", f"--{name}.", str(error))
            raise ConfigError(f"stage {name}: {line}") from None
        replaced = config.lora.init_adapter if stages else None
        if config.training.method == "full":
            raise ConfigError(
                f"stage {name}: training.method full leaves no adapter that another stage could go"
                " on from; expected adapter in every stage, or train in two runs, the second with"
                " --model.base FIRST_RUN/model"
            )
        if stages:
            config = change(config, "lora", init_adapter=str(stages[-1].adapter))
            check_agreement(stages[0], name, config)
        # Another working folder or another way to write the path must not look like a change.
        stages.append(Stage(name, config, output_dir.resolve() / name, replaced))
    return stages


def list_entries(path: Path, tree: dict, root: yaml.Node | None) -> list[dict[str, Any]]:
    """Return the entries of the list, each with a name and a config.

    Raises:
        ConfigError: The file holds something else.
    """
    entries = tree.get("stages")
    for key in tree:
        if key != "stages":
            line = find_line(root, (key,))
            raise ConfigError(f"{path} line {line}: unknown key {key}; expected {EXPECTED}")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: no list of stages; expected {EXPECTED}")
    names = set()
    for number, entry in enumerate(entries):
        place = f"{path} line {find_line(root, ('stages', number))}"
        if not isinstance(entry, dict) or entry.keys() != {"name", "config"}:
            got = ", ".join(map(str, entry)) if isinstance(entry, dict) else repr(entry)
            raise ConfigError(f"{place}: stage has {got[:200]}; expected name and config alone")
        name = entry["name"]
        # The name is a folder and the beginning of flags.
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name):
            raise ConfigError(
                f"{place}: name {name!r}; expected letters, digits and _, and no digit at first"
            )
        if name.lower() in names or name == LAUNCH:
            reason = "stands twice" if name != LAUNCH else "is the folder of the launcher's files"
            raise ConfigError(f"{place}: name {name} {reason}; choose another")
        names.add(name.lower())  # Some file systems take a and A for one folder.
        if not isinstance(entry["config"], (str, dict)):
            got = type(entry["config"]).__name__
            raise ConfigError(
                f"{place}: config is of type {got}; expected a YAML file or a configuration"
            )
    return entries


def read_config(
    path: Path, root: yaml.Node | None, number: int, given: str | dict, flags: list
) -> Config:
    """Return the configuration of a stage.

    Args:
        path: The file of the stages.
        root: Its root node, which knows the lines.
        number: The place of the stage in the list.
        given: The path of a configuration, or a configuration.
        flags: The keys and values of the stage's flags, without its name.

    Raises:
        ConfigError: It is no valid configuration.
    """
    if isinstance(given, str):
        file = path.parent / expand_path(given, "config")
        tree, node = read_yaml(file)
    else:
        file, tree = path, copy.deepcopy(given)
        node = find_node(root, ("stages", number, "config"))
    for keys, value in flags:
        set_key(tree, keys, value)
    locate = functools.partial(locate_value, [keys for keys, _ in flags], file, node)
    return validate(Config, tree, locate)


def find_node(node: yaml.Node, keys: tuple) -> yaml.Node:
    """Return the node at these keys, or the last one on the way that stands in the file."""
    for key in keys:
        children = node.value
        if isinstance(node, yaml.MappingNode):
            children = {name.value: child for name, child in node.value}
        # A key that YAML merges from elsewhere (<<) has no node here.
        if isinstance(children, dict) and key not in children:
            return node
        node = children[key]
    return node


def check_agreement(first: Stage, name: str, config: Config) -> None:
    """Refuse a stage whose adapter would not be that of the stages before.

    Raises:
        ConfigError: A value of SHARED differs.
    """
    for section, keys in SHARED.items():
        for key in keys:
            old, new = (getattr(getattr(one, section), key) for one in (first.config, config))
            if key == "base":
                same = locate_base(old) == locate_base(new)
            elif key == "double_quantization":
                # Only 4-bit types have constants that can be quantized too.
                same = old == new or config.model.quantization not in ("nf4", "fp4")
            elif isinstance(old, list) and isinstance(new, list):
                same = set(old) == set(new)
            else:
                same = old == new
            if not same:
                raise ConfigError(
                    f"stage {name}: {section}.{key} is {new}, and {old} in stage {first.name},"
                    " whose adapter it goes on with; give both the same value"
                )


def locate_base(base: str) -> str | Path:
    """Return the folder of a base, however it is written, or its id on the hub."""
    path = Path(base).expanduser()
    return path.resolve() if path.is_dir() else base


def count_finished(stages: list[Stage]) -> int:
    """Return how many stages are finished: the last file that a run writes is there.

    Raises:
        RunError: A stage has begun before the one before it was finished, or with another adapter
            than that one has now.
    """
    finished = [(stage.folder / "metrics.json").is_file() for stage in stages]
    for (before, after), done in zip(pairwise(stages), finished, strict=False):
        if not (after.folder / ORIGIN).is_file():
            continue
        advice = f"bring it back, or begin {after.name} anew by moving {after.folder} away"
        if not done:
            raise RunError(
                f"--resume: stage {after.name} has begun, and {before.name} before it is not"
                f" finished ({before.folder / 'metrics.json'} is missing); {advice}"
            )
        # A damaged record is refused by the stage itself.
        initial = (read_checked(after.folder / ORIGIN) or {}).get("init_adapter") or {}
        expected = initial.get("weights_sha256")
        if expected is not None and expected != read_weights_hash(before.adapter):
            raise RunError(
                f"--resume: stage {after.name} began with another adapter than {before.adapter}"
                f" holds now; {advice}"
            )
    return finished.index(False) if False in finished else len(finished)


def read_weights_hash(adapter: Path) -> str | None:
    """Return the hash of an adapter's weights from its metadata; None where they are damaged."""
    try:
        metadata = json.loads((adapter / "medqlora.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return metadata.get("weights_sha256") if isinstance(metadata, dict) else None


def check_folders(stages: list[Stage], resume: bool) -> None:
    """Check the run folders of all stages as each run checks its own; nothing is written.

    Raises:
        RunError: A folder holds something and `resume` is off, or a run of another configuration.
    """
    for stage in stages:
        check_run(stage.folder, stage.config, resume)
