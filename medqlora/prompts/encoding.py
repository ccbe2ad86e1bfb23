"""Text becomes ids and labels.

Prefix and completion are encoded apart, so the training prefix is the inference prefix.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from medqlora.data.examples import DataError, Example, MultipleChoice, OpenAnswer, Passage, Removal
from medqlora.prompts.chat_template import Encoder
from medqlora.prompts.literal_text import Piece
from medqlora.prompts.styles import Prompt, PromptError, render

if TYPE_CHECKING:  # Its import takes half a second.
    from transformers import PreTrainedTokenizerBase


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
        cuts: in how many rows the "context", the "explanation" or the "answer" was cut.
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


BATCH = 1_024  # A thread tokenizes this many rows at a time.
ANCHOR = 64  # the characters before a completion that it is encoded behind


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of many texts, without special tokens.

    The fast tokenizer's own batch function is called, which makes no offsets.
    """
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # A tokenizer file may switch these on, and encode_batch_fast would then shorten or lengthen
    # rows.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def prefix_pieces(encoder: Encoder, prompt: Prompt) -> list[Piece]:
    """Return the text that the model reads before it answers, apart by who wrote it.

    Raises:
        PromptError: worked examples for a chat template that cannot show earlier turns.
    """
    if not prompt.chat:
        shots = "".join(f"{shot.user}{shot.completion}\n\n" for shot in prompt.shots)
        # lm-evaluation-harness lets the names of special tokens in questions be tokens.
        return [(prompt.lead + shots + prompt.user, encoder.style == "lm_eval")]
    frame = encoder.frame
    if prompt.shots and frame.between is None:
        raise PromptError(
            "this chat template does not keep earlier turns; give few-shot examples with"
            " --prompt_style plain"
        )
    pieces = [(frame.before, True)]
    for shot in prompt.shots:
        pieces += [(shot.user, False), (frame.earlier, True)]
        pieces += [(shot.completion, False), (frame.between, True)]
    return [*pieces, (prompt.user, False), (frame.after, True)]


def prefix_text(encoder: Encoder, prompt: Prompt) -> str:
    """Return the text that the model reads before it answers; see prefix_pieces."""
    return "".join(text for text, _ in prefix_pieces(encoder, prompt))


def names_special_token(encoder: Encoder, pieces: list[Piece]) -> bool:
    """Whether a text of others names a special token."""
    return any(not ours and encoder.literal.needed(text) for text, ours in pieces)


def encode_prefixes(encoder: Encoder, prompts: list[Prompt]) -> list[list[int]]:
    """Return the token ids that the model reads; training and evaluation both call this."""
    all_pieces = [prefix_pieces(encoder, prompt) for prompt in prompts]
    texts = ["".join(text for text, _ in pieces) for pieces in all_pieces]
    encoded = encode_texts(encoder.tokenizer, texts)
    for number, pieces in enumerate(all_pieces):
        if names_special_token(encoder, pieces):
            encoded[number] = encoder.literal.encode(pieces)
    return [
        ids if prompt.chat else [*encoder.leading_ids, *ids]
        for prompt, ids in zip(prompts, encoded, strict=True)
    ]


def find_anchor(pieces: list[Piece]) -> list[Piece]:
    """Return the last line of a prefix, behind which a completion is encoded.

    Only text near the border changes how the border is tokenized, so a long line is cut.
    """
    anchor: list[Piece] = []
    room = ANCHOR
    for text, ours in reversed(pieces):
        _, newline, line = text.rpartition("\n")
        anchor.insert(0, (line[-room:], ours))
        room -= len(line)
        if newline or room <= 0:
            break
    # Most chat templates end in a newline. The newline itself is then the anchor.
    return anchor if any(text for text, _ in anchor) else [("\n", True)]


def encode_completions(
    encoder: Encoder, prompts: list[Prompt], completions: list[str]
) -> list[list[int]]:
    """Return the token ids of completions in their place, without the end token.

    Each completion is encoded behind the last line of its prefix, its anchor, and keeps the tokens
    after the anchor's own. A completion whose first token reaches over this border is encoded by
    itself.
    """
    encoded = encode_behind_anchors(encoder, prompts, completions)
    crossing = [number for number, ids in enumerate(encoded) if ids is None]
    alone = encode_texts(encoder.tokenizer, [completions[number] for number in crossing])
    for number, ids in zip(crossing, alone, strict=True):
        encoded[number] = ids
    return encoded


