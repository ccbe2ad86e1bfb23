"""The frame of every command.

Arguments are read before anything slow is imported. A mistake of the user ends with one line on
stderr and exit code 2. No other module of the package reads arguments or prints.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

# Scripts import this module before their slow imports, and a misspelt key is said in under a
# second. Nothing here may therefore import torch or transformers when it is read.
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from medqlora.core.config import Config, Section
from medqlora.core.config_loading import (
    describe,
    help_text,
    list_choices,
    load_config,
    load_settings,
    suggest_key,
)
from medqlora.core.entry import BROKEN_PIPE, INTERRUPTED, MISTAKE, interrupt, say, stop_at_once
from medqlora.core.errors import ConfigError, UserError

if TYPE_CHECKING:
    from rich.console import Console

Result = TypeVar("Result")
Settings = TypeVar("Settings", bound=Section)
MOST = 1_000_000_000  # A larger number of a flag is a slip of the keyboard.
# torch's launcher tells a process its place in these variables.
PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_NUMBERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_RESTART_COUNT",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE",
)


def run_command(main: Callable[[], int | None], interrupted: str = "") -> NoReturn:
    """Run a script's main function and exit with its code.

    Args:
        main: returns an exit code; None stands for 0.
        interrupted: a line for stderr after Ctrl-C, where there is something to say.
    """
    # From here on Ctrl-C is an exception, so that files can be closed.
    if signal.getsignal(signal.SIGINT) is stop_at_once:
        signal.signal(signal.SIGINT, interrupt)
    try:
        code = main() or 0
        # A full disk, or a reader that has gone, shows itself here. At the end of the program
        # Python would say it in its own way.
        sys.stdout.flush()
    # Any other exception is a defect of the program and keeps its traceback.
    except UserError as error:
        say(str(error))
        code = MISTAKE
    # Some scripts make sections of the configuration from their own flags.
    except ValidationError as error:
        say(describe(error, lambda place: "command line"))
        code = MISTAKE
    except BrokenPipeError:
        code = BROKEN_PIPE
    except OSError as error:
        say(describe_refusal(error))
        code = MISTAKE
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        code = INTERRUPTED
    if code in (BROKEN_PIPE, MISTAKE):
        drop_output()
    sys.exit(code)


def run_early(read: Callable[[], Result], environ: Mapping[str, str] | None = None) -> Result:
    """Return what `read` returns, or end the program with one line about a UserError.

    Scripts call it before their slow imports.

    Args:
        read: reads and checks the command line.
        environ: the environment of a launched process. Only the first process of each machine
            prints the line; the others end silently.
    """
    try:
        check_launcher(environ or {})
        return read()
    except (UserError, OSError) as error:
        # A rank that is no number belongs to no launcher, so it speaks for itself.
        rank = (environ or {}).get("LOCAL_RANK", "0")
        if rank == "0" or not rank.isdecimal():
            say(str(error) if isinstance(error, UserError) else describe_refusal(error))
        sys.exit(MISTAKE)


def check_launcher(environ: Mapping[str, str]) -> None:
    """Check the variables by which a launcher tells a process its place among the others.

    Raises:
        ConfigError: A variable is no whole number, or one is missing.
    """
    for name in LAUNCHER_NUMBERS:
        value = environ.get(name) or "0"
        if not (value.isascii() and value.isdigit()):
            raise ConfigError(
                f"environment variable {name} is {value!r}; expected a whole number, as the"
                " launcher sets it; unset it, or start with accelerate launch"
            )
    missing = [name for name in PLACE if not environ.get(name)]
    if "LOCAL_RANK" in environ and missing:
        raise ConfigError(
            f"environment variable LOCAL_RANK is set and {missing[0]} is not; unset it, or start"
            " with accelerate launch"
        )
    if "LOCAL_RANK" in environ and int(environ["RANK"]) >= int(environ["WORLD_SIZE"]):
        raise ConfigError(
            f"environment variable RANK is {environ['RANK']} of WORLD_SIZE"
            f" {environ['WORLD_SIZE']} processes; ranks are counted from 0"
        )


def describe_refusal(error: OSError) -> str:
    """Return the line for a file that the system refuses.

    Raises:
        OSError: The system refused something else than a file, such as a connection. That is no
            mistake in a path.
    """
    if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        raise error
    name = "the output" if error.filename is None else str(error.filename)
    # A name that the system finds too long would fill the terminal.
    if len(name) > 200:
        name = f"{name[:200]}…"
    return f"{name}: {error.strerror}; check the path, its permissions and the space on the disk"


def drop_output() -> None:
    """Let what still waits for stdout go nowhere, if stdout is a file that refuses it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_arguments(arguments: list[str]) -> None:
    """Refuse an argument that is no text, or that names a home that is not here.

    Raises:
        ConfigError: An argument is not valid UTF-8, and no file that we write could hold it; or it
            begins with ~USER, and there is no such user.
    """
    for place, argument in enumerate(arguments, 1):
        value = argument.partition("=")[2] if argument.startswith("--") else argument
        if value.startswith("~"):
            try:
                Path(value).expanduser()
            except RuntimeError:
                raise ConfigError(
                    f"argument {argument}: no user of this name has a home here; give the path"
                ) from None
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"argument {place} of the command: not valid UTF-8; rename the file, or give text"
            ) from None


