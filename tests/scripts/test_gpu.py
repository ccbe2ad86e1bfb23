"""pytest -m gpu runs bench/gpu.py on a GPU. Without one the same scripts are rehearsed on small
shapes.
"""

import json
import os
import runpy
import shutil

import pytest
import torch
from conftest import ROOT, run_script

SCRIPT = ROOT / "bench" / "gpu.py"
STAGES = [
    "card",
    "kernels",
    "bases",
    "memory",
    "throughput",
    "demonstration",
    "optimizers",
    "full_memory",
    "profile",
    "engine",
]


def run(*arguments, **options):
    return run_script(
        *arguments,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "0"},
        cold=True,
        **options,
    )


@pytest.mark.full
@pytest.mark.gpu
def test_everything_works_on_this_machine(tmp_path):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flags = ["--output", tmp_path / "found", "--device", device]
    if device == "cpu":
        flags += ["--minutes", "60"]
    done = run(SCRIPT, *flags)
    results = json.loads((tmp_path / "found" / "gpu.json").read_text())["stages"]
    assert done.returncode == 0, done.stdout
    assert list(results) == STAGES
    assert {result["status"] for result in results.values()} == {"passed"}
    files = list((tmp_path / "found").iterdir())
    assert len(files) <= 8
    assert all(path.stat().st_size < 16 * 2**20 for path in files)
    assert sum(len(result["checks"]) for result in results.values()) > 150
    figures = {name: result["figures"] for name, result in results.items()}
    assert figures["throughput"]["none"]["tokens_per_second"] > 0
    assert figures["profile"]["seconds"]["by_kind"]["attention"] > 0
    assert figures["demonstration"]["resumed run equal to the bit"] or device == "cuda"
    assert "environment" in figures["card"]
    # bench/tables.py writes the documentation's tables from a recorded gpu.json.
    tables = runpy.run_path(str(ROOT / "bench" / "tables.py"))
    assert len(tables["rows_of_checks"]({"this machine": results})) == len(STAGES)
    assert all(len(row) == 8 for row in tables["rows_of_memory"]({"this machine": results}))
    assert [row[1] for row in tables["rows_of_speed"]({"this machine": results})] == [
        "none",
        "full",
        "offload",
        "none, not compiled",
    ]


@pytest.fixture
def broken(tmp_path):
    """A copy of the script whose stage `card` fails after a finding, and whose stage `optimizers`
    never ends.
    """
    shutil.copytree(
        ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("results", "__pycache__")
    )
    stage = (
        "import sys, pathlib\nfrom medqlora.training.gpu_stage import Stage\nstage ="
        " Stage.from_arguments(sys.argv[1:], '')\nstage.check('found', {}, 1)\n{}\n"
    )
    folder = tmp_path / "bench" / "gpu_stages"
    (folder / "stage_card.py").write_text(
        stage.format(0.5, "raise RuntimeError('this GPU is broken')")
    )
    (folder / "stage_optimizers.py").write_text(
        stage.format(float(2), "import time; time.sleep(1000)")
    )
    (folder / "stage_engine.py").write_text(stage.format(0.25, "sys.exit(stage.finish())"))
    script = tmp_path / "bench" / "gpu.py"
    script.write_text(
        script.read_text().replace('Plan("optimizers", 15, 60)', 'Plan("optimizers", 15, 30)')
    )
    return script


@pytest.mark.full
def test_a_failing_stage_stops_no_other(broken, tmp_path):
    done = run(
        broken,
        "--output",
        "found",
        "--device",
        "cpu",
        "--stages",
        "card,optimizers,engine",
        cwd=tmp_path,
    )
    results = json.loads((tmp_path / "found" / "gpu.json").read_text())["stages"]
    assert done.returncode == 1
    assert {name: result["status"] for name, result in results.items()} == {
        "card": "failed",
        "optimizers": "out of time",
        "engine": "passed",
    }
    assert "this GPU is broken" in "".join(results["card"]["last_lines"])
    # Findings before the end of a stage are kept.
    assert [result["checks"][0]["value"] for result in results.values()] == [0.5, 2, 0.25]
    assert "found: 2, allowed 1" in done.stdout
    assert "this GPU is broken" in (tmp_path / "found" / "gpu.log").read_text()


def test_stages_that_do_not_fit_the_time_are_skipped_and_named(tmp_path):
    done = run(SCRIPT, "--output", tmp_path / "found", "--device", "cpu", "--minutes", "0.01")
    assert done.returncode == 1  # No stage ran.
    for name in STAGES:
        assert f"{name}: skipped, needs about" in done.stdout
    results = json.loads((tmp_path / "found" / "gpu.json").read_text())["stages"]
    assert {result["status"] for result in results.values()} == {"skipped"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages", "card,kernel"], "--stages kernel: no such stage; there are card"),
        (["--minutes", "0"], "expected a number above 0"),
    ],
)
def test_mistakes_are_one_line(flags, message, tmp_path):
    done = run(SCRIPT, "--output", tmp_path / "found", "--device", "cpu", *flags)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    (tmp_path / "gpu.json").write_text("{}")
    done = run(SCRIPT, "--output", tmp_path, "--device", "cpu")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "give another folder" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_machine_without_a_gpu_is_told_at_once(tmp_path):
    done = run(SCRIPT, "--output", tmp_path / "found")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "torch sees no GPU here; --device cpu rehearses" in done.stderr
    assert not (tmp_path / "found").exists()


def test_stages_sum_to_less_than_the_time_they_have():
    plans = runpy.run_path(str(SCRIPT))["STAGES"]
    assert [plan.name for plan in plans] == STAGES
    assert sum(plan.seconds for plan in plans) < 540
