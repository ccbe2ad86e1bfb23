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

from medqlora.core.config import Config
from medqlora.core.config_loading import help_text, load_config
from medqlora.core.errors import UserError

Result = TypeVar("Result")
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
    """What `read` returns; a mistake ends the program. Scripts call it before slow imports.

    environ: of a launched process; of those on one machine, the first one says the mistake.
    """
    try:
        return read()
    except UserError as error:
        if (environ or {}).get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr)
        sys.exit(MISTAKE)


def read_recipe(
    description: str,
    default: Path | None,
    check: Callable[[Config], None],
) -> tuple[argparse.Namespace, Config]:
    """The command line of a recipe -> its arguments and its configuration.

    Args:
        description: the script's docstring, for --help.
        default: the YAML file to use without --config; None makes --config necessary.
        check: raises UserError for a configuration that this recipe does not take.

    Raises:
        UserError: in one line, what is wrong with them.
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
