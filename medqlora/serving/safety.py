"""Reminders for questions that may come from somebody in danger.

The rules (safety_rules.txt) are regular expressions over the question in lower case. They are a
reminder and no protection: `bench/safety.py` measures how many such questions they miss. They never
change an answer, and evaluation does not use them.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

RULES = Path(__file__).with_name("safety_rules.txt")
LONGEST = 2_000  # Characters of a question that are read; the rest of a longer text is not.
WORD = re.compile(r"\b[A-Z]{3,}\b")  # A word of the rules' first part.

# The most urgent reminder comes first, because a question may call for several.
REMINDERS = {
    "emergency": (
        "If somebody is in danger now, call the local emergency number (112 in Europe, 911 in North"
        " America) and do not wait for an answer here."
    ),
    "self_harm": (
        "If you or somebody else might do themselves harm, call the local emergency number or a"
        " crisis line now, and do not stay alone; findahelpline.com lists such lines by country."
    ),
    "dosing": (
        "A wrong dose or mixture can be dangerous: ask a doctor, a pharmacist or a poison centre"
        " before anything is taken, changed or stopped. If somebody has taken too much, call the"
        " local emergency number."
    ),
}

# A question of an examination describes a stranger, and nobody speaks of himself in it.
CASE = re.compile(
    r"\b(?:an?|this|the) (?:\d+[- ](?:year|month|week|day)s?[- ]old|patient|newborn|boy)"
    r"|^an? unconscious|^an? (?:man|woman|child|girl) (?:with|in|swallow)|which of (?:the|these)"
    r"|years? ago|last year"
)
SPOKEN = (
    (r"[’‘]", "'"),
    (r"\bcan't\b|\bcant\b|\bcan not\b", "cannot"),
    (r"\bwon't\b|\bwont\b", "will not"),
    (r"n't\b", " not"),
    (r"\b(do|does|did|is)nt\b", r"\1 not"),
    (r"\bi'?m\b", "i am"),
    (r"\b(he|she|it)'s\b", r"\1 is"),
    (r"'ve\b", " have"),
    (r"'ll\b", " will"),
    (r"'d\b", " would"),
)


@functools.cache
def read_rules() -> tuple[dict[str, str], dict[str, list[list[re.Pattern]]]]:
    """Return the words of the rules by their names, and the rules by kind."""
    words: dict[str, list[str]] = {}
    lines: dict[str, list[str]] = {}
    kind = None
    for line in RULES.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        heading = re.fullmatch(r"\[(\w+)\]", line)
        if heading:
            kind = heading[1]
        elif kind is None:
            name, _, expression = line.partition(" = ")
            words.setdefault(name, []).append(expression)
        else:
            lines.setdefault(kind, []).append(line)
    assert list(lines) == list(REMINDERS)
    whole = {name: f"(?:{'|'.join(some)})" for name, some in words.items()}
    rules = {
        kind: [[re.compile(expand(part, whole)) for part in line.split(" & ")] for line in some]
        for kind, some in lines.items()
    }
    return {name: expand(text, whole) for name, text in whole.items()}, rules


def expand(expression: str, words: dict[str, str]) -> str:
    """Return an expression with the words in capitals replaced, and those in their places too."""
    while WORD.search(expression):
        expression = WORD.sub(lambda found: words[found[0]], expression)
    return expression


def find_reminders(question: str) -> list[str]:
    """Return the kinds of REMINDERS that a question calls for, the most urgent one first."""
    # Some rules look from each word to the end, which takes the square of a text's length.
    text = " ".join(question[:LONGEST].lower().split())
    for spoken, written in SPOKEN:
        text = re.sub(spoken, written, text)
    words, by_kind = read_rules()
    if CASE.search(text) and not re.search(words["SELF"], text):
        return []
    return [
        kind
        for kind, rules in by_kind.items()
        if any(all(part.search(text) for part in rule) for rule in rules)
    ]
