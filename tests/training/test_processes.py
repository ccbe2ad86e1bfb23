"""Processes that fail, die, differ or never come: one clear line, code 2 everywhere, no hang,
nothing lost.
"""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from warm_processes import finish_ranks, start_ranks

RECIPE = ROOT / "recipes" / "sft_qlora.py"
STEPS = 24


def flags(output: Path, cache: Path, *more: str) -> list[str]:
    return [
        "--output_dir",
        str(output),
        "--data.cache_dir",
        str(cache),
        "--data.test",
        "[]",
        "--data.eval",
        "[]",
        "--data.train.0.limit",
        "600",
        "--training.epochs",
        "9",
        "--training.gradient_checkpointing",
        "none",
        "--training.max_steps",
        str(STEPS),
        "--training.max_tokens_per_batch",
        "512",
        "--training.global_batch_tokens",
        "2048",
        "--training.save_steps",
        "4",
        "--model.dtype",
        "float32",
        *more,
    ]


def complaints(text: str) -> list[str]:
    noise = (
        "Warning",
        "warnings.warn",
        "[W",
        "[E",
        "return func",
        "Setting accelerator to CPU",
        "Failed to load CPU",
    )
    return [
        line
        for line in text.splitlines()
        if line.strip() and not any(word in line for word in noise)
    ]


OTHER_TORCH = """
import runpy, sys
from medqlora.training import processes
versions = processes.read_versions
processes.read_versions = lambda: versions() | {"torch": "1.0"}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FAILING = {
    "batch arithmetic": (
        ["--training.global_batch_tokens", "1500"],
        {},
        "not a multiple of max_tokens_per_batch 512",
    ),
    "missing data, found by rank 0 alone": (
        ["--data.train.0.path", "/nowhere.jsonl"],
        {},
        "no file or folder",
    ),
    "fp16 engine": ([], {"ACCELERATE_MIXED_PRECISION": "fp16"}, "the recipe owns the dtype"),
    "a run of another recipe": (["--resume", "--training.lr", "1e-9"], {}, "training.lr was"),
}


@pytest.mark.parametrize("mistake", FAILING)
def test_mistake_ends_all_ranks_with_code_2_and_one_line_of_rank_0(tmp_path, mistake):
    more, environment, message = FAILING[mistake]
    if "run" in mistake.split():
        (tmp_path / "run").mkdir()
        from medqlora.core.config_loading import dump_config, load_config

        overrides = flags(tmp_path / "run", tmp_path / "cache")[2:]
        (tmp_path / "run" / "config.yaml").write_text(
            dump_config(load_config(ROOT / "recipes" / "configs" / "demo.yaml", overrides))
        )
    command = [str(RECIPE), *flags(tmp_path / "run", tmp_path / "cache", *more)]
    codes, _, errors = finish_ranks(start_ranks([command] * 2, [environment] * 2))
    assert codes == [2, 2], errors
    assert len(complaints(errors[0])) == 1, errors[0]
    assert message in complaints(errors[0])[0]
    assert complaints(errors[1]) == []
    assert not (tmp_path / "run" / "train_log.jsonl").exists()


def test_different_packages_and_different_configurations_are_named(tmp_path):
    common = flags(tmp_path / "run", tmp_path / "cache")
    mixed = [[str(RECIPE), *common], ["-c", OTHER_TORCH, str(RECIPE), *common]]
    codes, _, errors = finish_ranks(start_ranks(mixed))
    assert codes == [2, 2], errors
    assert "rank 1 on" in complaints(errors[0])[0]
    assert "has torch 1.0, rank 0" in complaints(errors[0])[0]
    codes, _, errors = finish_ranks(
        start_ranks([[str(RECIPE), *common], [str(RECIPE), *common, "--training.lr", "1e-5"]])
    )
    assert codes == [2, 2], errors
    assert "has config" in complaints(errors[0])[0]


ALONE = """
import os, sys
from datetime import timedelta
from medqlora.training.processes import ProcessError, start_processes
try:
    start_processes(os.environ, cuda=False, join=timedelta(seconds=3))
except ProcessError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_never_come_are_not_waited_for_forever(rank):
    environment = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    codes, _, errors = finish_ranks(start_ranks([["-c", ALONE]], [environment]), 60)
    assert codes == [2]
    assert f"rank {rank} of 2" in complaints(errors[0])[-1]
    assert "found no group at 127.0.0.1" in complaints(errors[0])[-1]


