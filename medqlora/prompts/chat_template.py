"""A tokenizer's chat template, rendered once around a sentinel instead of once per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medqlora.prompts.styles import PromptError

if TYPE_CHECKING:  # Its import takes half a second.
    from transformers import PreTrainedTokenizerBase


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
