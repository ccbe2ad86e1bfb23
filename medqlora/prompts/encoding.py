"""Prompts and completions become token ids.

Prefix and completion are encoded apart, so the training prefix is the inference prefix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medqlora.prompts.chat_template import Encoder
from medqlora.prompts.literal_text import Piece
from medqlora.prompts.styles import Prompt, PromptError

if TYPE_CHECKING:  # Its import takes half a second.
    from transformers import PreTrainedTokenizerBase


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


def cut_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """Return a text without its last `count` tokens, and at least one character shorter."""
    # Offsets cut the original text. Decoding the tokens that are kept could give another text.
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    keep = len(offsets) - count
    end = offsets[keep][0] if keep > 0 else 0
    return text[: min(end, len(text) - 1)].rstrip()
