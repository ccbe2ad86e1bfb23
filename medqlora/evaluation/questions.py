"""Examples become what an engine is asked."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from medqlora.data.examples import LETTERS, Example, MultipleChoice, OpenAnswer, Passage
from medqlora.engines.interface import Request
from medqlora.evaluation.journal import hash_id
from medqlora.evaluation.method import MAX_PERMUTATIONS, Method, ScoringError, check_method
from medqlora.evaluation.shots import choose_shots
from medqlora.prompts.chat_template import Encoder, encode_text
from medqlora.prompts.encoding import cut_tokens, encode_candidates, encode_prefixes
from medqlora.prompts.fingerprint import fingerprint
from medqlora.prompts.styles import Prompt, candidates, render


@dataclass
class PreparedQuestion:
    """One example with all that is asked about it. Request i scores the options at the positions
    places[i], counted over all orders one after the other."""

    example: Example
    orders: list[tuple[int, ...]]
    requests: list[Request]
    truncated: bool
    places: list[list[int]] = field(default_factory=list)
    shots: tuple[Prompt, ...] = ()

    def sort(self, scores: list[list[float]]) -> list[float]:
        """Scores of each request -> scores by place."""
        flat = dict(zip(itertools.chain(*self.places), itertools.chain(*scores), strict=True))
        return [flat[place] for place in range(len(flat))]

    def key(self, run_key: str) -> str:
        ids = [[request.prefix, request.options] for request in self.requests]
        return hashlib.sha256(
            json.dumps([run_key, describe_example(self, ""), ids]).encode()
        ).hexdigest()[:32]


def ask(
    encoder: Encoder,
    examples: Sequence[Example],
    method: Method,
    pool: Sequence[Example] = (),
    max_length: int | None = None,
) -> tuple[list[PreparedQuestion], int]:
    """Token ids of everything that is asked.

    Args: pool: labelled examples to take few-shot examples from; those that are asked themselves
        are left out. max_length: tokens that the model can read, an option or answer included.

    Returns:
        an entry per example, and how many tokens all prefixes have in common at their start.

    Raises: ScoringError: a method that does not fit the examples, a question that is too long, too
        small a pool.
    """
    check_method(examples, method, encoder.style)
    if method.scoring == "perplexity":
        return [ask_passage(encoder, example, max_length) for example in examples], 0
    completion = choose_completion(encoder, method)
    shots = choose_shots(encoder, examples, method, pool, completion)
    asked = [
        PreparedQuestion(example, choose_orders(example, method), [], False, shots=some)
        for example, some in zip(examples, shots, strict=True)
    ]
    prompts = []
    variants = []
    for entry in asked:
        for order in entry.orders:
            variant = reorder(entry.example, order)
            prompt = render(variant, encoder.style, completion)
            prompts.append(replace(prompt, shots=entry.shots))
            variants.append(variant)
    prefixes = encode_prefixes(encoder, prompts)
    texts = [
        candidates(v, encoder.style, completion) if method.scoring != "generate" else []
        for v in variants
    ]
    options = (
        encode_candidates(encoder, prompts, prefixes, texts)
        if method.scoring != "generate"
        else [[[]]] * len(texts)
    )
    number = 0
    for entry in asked:
        for order in range(len(entry.orders)):
            parts, cut = fit_request(
                encoder,
                variants[number],
                prompts[number],
                prefixes[number],
                options[number],
                method,
                max_length,
            )
            for prefix, members in parts:
                entry.requests.append(Request(prefix, [options[number][i] for i in members]))
                entry.places.append([order * len(options[number]) + i for i in members])
            entry.truncated |= cut
            number += 1
    return asked, count_common([entry.requests[0].prefix for entry in asked if not entry.truncated])


def choose_completion(encoder: Encoder, method: Method) -> str:
    if method.scoring == "cloze":
        return "cloze"
    if method.scoring == "letters" and encoder.completion not in ("letter", "letter_text"):
        return "letter"
    return encoder.completion


def choose_orders(example: Example, method: Method) -> list[tuple[int, ...]]:
    """Orders of the options: position -> original number, the given order first."""
    if not isinstance(example, MultipleChoice) or method.permutations == 1:
        return [tuple(range(len(getattr(example, "options", ()))))]
    n = len(example.options)
    if 1 < method.permutations <= n:  # cyclic: each option stands at each position once
        return [tuple((start + i) % n for i in range(n)) for start in range(method.permutations)]
    # whole rounds of rotations first
    wanted = (
        math.factorial(n)
        if method.permutations == 0
        else min(method.permutations, math.factorial(n))
    )
    if wanted > MAX_PERMUTATIONS:
        raise ScoringError(
            f"{example.id}: {wanted} orders of {n} options; ask for at most {MAX_PERMUTATIONS}"
        )
    starts = ((0, *rest) for rest in itertools.permutations(range(1, n)))
    return list(
        itertools.islice((order[k:] + order[:k] for order in starts for k in range(n)), wanted)
    )


def reorder(example: Example, order: tuple[int, ...]) -> Example:
    if not order or order == tuple(range(len(order))):
        return example
    answer = None if example.answer is None else order.index(example.answer)
    return replace(example, options=tuple(example.options[i] for i in order), answer=answer)


def fit_request(
    encoder: Encoder,
    example: Example,
    prompt: Prompt,
    prefix: list[int],
    options: list[list[int]],
    method: Method,
    max_length: int | None,
) -> tuple[list[tuple[list[int], list[int]]], bool]:
    """Prefixes that fit the model, each with the options behind it, and whether something was cut.

    Style lm_eval cuts from the left what stands over `max_length`, more for a longer option, as
    lm-evaluation-harness does; other styles cut the context from its end, as in training.
    """
    every = list(range(len(options)))
    room = (
        None
        if max_length is None
        else max_length + 1 - (method.max_new_tokens + 1 if method.scoring == "generate" else 0)
    )
    longest = max(len(option) for option in options)
    if room is None or len(prefix) + longest <= room:
        return [(prefix, every)], False
    if encoder.style == "lm_eval" and longest < room:
        lengths = sorted({len(option) for option in options})
        return [
            (prefix[max(0, len(prefix) + n - room) :], [i for i in every if len(options[i]) == n])
            for n in lengths
        ], True
    context = "\n".join(getattr(example, "context", ()))
    while context and len(prefix) + longest > room:
        context = cut_tokens(encoder.tokenizer, context, len(prefix) + longest - room)
        shorter = render(
            example, encoder.style, choose_completion(encoder, method), context=context
        )
        prefix = encode_prefixes(encoder, [replace(prompt, user=shorter.user)])[0]
    if len(prefix) + longest > room:
        raise ScoringError(
            f"{example.dataset}: {example.source}: needs {len(prefix) + longest - 1} tokens without"
            f" its context, the model has room for {room - 1}; use fewer few-shot examples or new"
            " tokens, or leave the question out"
        )
    return [(prefix, every)], True


def ask_passage(encoder: Encoder, passage: Passage, max_length: int | None) -> PreparedQuestion:
    """Every token of a text is asked for once, in disjoint windows; the last one reads as much
    before it as fits (lm-evaluation-harness: rolling log-likelihood). What stands before the first
    token is BOS, else the end token.
    """
    ids = encode_text(encoder.tokenizer, passage.text)
    tokens = [*(encoder.leading_ids[-1:] or (encoder.end_id,)), *ids]
    width = max_length or len(tokens)
    requests = []
    done = 1
    while done < len(tokens):
        end = min(done + width, len(tokens))
        requests.append(Request(tokens[max(0, end - 1 - width) : done], [tokens[done:end]]))
        done = end
    return PreparedQuestion(passage, [()], requests, False, [[i] for i in range(len(requests))])


def count_common(prefixes: Sequence[list[int]]) -> int:
    """Tokens that all prefixes start with, at least one less than the shortest has."""
    if len(prefixes) < 2:
        return 0
    low = min(prefixes)
    high = max(prefixes)  # lists compare by their first difference
    common = next(
        (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b),
        min(len(low), len(high)),
    )
    return min(common, min(map(len, prefixes)) - 1)


def describe_prompt(encoder: Encoder, method: Method, shots: Sequence[Prompt] = ()) -> str:
    """The prompt's fingerprint: the training prompt's own for plain letters, one that tells also
    the way of asking and the fixed worked examples else."""
    completion = (
        encoder.completion if method.scoring == "cloze" else choose_completion(encoder, method)
    )
    digest = fingerprint(replace(encoder, completion=completion))
    if (
        method.scoring in ("letters", "generate")
        and method.num_fewshot == 0
        and method.permutations == 1
    ):
        return digest
    facts = [
        digest,
        method.scoring,
        method.permutations,
        method.num_fewshot,
        method.fewshot,
        [[shot.user, shot.completion] for shot in shots],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def seed_of(id: str, seed: int) -> int:
    """A batch's own seed, the same in every run that has this batch."""
    return (hash_id(id) + seed) % (1 << 31)


def describe_example(entry: PreparedQuestion, kind: str) -> dict[str, Any]:
    example = entry.example
    facts = {
        "id": example.id,
        "kind": kind,
        "dataset": example.dataset,
        "subject": getattr(example, "subject", None),
    }
    if isinstance(example, MultipleChoice):
        facts |= {
            "topic": example.topic,
            "choice_type": example.choice_type,
            "question": example.question,
            "options": list(example.options),
        }
        facts["gold"] = None if example.answer is None else LETTERS[example.answer]
    elif isinstance(example, OpenAnswer):
        facts |= {"question": example.question, "gold": example.answer}
    if entry.truncated:
        facts["truncated"] = True
    return facts
