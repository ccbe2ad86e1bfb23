import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from medqlora.training.checkpoints import (
    CheckpointError,
    find_problem,
    list_checkpoints,
    load_newest,
    save_checkpoint,
)

NAME = "adapter.safetensors"
ADAPTER = {"a": torch.arange(6.0).view(2, 3)}


def save(folder, step, keep=2):
    return save_checkpoint(
        folder,
        step,
        ADAPTER,
        {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
        {"best_loss": 0.5},
        keep,
        NAME,
    )


def test_round_trip_and_pruning(tmp_path):
    for step in (10, 20, 100):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100", "step-20"]
    checkpoint, warnings = load_newest(tmp_path, NAME)
    assert warnings == []
    assert checkpoint.state == {"best_loss": 0.5, "step": 100}
    assert torch.equal(checkpoint.weights["a"], ADAPTER["a"])
    assert torch.equal(checkpoint.optimizer["state"][0]["exp_avg"], torch.ones(2))


def test_pruning_spares_the_newest_where_later_ones_are_damaged(tmp_path):
    """A run that has passed over damaged checkpoints writes smaller steps again."""
    for step in (30, 40):
        (save(tmp_path, step, keep=9) / "optimizer.pt").unlink()
    for step in (10, 20):
        save(tmp_path, step, keep=1)
    checkpoint, warnings = load_newest(tmp_path, NAME)
    assert checkpoint.state["step"] == 20
    assert len(warnings) == 2
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-40", "step-30", "step-20"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "optimizer.pt", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        flip(path)
    checkpoint, warnings = load_newest(tmp_path, NAME)
    if name == "manifest.json" and damage == "flip" and checkpoint.state["step"] == 2:
        # the flipped bit was in white space or a redundant place; every file still has its hash
        return
    assert checkpoint.state["step"] == 1
    assert len(warnings) == 1
    assert "step-2" in warnings[0]


def test_no_checkpoint(tmp_path):
    assert load_newest(tmp_path / "none", NAME) == (None, [])


def test_full_disk_leaves_earlier_checkpoints(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, 2)
    assert load_newest(tmp_path, NAME)[0].state["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


SAVING = """
import itertools, sys
from pathlib import Path
import torch
from medqlora.training.checkpoints import save_checkpoint
for step in itertools.count(int(sys.argv[2])):
    weights = {"a": torch.full((300_000,), float(step))}
    save_checkpoint(Path(sys.argv[1]), step, weights, {}, {}, 2, "adapter.safetensors")
    print(step, flush=True)
"""


def test_kill_in_the_middle_of_saves_never_leaves_a_broken_newest(tmp_path):
    """kill -9 a process that does nothing but save, at random moments."""
    newest = 0
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING, tmp_path, str(newest + 1)],
            stdout=subprocess.PIPE,
            text=True,
        )
        process.stdout.readline()
        time.sleep(0.05 + 0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().split()]
        process.wait()
        checkpoint, warnings = load_newest(tmp_path, NAME)
        assert warnings == []
        assert checkpoint.state["step"] >= max(said, default=newest + 1)
        assert (checkpoint.weights["a"] == checkpoint.state["step"]).all()
        newest = checkpoint.state["step"]


def test_problem_is_described(tmp_path):
    path = save(tmp_path, 1)
    assert find_problem(path) is None
    flip(path / "adapter.safetensors")
    assert "hash" in find_problem(path)
