"""YAML without what can be read in two ways: a repeated key, 1:30, 010, an endless alias."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from medqlora.core.errors import ConfigError

# A few lines of aliases can stand for more values than memory holds. No configuration comes near
# this number.
MOST_VALUES = 100_000
# YAML 1.1 reads these as 90 and 8; most people, and YAML 1.2, read a text and the number 10.
BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
OCTAL = re.compile(r"[-+]?0[0-9_]+")
NOT_A_NUMBER = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)
# No file name, model or question can hold NUL, and half a surrogate pair cannot be written.
UNUSABLE = re.compile("[\0\ud800-\udfff]")


def parse_yaml(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """Read one YAML document.

    Args:
        text: The document.
        source: Where it stands, for messages: a file or a flag.

    Returns:
        Its plain values, and the root node, which knows the line of each value. An empty document
        is None in both.

    Raises:
        ConfigError: It is not valid YAML, or a part of it can be read in two ways. The message is
            one line with the line of the document.
    """
    try:
        # The loader refuses control characters as soon as it is made.
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None, None
        check_nodes(root, source)
        return loader.construct_document(root), root
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    # The constructor makes dates and numbers of what looks like them, such as 2026-13-45.
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: not valid YAML: {error}; quote the text") from None
    except RecursionError:
        raise ConfigError(
            f"{source}: values are nested too deeply; a configuration has a few levels"
        ) from None


def read_yaml_file(path: Path, name: str) -> tuple[Any, yaml.Node | None]:
    """Read a YAML file as parse_yaml does.

    Args:
        path: The file.
        name: What the file is, for messages, such as "config recipe.yaml".

    Raises:
        ConfigError: The file cannot be read, or parse_yaml refuses it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}; save it as UTF-8") from None
    return parse_yaml(text, name)


def check_nodes(root: yaml.Node, source: str) -> None:
    """Refuse nodes that the constructor would read without a word, though not as they were meant.

    Raises:
        ConfigError: A key is repeated, an alias stands within what it names or the aliases stand
            for too many values, or a value can be read in two ways.
    """
    sizes: dict[int, int] = {}

    def measure(node: yaml.Node, above: frozenset[int]) -> int:
        """Return the number of values that a node stands for, its aliases written out."""
        place = f"{source} line {node.start_mark.line + 1}"
        if id(node) in above:
            raise ConfigError(f"{place}: an alias stands within what it names; write it out")
        if id(node) in sizes:
            return sizes[id(node)]
        children: list[yaml.Node] = []
        if isinstance(node, yaml.ScalarNode):
            check_scalar(node, place)
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        else:
            check_keys(node, source)
            children = [part for pair in node.value for part in pair]
        inside = above | {id(node)}
        size = 1 + sum(measure(child, inside) for child in children)
        if size > MOST_VALUES:
            raise ConfigError(f"{place}: its aliases stand for over {MOST_VALUES:,} values")
        sizes[id(node)] = size
        return size

    measure(root, frozenset())


def check_keys(node: yaml.MappingNode, source: str) -> None:
    """Refuse a key that a mapping has twice; the constructor would keep the last."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{source} line {line}: a key is a {key.id}; expected a name")
        if key.value in lines:
            raise ConfigError(
                f"{source} line {line}: key {key.value} stands in line {lines[key.value]} too; keep"
                " one of them"
            )
        lines[key.value] = line


def check_scalar(node: yaml.ScalarNode, place: str) -> None:
    """Refuse a value that is no number of this world, or that YAML 1.1 and 1.2 read differently."""
    text = node.value
    if UNUSABLE.search(text):
        raise ConfigError(f"{place}: {text!a} holds a character that no text can hold")
    if node.style is not None:  # A quoted value is a text.
        return
    if node.tag == "tag:yaml.org,2002:float" and NOT_A_NUMBER.fullmatch(text):
        raise ConfigError(f"{place}: {text} is no value of any key; give a finite number")
    if BASE_60.fullmatch(text) and node.tag != "tag:yaml.org,2002:str":
        raise ConfigError(
            f"{place}: {text} can be read as a text and as a number to base 60; quote it, or write"
            " the number"
        )
    if node.tag == "tag:yaml.org,2002:int" and OCTAL.fullmatch(text):
        raise ConfigError(
            f"{place}: {text} can be read to base 8 and to base 10; write it without the leading"
            " zero, or quote it"
        )
