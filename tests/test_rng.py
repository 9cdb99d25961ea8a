"""Keyed randomness: fixed keys, distinct keys for distinct purposes, independent generators."""

import pytest
import torch
import xxhash

from rdm_scale import rng


def test_key_is_the_documented_hash_of_its_parts() -> None:
    assert rng.key(7, "noise", 12) == xxhash.xxh3_64(b"7\x1fnoise\x1fint:12").intdigest() % 2**63
    assert rng.key(7, "x", "a/b.png", 0) == xxhash.xxh3_64(b"7\x1fx\x1fstr:a/b.png\x1fint:0").intdigest() % 2**63


def test_key_never_changes() -> None:
    """Neither between processes nor between releases: resumed runs rely on it."""
    assert (rng.key(7, "noise", "a", 12), rng.key(0, "init")) == (9042133693415243533, 2815299708589431485)


def test_keys_are_63_bits_and_differ_in_every_argument() -> None:
    arguments = [
        (s, p, i, *more) for s in (0, 1) for p in ("a", "b") for i in range(500) for more in ((), (0,), ("0",))
    ]
    keys = [rng.key(*each) for each in arguments]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys) and max(keys) > 2**62


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, "a", 23), (1, "a", 2, 3)),
        ((1, "a2", 3), (1, "a", 23)),
        ((12, "a"), (1, "2a")),
        ((1, "a", 1), (1, "a", "1")),
    ],
)
def test_argument_lists_that_read_alike_do_not_collide(one: tuple[int, str], other: tuple[int, str]) -> None:
    assert rng.key(*one) != rng.key(*other)


@pytest.mark.parametrize("arguments", [(0, "a\x1fb"), (0, "a", "b\x1fint:1")])
def test_the_separator_is_refused(arguments: tuple[int, str]) -> None:
    with pytest.raises(ValueError, match="separator"):
        rng.key(*arguments)


def test_generators_do_not_share_state() -> None:
    alone = torch.rand(5, generator=rng.generator(3, "t", 8))
    first, second = rng.generator(3, "t", 8), rng.generator(3, "t", 9)
    torch.rand(100, generator=second)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(5, generator=first), alone)
    assert not torch.equal(torch.rand(5, generator=rng.generator(3, "t", 9)), alone)


def test_draws_over_neighboring_indices_are_uniform() -> None:
    """Chi-square over 20 bins; 43.8 is exceeded with probability 0.001 at 19 degrees of freedom."""
    draws = torch.tensor([torch.rand((), generator=rng.generator(0, "t", i)).item() for i in range(4000)])
    counts = torch.histc(draws, bins=20, min=0, max=1)
    assert ((counts - 200) ** 2 / 200).sum() < 43.8
