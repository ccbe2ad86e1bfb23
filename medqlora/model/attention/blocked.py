"""Attention in blocks of queries, whose scores are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch

SCORE_BYTES = 32 * 2**20  # BlockedAttention keeps about this many bytes of scores at a time.


def choose_scaling(query: torch.Tensor, scaling: float | None) -> float:
    """Factor of the scores; default 1 / sqrt(head width)."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def allow_keys(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [queries, keys]: which keys each query sees, where queries are the last of the keys;
    window: at most so many.
    """
    at = torch.arange(keys, device=device)
    distance = at[keys - queries :, None] - at[None]
    return (distance >= 0) & (distance < window) if window else distance >= 0


class BlockedAttention(torch.autograd.Function):
    """Attention with softcap or a window, from plain matrix products on blocks of queries. Scores
    exist for one block at a time and are computed again in the backward pass, so that no more is
    kept than by a fused kernel: queries, keys and values (as Rabe and Staats, 2021, arXiv
    2112.05682)."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scaling, window, softcap):
        """query [rows, heads, queries, width], key and value [rows, kv heads, keys, width], mask
        bool [rows, 1, queries, keys] or None: causal -> [rows, heads, queries, width]"""
        ctx.save_for_backward(query, key, value, mask)
        ctx.settings = scaling, window, softcap
        blocks = []
        for block in split_queries(query, key, mask, window):
            weights, _ = weigh_block(query, key, mask, block, *ctx.settings, derive=False)
            first, last, start, end = block
            # [rows, kv heads, heads per kv head * block, width]
            mixed = weights.to(value.dtype) @ cut(value, start, end)
            blocks.append(mixed.view(query.shape[0], query.shape[1], last - first, -1))
        return torch.cat(blocks, dim=2)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, mask = ctx.saved_tensors
        scaling, window, _ = ctx.settings
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (
            torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value)
        )
        for block in split_queries(query, key, mask, window):
            first, last, start, end = block
            weights, slope = weigh_block(query, key, mask, block, *ctx.settings, derive=True)
            arriving = fold_heads(cut(gradient, first, last), key.shape[1])
            cut(grad_value, start, end).add_(weights.to(value.dtype).transpose(-1, -2) @ arriving)
            grad_scores = (arriving @ cut(value, start, end).transpose(-1, -2)).float()
            grad_scores.sub_((grad_scores * weights).sum(-1, keepdim=True)).mul_(weights)
            grad_scores = (grad_scores if slope is None else grad_scores.mul_(slope)).to(
                query.dtype
            )
            scale = choose_scaling(query, scaling)
            part = grad_scores @ cut(key, start, end) * scale
            cut(grad_query, first, last).copy_(
                part.view(query.shape[0], query.shape[1], last - first, -1)
            )
            cut(grad_key, start, end).add_(
                grad_scores.transpose(-1, -2)
                @ (fold_heads(cut(query, first, last), key.shape[1]) * scale)
            )
        return (
            grad_query,
            grad_key.to(key.dtype),
            grad_value.to(value.dtype),
            None,
            None,
            None,
            None,
        )


def split_queries(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, window: int | None
) -> Iterator[tuple[int, int, int, int]]:
    """Blocks of queries whose scores take SCORE_BYTES at most, as (first query, end, first key,
    end): without a mask, keys that no query of a block sees are left out."""
    queries = query.shape[2]
    keys = key.shape[2]
    rows = query.shape[0] * query.shape[1] * keys * 4  # bytes of one query's float32 scores
    block = max(16, SCORE_BYTES // max(1, rows))
    for first in range(0, queries, block):
        last = min(first + block, queries)
        behind = keys - queries
        start = max(0, first + behind - window + 1) if window and mask is None else 0
        yield first, last, start, keys if mask is not None else last + behind


def cut(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Part of [rows, heads, tokens, width] along its tokens, a view."""
    return tensor.narrow(2, first, last - first)


def fold_heads(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[rows, heads, queries, width] -> [rows, kv heads, heads per kv head * queries, width], so
    that keys need no copies.
    """
    return tensor.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def weigh_block(
    query, key, mask, block, scaling, window, softcap, derive: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention weights float32 [rows, kv heads, heads per kv head * block, keys] of one block,
    and, if asked, the softcap's derivative."""
    first, last, start, end = block
    folded = fold_heads(cut(query, first, last) * choose_scaling(query, scaling), key.shape[1])
    scores = (folded @ cut(key, start, end).transpose(-1, -2)).float()
    slope = None
    if softcap is not None:
        scores.div_(softcap).tanh_()
        slope = 1 - scores * scores if derive else None
        scores.mul_(softcap)
    if mask is not None:
        allowed = mask.narrow(2, first, last - first).narrow(3, start, end - start).unsqueeze(2)
    else:
        behind = key.shape[2] - query.shape[2]
        at_query = torch.arange(first, last, device=query.device) + behind
        at_key = torch.arange(start, end, device=query.device)
        distance = at_query.unsqueeze(1) - at_key.unsqueeze(0)
        allowed = (distance >= 0) & (distance < window) if window else distance >= 0
    # [rows, kv heads, heads per kv head, block, keys]
    apart = scores.view(*scores.shape[:2], -1, last - first, end - start)
    return (
        apart.masked_fill_(allowed.logical_not(), float("-inf")).softmax(-1).view(scores.shape),
        slope,
    )
