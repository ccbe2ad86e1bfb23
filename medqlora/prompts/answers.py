"""Find the option that a generated text names."""

from __future__ import annotations

import functools
import re

from medqlora.data.examples import LETTERS

# Thoughts stand in blocks as Qwen3 and DeepSeek-R1 write them, or under HuatuoGPT-o1's headings.
THOUGHTS = r"(?:think|thinking|thought|reasoning)"
CLOSED_THOUGHTS = re.compile(rf"</{THOUGHTS}>", re.I)
OPEN_THOUGHTS = re.compile(rf"<{THOUGHTS}>|^\s*#+\s*thinking\s*$", re.I | re.M)
FINAL_HEADING = re.compile(r"^\s*#+\s*final (?:response|answer)\b[\s:*#]*", re.I | re.M)
# A model that does not stop goes on with a question of its own.
NEXT_QUESTION = re.compile(r"\n[^\S\n]*\W{0,3}(?:question|q)\b[^\n:]{0,8}:", re.I)

# These marks may stand around a letter or an option, as in "**(B)**".
OPENERS = r"(?:\\?(?:text|textbf|mathrm|mathbf)\{|[*_(\[{\"'“‘$\s])*"
CLOSERS = r"[*_)\]}\"'”’$]*"
# A remark in parentheses may stand behind the answer.
REMARK = re.compile(rf"{CLOSERS}(?:\s*\(([^()\n]*)\))?{CLOSERS}")

# These words announce an answer, which follows at once. The word in LINK may be missing before a
# letter, as in "answer B", but not before an option's text.
COPULA = r"\s+(?:is|would be|should be|must be|will be)\b"
LINK = rf"(?P<link>(?:{COPULA})?[*_]*\s*[:=]|\s+[-–—](?=\s)|{COPULA})"
LEAD = re.compile(
    rf"\b(?:answer|(?:correct|right|best|final|appropriate|likely)\s+(?:option|choice))\b"
    rf"(?:\s+to\s+(?:this|the)\s+question\b)?[*_]*{LINK}?"
    r"(?:[*_\s]+(?:likely|most likely|probably|therefore|thus|clearly)\b)?"
    r"|\b(?:choose|pick|select|go with|opt for)\b"
    r"|\b(?:therefore|thus|hence|so),?(?=\s+(?:option|choice)\b)",
    re.I,
)
# A clause with one of these words before the announcement denies it or leaves it open.
DOUBT = re.compile(
    r"\b(?:not|no|never|nor|neither|cannot|if|unless|whether|why|might|may|could|false|incorrect"
    r"|wrong|some|many|students)\b|n['’]t\b",
    re.I,
)
CLAUSE_END = re.compile(r"[.,;:!?()\n]|\b(?:so|therefore|thus|hence|but)\b", re.I)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.I | re.S)

# A sentence goes on with these words, and no name of a species or of a vitamin does.
REASON = r"(?:because|since|as|due)\b"
PLAIN_WORD = (
    r"(?:(?:(?-i:an?)|the|this|that|these|those|it|its|he|she|they|we|his|her|there|given|which|who"
    rf"|so|therefore|thus|hence)\b|{REASON})"
)
VERDICT = (
    r"is\s+the\s+(?:(?:correct|right|best|most\s+likely)\s+)?(?:answer|option|choice)\b"
    r"(?=\s*(?:$|[.,;!)\n]|because\b|since\b|as\b))"
)
# An answer by an option's text ends in one of these ways.
TEXT_END = re.compile(
    rf"\s*$|\s*\n|[.;!]+{CLOSERS}(?:\s|$)|,?\s+(?:{REASON}|{VERDICT})"
    rf"|,\s+(?:{PLAIN_WORD}|not\b)",
    re.I,
)
# An answer by a letter ends in one of these ways, or with a mark and the beginning of a sentence.
LETTER_END = re.compile(
    rf"\s*$|[.:;!]?{CLOSERS}\s*(?:$|\n)|;\s|\s+(?:{REASON}|{VERDICT})|,\s+(?:{PLAIN_WORD}|not\b)",
    re.I,
)
MARK = re.compile(rf"(?:[.:]{CLOSERS}|\s+[-–—])\s+{OPENERS}")
JOINER = rf"(?:{CLOSERS}[.:,)\]]{CLOSERS}\s*|{CLOSERS}\s+(?:[-–—]\s+)?){OPENERS}"
# One of these words behind the option at a text's start denies the option.
DENIAL = re.compile(
    r"\b(?:not|never|no|wrong|incorrect|false|unlikely|excluded|contraindicated)\b|n['’]t\b", re.I
)
DENIED_NEXT = re.compile(
    r"\W*(?:(?:this|that|it)\s+(?:is|was)\s+|is\s+)?(?:not|no|wrong|incorrect|false|unlikely)\b",
    re.I,
)
# These words behind an option take it back.
RETRACTION = re.compile(r"\W*(?:no[,.]|no,?\s+wait|wait|actually|(?:is|are)\s+also)\b", re.I)
# Another letter behind a letter or an option is a second answer: what stands between them, and what
# must stand behind the second. A letter that begins a sentence ("B. A is wrong") is none.
SAME_LINE = re.compile(r"[.;,]+[^\S\n]*")
SECOND = [
    (
        re.compile(
            r"\s*(?:,|/|&|\+|\bor\b|\band\b|\bto\b|\bthrough\b)\s*(?:(?:or|and)\s+)?"
            r"(?:(?:option|choice)\s+)?",
            re.I,
        ),
        "",
    ),
    (SAME_LINE, rf"(?:[.):]\s|{CLOSERS}\s*(?:$|[,;]|(?:is|are)\s+also\b|and\b|or\b))"),
    (re.compile(r"[.;,]?[^\S\n]*\n\s*"), rf"{CLOSERS}[.,;:]?\s*(?:$|\n)"),
]
# These words join two answers to one.
JOINED = re.compile(rf"{CLOSERS}\s*(?:[,+&/]|\b(?:and|or|with|plus|but|as well as)\b)", re.I)


