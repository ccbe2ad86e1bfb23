"""The trials of a search in Optuna's storage, an SQLite file.

What is drawn next is a function of the finished trials, the seed and the number of the trial. A
search that was killed therefore draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from medqlora.core.errors import RunError
from medqlora.core.run_folder import list_differences
from medqlora.training.search.definition import Search
from medqlora.training.search.space import (
    Choices,
    Multiple,
    Range,
    Space,
    find_problem,
    find_values,
)

STORAGE = "search.db"
NAME = "search"
DEFINITION = "definition"  # The study's attribute with what Search.describe returns.
# A space of choices alone may be used up before; then nearly every draw repeats a trial.
MOST_DRAWS = 1_000
BUSY_SECONDS = 60.0  # Another process of the same search may be writing.
LEAST_FOR_IMPORTANCES = 10  # PED-ANOVA compares the best tenth of the trials with all of them.


@dataclass(frozen=True)
class Study:
    """An open storage, and the search that it belongs to."""

    path: Path
    search: Search
    storage: RDBStorage
    study: optuna.Study

    def trials(self) -> list[FrozenTrial]:
        """Return all trials, in the order of their numbers."""
        with told(self.path):
            return self.study.get_trials(deepcopy=True)


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn an error of the storage into one line.

    Raises:
        RunError: The storage cannot be read or written.
    """
    try:
        yield
    except (StorageInternalError, SQLAlchemyError, sqlite3.Error, RuntimeError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(getattr(cause, "orig", cause)).split())[:200]
        raise RunError(
            f"{path}: the storage of the search cannot be used ({reason}); free space or restore"
            " the file, and start again, or choose another --output_dir"
        ) from None


def open_study(folder: Path, search: Search) -> Study:
    """Open the storage of a search, or make it.

    Raises:
        RunError: The storage is damaged, or belongs to another search.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = folder / STORAGE
    # A path may hold characters that mean something in a URL, so the URL has none.
    connect = {"creator": lambda: sqlite3.connect(path, timeout=BUSY_SECONDS)}
    with told(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storage = RDBStorage("sqlite://", engine_kwargs=connect)
        direction = "minimize" if search.file.objective == "eval_loss" else "maximize"
        study = optuna.create_study(
            storage=storage,
            study_name=NAME,
            direction=direction,
            load_if_exists=True,
        )
        now = json.loads(json.dumps(search.describe()))
        before = study.user_attrs.get(DEFINITION)
        if before is None:
            study.set_user_attr(DEFINITION, now)
    for key, old, new in [] if before is None else list_differences(before, now):
        raise RunError(
            f"{path}: {key} was {old!r} when the search began, now {new!r}; its trials would not be"
            " comparable; give the same value or another --output_dir"
        )
    return Study(path, search, storage, study)


def make_distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return Optuna's distribution for each key of a space."""
    made: dict[str, BaseDistribution] = {}
    for key, part in space.items():
        if isinstance(part, Choices):
            made[key] = CategoricalDistribution(part.labels)
        elif isinstance(part, Multiple):
            made[key] = CategoricalDistribution(part.factors)
        elif isinstance(part, Range) and part.whole:
            step = 1 if part.step is None else int(part.step)
            made[key] = IntDistribution(int(part.low), int(part.high), log=part.log, step=step)
        else:
            made[key] = FloatDistribution(part.low, part.high, log=part.log, step=part.step)
    return made


def next_point(search: Search, trials: list[FrozenTrial]) -> dict[str, Any] | None:
    """Return the point of the next trial, or None where there is none.

    Args:
        search: The search.
        trials: All trials so far. Points of failed ones are not taken again.
    """
    taken = [dict(trial.params) for trial in trials]
    if search.file.method == "grid":
        return next((point for point in search.points if point not in taken), None)
    if len(trials) >= search.file.trials:
        return None
    # The first trial is the recipe itself: every other is compared with it.
    if not trials:
        return search.default
    return draw_point(search, trials, taken)


