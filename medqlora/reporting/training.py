"""The part of a page that shows how training went."""

from __future__ import annotations

from typing import Any

import numpy as np

from medqlora.reporting.charts import Line, line_chart
from medqlora.reporting.runs import Run

POINTS = 200  # A longer curve is thinned; a band shows the range that each point stands for.


def show_training(run: Run) -> dict[str, Any] | None:
    """Return the figures and charts of the training; None where nothing is known of it."""
    charts = [
        line_chart(
            "Loss per supervised token",
            [
                curve("training", run.log, "loss"),
                curve("evaluation", run.log, "eval_loss", marks=True),
            ],
        ),
        line_chart(
            "Peak memory so far, GiB",
            # The factor turns bytes into GiB.
            [curve("", run.log, "peak_memory_bytes", 2**-30)],
            from_zero=True,
        ),
        line_chart("Tokens per second", [curve("", run.log, "tokens_per_second")], from_zero=True),
        line_chart("Learning rate", [curve("", run.log, "lr")], from_zero=True),
        line_chart(
            "Gradient norm before clipping", [curve("", run.log, "grad_norm")], from_zero=True
        ),
    ]
    charts = [chart for chart in charts if chart]
    memory = run.metrics.get("memory_bytes") or {}
    if not charts and not memory:
        return None
    last = max((row["step"] for row in run.log if has_number(row, "step")), default=None)
    best = run.metrics.get("best_step")
    figures = [
        ("steps", None if last is None else f"{last:,}"),
        ("adapter of step", None if best is None else f"{best:,}"),
        ("lowest evaluation loss", best_loss(run)),
        ("tokens per second, median", speed(run)),
    ]
    figures += [(f"memory {name}", f"{value / 2**20:,.0f} MiB") for name, value in memory.items()]
    known = [(name, value) for name, value in figures if value is not None]
    return {"figures": known, "charts": charts}


def curve(
    name: str, log: list[dict[str, Any]], key: str, scale: float = 1.0, marks: bool = False
) -> Line:
    """Return one column of the log over the steps.

    A long one is thinned to at most POINTS means with the range that each of them stands for.

    Args:
        name: stands in the legend.
        log: rows of train_log.jsonl.
        key: the column.
        scale: multiplies each value.
        marks: marks each point.
    """
    # Rows of evaluations lack the columns of steps, and the other way round.
    points = [
        (row["step"], row[key] * scale)
        for row in log
        if has_number(row, "step") and has_number(row, key)
    ]
    if len(points) <= POINTS:
        return Line(name, points, marks=marks)
    # Rounding up keeps the number of parts within POINTS.
    size = -(-len(points) // POINTS)
    # float64 [at most size, 2] each: step, value
    parts = [np.array(points[start : start + size], float) for start in range(0, len(points), size)]
    means = [(part[:, 0].mean(), part[:, 1].mean()) for part in parts]
    ranges = [(part[:, 0].mean(), part[:, 1].min(), part[:, 1].max()) for part in parts]
    return Line(name, means, ranges)


def has_number(row: dict[str, Any], key: str) -> bool:
    """Whether a row of the log has a number there that can be drawn; a damaged log may have
    anything.
    """
    value = row.get(key)
    # A whole number of JSON may be larger than a float can be; NaN is below nothing.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def best_loss(run: Run) -> str | None:
    """Return the lowest evaluation loss, as text."""
    losses = [row["eval_loss"] for row in run.log if has_number(row, "eval_loss")]
    return f"{min(losses):.4f}" if losses else None


def speed(run: Run) -> str | None:
    """Return the median of the steps' tokens per second, as text."""
    # A few slow steps do not move the median, as they would move a mean.
    speeds = [row["tokens_per_second"] for row in run.log if has_number(row, "tokens_per_second")]
    return f"{np.median(speeds):,.0f}" if speeds else None
