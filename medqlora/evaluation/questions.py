"""Examples become the requests that an engine is asked."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from medqlora.core.seeds import fit_seed
from medqlora.data.examples import LETTERS, Example, MultipleChoice, OpenAnswer, Passage
from medqlora.engines.interface import ChatRequest, Request
from medqlora.evaluation.fitting import (
    TooLongError,
    choose_completion,
    choose_orders,
    fit_evidence,
    fit_request,
    reorder,
)
from medqlora.evaluation.journal import hash_id
from medqlora.evaluation.method import Method, ScoringError, check_method
from medqlora.evaluation.shots import choose_shots
from medqlora.prompts.chat_template import Encoder, MessageEncoder, encode_text, make_messages
from medqlora.prompts.encoding import encode_candidates, encode_prefixes
from medqlora.prompts.fingerprint import fingerprint
from medqlora.prompts.styles import Prompt, candidates, render


@dataclass
class PreparedQuestion:
    """One example with everything that an engine is asked about it.

    Attributes:
        example: the question.
        orders: orders of the options, position -> original number; the given order comes first.
        requests: prompts with the options that each of them scores.
        truncated: whether a prompt was cut to fit the model.
        places: for each request, the positions of the options it scores, counted over all orders
            one after the other.
        shots: worked examples that stand before the question.
        too_long: tokens that its prompt needs, where the model cannot read so many; such a question
            has no requests.
    """

    example: Example
    orders: list[tuple[int, ...]]
    requests: list[Request] | list[ChatRequest]
    truncated: bool
    places: list[list[int]] = field(default_factory=list)
    shots: tuple[Prompt, ...] = ()
    too_long: int | None = None

    def sort(self, scores: list[list[float]]) -> list[float]:
        """Bring the scores of each request into the order of `places`."""
        places = itertools.chain(*self.places)
        # The keys are places over all orders, the values log-probabilities.
        by_place = dict(zip(places, itertools.chain(*scores), strict=True))
        return [by_place[place] for place in range(len(by_place))]

    def key(self, run_key: str) -> str:
        """Return a hash of everything that the question's prediction row depends on."""
        # Token ids, or messages, stand for template, style and worked examples at once.
        ids = [[request.prefix, request.options] for request in self.requests]
        return hashlib.sha256(
            json.dumps([run_key, describe_example(self, ""), ids]).encode()
        ).hexdigest()[:32]


def prepare_questions(
    encoder: Encoder | MessageEncoder,
    examples: Sequence[Example],
    method: Method,
    pool: Sequence[Example] = (),
    max_length: int | None = None,
    drop_too_long: bool = False,
) -> tuple[list[PreparedQuestion], int]:
    """Make the requests of all examples.

    Args:
        encoder: makes token ids of prompts, or messages for a chat server.
        examples: what is asked.
        method: how it is asked.
        pool: labelled examples to take few-shot examples from; those that are asked themselves
            are left out.
        max_length: tokens that the model can read, an option or answer included; None is any.
        drop_too_long: gives a question that is too long no requests, instead of raising.

    Returns:
        An entry per example, and how many tokens all prefixes have in common at their start.

    Raises:
        ScoringError: a method that does not fit the examples or a chat server, a question that is
            too long, or too small a pool.
    """
    check_method(examples, method, encoder.style)
    chat_server = isinstance(encoder, MessageEncoder)
    if chat_server and method.scoring not in ("letters", "generate"):
        raise ScoringError(
            f"--scoring {method.scoring} needs log-probabilities of whole texts, and --api chat"
            " knows the first token's only; use --api completions, or --scoring letters or generate"
        )
    if method.scoring == "perplexity":
        return [prepare_passage(encoder, example, max_length) for example in examples], 0
    completion = choose_completion(encoder, method)
    whole_examples = examples
    if not chat_server and max_length is not None:
        examples = [fit_evidence(encoder, example, method, max_length) for example in examples]
    shots = choose_shots(encoder, examples, method, pool, completion)
    # `prompts` and `variants` are flat: they have one entry per question and order.
    questions = []
    prompts = []
    variants = []
    for example, whole, some in zip(examples, whole_examples, shots, strict=True):
        cut = example is not whole
        entry = PreparedQuestion(example, choose_orders(example, method), [], cut, shots=some)
        questions.append(entry)
        for order in entry.orders:
            variant = reorder(example, order)
            prompt = render(variant, encoder.style, completion)
            prompts.append(replace(prompt, shots=some))
            variants.append(variant)
    # Options are encoded together further down, because the tokenizer works in batches.
    texts: list[list[str]] = [[] for _ in variants]
    if method.scoring != "generate":
        texts = [candidates(variant, encoder.style, completion) for variant in variants]
    if chat_server:
        add_messages(questions, prompts, texts)
        return questions, 0
    add_token_ids(encoder, questions, variants, prompts, texts, method, max_length, drop_too_long)
    asked = [entry for entry in questions if entry.requests]
    if not asked:
        raise ScoringError(
            f"each of the {len(questions)} questions needs, with its answer, more than the"
            f" {max_length} tokens that the model can read; use fewer few-shot examples or new"
            " tokens, or a larger --max_length"
        )
    # A prompt that was cut from the left no longer begins as the others do.
    whole = [entry.requests[0].prefix for entry in asked if not entry.truncated]
    return questions, count_common(whole)


def add_messages(
    questions: Sequence[PreparedQuestion], prompts: Sequence[Prompt], texts: Sequence[list[str]]
) -> None:
    """Add one request of messages per question and order."""
    number = 0
    for entry in questions:
        for order in range(len(entry.orders)):
            options = texts[number]
            entry.requests.append(ChatRequest(make_messages(prompts[number]), options))
            # Order k of n options has the places from k * n on.
            entry.places.append([order * len(options) + i for i in range(len(options))])
            number += 1


