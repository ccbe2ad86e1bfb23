"""One YAML file and command-line overrides become one configuration, or one line that says why not.

The resolved configuration is saved in the run folder and is itself valid input.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from medqlora.core.config import Config, Section
from medqlora.core.errors import ConfigError


def change(config: Config, section: str, **values: Any) -> Config:
    """The same configuration with some keys of a section replaced; not validated again."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file, apply ``--section.key VALUE`` overrides, validate.

    Paths that begin with ./ or ../ in the file are relative to the file; on the command line, to
    the working folder.

    Raises:
        ConfigError: one line with the file's line or the flag, and the nearest valid key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text) or {}
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(
            f"config {path}: {error.strerror}; give the path of a YAML file with --config"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config {path}: not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config {path}: expected sections (model, data, …), got {type(tree).__name__}"
        )
    tree = resolve_paths(tree, path.parent)
    flags = {}
    for keys, value in parse_overrides(list(overrides)):
        set_key(tree, keys, value)
        flags[keys] = value

    def locate(loc: tuple) -> str:
        for n in range(len(loc), 0, -1):
            if any(flag[:n] == tuple(map(str, loc[:n])) for flag in flags):
                return "--" + ".".join(map(str, loc[:n]))
        return f"{path} line {find_line(root, loc)}"

    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe(error, locate)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; ``load_config`` of it gives an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def resolve_paths(node: Any, folder: Path) -> Any:
    """Replace strings that begin with ./ or ../ by absolute paths under `folder`."""
    if isinstance(node, dict):
        return {key: resolve_paths(value, folder) for key, value in node.items()}
    if isinstance(node, list):
        return [resolve_paths(value, folder) for value in node]
    if isinstance(node, str) and node.startswith(("./", "../")):
        return str((folder / node).resolve())
    return node


def parse_overrides(arguments: list[str]) -> list[tuple[tuple[str, ...], Any]]:
    """["--training.lr", "1e-4"] -> [(("training", "lr"), "1e-4")]; values are YAML."""
    parsed = []
    while arguments:
        flag, _, value = arguments.pop(0).partition("=")
        if not re.fullmatch(r"--[A-Za-z_]\w*(\.\w+)+", flag):
            raise ConfigError(
                f"argument {flag!r}: expected --section.key VALUE, e.g. --training.lr 1e-4 (see"
                " --help)"
            )
        if not _:
            if not arguments or arguments[0].startswith("--"):
                raise ConfigError(f"argument {flag}: no value; expected {flag} VALUE")
            value = arguments.pop(0)
        try:
            parsed.append((tuple(flag[2:].split(".")), yaml.safe_load(value)))
        except yaml.YAMLError:
            raise ConfigError(
                f"argument {flag}: value {value!r} is not valid YAML; quote it"
            ) from None
    return parsed


def set_key(tree: Any, keys: tuple[str, ...], value: Any) -> None:
    flag = "--" + ".".join(keys)
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(tree, list):
            if not key.isdigit() or int(key) >= len(tree):
                raise ConfigError(f"argument {flag}: {key} is not an index below {len(tree)}")
            key = int(key)
        elif not isinstance(tree, dict):
            raise ConfigError(
                f"argument {flag}: {'.'.join(keys[:i])} is a value, it has no key {key}"
            )
        if last:
            tree[key] = value
        elif isinstance(tree, dict):
            tree = tree.setdefault(key, {})
        else:
            tree = tree[key]


def find_line(node: yaml.Node, loc: tuple) -> int:
    """1-based line of the deepest part of `loc` that stands in the file."""
    line = node.start_mark.line + 1 if node else 1
    for key in loc:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == str(key)]
            if not found:
                break
            line = found[0][0].start_mark.line + 1
            node = found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return line


def describe(error: ValidationError, locate: typing.Callable[[tuple], str]) -> str:
    """First problem of a pydantic error as one line."""
    problem = error.errors()[0]
    loc = tuple(
        part
        for part in problem["loc"]
        if isinstance(part, int)
        or not re.search(r"[\[\s]|^literal|^list|^str$|^constrained-", part)
    )
    name = ".".join(map(str, loc))
    if problem["type"] == "extra_forbidden":
        valid = list(section_fields(loc[:-1]))
        elsewhere = [key for key in all_keys() if key.split(".")[-1] == loc[-1]]
        near = difflib.get_close_matches(str(loc[-1]), valid, n=1, cutoff=0.5)
        near = elsewhere or [".".join(map(str, (*loc[:-1], key))) for key in near]
        hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(valid)}"
        return f"{locate(loc)}: unknown key {name}; {hint}"
    if problem["type"] == "missing":
        return f"{locate(loc)}: {name} is missing; set it in the file or with --{name} VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    if not loc:
        return f"config: {message}"
    got = (
        problem["input"]
        if isinstance(problem["input"], (str, int, float, bool, type(None)))
        else type(problem["input"]).__name__
    )
    return f"{locate(loc)}: {name} got {got!r}; {message[0].lower() + message[1:]}"


def section_fields(loc: tuple) -> dict:
    """Fields of the section at `loc`, following lists."""
    section = Config
    for part in loc:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        if field is None:
            return {}
        section = next(
            (
                t
                for t in flatten_types(field.annotation)
                if isinstance(t, type) and issubclass(t, Section)
            ),
            None,
        )
        if section is None:
            return {}
    return section.model_fields


def flatten_types(annotation: Any) -> typing.Iterator[Any]:
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from flatten_types(argument)
    else:
        yield annotation


def all_keys() -> dict[str, Any]:
    """Every `section.key` with its pydantic field, in order; used for --help and for
    suggestions.
    """
    return {
        f"{name}.{key}": field
        for name, section in Config.model_fields.items()
        for key, field in section_fields((name,)).items()
    }


def help_text() -> str:
    """One line per key: name, allowed values, default, meaning."""
    lines = []
    for key, field in all_keys().items():
        choices = (
            typing.get_args(field.annotation)
            if typing.get_origin(field.annotation) is Literal
            else ()
        )
        default = "required" if field.is_required() else f"default {field.default!r}"
        lines.append(
            f"  --{key} {'|'.join(choices) or 'VALUE'}  ({default})\n     "
            f" {' '.join((field.description or '').split())}"
        )
    return "\n".join(lines)