def encode_behind_anchors(
    encoder: Encoder, prompts: list[Prompt], completions: list[str]
) -> list[list[int] | None]:
    """Return the token ids of completions, or None where a token reaches over the border.

    Equal pairs of anchor and completion are encoded once.
    """
    trusted = encoder.style == "lm_eval"
    pairs = []
    for prompt, completion in zip(prompts, completions, strict=True):
        anchor = tuple(find_anchor(prefix_pieces(encoder, prompt)))
        gap = encoder.frame.gap if prompt.chat else ""
        pairs.append((anchor, gap, completion))
    distinct = list(dict.fromkeys(pairs))
    heads = ["".join(text for text, _ in anchor) for anchor, _, _ in distinct]
    joint = encode_texts(
        encoder.tokenizer,
        [
            head + gap + completion
            for head, (_, gap, completion) in zip(heads, distinct, strict=True)
        ],
    )
    different_heads = list(dict.fromkeys(heads))
    head_ids = dict(
        zip(different_heads, encode_texts(encoder.tokenizer, different_heads), strict=True)
    )
    encoded = {}
    for pair, head, ids in zip(distinct, heads, joint, strict=True):
        anchor, gap, completion = pair
        start = head_ids[head]
        pieces = [*anchor, (gap, True), (completion, trusted)]
        if names_special_token(encoder, pieces):
            ids = encoder.literal.encode(pieces)
            start = encoder.literal.encode(anchor)
        # Inference reads the anchor's own tokens, so the joint encoding must begin with them.
        encoded[pair] = ids[len(start) :] if ids[: len(start)] == start else None
    return [encoded[pair] for pair in pairs]


def encode_candidates(
    encoder: Encoder, prompts: list[Prompt], prefixes: list[list[int]], texts: list[list[str]]
) -> list[list[list[int]]]:
    """Return the token ids of each question's options as completions of its prompt.

    In style lm_eval they are the tokens that the joint encoding of prompt and option has after the
    prompt's own length, as in lm-evaluation-harness (`_encode_pair`).

    Args:
        encoder: the tokenizer and its prompt style.
        prompts: one per question.
        prefixes: what `encode_prefixes` returned for them.
        texts: the options of each question.
    """
    repeated = []
    flat_texts = []
    for prompt, options in zip(prompts, texts, strict=True):
        repeated += [prompt] * len(options)
        flat_texts += options
    if encoder.style != "lm_eval":
        flat = iter(encode_completions(encoder, repeated, flat_texts))
        return [[next(flat) for _ in options] for options in texts]  # [questions][options][ids]
    flat = iter(encode_behind_anchors(encoder, repeated, flat_texts))
    candidates = [[next(flat) for _ in options] for options in texts]
    whole = [prefix_text(encoder, prompt) for prompt in prompts]
    first_options = [text + options[0] for text, options in zip(whole, texts, strict=True)]
    joint = encode_texts(encoder.tokenizer, first_options)
    for number, (prefix, ids) in enumerate(zip(prefixes, joint, strict=True)):
        found = candidates[number]
        if None not in found and prefix + found[0] == [*encoder.leading_ids, *ids]:
            continue
        # A token reaches over the border of prompt and option.
        each = encode_texts(encoder.tokenizer, [whole[number] + text for text in texts[number]])
        candidates[number] = [[*encoder.leading_ids, *ids][len(prefix) :] for ids in each]
    return candidates


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
    """Cut the context, then the explanation, from the end until the row fits.

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
        if context:
            context = cut_tokens(encoder.tokenizer, context, excess)
            part = "context"
        elif explanation and encoder.completion == "explanation":
            explanation = cut_tokens(encoder.tokenizer, explanation, excess)
            part = "explanation"
        else:
            return prefix, completion, cuts
        if part not in cuts:
            cuts.append(part)


def cut_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """Return a text without its last `count` tokens, and at least one character shorter."""
    # Offsets cut the original text. Decoding the tokens that are kept could give another text.
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    keep = len(offsets) - count
    end = offsets[keep][0] if keep > 0 else 0
    return text[: min(end, len(text) - 1)].rstrip()
