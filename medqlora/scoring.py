"""Examples -> prediction rows, by letters: one forward pass per question, the options' probabilities at its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from medqlora.engines.hf import score_options
from medqlora.examples import LETTERS, MultipleChoice
from medqlora.prompts import render
from medqlora.tokens import Encoder, encode_candidates, encode_prefixes, fingerprint


def predict_letters(
    model: torch.nn.Module, backend: str, encoder: Encoder, examples: list[MultipleChoice], name: str, max_tokens: int
) -> Iterator[dict[str, Any]]:
    """Prediction rows of the contract, in the order they are computed; `name` is written as the model's name."""
    completion = encoder.completion if encoder.completion != "explanation" else "letter"
    prompts = [render(example, encoder.style, completion) for example in examples]
    prefixes = encode_prefixes(encoder, prompts)
    candidates = [encode_candidates(encoder, example, prompt) for example, prompt in zip(examples, prompts, strict=True)]
    digest = fingerprint(encoder)
    for number, scores in score_options(model, backend, prefixes, candidates, max_tokens):
        example = examples[number]
        letters = LETTERS[: len(example.options)]
        best = max(range(len(letters)), key=lambda i: scores.logprobs[i])
        yield {
            "id": example.id, "dataset": example.dataset, "subject": example.subject,
            "gold": None if example.answer is None else LETTERS[example.answer], "prediction": letters[best],
            "option_logprobs": dict(zip(letters, scores.logprobs, strict=True)), "letter_mass": scores.mass, "text": None,
            "prompt_sha256": digest, "engine": "hf", "model": name,
        }  # fmt: skip
