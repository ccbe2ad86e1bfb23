"""Text becomes ids and labels.

Prefix and completion are encoded apart, so the training prefix is the inference prefix.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from medqlora.data.examples import DataError, Example, MultipleChoice, OpenAnswer, Passage, Removal
from medqlora.prompts.chat_template import Encoder, encode_text
from medqlora.prompts.styles import Prompt, PromptError, render

if TYPE_CHECKING:  # Its import takes half a second.
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenTable:
    """Tokenized rows, one after the other.

    ids int32 [tokens]; offsets int64 [rows + 1]; prompt_lengths int32 [rows]: unsupervised tokens
    at a row's start (at least 1); names [rows]: example ids, for messages.
    """

    ids: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    names: Sequence[str]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)

    @cached_property
    def supervised(self) -> np.ndarray:
        """Supervised tokens of each row, int64 [rows]."""
        return self.lengths - self.prompt_lengths


BATCH = 1_024  # rows that a thread tokenizes at a time


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Many texts at once, without special tokens and without offsets."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def prefix_text(encoder: Encoder, prompt: Prompt) -> str:
    """Raises PromptError: worked examples for a chat template that cannot show earlier turns."""
    if not prompt.chat:
        return (
            prompt.lead
            + "".join(f"{shot.user}{shot.completion}\n\n" for shot in prompt.shots)
            + prompt.user
        )
    frame = encoder.frame
    if prompt.shots and frame.between is None:
        raise PromptError(
            "this chat template does not keep earlier turns; give few-shot examples with"
            " --prompt_style plain"
        )
    turns = "".join(
        f"{shot.user}{frame.after}{shot.completion}{frame.between}" for shot in prompt.shots
    )
    return frame.before + turns + prompt.user + frame.after


def encode_prefixes(encoder: Encoder, prompts: list[Prompt]) -> list[list[int]]:
    """Token ids of what the model reads: the same for training, evaluation and serving."""
    encoded = encode_texts(encoder.tokenizer, [prefix_text(encoder, prompt) for prompt in prompts])
    return [
        ids if prompt.chat else [*encoder.leading_ids, *ids]
        for prompt, ids in zip(prompts, encoded, strict=True)
    ]


def encode_completions(
    encoder: Encoder, prompts: list[Prompt], completions: list[str]
) -> list[list[int]]:
    """Token ids of completions in their place: each is encoded behind its prefix's last line. No
    end token.
    """
    anchors = [prefix_text(encoder, prompt).rpartition("\n")[2][-64:] for prompt in prompts]
    # An anchor that ends in a newline (most chat templates) is empty here; the newline itself then
    # anchors.
    anchors = [anchor or "\n" for anchor in anchors]
    unique = {pair: None for pair in zip(anchors, completions, strict=True)}
    together = encode_texts(
        encoder.tokenizer, [anchor + completion for anchor, completion in unique]
    )
    alone = dict(
        zip(set(anchors), encode_texts(encoder.tokenizer, list(set(anchors))), strict=True)
    )
    for (anchor, completion), ids in zip(list(unique), together, strict=True):
        head = alone[anchor]
        unique[anchor, completion] = (
            ids[len(head) :]
            if ids[: len(head)] == head
            else encode_text(encoder.tokenizer, completion)
        )
    return [unique[pair] for pair in zip(anchors, completions, strict=True)]


def encode_candidates(
    encoder: Encoder, prompts: list[Prompt], prefixes: list[list[int]], texts: list[list[str]]
) -> list[list[list[int]]]:
    """Token ids of each question's options as completions of its prompt.

    In style lm_eval they are what the joint encoding of prompt and option has after the prompt's
    own length, as in lm-evaluation-harness (`_encode_pair`).
    """
    counts = [len(some) for some in texts]
    repeated = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    flat = iter(encode_completions(encoder, repeated, [text for some in texts for text in some]))
    found = [[next(flat) for _ in range(count)] for count in counts]
    if encoder.style != "lm_eval":
        return found
    whole = [prefix_text(encoder, prompt) for prompt in prompts]
    joint = encode_texts(
        encoder.tokenizer, [text + some[0] for text, some in zip(whole, texts, strict=True)]
    )
    for number, (prefix, ids) in enumerate(zip(prefixes, joint, strict=True)):
        # tokens reach over the border of prompt and option
        if prefix + found[number][0] != [*encoder.leading_ids, *ids]:
            each = encode_texts(encoder.tokenizer, [whole[number] + text for text in texts[number]])
            found[number] = [[*encoder.leading_ids, *ids][len(prefix) :] for ids in each]
    return found


def encode_examples(
    encoder: Encoder, examples: list[Example], max_length: int, drop: bool = False
) -> tuple[TokenTable, list[Removal]]:
    """Tokenize labelled examples for training.

    Context is cut first, then the explanation, never question, options or answer. Passages become
    rows of at most `max_length` tokens, supervised from their second token on. Batches are
    tokenized in threads, which is fastest where the library's own are off
    (TOKENIZERS_PARALLELISM=false): beside those Python would wait for them, and they for Python.

    Raises: DataError: a row without a known answer, or one that does not fit even without context
        (unless `drop`).
    """

    def encode(first: int) -> tuple[np.ndarray, list[str], list[int], list[int], list[Removal]]:
        rows, prompts, dropped = encode_batch(
            encoder, examples[first : first + BATCH], max_length, drop
        )
        # token ids as Python integers take eight times the room of an array
        sizes = [len(ids) for _, ids in rows]
        ids = np.fromiter(
            itertools.chain.from_iterable(ids for _, ids in rows), np.int32, sum(sizes)
        )
        return ids, [name for name, _ in rows], sizes, prompts, dropped

    names = []
    lengths = []
    prompt_lengths = []
    parts = []
    removals = []
    threads = ThreadPoolExecutor(min(os.cpu_count() or 1, 8) + 1)  # more would wait for Python
    try:
        for ids, named, sizes, prompts, dropped in threads.map(
            encode, range(0, len(examples), BATCH)
        ):
            parts.append(ids)
            names += named
            lengths += sizes
            prompt_lengths += prompts
            removals += dropped
    finally:
        threads.shutdown(cancel_futures=True)
    if not lengths:
        raise DataError("no row is left to tokenize; look at the removals above or give more data")
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return (
        TokenTable(np.concatenate(parts), offsets, np.asarray(prompt_lengths, np.int32), names),
        removals,
    )


def encode_batch(
    encoder: Encoder, examples: list[Example], max_length: int, drop: bool
) -> tuple[list[tuple[str, list[int]]], list[int], list[Removal]]:
    """(id, tokens) and prompt length of each row, and removals; see encode_examples."""
    prompts = [render(example, encoder.style, encoder.completion) for example in examples]
    prefixes = encode_prefixes(encoder, prompts)
    completions = encode_completions(
        encoder, prompts, [prompt.completion or "" for prompt in prompts]
    )
    rows = []
    prompt_lengths = []
    removals = []
    for example, prompt, prefix, completion in zip(
        examples, prompts, prefixes, completions, strict=True
    ):
        if isinstance(example, Passage):
            pieces = split_passage(encoder, completion, max_length)
            rows += [(example.id, piece) for piece in pieces]
            prompt_lengths += [1] * len(pieces)
            continue
        problem = None
        if not completion or prompt.completion is None or not prompt.completion.strip():
            problem = "has no answer, so no supervised token"
        elif len(prefix) + len(completion) + 1 > max_length:
            prefix, completion = shorten(encoder, example, max_length)
            length = len(prefix) + len(completion) + 1
            if length > max_length:
                problem = (
                    f"too long: needs {length} tokens without its context, data.max_length is"
                    f" {max_length}"
                )
        if problem is not None:
            if not drop:
                raise DataError(
                    f"{example.dataset}: {example.source}: {problem} (correct it, raise"
                    " data.max_length, or drop such rows with --data.drop_invalid true)"
                )
            removals.append(Removal(example.source, example.id, problem))
            continue
        rows.append((example.id, [*prefix, *completion, encoder.end_id]))
        prompt_lengths.append(len(prefix))
    return rows, prompt_lengths, removals


def split_passage(encoder: Encoder, ids: list[int], max_length: int) -> list[list[int]]:
    """BOS + text + end token, in rows of at most `max_length`; a piece of one token has nothing to
    predict.
    """
    ids = [*encoder.leading_ids, *ids, encoder.end_id]
    return [
        piece for i in range(0, len(ids), max_length) if len(piece := ids[i : i + max_length]) > 1
    ]


def shorten(
    encoder: Encoder, example: MultipleChoice | OpenAnswer, max_length: int
) -> tuple[list[int], list[int]]:
    """Cut context, then explanation, from the end until the row fits; -> (prefix, completion),
    perhaps still too long.
    """
    context = "\n".join(example.context)
    explanation = getattr(example, "explanation", None) or ""
    while True:
        prompt = render(
            example, encoder.style, encoder.completion, context=context, explanation=explanation
        )
        prefix = encode_prefixes(encoder, [prompt])[0]
        completion = encode_completions(encoder, [prompt], [prompt.completion])[0]
        excess = len(prefix) + len(completion) + 1 - max_length
        if excess <= 0:
            return prefix, completion
        if context:
            context = cut_tokens(encoder.tokenizer, context, excess)
        elif explanation and encoder.completion == "explanation":
            explanation = cut_tokens(encoder.tokenizer, explanation, excess)
        else:
            return prefix, completion


def cut_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """Drop at least `count` tokens (and one character) from the end of a text."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    keep = len(offsets) - count
    end = offsets[keep][0] if keep > 0 else 0
    return text[: min(end, len(text) - 1)].rstrip()
