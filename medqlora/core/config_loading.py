"""From a YAML file and command-line overrides to a checked configuration.

A mistake in them becomes one line that says where it is. The resolved configuration is saved in the
run folder and is itself valid input.
"""

from __future__ import annotations

import difflib
import functools
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from medqlora.core.config import Config, Section
from medqlora.core.errors import ConfigError
from medqlora.core.yaml_reading import parse_yaml, read_yaml_file

Settings = TypeVar("Settings", bound=Section)


def change(config: Config, section: str, **values: Any) -> Config:
    """Return the configuration with some keys of a section replaced, without validating it again.

    Args:
        config: the configuration.
        section: name of the section.
        values: new values by key.
    """
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file, apply overrides and validate the result.

    Args:
        path: the YAML file. Paths in it that begin with ./ or ../ are relative to it.
        overrides: arguments of the form ``--section.key VALUE`` or ``--section.key=VALUE``. Paths
            in them are relative to the working folder.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is not allowed. The
            message is one line, with the file's line or the flag.
    """
    tree, root = read_yaml(Path(path))
    flags = parse_overrides(list(overrides))
    for keys, value in flags:
        set_key(tree, keys, value)
    locate = functools.partial(locate_value, [keys for keys, _ in flags], path, root)
    return validate(Config, tree, locate)


def load_settings(
    schema: type[Settings], path: str | Path | None, flags: dict[str, Any]
) -> Settings:
    """Read settings without sections: a YAML file, if there is one, and flags that win over it.

    Args:
        schema: the settings; each of its keys is also the name of a flag.
        path: the YAML file, or None. Paths in it that begin with ./ or ../ are relative to it.
        flags: the flags that were given, without those left at their default.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is not allowed. The
            message is one line, with the file's line or the flag.
    """
    tree: dict = {}
    root = None
    if path is not None:
        tree, root = read_yaml(Path(path))
    locate = functools.partial(locate_value, [(name,) for name in flags], path, root)
    return validate(schema, tree | flags, locate)


def read_yaml(path: Path) -> tuple[dict, yaml.Node | None]:
    """Return the mapping of a YAML file, and the nodes that know its line numbers.

    Relative paths in the mapping are resolved.

    Raises:
        ConfigError: the file cannot be read, or does not hold a mapping in valid YAML.
    """
    tree, root = read_yaml_file(path, f"config {path}")
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config {path}: expected keys with values (key: value), got {type(tree).__name__}"
        )
    return resolve_paths(tree, path.parent), root


def locate_value(
    flags: list[tuple[str, ...]], path: str | Path | None, root: yaml.Node | None, loc: tuple
) -> str:
    """Say where the value at `loc` was given: the flag, or the file's line.

    Args:
        flags: the keys of every flag that was given.
        path: the YAML file, or None.
        root: the root node of the file.
        loc: the keys and list indices that lead to the value, as pydantic gives them.
    """
    names = tuple(map(str, loc))
    # A flag may have set the value itself, or a section or list that holds it.
    for length in range(len(names), 0, -1):
        if any(flag[:length] == names[:length] for flag in flags):
            return "--" + ".".join(names[:length])
    if path is None:
        return "command line"
    return f"{path} line {find_line(root, loc)}"


def validate(schema: type[Settings], tree: dict, locate: Callable[[tuple], str]) -> Settings:
    """Make the typed settings of a mapping.

    Args:
        schema: the class of the settings.
        tree: the mapping.
        locate: says where the value at a place in the mapping was given.

    Raises:
        ConfigError: one line about the first mistake, with its place.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe(error, locate, schema)) from None


