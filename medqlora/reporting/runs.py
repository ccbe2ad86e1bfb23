"""What a run's files say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from medqlora.core.errors import UserError
from medqlora.evaluation.predictions import Predictions


class ReportError(UserError):
    """A run folder or output that no report can be made of."""


@dataclass
class Run:
    """What is known of one run; everything but the name may be missing.

    rows, scores: by the name of the predictions file without its ending (base, tuned, …), scores as
    of score_predictions; comparison: of base and tuned, as of compare_predictions, or the part that
    metrics.json keeps; obstacle: why there is none; log: lines of train_log.jsonl; metrics,
    environment: of the .json files; config: text of config.yaml; missing: file names.
    """

    name: str
    rows: dict[str, Predictions] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    obstacle: str | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    missing: list[str] = field(default_factory=list)

    @property
    def shown(self) -> list[str]:
        """Multiple-choice files that the charts show: base and tuned, else the first one there
        is.
        """
        choices = [name for name, scores in self.scores.items() if "accuracy" in scores]
        return [name for name in ("base", "tuned") if name in choices] or choices[:1]


def shorten(commit: str | None) -> str | None:
    return commit and commit[:12] + ("-dirty" if str(commit).endswith("-dirty") else "")


def flatten(tree: Any, name: str = "") -> list[list[str]]:
    """Nested facts -> [dotted name, value] rows."""
    entries = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else None
    )
    if not entries:
        return [[name, "–" if tree in (None, [], {}) else str(tree)]]
    return [
        row
        for key, value in entries
        for row in flatten(value, f"{name}.{key}" if name else str(key))
    ]
