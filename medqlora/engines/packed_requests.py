"""Requests are laid out as segments of one packed row, and the row's logits become scores."""

from __future__ import annotations

from typing import NamedTuple

import torch

from medqlora.engines.interface import Request
from medqlora.model.head_loss import compute_logits

# The head computes this many positions at a time, which bounds the memory of the logits.
HEAD_ROWS = 128


def count_tokens(request: Request, shared: int, nested: bool) -> int:
    """Return the number of tokens that `lay_out` makes of a request."""
    # This must agree with lay_out, or packs grow over the budget.
    longer = [len(option) - 1 for option in request.options if len(option) > 1]
    if nested:
        return len(request.prefix) - shared + sum(longer)
    single = len(request.options) > len(longer)
    return single * len(request.prefix) + sum(len(request.prefix) + extra for extra in longer)


class Target(NamedTuple):
    """A token whose log-probability is needed.

    Attributes:
        place: place in the packed row of the position before the token.
        token: the token's id.
        request: number of the request that it belongs to.
        option: number of the option in that request.
    """

    place: int
    token: int
    request: int
    option: int


def lay_out(
    requests: list[Request], shared: int, nested: bool
) -> tuple[list[list[int]], list[int | None], list[int], list[Target]]:
    """Lay requests out as the segments of one packed row.

    A prefix is one segment, and an option of several tokens continues it in a segment of its own.
    Where segments cannot be `nested`, such an option has a row with the prefix repeated. An
    option's last token is not part of the row, because nothing after it is needed.

    Args:
        requests: prompts with their options.
        shared: how many tokens of each prefix have been read before and are left out.
        nested: whether a segment may continue another one.

    Returns:
        The token ids of each segment, the number of the segment that it continues (or None), the
        position of its first token, and the tokens to score.
    """
    segments: list[list[int]] = []
    parents: list[int | None] = []
    starts: list[int] = []
    targets: list[Target] = []
    total = 0

    def add(ids: list[int], parent: int | None, start: int) -> int:
        """Add a segment, and return the place of its last token in the packed row."""
        nonlocal total
        segments.append(ids)
        parents.append(parent)
        starts.append(start)
        total += len(ids)
        return total - 1

    for number, request in enumerate(requests):
        single = [i for i, option in enumerate(request.options) if len(option) == 1]
        prefix_end = parent = None
        if nested or single:
            prefix_end = add(request.prefix[shared:], None, shared)
            parent = len(segments) - 1
            targets += [Target(prefix_end, request.options[i][0], number, i) for i in single]
        for i, option in enumerate(request.options):
            if len(option) < 2:
                continue
            if nested:
                last = add(option[:-1], parent, len(request.prefix))
            else:
                last = add(request.prefix + option[:-1], None, 0)
            before_first = last - len(option) + 1
            for offset, token in enumerate(option):
                # A nested option's first token follows the prefix, which is another segment.
                place = prefix_end if nested and offset == 0 else before_first + offset
                targets.append(Target(place, token, number, i))
    return segments, parents, starts, targets


def gather_logprobs(
    causal: torch.nn.Module, hidden: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor
) -> list[float]:
    """Return the log-probability of each token after its place, in nats.

    The head computes each place once, however many tokens follow it.

    Args:
        causal: a transformers causal LM.
        hidden: hidden states of the packed row, [tokens, hidden].
        places: the place before each token to score, int64 [targets].
        tokens: the ids of these tokens, int64 [targets].
    """
    unique, inverse = torch.unique(places, return_inverse=True)  # int64 [places], int64 [targets]
    values = torch.empty(len(tokens), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(unique), HEAD_ROWS):
        # float32 [at most HEAD_ROWS, vocab]
        logits = compute_logits(causal, hidden[unique[start : start + HEAD_ROWS]])
        here = ((inverse >= start) & (inverse < start + HEAD_ROWS)).nonzero().flatten()
        rows = inverse[here] - start
        # This is log_softmax at the needed tokens, without its copy of all logits.
        values[here] = logits[rows, tokens[here]] - logits.logsumexp(-1)[rows]
    return values.tolist()
