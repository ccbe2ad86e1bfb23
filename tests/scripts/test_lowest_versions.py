"""The lowest versions that setup.cfg promises, in an environment of their own:
MEDQLORA_LOWEST_PYTHON names its Python.

python3 -m venv .venv-lowest
.venv-lowest/bin/pip install $(python3 launch/lowest_versions.py) pytest hypothesis matplotlib
"""

import json
import os
import subprocess

import pytest
from conftest import ROOT, run_script
from packaging.version import Version

PYTHON = os.environ.get("MEDQLORA_LOWEST_PYTHON")
# The planner's searches are arithmetic of our own on forecasts, and the forecasts are tested.
SEARCHES = (
    "plan or longest or too_long or impossible or recipe_decides or few_layers or hosts_memory"
)
MODULES = [
    "model/test_attention",
    "model/test_generated_code",
    "model/test_layers",
    "model/test_losses",
    "model/test_models",
    "training/test_memory",
]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        PYTHON is None,
        reason="MEDQLORA_LOWEST_PYTHON names no Python with the lowest versions of setup.cfg",
    ),
]


def run(*arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [PYTHON, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


def test_the_environment_holds_what_setup_cfg_promises():
    promised = [
        line.split("==")
        for line in run_script("launch/lowest_versions.py").stdout.split()
        if "==" in line
    ]
    assert {"torch", "transformers", "peft", "accelerate", "bitsandbytes"} <= {
        name for name, _ in promised
    }
    names = [name for name, _ in promised]
    done = run(
        "-c", f"import importlib.metadata as m; print(*[m.version(name) for name in {names}])"
    )
    for (name, lowest), version in zip(promised, done.stdout.split(), strict=True):
        assert Version(Version(version).public) == Version(lowest), (
            f"{name} {version}, promised from {lowest}"
        )


@pytest.mark.parametrize("module", MODULES)
def test_the_same_tests_pass(module):
    options = ("-q", "-p", "no:cacheprovider", "-m", "not full", "-k", f"not ({SEARCHES})")
    done = run("-m", "pytest", *options, f"tests/{module}.py")
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_compiled_layers_compute_the_same():
    name = "tests/model/test_layers.py::test_compiled_layers_compute_the_same"
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", name)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1 passed" in done.stdout


def test_a_small_training(tmp_path):
    done = run(
        "recipes/sft_qlora.py",
        "--output_dir",
        tmp_path / "run",
        "--data.cache_dir",
        tmp_path / "cache",
        "--training.max_steps",
        "12",
        "--lora.dropout",
        "0.1",
        "--data.test.0.limit",
        "20",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["step"] == 12
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
