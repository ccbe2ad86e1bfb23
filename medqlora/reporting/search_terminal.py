"""What a search says at its end: the table of its trials, the choice, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from medqlora.core.errors import RunError
from medqlora.reporting.numbers import interval, interval_points, number, p_value, percent, points


def tabulate(results: dict[str, Any]) -> Table:
    """Make the table of all trials; those of a sampled search stand in the order of their value."""
    trials = list(results["trials"])
    loss = results["objective"] == "eval_loss"
    if results["method"] == "sample":
        sign = 1 if loss else -1
        trials.sort(key=lambda one: (one["value"] is None, sign * (one["value"] or 0)))
    keys = list(trials[0]["parameters"])
    tails = [key.rpartition(".")[2] for key in keys]
    accuracies = any(trial.get("accuracy") is not None for trial in trials)
    several = len(results["seeds"]) > 1
    table = Table(
        title=f"trials, compared with trial {results['default']}, the recipe itself",
        title_justify="left",
    )
    table.add_column("trial", justify="right")
    for key, tail in zip(keys, tails, strict=True):
        table.add_column(key if tails.count(tail) > 1 else tail)
    for name in (
        *(["eval_loss"] if loss else []),
        *(["accuracy", "95 % interval"] if accuracies else []),
        *(["over seeds"] if several else []),
        *(["difference", "95 % interval", "McNemar p", "Holm p"] if accuracies else []),
    ):
        table.add_column(name, justify="right")
    table.add_column("state")
    for trial in trials:
        cells = [str(trial["number"]), *map(show_value, trial["parameters"].values())]
        cells += [number(trial["value"])] if loss else []
        cells += show_accuracy(trial) if accuracies else []
        cells += [show_spread(trial, loss)] if several else []
        cells += show_comparison(trial) if accuracies else []
        chosen = trial["number"] == results["best"]
        cells.append("chosen" if chosen else describe_state(trial).partition(":")[0])
        table.add_row(*cells, style="bold" if chosen else None)
    return table


def show_value(value: Any) -> str:
    """Show the value of a key."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def show_accuracy(trial: dict[str, Any]) -> list[str]:
    """Show an accuracy and its interval."""
    if trial.get("accuracy") is None:
        return ["–", ""]
    return [percent(trial["accuracy"]), interval(trial["accuracy_ci95"])]


def show_spread(trial: dict[str, Any], loss: bool) -> str:
    """Show the lowest and the highest value of the seeds."""
    values = trial["value_per_seed"]
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{number(low)} – {number(high)}" if loss else interval((low, high))


def show_comparison(trial: dict[str, Any]) -> list[str]:
    """Show the difference from the default, its interval, and both p-values."""
    comparison = trial.get("comparison")
    if not comparison:
        return [""] * 4
    return [
        points(comparison["difference"]),
        interval_points(comparison["difference_ci95"]),
        p_value(comparison["mcnemar_p"]),
        p_value(comparison["holm_p"]),
    ]


def describe_state(trial: dict[str, Any]) -> str:
    """Say how a trial ended, with its value or the line of its failure behind a colon."""
    if trial["state"] == "pruned":
        return f"pruned at step {trial['pruned_step']}"
    if trial["state"] == "complete":
        return f"complete: {show_value(trial['value'])}"
    return f"failed: {trial['failure']}" if trial["state"] == "failed" else trial["state"]


