"""Document-isolated attention over packed rows, and the proof of it on the loaded model.

A packed batch is one sequence of many documents. `varlen` runs each document's own causal attention
in torch's variable-length flash kernel, which needs a GPU of 2020 or later. `grouped` lays
documents of like length side by side and runs scaled_dot_product_attention on them, which works on
every GPU and CPU (T^2 masks cost more time than packing saves). `flash` is the flash-attn package;
`flex` and `sdpa` build masks from position_ids.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PretrainedConfig

from medqlora.config import UserError
from medqlora.hardware import AMPERE, name_capability, read_capability

SCORE_BYTES = 32 * 2**20  # BlockedAttention keeps about this many bytes of scores at a time.
ALIGNED = 8  # torch's fused kernels take head widths that are a multiple of it.
# up to this length plain matrix products beat the CPU's fused attention in bfloat16, two to four
# times
SHORT = 512
DOCUMENTS = "medqlora_documents"  # our name in transformers' AttentionInterface
IMPLEMENTATIONS = {
    "varlen": DOCUMENTS,
    "grouped": DOCUMENTS,
    "flash": "flash_attention_2",
    "flex": "flex_attention",
    "sdpa": "sdpa",
}


class AttentionError(UserError):
    """A backend that does not exist here, or that mixes packed documents."""


@dataclass(frozen=True)
class Documents:
    """Where a packed sequence's documents lie.

    cu_seqlens int32 [documents + 1]; max_seqlen: longest; for the grouped path also gather int64
    [padded tokens]: source of each slot, documents of like length side by side and padded to their
    group's longest; scatter int64 [tokens]: slot of each token; real bool [padded tokens, 1, 1];
    groups: (documents, length) of each group; on_gpu: whose kernels run, also where the tensors are
    on the meta device for a forecast.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    gather: torch.Tensor | None = None
    scatter: torch.Tensor | None = None
    real: torch.Tensor | None = None
    groups: tuple[tuple[int, int], ...] = ()
    on_gpu: bool = False


def is_grouped(backend: str, device: torch.device) -> bool:
    """Whether documents lie side by side in groups; a CPU has no variable-length kernel, whatever
    the backend's name.
    """
    return backend == "grouped" or device.type == "cpu"


def locate_documents(
    cu_seqlens: torch.Tensor, max_seqlen: int, device: torch.device, backend: str = "varlen"
) -> Documents:
    """Prepare once per batch what every layer needs. cu_seqlens int32 [documents + 1], on the CPU;
    backend: varlen or grouped.
    """
    if not is_grouped(backend, device):
        return Documents(cu_seqlens.to(device, non_blocking=True), max_seqlen, on_gpu=True)
    starts = cu_seqlens[:-1].tolist()
    lengths = cu_seqlens.diff().tolist()
    groups: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        if groups and lengths[document] >= 0.8 * lengths[groups[-1][0]]:
            groups[-1].append(document)
        else:
            groups.append([document])
    slots = []
    keeps = []
    for members in groups:
        longest = lengths[members[0]]
        place = torch.arange(longest)
        for document in members:
            slots.append(starts[document] + place.clamp(max=lengths[document] - 1))
            keeps.append(place < lengths[document])
    gather = torch.cat(slots)
    real = torch.cat(keeps)
    scatter = torch.empty(int(cu_seqlens[-1]), dtype=torch.int64)
    scatter[gather[real]] = real.nonzero().flatten()
    shapes = tuple((len(members), lengths[members[0]]) for members in groups)
    moved = (tensor.to(device) for tensor in (gather, scatter, real[:, None, None]))
    return Documents(cu_seqlens, max_seqlen, *moved, shapes, on_gpu=device.type != "cpu")


class Pad(torch.autograd.Function):
    """tokens [tokens, heads, width] -> [padded tokens, heads, width]; padding gets no gradient, so
    backward is a gather.
    """

    @staticmethod
    def forward(ctx, tokens, documents):
        ctx.documents = documents
        return tokens.index_select(0, documents.gather)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.documents.scatter), None


class Unpad(torch.autograd.Function):
    """The inverse of Pad; its backward puts zeros on padding."""

    @staticmethod
    def forward(ctx, padded, documents):
        ctx.documents = documents
        return padded.index_select(0, documents.scatter)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.documents.gather) * ctx.documents.real, None