def parse_answer(text: str, options: tuple[str, ...], completion: str = "letter") -> int | None:
    """Return the index of the option that a text names, or None where it names none.

    Thoughts are no part of the answer (see find_final). The text names an option by, in this order:
    1. nothing but a letter, an option's text, or both;
    2. its last statement, as "answer is B", "Answer: aspirin", `\\boxed{B}` or "B is the answer";
    3. a letter or an option's text at its start, unless the text is an explanation.
    A start that contradicts the statement, two letters ("B or D"), and a letter that may be a part
    of a name ("C. difficile", "B cells") name none.

    It is the inverse of `render_answer` for each completion c:
    parse_answer(render_answer(example, c), example.options, c) == example.answer.

    Args:
        text: The generated text.
        options: The texts of the options.
        completion: What the model was asked to write (see styles.render).
    """
    final = find_final(text)
    if final is None:
        return None
    final = final.strip()
    following = NEXT_QUESTION.search(final)
    parts = [final[: following.start()].strip(), final] if following else [final]
    for part in parts:
        named = read_text(part, options, completion)
        if named:
            return named.pop() if len(named) == 1 else None
    return None


def find_final(text: str) -> str | None:
    """Return what stands behind a text's thoughts, or None where the thoughts have no end."""
    # The opening tag may stand in the prompt, so the closing one decides.
    for ending in (CLOSED_THOUGHTS, FINAL_HEADING):
        ends = list(ending.finditer(text))
        if ends:
            text = text[ends[-1].end() :]
    return None if OPEN_THOUGHTS.search(text) else text


def read_text(text: str, options: tuple[str, ...], completion: str) -> set[int]:
    """Return the options that a text without thoughts names; several contradict each other."""
    whole = read_whole(text, options, completion)
    if whole:
        return whole
    stated = read_statements(text, options)
    if completion == "explanation":
        return stated
    # What begins with "B" and ends in "the answer is C" has no answer that can be trusted.
    return stated | read_start(text, options)


def read_whole(text: str, options: tuple[str, ...], completion: str) -> set[int]:
    """Return the options that a text is: a letter, an option's text, or both."""
    letters = LETTERS[: len(options)]
    # A letter alone is the letter, although an option's text may be "A" too.
    letter = re.fullmatch(rf"{OPENERS}([{letters}])[.:,;]?{CLOSERS}\.?", text)
    if letter:
        return {letters.index(letter[1])}
    written = {i for i, option in enumerate(options) if text == f"{letters[i]}. {option}".strip()}
    if written and completion == "letter_text":
        return written
    same = {i for i, option in enumerate(options) if text == option.strip()}
    if not same:
        same = {i for i, option in enumerate(options) if simplify(text) == simplify(option)}
    return same | written


def simplify(text: str) -> str:
    """Return a text in lower case, with single blanks, without the marks around it."""
    return " ".join(text.lower().split()).strip("*_\"'“”‘’ ").rstrip(". ")


