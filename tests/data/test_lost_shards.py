"""The budget of lost shards, their warnings and their substitutes."""

import pytest

from rdm_scale.data.lost_shards import LostShards
from rdm_scale.data.order import ContiguousRead
from rdm_scale.errors import DataError
from tests.support.latent_sets import WriteSet

DAMAGED = DataError("the disk is gone")


def test_without_a_budget_the_reason_itself_is_raised(write_set: WriteSet) -> None:
    lost = LostShards([write_set(29).manifest], budget=0, seed=1)
    with pytest.raises(DataError) as raised:
        lost.mark_lost(0, 1, DAMAGED)
    assert raised.value is DAMAGED and len(lost) == 0


def test_a_budget_is_counted_in_distinct_shards(write_set: WriteSet) -> None:
    manifest = write_set(29).manifest
    lost = LostShards([manifest], budget=1, seed=1)
    lost.mark_lost(0, 2, DAMAGED)
    lost.mark_lost(0, 2, DAMAGED)
    assert len(lost) == 1 and lost.samples == manifest.shards[2].samples
    assert lost.take_warnings() == ["lost shard-000002.tar: the disk is gone"] and lost.take_warnings() == []
    with pytest.raises(DataError, match=r"2 shards are lost, more than data\.lost_shards=1: the disk is gone"):
        lost.mark_lost(0, 0, DAMAGED)


def test_merged_losses_are_counted_without_a_warning(write_set: WriteSet) -> None:
    one, other = write_set(29).manifest, write_set(30).manifest
    lost = LostShards([one, other], budget=2, seed=1, known=[[other.digest, "shard-000001.tar"]])
    lost.merge([[one.digest, "shard-000000.tar"], ["another data set", "shard-000000.tar"]])
    assert lost.known == sorted([[other.digest, "shard-000001.tar"], [one.digest, "shard-000000.tar"]])
    assert lost.take_warnings() == []
    with pytest.raises(DataError, match=r"3 shards are lost.* shard-000002\.tar"):
        lost.merge([[one.digest, "shard-000002.tar"]])


def test_a_substitute_depends_on_what_is_lost_only(write_set: WriteSet) -> None:
    manifest = write_set(60).manifest  # five shards of three members
    read = ContiguousRead(0, 2, 1, 3)
    lost = LostShards([manifest], budget=4, seed=1)
    assert lost.substitute(read) is read
    lost.mark_lost(0, 2, DAMAGED)
    substitute = lost.substitute(read)
    assert substitute.shard != 2 and substitute[2:] == (1, 3)
    informed = LostShards([manifest], budget=4, seed=1, known=lost.known)
    assert informed.substitute(read) == substitute
    for shard in (0, 1, 3):
        lost.mark_lost(0, shard, DAMAGED)
    assert {lost.substitute(ContiguousRead(0, shard, 0, 2)).shard for shard in range(4)} == {4}


def test_substitutes_never_change(write_set: WriteSet) -> None:
    """Literal shards of a fixed seed: resumed runs read the substitutes that earlier releases chose."""
    manifest = write_set(240).manifest  # 20 shards
    known = [[manifest.digest, f"shard-{shard:06d}.tar"] for shard in (2, 7, 11)]
    lost = LostShards([manifest], budget=3, seed=1, known=known)
    assert [lost.substitute(ContiguousRead(0, shard, 1, 3)).shard for shard in (2, 7, 11)] == [13, 10, 9]


def test_a_data_set_without_any_readable_shard_is_an_error(write_set: WriteSet) -> None:
    manifest = write_set(4).manifest
    lost = LostShards([manifest], budget=1, seed=1, known=[[manifest.digest, "shard-000000.tar"]])
    with pytest.raises(DataError, match=r"all shards with latents of shape \[2, 1, 3, 3\] are lost"):
        lost.substitute(ContiguousRead(0, 0, 0, 1))
