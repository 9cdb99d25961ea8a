"""Keyed randomness: every random number is a function of what it is for, never of what was drawn before.

A generator is made from (seed, purpose, indices), for instance the run's seed, "noise" and the global
position of a sample. Which rank draws it, in which order, and after how many others cannot matter, so
the same sample meets the same noise in every layout and after every resume.
"""

import torch
import xxhash


def key(seed: int, purpose: str, *indices: int | str) -> int:
    """A 63-bit key that is a fixed function of its arguments.

    The parts are joined by a character that `purpose` and string indices must not hold, so that no two
    different argument lists can meet in one string.
    """
    parts = [str(seed), purpose, *(f"{type(i).__name__}:{i}" for i in indices)]
    if any("\x1f" in part for part in parts):
        raise ValueError("a key's parts must not hold the unit separator character")
    return xxhash.xxh3_64_intdigest("\x1f".join(parts).encode()) & (2**63 - 1)


def generator(seed: int, purpose: str, *indices: int | str) -> torch.Generator:
    """A CPU generator of its own for (seed, purpose, indices)."""
    return torch.Generator().manual_seed(key(seed, purpose, *indices))