def dump_config(config: Config) -> str:
    """Return a configuration as YAML, from which ``load_config`` makes an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def resolve_paths(node: Any, folder: Path) -> Any:
    """Replace strings that begin with ./ or ../ by absolute paths under `folder`."""
    if isinstance(node, dict):
        return {key: resolve_paths(value, folder) for key, value in node.items()}
    if isinstance(node, list):
        return [resolve_paths(value, folder) for value in node]
    # Only these beginnings mark a path for certain. A text such as owner/name may be a hub id, so
    # it stays as it is.
    if isinstance(node, str) and node.startswith(("./", "../")):
        return str((folder / node).resolve())
    return node


def parse_overrides(arguments: list[str]) -> list[tuple[tuple[str, ...], Any]]:
    """Parse ["--training.lr", "1e-4"] into [(("training", "lr"), "1e-4")]; values are YAML.

    Args:
        arguments: flags with their values, as one argument (``--key=VALUE``) or as two. The list is
            emptied.

    Raises:
        ConfigError: an argument is no such flag, or its value is missing or not valid YAML.
    """
    parsed = []
    while arguments:
        flag, equals, value = arguments.pop(0).partition("=")
        if not re.fullmatch(r"--[A-Za-z_]\w*(\.\w+)+", flag):
            raise ConfigError(
                f"argument {flag!r}: expected --section.key VALUE, e.g. --training.lr 1e-4 (see"
                " --help)"
            )
        if not equals:
            # A value that begins with two dashes needs the form --key=VALUE. A negative number has
            # one dash.
            if not arguments or arguments[0].startswith("--"):
                raise ConfigError(f"argument {flag}: no value; expected {flag} VALUE")
            value = arguments.pop(0)
        tree, _ = parse_yaml(value, f"argument {flag}")
        parsed.append((tuple(flag[2:].split(".")), tree))
    return parsed


def set_key(tree: Any, keys: tuple[str, ...], value: Any) -> None:
    """Set a value in nested mappings and lists; a mapping that is missing on the path is made.

    Raises:
        ConfigError: the keys lead into a plain value, or to an element that a list does not have.
    """
    flag = "--" + ".".join(keys)
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(tree, list):
            if not key.isdigit() or int(key) >= len(tree):
                raise ConfigError(
                    f"argument {flag}: {key} is no index of this list, which has {len(tree)}"
                    " elements; count them from 0"
                )
            key = int(key)
        elif not isinstance(tree, dict):
            raise ConfigError(
                f"argument {flag}: {'.'.join(keys[:i])} is a value, so it has no key {key}"
            )
        if last:
            tree[key] = value
        elif isinstance(tree, dict):
            tree = tree.setdefault(key, {})
        else:
            tree = tree[key]


def find_line(node: yaml.Node, loc: tuple) -> int:
    """Return the line of the deepest part of `loc` that stands in the file, counted from 1."""
    line = node.start_mark.line + 1 if node else 1
    for key in loc:
        if isinstance(node, yaml.MappingNode):
            pairs = [pair for pair in node.value if pair[0].value == str(key)]
            if not pairs:
                break
            key_node, node = pairs[0]
            line = key_node.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return line


def describe(
    error: ValidationError, locate: Callable[[tuple], str], schema: type[Section] = Config
) -> str:
    """Return one problem of a pydantic error as one line.

    An unknown key goes before the first problem, because a misspelt key is also a missing one.
    """
    problems = error.errors()
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    problem = (unknown or problems)[0]
    # Among the keys, pydantic names the types of a union that it has tried; they are left out.
    loc = tuple(
        part
        for part in problem["loc"]
        if isinstance(part, int)
        or not re.search(r"[\[\s]|^literal|^list|^str$|^constrained-", part)
    )
    name = ".".join(map(str, loc))
    if problem["type"] == "extra_forbidden":
        return f"{locate(loc)}: unknown key {name}; {suggest_key(loc, schema)}"
    if problem["type"] == "missing":
        return f"{locate(loc)}: {name} is missing; set it in the file or with --{name} VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    # A rule about the whole configuration (`Config.check_budgets`) has no place of its own.
    if not loc:
        return f"config: {message}" if schema is Config else message
    got = problem["input"]
    if not isinstance(got, (str, int, float, bool, type(None))):
        got = type(got).__name__
    return f"{locate(loc)}: {name} got {got!r}; {message[0].lower() + message[1:]}"


def suggest_key(loc: tuple, schema: type[Section] = Config) -> str:
    """Name the key that an unknown one was probably meant to be, or all that are valid there."""
    valid = list(section_fields(loc[:-1], schema))
    wanted = str(loc[-1])
    elsewhere = [key for key in all_keys(schema) if key.split(".")[-1] == wanted]
    # The same name in another section is a better guess than a similar name in this one.
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    near = difflib.get_close_matches(wanted, valid, n=1, cutoff=0.5)
    if near:
        return f"did you mean {'.'.join(map(str, (*loc[:-1], near[0])))}?"
    return f"valid keys: {', '.join(valid)}"


def section_fields(loc: tuple, schema: type[Section] = Config) -> dict[str, FieldInfo]:
    """Return the fields of the section at `loc`; empty where there is no section.

    Indices of lists are skipped, because all elements of a list are of one type.
    """
    section = schema
    for part in loc:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        section = None if field is None else find_section(field)
        if section is None:
            return {}
    return section.model_fields


def find_section(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds, by itself or in a list; None for a plain value."""
    for kind in flatten_types(field.annotation):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def flatten_types(annotation: Any) -> typing.Iterator[Any]:
    """Yield the types that a list or union is made of."""
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from flatten_types(argument)
    else:
        yield annotation


def all_keys(schema: type[Section] = Config) -> dict[str, FieldInfo]:
    """Return every key with its field, in the order of the schema.

    A key has the form `section.key`, or `key` in a schema without sections.
    """
    keys = {}
    for name, field in schema.model_fields.items():
        section = find_section(field) if schema is Config else None
        if section is None:
            keys[name] = field
        else:
            keys |= {f"{name}.{key}": inner for key, inner in section.model_fields.items()}
    return keys


def list_choices(field: FieldInfo) -> list[str]:
    """Return the words that a field allows; empty where it takes other values."""
    return [
        str(choice)
        for kind in flatten_types(field.annotation)
        if typing.get_origin(kind) is Literal
        for choice in typing.get_args(kind)
    ]


def help_text() -> str:
    """Return the text of --help about the configuration, with two lines for each key.

    They say its name, allowed values, default and meaning.
    """
    lines = []
    for key, field in all_keys().items():
        # A field that takes other values too, such as a number or "auto", is shown as VALUE.
        choices = []
        if typing.get_origin(field.annotation) is Literal:
            choices = list_choices(field)
        default = "required" if field.is_required() else f"default {field.default!r}"
        lines.append(f"  --{key} {'|'.join(choices) or 'VALUE'}  ({default})")
        lines.append(f"      {' '.join((field.description or '').split())}")
    return "\n".join(lines)
