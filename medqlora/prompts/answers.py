"""Text that a model wrote becomes the option that it names."""

from __future__ import annotations

import re

from medqlora.data.examples import LETTERS

NAMED = (
    r"(?i:\b(?:WORD)\b(?:\s+(?:is|would"
    r" be))?)\s*:?\s*(?:\\boxed\{|[*(\[\s])*([LETTERS])(?![\w'])REST"
)
# What may not follow a letter: a second one ("B or D"); a word that makes "A" an article; a denial.
SECOND = r"(?!\W*(?:,|/|&|\bor\b|\band\b)\s*(?:[LETTERS]\b|(?:and|or)\b))"
ARTICLE = r"(?!(?<=A) +[a-zA-Z])"
DENIED = r"(?!\W*(?i:is|are|was|can|cannot|isn't)\b)"


def parse_answer(text: str, options: tuple[str, ...], completion: str = "letter") -> int | None:
    """Generated text -> index of the option, or None where no option was named. Never a guess.

    Read in this order: a letter that opens the text (unless it is an explanation), the last "answer
    is B" or "Answer: B", the only "option B", a text that is one option, word for word. The inverse
    of `render_answer`: parse_answer(render_answer(example, c), example.options, c) ==
    example.answer.
    """
    letters = LETTERS[: len(options)]
    text = text.strip()
    if completion != "explanation":
        opening = re.match(
            rf"[*(\[\s]*([{letters}])(?:[.):\]*]|,(?!\s*[{letters}]\b)|\s*$|\s*\n)", text
        )
        if opening:
            return letters.index(opening[1])
    stated, mentioned = (
        re.findall(
            NAMED.replace("WORD", words).replace("REST", SECOND + more).replace("LETTERS", letters),
            text,
        )
        for words, more in (("answer", ARTICLE), ("choice|option", DENIED))
    )
    if stated or len(set(mentioned)) == 1:
        return letters.index((stated or mentioned)[-1])
    first = re.split(r"[.,;\n]", text.lower(), maxsplit=1)[0].strip()
    whole = text.rstrip(".").strip().lower()
    same = [i for i, option in enumerate(options) if option.strip().lower() in (whole, first)]
    return same[0] if len(same) == 1 else None
