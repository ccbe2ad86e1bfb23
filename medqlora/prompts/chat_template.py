"""Chat templates: a tokenizer's own, rendered once, or a server's, which gets messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medqlora.prompts.styles import Prompt, PromptError

if TYPE_CHECKING:  # Its import takes half a second.
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatFrame:
    """The text that a chat template puts around turns: `before + user + after + completion + end`.

    Attributes:
        before: stands before the first user turn.
        after: stands between a user turn and the completion.
        end: ends the completion; one token.
        between: stands between a completion and the next user turn. None where the template does
            not keep earlier turns as they were.
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
    leading_ids: tuple[int, ...]  # The tokenizer puts these before plain text: its BOS, or nothing.
    end_id: int  # This token ends the completion, and generation stops at it.


def make_encoder(
    tokenizer: PreTrainedTokenizerBase, style: str = "auto", completion: str = "letter"
) -> Encoder:
    """Resolve the prompt style and read the chat template's frame once.

    Args:
        tokenizer: the model's own.
        style: a PromptStyle; "auto" is chat where the tokenizer has a template, plain elsewhere.
        completion: a Completion, what the model writes for a multiple-choice question.

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
    # These tokens stand before plain text alone, because a chat template writes its own beginning.
    # Some tokenizers also append tokens, so what stands before the text is found by searching for
    # it.
    bare = encode_text(tokenizer, "a")
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    leading = full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)]
    return Encoder(tokenizer, style, completion, frame, tuple(leading), end_id)


@dataclass(frozen=True)
class MessageEncoder:
    """Stands in the place of an Encoder where a chat server renders messages by itself.

    It has no tokenizer: requests carry messages, see `make_messages`.
    """

    completion: str = "letter"
    style: str = "chat"


def make_messages(prompt: Prompt) -> list[dict[str, str]]:
    """Return a chat prompt as messages: worked examples as earlier turns, then the question."""
    turns = []
    for shot in prompt.shots:
        turns.append({"role": "user", "content": shot.user})
        turns.append({"role": "assistant", "content": shot.completion})
    return [*turns, {"role": "user", "content": prompt.user}]


def read_frame(tokenizer: PreTrainedTokenizerBase) -> ChatFrame:
    """Render the chat template around a sentinel and return what stands around it.

    Frames are joined with each row's text, which is a hundred times faster than rendering the
    template for each row. A probe text shows that both give the same.

    Raises:
        PromptError: the template changes the text of a message, or doubles the BOS token.
    """

    def apply(*turns: str) -> str:
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
        ]
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=len(turns) % 2 == 1,
            # Templates that print today's date would give another prompt every day.
            date_string="26 Jul 2024",
        )

    user = "<<user text>>"
    assistant = "<<assistant text>>"
    before, user_kept, after = apply(user).partition(user)
    _, assistant_kept, tail = apply(user, assistant).partition(assistant)
    probe = "Which?\nA. one\n\nAnswer."
    # The probe has line breaks, which a template that reformats texts would change.
    if not user_kept or not assistant_kept or apply(probe) != before + probe + after:
        raise PromptError("the chat template changes the text of a message; use prompt_style plain")
    # encode_text adds no special tokens, so both of two BOS tokens come from the template.
    start = encode_text(tokenizer, before)[:2]
    if tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] * 2:
        raise PromptError(
            "the chat template adds a second beginning-of-sequence token; take one bos_token out"
            " of it"
        )
    next_user = "<<next text>>"
    head = before + user + after + assistant
    conversation = apply(user, assistant, next_user)
    between = conversation.partition(assistant)[2].partition(next_user)[0]
    # Some templates change an earlier answer once another turn follows. Such a frame allows no
    # worked examples, because it cannot express the change.
    if not between or conversation != head + between + next_user + after:
        between = None
    # A turn ends at the template's own token if it has one, such as <|im_end|>. Elsewhere the
    # tokenizer's end-of-sequence token is taken.
    ids = encode_text(tokenizer, tail)
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    if not ids or ids[0] not in special:
        return ChatFrame(before, after, tokenizer.eos_token, between)
    return ChatFrame(before, after, tokenizer.convert_ids_to_tokens(ids[0]), between)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
