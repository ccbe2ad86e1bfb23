"""The output of a training on the terminal while it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from medqlora.batches.budgets import describe_batch
from medqlora.core.files import append_line
from medqlora.core.run_folder import LOG
from medqlora.evaluation.comparison import compare_paired, compare_predictions, find_doubt
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.predictions import Predictions, collect_rows
from medqlora.model.agreement import Agreement
from medqlora.reporting.numbers import p_text
from medqlora.reporting.open_tables import describe_differences, describe_method, tabulate_means
from medqlora.reporting.subjects import fold_small, merge_accuracies
from medqlora.training.memory.tracker import GIB
from medqlora.training.methods import describe_trained
from medqlora.training.optimizers import count_warmup, learning_rate
from medqlora.training.planning import Decision, Planned
from medqlora.training.session import Built, Loaded
from medqlora.training.setup import Setup
from medqlora.training.strategies.gradient_check import GradientCheck


class Display(AbstractContextManager):
    """The progress bar, the log file and the experiment tracker of one training.

    Every rank has such an object, but only that of rank 0 writes anything.
    """

    def __init__(self, console: Console, setup: Setup, planned: Planned, done: int):
        """Make the display.

        Args:
            done: Number of steps that the run had taken before this start.
        """
        self.console = console
        self.setup = setup
        self.steps = len(planned.plan)
        # Trackers take flat values, so each section of the configuration becomes a text.
        settings = planned.config.model_dump(mode="json")
        setup.accelerator.init_trackers(
            "medqlora", config={key: str(value) for key, value in settings.items()}
        )
        self.writes = setup.rank == 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        # A bar that is redrawn would fill the output file of a job; log_step prints lines there.
        hidden = not self.writes or not console.is_terminal
        self.progress = Progress(*columns, console=console, disable=hidden)
        self.task = self.progress.add_task("training", total=self.steps, completed=done, figures="")

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """Print a text above the progress bar."""
        if self.writes:
            # Only the bar's own console prints without breaking the bar.
            self.progress.console.print(text)

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to train_log.jsonl, and pass it to the experiment tracker."""
        if self.writes:
            append_line(self.setup.output_dir / LOG, row)
            self.setup.accelerator.log(row, step=row["step"])

    def log_step(self, row: dict[str, Any]) -> None:
        """Log a step and move the progress bar.

        Where the output is no terminal and has no bar, a line is printed ten times per training.
        """
        self.log(row)
        figures = (
            f"loss {row['loss']:.3f}  lr {row['lr']:.1e}  {row['tokens_per_second']:,.0f} tokens/s "
            f" {row['supervised_tokens']} supervised  {row['peak_memory_bytes'] / GIB:.2f} GiB"
        )
        done = row["step"]
        self.progress.update(self.task, completed=done, figures=figures)
        # A training of fewer than ten steps would divide by zero without the lower bound.
        due = done % max(1, self.steps // 10) == 0 or done == self.steps
        if self.writes and not self.console.is_terminal and due:
            self.console.print(f"step {done}/{self.steps}  {figures}")

    def log_evaluation(self, step: int, loss: float, best_step: int) -> None:
        """Log and print an evaluation: the mean loss per supervised token in nats, and its
        perplexity.

        Args:
            best_step: The step of the lowest evaluation loss so far.
        """
        measured = measure_perplexity(loss)
        self.log({"step": step, **measured})
        lowest = "the lowest so far" if best_step == step else f"lowest at step {best_step}"
        self.say(
            f"step {step}/{self.steps}  evaluation loss {loss:.4f}  perplexity"
            f" {measured['perplexity']:.4g}  ({lowest})"
        )


def measure_perplexity(loss: float | None) -> dict[str, float]:
    """Return the keys of an evaluation loss for logs and metrics; none without an evaluation."""
    if loss is None:
        return {}
    # exp of a number above 709 overflows a float.
    return {"eval_loss": loss, "perplexity": math.exp(min(loss, 700))}


def describe_result(setup: Setup, state: dict[str, Any]) -> str:
    """Say at the end which adapter or model is kept, and its evaluation loss."""
    measured = "" if state["best_loss"] is None else f", evaluation loss {state['best_loss']:.4f}"
    folder = setup.method.folder
    return f"{folder} of step {state['best_step']}{measured}: {setup.output_dir / folder}"


def describe_planned(setup: Setup, planned: Planned) -> Iterator[Table | Text | str]:
    """Describe the data, the steps and the memory of a training, before its model is loaded."""
    for warning in planned.warnings:
        yield Text(f"warning: {warning}", style="yellow")
    prepared = planned.prepared
    yield from prepared.descriptions
    yield tabulate_mixture(prepared.mixture)
    yield from describe_order(planned.order)
    if prepared.removals:
        yield f"removed rows are listed in {setup.output_dir / 'removed.jsonl'}"
    yield describe_batch(setup.config.training, setup.config.data.max_length, setup.strategy.ranks)
    # Rank 0's part of the first step stands for all.
    batches = len(planned.plan.micro_batches(0, 0, setup.strategy.ranks))
    evaluated = len(prepared.eval.lengths) if prepared.eval else 0
    yield (
        f"{len(planned.plan):,} steps of {batches} micro-batch(es) per process;"
        f" {evaluated:,} rows for the evaluation loss, {len(prepared.test):,} test questions"
    )
    training = setup.config.training
    steps = len(planned.plan)
    if count_warmup(steps, training) > steps:
        reached = learning_rate(steps - 1, steps, training)
        yield Text(
            f"warning: training.warmup_steps {training.warmup_steps:g} is longer than the run of"
            f" {steps:,} steps: the learning rate only rises to {reached:.1e} and never reaches"
            f" training.lr {training.lr:.1e}",
            style="yellow",
        )
    yield describe_decision(planned.decision)
    if planned.checkpoint is not None:
        done = planned.checkpoint.state["step"]
        yield f"resuming after step {done} of {len(planned.plan)} ({planned.checkpoint.path})"


def tabulate_mixture(mixture: list[dict[str, Any]]) -> Table:
    """Make a table of the training data, one row per data entry."""
    table = Table(title="training data", title_justify="left")
    for column in ("entry", "rows", "rows per epoch", "share of rows", "share of tokens"):
        table.add_column(column, justify="left" if column == "entry" else "right")
    for source in mixture:
        table.add_row(
            f"{source['entry']} {source['format']} {Path(source['path'] or '').name}",
            f"{source['rows']:,}",
            f"{source['rows_per_epoch']:,}",
            f"{source['row_share']:.1%}",
            f"{source['token_share']:.1%}",
        )
    return table


def describe_order(order: dict[str, Any]) -> Iterator[str]:
    """Say how far the order of an epoch's rows is from a shuffled one; nothing where it is one."""
    if order["name"] == "shuffled":
        return
    yield (
        f"data.order {order['name']}: {order['moved_rows']:,} of {order['rows']:,} rows stand at"
        " another place than in shuffled order"
    )
    if "first_tenth_loss" in order:
        yield (
            f"the base's loss per supervised token is {order['first_tenth_loss']:.3f} in the"
            f" easiest tenth of the rows and {order['last_tenth_loss']:.3f} in the hardest"
        )


def describe_decision(decision: Decision) -> Text:
    """Describe the micro-batch, the recomputation, and the forecast memory of a step."""
    if decision.no_forecast is not None:
        refusal = f"the memory of a step cannot be forecast: {decision.no_forecast}"
        return Text(refusal, style="yellow")
    text = Text(
        f"micro-batches of {decision.max_tokens_per_batch:,} tokens,"
        f" {decision.recomputed_layers} of {decision.layers} layers recomputed: predicted peak"
        f" {decision.predicted_peak_bytes / GIB:.2f} GiB, with the allocator's reserve"
        f" {decision.predicted_needed_bytes / GIB:.2f} GiB, of"
        f" {decision.memory_bytes / GIB:.2f} GiB that may be used"
    )
    if decision.predicted_needed_bytes > decision.memory_bytes:
        text.append("; memory will probably run out", style="yellow")
    if decision.predicted_host_bytes:
        text.append(f"; {decision.predicted_host_bytes / GIB:.2f} GiB pinned in the host's memory")
    return text


def describe_model(
    setup: Setup, planned: Planned, loaded: Loaded, built: Built, agreement: Agreement
) -> Iterator[str]:
    """Describe attention, sizes and precision of the loaded model."""
    cost = planned.decision.attention_cost_bytes
    more = ""
    if cost is not None:
        more = (
            f"; by forecast it needs {cost / GIB:.2f} GiB more than the variable-length kernel"
            " would"
        )
    isolates = "isolates packed rows" if setup.config.data.packing else "computes single rows"
    yield (
        f"attention {setup.attention.backend} {isolates} (error {agreement.logits:.0e}, input"
        f" gradients {agreement.gradients:.0e}, against the model's own eager attention and head);"
        f" {setup.attention.reason}{more}"
    )
    model = setup.config.model
    dtype = str(setup.dtype).removeprefix("torch.")
    compiled = ", norms and activations compiled" if loaded.compiled else ""
    trained = describe_trained(setup.config, setup.preview, setup.dtype)
    yield (
        f"{model.base}: {model.quantization}, {dtype}, {trained};"
        f" {built.recomputed} layers recomputed{compiled}; {setup.device}"
    )
    kept = setup.preview.describe_kept(model, setup.dtype)
    if kept is not None:
        yield kept
    if setup.preview.unmergeable is not None:
        yield Text(setup.preview.unmergeable, style="yellow")


def describe_check(setup: Setup, check: GradientCheck) -> str:
    """Describe the result of the gradient check at the start of a training."""
    return (
        f"{setup.strategy.name} on {setup.strategy.ranks} processes: the gradients of a short batch"
        f" equal those of the whole model (error {check.relative_error:.0e}; setting up and"
        f" checking took {check.seconds:.1f} s)"
    )


def compare_scores(
    base: list[dict], tuned: list[dict]
) -> tuple[dict[str, Any], list[Table | Text]]:
    """Score the predictions of the base and of the tuned model, and compare them.

    Args:
        base: Prediction rows of the base.
        tuned: Prediction rows of the tuned model, on the same questions.

    Returns:
        The scores for metrics.json (those of the tuned model, with those of the base under `base`
        and the comparison under `comparison`), and what is printed of them.
    """
    base_columns = collect_rows(base)
    tuned_columns = collect_rows(tuned)
    before = score_predictions(base_columns)
    after = score_predictions(tuned_columns)
    if base_columns.kind == "open":
        comparison = compare_predictions(base_columns, tuned_columns)
        table = tabulate_means("scores on the open test questions", comparison, ("base", "tuned"))
        shown = [table, describe_differences(comparison), describe_method(comparison)]
        shown += describe_odd_answers(before, after)
    else:
        comparison, shown = compare_choices(base_columns, tuned_columns, before, after)
    return {**after, "base": before, "comparison": comparison}, shown


def describe_odd_answers(before: dict[str, Any], after: dict[str, Any]) -> list[Text]:
    """Say how many open answers of base and tuned model were cut or empty, where there are such."""
    lines = []
    for key, words in (
        ("reached_limit", "answers that were cut at data.max_new_tokens"),
        ("unparsed", "empty answers"),
        ("truncated", "prompts that were cut to fit the model"),
    ):
        if before[key] or after[key]:
            lines.append(
                Text(
                    f"{words}: base {before[key]:,}, tuned {after[key]:,} of {after['n']:,}",
                    style="yellow",
                )
            )
    return lines


def compare_choices(
    base: Predictions, tuned: Predictions, before: dict[str, Any], after: dict[str, Any]
) -> tuple[dict[str, Any], list[Table | Text]]:
    """Compare base and tuned model on multiple-choice questions.

    Args:
        base, tuned: Rows of both, of the same questions in the same order.
        before, after: Their scores.

    Returns:
        The comparison, and a table of accuracies and the difference in words.
    """
    # compare_paired pairs answers by their place and does not check the ids: both lists must hold
    # the same questions in the same order.
    comparison = compare_paired(base.right, tuned.right)
    table = Table(title="accuracy on the test questions", title_justify="left")
    for column in ("", "n", "base", "95 % interval", "tuned", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    add_accuracies(table, "all", before, after)
    subjects = fold_small([before["per_subject"], after["per_subject"]], merge_accuracies)
    for name, scores in subjects[0].items():
        add_accuracies(table, name, scores, subjects[1][name])
    low, high = comparison["difference_ci95"]
    difference = Text(
        f"difference {comparison['difference']:+.1%} (95 % interval {low:+.1%} to {high:+.1%}),"
        f" paired exact McNemar p {p_text(comparison['mcnemar_p'])}"
    )
    doubt = find_doubt(before, after)
    if doubt is not None:
        difference.append(f"; {doubt}", style="yellow")
    return comparison, [table, difference]


def add_accuracies(table: Table, name: str, base: dict, tuned: dict) -> None:
    """Add a row with the accuracies of both models to the table."""

    def interval(scores: dict) -> str:
        low, high = scores["accuracy_ci95"]
        return f"{low:.1%} – {high:.1%}"

    table.add_row(
        name,
        str(base["n"]),
        f"{base['accuracy']:.1%}",
        interval(base),
        Text(f"{tuned['accuracy']:.1%}", style="bold"),
        interval(tuned),
    )


def describe_memory(memory: dict[str, int], device: torch.device) -> str:
    """Describe the memory in bytes that was measured at several moments of a training."""
    # On a CPU the whole process is measured, libraries included.
    kind = "GPU memory, allocated" if device.type == "cuda" else "memory of this process, resident"
    sizes = [f"{name} {value / 2**20:,.0f} MiB" for name, value in memory.items()]
    return f"{kind}: {', '.join(sizes)}"