def draw_point(
    search: Search, trials: list[FrozenTrial], taken: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Draw a new point that the configuration takes; None where no new one is found.

    TPE (Bergstra et al., NeurIPS 2011) sees the finished trials. It begins with random draws.
    """
    seed = f"{search.file.seed} {len(trials)}".encode()
    number = int.from_bytes(hashlib.sha256(seed).digest()[:4], "big")
    # The draw is made in memory, so that a kill leaves either no trial or a whole one.
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=number),
        direction="minimize" if search.file.objective == "eval_loss" else "maximize",
    )
    study.add_trials([trial for trial in trials if trial.state.is_finished()])
    distributions = make_distributions(search.space)
    for _ in range(MOST_DRAWS):
        point = dict(study.ask(distributions).params)
        values = find_values(search.space, point)
        if point not in taken and find_problem(search.tree, values) is None:
            return point
    return None


def add_trial(study: Study, point: Mapping[str, Any]) -> FrozenTrial:
    """Write a new running trial into the storage in one transaction, and return it."""
    trial = create_trial(
        state=TrialState.RUNNING,
        params=dict(point),
        distributions=make_distributions(study.search.space),
    )
    with told(study.path):
        study.study.add_trial(trial)
        # Only the holder of the folder's lock adds trials, so the last one is the new one.
        return study.study.get_trials(deepcopy=True)[-1]


def report_losses(study: Study, trial: FrozenTrial, losses: Mapping[int, float]) -> int | None:
    """Write new evaluation losses of a running trial, and return the step that prunes it, if any.

    The losses are judged one after the other, however many are new. Where a trial is pruned does
    not depend on how often somebody looks.

    Args:
        study: The storage.
        trial: The trial; its number and id alone are used.
        losses: Step -> loss, of the whole run so far.
    """
    # It compares with finished trials at the same step, and writes nothing.
    pruner = optuna.pruners.MedianPruner()
    with told(study.path):
        known = study.storage.get_trial(trial._trial_id).intermediate_values
        for step in sorted(losses):
            if step not in known:
                study.storage.set_trial_intermediate_value(trial._trial_id, step, losses[step])
            now = study.storage.get_trial(trial._trial_id)
            # A search that was killed between the two lines above judges its last loss again.
            judged = study.search.file.pruning == "median" and step == now.last_step
            if judged and pruner.prune(study.study, now):
                return step
    return None


def finish_trial(
    study: Study, trial: FrozenTrial, value: float | None, facts: Mapping[str, Any]
) -> None:
    """Write the end of a trial.

    Args:
        study: The storage.
        trial: The trial.
        value: What the objective is; None for a trial that was pruned or failed.
        facts: What search.json also says of it. With `failure` the trial failed.
    """
    state = TrialState.COMPLETE if value is not None else TrialState.PRUNED
    if "failure" in facts:
        state = TrialState.FAIL
    with told(study.path):
        # The state comes last: a kill before it leaves a running trial, which ends again.
        for key, fact in facts.items():
            study.storage.set_trial_user_attr(trial._trial_id, key, fact)
        study.study.tell(trial.number, value, state=state)


def measure_importances(study: Study) -> dict[str, float] | None:
    """Return how much each key mattered by PED-ANOVA (Watanabe et al., IJCAI 2023), summing to 1.

    It needs no further package, unlike Optuna's fANOVA. None stands for too few finished trials.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    done = [trial for trial in study.trials() if trial.state == TrialState.COMPLETE]
    varied = len({json.dumps(trial.params, sort_keys=True) for trial in done})
    if study.search.file.method == "grid" or varied < LEAST_FOR_IMPORTANCES:
        return None
    with told(study.path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_param_importances(study.study, evaluator=PedAnovaImportanceEvaluator())
    return {key: float(share) for key, share in found.items()}
