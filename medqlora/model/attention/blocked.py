"""Attention in blocks of queries, whose scores are computed again in the backward pass.

The method is that of Rabe and Staats (2021, arXiv 2112.05682).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

SCORE_BYTES = 32 * 2**20  # the size of a block's float32 scores


def choose_scaling(query: torch.Tensor, scaling: float | None) -> float:
    """Return the factor of the scores, which is 1 / sqrt(head width) by default."""
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def allow_keys(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return which keys each query sees in causal attention.

    Args:
        queries: The number of queries, which belong to the last tokens.
        keys: The number of keys, one for each token.
        window: The largest number of keys that a query sees; None for all up to its own.
        device: The device of the result.

    Returns:
        bool [queries, keys].
    """
    positions = torch.arange(keys, device=device)  # [keys]
    distance = positions[keys - queries :, None] - positions[None]  # [queries, keys]
    return is_visible(distance, window)


def is_visible(distance: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return where a query sees a key that lies `distance` tokens before it, bool."""
    # A negative distance is a key after the query, or padding (see tree.PrefixTree).
    visible = distance >= 0
    return visible & (distance < window) if window else visible


class BlockedAttention(torch.autograd.Function):
    """Attention with a softcap or a window, from matrix products on blocks of queries.

    Scores exist for one block at a time and are computed again in the backward pass. So only
    queries, keys and values are stored, as by a fused kernel.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, scaling, window, softcap):
        """Compute the attention of each row.

        Args:
            ctx: What autograd keeps for the backward pass.
            query: [rows, heads, queries, width].
            key: [rows, kv heads, keys, width].
            value: [rows, kv heads, keys, width].
            mask: bool [rows, 1, queries, keys], True where a query sees a key; None is causal.
            scaling: The factor of the scores, or None (see choose_scaling).
            window: The largest number of keys that a query sees, or None.
            softcap: The cap of Gemma-2's scores, or None (see kernels.attend_rows).

        Returns:
            [rows, heads, queries, width].
        """
        ctx.save_for_backward(query, key, value, mask)
        ctx.settings = scaling, window, softcap
        blocks = []
        for block in split_queries(query, key, mask, window):
            weights, _ = weigh_block(query, key, mask, block, *ctx.settings, derive=False)
            first, last, start, end = block
            # [rows, kv heads, heads per kv head * block, width]
            out = weights.to(value.dtype) @ slice_tokens(value, start, end)
            # Heads that share keys follow one another, so the view restores their order.
            blocks.append(out.view(query.shape[0], query.shape[1], last - first, -1))
        return torch.cat(blocks, dim=2)

    @staticmethod
    def backward(ctx, gradient):
        """Return the gradients of query, key and value, in their shapes and dtypes."""
        query, key, value, mask = ctx.saved_tensors
        scaling, window, _ = ctx.settings
        scale = choose_scaling(query, scaling)
        kv_heads = key.shape[1]
        # Each query lies in exactly one block, so all of this memory is written.
        grad_query = torch.empty_like(query)
        # Several blocks add to the gradient of a key, so the sums are float32.
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        for block in split_queries(query, key, mask, window):
            first, last, start, end = block
            weights, slope = weigh_block(query, key, mask, block, *ctx.settings, derive=True)
            # [rows, kv heads, heads per kv head * block, width]
            grad_out = fold_heads(slice_tokens(gradient, first, last), kv_heads)
            # The forward pass rounded the weights to the values' dtype, and this product does too.
            slice_tokens(grad_value, start, end).add_(
                weights.to(value.dtype).transpose(-1, -2) @ grad_out
            )
            # The gradient of the softmax's input is weights * (g - sum(g * weights)).
            grad_scores = (grad_out @ slice_tokens(value, start, end).transpose(-1, -2)).float()
            # A masked weight is zero and so is its gradient; the mask is not applied again.
            grad_scores.sub_((grad_scores * weights).sum(-1, keepdim=True)).mul_(weights)
            if slope is not None:
                grad_scores.mul_(slope)
            grad_scores = grad_scores.to(query.dtype)
            # The scores are (scale * query) @ key^T, so both gradients carry the factor.
            part = grad_scores @ slice_tokens(key, start, end) * scale
            slice_tokens(grad_query, first, last).copy_(
                part.view(query.shape[0], query.shape[1], last - first, -1)
            )
            slice_tokens(grad_key, start, end).add_(
                grad_scores.transpose(-1, -2)
                @ (fold_heads(slice_tokens(query, first, last), kv_heads) * scale)
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
    """Yield blocks of queries whose scores take about SCORE_BYTES, and at least 16 queries.

    Args:
        query: [rows, heads, queries, width].
        key: [rows, kv heads, keys, width].
        mask: As in BlockedAttention.forward. Without one, keys that no query of a block sees are
            left out.
        window: The largest number of keys that a query sees, or None.

    Yields:
        The first query of a block, the query after its last, its first key, the key after its last.
    """
    queries = query.shape[2]
    keys = key.shape[2]
    query_bytes = query.shape[0] * query.shape[1] * keys * 4  # the scores of one query, float32
    block = max(16, SCORE_BYTES // max(1, query_bytes))
    earlier = keys - queries  # tokens that have a key and no query
    for first in range(0, queries, block):
        last = min(first + block, queries)
        # A mask may show any key to any query, so no key can be left out.
        if mask is not None:
            yield first, last, 0, keys
            continue
        # The first query of a block reaches back furthest, over `window` keys with its own.
        start = max(0, first + earlier - window + 1) if window else 0
        # Causal attention hides the keys after the block's last query.
        yield first, last, start, last + earlier


def slice_tokens(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return a view of the tokens from `first` to before `last` of [rows, heads, tokens, width]."""
    return tensor.narrow(2, first, last - first)


def fold_heads(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Put the heads that share keys side by side, so that the keys need no copies.

    Shapes: [rows, heads, queries, width] -> [rows, kv heads, heads per kv head * queries, width].
    The sharing of keys is grouped-query attention (Ainslie et al., 2023, arXiv 2305.13245).
    """
    # The query heads of one key head are consecutive, as in attend_rows' repeat_interleave.
    return tensor.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def weigh_block(
    query, key, mask, block, scaling, window, softcap, derive: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the attention weights of a block; the arguments are those of forward.

    Returns:
        The weights, float32 [rows, kv heads, heads per kv head * block, keys]; and the derivative
        of the softcap in the same shape if `derive` and there is a softcap, else None.
    """
    first, last, start, end = block
    scaled = slice_tokens(query, first, last) * choose_scaling(query, scaling)
    folded = fold_heads(scaled, key.shape[1])  # [rows, kv heads, heads per kv head * block, width]
    # Softcap and softmax are computed in float32, whatever the compute dtype.
    scores = (folded @ slice_tokens(key, start, end).transpose(-1, -2)).float()
    slope = None
    # The softcap precedes the mask. It would make a finite score of -inf, and masked keys would be
    # seen.
    if softcap is not None:
        scores.div_(softcap).tanh_()
        # The derivative of cap * tanh(s / cap) is 1 - tanh(s / cap)^2.
        slope = 1 - scores * scores if derive else None
        scores.mul_(softcap)
    if mask is not None:
        # bool [rows, 1, 1, block, keys]
        allowed = mask.narrow(2, first, last - first).narrow(3, start, end - start).unsqueeze(2)
    else:
        earlier = key.shape[2] - query.shape[2]
        query_positions = torch.arange(first, last, device=query.device) + earlier
        key_positions = torch.arange(start, end, device=query.device)
        # bool [block, keys]
        allowed = is_visible(query_positions.unsqueeze(1) - key_positions.unsqueeze(0), window)
    # [rows, kv heads, heads per kv head, block, keys]
    unfolded = scores.view(*scores.shape[:2], -1, last - first, end - start)
    weights = unfolded.masked_fill_(allowed.logical_not(), float("-inf")).softmax(-1)
    return weights.view(scores.shape), slope
