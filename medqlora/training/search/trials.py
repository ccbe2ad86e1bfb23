"""One trial of a search: trainings of the recipe in processes of their own, one for each seed."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from medqlora.core.config import Config
from medqlora.core.config_loading import dump_config
from medqlora.core.errors import RunError
from medqlora.core.files import read_lines, write_atomic
from medqlora.core.reading import read_object
from medqlora.core.run_folder import LOG
from medqlora.core.run_lock import hold_run
from medqlora.training.search.study import (
    Study,
    add_trial,
    finish_trial,
    next_point,
    report_losses,
)

RECIPE = Path(__file__).parents[3] / "recipes" / "sft_qlora.py"
POLL = 0.5  # seconds between two looks at a training
# Seconds in which a training whose search was killed writes its checkpoint and ends.
ENDING = 600.0
CLAIM_PATIENCE = 60.0  # seconds in which another process of the search takes its next trial
PR_SET_PDEATHSIG = 1  # from Linux' prctl.h
SIGNALLED = tuple(128 + int(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
# Only Linux has prctl. Elsewhere a training goes on after its search was killed, and the next
# search waits for it.
PRCTL = getattr(ctypes.CDLL(None), "prctl", None)


class StoppedError(Exception):
    """A signal ended the search; the code is that of the program."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Launcher:
    """How trainings are started.

    Args:
        accelerate_config: The file for accelerate launch; None starts one plain process.
        caught: The signals that have come so far, as catch_signals collects them.
    """

    accelerate_config: Path | None = None
    caught: list[int] = field(default_factory=list)

    def train(
        self, config: Path, run: Path, seed: int, ends: Callable[[], bool] = lambda: False
    ) -> str | None:
        """Train, or continue a training, until it ends.

        Args:
            config: The YAML file.
            run: The run folder. Its output is appended to the file of this name with .log.
            seed: The seed of training.
            ends: Is asked again and again, and ends the training where it is true.

        Returns:
            None where the run is complete or `ends` has ended it, and else why it failed.

        Raises:
            StoppedError: A signal came; the training has written its checkpoint.
            RunError: Another training holds the run folder.
        """
        if (run / "metrics.json").is_file():  # The recipe writes it last.
            return None
        self.wait_for(run)
        log = run.with_suffix(".log")
        with log.open("ab") as output:
            process = subprocess.Popen(
                self.command(config, run, seed),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # Ctrl-C in a terminal reaches the search alone, which passes it on once.
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
            ended = self.watch(process, ends)
        if self.caught or process.returncode in SIGNALLED:
            if not ended:
                raise StoppedError(128 + self.caught[0] if self.caught else process.returncode)
            return None
        if process.returncode == 0 or ended:
            return None
        return f"{describe_end(process.returncode, log)} ({log})"

    def watch(self, process: subprocess.Popen, ends: Callable[[], bool]) -> bool:
        """Wait for the end of a training, and return whether `ends` has ended it."""
        try:
            while process.poll() is None:
                if self.caught:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait()
                    return False
                if ends():
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait()
                    return True
                time.sleep(POLL)
        except BaseException:
            # An error of the storage must leave no training behind.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
            raise
        return False

    def command(self, config: Path, run: Path, seed: int) -> list[str]:
        """Return the command of a training. --resume begins a run that is not there."""
        launcher = [sys.executable]
        if self.accelerate_config is not None:
            launcher += ["-m", "accelerate.commands.launch"]
            launcher += ["--config_file", str(self.accelerate_config)]
        flags = ["--config", str(config), "--output_dir", str(run), "--resume"]
        return [*launcher, str(RECIPE), *flags, f"--training.seed={seed}"]

    def wait_for(self, run: Path) -> None:
        """Wait for a training in the run folder whose search was killed."""
        deadline = time.monotonic() + ENDING
        while True:
            try:
                with hold_run(run, patience=1.0):
                    return
            except RunError:
                if self.caught:
                    raise StoppedError(128 + self.caught[0]) from None
                if time.monotonic() > deadline:
                    raise


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this new process when the search dies in any way."""
    if PRCTL is not None:
        PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


def describe_end(code: int, log: Path) -> str:
    """Return the line that says why a training failed."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}; a system that has no memory left sends SIGKILL"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    # accelerate launch adds a traceback of its own below the line of the recipe.
    if "subprocess.CalledProcessError" in "".join(lines[-3:]) or "ChildFailedError" in "".join(
        lines[-30:]
    ):
        cuts = [number for number, line in enumerate(lines) if line.startswith("Traceback")]
        lines = lines[: cuts[-1]] if cuts else lines
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:300] if said else f"exit code {code} without a word"


