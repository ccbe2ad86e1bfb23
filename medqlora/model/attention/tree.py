"""Prompts that share their beginnings, as a tree of segments in one packed sequence.

A shared beginning is computed once. Each further segment continues an earlier one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from medqlora.model.attention.blocked import is_visible
from medqlora.model.attention.documents import is_grouped


@dataclass(frozen=True)
class PrefixTree:
    """Segments of a packed sequence, each of which continues an earlier segment or the prefix.

    The keys of a segment are those of the prefix, of the segments that it continues and its own, in
    this order. So its queries belong to the last of its keys. Trees are for inference only.

    The backend grouped lays segments of like size side by side, padded to the longest of a group.

    Args:
        cu_queries: Where the tokens of segments begin and end, int32 [segments + 1].
        cu_keys: Where the keys of segments begin and end in `sources`, int32 [segments + 1].
        max_queries: The largest number of tokens in a segment.
        max_keys: The largest number of keys of a segment.
        sources: The token of each key, counted over the prefix and then the packed sequence, int64
            [keys of all segments].
        prefix: The keys and values of the prefix by layer, [1, kv heads, prefix tokens, width]
            each; empty without a prefix.
        record: Where the layers put their keys and values, for the prefix of a later tree; None
            where they are not needed.
        groups: The segments of each group, as the tokens of the queries, int64 [segments, queries],
            the tokens of the keys, int64 [segments, keys], and the distance from key to query,
            int64 [segments, 1, queries, keys], which is negative for padding. The distance is None
            where the segments of the group see only their own tokens.
        scatter: Where the query of each token lies in the groups, int64 [tokens].
        masks: The masks that were made, by group and window.
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
        """Return the mask of a group; it is made once for all layers.

        Args:
            group: The number of the group.
            window: The largest number of keys that a query sees, or None.
            additive: The dtype of a mask that is added to scores, or None for a bool mask.

        Returns:
            bool [segments, 1, queries, keys], True where a query sees a key; or 0 and -inf in the
            dtype `additive`, which the fused kernel need not convert in every layer.
        """
        # The dtype need not be part of the key. Softcap and compute dtype are the same in all
        # layers, so a group's masks are all additive or all bool; the window alone differs.
        if (group, window) not in self.masks:
            _, _, distance = self.groups[group]
            mask = is_visible(distance, window)
            if additive is not None:
                # Every real query sees its own key. Only padding can have a row of -inf alone,
                # which softmax turns into NaN, and its result is dropped.
                zeros = torch.zeros(mask.shape, dtype=additive, device=mask.device)
                mask = zeros.masked_fill(mask.logical_not(), float("-inf"))
            self.masks[group, window] = mask
        return self.masks[group, window]


def locate_prefix_tree(
    lengths: list[int],
    parents: list[int | None],
    device: torch.device,
    prefix: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
    shared: int = 0,
    backend: str = "varlen",
) -> PrefixTree:
    """Prepare once per batch what the attention of every layer needs.

    Args:
        lengths: The number of tokens of each segment, in packed order.
        parents: For each segment the number of the earlier segment that it continues, or None where
            it continues the prefix.
        device: The device that is computed on.
        prefix: The keys and values of the prefix (see PrefixTree); none by default.
        shared: The number of tokens of the prefix.
        backend: "varlen" or "grouped".
    """
    starts = [0, *itertools.accumulate(lengths)]
    keys: list[torch.Tensor] = []
    # A parent stands before the segments that continue it, so its keys are known.
    for number, parent in enumerate(parents):
        inherited = keys[parent] if parent is not None else torch.arange(shared)
        # Tokens are counted over the prefix first, in the order in which attend_prefix_tree joins
        # both.
        own = torch.arange(shared + starts[number], shared + starts[number + 1])
        keys.append(torch.cat([inherited, own]))  # int64 [keys of the segment]
    key_counts = [len(segment) for segment in keys]
    groups = ()
    scatter = None
    if is_grouped(backend, device):
        groups, scatter = group_prefix_tree(lengths, starts, keys)
        scatter = scatter.to(device)
    return PrefixTree(
        cu_queries=accumulate_lengths(lengths).to(device),
        cu_keys=accumulate_lengths(key_counts).to(device),
        max_queries=max(lengths),
        max_keys=max(key_counts),
        sources=torch.cat(keys).to(device),
        prefix=prefix or {},
        groups=tuple(move_group(group, device) for group in groups),
        scatter=scatter,
    )


