"""What a server's answer says, read with a check of every value that is used.

Servers differ, and some answer with values of other types, or with fewer than were asked. A value
that is not what it must be raises an error and is never turned into a score.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from medqlora.engines.interface import Answer, EngineError


class AnswerError(EngineError):
    """A request that a server does not answer as it must.

    The message goes on after the words "server ADDRESS".
    """


class RefusedError(AnswerError):
    """A server does not serve this kind of request: it says so, or its answer passes over it."""


ROUNDING = 1e-3  # Rounding may take a log-probability slightly over 0.
# Ends of an answer that the model did not choose: the text is cut, withheld, or no text at all.
UNWANTED_ENDS = ("content_filter", "tool_calls", "function_call")
IS_IT = "; is it an OpenAI-compatible server?"
# How a server's log-probabilities are asked for, from the most exact way to the least.
WAYS = {
    "ids": "by the log-probabilities of their own tokens",
    "echo": "by the log-probabilities of prompts that end in them",
    "top": "among the likeliest first tokens only, where an absent one is unknown",
}
NO_LOGPROBS = "answers without log-probabilities; use --scoring generate"


# Every row depends on these keys and values, by which a server describes itself.
Served = dict[str, str | None]


def read_served(row: dict[str, Any]) -> Served:
    """Return what a server said of itself in a prediction row; empty for other engines."""
    return {name: row[name] for name in ("served_model", "scoring_way") if name in row}


def describe_served(served: Served) -> str:
    """Return what a server said of itself in words."""
    name = served["served_model"]
    text = f"the server answers as model {name}" if name else "the server does not name its model"
    if served["scoring_way"]:
        text += f"; options are scored {WAYS[served['scoring_way']]} ({served['scoring_way']})"
    return text


def parse_answer(content: bytes) -> dict[str, Any]:
    """Return the object of an answer's JSON."""
    try:
        answer = json.loads(content)
    # Too deep a nesting ends the parser's recursion; other errors are ValueErrors.
    except (ValueError, RecursionError):
        beginning = content[:60].decode(errors="replace")
        raise AnswerError(
            f"answers nonsense, not JSON{IS_IT} Its answer begins: {beginning}"
        ) from None
    return expect(answer, dict, "the answer")


def expect(value: Any, kind: type, name: str) -> Any:
    """Return the value, which must be of a kind."""
    if not isinstance(value, kind):
        got = f"{name} of type {type(value).__name__}, expected {kind.__name__}"
        raise AnswerError(f"answers nonsense ({got}){IS_IT}")
    return value


def read_choices(answer: dict[str, Any], count: int = 1) -> list[dict[str, Any]]:
    """Return the choices of an answer in the order of their indexes.

    Args:
        answer: the answer.
        count: how many were asked for.
    """
    if not answer.get("choices"):
        error = f" It says: {answer['error']}" if answer.get("error") else ""
        raise AnswerError(f"answers without choices{IS_IT}{error}")
    choices = expect(answer["choices"], list, '"choices"')
    if len(choices) != count:
        raise AnswerError(f"answers with {len(choices)} choices, expected {count}")
    for choice in choices:
        expect(choice, dict, "a choice")
    indexes = [choice.get("index") for choice in choices]
    # A server that numbers no choice, or its only one otherwise, has not mixed them up.
    if count == 1 or indexes == [None] * count:
        return choices
    if any(type(index) is not int for index in indexes) or sorted(indexes) != [*range(count)]:
        raise AnswerError(f"answers with choices of other indexes than 0 to {count - 1}")
    return sorted(choices, key=lambda choice: choice["index"])