def claim_trial(
    study: Study, folder: Path, held: ExitStack, again: list[dict[str, Any]]
) -> FrozenTrial | None:
    """Return the next trial for this process: one that was left running, or a new one.

    Args:
        study: The storage.
        folder: The folder of the search. Several processes may share it.
        held: Gets the lock of the trial's folder.
        again: Points of failed trials that are tried again first; what is taken is removed.

    Returns:
        None where no trial is left.

    Raises:
        RunError: The storage or a folder cannot be written.
    """
    with hold_run(folder, CLAIM_PATIENCE):
        trials = study.trials()
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                try:
                    held.enter_context(hold_run(trial_folder(folder, trial.number)))
                except RunError:  # Another process runs it.
                    continue
                return trial
        tried = [trial.params for trial in trials if trial.state != TrialState.FAIL]
        while again and again[0] in tried:  # Another process has taken it.
            del again[0]
        point = again.pop(0) if again else next_point(study.search, trials)
        if point is None:
            return None
        trial = add_trial(study, point)
        held.enter_context(hold_run(trial_folder(folder, trial.number)))
        return trial


def list_failed(study: Study) -> list[dict[str, Any]]:
    """Return the points that have failed trials and no other."""
    trials = study.trials()
    other = [trial.params for trial in trials if trial.state != TrialState.FAIL]
    points: list[dict[str, Any]] = []
    for trial in trials:
        if trial.params not in other and trial.params not in points:
            points.append(trial.params)
    return points


def trial_folder(folder: Path, number: int) -> Path:
    """Return the folder of a trial: its config.yaml and a run folder for each seed."""
    return folder / "trials" / f"{number:03d}"


def list_runs(study: Study, folder: Path, number: int) -> list[Path]:
    """Return the run folders of a trial, in the order of the seeds."""
    return [trial_folder(folder, number) / f"seed-{seed}" for seed in study.search.file.seeds]


def run_trial(study: Study, trial: FrozenTrial, folder: Path, launcher: Launcher) -> None:
    """Run a trial to its end, and write the end into the storage.

    Raises:
        StoppedError: A signal came; the trial goes on at the next start.
        RunError: The storage or a file cannot be read or written.
    """
    began = time.monotonic()
    place = trial_folder(folder, trial.number)
    config = place / "config.yaml"
    write_config(config, study.search.trial_config(trial.params))
    first, *_ = runs = list_runs(study, folder, trial.number)
    pruned: list[int] = []

    def judge() -> bool:
        rows = read_lines(first / LOG)
        losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
        step = report_losses(study, trial, losses)
        pruned.extend([] if step is None else [step])
        return step is not None

    facts: dict[str, Any] = {"folder": str(place)}
    values = []
    for run, seed in zip(runs, study.search.file.seeds, strict=True):
        watched = run == first
        failure = launcher.train(config, run, seed, judge if watched else lambda: False)
        # The last losses may have come after the last look.
        if watched and not pruned and judge():
            failure = None
        facts["seconds"] = round(time.monotonic() - began, 1)
        if failure is not None:
            return finish_trial(study, trial, None, facts | {"failure": failure})
        if pruned:
            return finish_trial(study, trial, None, facts | {"pruned_step": pruned[0]})
        metrics = read_object(run / "metrics.json", str(run))
        value = metrics.get(study.search.file.objective)
        # Open questions, for example, have no accuracy.
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            failure = f"{run / 'metrics.json'} has no {study.search.file.objective}"
            return finish_trial(study, trial, None, facts | {"failure": failure})
        values.append(value)
    facts["value_per_seed"] = values
    return finish_trial(study, trial, statistics.fmean(values), facts)


def confirm(
    study: Study, folder: Path, points: dict[str, dict[str, Any]], launcher: Launcher
) -> dict[str, Path]:
    """Train configurations with the recipe's own data.test, and return their run folders.

    The trials did not know the test, so training rows that stand in it were not removed there.
    Therefore nothing of a trial is used.

    Args:
        study: The storage.
        folder: The folder of the search.
        points: The points to train, by the names of their folders.
        launcher: How trainings are started.

    Raises:
        RunError: A training failed.
        StoppedError: A signal came.
    """
    runs = {}
    for name, point in points.items():
        config = folder / "confirm" / f"{name}.yaml"
        write_config(config, study.search.config(point))
        runs[name] = folder / "confirm" / name
        failure = launcher.train(config, runs[name], study.search.file.seeds[0])
        if failure is not None:
            raise RunError(f"confirming the {name} configuration failed: {failure}")
    return runs


def write_config(path: Path, config: Config) -> None:
    """Write a configuration into a folder that is made where it is missing.

    Raises:
        RunError: The folder cannot be made, or the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, dump_config(config))
