"""Opening data sets: shards that are missing or of the wrong size are found before anything is read."""

import pytest

from rdm_scale.config import DataSource
from rdm_scale.data import LatentStream
from rdm_scale.data.dataset import open_dataset
from rdm_scale.data.held_out import HeldOut
from rdm_scale.errors import DataError
from rdm_scale.storage.location import Location
from tests.support.latent_sets import WriteSet


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_shards_that_contradict_the_manifest_are_found_at_the_start(
    write_set: WriteSet, memory: Location, where: str, damage: str
) -> None:
    latents = write_set(29, place=memory if where == "memory" else None)
    for name in ("shard-000001.tar", "shard-000002.tar"):
        place = latents.folder / name
        content = place.read()
        if damage == "missing":
            place.remove()
        else:
            place.write(content[:-1] if damage == "truncated" else content + b"\0")
    first, size = latents.folder / "shard-000001.tar", latents.manifest.shards[1].bytes
    found = {"missing": "is missing", "truncated": f"has {size - 1} bytes", "longer": f"has {size + 1} bytes"}[damage]
    damaged = open_dataset(DataSource(path=latents.url)).damaged
    assert sorted(damaged) == [1, 2] and found in str(damaged[1])
    for build in (
        lambda: LatentStream(latents.url, global_batch_size=8, seed=5),
        lambda: HeldOut(latents.url, 8, batch_size=4),
    ):
        with pytest.raises(DataError, match=found) as raised:
            build()
        assert str(first) in str(raised.value)


def test_files_are_known_by_size_and_version(write_set: WriteSet) -> None:
    latents = write_set(29)
    opened = open_dataset(DataSource(path=latents.url, weight=2.5))
    assert (opened.manifest, opened.weight, opened.damaged) == (latents.manifest, 2.5, {})
    assert all(opened.files[shard.name].bytes == shard.bytes for shard in latents.manifest.shards)
