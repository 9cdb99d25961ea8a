"""Manifests: valid ones are read, and the error of an invalid one names the reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from rdm_scale.data.manifest import MANIFEST_NAME, read_manifest
from rdm_scale.errors import DataError, RdmError
from rdm_scale.storage.location import Location
from tests.support.latent_sets import WriteSet


def test_a_manifest_is_read_from_the_file_or_its_folder(write_set: WriteSet, memory: Location) -> None:
    for place in (None, memory):
        latents = write_set(10, place=place)
        for url in (latents.url, latents.url + "/", f"{latents.url}/{MANIFEST_NAME}"):
            manifest, folder = read_manifest(url)
            assert manifest == latents.manifest and str(folder) == latents.url


def test_the_digest_is_the_identity_of_the_data(write_set: WriteSet) -> None:
    one, again, other = write_set(10), write_set(10), write_set(11)
    assert one.manifest.digest == again.manifest.digest != other.manifest.digest
    place = one.folder / MANIFEST_NAME
    place.write(json.dumps(json.loads(place.read())).encode())  # other white space, the same data
    assert read_manifest(one.url)[0].digest == one.manifest.digest


def test_a_missing_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest .*nothing/manifest.json: encode"):
        read_manifest(str(tmp_path / "nothing"))


@pytest.mark.parametrize("url", ["nosuch://bucket", "memory://nothing", "/dev/null/set"])
def test_an_unreadable_location_is_a_users_error(url: str) -> None:
    with pytest.raises(RdmError):
        read_manifest(url)


def alter(tree: Any, path: str, value: Any) -> None:
    *names, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for name in names:
        tree = tree[name]
    tree[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("samples", 9, "add up to 9"),
        ("shards.0.samples", 9, "add up to 9"),
        ("shards.0.members.0.samples", 5, "add up to 8"),
        ("shards.1.name", "shard-000000.tar", "same name"),
        ("shards.0.name", "../shard-000000.tar", "name"),
        ("shards.0.name", "a/b.tar", "name"),
        ("shards.0.bytes", 600, "extends beyond"),
        ("shards.0.members.1.offset", 600, "overlaps"),
        ("shards.0.members.0.offset", 0, "offset"),
        ("shards.0.members.0.bytes", 20, "too small for 4 samples"),
        ("shards.0.members.0.xxh3", "12", "xxh3"),
        ("shards.0.members", [], "members"),
        ("shards", [], "shards"),
        ("shape", [2, 0, 3, 3], "impossible latent shape"),
        ("shape", [10**9, 10**9, 10**9, 10**9], "too small"),
        ("codec.scale", [1.0, 2.0, 3.0], "1 or 2 entries"),
        ("codec.scale", [0.0], "must not be 0"),
        ("codec.shift", [float("inf")], "finite"),
        ("kind", "pixels", "kind"),
        ("dtype", "float8", "dtype"),
        ("version", 2, "version"),
        ("unknown", 1, "unknown"),
    ],
)
def test_a_manifest_that_does_not_add_up_is_refused(write_set: WriteSet, path: str, value: Any, message: str) -> None:
    latents = write_set(10, members_per_shard=2)
    place = latents.folder / MANIFEST_NAME
    tree = json.loads(place.read())
    alter(tree, path, value)
    place.write(json.dumps(tree).encode())
    with pytest.raises(DataError, match=message) as raised:
        read_manifest(latents.url)
    assert str(place) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"samples": NaN}'])
def test_invalid_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(DataError, match="not a valid manifest"):
        read_manifest(str(tmp_path))
