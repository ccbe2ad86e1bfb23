"""Orders of a question's options, and prompts that fit the model."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from medqlora.data.examples import Example, MultipleChoice
from medqlora.evaluation.method import MAX_PERMUTATIONS, Method, ScoringError
from medqlora.prompts.chat_template import Encoder, MessageEncoder
from medqlora.prompts.encoding import cut_tokens, encode_candidates, encode_prefixes
from medqlora.prompts.styles import Prompt, candidates, render


class TooLongError(ScoringError):
    """A question that needs more tokens than the model can read."""

    def __init__(self, message: str, tokens: int):
        super().__init__(message)
        self.tokens = tokens


def choose_completion(encoder: Encoder | MessageEncoder, method: Method) -> str:
    """Return the completion that prompts are rendered for under this scoring method."""
    if method.scoring == "cloze":
        return "cloze"
    # A letter can be scored only where the answer begins with one.
    if method.scoring == "letters" and encoder.completion not in ("letter", "letter_text"):
        return "letter"
    return encoder.completion


def choose_orders(example: Example, method: Method) -> list[tuple[int, ...]]:
    """Return orders of the options, position -> original number, the given order first.

    The first n orders are cyclic, so that each option stands at each position once; more orders
    come in whole rounds of rotations.
    """
    if not isinstance(example, MultipleChoice) or method.permutations == 1:
        return [tuple(range(len(getattr(example, "options", ()))))]
    n = len(example.options)
    if 1 < method.permutations <= n:
        return [tuple((start + i) % n for i in range(n)) for start in range(method.permutations)]
    wanted = math.factorial(n)
    if method.permutations != 0:
        wanted = min(method.permutations, wanted)
    if wanted > MAX_PERMUTATIONS:
        raise ScoringError(
            f"{example.id}: {wanted} orders of {n} options; ask for at most {MAX_PERMUTATIONS}"
        )
    # Every order is a rotation of exactly one that begins with option 0, so none comes twice.
    first_of_round = ((0, *rest) for rest in itertools.permutations(range(1, n)))
    orders = (order[k:] + order[:k] for order in first_of_round for k in range(n))
    return list(itertools.islice(orders, wanted))


def reorder(example: Example, order: tuple[int, ...]) -> Example:
    """Return the example with its options in another order, and its answer's new position."""
    if not order or order == tuple(range(len(order))):
        return example
    # `order` leads from the new position to the old number, so the way back is a search.
    answer = None if example.answer is None else order.index(example.answer)
    return replace(example, options=tuple(example.options[i] for i in order), answer=answer)


def count_room(method: Method, max_length: int) -> int:
    """Return how many tokens a prompt and an option may have together."""
    if method.scoring == "generate":
        # Each generated token needs a position, and there is no unread last token.
        return max_length - method.max_new_tokens
    # The last token of an option is never read.
    return max_length + 1


def fit_request(
    encoder: Encoder,
    example: Example,
    prompt: Prompt,
    prefix: list[int],
    options: list[list[int]],
    method: Method,
    max_length: int | None,
) -> tuple[list[tuple[list[int], list[int]]], bool]:
    """Return prefixes that fit the model, each with the numbers of the options that it scores, and
    whether something was cut.

    Style lm_eval cuts from the left what stands over `max_length`, more for a longer option, as
    lm-evaluation-harness does; other styles cut the context from its end, as in training.
    """
    every = list(range(len(options)))
    longest = max(len(option) for option in options)
    if max_length is None:
        return [(prefix, every)], False
    room = count_room(method, max_length)
    if len(prefix) + longest <= room:
        return [(prefix, every)], False
    if encoder.style == "lm_eval" and longest < room:
        parts = []
        for length in sorted({len(option) for option in options}):
            members = [i for i in every if len(options[i]) == length]
            parts.append((prefix[max(0, len(prefix) + length - room) :], members))
        return parts, True
    context = "\n".join(getattr(example, "context", ()))
    while context and len(prefix) + longest > room:
        # The shorter text is tokenized anew and may still be too long. Each turn takes at least one
        # character, so the loop ends.
        context = cut_tokens(encoder.tokenizer, context, len(prefix) + longest - room)
        shorter = render(
            example, encoder.style, choose_completion(encoder, method), context=context
        )
        prefix = encode_prefixes(encoder, [replace(prompt, user=shorter.user)])[0]
    if len(prefix) + longest > room:
        needed = len(prefix) + longest - 1
        raise TooLongError(
            f"{example.dataset}: {example.source}: needs {needed} tokens without its context, the"
            f" model has room for {room - 1}; use fewer few-shot examples or new tokens, or leave"
            " such questions out with --drop_too_long",
            needed,
        )
    return [(prefix, every)], True


def fit_evidence(encoder: Encoder, example: Example, method: Method, max_length: int) -> Example:
    """Leave the last passages out until every order of the options fits the model.

    All orders show the same passages, and a passage is never cut.
    """
    completion = choose_completion(encoder, method)
    orders = choose_orders(example, method)
    while getattr(example, "evidence", ()):
        variants = [reorder(example, order) for order in orders]
        prompts = [render(variant, encoder.style, completion) for variant in variants]
        prefixes = encode_prefixes(encoder, prompts)
        longest = 0
        if method.scoring != "generate":
            texts = [candidates(variant, encoder.style, completion) for variant in variants]
            options = encode_candidates(encoder, prompts, prefixes, texts)
            longest = max(len(option) for some in options for option in some)
        if max(map(len, prefixes)) + longest <= count_room(method, max_length):
            break
        example = replace(example, evidence=example.evidence[:-1])
    return example
