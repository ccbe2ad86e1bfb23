"""Prompts -> token ids. The inference prefix is the training prefix, token for token.

A row is `prefix + completion + end token`; only completion and end token are supervised. Prefix and completion are encoded
apart (the completion behind the prefix's last line, so that it gets its natural tokens), which makes both statements true
by construction, for any tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from medqlora.examples import DataError, Example, MultipleChoice, OpenAnswer, Passage, Removal
from medqlora.prompts import PROBES, Prompt, PromptError, candidates, render


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template puts around one user turn: `before + user + after + completion + end`."""

    before: str
    after: str
    end: str


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

    ids int32 [tokens]; offsets int64 [rows + 1]; prompt_lengths int32 [rows]: unsupervised tokens at a row's start
    (at least 1); names [rows]: example ids, for messages.
    """

    ids: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    names: Sequence[str]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


def make_encoder(tokenizer: PreTrainedTokenizerBase, style: str = "auto", completion: str = "letter") -> Encoder:
    """Resolve the style ("auto": chat where the tokenizer has a template) and read the template's frame once.

    Raises:
        PromptError: style chat without a template, or a tokenizer without an end token.
    """
    if style == "auto":
        style = "chat" if tokenizer.chat_template else "plain"
    if style == "chat" and not tokenizer.chat_template:
        raise PromptError("prompt_style chat: this tokenizer has no chat template; use plain, or a chat model")
    if tokenizer.eos_token_id is None:
        raise PromptError("this tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    frame = read_frame(tokenizer) if style == "chat" else None
    end_id = encode_text(tokenizer, frame.end)[0] if frame else tokenizer.eos_token_id
    bare = encode_text(tokenizer, "a")
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    leading = full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)]
    return Encoder(tokenizer, style, completion, frame, tuple(leading), end_id)


def read_frame(tokenizer: PreTrainedTokenizerBase) -> ChatFrame:
    """Render the template around a sentinel instead of once per row (a hundred times faster), and check that on text."""

    def apply(user: str, assistant: str | None = None) -> str:
        messages = [{"role": "user", "content": user}]
        messages += [{"role": "assistant", "content": assistant}] if assistant is not None else []
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=assistant is None,
            date_string="26 Jul 2024",  # templates that print today's date would make every day another prompt
        )  # fmt: skip

    user, assistant = "<<user text>>", "<<assistant text>>"
    before, found, after = apply(user).partition(user)
    _, found_again, tail = apply(user, assistant).partition(assistant)
    probe = "Which?\nA. one\n\nAnswer."
    if not found or not found_again or apply(probe) != before + probe + after:
        raise PromptError("the chat template changes the text of a message; use --data.prompt_style plain")
    ids = encode_text(tokenizer, tail)
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    if not ids or ids[0] not in special:
        return ChatFrame(before, after, tokenizer.eos_token)
    return ChatFrame(before, after, tokenizer.convert_ids_to_tokens(ids[0]))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Many texts at once, without special tokens and without offsets."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def prefix_text(encoder: Encoder, prompt: Prompt) -> str:
    return encoder.frame.before + prompt.user + encoder.frame.after if prompt.chat else prompt.user


def encode_prefixes(encoder: Encoder, prompts: list[Prompt]) -> list[list[int]]:
    """Token ids of what the model reads: the same for training, evaluation and serving."""
    encoded = encode_texts(encoder.tokenizer, [prefix_text(encoder, prompt) for prompt in prompts])
    return [ids if prompt.chat else [*encoder.leading_ids, *ids] for prompt, ids in zip(prompts, encoded, strict=True)]


def encode_completions(encoder: Encoder, prompts: list[Prompt], completions: list[str]) -> list[list[int]]:
    """Token ids of completions in their place: each is encoded behind its prefix's last line. No end token."""
    anchors = [prefix_text(encoder, prompt).rpartition("\n")[2][-64:] for prompt in prompts]
    # An anchor that ends in a newline (most chat templates) is empty here; the newline itself then anchors.
    anchors = [anchor or "\n" for anchor in anchors]
    unique = {pair: None for pair in zip(anchors, completions, strict=True)}
    together = encode_texts(encoder.tokenizer, [anchor + completion for anchor, completion in unique])
    alone = dict(zip(set(anchors), encode_texts(encoder.tokenizer, list(set(anchors))), strict=True))
    for (anchor, completion), ids in zip(list(unique), together, strict=True):
        head = alone[anchor]
        unique[anchor, completion] = (
            ids[len(head) :] if ids[: len(head)] == head else encode_text(encoder.tokenizer, completion)
        )
    return [unique[pair] for pair in zip(anchors, completions, strict=True)]