def test_more_processes_than_gpus_is_said(monkeypatch):
    from medqlora.training import processes

    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(processes.ProcessError, match=r"8 processes on .* has 2 GPU"):
        processes.start_processes({"LOCAL_WORLD_SIZE": "8"}, cuda=True)


WAITING = """
import sys, time
from datetime import timedelta
from pathlib import Path
import os
from medqlora.training import processes
processes.TIMEOUT = timedelta(seconds=4)
accelerator = processes.start_processes(os.environ, cuda=False)
def work(report):
    for stage in ("reading", "tokenizing"):
        report(stage)
        time.sleep(4)
    if len(sys.argv) > 2:
        raise processes.ProcessError("line 7: no label")
    return {"plan": "p1"}
try:
    print(processes.share_once(Path(sys.argv[1]), work, print))
except processes.AgreedError as error:
    print(error)
time.sleep(0.5)
"""


def test_others_wait_on_a_file_longer_than_a_collective_may_take(tmp_path):
    ranks = start_ranks([["-c", WAITING, str(tmp_path / "cache")]] * 2)
    codes, shown, errors = finish_ranks(ranks)
    assert codes == [0, 0], errors
    assert shown[0] == "{'plan': 'p1'}\n"
    lines = shown[1].splitlines()
    assert lines[-1] == "{'plan': 'p1'}"
    assert "waiting for rank 0: tokenizing" in lines
    assert list((tmp_path / "cache").iterdir()) == []


def test_failure_of_the_one_that_works_reaches_those_that_wait(tmp_path):
    codes, shown, errors = finish_ranks(
        start_ranks([["-c", WAITING, str(tmp_path / "cache"), "fail"]] * 2)
    )
    assert codes == [0, 0], errors
    assert [text.splitlines()[-1] for text in shown] == ["line 7: no label"] * 2


# ---- faults under the launcher -------------------------------------------------------------------


# A script that trains, but waits after some steps until a signal comes: so a signal or a kill finds
# the training unfinished on every machine. `holds` has, for each restart, the number of steps.
HOLDING = """
import os, runpy, sys, time
from pathlib import Path
from medqlora.training import session, signals

ranks, holds, folder = {ranks!r}, {holds!r}, Path({folder!r})
catch_signals, update = signals.catch_signals, session.Session.update
caught, steps = [], []

def catch():
    caught.append(catch_signals())
    return caught[-1]

def hold(self, lr):
    norm = update(self, lr)
    steps.append(1)
    rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if rank in ranks and restart < len(holds) and len(steps) == holds[restart]:
        (folder / f"held-{{restart}}-{{rank}}").touch()
        while not caught[-1]:
            time.sleep(0.01)
    return norm

signals.catch_signals, session.Session.update = catch, hold
sys.argv[0] = {recipe!r}
runpy.run_path({recipe!r}, run_name="__main__")
"""


def write_holding(folder: Path, ranks: list[int], holds: list[int]) -> Path:
    script = folder / "holding.py"
    text = HOLDING.format(ranks=ranks, holds=holds, folder=str(folder), recipe=str(RECIPE))
    script.write_text(text)
    return script


def wait_until_held(process: subprocess.Popen, folder: Path, rank: int, restart: int = 0) -> None:
    while process.poll() is None and not (folder / f"held-{restart}-{rank}").exists():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0][-3000:]


def launch(
    output: Path, cache: Path, *more: str, script: Path = RECIPE, restarts: int = 0
) -> subprocess.Popen:
    """Run the whole command of `accelerate launch` with two ranks."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "accelerate_configs" / "ddp.yaml",
        "--main_process_port",
        "0",
        "--max_restarts",
        restarts,
        script,
        *flags(output, cache, *more),
    ]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_losses(run: Path) -> list[tuple[int, float]]:
    path = run / "train_log.jsonl"
    return (
        [(row["step"], row["loss"]) for row in map(json.loads, path.read_text().splitlines())]
        if path.exists()
        else []
    )


def find_ranks(launcher: int, script: Path) -> list[psutil.Process]:
    by_rank = {}
    for child in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # The process has just ended.
            if str(script) in child.cmdline():
                by_rank[int(child.environ()["RANK"])] = child
    return [by_rank[rank] for rank in sorted(by_rank)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = launch(folder / "run", folder / "cache")
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    return folder


def test_killed_rank_ends_the_job_and_is_named(uninterrupted, tmp_path):
    """The job ends long before a collective's timeout, which is half an hour."""
    rank = random.randrange(2)
    script = write_holding(tmp_path, [rank], [6])
    process = launch(tmp_path / "run", uninterrupted / "cache", script=script)
    wait_until_held(process, tmp_path, rank)
    find_ranks(process.pid, script)[rank].send_signal(signal.SIGKILL)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    root = shown.partition("Root Cause")[2]
    assert f"rank      : {rank}" in root
    assert "SIGKILL" in root


