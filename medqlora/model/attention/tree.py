"""Prompts that share a beginning, as branches of one packed sequence."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from medqlora.model.attention.documents import is_grouped


@dataclass(frozen=True)
class PrefixTree:
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


def locate_prefix_tree(
    lengths: list[int],
    parents: list[int | None],
    device: torch.device,
    prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
    shared: int = 0,
    backend: str = "varlen",
) -> PrefixTree:
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
        groups, scatter = group_prefix_tree(lengths, starts, keys)
        scatter = scatter.to(device)
    return PrefixTree(
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


def group_prefix_tree(
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


def gather_rows(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tokens [tokens, heads, width], index [rows, length] -> [rows, heads, length, width]"""
    return (
        tokens.index_select(0, index.flatten())
        .view(*index.shape, *tokens.shape[1:])
        .transpose(1, 2)
    )
