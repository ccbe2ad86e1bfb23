"""Prompts -> token ids. The inference prefix is the training prefix, token for token.

A row is `prefix + completion + end token`; only completion and end token are supervised. Prefix and
completion are encoded apart (the completion behind the prefix's last line, so that it gets its
natural tokens), which makes both statements true by construction, for any tokenizer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from medqlora.examples import DataError, Example, MultipleChoice, OpenAnswer, Passage, Removal
from medqlora.prompts import PROBES, Prompt, PromptError, render


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template puts around user turns: `before + user + after + completion + end`;
    `between` stands from a completion to the next user turn (None: the template does not keep
    earlier turns as they were).
    """

    before: str
    after: str
    end: str
    between: str | None = None


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with a resolved prompt style and completion. Build it with `make_encoder`."""

    tokenizer: PreTrainedTokenizerBase
    style: str
    completion: str
    frame: ChatFrame | None
    leading_ids: tuple[int, ...]  # what the tokenizer puts before plain text: its BOS, or nothing
    end_id: int  # end of the completion; what generation stops at


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


def make_encoder(
    tokenizer: PreTrainedTokenizerBase, style: str = "auto", completion: str = "letter"
) -> Encoder:
    """Resolve the style ("auto": chat where the tokenizer has a template) and read the template's
    frame once.

    Raises:
        PromptError: style chat without a template, or a tokenizer without an end token.
    """
    if style == "auto":
        style = "chat" if tokenizer.chat_template else "plain"
    if style == "chat" and not tokenizer.chat_template:
        raise PromptError(
            "prompt_style chat: this tokenizer has no chat template; use plain, or a chat model"
        )
    if tokenizer.eos_token_id is None:
        raise PromptError(
            "this tokenizer has no end-of-sequence token; set eos_token in its"
            " tokenizer_config.json"
        )
    frame = read_frame(tokenizer) if style == "chat" else None
    end_id = encode_text(tokenizer, frame.end)[0] if frame else tokenizer.eos_token_id
    bare = encode_text(tokenizer, "a")
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    leading = full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)]
    return Encoder(tokenizer, style, completion, frame, tuple(leading), end_id)


class TextTokenizer:
    """For servers that tokenize by themselves: token ids are the text's Unicode code points."""

    eos_token_id = 0
    bos_token_id = None
    chat_template = None
    all_special_ids = (0,)

    def __call__(self, text: str | list[str], **_: object) -> dict[str, list]:
        return {
            "input_ids": (
                list(map(ord, text))
                if isinstance(text, str)
                else [list(map(ord, one)) for one in text]
            )
        }

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(map(chr, ids))


BATCH = 1_024  # rows that a thread tokenizes at a time
# ASCII record separator: stands between the turns of a chat that a server will render
TURN = "\x1e"


def make_text_encoder(completion: str = "letter") -> Encoder:
    """An encoder for chat servers: user and assistant turns as text, with TURN after each of
    them.
    """
    return Encoder(TextTokenizer(), "chat", completion, ChatFrame("", TURN, TURN, TURN), (), 0)


def read_frame(tokenizer: PreTrainedTokenizerBase) -> ChatFrame:
    """Render the template around a sentinel instead of once per row (a hundred times faster), and
    check that on text.
    """

    def apply(*turns: str) -> str:
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
        ]
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=len(turns) % 2 == 1,
            # templates that print today's date would make every day another prompt
            date_string="26 Jul 2024",
        )

    user = "<<user text>>"
    assistant = "<<assistant text>>"
    before, found, after = apply(user).partition(user)
    _, found_again, tail = apply(user, assistant).partition(assistant)
    probe = "Which?\nA. one\n\nAnswer."
    if not found or not found_again or apply(probe) != before + probe + after:
        raise PromptError(
            "the chat template changes the text of a message; use --data.prompt_style plain"
        )
    start = encode_text(tokenizer, before)[:2]
    if tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] * 2:
        raise PromptError(
            "the chat template adds a second beginning-of-sequence token; take one bos_token out"
            " of it"
        )
    again = apply(user, assistant, "<<next text>>")
    head = before + user + after + assistant
    middle = again.partition(assistant)[2].partition("<<next text>>")
    between = (
        middle[0] if again == head + middle[0] + "<<next text>>" + after and middle[1] else None
    )
    ids = encode_text(tokenizer, tail)
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    if not ids or ids[0] not in special:
        return ChatFrame(before, after, tokenizer.eos_token, between)
    return ChatFrame(before, after, tokenizer.convert_ids_to_tokens(ids[0]), between)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


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
                    f"{example.dataset}: {example.source}: {problem} (mend it, raise"
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


def fingerprint(encoder: Encoder) -> str:
    """SHA-256 over the token ids of the probe examples: equal if and only if the prompts are (for
    all that they show).
    """
    shown = []
    for probe in PROBES:
        try:
            prompt = render(probe, encoder.style, encoder.completion)
        except PromptError:
            continue
        completion = encode_completions(encoder, [prompt], [prompt.completion])[0]
        shown.append([encode_prefixes(encoder, [prompt])[0], completion, encoder.end_id])
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()
