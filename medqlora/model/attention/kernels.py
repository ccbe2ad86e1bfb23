"""Document-isolated attention over packed rows, and the proof of it on the loaded model.

A packed batch is one sequence of many documents. `varlen` runs each document's own causal attention
in torch's variable-length flash kernel, which needs a GPU of 2020 or later. `grouped` lays
documents of like length side by side and runs scaled_dot_product_attention on them, which works on
every GPU and CPU (T^2 masks cost more time than packing saves). `flash` is the flash-attn package;
`flex` and `sdpa` build masks from position_ids.
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

ALIGNED = 8  # torch's fused kernels take head widths that are a multiple of it.
# up to this length plain matrix products beat the CPU's fused attention in bfloat16, two to four
# times
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
    """AttentionInterface function: query [1, heads, tokens, width], key and value [1, kv heads,
    tokens, width] -> [1, tokens, heads, width]. Without `documents` all tokens of a row are one
    document (generation, evaluation). A model's own dropout on attention weights (GPT-2, BioGPT) is
    left out: the GPU's kernel has none, and the adapter has dropout of its own.
    """
    if isinstance(documents, PrefixTree):
        if documents.record is not None:
            documents.record[module.layer_idx] = (key, value)
        return (
            attend_prefix_tree(
                module, query, key, value, scaling, sliding_window, softcap, documents
            ),
            None,
        )
    if documents is None:
        return (
            attend_rows(
                query, key, value, attention_mask, scaling, sliding_window, softcap, query.is_cuda
            ),
            None,
        )
    if documents.gather is None:
        # [tokens, heads, width]
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        ends = documents.cu_seqlens
        longest = documents.max_seqlen
        return (
            attend_varlen(q, k, v, ends, ends, longest, longest, scaling, sliding_window).unsqueeze(
                0
            ),
            None,
        )
    padded = [
        Pad.apply(tensor.squeeze(0).transpose(0, 1), documents) for tensor in (query, key, value)
    ]
    sizes = [count * length for count, length in documents.groups]
    outputs = []
    for (count, length), *parts in zip(
        documents.groups, *(tensor.split(sizes) for tensor in padded), strict=True
    ):
        q, k, v = (part.view(count, length, *part.shape[1:]).transpose(1, 2) for part in parts)
        # [count, length, heads, width]
        out = attend_rows(q, k, v, None, scaling, sliding_window, softcap, documents.on_gpu)
        outputs.append(out.reshape(count * length, *out.shape[2:]))
    return Unpad.apply(torch.cat(outputs), documents).unsqueeze(0), None


@functools.cache
def varlen_names_grouped_heads() -> bool:
    """Whether varlen_attn wants to be told of grouped heads. torch 2.11's takes them unasked and
    has no such argument.
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
    """torch's variable-length flash kernel, causal: query [tokens, heads, width], key and value
    [keys, kv heads, width] -> [tokens, heads, width]; cu_queries, cu_keys int32 [documents + 1]."""
    from torch.nn.attention.varlen import varlen_attn

    window = (sliding_window - 1 if sliding_window else -1, 0)
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if varlen_names_grouped_heads() else {}
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
    branches: PrefixTree,
) -> torch.Tensor:
    """As attend_documents, for segments of a tree: query [1, heads, tokens, width] -> [1, tokens,
    heads, width].
    """
    if branches.prefix:
        before = branches.prefix[module.layer_idx]
        key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
    # [tokens, heads, width]
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    if branches.scatter is None:
        k, v = (tensor.index_select(0, branches.sources) for tensor in (k, v))
        sizes = (branches.cu_queries, branches.cu_keys, branches.max_queries, branches.max_keys)
        return attend_varlen(q, k, v, *sizes, scaling, sliding_window).unsqueeze(0)
    outputs = []
    for number, (queries, sources, distance) in enumerate(branches.groups):
        parts = (
            gather_rows(tensor, index)
            for tensor, index in ((q, queries), (k, sources), (v, sources))
        )
        if distance is None:
            out = attend_rows(*parts, None, scaling, sliding_window, softcap, query.is_cuda)
        else:
            fused = softcap is None and not computes_explicitly(
                query, sources.shape[1], query.is_cuda
            )
            mask = branches.mask(number, sliding_window, query.dtype if fused else None)
            # [segments, queries, heads, width]
            out = attend_rows(*parts, mask, scaling, None, softcap, query.is_cuda)
        outputs.append(out.flatten(0, 1))
    return torch.cat(outputs).index_select(0, branches.scatter).unsqueeze(0)


