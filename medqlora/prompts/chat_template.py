"""Chat templates: a tokenizer's own, rendered once, or a server's, which gets messages."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from medqlora.core.reading import shorten
from medqlora.prompts.literal_text import LiteralTokenizer
from medqlora.prompts.styles import Prompt, PromptError

if TYPE_CHECKING:  # Its import takes half a second.
    from transformers import PreTrainedTokenizerBase


# Templates that show the date are given this one. With the present day, the prompts of today would
# not be those of tomorrow.
FIXED_DAY = datetime(2024, 7, 26)
# A generation prompt that ends in one of these tags lets the model think before it answers.
OPEN_TAG = re.compile(r"<(think|thinking|thought|reasoning)>\s*$")
LONGEST = 20  # seconds; templates of real models take milliseconds
# These arguments of apply_chat_template are ours.
OWN_ARGUMENTS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "date_string",
    "messages",
    "strftime_now",
    "tokenize",
}


@dataclass(frozen=True)
class ChatFrame:
    """The text that a chat template puts around turns.

    A prompt with its completion is `before + user + after + gap + completion + end`.

    Attributes:
        before: stands before the first user turn.
        after: stands between a user turn and the completion.
        end: ends the completion; one token.
        gap: blanks before a completion that are encoded with it, because most tokenizers join a
            blank to the word behind it.
        earlier: stands between a user turn and the completion of an earlier turn.
        between: stands between an earlier completion and the next user turn. None, as `earlier`,
            where the template does not keep earlier turns as they were.
    """

    before: str
    after: str
    end: str
    gap: str = ""
    earlier: str | None = None
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

    @cached_property
    def literal(self) -> LiteralTokenizer:
        """The tokenizer for texts that name special tokens."""
        return LiteralTokenizer(self.tokenizer)


def make_encoder(
    tokenizer: PreTrainedTokenizerBase,
    style: str = "auto",
    completion: str = "letter",
    template_arguments: Mapping[str, Any] | None = None,
) -> Encoder:
    """Resolve the prompt style and read the chat template's frame once.

    Args:
        tokenizer: the model's own.
        style: a PromptStyle; "auto" is chat where the tokenizer has a template, plain elsewhere.
        completion: a Completion, what the model writes for a multiple-choice question.
        template_arguments: values of the chat template's own arguments, such as enable_thinking.

    Raises:
        PromptError: style chat without a template, a template without such arguments, or a
            tokenizer without an end token.
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
    arguments = dict(template_arguments or {})
    check_arguments(tokenizer, style, arguments)
    frame = read_frame_in_time(tokenizer, arguments) if style == "chat" else None
    end_id = encode_text(tokenizer, frame.end)[0] if frame else tokenizer.eos_token_id
    # These tokens stand before plain text alone, because a chat template writes its own beginning.
    # Some tokenizers also append tokens, so what stands before the text is found by searching for
    # it.
    bare = encode_text(tokenizer, "a")
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    leading = full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)]
    return Encoder(tokenizer, style, completion, frame, tuple(leading), end_id)


def check_arguments(
    tokenizer: PreTrainedTokenizerBase, style: str, arguments: Mapping[str, Any]
) -> None:
    """Refuse arguments that the chat template does not read; Jinja would pass over them.

    Raises:
        PromptError: the style has no template, or the template has no such argument.
    """
    if arguments and style != "chat":
        raise PromptError(
            f"template_arguments {', '.join(arguments)}: prompt_style {style} has no chat template;"
            " leave them out"
        )
    for name in arguments:
        known = re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template))
        if name in OWN_ARGUMENTS or not known:
            raise PromptError(
                f"template_arguments {name}: this model's chat template has no such argument; leave"
                " it out, or look for its name in the template"
            )


@dataclass(frozen=True)
class MessageEncoder:
    """Stands in the place of an Encoder where a chat server renders messages by itself.

    It has no tokenizer: requests carry messages, see `make_messages`. The server gets the template
    arguments with them.
    """

    completion: str = "letter"
    style: str = "chat"
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


def make_messages(prompt: Prompt) -> list[dict[str, str]]:
    """Return a chat prompt as messages: worked examples as earlier turns, then the question."""
    turns = []
    for shot in prompt.shots:
        turns.append({"role": "user", "content": shot.user})
        turns.append({"role": "assistant", "content": shot.completion})
    return [*turns, {"role": "user", "content": prompt.user}]


def render_template(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], arguments: Mapping[str, Any]
) -> str:
    """Return what the chat template makes of turns by user and assistant; the user begins.

    After a turn of the user, the generation prompt follows.

    Raises:
        PromptError: the template fails.
    """
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=stop_clock(tokenizer.get_chat_template()),
            tokenize=False,
            add_generation_prompt=len(turns) % 2 == 1,
            # Some templates take a date as an argument, and others ask the clock.
            date_string=FIXED_DAY.strftime("%d %b %Y"),
            **arguments,
        )
    # A template is a program, which may fail in any way.
    except Exception as error:  # noqa: BLE001
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 200)
        raise PromptError(
            f"the chat template cannot be rendered: {reason}; correct it in the tokenizer's folder,"
            " or use prompt_style plain"
        ) from None


