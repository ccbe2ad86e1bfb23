"""Causal attention (Vaswani et al., 2017, arXiv 1706.03762) within each document of a packed batch.

A packed batch is one sequence of many documents. The backend varlen runs torch's variable-length
flash kernel, which needs a GPU of 2020 or later. The backend grouped lays documents of like length
side by side and runs scaled_dot_product_attention on them, which works on every GPU and CPU. One
mask over the whole sequence would cost more time than packing saves. The other backends are not
here: flash is the flash-attn package, and transformers' flex and sdpa make masks of position_ids.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from medqlora.model.attention.blocked import BlockedAttention, allow_keys, choose_scaling
from medqlora.model.attention.documents import DOCUMENTS, Documents, Pad, Unpad
from medqlora.model.attention.tree import PrefixTree, gather_rows

ALIGNED = 8  # torch's fused kernels take head widths that are a multiple of this number
# Up to this number of keys, matrix products on a CPU are two to four times as fast as torch's fused
# attention in bfloat16.
SHORT = 512


def attend_documents(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | PrefixTree | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention; transformers calls this function through its AttentionInterface.

    A model's own dropout on attention weights (GPT-2, BioGPT) is left out: a GPU's kernels have
    none, and the adapter has dropout of its own.

    Args:
        module: The attention layer.
        query: [1, heads, tokens, width].
        key: [1, kv heads, tokens, width].
        value: [1, kv heads, tokens, width].
        attention_mask: None, or the mask of attend_rows where there are no documents.
        scaling: The factor of the scores; 1 / sqrt(width) by default.
        sliding_window: The largest number of keys that a query sees, or None.
        softcap: The cap of Gemma-2's scores, or None (see attend_rows).
        documents: The documents of a packed batch, or a tree of segments. Without either, all
            tokens of a row are one document, as in generation, and there may be several rows.

    Returns:
        [1, tokens, heads, width], and None in place of the attention weights.
    """
    if isinstance(documents, PrefixTree):
        # A model with rotary embeddings has rotated these keys, so they carry their positions.
        if documents.record is not None:
            documents.record[module.layer_idx] = (key, value)
        out = attend_prefix_tree(
            module, query, key, value, scaling, sliding_window, softcap, documents
        )
        return out, None
    if documents is None:
        out = attend_rows(
            query, key, value, attention_mask, scaling, sliding_window, softcap, query.is_cuda
        )
        return out, None
    # Without slots a GPU's variable-length kernel runs. It has no softcap; choose_backend gives no
    # model with one to it.
    if documents.gather is None:
        q, k, v = (put_tokens_first(tensor) for tensor in (query, key, value))
        ends = documents.cu_seqlens
        longest = documents.max_seqlen
        out = attend_varlen(q, k, v, ends, ends, longest, longest, scaling, sliding_window)
        return out.unsqueeze(0), None
    # [slots, heads, width] each
    padded = [Pad.apply(put_tokens_first(tensor), documents) for tensor in (query, key, value)]
    sizes = [count * length for count, length in documents.groups]
    parts_of_groups = zip(*(tensor.split(sizes) for tensor in padded), strict=True)
    outputs = []
    for (count, length), parts in zip(documents.groups, parts_of_groups, strict=True):
        # [documents, heads, length, width]
        q, k, v = (part.view(count, length, *part.shape[1:]).transpose(1, 2) for part in parts)
        # [documents, length, heads, width]
        out = attend_rows(q, k, v, None, scaling, sliding_window, softcap, documents.on_gpu)
        outputs.append(out.reshape(count * length, *out.shape[2:]))
    # The results of the groups are joined in the order of the slots.
    return Unpad.apply(torch.cat(outputs), documents).unsqueeze(0), None


