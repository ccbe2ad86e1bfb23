"""Passages stand in a prompt with numbers, by which an answer cites them.

Reading the numbers of an answer is the inverse of writing them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from medqlora.data.examples import Evidence

# It is the beginning of every prompt with passages. Changing it would change what adapters that
# were trained with passages are asked.
HEADING = "Passages, which an answer may cite by their numbers:"
CITATION = re.compile(r"\[(\d{1,3}(?:\s*[,;–-]\s*\d{1,3})*)\]")


def render_evidence(evidence: Sequence[Evidence]) -> list[str]:
    """Return the lines that stand before a question; none without passages."""
    if not evidence:
        return []
    passages = [f"[{number}] {piece.text}" for number, piece in enumerate(evidence, 1)]
    return [HEADING, *passages, ""]


def find_citations(text: str, count: int) -> tuple[list[int], list[int]]:
    """Return the numbers that a text cites, each once and in their order of appearance.

    "[2]", "[1, 3]" and "[1-3]" are citations.

    Args:
        text: An answer.
        count: How many passages it was shown.

    Returns:
        The numbers of passages that were shown, and the numbers that name none.
    """
    cited: list[int] = []
    for found in CITATION.finditer(text):
        for part in re.split(r"[,;]", found[1]):
            ends = [int(number) for number in re.split(r"[–-]", part)]
            # A range that falls names its two ends only.
            numbers = range(ends[0], ends[-1] + 1) if ends[0] <= ends[-1] else ends
            cited += [number for number in numbers if number not in cited]
    known = [number for number in cited if 1 <= number <= count]
    return known, [number for number in cited if number not in known]
