"""Plans against ones worked out by hand: which samples, in which order, in which shard."""

from dataclasses import replace

import numpy as np
import pytest

import rdm_scale.encoding
from rdm_scale import rng
from rdm_scale.codecs.record import CodecRecord
from rdm_scale.encoding.inputs import MediaFile, MediaSet
from rdm_scale.encoding.planning import (
    EncodingSettings,
    MediaMetadata,
    PixelBucket,
    inputs_digest,
    is_held_out,
    job_digest,
    make_plan,
    needs_metadata,
    split_files,
)
from rdm_scale.encoding.rejections import Rejection
from rdm_scale.encoding.text import TextEncoderRecord
from rdm_scale.errors import ConfigError, DataError
from rdm_scale.storage.location import Location
from tests.support.encoding_jobs import media

ONE = (PixelBucket(1, 8, 8),)
KEYS = [f"{i % 10}/{i:04d}" for i in range(300)]


def planned_keys(source, settings, side="train"):
    plan = make_plan(source, settings, None)
    return [source.files[item.file].key for shard in plan.shards if shard.split == side for item in shard.samples]


def test_the_order_is_that_of_hashes_of_key_and_seed():
    settings = EncodingSettings(ONE, seed=5, samples_per_member=10, members_per_shard=4)
    expected = sorted(KEYS, key=lambda key: rng.key(5, "shuffle", key, 0, 0))
    assert planned_keys(media(KEYS), settings) == planned_keys(media(KEYS[::-1]), settings) == expected
    assert planned_keys(media(KEYS), EncodingSettings(ONE, seed=6)) != expected
    plan = make_plan(media(KEYS), settings, None)
    assert [(shard.number, len(shard.samples)) for shard in plan.shards] == [*((i, 40) for i in range(7)), (7, 20)]
    assert plan.sample_count == 300 and not plan.rejected


def test_the_holdout_is_a_function_of_key_and_seed():
    settings = EncodingSettings(ONE, seed=5, holdout_share=0.2)
    held = {key for key in KEYS if rng.key(5, "holdout", key) / 2**63 < 0.2}
    assert 35 < len(held) < 85
    assert set(planned_keys(media(KEYS), settings, "holdout")) == held
    assert set(planned_keys(media(KEYS), settings)) == set(KEYS) - held
    # with other data around it, or without, a sample stays on its side
    more = [*KEYS[::3], *(f"new/{i}" for i in range(100))]
    assert set(planned_keys(media(more), settings, "holdout")) & set(KEYS) == held & set(KEYS[::3])
    sides = split_files(media(KEYS).files, 5, 0.2)
    assert {file.key for file in sides[1]} == held and len(sides[0]) == len(KEYS) - len(held)
    assert all(is_held_out(file.key, 5, 0.2) for file in sides[1])


def test_a_class_sorted_input_fills_shards_like_independent_draws():
    labels = np.repeat(np.arange(10), 300).tolist()
    source = media([f"{label}/{i}" for i, label in enumerate(labels)], labels)
    plan = make_plan(source, EncodingSettings(ONE, samples_per_member=10, members_per_shard=10), None)
    statistic = 0.0
    for shard in plan.shards:
        counts = np.bincount([source.files[item.file].label for item in shard.samples], minlength=10)
        statistic += ((counts - 10) ** 2 / 10).sum()
    # chi-square of 30 shards with 9 degrees of freedom each, without replacement: mean 261, standard deviation 23
    assert 261 - 4 * 23 < statistic < 261 + 4 * 23


@pytest.mark.parametrize(
    ("frames", "length", "stride", "step", "starts"),
    [
        (50, 8, 1, None, [0, 8, 16, 24, 32, 40]),
        (48, 8, 1, None, [0, 8, 16, 24, 32, 40]),
        (47, 8, 1, None, [0, 8, 16, 24, 32]),
        (50, 8, 2, None, [0, 16, 32]),  # a clip takes 15 frames
        (46, 8, 2, None, [0, 16]),
        (20, 8, 1, 4, [0, 4, 8, 12]),
        (20, 8, 1, 100, [0]),
        (8, 8, 1, None, [0]),
        (3, 1, 1, None, [0, 1, 2]),
    ],
)
def test_clips_of_a_video(frames, length, stride, step, starts):
    bucket = PixelBucket(length, 8, 8)
    settings = EncodingSettings((bucket,), stride=stride, clip_step=step)
    plan = make_plan(media(["a"], kind="video"), settings, [MediaMetadata(frames, 8, 8)])
    items = sorted(item for shard in plan.shards for item in shard.samples)
    assert [item.clip * settings.clip_interval(bucket) for item in items] == starts
    assert {item.view for item in items} == {0}
    flipped = make_plan(
        media(["a"], kind="video"),
        EncodingSettings((bucket,), stride=stride, clip_step=step, flips=True),
        [MediaMetadata(frames, 8, 8)],
    )
    both = sorted((item.clip, item.view) for shard in flipped.shards for item in shard.samples)
    assert both == [(clip, view) for clip in range(len(starts)) for view in (0, 1)]