def read_event(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line of an event stream; None for a line without one.

    Raises:
        AnswerError: the object is not JSON, or says that the answer failed.
    """
    field, _, value = line.partition(b":")
    # Other lines are empty, comments, or name a kind of event. The last line of data is no object.
    if field != b"data" or value.strip() in (b"", b"[DONE]"):
        return None
    event = parse_answer(value)
    if event.get("error"):
        raise AnswerError(f"broke off an answer. It says: {event['error']}")
    return event


def read_end(choice: dict[str, Any]) -> str | None:
    """Return why a choice ended; None where it goes on, or where the server does not say."""
    end = choice.get("finish_reason")
    if end is not None and not isinstance(end, str):
        raise AnswerError(f'answers nonsense ("finish_reason" is no text){IS_IT}')
    if end in UNWANTED_ENDS:
        raise AnswerError(f"ended an answer by {end}, so it is not the model's whole text")
    return end


def read_generated(choice: dict[str, Any], chat: bool) -> Answer:
    """Return the answer of a generated choice, or a piece of it."""
    end = read_end(choice)
    if chat:
        # The message of a piece is called delta.
        name = "delta" if "delta" in choice else "message"
        text = expect(choice.get(name), dict, f'"{name}"').get("content")
        # A message without content counts as an empty answer.
        text = "" if text is None else text
    else:
        text = choice.get("text")
    expect(text, str, "the answer's text")
    # A lone surrogate can stand in JSON, but in no file; it becomes the replacement character.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Answer(text, end == "length")


def read_logprob(value: Any) -> float:
    """Return a log-probability."""
    # A number of hundreds of digits is an int that no float holds; true is an int in Python.
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise AnswerError(f"answers with a log-probability of type {type(value).__name__}")
    # NaN fails every comparison.
    if not -1e30 < value <= ROUNDING:
        raise AnswerError(f"answers with a log-probability of {str(value)[:20]}")
    return float(value)


def read_list(choice: dict[str, Any], key: str) -> list[Any]:
    """Return a list of a choice's log-probabilities, such as "top_logprobs"."""
    logprobs = choice.get("logprobs")
    values = logprobs and expect(logprobs, dict, '"logprobs"').get(key)
    if not values:
        raise RefusedError(NO_LOGPROBS)
    return expect(values, list, f'"{key}"')


def read_first_top(choice: dict[str, Any]) -> dict[str, Any]:
    """Return the alternatives of the first token that /completions answered with."""
    first = read_list(choice, "top_logprobs")[0]
    if first is None:
        raise RefusedError(NO_LOGPROBS)
    return expect(first, dict, '"top_logprobs"')


def read_first_alternatives(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the alternatives of the first token that /chat/completions answered with."""
    first = expect(read_list(choice, "content")[0], dict, "a token")
    entries = expect(first.get("top_logprobs"), list, '"top_logprobs"')
    for entry in entries:
        expect(expect(entry, dict, "an alternative").get("token"), str, '"token"')
    if not entries:
        raise RefusedError(NO_LOGPROBS)
    return [(entry["token"], entry.get("logprob")) for entry in entries]


def read_wanted(choice: dict[str, Any], wanted: Sequence[int]) -> list[float]:
    """Return the log-probabilities of token ids."""
    top = read_first_top(choice)
    names = [f"token_id:{token}" for token in wanted]
    missing = sum(name not in top for name in names)
    # Without this an option that a server leaves out would lose against the others.
    if missing:
        raise RefusedError(f"answers without {missing} of {len(wanted)} tokens that were asked for")
    return [read_logprob(top[name]) for name in names]


def read_echo(
    choice: dict[str, Any], ids: list[int], start: int, decode: Callable[[list[int]], str]
) -> float:
    """Return the summed log-probability of a prompt's tokens from `start` on."""
    values = read_list(choice, "token_logprobs")
    # The generated token may follow those of the prompt. Another number shows that the server did
    # not read our ids, and the sum would be over other tokens.
    if not len(ids) <= len(values) <= len(ids) + 1:
        raise RefusedError(f"answers {len(values)} log-probabilities for {len(ids)} tokens")
    tokens = choice["logprobs"].get("tokens")
    if isinstance(tokens, list) and not is_same_text(tokens[start : len(ids)], ids[start:], decode):
        raise AnswerError("echoes other tokens than those of the prompt")
    return sum(read_logprob(value) for value in values[start : len(ids)])


def is_same_text(tokens: list[Any], ids: list[int], decode: Callable[[list[int]], str]) -> bool:
    """Whether a server's tokens are ours, as far as their spelling tells.

    Servers write a token as its id, as its text, or as the vocabulary spells it, with other signs
    for spaces and for characters outside ASCII. Only ASCII letters and digits are compared.
    """
    if tokens == [f"token_id:{token}" for token in ids]:
        return True
    given, expected = "".join(map(str, tokens)), decode(ids)
    simplify = functools.partial(re.sub, r"[^A-Za-z0-9]", "")
    return not expected.isascii() or simplify(given) == simplify(expected)


def pick_options(top: Sequence[tuple[str, Any]], texts: Sequence[str]) -> list[float]:
    """Return each text's log-probability among the most likely first tokens; NaN if absent."""
    wanted = {text.strip() for text in texts}
    best: dict[str, float] = {}
    # " A" and "A" are two tokens; the likelier one counts as the letter's.
    for token, value in top:
        if token.strip() in wanted:
            best[token.strip()] = max(read_logprob(value), best.get(token.strip(), -math.inf))
    # An absent option is less likely than those named, which is all that is known of it.
    return [best.get(text.strip(), math.nan) for text in texts]
