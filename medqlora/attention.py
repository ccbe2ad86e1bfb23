"""Document-isolated attention over packed rows, and the proof of it on the loaded model.

A packed batch is one sequence of many documents. `varlen` runs each document's own causal attention: torch's
variable-length flash kernel on CUDA, scaled_dot_product_attention on groups of documents of like length elsewhere (T^2 masks
cost more time than packing saves). `flash` is the flash-attn package; `flex` and `sdpa` build masks from position_ids.
"""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from medqlora.config import UserError

SHORT = 512  # up to this length plain matrix products beat the CPU's fused attention in bfloat16, two to four times
DOCUMENTS = "medqlora_documents"  # our name in transformers' AttentionInterface
IMPLEMENTATIONS = {"varlen": DOCUMENTS, "flash": "flash_attention_2", "flex": "flex_attention", "sdpa": "sdpa"}


class AttentionError(UserError):
    """A backend that does not exist here, or that mixes packed documents."""


@dataclass(frozen=True)
class Documents:
    """Where a packed sequence's documents lie.

    cu_seqlens int32 [documents + 1]; max_seqlen: longest; for the grouped path also gather int64 [padded tokens]: source of
    each slot, documents of like length side by side and padded to their group's longest; scatter int64 [tokens]: slot of
    each token; real bool [padded tokens, 1, 1]; groups: (documents, length) of each group.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    gather: torch.Tensor | None = None
    scatter: torch.Tensor | None = None
    real: torch.Tensor | None = None
    groups: tuple[tuple[int, int], ...] = ()


def locate_documents(cu_seqlens: torch.Tensor, max_seqlen: int, device: torch.device) -> Documents:
    """Prepare once per batch what every layer needs."""
    if device.type in ("cuda", "meta"):
        return Documents(cu_seqlens.to(device, non_blocking=True), max_seqlen)
    starts, lengths = cu_seqlens[:-1].tolist(), cu_seqlens.diff().tolist()
    groups: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        if groups and lengths[document] >= 0.8 * lengths[groups[-1][0]]:
            groups[-1].append(document)
        else:
            groups.append([document])
    slots, keeps = [], []
    for members in groups:
        longest = lengths[members[0]]
        place = torch.arange(longest)
        for document in members:
            slots.append(starts[document] + place.clamp(max=lengths[document] - 1))
            keeps.append(place < lengths[document])
    gather, real = torch.cat(slots), torch.cat(keeps)
    scatter = torch.empty(int(cu_seqlens[-1]), dtype=torch.int64)
    scatter[gather[real]] = real.nonzero().flatten()
    shapes = tuple((len(members), lengths[members[0]]) for members in groups)
    return Documents(cu_seqlens, max_seqlen, gather.to(device), scatter.to(device), real[:, None, None].to(device), shapes)


class Pad(torch.autograd.Function):
    """tokens [tokens, heads, width] -> [padded tokens, heads, width]; padding gets no gradient, so backward is a gather."""

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
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    documents: Documents | Branches | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """AttentionInterface function: query [1, heads, tokens, width], key and value [1, kv heads, tokens, width] ->
    [1, tokens, heads, width]. Without `documents` all tokens of a row are one document (generation, evaluation). A model's own
    dropout on attention weights (GPT-2, BioGPT) is left out: the GPU's kernel has none, and the adapter has dropout of its own."""
    if isinstance(documents, Branches):
        if documents.record is not None:
            documents.record[module.layer_idx] = (key, value)
        return attend_branches(module, query, key, value, scaling, sliding_window, softcap, documents), None
    if documents is None:
        return attend_rows(query, key, value, attention_mask, scaling, sliding_window, softcap), None
    if documents.gather is None:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [tokens, heads, width]
        window = (sliding_window - 1 if sliding_window else -1, 0)
        out = varlen_attn(
            q, k, v, documents.cu_seqlens, documents.cu_seqlens, documents.max_seqlen, documents.max_seqlen,
            scale=scaling, window_size=window, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out[None], None
    padded = [Pad.apply(tensor[0].transpose(0, 1), documents) for tensor in (query, key, value)]
    sizes = [count * length for count, length in documents.groups]
    outputs = []
    for (count, length), *parts in zip(documents.groups, *(tensor.split(sizes) for tensor in padded), strict=True):
        q, k, v = (part.view(count, length, *part.shape[1:]).transpose(1, 2) for part in parts)
        out = attend_rows(q, k, v, None, scaling, sliding_window, softcap)  # [count, length, heads, width]
        outputs.append(out.reshape(count * length, *out.shape[2:]))
    return Unpad.apply(torch.cat(outputs), documents)[None], None


@dataclass(frozen=True)
class Branches:
    """Packed segments that attend to their own tokens and to those of earlier segments that they continue.

    A segment's keys are the shared prefix, its ancestors' tokens, then its own: queries are the last of its keys. Inference
    only. sources int64 [sum of keys]: place of every segment's keys in (prefix + packed tokens); cu_queries, cu_keys int32
    [segments + 1]; prefix: keys and values [1, kv heads, prefix tokens, width] by layer; record: where a plain pass leaves
    its keys and values for that; groups (CPU): segments of like size as (queries [n, q], keys [n, k], distance [n, 1, q, k])
    with the distance from key to query, negative for padding, or None where no segment has an ancestor; scatter int64
    [tokens]: slot of each token among the groups'; masks: what of `distance` each width of window leaves, made once.
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
        """bool [n, 1, q, k], or 0 and -inf in the dtype `additive`: then attention need not convert it in every layer."""
        if (group, window) not in self.masks:
            distance = self.groups[group][2]
            allowed = (distance >= 0) & (distance < window) if window else distance >= 0
            if additive is not None:
                allowed = torch.zeros(allowed.shape, dtype=additive, device=allowed.device).masked_fill(~allowed, float("-inf"))
            self.masks[group, window] = allowed
        return self.masks[group, window]


def locate_branches(
    lengths: list[int], parents: list[int | None], device: torch.device,
    prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None, shared: int = 0,
) -> Branches:  # fmt: skip
    """Segments in packed order, each with the number of the segment it continues (None: only the shared prefix)."""
    starts = [0, *itertools.accumulate(lengths)]
    keys: list[torch.Tensor] = []
    for number, parent in enumerate(parents):
        before = keys[parent] if parent is not None else torch.arange(shared)
        keys.append(torch.cat([before, torch.arange(shared + starts[number], shared + starts[number + 1])]))
    sizes = [len(k) for k in keys]
    cumulated = [torch.tensor([0, *itertools.accumulate(values)], dtype=torch.int32) for values in (lengths, sizes)]
    groups, scatter = (), None
    if device.type != "cuda":
        groups, scatter = group_branches(lengths, starts, keys)
        scatter = scatter.to(device)
    return Branches(
        *(values.to(device) for values in cumulated), max(lengths), max(sizes), torch.cat(keys).to(device), prefix or {},
        None, tuple(tuple(None if tensor is None else tensor.to(device) for tensor in part) for part in groups), scatter,
    )  # fmt: skip


def group_branches(lengths: list[int], starts: list[int], keys: list[torch.Tensor]) -> tuple[list, torch.Tensor]:
    """Segments of like size side by side, padded to the group's longest by repeating a token that is masked or dropped."""
    order = sorted(range(len(lengths)), key=lambda s: (-len(keys[s]), -lengths[s]))
    members: list[list[int]] = []
    for segment in order:
        first = members[-1][0] if members else segment
        alike = (len(keys[first]) == lengths[first]) is (len(keys[segment]) == lengths[segment])
        alike = alike and 0.8 * len(keys[first]) <= len(keys[segment]) and 0.8 * lengths[first] <= lengths[segment] <= lengths[first]
        if members and alike:
            members[-1].append(segment)
        else:
            members.append([segment])
    groups, scatter, slot = [], torch.empty(sum(lengths), dtype=torch.int64), 0
    for group in members:
        wide, high = max(len(keys[s]) for s in group), lengths[group[0]]
        at_query, at_key = torch.arange(high), torch.arange(wide)
        queries, sources, distances = [], [], []
        for s in group:
            queries.append(starts[s] + at_query.clamp(max=lengths[s] - 1))
            sources.append(keys[s][at_key.clamp(max=len(keys[s]) - 1)])
            distance = (at_query[:, None] + len(keys[s]) - lengths[s]) - at_key[None]
            distances.append(distance.masked_fill(at_key[None] >= len(keys[s]), -1))
            scatter[starts[s] : starts[s] + lengths[s]] = slot + at_query[: lengths[s]]
            slot += high
        plain = wide == high  # causal over its own tokens: needs no mask
        groups.append((torch.stack(queries), torch.stack(sources), None if plain else torch.stack(distances)[:, None]))
    return groups, scatter


def attend_branches(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None,
    sliding_window: int | None, softcap: float | None, branches: Branches,
) -> torch.Tensor:  # fmt: skip
    """As attend_documents, for segments of a tree: query [1, heads, tokens, width] -> [1, tokens, heads, width]."""
    if branches.prefix:
        before = branches.prefix[module.layer_idx]
        key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [tokens, heads, width]
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(
            q, k.index_select(0, branches.sources), v.index_select(0, branches.sources), branches.cu_queries, branches.cu_keys,
            branches.max_queries, branches.max_keys, scale=scaling, enable_gqa=q.shape[1] != k.shape[1],
            window_size=(sliding_window - 1 if sliding_window else -1, 0),
        )[None]  # fmt: skip
    outputs = []
    for number, (queries, sources, distance) in enumerate(branches.groups):
        parts = (gather_rows(tensor, index) for tensor, index in ((q, queries), (k, sources), (v, sources)))
        if distance is None:
            out = attend_rows(*parts, None, scaling, sliding_window, softcap)
        else:
            explicit = computes_explicitly(query, sources.shape[1], softcap)
            mask = branches.mask(number, sliding_window, None if explicit else query.dtype)
            out = attend_rows(*parts, mask, scaling, None, softcap)  # [segments, queries, heads, width]
        outputs.append(out.flatten(0, 1))
    return torch.cat(outputs).index_select(0, branches.scatter)[None]


def gather_rows(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tokens [tokens, heads, width], index [rows, length] -> [rows, heads, length, width]"""
    return tokens.index_select(0, index.flatten()).view(*index.shape, *tokens.shape[1:]).transpose(1, 2)


def computes_explicitly(query: torch.Tensor, keys: int, softcap: float | None) -> bool:
    """Whether attention is plain matrix products here instead of torch's fused kernel."""
    return softcap is not None or (not query.is_cuda and query.dtype is not torch.float32 and keys <= SHORT)


def attend_rows(query, key, value, mask, scaling, sliding_window, softcap) -> torch.Tensor:
    """Causal attention of each row for itself: [rows, heads, queries, width] -> [rows, queries, heads, width].

    Softcap is Gemma-2's: scores -> softcap * tanh(scores / softcap) (arXiv 2408.00118, section 2).
    """
    queries, keys, heads = query.shape[2], key.shape[2], query.shape[1]
    if key.shape[1] != heads and mask is not None and not computes_explicitly(query, keys, softcap) and not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True).transpose(1, 2)
    if key.shape[1] != heads:
        key, value = (tensor.repeat_interleave(heads // key.shape[1], dim=1) for tensor in (key, value))
    windowed = sliding_window is not None and sliding_window < keys
    explicit = computes_explicitly(query, keys, softcap)
    if mask is None and not windowed and not explicit and queries == keys:
        return attend_fused(query, key, value, None, scaling).transpose(1, 2)
    if mask is None:
        at = torch.arange(keys, device=query.device)
        distance = at[keys - queries :, None] - at[None]  # [queries, keys]
        mask = (distance >= 0) & (distance < sliding_window) if windowed else distance >= 0
    if not explicit:
        return attend_fused(query, key, value, mask, scaling).transpose(1, 2)
    scores = query * (query.shape[-1] ** -0.5 if scaling is None else scaling) @ key.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # The scores are the largest tensor here: what is hidden is added in place, which needs no copy of them in either pass.
    weights = scores.add_(torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).masked_fill_(~mask, float("-inf"))).softmax(-1)
    return (weights @ value).transpose(1, 2)


def attend_fused(query, key, value, mask, scaling) -> torch.Tensor:
    """torch's fused attention, causal where there is no mask; shapes as attend_rows, but [rows, heads, queries, width] out."""
    if query.is_meta:  # a forecast for a CPU: without content torch would take its unfused formula
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, is_causal=mask is None, attn_mask=mask, scale=scaling)[0]
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling)


