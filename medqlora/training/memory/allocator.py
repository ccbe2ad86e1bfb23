"""What CUDA's caching allocator would reserve for a sequence of tensors."""

from __future__ import annotations

import bisect
from collections import Counter
from typing import NamedTuple

MIB = 2**20
# bytes: every tensor is rounded up to a multiple (c10/core/AllocatorConfig.h, kMinBlockSize)
BLOCK = 512
SMALL_PAGE = 2 * MIB
# Expandable segments grow by these, for tensors up to 1 MiB and for larger ones.
LARGE_PAGE = 20 * MIB


def segments_expand() -> bool:
    """Whether this process's GPU allocator has segments that grow, read off a real allocation; a
    GPU that is not here is taken to.
    """
    import torch

    if not torch.cuda.is_available():
        return True
    probe = torch.empty(1, device="cuda")
    expand = any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())
    del probe
    return expand


class Reserve(NamedTuple):
    """Bytes that the allocator takes of a GPU. plenty: where nothing is short; short: where memory
    runs out, and it gives back, which takes time, every segment (with expandable segments every
    page) in which nothing lives."""

    plenty: int
    short: int


def replay_allocator(events: list[tuple[int, int]], expandable: bool = False) -> Reserve:
    """What the caching allocator would reserve for this sequence of (number, bytes; 0 frees): best
    fit in two pools, blocks split and joined within their segment
    (c10/cuda/CUDACachingAllocator.cpp).

    expandable: one segment per pool, which grows at its end.
    """
    free: tuple[list, list] = ([], [])  # of each pool: (size, segment, offset), sorted
    ends = [0, 0]  # Each pool's segment grows here.
    held: dict[int, tuple[int, int, int, int]] = {}  # number -> pool, size, segment, offset
    reserved = segments = 0
    sizes: list[int] = []  # Each fixed segment has this many bytes.
    # Each page, or fixed segment, holds this many blocks.
    living: Counter[tuple[int, int]] = Counter()
    used = most = 0  # So many bytes of pages and segments hold something, now and at most.

    def find_pages(pool: int, size: int, segment: int, offset: int) -> dict[tuple[int, int], int]:
        """Pages, or the segment, that a block lies in, with their bytes."""
        if not expandable:
            return {(-1, segment): sizes[segment]}
        page = (SMALL_PAGE, LARGE_PAGE)[pool]
        return {
            (pool, place): page for place in range(offset // page, (offset + size - 1) // page + 1)
        }

    for number, wanted in events:
        if not wanted:
            block = held.pop(number)
            for place, size in find_pages(*block).items():
                living[place] -= 1
                used -= size if not living[place] else 0
            release_block(free, *block)
            continue
        pool = int(wanted > MIB)
        at = bisect.bisect_left(free[pool], (wanted,))
        if at < len(free[pool]):
            size, segment, offset = free[pool].pop(at)
        elif expandable:
            page = (SMALL_PAGE, LARGE_PAGE)[pool]
            segment = -1
            last = next(
                (block for block in free[pool] if block[2] + block[0] == ends[pool]),
                (0, segment, ends[pool]),
            )
            if last[0]:
                free[pool].remove(last)
            grown = -(-(wanted - last[0]) // page) * page
            size = last[0] + grown
            offset = last[2]
            ends[pool] += grown
            reserved += grown
        else:
            size = (
                SMALL_PAGE
                if not pool
                else LARGE_PAGE
                if wanted < 10 * MIB
                else -(-wanted // (2 * MIB)) * 2 * MIB
            )
            segment = segments
            offset = 0
            segments = segments + 1
            sizes.append(size)
            reserved += size
        rest = size - wanted
        if rest >= (MIB if pool and not expandable else BLOCK):
            bisect.insort(free[pool], (rest, segment, offset + wanted))
            size = wanted
        held[number] = (pool, size, segment, offset)
        for place, size in find_pages(*held[number]).items():
            used += size if not living[place] else 0
            living[place] += 1
        most = max(most, used)
    return Reserve(reserved, most)


def release_block(free: tuple[list, list], pool: int, size: int, segment: int, offset: int) -> None:
    """Put a block back, joined with its free neighbours."""
    for block in [
        b
        for b in free[pool]
        if b[1] == segment and (b[2] + b[0] == offset or offset + size == b[2])
    ]:
        free[pool].remove(block)
        size = size + block[0]
        offset = min(offset, block[2])
    bisect.insort(free[pool], (size, segment, offset))