def describe_results(results: dict[str, Any]) -> list[Text]:
    """Say what the table does not: failures, holes, importances, and what the choice is worth."""
    lines = []
    for trial in results["trials"]:
        if trial["failure"] is not None:
            lines.append(Text(f"trial {trial['number']} failed: {trial['failure']}", "yellow"))
        gone = trial["state"] == "complete" and "accuracy" in trial and trial["accuracy"] is None
        if gone:
            lines.append(
                Text(
                    f"trial {trial['number']}: its predictions are no longer in {trial['folder']},"
                    " so it has no interval and no test",
                    "yellow",
                )
            )
    for hole in results["holes"]:
        values = ", ".join(f"{key} {show_value(one)}" for key, one in hole["parameters"].items())
        lines.append(Text(f"no trial with {values}: {hole['reason']}", "yellow"))
    if results["importances"]:
        shares = [f"{key} {share:.2f}" for key, share in results["importances"].items()]
        lines.append(Text(f"importance by PED-ANOVA: {', '.join(shares)}"))
    if results["shared_with_test"]:
        lines.append(
            Text(
                f"{results['shared_with_test']} questions of data.test stand in the data of the"
                " choice too",
                "yellow",
            )
        )
    running = [str(one["number"]) for one in results["trials"] if one["state"] == "running"]
    if running:
        named = ", ".join(running)
        lines.append(Text(f"not finished: trial {named}; the choice may change with it", "yellow"))
    if results["best"] is not None:
        lines.append(Text(describe_choice(results)))
    return lines


def describe_choice(results: dict[str, Any]) -> str:
    """Say what was chosen, by which data, and what confirms it."""
    used = "data.eval" if results["objective"] == "eval_loss" else "the validation questions"
    text = f"trial {results['best']} is chosen by {results['objective']} on {used}"
    found = results["confirmed"]
    if found is None:
        return (
            f"{text}, which makes that figure too good: confirm the choice on other questions."
            " No trial has read the recipe's data.test."
        )
    accuracies = [
        f"{name} {percent(found[name]['accuracy'])} ({interval(found[name]['accuracy_ci95'])})"
        for name in ("default", "best")
        if name in found
    ]
    tested = ""
    if "comparison" in found:
        comparison = found["comparison"]
        tested = (
            f"; difference {points(comparison['difference'])}"
            f" ({interval_points(comparison['difference_ci95'])}), McNemar p"
            f" {p_value(comparison['mcnemar_p'])}"
        )
    return (
        f"{text}. On the {found['default']['n']:,} questions of data.test, trained anew and scored"
        f" after the choice: {', '.join(accuracies)}{tested}"
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the trials: accuracy with its interval, or the evaluation loss; a dot for each seed.

    Args:
        results: The content of search.json.
        path: The picture to write.

    Raises:
        RunError: No trial is complete, or the disk refuses.
    """
    import matplotlib

    # Agg needs no display.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [trial for trial in results["trials"] if trial["state"] == "complete"][::-1]
    if not done:
        raise RunError(f"--plot {path}: no trial is complete; there is nothing to draw")
    accuracies = all(trial.get("accuracy") is not None for trial in done)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.35 * len(done)), layout="constrained")
    for height, trial in enumerate(done):
        seeds = trial["accuracy_per_seed"] if accuracies else trial["value_per_seed"]
        middle = trial["accuracy"] if accuracies else trial["value"]
        axes.plot(seeds, [height] * len(seeds), "o", color="grey", markersize=3)
        color = "C1" if trial["number"] == results["best"] else "C0"
        if accuracies:
            low, high = trial["accuracy_ci95"]
            axes.plot([low, high], [height, height], color=color, linewidth=2)
        axes.plot([middle], [height], "D", color=color, markersize=5)
        if trial["number"] == results["default"]:
            axes.axvline(middle, color="grey", linestyle="--", linewidth=0.8)
    names = [", ".join(map(show_value, trial["parameters"].values())) for trial in done]
    labels = [f"{name}  ({trial['number']})" for name, trial in zip(names, done, strict=True)]
    axes.margins(0.05, 0.15)
    axes.set_yticks(range(len(done)), labels)
    axes.set_xlabel("accuracy on the validation questions" if accuracies else "evaluation loss")
    axes.set_title(", ".join(done[0]["parameters"]), loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise RunError(f"--plot {path} cannot be written: {error.strerror or error}") from None
    plt.close(figure)
