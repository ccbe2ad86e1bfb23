"""Ctrl-C in any command, while it imports and while it works: exit code 130 and no traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import DEMO, ROOT

pytestmark = [
    pytest.mark.full,  # Every case waits for a command of its own.
]

ACCELERATE = ROOT / "accelerate_configs" / "ddp.yaml"
RECIPE = ROOT / "recipes" / "configs" / "demo.yaml"
COMMANDS = {
    "recipes/sft_qlora.py": ["--output_dir", "run"],
    "recipes/train_stages.py": [
        *(ROOT / "recipes" / "configs" / "demo_stages.yaml", "--output_dir", "run"),
    ],
    "recipes/prepare_data.py": [],
    "recipes/search.py": [RECIPE.parent / "search_demo.yaml", "--output_dir", "search"],
    "recipes/merge_adapter.py": ["--adapter", "run/adapter", "--output", "merged"],
    "recipes/demo/train_base.py": ["--data_dir", DEMO / "data"],
    "eval/predict.py": [
        *("--model", DEMO / "base", "--format", "medmcqa", "--permutations", "24"),
        *("--path", DEMO / "data" / "test.jsonl", "--output", "p.jsonl"),
    ],
    "eval/rate.py": ["sheet", "p.jsonl", "--output", "sheet.csv", "--key", "key.json"],
    "eval/ask.py": ["--model", DEMO / "base", "--file", DEMO / "data" / "test.jsonl"],
    "launch/preflight.py": ["--config", RECIPE, "--accelerate_config", ACCELERATE],
    "bench/memory.py": [],
    "bench/recipe_memory.py": ["--check"],
    "bench/throughput.py": [],
    "bench/latency.py": ["--model", DEMO / "base"],
    "bench/before_after.py": [],
    "bench/data.py": [],
    "bench/strategies.py": [],
    "bench/scaling.py": [],
    "bench/gpu.py": ["--device", "cpu", "--output", "found"],
}
# These still work when the imports are done, so a second moment lies in their work.
LONG = (
    "recipes/sft_qlora.py",
    "recipes/search.py",
    "recipes/train_stages.py",
    "eval/predict.py",
    "eval/ask.py",
    "bench/throughput.py",
    "bench/gpu.py",
)
CASES = [(name, 0.4) for name in COMMANDS] + [(name, 4.0) for name in LONG]


@pytest.mark.parametrize(("script", "seconds"), CASES)
def test_ctrl_c_is_no_traceback(script, seconds, tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / script, *COMMANDS[script]],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(seconds)
    # A terminal sends the signal to every process of the command.
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert "Traceback" not in complaint
    # A command that had ended before the signal has its own code.
    assert process.returncode in (130, 0, 2), complaint
    assert complaint.count("\n") <= 2, complaint
