"""Encode images or videos into latent shards for rdm_scale.train, and inspect what was encoded.

    %(prog)s INPUT OUTPUT --codec CODEC --size 256     encode
    %(prog)s OUTPUT --verify                           read everything again and check it
    %(prog)s OUTPUT --stats                            mean and deviation of each channel, also as a plot
    %(prog)s OUTPUT --decode 40                        an image grid (animated for clips) of samples

INPUT is a folder of images (PNG, JPEG, WebP) or videos (MP4, MOV, AVI, WebM, MKV) whose sub-folders are the classes, a
webdataset tar or a folder or quoted glob of tars (`key.png` with its class in `key.cls`, its caption in `key.txt`), or
a .jsonl or .parquet list of paths. INPUT, OUTPUT and the folders of models may be on any fsspec location, for instance
s3://bucket/prefix. Samples are shuffled over the whole input, center-cropped and resized.

Under torchrun the ranks share the work. The same command resumes an interrupted job, with any number of ranks, and ends
with the same bytes as an uninterrupted one.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from rdm_scale.errors import DataError, RdmError
from rdm_scale.progress import ProgressReporter
from rdm_scale.tools._encoding_options import HOLDOUT_SHARE, parse_options

if TYPE_CHECKING:
    import torch

    from rdm_scale.encoding.inputs import MediaSet
    from rdm_scale.encoding.job import EncodingJob, EncodingResult
    from rdm_scale.encoding.media import MediaKind
    from rdm_scale.encoding.planning import EncodingSettings
    from rdm_scale.encoding.text import TextEncoder

BATCH_SIZE: dict["MediaKind", int] = {"image": 64, "video": 8}  # also the samples of a member
PREVIEW_COLUMNS = 10
UNIT_STD = (0.5, 2.0)  # beyond these the noise levels of training do not fit the latents


def main() -> None:
    options = parse_options(__doc__)
    look = {"verify": verify, "stats": stats, "decode": decode}
    try:
        next((run for name, run in look.items() if getattr(options, name)), encode)(options)
    except RdmError as error:
        sys.exit(f"encode_latents: error: {error}")


class StageProgress:
    """Progress of the stages of encoding. A stage's rate counts from its first report: earlier calls did the rest."""

    def __init__(self, shown: bool, device: object) -> None:
        self._shown, self._titles = shown, {"looking": "looking", "encoding": f"encoding ({device})"}
        self._stage: str | None = None
        self._reporter: ProgressReporter | None = None

    def show(self, stage: str, done: int, total: int) -> None:
        if self._reporter is None or stage != self._stage:
            self.close()
            self._stage = stage
            self._reporter = ProgressReporter(self._titles[stage], total, initial=done, shown=self._shown)
        self._reporter.advance_to(done)

    def close(self) -> None:
        if self._reporter is not None:
            self._reporter.close()


