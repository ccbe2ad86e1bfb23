"""The results of a search: search.json, and the chosen configuration."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from medqlora.core.config_loading import dump_config
from medqlora.core.files import write_atomic
from medqlora.evaluation.comparison import align, compare_paired
from medqlora.evaluation.predictions import Predictions, read_predictions
from medqlora.evaluation.statistics import adjust_holm, mean_interval
from medqlora.training.search.space import find_values
from medqlora.training.search.study import Study, measure_importances
from medqlora.training.search.trials import list_runs

TUNED = Path("predictions") / "tuned.jsonl"
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


def collect_results(study: Study, folder: Path) -> dict[str, Any]:
    """Return the content of search.json; docs/outputs.md explains its keys.

    Args:
        study: The storage.
        folder: The folder of the search.

    Raises:
        UserError: The storage or a predictions file cannot be read.
    """
    search = study.search
    trials = study.trials()
    described = [describe_trial(study, trial) for trial in trials]
    # The first trial is the recipe itself; where it failed, it may have been tried again.
    themselves = [trial.number for trial in trials if trial.params == search.default]
    complete = [n for n in themselves if described[n]["state"] == "complete"]
    default = (complete or themselves or [0])[0]
    if search.file.validation:
        add_accuracies(study, folder, described, default)
    done = [trial for trial in described if trial["state"] == "complete"]
    sign = 1 if search.file.objective == "eval_loss" else -1
    best = min(done, key=lambda trial: sign * trial["value"], default=None)
    return {
        "objective": search.file.objective,
        "method": search.file.method,
        "seeds": search.file.seeds,
        "optuna": importlib.metadata.version("optuna"),
        "trials": described,
        "holes": search.holes if search.file.method == "grid" else [],
        "default": default,
        "best": None if best is None else best["number"],
        "importances": measure_importances(study),
        "shared_with_test": search.shared,
        "confirmed": None,
    }


def describe_trial(study: Study, trial: FrozenTrial) -> dict[str, Any]:
    """Return the entry of one trial in search.json, without accuracies."""
    facts = trial.user_attrs
    return {
        "number": trial.number,
        "parameters": find_values(study.search.space, trial.params),
        "state": STATES[trial.state],
        "value": trial.value if trial.state == TrialState.COMPLETE else None,
        "value_per_seed": facts.get("value_per_seed"),
        "eval_losses": {str(step): loss for step, loss in trial.intermediate_values.items()},
        "pruned_step": facts.get("pruned_step"),
        "failure": facts.get("failure"),
        "seconds": facts.get("seconds"),
        "folder": facts.get("folder"),
    }


def add_accuracies(
    study: Study, folder: Path, described: list[dict[str, Any]], default: int
) -> None:
    """Add accuracies on the validation questions, and paired tests against the recipe itself.

    A question's share of right answers over the seeds is one value, so the interval does not grow
    narrower by asking it again. The paired test is of the first seed's models. Holm's correction
    counts all trials that are compared. A trial whose predictions are gone has neither.
    """
    first_seeds: dict[int, Predictions] = {}
    for trial in described:
        trial |= dict.fromkeys(("accuracy", "accuracy_ci95", "accuracy_per_seed", "comparison"))
        files = [run / TUNED for run in list_runs(study, folder, trial["number"])]
        if trial["state"] != "complete" or not all(file.is_file() for file in files):
            continue
        rows = [read_predictions(file) for file in files]
        if rows[0].kind != "choice":  # Open questions have no accuracy.
            continue
        # Rows of other seeds are the same questions, maybe in another order.
        places = [align(rows[0], other, any_prompt=True)[1] for other in rows]
        right = np.array(
            [other.right[at] for other, at in zip(rows, places, strict=True)], float
        )  # [seeds, questions]
        trial["accuracy"] = float(right.mean())
        trial["accuracy_ci95"] = list(mean_interval(right.mean(0)))
        trial["accuracy_per_seed"] = [float(share) for share in right.mean(1)]
        first_seeds[trial["number"]] = rows[0]
    reference = first_seeds.pop(default, None)
    for place, rows in first_seeds.items():
        if reference is not None:
            first, second = align(reference, rows, any_prompt=True)
            described[place]["comparison"] = compare_paired(
                reference.right[first], rows.right[second]
            )
    compared = [trial["comparison"] for trial in described if trial["comparison"]]
    corrected = adjust_holm([comparison["mcnemar_p"] for comparison in compared])
    for comparison, p in zip(compared, corrected, strict=True):
        comparison["holm_p"] = p


def compare_confirmed(runs: dict[str, Path]) -> dict[str, Any]:
    """Return the accuracies of the confirmed configurations on the test, and their comparison.

    Args:
        runs: The run folders of `default` and, where it is another one, of `best`.
    """
    rows = {name: read_predictions(run / TUNED) for name, run in runs.items()}
    found: dict[str, Any] = {
        name: {
            "folder": str(runs[name]),
            "n": len(one),
            "accuracy": float(one.right.mean()),
            "accuracy_ci95": list(mean_interval(one.right.astype(float))),
        }
        for name, one in rows.items()
    }
    if "best" in rows:
        first, second = align(rows["default"], rows["best"], any_prompt=True)
        found["comparison"] = compare_paired(
            rows["default"].right[first], rows["best"].right[second]
        )
    return found


def write_best(study: Study, results: dict[str, Any], path: Path) -> None:
    """Write the chosen configuration as a file for recipes/sft_qlora.py --config.

    Raises:
        RunError: The disk refuses.
    """
    trial = study.trials()[results["best"]]
    header = (
        f"# A search chose trial {trial.number} of {len(results['trials'])} by"
        f" {results['objective']}.\n"
    )
    write_atomic(path, header + dump_config(study.search.config(trial.params)))
