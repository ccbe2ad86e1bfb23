"""A base, its quantized form, the tuned and the merged model side by side: comparisons and tables.

bench/before_after.py measures what stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medqlora.core.errors import UserError
from medqlora.evaluation.comparison import align, compare_paired
from medqlora.evaluation.metrics import group, score_predictions
from medqlora.evaluation.predictions import Predictions, read_rows
from medqlora.evaluation.statistics import adjust_holm
from medqlora.reporting.numbers import p_value

MODELS = ("base_16_bit", "base_quantized", "tuned", "merged")
# Each model is compared with the one before it: quantization, training and merging change it.
PAIRS = (("base_16_bit", "base_quantized"), ("base_quantized", "tuned"), ("tuned", "merged"))
# How the figures of each column are measured.
METHOD = {
    "on disk": (
        "Bytes of the files that hold weights. The base is quantized while it is loaded, so a"
        " quantized base has the files of the base in 16 bits; the adapter's file is added."
    ),
    "in memory": (
        "Bytes of all weights, buffers and quantization constants of the loaded model, counted in a"
        " fresh process."
    ),
    "accuracy": (
        "Answers of eval/predict.py by the letters' probabilities, all models with the prompts of"
        " the training; Wilson's 95 % interval. Differences are paired, with the exact McNemar test"
        " and Holm's correction for the number of comparisons."
    ),
    "one question": (
        "Time of one letter, which is time to first token and end to end at once: every question"
        " alone, after two that do not count, as bench/latency.py --scoring measures it."
    ),
    "questions/s": "As many other questions in one batch, in the same process.",
    "peak memory, whole run": (
        "metrics.json of the run: the highest memory since training began, less the memory before"
        " the model was loaded. On a GPU it is that of tensors; otherwise it is resident memory,"
        " which also holds libraries and what the C library keeps."
    ),
    "peak memory, one step": (
        "bench/memory.py --measure, for a run on a CPU: resident memory of real steps in a fresh"
        " process, above what it held before."
    ),
    "peak memory, predicted": (
        "Forecasts of tensors alone, of the run's own micro-batch and recomputation. That of full"
        " fine-tuning is the same step with training.method full and model.quantization none, on"
        " one process."
    ),
}


class BeforeAfterError(UserError):
    """A run that cannot be compared with its base."""


def summarise(rows: Predictions) -> dict[str, Any]:
    """Return the scores of one model that the tables show."""
    scores = score_predictions(rows)
    keys = ("n", "accuracy", "accuracy_ci95", "unparsed", "letter_mass")
    return {key: scores[key] for key in keys}


def compare_models(predictions: Mapping[str, Predictions]) -> dict[str, dict[str, Any]]:
    """Compare each model with the one before it, question by question.

    Args:
        predictions: the answers of each of MODELS to the same questions.

    Returns:
        By the names of two models what compare_paired says, and `holm_p`, the p-value with Holm's
        correction for the number of comparisons.

    Raises:
        PredictionError: the models were asked other questions, or with other prompts.
    """
    compared = {}
    for before, after in PAIRS:
        a, b = predictions[before], predictions[after]
        first, second = align(a, b)
        compared[f"{after}_against_{before}"] = compare_paired(a.right[first], b.right[second])
    return correct(compared)


def correct(compared: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add the p-values with Holm's correction to several comparisons."""
    adjusted = adjust_holm([result["mcnemar_p"] for result in compared.values()])
    return {
        name: result | {"holm_p": p}
        for (name, result), p in zip(compared.items(), adjusted, strict=True)
    }


def name_strata(rows: Predictions, column: str) -> dict[str, str]:
    """Return each question's value of a column by its id, "none" where it has none.

    Raises:
        BeforeAfterError: no question has a value.
    """
    values = {}
    # Columns of the data file stand under a key of their own.
    for row in read_rows(rows.path, rows.offsets):
        values[row["id"]] = (row.get("columns") or {}).get(column, row.get(column))
    if not any(value is not None for value in values.values()):
        raise BeforeAfterError(
            f"--by {column}: no question has a value of it; name another column, or leave it out"
        )
    return {id: "none" if value is None else str(value) for id, value in values.items()}


