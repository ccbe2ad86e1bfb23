"""Continue pretraining on plain text (textbooks, guidelines) with QLoRA: every token is supervised.

    accelerate launch recipes/pretrain_qlora.py --config recipes/configs/NAME.yaml \\
        --output_dir runs/NAME [--resume]

The loop is that of recipes/sft_qlora.py; this script checks that the training data is text and that
its keys fit.
"""

import argparse
import runpy
import sys
from pathlib import Path

from medqlora.core.config_loading import help_text, load_config
from medqlora.core.errors import ConfigError, UserError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="configuration keys:\n" + help_text(),
    )
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        help="YAML file whose data.train entries are all of format text",
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
    for index, entry in enumerate(config.data.train):
        if entry.format != "text":
            raise ConfigError(
                f"data.train[{index}] has format {entry.format}; pretraining takes text, questions"
                " go to recipes/sft_qlora.py"
            )
    runpy.run_path(str(Path(__file__).with_name("sft_qlora.py")), run_name="__main__")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
