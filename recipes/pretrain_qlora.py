"""Continue pretraining on plain text (textbooks, guidelines) with QLoRA: every token is supervised.

    accelerate launch recipes/pretrain_qlora.py --config recipes/configs/NAME.yaml \\
        --output_dir runs/NAME [--resume]

This script checks that all training data is text, and then becomes recipes/sft_qlora.py, whose loop
it uses.
"""

import os
import sys
from pathlib import Path

from medqlora.core.command import read_recipe, run_command, run_early
from medqlora.core.config import Config
from medqlora.core.errors import ConfigError
from medqlora.data.formats.registry import find_format


def check_text(config: Config) -> None:
    for index, entry in enumerate(config.data.train):
        if find_format(entry.format).scoring != "perplexity":
            raise ConfigError(
                f"data.train[{index}] has format {entry.format}; pretraining takes text, questions"
                " go to recipes/sft_qlora.py"
            )


def main() -> None:
    run_early(lambda: read_recipe(__doc__, None, check_text), os.environ)
    recipe = Path(__file__).with_name("sft_qlora.py")
    os.execv(sys.executable, [sys.executable, str(recipe), *sys.argv[1:]])


if __name__ == "__main__":
    run_command(main)