def compare_strata(
    predictions: Mapping[str, Predictions], names: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Score every model in each stratum, and compare the tuned model with its base there.

    Args:
        predictions: the answers of each of MODELS to the same questions.
        names: each question's stratum by its id.

    Returns:
        By stratum: `models`, the number, accuracy and interval of each model, and
        `tuned_against_base_quantized`, with `holm_p` for the number of strata.
    """
    scores = {
        name: group([names[id] for id in rows.ids], rows.right)
        for name, rows in predictions.items()
    }
    base, tuned = predictions["base_quantized"], predictions["tuned"]
    first, second = align(base, tuned)
    compared = {}
    for stratum in sorted(set(names.values())):
        inside = [names[base.ids[number]] == stratum for number in first]
        compared[stratum] = compare_paired(base.right[first][inside], tuned.right[second][inside])
    return {
        stratum: {
            "models": {name: scores[name][stratum] for name in scores},
            "tuned_against_base_quantized": result,
        }
        for stratum, result in correct(compared).items()
    }


# ---- tables --------------------------------------------------------------------------------------

# The title, the head and the rows of a table.
Rows = tuple[str, list[str], list[list[str]]]


def list_tables(figures: Mapping[str, Any], by: str | None) -> list[Rows]:
    """Return all tables of what bench/before_after.py measured.

    Args:
        figures: `models`, `comparisons`, `training` and, with `by`, `strata`, as docs/outputs.md
            describes them.
        by: the column of the strata, or None.
    """
    tables = [
        tabulate_models(figures["models"]),
        (
            "each model against the one before it, paired",
            ["", "difference", "95 % interval", "McNemar p, Holm"],
            [describe_pair(name, result) for name, result in figures["comparisons"].items()],
        ),
        tabulate_training(figures["training"]),
    ]
    if by is not None:
        tables.append(tabulate_strata(figures["strata"], by))
    return tables


def tabulate_models(models: Mapping[str, Mapping[str, Any]]) -> Rows:
    rows = []
    for name, model in models.items():
        times = model["scoring"]["e2el_ms"]
        row = [f"{spell(name)} ({model['weights']})"]
        row += [mib(model["disk_bytes"]), mib(model["memory_bytes"]), *describe_accuracy(model)]
        row.append(f"{times['p50']:,.1f} / {times['p95']:,.1f} ms")
        rows.append([*row, f"{model['scoring']['questions_per_second']:,.1f}"])
    head = ["", "on disk", "in memory", "accuracy", "95 % interval", "one question, p50 / p95"]
    title = f"before and after, {models['tuned']['n']:,} questions"
    return title, [*head, "questions/s"], rows


def tabulate_training(training: Mapping[str, Any]) -> Rows:
    share = [f"{training['trainable_parameters']:,}", f"{training['trainable_share']:.2%}"]
    share.append(mib(training["adapter_bytes"]))
    everything = [f"{training['base_parameters']:,}", "100.00%", ""]
    rows = [["this run, whole run", mib(training["measured_peak_bytes"]), *share]]
    if training["measured_step_bytes"] is not None:
        rows.append(["this run, one step", mib(training["measured_step_bytes"]), *share])
    rows.append(["this run, predicted", mib(training["predicted_peak_bytes"]), *share])
    full = mib(training["full_tuning_predicted_bytes"])
    rows.append(["full fine-tuning, predicted", full, *everything])
    return "training", ["", "peak memory", "trained", "share", "adapter"], rows


def tabulate_strata(strata: Mapping[str, Mapping[str, Any]], by: str) -> Rows:
    rows = []
    for stratum, part in strata.items():
        row = [stratum, f"{part['models']['tuned']['n']:,}"]
        for model in part["models"].values():
            accuracy, interval = describe_accuracy(model)
            row.append(f"{accuracy} ({interval})")
        rows.append(row + describe_pair("", part["tuned_against_base_quantized"])[1:])
    head = [by, "n", *map(spell, MODELS), "tuned − base", "95 % interval", "McNemar p, Holm"]
    return f"accuracy by {by}", head, rows


def describe_pair(name: str, result: Mapping[str, Any]) -> list[str]:
    low, high = result["difference_ci95"]
    interval = f"{low:+.1%} to {high:+.1%}"
    return [spell(name), f"{result['difference']:+.1%}", interval, p_value(result["holm_p"])]


def describe_accuracy(scores: Mapping[str, Any]) -> tuple[str, str]:
    low, high = scores["accuracy_ci95"]
    return f"{scores['accuracy']:.1%}", f"{low:.1%}–{high:.1%}"


def mib(size: float | None) -> str:
    """Return bytes in MiB; what is not known is an empty text."""
    return "" if size is None else f"{size / 2**20:,.1f} MiB"


def spell(name: str) -> str:
    return name.replace("_", " ")