def add_token_ids(
    encoder: Encoder,
    questions: Sequence[PreparedQuestion],
    variants: Sequence[Example],
    prompts: list[Prompt],
    texts: list[list[str]],
    method: Method,
    max_length: int | None,
    drop_too_long: bool,
) -> None:
    """Add the requests of token ids of each question and order.

    Args:
        encoder: makes the token ids.
        questions: the entries to add requests to.
        variants, prompts, texts: one per question and order: the reordered example, its prompt and
            the texts of its options.
        method, max_length, drop_too_long: see `prepare_questions`.
    """
    prefixes = encode_prefixes(encoder, prompts)
    # A generated answer has no options; an empty one keeps the lengths' arithmetic the same.
    options: list[list[list[int]]] = [[[]]] * len(texts)
    if method.scoring != "generate":
        options = encode_candidates(encoder, prompts, prefixes, texts)
    number = 0
    for entry in questions:
        for order in range(len(entry.orders)):
            try:
                parts, cut = fit_request(
                    encoder,
                    variants[number],
                    prompts[number],
                    prefixes[number],
                    options[number],
                    method,
                    max_length,
                )
            except TooLongError as error:
                if not drop_too_long:
                    raise
                entry.too_long = max(entry.too_long or 0, error.tokens)
                parts, cut = [], False
            for prefix, members in parts:
                entry.requests.append(Request(prefix, [options[number][i] for i in members]))
                entry.places.append([order * len(options[number]) + i for i in members])
            entry.truncated |= cut
            number += 1
        # A question is asked in all of its orders or in none.
        if entry.too_long:
            entry.requests, entry.places, entry.truncated = [], [], False


def prepare_passage(encoder: Encoder, passage: Passage, max_length: int | None) -> PreparedQuestion:
    """Make requests that ask for every token of a text once, in disjoint windows.

    The last window reads as many tokens before it as fit, as in lm-evaluation-harness's rolling
    log-likelihood. BOS stands before the first token, or the end token where there is no BOS.
    """
    ids = encode_text(encoder.tokenizer, passage.text)
    tokens = [*(encoder.leading_ids[-1:] or (encoder.end_id,)), *ids]
    width = max_length or len(tokens)  # tokens that the model reads at once
    requests = []
    # The first token is given and not scored.
    done = 1
    while done < len(tokens):
        end = min(done + width, len(tokens))
        # A window of `width` tokens ends before the last scored one, which is not read.
        requests.append(Request(tokens[max(0, end - 1 - width) : done], [tokens[done:end]]))
        done = end
    return PreparedQuestion(passage, [()], requests, False, [[i] for i in range(len(requests))])


def count_common(prefixes: Sequence[list[int]]) -> int:
    """Count the tokens that all prefixes start with, at most one less than the shortest has."""
    if len(prefixes) < 2:
        return 0
    # Lists compare by their first difference, so the two extremes differ first.
    low = min(prefixes)
    high = max(prefixes)
    common = min(len(low), len(high))
    for position, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            common = position
            break
    return min(common, min(map(len, prefixes)) - 1)


def describe_prompt(
    encoder: Encoder | MessageEncoder,
    method: Method,
    shots: Sequence[Prompt] = (),
    passages: Sequence[Any] = (),
) -> str:
    """Return the prompt's fingerprint, as SHA-256.

    Plain letters have the training prompt's own fingerprint. Any other method has one that also
    depends on the method, on the fixed worked examples, and on what describe_passages returns.
    """
    if method.scoring == "cloze":
        completion = encoder.completion
    else:
        completion = choose_completion(encoder, method)
    digest = fingerprint(replace(encoder, completion=completion))
    by_training = method.scoring in ("letters", "generate")
    if by_training and method.num_fewshot == 0 and method.permutations == 1 and not passages:
        return digest
    parts = [
        digest,
        method.scoring,
        method.permutations,
        method.num_fewshot,
        method.fewshot,
        [[shot.user, shot.completion] for shot in shots],
    ]
    if passages:
        parts.append(list(passages))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def describe_passages(questions: Sequence[PreparedQuestion]) -> list[Any]:
    """Return the SHA-256 of the texts that the questions' passages come from, and the largest
    number of passages of a question; an empty list without passages.
    """
    shown = [getattr(question.example, "evidence", ()) for question in questions]
    libraries = {piece.library for some in shown for piece in some}
    return [sorted(libraries), max(map(len, shown))] if libraries else []


def derive_seed(id: str, seed: int) -> int:
    """Return a batch's own seed, the same in every run that has this batch."""
    return (hash_id(id) + fit_seed(seed, 31)) % (1 << 31)


def describe_example(entry: PreparedQuestion, kind: str) -> dict[str, Any]:
    """Return the part of a prediction row that the example gives."""
    example = entry.example
    row = {
        "id": example.id,
        "kind": kind,
        "dataset": example.dataset,
        "subject": getattr(example, "subject", None),
    }
    if isinstance(example, MultipleChoice):
        row |= {
            "topic": example.topic,
            "choice_type": example.choice_type,
            "question": example.question,
            "options": list(example.options),
        }
        row["gold"] = None if example.answer is None else LETTERS[example.answer]
    elif isinstance(example, OpenAnswer):
        row |= {"question": example.question, "gold": example.answer}
    if getattr(example, "evidence", ()):
        row["passages"] = [
            {"id": piece.id, "source": piece.source, "text": piece.text}
            for piece in example.evidence
        ]
    if example.columns:
        row["columns"] = dict(example.columns)
    if entry.truncated:
        row["truncated"] = True
    return row