def attend_documents(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | Branches | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """AttentionInterface function: query [1, heads, tokens, width], key and value [1, kv heads,
    tokens, width] -> [1, tokens, heads, width]. Without `documents` all tokens of a row are one
    document (generation, evaluation). A model's own dropout on attention weights (GPT-2, BioGPT) is
    left out: the GPU's kernel has none, and the adapter has dropout of its own.
    """
    if isinstance(documents, Branches):
        if documents.record is not None:
            documents.record[module.layer_idx] = (key, value)
        return (
            attend_branches(module, query, key, value, scaling, sliding_window, softcap, documents),
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


@dataclass(frozen=True)
class Branches:
    """Packed segments that attend to their own tokens and to those of earlier segments that they
    continue.

    A segment's keys are the shared prefix, its ancestors' tokens, then its own: queries are the
    last of its keys. Inference only. sources int64 [sum of keys]: place of every segment's keys in
    (prefix + packed tokens); cu_queries, cu_keys int32 [segments + 1]; prefix: keys and values [1,
    kv heads, prefix tokens, width] by layer; record: where a plain pass leaves its keys and values
    for that; groups (backend grouped): segments of like size as (queries [n, q], keys [n, k],
    distance [n, 1, q, k]) with the distance from key to query, negative for padding, or None where
    no segment has an ancestor; scatter int64 [tokens]: slot of each token among the groups'; masks:
    what of `distance` each width of window leaves, made once.
    """

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    max_queries: int
    max_keys: int
    sources: torch.Tensor
    prefix: dict[int, tuple[torch.Tensor, torch.Tensor]]
    record: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    groups: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], ...] = ()
    scatter: torch.Tensor | None = None
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def mask(self, group: int, window: int | None, additive: torch.dtype | None) -> torch.Tensor:
        """bool [n, 1, q, k], or 0 and -inf in the dtype `additive`: then attention need not convert
        it in every layer.
        """
        if (group, window) not in self.masks:
            distance = self.groups[group][2]
            allowed = (distance >= 0) & (distance < window) if window else distance >= 0
            if additive is not None:
                allowed = torch.zeros(
                    allowed.shape, dtype=additive, device=allowed.device
                ).masked_fill(allowed.logical_not(), float("-inf"))
            self.masks[group, window] = allowed
        return self.masks[group, window]


def locate_branches(
    lengths: list[int],
    parents: list[int | None],
    device: torch.device,
    prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
    shared: int = 0,
    backend: str = "varlen",
) -> Branches:
    """Segments in packed order, each with the number of the segment it continues (None: only the
    shared prefix); backend: varlen or grouped."""
    starts = [0, *itertools.accumulate(lengths)]
    keys: list[torch.Tensor] = []
    for number, parent in enumerate(parents):
        before = keys[parent] if parent is not None else torch.arange(shared)
        keys.append(
            torch.cat([before, torch.arange(shared + starts[number], shared + starts[number + 1])])
        )
    sizes = [len(k) for k in keys]
    cumulated = [
        torch.tensor([0, *itertools.accumulate(values)], dtype=torch.int32)
        for values in (lengths, sizes)
    ]
    groups = ()
    scatter = None
    if is_grouped(backend, device):
        groups, scatter = group_branches(lengths, starts, keys)
        scatter = scatter.to(device)
    return Branches(
        *(values.to(device) for values in cumulated),
        max(lengths),
        max(sizes),
        torch.cat(keys).to(device),
        prefix or {},
        None,
        tuple(
            tuple(None if tensor is None else tensor.to(device) for tensor in part)
            for part in groups
        ),
        scatter,
    )


def group_branches(
    lengths: list[int], starts: list[int], keys: list[torch.Tensor]
) -> tuple[list, torch.Tensor]:
    """Segments of like size side by side, padded to the group's longest by repeating a token that
    is masked or dropped.
    """
    order = sorted(range(len(lengths)), key=lambda s: (-len(keys[s]), -lengths[s]))
    members: list[list[int]] = []
    for segment in order:
        first = members[-1][0] if members else segment
        alike = (len(keys[first]) == lengths[first]) is (len(keys[segment]) == lengths[segment])
        alike = (
            alike
            and 0.8 * len(keys[first]) <= len(keys[segment])
            and 0.8 * lengths[first] <= lengths[segment] <= lengths[first]
        )
        if members and alike:
            members[-1].append(segment)
        else:
            members.append([segment])
    groups = []
    scatter = torch.empty(sum(lengths), dtype=torch.int64)
    slot = 0
    for group in members:
        wide = max(len(keys[s]) for s in group)
        high = lengths[group[0]]
        at_query = torch.arange(high)
        at_key = torch.arange(wide)
        queries = []
        sources = []
        distances = []
        for s in group:
            queries.append(starts[s] + at_query.clamp(max=lengths[s] - 1))
            sources.append(keys[s][at_key.clamp(max=len(keys[s]) - 1)])
            distance = (at_query[:, None] + len(keys[s]) - lengths[s]) - at_key[None]
            distances.append(distance.masked_fill(at_key[None] >= len(keys[s]), -1))
            scatter[starts[s] : starts[s] + lengths[s]] = slot + at_query[: lengths[s]]
            slot += high
        plain = wide == high  # causal over its own tokens: needs no mask
        groups.append(
            (
                torch.stack(queries),
                torch.stack(sources),
                None if plain else torch.stack(distances)[:, None],
            )
        )
    return groups, scatter