def encode(options: argparse.Namespace) -> None:
    from rdm_scale.encoding.job import ProcessRank
    from rdm_scale.encoding.repeats import remaining
    from rdm_scale.encoding.runner import encode as run_job
    from rdm_scale.sampling.reconstructions import write_preview

    rank = ProcessRank(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    job = _job(options, described=rank.rank == 0)
    remainder = remaining(job, rank, print)
    if remainder != "nothing":
        progress = StageProgress(rank.rank == 0, job.codec.device)
        try:
            result = run_job(job, rank if remainder == "shared" else ProcessRank(), progress.show, report=print)
        finally:
            progress.close()
        if result is not None:
            _report(job, result)
    if options.preview and rank.rank == 0:
        write_preview(options.preview, job, PREVIEW_COLUMNS)
        print(f"{options.preview}: originals above their reconstructions")


def _report(job: "EncodingJob", result: "EncodingResult") -> None:
    from rdm_scale.data.manifest import MANIFEST_NAME

    for folder, manifest in zip(job.output.by_split.values(), (result.train, result.holdout), strict=False):
        assert manifest is not None
        shapes = ", ".join(str(list(shape)) for shape in manifest.buckets)
        print(f"{folder / MANIFEST_NAME}: {manifest.samples} samples, latents {shapes} [C, T, H, W]")
    if result.train.rejected:
        print(f"{result.train.rejected} inputs could not be encoded: see {job.output.rejected}")
    if job.text is not None and result.truncated:
        print(f"{result.truncated} captions were cut to {job.text.record.max_tokens} tokens")
    for remark in result.remarks:
        print(f"note: {remark}")
    print(f"normalized latents: mean {result.mean:.3f}, standard deviation {result.std:.3f}")
    if not UNIT_STD[0] <= result.std <= UNIT_STD[1]:
        print(
            "warning: diffusion expects a standard deviation near 1: is this codec meant for such inputs, and is the "
            "scaling_factor in its config.json right?",
            file=sys.stderr,
        )


def _job(options: argparse.Namespace, described: bool) -> "EncodingJob":
    """List the input, check the output folders, and only then load the models, which takes time."""
    from rdm_scale.codecs import load_codec
    from rdm_scale.device import local_device
    from rdm_scale.encoding.inputs import Columns, find_media
    from rdm_scale.encoding.job import EncodingJob
    from rdm_scale.encoding.output import OutputFolders
    from rdm_scale.encoding.planning import inputs_digest
    from rdm_scale.encoding.repeats import check_output
    from rdm_scale.storage.location import Location

    columns = Columns(
        options.path_column, options.label_column, options.caption_column, options.key_column, options.group_column
    )
    output = OutputFolders(Location(options.paths[1]), Location(options.holdout) if options.holdout else None)
    source = find_media(
        options.paths[0],
        columns,
        class_order=options.class_order,
        prefix_keys=options.prefix_keys,
        outputs=tuple(output.by_split.values()),
    )
    if described:
        _describe(options, source)
    source.check_left_out(options.max_left_out)
    settings = _settings(options, source.kind)
    inputs = inputs_digest(source, settings)
    check_output(output, inputs, source)
    device = local_device()
    codec = load_codec(options.codec, device)
    if settings.kind == "moments" and not codec.has_posterior:
        raise DataError(f"the codec {options.codec} has no posterior to sample from: leave out --latents moments")
    text = _text_encoder(options, source.captioned, device)
    return EncodingJob.create(
        source,
        settings,
        codec,
        output,
        text,
        options.max_rejected,
        inputs,
        max_unreadable=options.max_unreadable,
        trust_inputs=options.trust_inputs,
    )


def _settings(options: argparse.Namespace, kind: "MediaKind") -> "EncodingSettings":
    from rdm_scale.encoding.planning import EncodingSettings, PixelBucket

    buckets = [PixelBucket.parse(text) for text in options.buckets or []]
    buckets = buckets or [PixelBucket(options.frames or 1, options.size, options.size)]
    settings = EncodingSettings(
        buckets=tuple(dict.fromkeys(buckets)),
        kind=options.latents,
        dtype=options.dtype,
        seed=options.seed,
        flips=options.flips,
        fps=options.fps,
        stride=options.stride,
        clip_step=options.clip_step,
        holdout_share=(options.holdout_share or HOLDOUT_SHARE) if options.holdout else 0.0,
        batch_size=options.batch_size or BATCH_SIZE[kind],
        samples_per_member=options.samples_per_member or BATCH_SIZE[kind],
        members_per_shard=options.members_per_shard,
        min_size=options.min_size,
    )
    settings.check(kind)
    return settings


def _describe(options: argparse.Namespace, source: "MediaSet") -> None:
    classes = f"{len(source.class_names)} classes" if source.class_names else "no classes"
    captions = "" if not source.captioned else ", captions" if options.text_encoder else ", captions that are left out"
    print(f"{options.paths[0]}: {len(source.files)} {source.kind}s, {classes}{captions}", flush=True)
    if source.captioned and not options.text_encoder:
        print("note: captions are encoded only with --text-encoder")
    for note in source.notes:
        print(f"note: {note}")
    for kind in source.left_out:
        print(f"note: not encoded: {kind}")


def _text_encoder(options: argparse.Namespace, captioned: bool, device: "torch.device") -> "TextEncoder | None":
    if not options.text_encoder:
        return None
    if not captioned:
        raise DataError(f"{options.paths[0]} has no captions: leave out --text-encoder")
    from rdm_scale.encoding.text import TextEncoder

    return TextEncoder(options.text_encoder, device)


def verify(options: argparse.Namespace) -> None:
    from rdm_scale.data.manifest import read_manifest
    from rdm_scale.encoding.inspection import verify as check

    url = options.paths[0]
    with ProgressReporter("verifying", read_manifest(url)[0].samples) as progress:
        manifest, faults = check(url, progress.update)
    for fault in faults:
        print(fault)
    if faults:
        raise DataError(f"{url}: {len(faults)} faults")
    print(f"{url}: {manifest.samples} samples in {len(manifest.shards)} shards, all as they were written")


def stats(options: argparse.Namespace) -> None:
    from rdm_scale.data.manifest import read_manifest
    from rdm_scale.encoding.inspection import measure_statistics
    from rdm_scale.evaluation.plots import plot_channels
    from rdm_scale.storage.location import Location

    url = options.paths[0]
    with ProgressReporter("measuring", read_manifest(url)[0].samples) as progress:
        manifest = measure_statistics(url, progress.update)
    figures = manifest.statistics
    assert figures is not None
    print("channel       mean   deviation   (raw latents)")
    for channel, (mean, std) in enumerate(zip(figures.mean, figures.std, strict=True)):
        print(f"{channel:>7} {mean:>10.4f} {std:>11.4f}")
    place = Location(options.picture or f"{_folder(url)}/statistics.png")
    plot_channels(figures.mean, figures.std, place)
    print(f"{place}: the same as a plot; the figures are in the manifest, too")


def decode(options: argparse.Namespace) -> None:
    from rdm_scale.codecs import codec_of
    from rdm_scale.data.manifest import read_manifest
    from rdm_scale.device import local_device
    from rdm_scale.encoding.inspection import decode_samples
    from rdm_scale.sampling.image_grid import write_grid
    from rdm_scale.storage.location import Location

    url = options.paths[0]
    manifest, _ = read_manifest(url)
    codec = codec_of(manifest.codec, local_device(), location=options.codec)
    found = decode_samples(url, codec, options.decode)
    for (_, frames, height, width), pixels in found.items():
        suffix = f"-{frames}x{height}x{width}" if len(found) > 1 else ""
        place = Location((options.picture or f"{_folder(url)}/decoded.png").removesuffix(".png") + f"{suffix}.png")
        for written in write_grid(pixels, place, min(PREVIEW_COLUMNS, len(pixels)), fps=options.fps or 8.0):
            print(f"{written}: decoded samples")


def _folder(url: str) -> str:
    return url.removesuffix("manifest.json").rstrip("/") or "."


if __name__ == "__main__":
    main()
