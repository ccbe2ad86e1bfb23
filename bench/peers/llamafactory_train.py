"""LLaMA-Factory's own training of the settings in a file, timed. sft.py runs this with the
interpreter of its environment.

PYTHON bench/peers/llamafactory_train.py SETTINGS.json FIGURES.json
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    import torch
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    found = {"times": [], "losses": []}

    class Clock(TrainerCallback):
        """When each step ended, its loss, and what the packs hold."""

        def on_train_begin(self, args, state, control, train_dataloader=None, **_):
            # peaks are those of training, as the recipe's are: loading is not counted
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            packs = train_dataloader.dataset
            found["tokens"] = sum(
                sum(place != 0 for place in pack["attention_mask"]) for pack in packs
            )
            found["supervised"] = sum(
                sum(label != -100 for label in pack["labels"]) for pack in packs
            )

        def on_step_end(self, *_, **__):
            found["times"].append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                found["losses"].append(float(logs["loss"]))

    run_exp(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), [Clock()])
    if torch.cuda.is_available():
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    else:  # as medqlora.core.environment.read_peak_resident, which this interpreter may not have
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        found["peak_memory_bytes"] = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")
        )
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
