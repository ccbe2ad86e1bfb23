"""Continue the pretraining of a language model on plain text with QLoRA.

Every token of the text (textbooks, guidelines) is supervised.

    accelerate launch recipes/pretrain_qlora.py --config recipes/configs/NAME.yaml \\
        --output_dir runs/NAME [--resume]

This script only checks that all training data is text. Then it runs recipes/sft_qlora.py in its
place, with the same arguments.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import read_recipe, run_command, run_early
from medqlora.core.config import Config
from medqlora.core.errors import ConfigError
from medqlora.data.formats.registry import find_format


def check_text(config: Config) -> None:
    """Check that every training entry is plain text."""
    for index, entry in enumerate(config.data.train):
        if find_format(entry.format).scoring != "perplexity":
            raise ConfigError(
                f"data.train[{index}] has format {entry.format}; expected a format of plain text,"
                " such as text; train on questions with recipes/sft_qlora.py"
            )


def main() -> None:
    run_early(lambda: read_recipe(__doc__, None, check_text), os.environ)
    recipe = Path(__file__).with_name("sft_qlora.py")
    # The process is replaced and not joined by a child, so its id, its signals and the launcher's
    # variables stay.
    os.execv(sys.executable, [sys.executable, str(recipe), *sys.argv[1:]])


if __name__ == "__main__":
    run_command(main)