def make_console(**options: Any) -> Console:
    """Return a console that prints every text as it is.

    rich would take a name in brackets, such as a folder [old], for a style and leave it out, and
    :pill: for a picture. Styles are therefore given beside a text and never inside it.

    Args:
        options: what else rich's Console takes.
    """
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """Return a type for argparse: a whole number from `least` to `most`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,12}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"got {text[:40]!r}; expected a whole number from {least} to {most:,}"
            )
        return int(text)

    return read


def above_zero(text: str) -> float:
    """Read a flag as a finite number above zero; a type for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    # A comparison with NaN is false, so NaN is refused too.
    if not 0 < value <= MOST:
        raise argparse.ArgumentTypeError(
            f"got {text[:40]!r}; expected a number above 0 and up to {MOST:,}"
        )
    return value


class CommandParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, without the whole usage."""

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, and refuse arguments that are no text."""
        given = sys.argv[1:] if args is None else args
        check_arguments(given)
        for argument in given:
            # argparse takes the two dashes out and stores an empty list.
            if argument.endswith("=--"):
                raise ConfigError(f"argument {argument}: no value; expected --key VALUE")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError where argparse would print the usage and exit."""
        raise ConfigError(f"{message}; see --help")


def read_settings(
    description: str, schema: type[Settings], groups: Mapping[str, type[Section]]
) -> Settings:
    """Read a command line whose flags are the keys of a schema.

    The YAML file of --config may have the same keys.

    Args:
        description: the script's docstring, for --help.
        schema: the settings.
        groups: for each heading of --help the class whose own keys stand under it.

    Raises:
        ConfigError: a flag or key is unknown, or its value is not allowed. The message is one line.
    """
    parser = CommandParser(
        usage="%(prog)s [--config FILE.yaml] [--key VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A flag that was not given is then absent from the result. With its default it would win
        # over the YAML file.
        argument_default=argparse.SUPPRESS,
        # argparse would otherwise take the beginning of a flag's name for the flag.
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, help="YAML file with the keys below; a flag wins over the file"
    )
    for heading, section in groups.items():
        group = parser.add_argument_group(heading)
        # `__annotations__` names the keys that a class declares itself, without those it inherits.
        for name in section.__annotations__:
            add_flag(group, name, schema.model_fields[name])
    # Unknown flags are collected and not refused here, so that the message can name the nearest
    # key.
    known, unknown = parser.parse_known_args()
    flags = vars(known)
    if unknown:
        name = unknown[0].partition("=")[0]
        if not name.startswith("--"):
            raise ConfigError(f"argument {name}: expected --key VALUE; see --help")
        hint = suggest_key((name.removeprefix("--"),), schema)
        hint = hint.replace("did you mean ", "did you mean --")
        raise ConfigError(f"argument {name}: no such flag; {hint}")
    return load_settings(schema, flags.pop("config", None), flags)


def add_flag(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    """Add the flag of one key; the schema checks its value, not argparse."""
    # argparse formats help texts with the % operator, so a percent sign is doubled.
    text = " ".join((field.description or "").split()).replace("%", "%%")
    # Such a flag takes no value and can only switch on, so the schema's default must be False.
    if field.annotation is bool:
        group.add_argument(f"--{name}", action="store_true", help=text)
        return
    choices = list_choices(field)
    metavar = name.rpartition("_")[2].upper()
    # A key with several values is a flag that is given once for each of them.
    if typing.get_origin(field.annotation) is tuple:
        group.add_argument(f"--{name}", metavar=metavar, action="append", help=text)
        return
    if choices:
        metavar = "{" + ",".join(choices) + "}"
    default = ""
    if field.is_required():
        default = " (required)"
    elif field.default not in (None, PydanticUndefined, {}, []):
        default = f" (default {field.default})"
    group.add_argument(f"--{name}", metavar=metavar, help=text + default)


def quiet_libraries() -> None:
    """Silence warnings between libraries and the progress bars of transformers.

    transformers is imported here, so this is called after the arguments are checked.
    """
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


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
        UserError: a key is unknown, a value is not allowed, or `check` refuses the configuration.
            The message is one line.
    """
    parser = CommandParser(
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
        "--output_dir",
        type=Path,
        help="run folder to write (default: runs/NAME, where NAME is that of the YAML file)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output_dir from its newest checkpoint",
    )
    parser.add_argument(
        "--resume_changed",
        action="store_true",
        help="with --resume: continue although data, base, tokenizer or prompts are others than"
        " when the run began; environment.json records it",
    )
    arguments, overrides = parser.parse_known_args()
    if arguments.resume_changed and not arguments.resume:
        raise ConfigError("--resume_changed only says how to resume; give --resume too")
    config = load_config(arguments.config, overrides)
    check(config)
    arguments.output_dir = arguments.output_dir or Path("runs") / arguments.config.stem
    return arguments, config
