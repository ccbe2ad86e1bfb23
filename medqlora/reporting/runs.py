"""The content of a run's files, for a report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from medqlora.core.errors import UserError
from medqlora.evaluation.predictions import Predictions


class ReportError(UserError):
    """No report can be made of a run folder, or the report cannot be written."""


@dataclass
class Run:
    """The content of one run's files; everything but the name may be missing.

    Args:
        name: Name of the run folder.
        rows: Predictions by the name of their file without its ending (base, tuned, …).
        scores: Scores by the same names, as score_predictions returns them.
        comparison: Comparison of base and tuned on multiple-choice questions, as
            compare_predictions returns it, or the part of it that metrics.json holds.
        open_comparison: The same on open questions.
        obstacle: Why there is no comparison.
        log: Rows of train_log.jsonl.
        metrics: Content of metrics.json.
        environment: Content of environment.json.
        config: Text of config.yaml.
        missing: Names of the files that are not there.
        lost_lines: Number of lines of train_log.jsonl that are no rows.
    """

    name: str
    rows: dict[str, Predictions] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    open_comparison: dict[str, Any] | None = None
    obstacle: str | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    missing: list[str] = field(default_factory=list)
    lost_lines: int = 0

    @property
    def shown(self) -> list[str]:
        """Names of the multiple-choice predictions that the charts show.

        They are base and tuned. Where neither exists, it is the first one.
        """
        choices = [name for name, scores in self.scores.items() if "accuracy" in scores]
        # The tuned model comes last, which charts and tables rely on.
        return [name for name in ("base", "tuned") if name in choices] or choices[:1]


def shorten(commit: str | None) -> str | None:
    """Return the first 12 characters of a commit, and keep the mark of uncommitted changes."""
    if not commit:
        return commit
    return commit[:12] + ("-dirty" if str(commit).endswith("-dirty") else "")


def flatten(tree: Any, name: str = "") -> list[list[str]]:
    """Turn nested dictionaries and lists into rows of a dotted name and a value."""
    if isinstance(tree, dict):
        entries = list(tree.items())
    elif isinstance(tree, list):
        # Entries of a list are named by their number, as in gpus.0.name.
        entries = list(enumerate(tree))
    else:
        entries = []
    if not entries:
        return [[name, "–" if tree in (None, [], {}) else str(tree)]]
    rows = []
    for key, value in entries:
        rows += flatten(value, f"{name}.{key}" if name else str(key))
    return rows