def stop_clock(template: str) -> str:
    """Return a chat template whose function `strftime_now` tells FIXED_DAY.

    transformers passes no functions to a template. A macro of the same name goes before the
    function, and knows the day in every format that the template writes.
    """
    if "strftime_now" not in template:
        return template
    formats = {text for _, text in re.findall(r"""(["'])([^"']*%[^"']*)\1""", template)}
    days = json.dumps({text: FIXED_DAY.strftime(text) for text in sorted(formats)})
    # The empty text at the end keeps Jinja from trimming the template behind the macro.
    macro = "{% macro strftime_now(format) %}{{ " + days + "[format] }}{% endmacro %}{{ '' }}"
    return macro + template


def read_frame_in_time(
    tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
) -> ChatFrame:
    """Return the result of read_frame; a template may loop for hours.

    Raises:
        PromptError: read_frame refuses the template, or it is not rendered within LONGEST seconds.
    """
    results: list[ChatFrame | Exception] = []

    def work() -> None:
        try:
            results.append(read_frame(tokenizer, arguments))
        except Exception as error:  # noqa: BLE001
            results.append(error)  # It is raised below, in the thread that the caller knows.

    # The end of the program does not wait for a daemon thread.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(LONGEST)
    if not results:
        raise PromptError(
            f"the chat template is not rendered within {LONGEST} seconds; correct it in the"
            " tokenizer's folder, or use prompt_style plain"
        )
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def read_frame(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> ChatFrame:
    """Render the chat template around a sentinel and return what stands around it.

    Frames are joined with each row's text, which is a hundred times faster than rendering the
    template for each row. A probe text shows that both give the same.

    Raises:
        PromptError: the template changes the text of a message, or doubles the BOS token.
    """

    def apply(*turns: str) -> str:
        return render_template(tokenizer, turns, arguments)

    user = "<<user text>>"
    assistant = "<<assistant text>>"
    before, user_kept, opening = apply(user).partition(user)
    conversation, assistant_kept, tail = apply(user, assistant).partition(assistant)
    probe = "Which?\nA. one\n\nAnswer."
    # The probe has line breaks, which a template that reformats texts would change.
    if not user_kept or not assistant_kept or apply(probe) != before + probe + opening:
        raise PromptError("the chat template changes the text of a message; use prompt_style plain")
    # encode_text adds no special tokens, so both of two BOS tokens come from the template.
    start = encode_text(tokenizer, before)[:2]
    if tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] * 2:
        raise PromptError(
            "the chat template adds a second beginning-of-sequence token; take one bos_token out"
            " of it"
        )
    answered = None
    if conversation.startswith(before + user):
        answered = conversation.removeprefix(before + user)
    whole = place_answer(opening, answered)
    gap = choose_gap(tokenizer, whole)
    after = whole.removesuffix(gap)
    earlier = between = None
    next_user = "<<next text>>"
    first, kept, rest = apply(user, assistant, next_user).partition(assistant)
    middle, next_kept, last = rest.partition(next_user)
    # Some templates change an earlier answer once another turn follows. Such a frame allows no
    # worked examples, because it cannot express the change.
    if first.startswith(before + user) and kept and next_kept and last == opening:
        earlier = first.removeprefix(before + user)
        between = middle
    # A turn ends at the template's own token if it has one, such as <|im_end|>. Elsewhere the
    # tokenizer's end-of-sequence token is taken.
    ids = encode_text(tokenizer, tail)
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    end = tokenizer.eos_token
    if ids and ids[0] in special:
        end = tokenizer.convert_ids_to_tokens(ids[0])
    return ChatFrame(before, after, end, gap, earlier, between)


def place_answer(opening: str, answered: str | None) -> str:
    """Return the text between a question and its answer.

    It is what the template writes there in a whole conversation, because a model was trained on
    those: some templates write more than the generation prompt, such as an empty block of thoughts
    or a blank. Where the generation prompt itself opens a block of thoughts, the block is closed.

    Args:
        opening: the generation prompt.
        answered: what stands before an answer in a whole conversation; None if unknown.
    """
    text = opening
    if answered is not None:
        shorter = opening.startswith(answered) and not opening.removeprefix(answered).strip()
        if answered.startswith(opening) or shorter:
            text = answered
    tag = OPEN_TAG.search(text)
    if tag is None:
        return text
    # Qwen3 and its like write a block without thoughts in this form.
    return f"{text[: tag.start()]}<{tag[1]}>\n\n</{tag[1]}>\n\n"


def choose_gap(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return the fewest blanks at the end of a text that are encoded with the word behind it.

    Without them, the tokens of the text are the same whether a word follows or not.

    Args:
        tokenizer: the model's own.
        text: the text before an answer.
    """
    blanks = len(text) - len(text.rstrip())
    for size in range(blanks + 1):
        head = text[: len(text) - size]
        ids = encode_text(tokenizer, head)
        whole = [encode_text(tokenizer, text + word) for word in ("A", "B", "The", "yes")]
        if all(found[: len(ids)] == ids for found in whole):
            return text[len(head) :]
    return ""


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
