"""The frame of every command: arguments are read before anything slow is imported, and a mistake of
the user ends with one line and code 2.

This is the only room of the package that reads arguments and prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from medqlora.core.config import Config, Section
from medqlora.core.config_loading import (
    help_text,
    list_choices,
    load_config,
    load_settings,
    suggest_key,
)
from medqlora.core.errors import ConfigError, UserError

Result = TypeVar("Result")
Settings = TypeVar("Settings", bound=Section)
MISTAKE = 2
INTERRUPTED = 128 + 2  # as a shell reports SIGINT


def run_command(main: Callable[[], int | None], interrupted: str = "") -> NoReturn:
    """Run a script's main function and exit with its code.

    Args:
        main: returns an exit code; None is 0.
        interrupted: what to say after Ctrl-C.
    """
    try:
        code = main() or 0
    except UserError as error:
        print(error, file=sys.stderr)
        code = MISTAKE
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def run_early(read: Callable[[], Result], environ: Mapping[str, str] | None = None) -> Result:
    """Return what `read` returns; a mistake ends the program. Scripts call it before slow imports.

    Args:
        read: reads and checks the command line.
        environ: the environment of a launched process; the first process of each machine says the
            mistake, the others end silently.
    """
    try:
        return read()
    except UserError as error:
        if (environ or {}).get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr)
        sys.exit(MISTAKE)


class SettingsParser(argparse.ArgumentParser):
    """A parser whose mistakes are one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def read_settings(
    description: str, schema: type[Settings], groups: Mapping[str, type[Section]]
) -> Settings:
    """Read a command line whose flags are a schema's keys, and --config's YAML of the same keys.

    Args:
        description: the script's docstring, for --help.
        schema: the settings.
        groups: headings of --help; each has the keys that its own class declares.

    Raises:
        ConfigError: in one line, which key is wrong and what was expected.
    """
    parser = SettingsParser(
        usage="%(prog)s [--config FILE.yaml] [--key VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="YAML file with the keys below; flags win")
    for heading, section in groups.items():
        group = parser.add_argument_group(heading)
        for name in section.__annotations__:
            add_flag(group, name, schema.model_fields[name])
    known, unknown = parser.parse_known_args()
    flags = vars(known)
    if unknown:
        name = unknown[0].partition("=")[0]
        if not name.startswith("--"):
            raise ConfigError(f"argument {name}: expected --key VALUE; see --help")
        hint = suggest_key((name.removeprefix("--"),), schema)
        raise ConfigError(
            f"argument {name}: no such flag; {hint.replace('did you mean ', 'did you mean --')}"
        )
    return load_settings(schema, flags.pop("config", None), flags)


def add_flag(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    """Add the flag of one key; its value is checked with the schema, not by argparse."""
    text = " ".join((field.description or "").split()).replace("%", "%%")
    if field.annotation is bool:
        group.add_argument(f"--{name}", action="store_true", help=text)
        return
    choices = list_choices(field)
    default = (
        "" if field.default in (None, PydanticUndefined, {}) else f" (default {field.default})"
    )
    if field.is_required():
        default = " (required)"
    metavar = "{" + ",".join(choices) + "}" if choices else name.rpartition("_")[2].upper()
    group.add_argument(f"--{name}", metavar=metavar, help=text + default)


def read_recipe(
    description: str,
    default: Path | None,
    check: Callable[[Config], None],
) -> tuple[argparse.Namespace, Config]:
    """Read the command line of a recipe: its arguments and its configuration.

    Args:
        description: the script's docstring, for --help.
        default: the YAML file to use without --config; None makes --config necessary.
        check: raises UserError for a configuration that this recipe does not take.

    Raises:
        UserError: one line that says what is wrong with them.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="configuration keys:\n" + help_text(),
    )
    default_text = "required" if default is None else f"default: {default.name}"
    parser.add_argument(
        "--config",
        type=Path,
        default=default,
        required=default is None,
        help=f"YAML file ({default_text})",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="run folder (default: runs/NAME of the config)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output_dir from its newest checkpoint",
    )
    arguments, overrides = parser.parse_known_args()
    config = load_config(arguments.config, overrides)
    check(config)
    arguments.output_dir = arguments.output_dir or Path("runs") / arguments.config.stem
    return arguments, config
