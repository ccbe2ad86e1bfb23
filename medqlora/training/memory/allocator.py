"""A replay of CUDA's caching allocator: what it would reserve for a sequence of tensors."""

from __future__ import annotations

import bisect
from collections import Counter
from typing import NamedTuple

MIB = 2**20
# The allocator rounds every tensor up to a multiple of this many bytes
# (c10/core/AllocatorConfig.h, kMinBlockSize).
BLOCK = 512
# Expandable segments grow by pages: small ones for tensors of up to 1 MiB, large ones for others.
SMALL_PAGE = 2 * MIB
LARGE_PAGE = 20 * MIB


def segments_expand() -> bool:
    """Say whether the allocator of this process has expandable segments.

    The answer comes from a real allocation. Without a GPU it is True, because the scripts ask for
    expandable segments.
    """
    import torch

    if not torch.cuda.is_available():
        return True
    probe = torch.empty(1, device="cuda")
    expand = any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())
    del probe
    return expand


class Reserve(NamedTuple):
    """Bytes of the GPU's memory that the allocator reserves.

    Attributes:
        plenty: The reserve while the GPU has enough free memory.
        short: The reserve when memory runs out. The allocator then returns every segment (with
            expandable segments every page) that holds no tensor, which takes time.
    """

    plenty: int
    short: int


def replay_allocator(events: list[tuple[int, int]], expandable: bool = False) -> Reserve:
    """Compute what the caching allocator would reserve for a sequence of tensors.

    There is one pool for tensors of up to 1 MiB and one for larger ones. In each pool the smallest
    free block that is large enough is taken and split, and a freed block is joined with its free
    neighbours of the same segment (c10/cuda/CUDACachingAllocator.cpp).

    Args:
        events: For each tensor that is made, its number and its bytes; for each that is freed, its
            number and 0.
        expandable: Whether each pool has one segment that grows at its end, instead of many
            segments of fixed size.
    """
    # The free blocks of each pool as (size, segment, offset), sorted by size.
    free: tuple[list, list] = ([], [])
    ends = [0, 0]  # The expandable segment of each pool ends at this offset.
    used_blocks: dict[int, tuple[int, int, int, int]] = {}  # number -> pool, size, segment, offset
    reserved = 0
    segment_sizes: list[int] = []  # bytes of each fixed segment
    # Number of used blocks in each page, or in each fixed segment.
    blocks_inside: Counter[tuple[int, int]] = Counter()
    occupied = 0  # bytes of the pages and segments that hold a used block
    most_occupied = 0

    def find_pages(pool: int, size: int, segment: int, offset: int) -> dict[tuple[int, int], int]:
        """Return the pages, or the fixed segment, that a block lies in, with their bytes."""
        if not expandable:
            return {(-1, segment): segment_sizes[segment]}
        page = (SMALL_PAGE, LARGE_PAGE)[pool]
        numbers = range(offset // page, (offset + size - 1) // page + 1)
        return {(pool, number): page for number in numbers}

    for number, wanted in events:
        if not wanted:
            block = used_blocks.pop(number)
            for place, size in find_pages(*block).items():
                blocks_inside[place] -= 1
                if not blocks_inside[place]:
                    occupied -= size
            release_block(free, *block)
            continue
        pool = int(wanted > MIB)
        index = bisect.bisect_left(free[pool], (wanted,))
        if index < len(free[pool]):
            size, segment, offset = free[pool].pop(index)
        elif expandable:
            page = (SMALL_PAGE, LARGE_PAGE)[pool]
            segment = -1
            # The free block at the end of the segment is part of the block that grows from it.
            size = 0
            offset = ends[pool]
            for last in free[pool]:
                if last[2] + last[0] == ends[pool]:
                    size, _, offset = last
                    free[pool].remove(last)
                    break
            grown = -(-(wanted - size) // page) * page
            size += grown
            ends[pool] += grown
            reserved += grown
        else:
            size = choose_segment_size(wanted)
            segment = len(segment_sizes)
            offset = 0
            segment_sizes.append(size)
            reserved += size
        rest = size - wanted
        smallest_rest = MIB if pool and not expandable else BLOCK
        if rest >= smallest_rest:
            bisect.insort(free[pool], (rest, segment, offset + wanted))
            size = wanted
        used_blocks[number] = (pool, size, segment, offset)
        for place, place_size in find_pages(*used_blocks[number]).items():
            if not blocks_inside[place]:
                occupied += place_size
            blocks_inside[place] += 1
        most_occupied = max(most_occupied, occupied)
    return Reserve(reserved, most_occupied)


def choose_segment_size(wanted: int) -> int:
    """Return the bytes of the fixed segment that is reserved for a tensor of `wanted` bytes."""
    if wanted <= MIB:
        return SMALL_PAGE
    if wanted < 10 * MIB:
        return LARGE_PAGE
    return -(-wanted // (2 * MIB)) * 2 * MIB


def release_block(free: tuple[list, list], pool: int, size: int, segment: int, offset: int) -> None:
    """Put a block back into its pool, joined with its free neighbours."""
    neighbours = []
    for block in free[pool]:
        touches = block[2] + block[0] == offset or offset + size == block[2]
        if block[1] == segment and touches:
            neighbours.append(block)
    for block in neighbours:
        free[pool].remove(block)
        size += block[0]
        offset = min(offset, block[2])
    bisect.insort(free[pool], (size, segment, offset))
