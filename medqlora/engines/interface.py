"""What every engine takes and gives: token ids in; option log-probabilities, or text, out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from medqlora.core.errors import UserError


class EngineError(UserError):
    """A request that the engine cannot serve, or an engine that cannot run here."""


@dataclass(frozen=True, slots=True)
class Request:
    """prefix: token ids that the model reads; options: token ids of each continuation to score, one
    or more tokens each.
    """

    prefix: list[int]
    options: list[list[int]]


@dataclass(frozen=True, slots=True)
class Sampling:
    """max_new_tokens: length limit; stop_ids: tokens that end an answer; decode: token ids -> text;
    temperature 0 is greedy; samples: answers per prompt."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    decode: Callable[[list[int]], str]
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0


def decode_answer(tokens: list[int], sampling: Sampling) -> str:
    return sampling.decode(
        tokens[
            : next((i for i, token in enumerate(tokens) if token in sampling.stop_ids), len(tokens))
        ]
    )


# Questions per batch at least, which is what a crash loses at most: as many as keep the engine
# busy.
BATCH_SIZE = {"hf": 64, "vllm": 512, "openai": 64}


class Engine(Protocol):
    """name: as written in prediction rows."""

    name: str

    def score(self, requests: Sequence[Request], shared: int = 0) -> list[list[float]]:
        """Log-probability (natural) of each option of each request; NaN where the engine cannot
        know it.

        shared: tokens that the prefixes have in common (a few-shot prompt); an engine may use it to
        read them once.
        """

    def generate(self, prefixes: Sequence[list[int]], sampling: Sampling) -> list[list[str]]:
        """Texts of `samples` answers to each prefix, without what ended them."""
