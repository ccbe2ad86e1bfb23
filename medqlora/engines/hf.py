"""The transformers engine: option log-probabilities from packed forward passes, head at the needed positions only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medqlora.attention import packing_arguments
from medqlora.config import UserError
from medqlora.losses import backbone_of, compute_logits, unwrap
from medqlora.packing import fit_bins


class EngineError(UserError):
    """A question that the engine cannot score."""


@dataclass(frozen=True)
class OptionScores:
    """logprobs [options]: natural log of each option's probability as the next text; mass: their summed probability."""

    logprobs: list[float]
    mass: float


@torch.inference_mode()
def score_options(
    model: torch.nn.Module, backend: str, prefixes: Sequence[list[int]], candidates: Sequence[list[list[int]]],
    max_tokens: int = 8_192,
) -> Iterator[tuple[int, OptionScores]]:  # fmt: skip
    """Score every option of every question, in the order that packs best.

    Args:
        prefixes: token ids of each prompt; candidates: token ids of each option of each question. A question whose options
            are one token each costs one row; an option of several tokens is scored as a continuation, a row each.
        max_tokens: tokens per forward pass (a longer row runs alone).

    Yields:
        (number of the question, its scores).

    Raises:
        EngineError: a row longer than the model's positions.
    """
    causal = unwrap(model)
    rows = plan_rows(prefixes, candidates)
    lengths = np.array([len(row.ids) for row in rows])
    longest = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
    if longest and lengths.max() > longest:
        question = rows[int(lengths.argmax())].question
        raise EngineError(f"question {question + 1} has {lengths.max()} tokens, the model {longest} positions; shorten its context")
    scores = {question: np.full(len(options), np.nan) for question, options in enumerate(candidates)}
    model.eval()
    for chosen in fit_bins(lengths, max(max_tokens, int(lengths.max()))):
        members = [rows[i] for i in chosen]
        hidden = run_packed(causal, backend, [row.ids for row in members])
        ends = np.cumsum(lengths[chosen])
        counts = [1 if row.option is None else len(row.asked) for row in members]
        places = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
        logprobs = compute_logits(causal, hidden[torch.from_numpy(places).to(hidden.device)]).log_softmax(-1)  # [places, vocab]
        for row, part in zip(members, logprobs.split(counts), strict=True):
            if row.option is None:
                scores[row.question][:] = part[0, row.asked].tolist()
            else:
                scores[row.question][row.option] = part[range(len(row.asked)), row.asked].sum().item()
        for question in {row.question for row in members}:
            if not np.isnan(scores[question]).any():
                values = scores.pop(question)
                yield question, OptionScores(values.tolist(), float(np.exp(values).sum()))


@dataclass(frozen=True)
class Row:
    """ids to read, and the ids asked for: all options at the last position, or (option given) one option's own tokens."""

    question: int
    option: int | None
    ids: list[int]
    asked: list[int]


def plan_rows(prefixes: Sequence[list[int]], candidates: Sequence[list[list[int]]]) -> list[Row]:
    rows = []
    for question, (prefix, options) in enumerate(zip(prefixes, candidates, strict=True)):
        if all(len(option) == 1 for option in options):
            rows.append(Row(question, None, prefix, [option[0] for option in options]))
        else:
            rows += [Row(question, index, prefix + option[:-1], option) for index, option in enumerate(options)]
    return rows


def run_packed(causal: torch.nn.Module, backend: str, documents: list[list[int]]) -> torch.Tensor:
    """Hidden states [tokens, hidden] of several documents in one packed forward."""
    lengths = [len(document) for document in documents]
    device = next(causal.parameters()).device
    batch = {"cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), "max_seqlen": max(lengths)}
    ids = torch.tensor([i for document in documents for i in document], device=device)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).to(device)
    return backbone_of(causal)(
        input_ids=ids[None], position_ids=position_ids[None], attention_mask=None, use_cache=False,
        **packing_arguments(backend, batch, device),
    ).last_hidden_state[0]  # fmt: skip
