"""Seeds of any size for generators that take a limited number of bits."""

from __future__ import annotations

import hashlib


def fit_seed(seed: int, bits: int) -> int:
    """Return a seed of at most `bits` bits.

    A seed that has no more is returned as it is. A larger one is replaced by bits of its SHA-256,
    so that large seeds which share their last digits still differ.

    Args:
        seed: The seed, 0 or more.
        bits: The size that the generator takes.
    """
    if seed < 1 << bits:
        return seed
    # Hexadecimal text has no limit of length, unlike decimal text in Python.
    digest = hashlib.sha256(f"{seed:x}".encode()).digest()
    return int.from_bytes(digest, "big") % (1 << bits)