def read_statements(text: str, options: tuple[str, ...]) -> set[int]:
    """Return the options of the last statement that names any."""
    letters = LETTERS[: len(options)]
    found = []
    for lead in LEAD.finditer(text):
        if not is_doubted(text, lead.start()):
            named = read_start(text[lead.end() :], options, True, bool(lead["link"]))
            found.append((lead.start(), named))
    subject = rf"(?:^|[.;!?\n]|\b(?i:so|but|therefore|thus|hence|option|choice)\b,?){OPENERS}"
    for verdict in re.finditer(rf"{subject}([{letters}])(?![\w'’]){CLOSERS}\s+{VERDICT}", text):
        if not is_doubted(text, verdict.start(1)):
            found.append((verdict.start(1), {letters.index(verdict[1])}))
    for pattern in (BOXED, TAGGED):
        for match in pattern.finditer(text):
            found.append((match.start(), read_start(match[1], options, True)))
    named = [some for _, some in sorted(found, key=lambda one: one[0]) if some]
    return named[-1] if named else set()


def is_doubted(text: str, end: int) -> bool:
    """Whether the clause that leads up to a place denies what follows or leaves it open."""
    # Only a clause's last words are looked at, so a long text takes no square of its length.
    clause = CLAUSE_END.split(text[max(0, end - 100) : end])[-1]
    return DOUBT.search(clause) is not None


def read_start(
    text: str, options: tuple[str, ...], stated: bool = False, by_text: bool = True
) -> set[int]:
    """Return the options that a text names at its start; none where it may mean another thing.

    Args:
        text: The text.
        options: The texts of the options.
        stated: Whether the words before the text announce an answer.
        by_text: Whether an option's text names it, as its letter does.
    """
    letters = LETTERS[: len(options)]
    text = text[re.match(OPENERS, text).end() :]
    letter = re.match(
        rf"(?:(?:the\s+)?(?i:option|choice|letter)\s+)?{OPENERS}([{letters}])(?![\w'’])", text
    )
    ends = []  # (end of the words that name an option, its index)
    for i, option in enumerate(options):
        match = match_words(option).match(text) if by_text else None
        ends += [(match.end(), i)] if match else []
    if letter:
        named = letters.index(letter[1])
        own = re.match(JOINER, text[letter.end() :])
        own = own and match_words(options[named]).match(text, letter.end() + own.end())
        ends += [(own.end(), named)] if own else []
    if ends:
        end = max(ends)[0]
        best = {i for place, i in ends if place == end}
        if all(ends_answer(text[end:], i, options, TEXT_END) for i in best):
            # Behind "No" a denial goes on with the answer.
            sure = stated or all(options[i].strip().lower() in ("yes", "no", "maybe") for i in best)
            return best | read_second(text[end:], options) if holds(text[end:], sure) else set()
        # "A. Aspirin and heparin" is another answer than aspirin.
        if not letter or best != {named} or JOINED.match(text, end):
            return set()
        # "Answer A (aspirin) is incorrect" names no answer.
        if DENIAL.search(re.split(r"[.;\n]", text[end:], maxsplit=1)[0]):
            return set()
        if not stated and mentions_another(text[letter.end() :], named, options):
            return set()
    if not letter:
        return set()
    rest = text[letter.end() :]
    second = read_second(rest, options) - {named}
    if second:
        return {named} | second
    # Behind a letter the marks are no end of a sentence.
    if not holds(rest if stated else rest.lstrip(".:)]* "), stated):
        return set()
    return {named} if ends_letter(rest, named, options, stated, bool(ends)) else set()


def read_second(rest: str, options: tuple[str, ...]) -> set[int]:
    """Return the option that is named at once behind another one, as in "B or D" or "A; B"."""
    letters = LETTERS[: len(options)]
    remark = REMARK.match(rest).end()
    for pattern in SECOND:
        gap = pattern[0].match(rest, remark)
        if not gap:
            continue
        letter = re.compile(rf"{OPENERS}([{letters}])(?![\w'’]){pattern[1]}", re.I).match(
            rest, gap.end()
        )
        if letter and letter[1].isupper():
            return {letters.index(letter[1])}
    gap = SAME_LINE.match(rest, remark)
    for i, option in enumerate(options if gap else ()):
        match = match_words(option).match(rest, gap.end())
        if match and TEXT_END.match(rest, match.end()):
            return {i}
    return set()