def accumulate_lengths(lengths: list[int]) -> torch.Tensor:
    """Return where segments of these lengths begin and end, int32 [segments + 1]."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def move_group(
    group: tuple[torch.Tensor | None, ...], device: torch.device
) -> tuple[torch.Tensor | None, ...]:
    """Return the tensors of a group on a device."""
    return tuple(None if tensor is None else tensor.to(device) for tensor in group)


def group_prefix_tree(
    lengths: list[int], starts: list[int], keys: list[torch.Tensor]
) -> tuple[list, torch.Tensor]:
    """Lay segments of like size side by side, padded to the longest of a group.

    Padding repeats a segment's last token. Such a key is masked, and the result of such a query is
    dropped.

    Args:
        lengths: The number of tokens of each segment.
        starts: The first token of each segment in the packed sequence.
        keys: The tokens of the keys of each segment, int64.

    Returns:
        The groups and the scatter of PrefixTree, on the CPU.
    """
    members: list[list[int]] = []
    # The segment with the most keys opens a group, and the others are padded to it.
    for segment in sorted(range(len(lengths)), key=lambda s: (-len(keys[s]), -lengths[s])):
        if members and belongs_beside(members[-1][0], segment, lengths, keys):
            members[-1].append(segment)
        else:
            members.append([segment])
    groups = []
    scatter = torch.empty(sum(lengths), dtype=torch.int64)  # [tokens]
    slot = 0
    for group in members:
        most_keys = max(len(keys[segment]) for segment in group)
        # belongs_beside admits no segment with more tokens than the first of its group.
        most_queries = lengths[group[0]]
        query_numbers = torch.arange(most_queries)
        key_numbers = torch.arange(most_keys)
        queries = []
        sources = []
        distances = []
        for segment in group:
            start = starts[segment]
            length = lengths[segment]
            key_count = len(keys[segment])
            queries.append(start + query_numbers.clamp(max=length - 1))
            sources.append(keys[segment][key_numbers.clamp(max=key_count - 1)])
            # A segment's queries belong to the last `length` of its keys.
            distance = (query_numbers[:, None] + key_count - length) - key_numbers[None]
            # A negative distance marks padding, which is_visible hides under every window.
            distances.append(distance.masked_fill(key_numbers[None] >= key_count, -1))
            scatter[start : start + length] = slot + query_numbers[:length]
            # attend_prefix_tree joins the groups with their padding, so padding takes slots too.
            slot += most_queries
        # Segments that see only their own tokens need no mask: causal attention hides the padding,
        # because it comes after all of a segment's tokens.
        causal = most_keys == most_queries
        distance = None if causal else torch.stack(distances)[:, None]
        groups.append((torch.stack(queries), torch.stack(sources), distance))
    return groups, scatter


def belongs_beside(first: int, segment: int, lengths: list[int], keys: list[torch.Tensor]) -> bool:
    """Whether a segment may be padded to the size of the first segment of a group.

    Either both see only their own tokens or neither does, and at most a fifth may be padding.
    """
    # A root continues nothing, so its keys are its own tokens. A group with roots alone runs
    # causally without a mask.
    first_is_root = len(keys[first]) == lengths[first]
    is_root = len(keys[segment]) == lengths[segment]
    if first_is_root is not is_root or len(keys[segment]) < 0.8 * len(keys[first]):
        return False
    return 0.8 * lengths[first] <= lengths[segment] <= lengths[first]


def gather_rows(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather tokens into rows.

    Args:
        tokens: [tokens, heads, width].
        index: The token of each place, int64 [rows, length].

    Returns:
        [rows, heads, length, width].
    """
    flat = tokens.index_select(0, index.flatten())  # [rows * length, heads, width]
    return flat.view(*index.shape, *tokens.shape[1:]).transpose(1, 2)