def test_a_video_that_is_too_short_and_one_that_is_damaged_are_rejected():
    settings = EncodingSettings((PixelBucket(8, 8, 8),), stride=2)
    source = media(["a", "b", "c"], kind="video")
    plan = make_plan(source, settings, [MediaMetadata(14, 8, 8), Rejection("no video"), MediaMetadata(15, 8, 8)])
    assert plan.sample_count == 1 and plan.shards[0].samples[0].file == 2
    assert plan.rejected == {
        0: Rejection("a has 14 frames at the frame rate of the clips, and a clip takes 15"),
        1: Rejection("no video"),
    }
    with pytest.raises(DataError, match=r"none of the 3 inputs can be encoded\. The first: a is broken"):
        make_plan(source, settings, [Rejection("a is broken")] * 3)


@pytest.mark.parametrize(
    ("buckets", "cases"),
    [
        (
            ["64x64", "48x80", "80x48"],
            {(1, 100, 100): "64x64", (1, 90, 160): "48x80", (1, 160, 90): "80x48", (1, 100, 120): "64x64"},
        ),
        # of one aspect: the largest that is filled, or else the smallest
        (["32x32", "64x64", "128x128"], {(1, 40, 40): "32x32", (1, 64, 99): "64x64", (1, 9, 9): "32x32"}),
        (["16x32x32", "4x32x32"], {(20, 9, 9): "16x32x32", (15, 9, 9): "4x32x32", (4, 9, 9): "4x32x32"}),
        # length comes before aspect
        (["16x32x32", "4x32x64"], {(16, 10, 20): "16x32x32", (15, 10, 10): "4x32x64"}),
    ],
)
def test_buckets_by_length_aspect_and_size(buckets, cases):
    settings = EncodingSettings(tuple(map(PixelBucket.parse, buckets)), samples_per_member=1, members_per_shard=1)
    kind = "video" if settings.buckets[0].frames > 1 else "image"
    source = media([f"{i}" for i in range(len(cases))], kind=kind)
    assert needs_metadata(source, settings)
    plan = make_plan(source, settings, [MediaMetadata(*size) for size in cases])
    found = {item.file: str(shard.bucket) for shard in plan.shards for item in shard.samples}
    assert [found[i] for i in range(len(cases))] == list(cases.values())


def test_a_shard_holds_one_bucket_and_numbers_run_on():
    settings = EncodingSettings(
        (PixelBucket(1, 8, 8), PixelBucket(1, 8, 16)), holdout_share=0.5, samples_per_member=2, members_per_shard=2
    )
    source = media(KEYS[:60])
    plan = make_plan(source, settings, [MediaMetadata(1, 10, 10 + 10 * (i % 2)) for i in range(60)])
    for side in ("train", "holdout"):
        shards = [shard for shard in plan.shards if shard.split == side]
        assert [shard.number for shard in shards] == list(range(len(shards)))
        buckets = [shard.bucket for shard in shards]
        assert buckets == sorted(buckets) and len(set(buckets)) == 2
        for shard in shards:
            assert {item.file % 2 for item in shard.samples} == {int(shard.bucket.width == 16)}
    assert sorted(item.file for shard in plan.shards for item in shard.samples) == list(range(60))


def test_batches_and_digests_of_shards():
    (shard,) = make_plan(media(KEYS[:10]), EncodingSettings(ONE), None).shards
    assert [len(batch) for batch in shard.batches(4)] == [4, 4, 2] and sum(shard.batches(4), ()) == shard.samples
    (same,) = make_plan(media(KEYS[:10]), EncodingSettings(ONE), None).shards
    digests = {shard.digest(media(KEYS[:10])), same.digest(media(KEYS[:10]))}
    assert len(digests) == 1
    for other in (
        make_plan(media(KEYS[:9]), EncodingSettings(ONE), None),
        make_plan(media(KEYS[:10]), EncodingSettings(ONE, seed=1), None),
        make_plan(media(KEYS[:10]), EncodingSettings(ONE, flips=True), None),
        make_plan(media(KEYS[:10]), EncodingSettings((PixelBucket(1, 8, 9),)), None),
    ):
        assert other.shards[0].digest(media(KEYS[:10])) not in digests