def attend_branches(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    branches: Branches,
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


def gather_rows(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tokens [tokens, heads, width], index [rows, length] -> [rows, heads, length, width]"""
    return (
        tokens.index_select(0, index.flatten())
        .view(*index.shape, *tokens.shape[1:])
        .transpose(1, 2)
    )


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


AttentionInterface.register(DOCUMENTS, attend_documents)


class Choice(NamedTuple):
    """A backend's name, and why it was taken."""

    backend: str
    reason: str


def choose_backend(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    architecture: PretrainedConfig,
    capability: tuple[int, int] | None = None,
) -> Choice:
    """Backend of config.Model.attention, "auto" resolved: varlen where its kernel runs, else the
    flash-attn package, else grouped.

    capability: of a GPU that is not here; default this machine's (hardware.read_capability).

    Raises:
        AttentionError: the asked backend cannot run here.
    """
    text = architecture.get_text_config()
    softcap = getattr(text, "attn_logit_softcapping", None)
    gpu = device.type == "cuda"
    old = explain_flash(device, dtype, text, capability)
    obstacles = {
        "varlen": (
            None
            if not gpu
            else old or ("attention softcap" if softcap is not None else explain_widths(text))
        ),
        "flash": old or "the flash-attn package is not installed",
        "grouped": None,
        "flex": None if gpu else "a CPU",
        "sdpa": None if softcap is None else "attention softcap",
    }
    # Importing the package takes seconds.
    if old is None and (requested == "flash" or obstacles["varlen"]):
        obstacles["flash"] = try_flash_package()
    if requested == "auto":
        return choose_automatically(gpu, obstacles)
    if obstacles[requested]:
        needs = {
            "varlen": (
                "a GPU of compute capability 8.0, a 16-bit dtype, heads of a multiple of 8 up to"
                " 256 and no softcap"
            ),
            "flash": (
                "a GPU of compute capability 8.0, a 16-bit dtype, heads of a multiple of 8 up to"
                " 256 and the flash-attn package"
            ),
            "flex": "a GPU",
            "sdpa": "a model without attention softcap",
        }[requested]
        raise AttentionError(
            f"model.attention {requested} needs {needs}; here is {obstacles[requested]}; use auto"
        )
    if requested == "varlen" and not gpu:
        return Choice("grouped", "a CPU has no variable-length kernel")
    return Choice(requested, "model.attention asks for it")


def choose_automatically(gpu: bool, obstacles: dict[str, str | None]) -> Choice:
    if not gpu:
        return Choice("grouped", "a CPU has no variable-length kernel")
    if not obstacles["varlen"]:
        return Choice("varlen", "torch's variable-length flash kernel runs here")
    reason = f"torch's variable-length kernel cannot run: {obstacles['varlen']}"
    if not obstacles["flash"]:
        return Choice("flash", reason)
    broken = (
        f"; flash-attn is passed over: {obstacles['flash']}"
        if "import" in obstacles["flash"]
        else ""
    )
    return Choice("grouped", reason + broken)


def explain_flash(
    device: torch.device,
    dtype: torch.dtype,
    text: PretrainedConfig,
    capability: tuple[int, int] | None,
) -> str | None:
    """Why flash attention, torch's or the package's, cannot run; None where it can
    (pytorch/aten/src/ATen/native/transformers/cuda, flash_attn/flash_api.cpp)."""
    if device.type != "cuda":
        return "a CPU"
    capability = capability or read_capability(device)
    if capability < AMPERE:
        return f"compute capability {name_capability(capability)}, below {name_capability(AMPERE)}"
    if dtype not in (torch.float16, torch.bfloat16):
        return str(dtype).removeprefix("torch.")
    width = getattr(text, "head_dim", None)
    if width is None and getattr(text, "num_attention_heads", None):
        width = text.hidden_size // text.num_attention_heads
    if width and (width % ALIGNED or width > 256):
        return f"head width {width}, not a multiple of {ALIGNED} up to 256"
    return None


def explain_widths(text: PretrainedConfig) -> str | None:
    """Why torch's variable-length kernel cannot run on a model whose values are of another width
    than its queries.
    """
    values = getattr(text, "v_head_dim", None)
    queries = getattr(text, "qk_head_dim", None) or getattr(text, "head_dim", None)
    return (
        f"values {values} wide and queries {queries}"
        if values and queries and values != queries
        else None
    )


def try_flash_package() -> str | None:
    """Why the flash-attn package cannot be used. One that was built for another torch ends its
    import in one of many errors.
    """
    if importlib.util.find_spec("flash_attn") is None:
        return "the flash-attn package is not installed"
    try:
        importlib.import_module("flash_attn")
    # ImportError, OSError or RuntimeError, by what does not match
    except Exception as error:  # noqa: BLE001
        return f"its import ends in {type(error).__name__} ({' '.join(str(error).split())[:120]})"
    return None


def packing_arguments(backend: str, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Keyword arguments that tell the model's attention where documents end; `batch` is from
    packing.collate.
    """
    cu_seqlens = torch.as_tensor(batch["cu_seqlens"])
    longest = batch["max_seqlen"]
    if backend in ("varlen", "grouped"):
        return {"documents": locate_documents(cu_seqlens, longest, device, backend)}
    if backend == "flash":
        cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        return {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    return {}


def move_batch(batch: dict[str, Any], backend: str, device: torch.device) -> dict[str, Any]:
    """Batch of packing.collate -> arguments of losses.AnswerLoss on the device; to a GPU from
    pinned memory, without waiting.
    """
    tensors = {
        key: torch.from_numpy(batch[key])
        for key in ("input_ids", "position_ids", "predict_at", "targets")
    }
    if device.type == "cuda":
        tensors = {
            key: tensor.pin_memory().to(device, non_blocking=True)
            for key, tensor in tensors.items()
        }
    return tensors | packing_arguments(backend, batch, device)


def find_device(model: torch.nn.Module) -> torch.device:
    """Where a model computes: where its rotary tables are (offloaded weights rest elsewhere), else
    its weights.
    """
    return next(itertools.chain(model.buffers(), model.parameters())).device


@contextlib.contextmanager
def without_outliers(model: torch.nn.Module) -> Iterator[None]:
    """bitsandbytes' int8 layers multiply the columns in which any row has a large input in 16 bits:
    so one row changes how its neighbours are rounded, which is no mistake of attention."""
    states = [
        module.state
        for module in model.modules()
        if hasattr(getattr(module, "state", None), "threshold")
    ]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold


@torch.no_grad()
def verify_isolation(
    backbone: torch.nn.Module, backend: str, vocabulary: int, tolerance: float
) -> float:
    """Prove on the loaded model that packed documents do not see each other.

    Runs three documents of random tokens packed and alone, and packed again with the first one
    changed.

    Returns: the largest difference of hidden states between packed and alone, relative to the
        largest hidden state.

    Raises: AttentionError: the difference is over `tolerance`, or a document changed with its
        neighbour.
    """
    device = find_device(backbone)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(vocabulary, (length,), generator=generator) for length in (7, 12, 9)]

    def run(parts: list[torch.Tensor]) -> torch.Tensor:
        lengths = torch.tensor([len(part) for part in parts])
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        batch = {"cu_seqlens": cu_seqlens, "max_seqlen": int(lengths.max())}
        position_ids = torch.cat([torch.arange(len(part)) for part in parts])
        out = backbone(
            input_ids=torch.cat(parts)[None].to(device),
            position_ids=position_ids[None].to(device),
            attention_mask=None,
            use_cache=False,
            **packing_arguments(backend, batch, device),
        )
        return out.last_hidden_state[0].float()  # [tokens, hidden]

    training = backbone.training
    backbone.eval()
    with without_outliers(backbone):
        packed = run(documents)
        alone = torch.cat([run([document]) for document in documents])
        other = run([(documents[0] + 1) % vocabulary, *documents[1:]])
    backbone.train(training)
    scale = packed.abs().max().item()
    error = (packed - alone).abs().max().item() / scale
    leak = (packed - other)[len(documents[0]) :].abs().max().item() / scale
    if not error <= tolerance or not leak <= tolerance / 10:  # also true for NaN
        raise AttentionError(
            f"attention {backend} does not isolate packed rows on this model (packed against alone"
            f" {error:.1e}, neighbour's influence {leak:.1e}, allowed {tolerance:.0e}); choose"
            " another --model.attention or set --data.packing false"
        )
    return error