def put_tokens_first(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view [tokens, heads, width] of [1, heads, tokens, width]."""
    return tensor.squeeze(0).transpose(0, 1)


@functools.cache
def varlen_names_grouped_heads() -> bool:
    """Whether varlen_attn has an argument that allows fewer key heads than query heads.

    That of torch 2.11 allows them without an argument.
    """
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_queries: torch.Tensor,
    cu_keys: torch.Tensor,
    max_queries: int,
    max_keys: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Run torch's variable-length flash kernel, causally.

    Args:
        query: [tokens, heads, width].
        key: [keys, kv heads, width].
        value: [keys, kv heads, width].
        cu_queries: Where the queries of documents begin and end, int32 [documents + 1].
        cu_keys: The same of keys. A document's queries belong to the last of its keys.
        max_queries: The largest number of queries in a document.
        max_keys: The largest number of keys in a document.
        scaling: The factor of the scores, or None.
        sliding_window: The largest number of keys that a query sees, or None.

    Returns:
        [tokens, heads, width].
    """
    from torch.nn.attention.varlen import varlen_attn

    # The kernel counts the keys before a query's own; -1 is all of them.
    window = (sliding_window - 1 if sliding_window else -1, 0)
    grouped = {}
    if varlen_names_grouped_heads():
        grouped["enable_gqa"] = query.shape[1] != key.shape[1]
    return varlen_attn(
        query,
        key,
        value,
        cu_queries,
        cu_keys,
        max_queries,
        max_keys,
        scale=scaling,
        window_size=window,
        **grouped,
    )


def attend_prefix_tree(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    tree: PrefixTree,
) -> torch.Tensor:
    """Compute the attention of a tree of segments; the arguments are those of attend_documents.

    Returns:
        [1, tokens, heads, width].
    """
    # The prefix stands first, because `sources` counts its tokens before those of the sequence.
    if tree.prefix:
        prefix_key, prefix_value = tree.prefix[module.layer_idx]
        key = torch.cat((prefix_key, key), dim=2)
        value = torch.cat((prefix_value, value), dim=2)
    q, k, v = (put_tokens_first(tensor) for tensor in (query, key, value))
    if tree.scatter is None:
        k = k.index_select(0, tree.sources)  # [keys of all segments, kv heads, width]
        v = v.index_select(0, tree.sources)
        sizes = (tree.cu_queries, tree.cu_keys, tree.max_queries, tree.max_keys)
        return attend_varlen(q, k, v, *sizes, scaling, sliding_window).unsqueeze(0)
    outputs = []
    for number, (queries, sources, distance) in enumerate(tree.groups):
        parts = (gather_rows(q, queries), gather_rows(k, sources), gather_rows(v, sources))
        # [segments, queries, heads, width]
        if distance is None:
            out = attend_rows(*parts, None, scaling, sliding_window, softcap, query.is_cuda)
        else:
            explicit = computes_explicitly(query, sources.shape[1], query.is_cuda)
            # Only the fused kernel takes a mask that is added to the scores; the others take bool.
            fused = softcap is None and not explicit
            mask = tree.mask(number, sliding_window, query.dtype if fused else None)
            # The mask contains the window, so attend_rows gets none.
            out = attend_rows(*parts, mask, scaling, None, softcap, query.is_cuda)
        outputs.append(out.flatten(0, 1))  # [segments * queries, heads, width]
    # `scatter` names one place for each token, so the padding is dropped.
    return torch.cat(outputs).index_select(0, tree.scatter).unsqueeze(0)


def computes_explicitly(query: torch.Tensor, keys: int, on_gpu: bool) -> bool:
    """Whether attention is computed by matrix products instead of torch's fused kernel."""
    return not on_gpu and query.dtype is not torch.float32 and keys <= SHORT


def attend_rows(query, key, value, mask, scaling, sliding_window, softcap, on_gpu) -> torch.Tensor:
    """Compute the causal attention of each row for itself.

    Args:
        query: [rows, heads, queries, width]; the queries belong to the last of the keys.
        key: [rows, kv heads, keys, width].
        value: [rows, kv heads, keys, width].
        mask: bool [rows, 1, queries, keys], True where a query sees a key; or None for causal
            attention. For the fused kernel it may also be 0 and -inf in the query's dtype.
        scaling: The factor of the scores, or None.
        sliding_window: The largest number of keys that a query sees, or None.
        softcap: Gemma-2 replaces scores by softcap * tanh(scores / softcap) (Gemma Team, 2024,
            arXiv 2408.00118, section 2); None for other models.
        on_gpu: Whether a GPU's kernels run (see Documents).

    Returns:
        [rows, queries, heads, width].
    """
    queries = query.shape[2]
    keys = key.shape[2]
    heads = query.shape[1]
    windowed = sliding_window is not None and sliding_window < keys
    # The fused kernel would store the mask of a window, keys x keys, for the backward pass.
    if softcap is not None or (on_gpu and windowed):
        window = sliding_window if windowed else None
        out = BlockedAttention.apply(query, key, value, mask, scaling, window, softcap)
        return out.transpose(1, 2)
    explicit = computes_explicitly(query, keys, on_gpu)
    heads_per_key = heads // key.shape[1]
    inference_on_cpu = not on_gpu and not torch.is_grad_enabled()
    if heads_per_key != 1 and mask is not None and not explicit and inference_on_cpu:
        # With enable_gqa the CPU's fused kernel needs no copies of keys and values.
        out = F.scaled_dot_product_attention(
            query, key, value, mask, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2)
    if heads_per_key != 1:
        key = key.repeat_interleave(heads_per_key, dim=1)  # [rows, heads, keys, width]
        value = value.repeat_interleave(heads_per_key, dim=1)
    # torch's is_causal lets the first query see only the first key. Our queries belong to the last
    # keys, so the two agree only where both are as many.
    if mask is None and not windowed and not explicit and queries == keys:
        return attend_fused(query, key, value, None, scaling, on_gpu).transpose(1, 2)
    if mask is None:
        mask = allow_keys(queries, keys, sliding_window if windowed else None, query.device)
    if not explicit:
        return attend_fused(query, key, value, mask, scaling, on_gpu).transpose(1, 2)
    # [rows, heads, queries, keys]
    scores = query * choose_scaling(query, scaling) @ key.transpose(-1, -2)
    # The scores are the largest tensor here. Adding the mask in place needs no copy of them in
    # either pass.
    bias = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    bias.masked_fill_(mask.logical_not(), float("-inf"))
    weights = scores.add_(bias).softmax(-1)
    return (weights @ value).transpose(1, 2)


def attend_fused(query, key, value, mask, scaling, on_gpu) -> torch.Tensor:
    """Run torch's fused attention, causally where there is no mask.

    The arguments are those of attend_rows, with as many heads of keys as of queries.

    Returns:
        [rows, heads, queries, width].
    """
    width = query.shape[-1]
    value_width = value.shape[-1]
    # For another width torch would use the formula that stores all scores, so heads are padded with
    # zeros, which change no score.
    if on_gpu and width % ALIGNED:
        # The default factor follows from the unpadded width, so it is computed before the padding.
        scaling = choose_scaling(query, scaling)
        query, key, value = (
            F.pad(tensor, (0, -tensor.shape[-1] % ALIGNED)) for tensor in (query, key, value)
        )
    # On the meta device torch would use its unfused formula, so the kernel is called by its name.
    if query.is_meta:
        out = forecast_fused(query, key, value, mask, scaling, on_gpu)
    else:
        out = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling
        )
    return out.narrow(-1, 0, value_width)


def forecast_fused(query, key, value, mask, scaling, on_gpu) -> torch.Tensor:
    """Call the kernel that attend_fused would run on a real device, for a forecast of memory.

    On a GPU that is the memory-efficient kernel (Rabe and Staats, 2021, arXiv 2112.05682), which
    takes every dtype. Where a GPU runs a flash kernel instead, the same tensors are stored.

    Returns:
        [rows, heads, queries, width].
    """
    if not on_gpu:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, is_causal=mask is None, attn_mask=mask, scale=scaling)[0]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(
        query, key, value, mask, torch.is_grad_enabled(), is_causal=mask is None, scale=scaling
    )[0]


# transformers knows the name from the import of this module on.
AttentionInterface.register(DOCUMENTS, attend_documents)