@pytest.mark.full
def test_elastic_restart_resumes_and_equals_the_uninterrupted_run(uninterrupted, tmp_path):
    """Two kills of a random rank; the launcher may restart no more often than --max_restarts."""
    rank = random.randrange(2)
    script = write_holding(tmp_path, [rank], [6, 7])
    process = launch(tmp_path / "run", uninterrupted / "cache", script=script, restarts=4)
    for restart in range(2):
        wait_until_held(process, tmp_path, rank, restart)
        victim = find_ranks(process.pid, script)[rank]
        victim.send_signal(signal.SIGKILL)
        victim.wait(60)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown[-3000:]
    assert "resuming after step" in shown
    assert read_losses(tmp_path / "run") == read_losses(uninterrupted / "run")


@pytest.mark.parametrize(
    ("number", "whom"),
    [
        pytest.param(signal.SIGTERM, "launcher", marks=pytest.mark.full),
        (signal.SIGUSR1, "one rank"),
    ],
)
def test_preemption_writes_a_checkpoint_and_resumes_alone(uninterrupted, tmp_path, number, whom):
    ranks = [0, 1] if whom == "launcher" else [1]
    script = write_holding(tmp_path, ranks, [5])
    more = ("--training.save_steps", "1000")
    process = launch(tmp_path / "run", uninterrupted / "cache", *more, script=script)
    wait_until_held(process, tmp_path, 1)
    target = process if whom == "launcher" else find_ranks(process.pid, script)[1]
    target.send_signal(number)
    shown, _ = process.communicate(timeout=300)
    assert "continue with --resume" in shown, shown
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    # The signal comes after the fifth update; the ranks tell each other with the sixth loss.
    assert saved.name == "step-6"
    again = launch(tmp_path / "run", uninterrupted / "cache", "--resume")
    shown, _ = again.communicate(timeout=300)
    assert again.returncode == 0, shown
    assert read_losses(tmp_path / "run") == read_losses(uninterrupted / "run")


@pytest.fixture(scope="module")
def interrupted(uninterrupted, tmp_path_factory):
    """A run folder with one checkpoint, of a run that was ended by a signal."""
    folder = tmp_path_factory.mktemp("interrupted")
    script = write_holding(folder, [0, 1], [5])
    more = ("--training.save_steps", "1000")
    process = launch(folder / "run", uninterrupted / "cache", *more, script=script)
    wait_until_held(process, folder, 1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    return folder / "run"


@pytest.mark.parametrize("fault", ["full disk", "no folder"])
def test_checkpoint_that_cannot_be_written_is_said_once_and_earlier_ones_stay(
    uninterrupted, interrupted, tmp_path, fault
):
    """The operating system itself refuses: a limit on the size of files stands for the full
    disk.
    """
    run = tmp_path / "run"
    shutil.copytree(interrupted, run)
    (saved,) = (run / "checkpoints").iterdir()
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    common = [
        str(RECIPE),
        *flags(run, uninterrupted / "cache", "--resume", "--training.save_steps", "1"),
    ]
    if fault == "full disk":
        # bytes: more than the adapter, less than the optimizer's states
        limit = (1_500_000, 1_500_000)
        resource_limit = (
            "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            f" resource.setrlimit(resource.RLIMIT_FSIZE, {limit})\n"
        )
        command = [
            "-c",
            resource_limit
            + "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0],"
            " run_name='__main__')",
            *common,
        ]
        message = "cannot be written: "
    else:
        shutil.move(run / "checkpoints", tmp_path / "kept")
        (run / "checkpoints").write_text("not a folder")
        saved = tmp_path / "kept" / saved.name
        command = common
        message = "cannot be written: "
    codes, _, errors = finish_ranks(start_ranks([command] * 2))
    assert codes == [2, 2], errors
    assert len(complaints(errors[0])) == 1, errors[0]
    assert message in complaints(errors[0])[0]
    assert "continue with --resume" in complaints(errors[0])[0]
    assert complaints(errors[1]) == []
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    if fault == "full disk":
        # nothing half written is left
        assert [path.name for path in (run / "checkpoints").iterdir()] == [saved.name]
