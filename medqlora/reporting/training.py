"""The part of a page that shows how training went."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from medqlora.reporting.charts import Line, line_chart
from medqlora.reporting.markup import Html, definitions, tag
from medqlora.reporting.runs import Run

POINTS = 200  # of a curve; what lies between two of them is drawn as a band from lowest to highest


def show_training(run: Run) -> list[Html]:
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
            [curve("", run.log, "peak_memory_bytes", 2**-30)],
            from_zero=True,
        ),
        line_chart("Tokens per second", [curve("", run.log, "tokens_per_second")], from_zero=True),
        line_chart("Learning rate", [curve("", run.log, "lr")], from_zero=True),
        line_chart(
            "Gradient norm before clipping", [curve("", run.log, "grad_norm")], from_zero=True
        ),
    ]
    memory = run.metrics.get("memory_bytes") or {}
    last = max((row["step"] for row in run.log if number_in(row, "step")), default=None)
    facts = [
        (name, f"{step:,}")
        for name, step in (("steps", last), ("adapter of step", run.metrics.get("best_step")))
        if step is not None
    ]
    facts += [("lowest evaluation loss", best_loss(run))]
    facts += [("tokens per second, median", speed(run))]
    facts += [(f"memory {name}", f"{value / 2**20:,.0f} MiB") for name, value in memory.items()]
    facts = [(name, value) for name, value in facts if value is not None]
    charts = [chart for chart in charts if chart]
    if not charts and not memory:
        return []
    return [definitions(facts), *([tag("div", *charts, class_="charts")] if charts else [])]


def curve(
    name: str, log: list[dict[str, Any]], key: str, scale: float = 1.0, marks: bool = False
) -> Line:
    """One column of the log over the steps, thinned to at most POINTS means with the range that
    each of them stands for.
    """
    points = [
        (row["step"], row[key] * scale)
        for row in log
        if number_in(row, "step") and number_in(row, key)
    ]
    if len(points) <= POINTS:
        return Line(name, points, marks=marks)
    size = -(-len(points) // POINTS)
    parts = [np.array(points[start : start + size], float) for start in range(0, len(points), size)]
    means = [(part[:, 0].mean(), part[:, 1].mean()) for part in parts]
    return Line(
        name, means, [(part[:, 0].mean(), part[:, 1].min(), part[:, 1].max()) for part in parts]
    )


def number_in(row: dict[str, Any], key: str) -> bool:
    return isinstance(row.get(key), (int, float)) and math.isfinite(row[key])


def best_loss(run: Run) -> str | None:
    losses = [row["eval_loss"] for row in run.log if number_in(row, "eval_loss")]
    return f"{min(losses):.4f}" if losses else None


def speed(run: Run) -> str | None:
    speeds = [row["tokens_per_second"] for row in run.log if number_in(row, "tokens_per_second")]
    return f"{np.median(speeds):,.0f}" if speeds else None