def encode_candidates(encoder: Encoder, example: MultipleChoice, prompt: Prompt) -> list[list[int]]:
    """Token ids of each option's letter (or word) as the completion of this prompt."""
    texts = candidates(example, encoder.style)
    return encode_completions(encoder, [prompt] * len(texts), texts)


def encode_examples(
    encoder: Encoder, examples: list[Example], max_length: int, drop: bool = False
) -> tuple[TokenTable, list[Removal]]:
    """Tokenize labelled examples for training.

    Context is cut first, then the explanation, never question, options or answer. Passages become rows of at most
    `max_length` tokens, supervised from their second token on.

    Raises:
        DataError: a row without a known answer, or one that does not fit even without context (unless `drop`).
    """
    prompts = [render(example, encoder.style, encoder.completion) for example in examples]
    prefixes = encode_prefixes(encoder, prompts)
    completions = encode_completions(encoder, prompts, [prompt.completion or "" for prompt in prompts])
    rows, prompt_lengths, names, removals = [], [], [], []
    for example, prompt, prefix, completion in zip(examples, prompts, prefixes, completions, strict=True):
        if isinstance(example, Passage):
            for piece in split_passage(encoder, completion, max_length):
                rows.append(piece)
                prompt_lengths.append(1)
                names.append(example.id)
            continue
        problem = None
        if not completion or prompt.completion is None or not prompt.completion.strip():
            problem = "has no answer, so no supervised token"
        elif len(prefix) + len(completion) + 1 > max_length:
            prefix, completion = shorten(encoder, example, max_length)
            length = len(prefix) + len(completion) + 1
            if length > max_length:
                problem = f"too long: needs {length} tokens without its context, data.max_length is {max_length}"
        if problem is not None:
            if not drop:
                raise DataError(
                    f"{example.dataset}: {example.source}: {problem} (mend it, raise data.max_length, or drop such rows with "
                    "--data.drop_invalid true)"
                )
            removals.append(Removal(example.source, example.id, problem))
            continue
        rows.append([*prefix, *completion, encoder.end_id])
        prompt_lengths.append(len(prefix))
        names.append(example.id)
    if not rows:
        raise DataError("no row is left to tokenize; look at the removals above or give more data")
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    ids = np.fromiter((i for row in rows for i in row), np.int32, offsets[-1])
    return TokenTable(ids, offsets, np.asarray(prompt_lengths, np.int32), names), removals


def split_passage(encoder: Encoder, ids: list[int], max_length: int) -> list[list[int]]:
    """BOS + text + end token, in rows of at most `max_length`; a piece of one token has nothing to predict."""
    ids = [*encoder.leading_ids, *ids, encoder.end_id]
    return [piece for i in range(0, len(ids), max_length) if len(piece := ids[i : i + max_length]) > 1]


def shorten(encoder: Encoder, example: MultipleChoice | OpenAnswer, max_length: int) -> tuple[list[int], list[int]]:
    """Cut context, then explanation, from the end until the row fits; -> (prefix, completion), perhaps still too long."""
    context = "\n".join(example.context)
    explanation = getattr(example, "explanation", None) or ""
    while True:
        prompt = render(example, encoder.style, encoder.completion, context=context, explanation=explanation)
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
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    keep = len(offsets) - count
    end = offsets[keep][0] if keep > 0 else 0
    return text[: min(end, len(text) - 1)].rstrip()


def fingerprint(encoder: Encoder) -> str:
    """SHA-256 over the token ids of the probe examples: equal if and only if the prompts are (for all that they show)."""
    shown = []
    for probe in PROBES:
        try:
            prompt = render(probe, encoder.style, encoder.completion)
        except PromptError:
            continue
        completion = encode_completions(encoder, [prompt], [prompt.completion])[0]
        shown.append([encode_prefixes(encoder, [prompt])[0], completion, encoder.end_id])
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()
