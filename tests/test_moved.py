"""Old import paths: each gives the object that lives under the new one, with a DeprecationWarning."""

import importlib

import pytest

from rdm_scale.moved import MODULES, NAMES, RENAMED

PUBLIC = [
    ("data.images", "decode", "encoding.images"),
    ("data.images", "find_images", "encoding.inputs"),
    ("data.videos", "decode_clip", "encoding.videos"),
    ("data.inputs", "find_media", "encoding.inputs"),
    ("data.storage", "Location", "storage.location"),
    ("data.codecs", "load_codec", "codecs"),
    ("checkpoint.pipeline", "RDMPipeline", "sampling"),
    ("checkpoint.merge", "merge", "checkpoint.convert.merge"),
    ("evaluation", "image_grid", "sampling.image_grid"),
    ("data.prefetch", "draw", "diffusion.training_draws"),
    ("data.captions", "TextEncoder", "encoding.text"),
    ("data.shards", "ShardWriter", "data"),
]


@pytest.mark.parametrize(("old", "name", "new"), PUBLIC)
def test_old_path_gives_the_same_object(old: str, name: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"rdm_scale.{old}.{name} has moved"):
        found = getattr(importlib.import_module(f"rdm_scale.{old}"), name)
    assert found is getattr(importlib.import_module(f"rdm_scale.{new}"), name)


def test_renamed_function_is_found_under_its_old_name() -> None:
    from rdm_scale.codecs import normalize

    with pytest.warns(DeprecationWarning, match="import normalize from rdm_scale.codecs"):
        assert importlib.import_module("rdm_scale.data.codecs").normalise is normalize


@pytest.mark.parametrize(
    ("room", "old", "new"), [("models", "Part", "ModelPart"), ("config", "Among", "AttentionScope")]
)
def test_renamed_type_is_found_under_its_old_name(room: str, old: str, new: str) -> None:
    module = importlib.import_module(f"rdm_scale.{room}")
    with pytest.warns(DeprecationWarning, match=f"import {new} from rdm_scale.{room}"):
        assert getattr(module, old) is getattr(module, new)


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("data.inputs", "Kind", "media.MediaKind"),
        ("data.encoding.planning", "Bucket", "planning.PixelBucket"),
        ("data.encoding.planning", "Settings", "planning.EncodingSettings"),
        ("data.encoding.job", "encode", "runner.encode"),
        ("data.videos", "probe_video", "videos.read_video_metadata"),
        ("data.videos", "VideoSize", "videos.VideoMetadata"),
    ],
)
def test_renamed_names_of_encoding(old: str, name: str, new: str) -> None:
    module, _, renamed = new.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"import {renamed} from rdm_scale.encoding"):
        found = getattr(importlib.import_module(f"rdm_scale.{old}"), name)
    assert found is getattr(importlib.import_module(f"rdm_scale.encoding.{module}"), renamed)


def test_every_new_home_exists() -> None:
    homes = [home for found in MODULES.values() for home in found] + [
        h for names in NAMES.values() for h in names.values()
    ]
    for home in homes:
        importlib.import_module(f"rdm_scale.{home}")


def test_every_new_name_exists_in_a_home_of_its_old_module() -> None:
    for old, renamed in RENAMED.items():
        homes = MODULES.get(old) or {NAMES[old][name] for name in renamed}
        for new in renamed.values():
            assert any(hasattr(importlib.import_module(f"rdm_scale.{home}"), new) for home in homes), (old, new)


def test_names_are_renamed_only_under_their_own_old_module() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'plan'"):
        _ = importlib.import_module("rdm_scale.data.images").plan


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = importlib.import_module("rdm_scale.data.images").nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("rdm_scale.data.nothing")