AttentionInterface.register(DOCUMENTS, attend_documents)


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype, softcap: float | None) -> str:
    """Backend name of config.Model.attention, "auto" resolved.

    Raises:
        AttentionError: the asked backend cannot run here.
    """
    gpu, half = device.type == "cuda", dtype in (torch.float16, torch.bfloat16)
    flash = gpu and half and importlib.util.find_spec("flash_attn") is not None
    kernel = gpu and half and softcap is None and importlib.util.find_spec("torch.nn.attention.varlen") is not None
    able = {"flash": flash, "varlen": not gpu or kernel, "flex": gpu, "sdpa": softcap is None}
    if requested == "auto":
        return next((name for name in able if able[name]), "sdpa")
    if not able[requested]:
        needs = {
            "flash": "a CUDA GPU, a 16-bit dtype and the flash-attn package",
            "varlen": "on a GPU a 16-bit dtype, torch with torch.nn.attention.varlen and a model without attention softcap",
            "flex": "a CUDA GPU",
            "sdpa": "a model without attention softcap",
        }[requested]
        raise AttentionError(f"model.attention {requested} needs {needs}; use auto")
    return requested


def packing_arguments(backend: str, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Keyword arguments that tell the model's attention where documents end; `batch` is from packing.collate."""
    cu_seqlens, longest = torch.as_tensor(batch["cu_seqlens"]), batch["max_seqlen"]
    if backend == "varlen":
        return {"documents": locate_documents(cu_seqlens, longest, device)}
    if backend == "flash":
        cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        return {
            "cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": longest, "max_length_k": longest,
        }  # fmt: skip
    return {}


def move_batch(batch: dict[str, Any], backend: str, device: torch.device) -> dict[str, Any]:
    """Batch of packing.collate -> arguments of losses.AnswerLoss on the device; to a GPU from pinned memory, without waiting."""
    tensors = {key: torch.from_numpy(batch[key]) for key in ("input_ids", "position_ids", "predict_at", "targets")}
    if device.type == "cuda":
        tensors = {key: tensor.pin_memory().to(device, non_blocking=True) for key, tensor in tensors.items()}
    return tensors | packing_arguments(backend, batch, device)


def find_device(model: torch.nn.Module) -> torch.device:
    """Where a model computes: where its rotary tables are (offloaded weights rest elsewhere), else its weights."""
    return next(itertools.chain(model.buffers(), model.parameters())).device


@torch.no_grad()
def verify_isolation(backbone: torch.nn.Module, backend: str, vocabulary: int, tolerance: float) -> float:
    """Prove on the loaded model that packed documents do not see each other.

    Runs three documents of random tokens packed and alone, and packed again with the first one changed.

    Returns:
        the largest difference of hidden states between packed and alone, relative to the largest hidden state.

    Raises:
        AttentionError: the difference is over `tolerance`, or a document changed with its neighbour.
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
            input_ids=torch.cat(parts)[None].to(device), position_ids=position_ids[None].to(device), attention_mask=None,
            use_cache=False, **packing_arguments(backend, batch, device),
        )  # fmt: skip
        return out.last_hidden_state[0].float()  # [tokens, hidden]

    training = backbone.training
    backbone.eval()
    packed, alone = run(documents), torch.cat([run([document]) for document in documents])
    other = run([(documents[0] + 1) % vocabulary, *documents[1:]])
    backbone.train(training)
    scale = packed.abs().max().item()
    error = (packed - alone).abs().max().item() / scale
    leak = (packed - other)[len(documents[0]) :].abs().max().item() / scale
    if not error <= tolerance or not leak <= tolerance / 10:  # also true for NaN
        raise AttentionError(
            f"attention {backend} does not isolate packed rows on this model (packed against alone {error:.1e}, neighbour's "
            f"influence {leak:.1e}, allowed {tolerance:.0e}); choose another --model.attention or set --data.packing false"
        )
    return error
