"""Examples become tokenized training rows."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from medqlora.data.examples import DataError, Example, MultipleChoice, OpenAnswer, Passage, Removal
from medqlora.prompts.chat_template import Encoder
from medqlora.prompts.encoding import cut_tokens, encode_completions, encode_prefixes
from medqlora.prompts.styles import render

BATCH = 1_024  # A thread tokenizes this many rows at a time.


@dataclass(frozen=True)
class TokenTable:
    """Tokenized rows, one after the other.

    Attributes:
        ids: token ids of all rows, int32 [tokens].
        offsets: where each row begins in `ids`, and the end of the last one, int64 [rows + 1].
        prompt_lengths: unsupervised tokens at each row's start, at least one, int32 [rows].
        names: ids of the rows' examples, for messages. Two examples may have the same id.
        examples: numbers of the rows' examples in the list that was tokenized, int32 [rows]. A
            row of several passages has the number of its first one.
        cuts: in how many rows the "context", the "explanation" or the "answer" was cut, or
            "passages" were left out.
    """

    ids: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    names: Sequence[str]
    examples: np.ndarray
    cuts: dict[str, int] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)

    @cached_property
    def supervised(self) -> np.ndarray:
        """Supervised tokens of each row, int64 [rows]."""
        return self.lengths - self.prompt_lengths


@dataclass(frozen=True)
class Limits:
    """What a training row may be.

    Args:
        max_length: the longest row in tokens.
        drop: lists rows that cannot be used as removals instead of raising at the first.
        truncate_answers: cuts the answer of an open question that does not fit without its context.
    """

    max_length: int
    drop: bool
    truncate_answers: bool


@dataclass
class EncodedBatch:
    """The rows of a few consecutive examples.

    Args:
        rows: the number of each row's example and the row's token ids.
        prompt_lengths: unsupervised tokens at each row's start.
        removals: examples that could not be used.
        cuts: in how many rows each part was cut (see TokenTable).
    """

    rows: list[tuple[int, list[int]]] = field(default_factory=list)
    prompt_lengths: list[int] = field(default_factory=list)
    removals: list[Removal] = field(default_factory=list)
    cuts: Counter[str] = field(default_factory=Counter)


def encode_examples(
    encoder: Encoder,
    examples: list[Example],
    max_length: int,
    drop: bool = False,
    truncate_answers: bool = False,
) -> tuple[TokenTable, list[Removal]]:
    """Tokenize labelled examples for training.

    Context is cut first, then the explanation, never question, options or letter. Consecutive
    passages of one document fill rows of `max_length` tokens, supervised from their second token
    on. Batches are tokenized in threads. This is fastest where the tokenizers library has no
    threads of its own (TOKENIZERS_PARALLELISM=false): beside those, Python and the library would
    wait for each other.

    Args:
        encoder: the tokenizer and its prompt style.
        examples: labelled examples.
        max_length, drop, truncate_answers: see Limits.

    Raises:
        DataError: a row without a known answer, or one that does not fit even without context.
    """

    limits = Limits(max_length, drop, truncate_answers)

    def encode(first: int, last: int) -> tuple[np.ndarray, list[int], EncodedBatch]:
        batch = encode_batch(encoder, examples[first:last], limits)
        # Token ids as Python integers take eight times the memory of an array.
        sizes = [len(ids) for _, ids in batch.rows]
        ids = np.fromiter(  # int32 [tokens of the batch]
            itertools.chain.from_iterable(ids for _, ids in batch.rows), np.int32, sum(sizes)
        )
        batch.rows = [(first + number, []) for number, _ in batch.rows]
        return ids, sizes, batch

    numbers = []
    lengths = []
    prompt_lengths = []
    parts = []
    removals = []
    cuts: Counter[str] = Counter()
    borders = choose_borders(examples)
    # More threads would only wait for Python.
    threads = ThreadPoolExecutor(min(os.cpu_count() or 1, 8) + 1)
    try:
        # `map` returns batches in their order, so row numbers do not depend on the threads.
        for ids, sizes, batch in threads.map(encode, borders[:-1], borders[1:]):
            parts.append(ids)
            numbers += [number for number, _ in batch.rows]
            lengths += sizes
            prompt_lengths += batch.prompt_lengths
            removals += batch.removals
            cuts += batch.cuts
    finally:
        threads.shutdown(cancel_futures=True)
    if not lengths:
        raise DataError("no row is left to tokenize; look at the removals above or give more data")
    # All rows together may have more tokens than int32 can count.
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    table = TokenTable(
        np.concatenate(parts),
        offsets,
        np.asarray(prompt_lengths, np.int32),
        [examples[number].id for number in numbers],
        np.asarray(numbers, np.int32),
        dict(cuts),
    )
    return table, removals


def choose_borders(examples: list[Example]) -> list[int]:
    """Return where batches of about BATCH examples begin, and the end of the last one.

    No border divides a document, because its passages are joined inside a batch.
    """
    borders = [0]
    while borders[-1] < len(examples):
        end = min(borders[-1] + BATCH, len(examples))
        while end < len(examples) and continues(examples[end - 1], examples[end]):
            end += 1
        borders.append(end)
    return borders


def continues(first: Example, second: Example) -> bool:
    """Whether an example is the passage that follows another one in its document."""
    if not isinstance(first, Passage) or not isinstance(second, Passage):
        return False
    # A passage that was removed leaves a gap, over which texts must not be joined.
    return first.document == second.document != "" and second.place == first.place + 1


def encode_batch(encoder: Encoder, examples: list[Example], limits: Limits) -> EncodedBatch:
    """Tokenize a few consecutive examples; see encode_examples."""
    prompts = [render(example, encoder.style, encoder.completion) for example in examples]
    completions = [prompt.completion or "" for prompt in prompts]
    for number, (first, second) in enumerate(itertools.pairwise(examples)):
        if continues(first, second):
            # A document has an empty line between its passages.
            completions[number] += "\n\n"
    prefixes = encode_prefixes(encoder, prompts)
    answers = encode_completions(encoder, prompts, completions)
    batch = EncodedBatch()
    document: list[int] = []  # the token ids of a document that is not yet complete
    begin = 0  # the number of its first passage
    for number, example in enumerate(examples):
        if not isinstance(example, Passage):
            # A completion of blanks alone is no answer, although it has tokens.
            answer = answers[number] if completions[number].strip() else []
            encode_row(encoder, batch, number, example, prefixes[number], answer, limits)
            continue
        if not document:
            begin = number
        document += answers[number]
        if number + 1 < len(examples) and continues(example, examples[number + 1]):
            continue
        pieces = split_document(encoder, document, limits.max_length)
        batch.rows += [(begin, piece) for piece in pieces]
        # Nothing stands before the first token of a piece, so it is never a target. `collate` needs
        # at least one such token per row, or a target would be predicted from the row before.
        batch.prompt_lengths += [1] * len(pieces)
        document = []
    return batch


def encode_row(
    encoder: Encoder,
    batch: EncodedBatch,
    number: int,
    example: MultipleChoice | OpenAnswer,
    prefix: list[int],
    answer: list[int],
    limits: Limits,
) -> None:
    """Add the row of one question to a batch, or its removal.

    Args:
        encoder: the tokenizer and its prompt style.
        batch: the batch, which is changed.
        number: the number of the example in the batch.
        example: the question.
        prefix, answer: token ids of its prompt and completion.
        limits: what a row may be.

    Raises:
        DataError: the row cannot be used and may not be dropped.
    """
    # The end token is supervised, because a model without it as a target does not learn to stop.
    end = [encoder.end_id]
    hint = ""
    problem = None
    cuts: list[str] = []
    if not answer:
        problem = "has no answer, so no supervised token"
    elif len(prefix) + len(answer) + 1 > limits.max_length:
        prefix, answer, cuts = shorten(encoder, example, limits.max_length)
        room = limits.max_length - len(prefix)
        is_open = isinstance(example, OpenAnswer)
        if len(answer) + 1 > room > 0 and is_open and limits.truncate_answers:
            # An answer without its end must not teach the model to stop there.
            answer = answer[:room]
            end = []
            cuts.append("answer")
        elif len(answer) + 1 > room:
            hint = ", or cut such answers with --data.truncate answer" if is_open else ""
            problem = (
                f"too long: needs {len(prefix) + len(answer) + 1} tokens without its context,"
                f" data.max_length is {limits.max_length}"
            )
    if problem is None:
        batch.rows.append((number, [*prefix, *answer, *end]))
        batch.prompt_lengths.append(len(prefix))
        batch.cuts.update(cuts)
        return
    if not limits.drop:
        raise DataError(
            f"{example.dataset}: {example.source}: {problem} (correct it, raise data.max_length, or"
            f" drop such rows with --data.drop_invalid true{hint})"
        )
    batch.removals.append(Removal(example.source, example.id, problem))


def split_document(encoder: Encoder, ids: list[int], max_length: int) -> list[list[int]]:
    """Return BOS, text and end token in rows of `max_length` tokens, the last one maybe shorter."""
    ids = [*encoder.leading_ids, *ids, encoder.end_id]
    pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    # A piece of one token has nothing to predict.
    return [piece for piece in pieces if len(piece) > 1]


def shorten(
    encoder: Encoder, example: MultipleChoice | OpenAnswer, max_length: int
) -> tuple[list[int], list[int], list[str]]:
    """Leave passages out, the last first, then cut context and explanation from their end, until
    the row fits.

    Returns the token ids of prefix and completion, which may still be too long, and the names of
    the parts that were cut.
    """
    context = "\n".join(example.context)
    explanation = getattr(example, "explanation", None) or ""
    cuts: list[str] = []
    # Tokens may join where text is cut out, so a row is encoded again until it fits. Each round
    # cuts at least one character, so the loop ends.
    while True:
        prompt = render(
            example, encoder.style, encoder.completion, context=context, explanation=explanation
        )
        prefix = encode_prefixes(encoder, [prompt])[0]
        completion = encode_completions(encoder, [prompt], [prompt.completion])[0]
        excess = len(prefix) + len(completion) + 1 - max_length
        if excess <= 0:
            return prefix, completion, cuts
        if example.evidence:
            # Numbered passages stay whole, and the first ones are the most similar to the question.
            example = replace(example, evidence=example.evidence[:-1])
            part = "passages"
        elif context:
            context = cut_tokens(encoder.tokenizer, context, excess)
            part = "context"
        elif explanation and encoder.completion == "explanation":
            explanation = cut_tokens(encoder.tokenizer, explanation, excess)
            part = "explanation"
        else:
            return prefix, completion, cuts
        if part not in cuts:
            cuts.append(part)