def mentions_another(rest: str, named: int, options: tuple[str, ...]) -> bool:
    """Whether a line has the letter with a mark, or the words, of another option."""
    line = rest.split("\n")[0]
    for i, option in enumerate(options):
        if i != named and (
            re.search(rf"(?<![\w.]){LETTERS[i]}[.):]\s", line) or match_words(option).search(line)
        ):
            return True
    return False


@functools.lru_cache(4096)
def match_words(option: str) -> re.Pattern[str]:
    """Return a pattern of an option's words without the marks around them."""
    # A text's start is taken without these marks, and so is the option's.
    option = option[re.match(OPENERS, option).end() :].rstrip(".\"'“”’ ")
    words = [re.escape(word) for word in option.split()]
    # An option of marks alone, or of a letter alone, is matched as a whole text only.
    if not words or option.upper() in tuple(LETTERS):
        return re.compile(r"(?!)")
    return re.compile(r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)", re.I)


def holds(rest: str, stated: bool) -> bool:
    """Whether the words behind an option do not take it back."""
    if stated:
        return RETRACTION.match(rest) is None
    # An announcement is clear; a start alone may also be what is ruled out.
    sentence = re.split(rf"[.;\n]|\b{REASON}", rest, maxsplit=1)[0]
    return not (DENIAL.search(sentence) or DENIED_NEXT.match(rest) or RETRACTION.match(rest))


def ends_answer(rest: str, named: int, options: tuple[str, ...], ending: re.Pattern[str]) -> bool:
    """Whether the answer ends before `rest`, and nothing there names another option."""
    remark = REMARK.match(rest)
    if remark[1] is not None:
        content = remark[1].strip()
        letter = re.fullmatch(rf"(?:(?i:option|choice)\s+)?([{LETTERS}])", content)
        others = [simplify(option) for i, option in enumerate(options) if i != named]
        if letter and letter[1] != LETTERS[named]:
            return False
        if DENIAL.search(content) or simplify(content) in others:
            return False
    # A text that repeats the list of options names none of them.
    for line in rest.split("\n")[1:]:
        lines = {simplify(line), simplify(re.sub(rf"^\W*[{LETTERS}][.):]\s", "", line))}
        if any(simplify(option) in lines for i, option in enumerate(options) if i != named):
            return False
    return ending.match(rest, remark.end()) is not None


def ends_letter(
    rest: str, named: int, options: tuple[str, ...], stated: bool, with_text: bool
) -> bool:
    """Whether a letter stands for itself before `rest`, and is no part of a name.

    Args:
        rest: What stands behind the letter.
        named: The index of the letter's option.
        options: The texts of the options.
        stated: Whether an answer was announced.
        with_text: Whether the option's own text stands behind the letter.
    """
    if ends_answer(rest, named, options, LETTER_END):
        return True
    if not ends_answer(rest, named, options, re.compile("")):
        return False
    remark = REMARK.match(rest)
    mark = MARK.match(rest, remark.end())
    # A bracket behind the letter is a mark too.
    if not mark and remark.end():
        mark = re.compile(rf"\s+{OPENERS}").match(rest, remark.end())
    if not mark:
        return False
    following = rest[mark.end() :]
    word = re.match(r"[\w'’-]*", following)[0].lower()
    own = options[named].lower()
    # The answer may be cut off within the option's text.
    if re.match(PLAIN_WORD, following, re.I) or own.startswith(following.lower()):
        return True
    if not word or re.match(rf"[{LETTERS}](?:[.):,;]|\s*$)", following):
        return False
    others = [option for i, option in enumerate(options) if i != named]
    for option in others:
        same = match_words(option).match(following)
        if same and TEXT_END.match(following, same.end()):
            return False
    # A letter with a full stop may shorten a genus, as in "C. difficile" or "C. Difficile".
    dotted = rest[0] == "."
    if dotted and is_species(LETTERS[named], word, options):
        return False
    if with_text:
        return True
    if word in re.findall(r"[\w'’-]+", own):
        # "D. Vitamin K" is no "D. Vitamin A": the first word must tell the options apart.
        return not any(word in re.findall(r"[\w'’-]+", option.lower()) for option in others)
    if not (following[0].isupper() or following[0].isdigit()):
        return False
    # A whole sentence behind the full stop is no name.
    return not dotted or (stated and len(re.split(r"[.;\n]", following)[0].split()) > 2)


def is_species(initial: str, word: str, options: tuple[str, ...]) -> bool:
    """Whether an option is a name of two words such as "Clostridium difficile"."""
    pattern = rf"\b{initial}[\w.]*\s+{re.escape(word)}"  # It may be cut, as in "C. diff".
    return any(re.search(pattern, option, re.I) for option in options)