def computes_explicitly(query: torch.Tensor, keys: int, on_gpu: bool) -> bool:
    """Whether attention is plain matrix products here instead of torch's fused kernel."""
    return not on_gpu and query.dtype is not torch.float32 and keys <= SHORT


def attend_rows(query, key, value, mask, scaling, sliding_window, softcap, on_gpu) -> torch.Tensor:
    """Causal attention of each row for itself: [rows, heads, queries, width] -> [rows, queries,
    heads, width].

    mask: bool [rows, 1, queries, keys] or additive; on_gpu: whose kernels run. Softcap is
    Gemma-2's: scores -> softcap * tanh(scores / softcap) (arXiv 2408.00118, section 2).
    """
    queries = query.shape[2]
    keys = key.shape[2]
    heads = query.shape[1]
    windowed = sliding_window is not None and sliding_window < keys
    # A window's mask, keys x keys, would be kept for the backward pass.
    if softcap is not None or (on_gpu and windowed):
        window = sliding_window if windowed else None
        return BlockedAttention.apply(query, key, value, mask, scaling, window, softcap).transpose(
            1, 2
        )
    explicit = computes_explicitly(query, keys, on_gpu)
    if (
        key.shape[1] != heads
        and mask is not None
        and not explicit
        and not on_gpu
        and not torch.is_grad_enabled()
    ):
        return F.scaled_dot_product_attention(
            query, key, value, mask, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
    if key.shape[1] != heads:
        key, value = (
            tensor.repeat_interleave(heads // key.shape[1], dim=1) for tensor in (key, value)
        )
    if mask is None and not windowed and not explicit and queries == keys:
        return attend_fused(query, key, value, None, scaling, on_gpu).transpose(1, 2)
    if mask is None:
        mask = allow_keys(queries, keys, sliding_window if windowed else None, query.device)
    if not explicit:
        return attend_fused(query, key, value, mask, scaling, on_gpu).transpose(1, 2)
    scores = query * choose_scaling(query, scaling) @ key.transpose(-1, -2)
    # The scores are the largest tensor here: what is hidden is added in place, which needs no copy
    # of them in either pass.
    hidden = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).masked_fill_(
        mask.logical_not(), float("-inf")
    )
    weights = scores.add_(hidden).softmax(-1)
    return (weights @ value).transpose(1, 2)


def attend_fused(query, key, value, mask, scaling, on_gpu) -> torch.Tensor:
    """torch's fused attention, causal where there is no mask; shapes as attend_rows, but [rows,
    heads, queries, width] out.
    """
    width = query.shape[-1]
    # Another width would get the formula that keeps all scores. Zeros change no score.
    if on_gpu and width % ALIGNED:
        scaling = choose_scaling(query, scaling)
        query, key, value = (F.pad(tensor, (0, -width % ALIGNED)) for tensor in (query, key, value))
    if query.is_meta:  # without content torch would take its unfused formula
        out = forecast_fused(query, key, value, mask, scaling, on_gpu)
    else:
        out = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling
        )
    return out.narrow(-1, 0, width)


def forecast_fused(query, key, value, mask, scaling, on_gpu) -> torch.Tensor:
    """The kernel that attend_fused gets on a CPU, or on a GPU where the variable-length one cannot
    run: the memory-efficient kernel, which takes every dtype and every GPU. Where a GPU takes a
    flash kernel instead, the same tensors are kept.
    """
    if not on_gpu:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, is_causal=mask is None, attn_mask=mask, scale=scaling)[0]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(
        query, key, value, mask, torch.is_grad_enabled(), is_causal=mask is None, scale=scaling
    )[0]


AttentionInterface.register(DOCUMENTS, attend_documents)