def test_the_digest_of_a_job_is_of_all_that_decides_what_is_written():
    source = media(KEYS, [i % 10 for i in range(300)])
    inputs = inputs_digest(source, EncodingSettings(ONE))
    a, b = (CodecRecord(name=name, location=name) for name in "ab")
    text = TextEncoderRecord("BertModel", "/bert", "cd", width=16, pooled_width=12, max_tokens=40)
    job = job_digest(inputs, a, text)
    others = {
        inputs_digest(media(KEYS[1:], [i % 10 for i in range(299)]), EncodingSettings(ONE)),
        inputs_digest(media(KEYS, [(i + 1) % 10 for i in range(300)]), EncodingSettings(ONE)),
        inputs_digest(source, EncodingSettings(ONE, dtype="bfloat16")),
        inputs_digest(source, EncodingSettings(ONE, seed=1)),
    }
    assert len(others) == 4 and inputs not in others and inputs_digest(source, EncodingSettings(ONE)) == inputs
    shorter = replace(text, max_tokens=39)
    assert job.startswith(inputs) and len(job) == 64
    assert len({job, job_digest(inputs, b, text), job_digest(inputs, a, None), job_digest(inputs, a, shorter)}) == 4


def test_sizes_are_written_as_they_are_read():
    assert PixelBucket.parse("256x320") == (1, 256, 320) and PixelBucket.parse("16X8x9") == (16, 8, 9)
    assert str(PixelBucket(1, 256, 320)) == "256x320" and str(PixelBucket(16, 8, 9)) == "16x8x9"
    for wrong in ("256", "0x8", "-8x8", "8x", "axb", "1x2x3x4", ""):
        with pytest.raises(ConfigError, match="is not a size"):
            PixelBucket.parse(wrong)


@pytest.mark.parametrize("wrong", [{"fps": 8.0}, {"stride": 2}, {"clip_step": 3}, {"buckets": (PixelBucket(2, 8, 8),)}])
def test_settings_of_videos_make_no_sense_for_images(wrong):
    settings = EncodingSettings(**({"buckets": ONE} | wrong))
    with pytest.raises(ConfigError, match="for videos"):
        settings.check("image")
    settings.check("video")


@pytest.mark.parametrize(("share", "empty"), [(1e-9, "holdout"), (1 - 1e-9, "train")])
def test_no_side_may_be_empty(share, empty):
    with pytest.raises(DataError, match=f"of 300 inputs leaves the {empty} split empty"):
        make_plan(media(KEYS), EncodingSettings(ONE, holdout_share=share), None)


def test_digests_and_plans_of_earlier_versions() -> None:
    """A job begun by an earlier version is resumed: its digests, and with them its records, must not change."""
    files = tuple(
        MediaFile(f"{i % 2}/{i:02d}", i % 2, "a caption" if i else "", Location("/nowhere"), "x") for i in range(6)
    )
    source = MediaSet(files, "video", ("cat", "dog"), captioned=True)
    settings = EncodingSettings(
        (PixelBucket(1, 8, 8), PixelBucket(4, 8, 16)),
        kind="moments",
        dtype="bfloat16",
        seed=3,
        flips=True,
        fps=12.5,
        stride=2,
        clip_step=3,
        holdout_share=0.3,
        batch_size=2,
        samples_per_member=2,
        members_per_shard=2,
    )
    inputs = inputs_digest(source, settings)
    assert inputs == "5129007bf2608c67897aa8565686358a"
    codec = CodecRecord(name="digits", location="digits", digest="ab", shift=(0.5,), scale=(2.0,))
    text = TextEncoderRecord("BertModel", "/bert", "cd", width=16, pooled_width=12, max_tokens=40)
    assert job_digest(inputs, codec, None) == inputs + "e592d48aba6d1351c52d9bf067741721"
    assert job_digest(inputs, codec, text) == inputs + "3f6128abcc64ab726af0c669cd2e9e8c"
    sizes = [
        MediaMetadata(9, 10, 20),
        MediaMetadata(1, 8, 8),
        Rejection("broken"),
        MediaMetadata(20, 8, 8),
        MediaMetadata(3, 4, 4),
        MediaMetadata(7, 8, 15),
    ]
    plan = make_plan(source, settings, sizes)
    assert [(shard.split, shard.number, str(shard.bucket), shard.digest(source)) for shard in plan.shards] == [
        ("train", 0, "8x8", "b8316925454d"),
        ("train", 1, "4x8x16", "27d7eae43c89"),
        ("holdout", 0, "4x8x16", "449c2d2a43e6"),
        ("holdout", 1, "4x8x16", "dcfd9154286f"),
        ("holdout", 2, "4x8x16", "caddefdd13d2"),
    ]
    assert plan.shards[1].samples == ((0, 0, 0), (0, 0, 1), (5, 0, 1), (5, 0, 0)) and plan.rejected == {
        2: Rejection("broken")
    }


def test_public_names_of_the_room_are_found() -> None:
    assert all(getattr(rdm_scale.encoding, name) is not None for name in rdm_scale.encoding.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = rdm_scale.encoding.nothing
