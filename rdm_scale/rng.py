"""Keyed randomness: every random number is a function of its purpose, never of what was drawn before.

A generator is made from (seed, purpose, indices), for instance the run's seed, "noise" and the global position of a
sample. Neither the rank that draws it nor the order of the draws has any influence, so a sample gets the same noise in
every layout and after every resume.
"""

import torch
import xxhash


def key(seed: int, purpose: str, *indices: int | str) -> int:
    """A 63-bit key that is a fixed function of its arguments.

    Raises:
        ValueError: the purpose or an index contains the unit separator (0x1F), which separates the parts of the
            hashed string and so keeps different argument lists from giving the same one.
    """
    parts = [str(seed), purpose, *(f"{type(i).__name__}:{i}" for i in indices)]
    if any("\x1f" in part for part in parts):
        raise ValueError("the parts of a key must not contain the unit separator character (0x1F)")
    return xxhash.xxh3_64_intdigest("\x1f".join(parts).encode()) & (2**63 - 1)


def generator(seed: int, purpose: str, *indices: int | str) -> torch.Generator:
    """A new CPU generator seeded with `key(seed, purpose, *indices)`."""
    return torch.Generator().manual_seed(key(seed, purpose, *indices))
