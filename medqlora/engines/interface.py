"""What every engine takes and gives.

Token ids (or, for chat servers, messages) go in; option log-probabilities or texts come out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from medqlora.core.errors import UserError


class EngineError(UserError):
    """A request that the engine cannot serve, or an engine that cannot run here."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and the continuations to score.

    Attributes:
        prefix: token ids that the model reads.
        options: token ids of each continuation, one or more tokens each.
    """

    prefix: list[int]
    options: list[list[int]]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A prompt and the continuations to score, for a server that tokenizes by itself.

    Attributes:
        prefix: messages ({"role": …, "content": …}), the last one the user's.
        options: the text of each continuation; a server knows the first token's probability only,
            so each is a single letter.
    """

    prefix: list[dict[str, str]]
    options: list[str]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How texts are generated.

    Attributes:
        max_new_tokens: an answer's limit in tokens.
        stop_ids: token ids that end an answer; empty for a chat server, which knows its own.
        decode: makes a text of token ids; None for a chat server, which answers in text.
        temperature: 0 is greedy.
        samples: answers per prompt.
        seed: of the random draws.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    decode: Callable[[list[int]], str] | None = None
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated text.

    Attributes:
        text: what the model wrote, without a stop token.
        reached_limit: whether it ended at `max_new_tokens` and not by a stop token. A server that
            does not say why an answer ended leaves this False.
    """

    text: str
    reached_limit: bool = False


def decode_answer(tokens: list[int], sampling: Sampling) -> Answer:
    """Return the answer of generated tokens, up to the first stop token."""
    for end, token in enumerate(tokens):
        if token in sampling.stop_ids:
            return Answer(sampling.decode(tokens[:end]))
    return Answer(sampling.decode(tokens), len(tokens) >= sampling.max_new_tokens)


class TextStream:
    """Shows the text of one answer while its tokens come."""

    def __init__(self, sampling: Sampling, show: Callable[[str], None]):
        """Begin an answer.

        Args:
            sampling: how the answer is generated.
            show: takes each new piece of the text.
        """
        self.sampling = sampling
        self.show = show
        self.tokens: list[int] = []
        self.shown = ""

    def add(self, tokens: list[int]) -> None:
        """Take the next tokens, and show the text that they complete."""
        self.tokens += tokens
        text = decode_answer(self.tokens, self.sampling).text
        # A character of several tokens is this sign until its last one has come.
        if text.startswith(self.shown) and not text.endswith("\ufffd"):
            self.show(text[len(self.shown) :])
            self.shown = text

    def finish(self) -> Answer:
        """Show what is left, and return the whole answer."""
        answer = decode_answer(self.tokens, self.sampling)
        text = answer.text
        # Some tokenizers change the blanks before a token once they see it. The whole text is then
        # shown again.
        rest = text[len(self.shown) :] if text.startswith(self.shown) else f"\n{text}"
        self.show(rest)
        return answer


# A batch has at least this many questions, enough to keep the engine busy. A crash loses at most
# the batches that were not finished.
BATCH_SIZE = {"hf": 64, "vllm": 512, "openai": 64}


class Engine(Protocol):
    """What runs a model. An engine for chat servers takes ChatRequest in place of Request."""

    name: str  # This name stands in prediction rows, and so do the weights.
    # How the weights that run are held, as nf4 or bfloat16; None where only a server knows.
    weights: str | None

    def score(self, requests: Sequence[Request], shared: int = 0) -> list[list[float]]:
        """Return the natural log-probability of each option of each request.

        An option that the engine cannot know the probability of is NaN. A request that a server
        failed to answer has an EngineError in its place.

        Args:
            requests: prompts with their options.
            shared: how many tokens all prefixes have in common at their start, as few-shot prompts
                do; an engine may use it to read them once.
        """

    def generate(self, prefixes: Sequence[list[int]], sampling: Sampling) -> list[list[Answer]]:
        """Return `samples` answers to each prefix.

        A request that a server failed to answer has an EngineError in its place.
        """

    def stream(self, prefix: list[int], sampling: Sampling, show: Callable[[str], None]) -> Answer:
        """Return the text of one answer, and show its pieces as they come.

        The text is that of `generate`. An engine that knows whole answers only shows one piece.

        Args:
            prefix: the prompt.
            sampling: how the answer is generated; `samples` is 1.
            show: takes each piece.

        Raises:
            EngineError: the request was not answered, or not to its end.
        """
