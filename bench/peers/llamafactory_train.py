"""LLaMA-Factory's own training of the settings in a file, timed. sft.py runs this script with the
interpreter of LLaMA-Factory's environment, which need not have this project's packages.

    PYTHON bench/peers/llamafactory_train.py SETTINGS.json FIGURES.json
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: llamafactory_train.py SETTINGS.json FIGURES.json")
    settings, output = map(Path, sys.argv[1:])

    # Importing these takes seconds, so a mistake is reported before.
    import torch
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    figures = {"times": [], "losses": []}

    class Clock(TrainerCallback):
        """Notes when each step ended, its loss, and the tokens of the packs."""

        def on_train_begin(self, args, state, control, train_dataloader=None, **_):
            # The recipe's peaks are those of training, so loading does not count here either.
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            else:
                # Linux resets the peak of resident memory so.
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            tokens = 0
            supervised = 0
            for pack in train_dataloader.dataset:
                # In the mask of a neat pack each document has its own number from 1, and padding
                # has 0.
                tokens += sum(place != 0 for place in pack["attention_mask"])
                supervised += sum(label != -100 for label in pack["labels"])
            figures["tokens"] = tokens
            figures["supervised"] = supervised

        def on_step_end(self, *_, **__):
            figures["times"].append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **_):
            # The summary at the end has no loss of a step.
            if "loss" in logs:
                figures["losses"].append(float(logs["loss"]))

    run_exp(json.loads(settings.read_text(encoding="utf-8")), [Clock()])
    if torch.cuda.is_available():
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    else:
        figures["peak_memory_bytes"] = read_peak_resident()
    output.write_text(json.dumps(figures), encoding="utf-8")


def read_peak_resident() -> int:
    """The same as medqlora.core.environment.read_peak_resident, which this interpreter may not
    have.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no line VmHWM")


if __name__ == "__main__":
    main()
