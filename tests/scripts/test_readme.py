"""Every command of README.md and of the guide runs as it stands, in order, in a copy of the
repository.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

# The guide goes on with what the commands of README.md have made. docs/gpu.md needs a GPU.
PAGES = ("README.md", "docs/guide.md", "docs/memory.md")
SKIPPED = {
    "git clone": "the repository is here already",
    "bash launch/test.sh": "this test is part of it",
}


def commands() -> list[str]:
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    blocks = [
        block for page in pages for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [
        line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")
    ]
    return [line for line in found if not line.startswith(tuple(SKIPPED))]


def test_pages_have_commands():
    assert commands()[0].startswith("bash launch/demo.sh")
    assert any("--resume" in command for command in commands())
    scripts = (
        "recipes/prepare_data.py",
        "recipes/sft_qlora.py",
        "recipes/merge_adapter.py",
        "eval/predict.py",
        "eval/score.py",
        "eval/compare.py",
        "eval/report.py",
        "eval/ask.py",
        "bench/memory.py",
        "bench/throughput.py",
        "bench/latency.py",
        "launch/preflight.py",
        "launch/submit.py",
        "launch/merge_gate.sh",
    )
    for script in scripts:
        assert any(script in command for command in commands()), script


def test_files_named_in_commands_exist():
    for command in commands():
        for word in shlex.split(command):
            if re.fullmatch(
                r"(recipes|eval|bench|launch|accelerate_configs)/[\w./-]+\.(py|sh|yaml|jsonl)", word
            ):
                assert (ROOT / word).exists(), f"{word} in: {command}"


@pytest.mark.full
def test_commands_run(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".venv*", "runs", ".git", "__pycache__", ".*_cache", "*.egg-info"
        ),
    )
    binaries = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(binaries.parent),
        "PYTHONPATH": str(copy),
        "MEDQLORA_SKIP_INSTALL": "1",
    }
    for command in commands():
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    metrics = json.loads((copy / "runs" / "demo" / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.8
    assert metrics["base"]["accuracy"] < 0.35
    assert metrics["comparison"]["mcnemar_p"] < 1e-6
    tuned = json.loads((copy / "runs" / "demo" / "metrics.json").read_text())["accuracy_ci95"]
    assert tuned[0] > metrics["base"]["accuracy_ci95"][1]


@pytest.mark.full
def test_what_users_type_first(tmp_path):
    """Word for word, without a single argument."""
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".venv*", "runs", ".git", "__pycache__", ".*_cache", "*.egg-info", "results"
        ),
    )
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(copy),
    }
    for command in ("python bench/memory.py", "python bench/throughput.py"):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        assert "recipes/demo/base" in done.stdout or "tokens/s" in done.stdout
    process = subprocess.Popen(
        ["bash", "-c", "exec accelerate launch recipes/sft_qlora.py"],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log = copy / "runs" / "demo" / "train_log.jsonl"
    began = time.monotonic()
    while (
        process.poll() is None
        and time.monotonic() - began < 300
        and not (log.is_file() and len(log.read_text().splitlines()) >= 3)
    ):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)  # a step later it ends with a checkpoint
    printed, _ = process.communicate(timeout=120)
    assert "continue with --resume" in printed, printed[-3000:]
    assert list((copy / "runs" / "demo" / "checkpoints").glob("step-*"))
