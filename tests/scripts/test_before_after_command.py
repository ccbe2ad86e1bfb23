"""The table before and after fine-tuning, from a finished run to its file."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import DEMO, ROOT, run_inside, run_script
from test_documents import documented_keys, undocumented

SCRIPT = ROOT / "bench" / "before_after.py"

pytestmark = [
    pytest.mark.full,  # A run is trained, and a dozen commands measure it.
]

MEASURED = ("base_16_bit", "base_quantized", "tuned", "merged")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with its adapter."""
    folder = tmp_path_factory.mktemp("before_after")
    flags = {
        "--output_dir": folder / "run",
        "--data.cache_dir": folder / "cache",
        "--data.train.0.limit": 60,
        "--data.eval": "[]",
        "--data.test.0.limit": 24,
        "--training.max_steps": 2,
        "--training.max_tokens_per_batch": 512,
        "--training.global_batch_tokens": 512,
    }
    command = [part for flag, value in flags.items() for part in (flag, str(value))]
    done = run_script(ROOT / "recipes" / "sft_qlora.py", *command)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def steps(monkeypatch):
    """Scripts that are started, which run in processes that have imported torch already."""
    started = []
    run = subprocess.run

    def run_warm(command, **options):
        if command[0] != sys.executable:
            return run(command, **options)
        started.append((command[1].rpartition("/")[2], command[2:]))
        if len(started) == 4:
            raise KeyboardInterrupt
        return run_script(*command[1:])

    monkeypatch.setattr(subprocess, "run", run_warm)
    return started


def test_a_finished_run_is_measured_and_an_interrupted_measurement_goes_on(
    trained, steps, monkeypatch, tmp_path
):
    output = tmp_path / "out"
    flags = ["--run", trained, "--output", output, "--requests", "4", "--by", "subject"]
    assert run_inside(SCRIPT, [*flags, "--json", tmp_path / "a.json"], monkeypatch) == (130, "")
    names = [name for name, _ in steps]
    assert names == ["merge_adapter.py", "predict.py", "before_after.py", "predict.py"]
    assert not (tmp_path / "a.json").exists()
    first = json.loads((output / "base_16_bit.json").read_text())
    code, complaint = run_inside(SCRIPT, [*flags, "--json", tmp_path / "a.json"], monkeypatch)
    assert code == 0, complaint
    # What was merged and measured before is not merged and measured again.
    names = [name for name, _ in steps[4:]]
    assert (names.count("merge_adapter.py"), names.count("before_after.py")) == (0, 3)
    found = json.loads((tmp_path / "a.json").read_text())
    found.pop("command")
    found.pop("environment")
    hardware = found["training"].pop("hardware")
    assert hardware["gpus"] == []
    assert not undocumented(found, documented_keys("bench/before_after.py"))

    models = found["models"]
    assert tuple(models) == MEASURED
    assert {model["n"] for model in models.values()} == {24}
    weights = (DEMO / "base" / "model.safetensors").stat().st_size
    adapter = (trained / "adapter" / "adapter_model.safetensors").stat().st_size
    assert models["base_16_bit"]["disk_bytes"] == models["base_quantized"]["disk_bytes"] == weights
    assert models["tuned"]["disk_bytes"] == weights + adapter
    # The base has 1,015,936 parameters, of which the adapter's are in 32 bits.
    assert models["base_16_bit"]["memory_bytes"] == pytest.approx(2 * 1_015_936, rel=0.01)
    added = models["tuned"]["memory_bytes"] - models["base_quantized"]["memory_bytes"]
    assert added == pytest.approx(4 * 327_680, rel=0.01)
    assert models["base_quantized"]["weights"] == models["tuned"]["weights"] == "nf4"
    # The tuned model answers as the run itself scored it.
    metrics = json.loads((trained / "metrics.json").read_text())
    assert models["tuned"]["accuracy"] == metrics["accuracy"]
    assert models["base_quantized"]["accuracy"] == metrics["base"]["accuracy"]
    training = found["training"]
    assert training["trainable_parameters"] == 327_680
    assert training["full_tuning_predicted_bytes"] > 16 * training["base_parameters"]
    assert training["measured_step_bytes"] > 0

    assert models["base_16_bit"]["scoring"] == first["scoring"]

    # Other settings are not mixed with what stands there.
    flags[flags.index("4")] = "5"
    code, complaint = run_inside(SCRIPT, flags, monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1)
    assert "other settings; give a new --output" in complaint


def change_run(folder, run, edit) -> str:
    """Return a copy of a run whose configuration was changed."""
    shutil.copytree(run, folder / "changed")
    path = folder / "changed" / "config.yaml"
    path.write_text(edit(path.read_text()))
    return folder / "changed"


def test_runs_that_cannot_be_compared_are_refused_before_any_work(trained, monkeypatch, tmp_path):
    def refuse(*flags) -> str:
        code, complaint = run_inside(SCRIPT, list(flags), monkeypatch)
        assert (code, complaint.count("\n")) == (2, 1), complaint
        return complaint

    assert "no config.yaml" in refuse("--run", tmp_path)
    assert "no model there" in refuse("--run", trained, "--merged", tmp_path)
    assert "has 1 entries" in refuse("--run", trained, "--entry", "1")
    assert "expected a whole number from 2" in refuse("--run", trained, "--requests", "1")
    assert "is a file" in refuse("--run", trained, "--output", trained / "config.yaml")
    assert not (trained / "before_after").exists()
    unfinished = tmp_path / "unfinished"
    shutil.copytree(trained, unfinished)
    (unfinished / "metrics.json").unlink()
    assert "finish it with --resume" in refuse("--run", unfinished)
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    (damaged / "metrics.json").write_text("{}")
    assert "no key memory_bytes" in refuse("--run", damaged)
    (damaged / "metrics.json").write_text("[1")
    assert "metrics.json cannot be read" in refuse("--run", damaged)
    lower = change_run(
        tmp_path, trained, lambda text: text.replace("lowercase: false", "lowercase: true")
    )
    assert "lower case" in refuse("--run", lower)
