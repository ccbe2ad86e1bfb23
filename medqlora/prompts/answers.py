"""Find the option that a generated text names."""

from __future__ import annotations

import re

from medqlora.data.examples import LETTERS

# A letter after a word, as in "answer is B", "Answer: **(B)" or "option B". WORD, LETTERS and REST
# are filled in by find_letters.
NAMED = (
    r"(?i:\b(?:WORD)\b(?:\s+(?:is|would"
    r" be))?)\s*:?\s*(?:\\boxed\{|[*(\[\s])*([LETTERS])(?![\w'])REST"
)
# A second letter may not follow, as in "answer: B or D".
NO_SECOND = r"(?!\W*(?:,|/|&|\bor\b|\band\b)\s*(?:[LETTERS]\b|(?:and|or)\b))"
# No word may follow an "A", which would then be an article, as in "the answer is a drug".
NO_ARTICLE = r"(?!(?<=A) +[a-zA-Z])"
# No verb may follow an option, which often denies it, as in "option B is wrong".
NO_VERB = r"(?!\W*(?i:is|are|was|can|cannot|isn't)\b)"


def parse_answer(text: str, options: tuple[str, ...], completion: str = "letter") -> int | None:
    """Return the index of the option that a text names, or None where it names none.

    The text names an option by, in this order:
    1. a letter at its start, unless the text is an explanation;
    2. the last "answer is B" or "Answer: B";
    3. the only letter that it calls an option or a choice, as in "option B";
    4. the words of exactly one option, as the whole text or as its first sentence or clause.

    It is the inverse of `render_answer` for each completion c:
    parse_answer(render_answer(example, c), example.options, c) == example.answer.

    Args:
        text: The generated text.
        options: The texts of the options.
        completion: What the model was asked to write (see styles.render).
    """
    letters = LETTERS[: len(options)]
    text = text.strip()
    if completion != "explanation":
        opening = re.match(
            rf"[*(\[\s]*([{letters}])(?:[.):\]*]|,(?!\s*[{letters}]\b)|\s*$|\s*\n)", text
        )
        if opening:
            return letters.index(opening[1])
    stated = find_letters(text, "answer", letters, NO_SECOND + NO_ARTICLE)
    if stated:
        return letters.index(stated[-1])
    mentioned = find_letters(text, "choice|option", letters, NO_SECOND + NO_VERB)
    if len(set(mentioned)) == 1:
        return letters.index(mentioned[-1])
    first_clause = re.split(r"[.,;\n]", text.lower(), maxsplit=1)[0].strip()
    whole = text.rstrip(".").strip().lower()
    same = [
        i for i, option in enumerate(options) if option.strip().lower() in (whole, first_clause)
    ]
    return same[0] if len(same) == 1 else None


def find_letters(text: str, words: str, letters: str, rest: str) -> list[str]:
    """Return the letters that follow one of the words (joined by "|"), in order."""
    pattern = NAMED.replace("WORD", words).replace("REST", rest).replace("LETTERS", letters)
    return re.findall(pattern, text)
