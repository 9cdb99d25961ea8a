"""Measure generated images and clips: FID, FVD, sFID, IS, KID, precision, recall and CLIP score.

`reference` writes the statistics of a real set, `run` draws from a trained model and measures the samples, and
`compare` measures two sets that exist; under torchrun, ranks divide the work. docs/evaluation.md explains the measures.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rdm_scale.config.paths import any_option
from rdm_scale.errors import ConfigError, RdmError
from rdm_scale.progress import ProgressReporter

if TYPE_CHECKING:
    from rdm_scale.checkpoint.trained_model import TrainedModel
    from rdm_scale.config import RunConfig
    from rdm_scale.evaluation.generated_samples import GeneratedSamples, GenerationPlan
    from rdm_scale.evaluation.measurements import Measurement, MeasureOptions
    from rdm_scale.evaluation.networks.feature_network import FeatureNetwork
    from rdm_scale.evaluation.sample_sets import MediaOptions, SampleSet
    from rdm_scale.evaluation.set_statistics import SetIdentity, SetStatistics, Wanted
    from rdm_scale.parallel.failures import FailureReporter
    from rdm_scale.parallel.mesh import Mesh
    from rdm_scale.storage.location import Location

RESULTS = "measures.jsonl"
FEATURES_HELP = (
    "i3d, efficientnet-lite0, digits, identity, inception=FILE, dinov2=FOLDER or clip=FOLDER (default: those of the "
    "reference, else i3d for clips and efficientnet-lite0 for images)"
)


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from rdm_scale.parallel.failures import end_with_launcher, run_main

        end_with_launcher()
        run_main(lambda reporter: _run(options, _mesh(options, reporter)))
    try:
        _run(options, None)
    except RdmError as error:
        sys.exit(f"measure: error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = "a folder, tar or list of images or videos, a .npy or .npz of uint8 pixels, or a latent set"

    reference = commands.add_parser("reference", help="write the statistics of a real set")
    reference.add_argument("data", type=any_option, help=data)
    reference.add_argument("output", type=any_option, help="OUT.npz, in the format of ADM's evaluator")
    reference.add_argument(
        "--keep", type=int, default=10_000, help="samples whose features are kept for precision, recall and KID"
    )
    reference.add_argument("--images", type=int, default=0, help="images to keep as arr_0 for ADM's evaluator")

    run = commands.add_parser("run", help="draw from a trained model and measure the samples")
    run.add_argument("model", type=any_option, help="a run's directory, a checkpoint or a merged folder")
    run.add_argument("reference", type=any_option, help="OUT.npz of `reference`, a file of ADM, or a real set")
    run.add_argument("--samples", type=int, default=50_000, help="default: %(default)s")
    run.add_argument("--steps", type=int, help="sampling steps (default: as in the run)")
    run.add_argument("--guidance", type=float, help="guidance scale (default: as in the run)")
    run.add_argument("--sampler", help="ddpm, ddim, euler or heun (default: as in the run)")
    run.add_argument("--weights", metavar="{ema,raw}", help="EMA or raw weights (default: EMA, where there are any)")
    run.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    run.add_argument(
        "--prompts", type=any_option, metavar="FILE", help="for a model with text: one prompt a line, used in turns"
    )
    run.add_argument(
        "--text-encoder", type=any_option, metavar="DIR", help="its folder, if moved since the data were encoded"
    )
    run.add_argument(
        "--output", type=any_option, default="measure", help="folder of features and results (default: %(default)s)"
    )
    run.add_argument("--npz", type=any_option, metavar="FILE", help="write the samples as arr_0, for ADM's evaluator")
    run.add_argument("--media", type=any_option, metavar="DIR", help="write the samples as PNG or mp4 files")
    run.add_argument("--media-fps", type=int, default=8, help="frames a second of --media (default: %(default)s)")

    compare = commands.add_parser("compare", help="measure two sets")
    compare.add_argument(
        "real", type=any_option, help=f"{data}, or OUT.npz of `reference`; with --features identity float [N, D]"
    )
    compare.add_argument("generated", type=any_option, help="the same, but no reference")

    for command in (reference, compare, run):
        command.add_argument("--features", help=FEATURES_HELP)
        command.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    for command in (run, compare):
        command.add_argument("--metrics", help="comma-separated (default: fvd for clips, fid,kid for images)")
        command.add_argument("--is-splits", type=int, default=1, help="parts of the inception score; ADM uses 10")
        command.add_argument("--adm-distances", action="store_true", help="precision and recall in float16, as ADM's")
        command.add_argument(
            "--json", type=any_option, metavar="FILE", help="write the measures by name, with all fields"
        )
    for command in (reference, compare):
        command.add_argument("--size", type=int, help="crop and resize media to this height and width")
        command.add_argument("--frames", type=int, default=16, help="frames of a clip (default: %(default)s)")
    for command in (reference, compare, run):
        command.add_argument("--stride", type=int, default=1, help="frame stride of real clips (default: %(default)s)")
        command.add_argument("--fps", type=float, help="frames a second of real videos (default: their own)")
    return parser


def _mesh(options: argparse.Namespace, reporter: "FailureReporter") -> "Mesh":
    from rdm_scale.config import ParallelConfig
    from rdm_scale.parallel.mesh import build_mesh

    def end(signal_number: int, frame: object) -> None:
        """Say how to go on: the launcher ends the other ranks by this signal when one of them is gone."""
        if options.command == "run" and reporter.claim():
            kept = f"the samples drawn so far are in {options.output}, and the same command goes on with them"
            print(
                f"\nmeasure: error: a rank has ended, or this job was asked to end; {kept}", file=sys.stderr, flush=True
            )
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    return build_mesh(ParallelConfig(), reporter)


def _run(options: argparse.Namespace, mesh: "Mesh | None") -> None:
    counts = ("batch_size", "samples", "is_splits", "size", "frames", "stride", "steps", "media_fps")
    for name in counts:
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    {"reference": write_reference, "run": run, "compare": compare}[options.command](options, mesh)
    if mesh is not None:
        mesh.shutdown()


# ---- reference


def write_reference(options: argparse.Namespace, mesh: "Mesh | None") -> None:
    """Write the statistics of a real set."""
    if not options.output.endswith(".npz"):
        raise ConfigError(f"the output {options.output} must end with .npz")
    if min(options.keep, options.images) < 0:
        raise ConfigError("--keep and --images must be at least 0")
    from rdm_scale.evaluation import reference_file
    from rdm_scale.evaluation.networks.named_networks import IDENTITY
    from rdm_scale.evaluation.sample_sets import kept_images
    from rdm_scale.evaluation.set_statistics import Wanted
    from rdm_scale.storage.location import Location

    images = None
    if options.features == IDENTITY:
        statistics = _given(options.data, Wanted(options.keep))
    else:
        samples = _open(options.data, _media(options))
        option, network = _load(options.features, samples.size.frames)
        wanted = Wanted(options.keep, spatial=network.spatial_width > 0)
        statistics = _measure_set(samples, network, wanted, option, options.batch_size, mesh)
        images = kept_images(samples, options.images) if options.images else None
    if mesh is None or mesh.is_first:
        reference_file.write_reference(Location(options.output), statistics, images)
        print(f"{options.output}: {statistics.samples} samples of {options.data}, {statistics.pooled.width} features")


# ---- compare


def compare(options: argparse.Namespace, mesh: "Mesh | None") -> None:
    """Measure two sets and print one line a measure."""
    from rdm_scale.evaluation.measurements import measure, parse_metrics, wanted_for
    from rdm_scale.evaluation.networks.named_networks import IDENTITY
    from rdm_scale.evaluation.reference_file import is_reference, read_reference

    known = read_reference(options.real) if is_reference(options.real) else None
    features = options.features or (known.option if known else None)
    if features == IDENTITY:
        metrics = parse_metrics(options.metrics or "fid,kid")
        wanted = wanted_for(metrics, None)
        real = known or _given(options.real, wanted)
        generated = _given(options.generated, wanted)
    else:
        samples = _open(options.generated, _media(options))
        metrics = parse_metrics(options.metrics or ("fvd" if samples.size.frames > 1 else "fid,kid"))
        option, network = _load(features, samples.size.frames)
        wanted = wanted_for(metrics, network)
        real = _real(options.real, known, network, wanted, option, _media(options), options.batch_size, mesh)
        generated = _measure_set(samples, network, wanted, option, options.batch_size, mesh)
    found = measure(metrics, real, generated, _measure_options(options))
    if mesh is None or mesh.is_first:
        _report(found, options.json)


def _real(
    url: str,
    known: "SetStatistics | None",
    network: "FeatureNetwork",
    wanted: "Wanted",
    option: str,
    media: "MediaOptions",
    batch_size: int,
    mesh: "Mesh | None",
) -> "SetStatistics":
    """Statistics of the real set: those of a reference, or measured now."""
    import dataclasses

    from rdm_scale.evaluation.reference_file import IMAGES
    from rdm_scale.evaluation.sample_sets import ArraySamples, read_array

    if known is None:
        wanted = wanted._replace(probabilities=False, captions=False)
        return _measure_set(_open(url, media), network, wanted, option, batch_size, mesh)
    if (
        known.identity is None and known.features is None and wanted.features
    ):  # of ADM: features are those of its images
        images = ArraySamples(read_array(url, IMAGES), url)
        measured = _measure_set(images, network, wanted._replace(spatial=False), option, batch_size, mesh)
        return dataclasses.replace(known, features=measured.features)
    return known


# ---- run


def run(options: argparse.Namespace, mesh: "Mesh | None") -> None:
    """Draw samples from a model, measure them, and append the measures to the results."""
    from rdm_scale.evaluation.generated_samples import GeneratedSamples, conditions_in_turns, pixel_size
    from rdm_scale.evaluation.measurements import check_comparable, measure, parse_metrics, wanted_for
    from rdm_scale.evaluation.reference_file import is_reference, read_reference
    from rdm_scale.evaluation.sample_sets import MediaOptions
    from rdm_scale.evaluation.set_statistics import SetIdentity
    from rdm_scale.storage.location import Location

    trained, config = _trained(options)
    size = pixel_size(trained)
    metrics = parse_metrics(options.metrics or ("fvd" if size.frames > 1 else "fid,kid"))
    known = read_reference(options.reference) if is_reference(options.reference) else None
    option, network = _load(options.features or (known.option if known else None), size.frames)
    wanted = wanted_for(metrics, network)
    media = MediaOptions((size.height, size.width), size.frames, options.stride, options.fps)
    real = _real(options.reference, known, network, wanted, option, media, options.batch_size, mesh)
    request, condition = conditions_in_turns(trained, options.samples, options.prompts, options.text_encoder)
    plan = _plan(options, trained, config, (condition, request.names), SetIdentity.of(network, size))
    check_comparable(real, plan.identity, options.model)
    samples = GeneratedSamples(plan, Location(options.output), mesh)
    with ProgressReporter("drawing", options.samples, shown=mesh is None or mesh.is_first) as progress:
        samples.draw(trained, config, request, network, progress.advance_to)
    if mesh is not None and not mesh.is_first:
        return
    captions = request.names if config.model.condition == "text" else None
    generated = samples.statistics(wanted, network, option, captions)
    found = measure(metrics, real, generated, _measure_options(options), samples.plan.fields())
    _report(found, options.json, Location(options.output) / RESULTS)
    _write_samples(samples, options)


def _trained(options: argparse.Namespace) -> "tuple[TrainedModel, RunConfig]":
    from rdm_scale.checkpoint import load_trained
    from rdm_scale.device import local_device
    from rdm_scale.sampling.requests import override_sampling, refuse_untrained_guidance, refuse_unused_options

    trained = load_trained(options.model, options.weights, local_device())
    sampling = {"steps": options.steps, "guidance": options.guidance, "sampler": options.sampler}
    refuse_unused_options(trained.config, prompts=options.prompts, text_encoder=options.text_encoder)
    config = override_sampling(trained.config, "with the options given", **sampling)
    refuse_untrained_guidance(config)
    return trained, config


# ---- parts of all commands


def _open(url: str, media: "MediaOptions") -> "SampleSet":
    from rdm_scale.device import local_device
    from rdm_scale.evaluation.sample_sets import open_samples

    return open_samples(url, media, local_device())


def _media(options: argparse.Namespace) -> "MediaOptions":
    from rdm_scale.evaluation.sample_sets import MediaOptions

    if options.fps is not None and not 0 < options.fps <= 1000:
        raise ConfigError("--fps must be above 0, and 1000 at most")
    size = None if options.size is None else (options.size, options.size)
    return MediaOptions(size, options.frames, options.stride, options.fps)


def _load(features: str | None, frames: int) -> "tuple[str, FeatureNetwork]":
    from rdm_scale.device import local_device
    from rdm_scale.evaluation.networks.named_networks import default_network, load_network

    option = features or default_network(frames)
    return option, load_network(option, frames, local_device())


def _given(url: str, wanted: "Wanted") -> "SetStatistics":
    from rdm_scale.evaluation.sample_sets import read_array
    from rdm_scale.evaluation.set_statistics import given_features

    return given_features(read_array(url), url, wanted)


def _measure_set(
    samples: "SampleSet", network: "FeatureNetwork", wanted: "Wanted", option: str, batch_size: int, mesh: "Mesh | None"
) -> "SetStatistics":
    from rdm_scale.evaluation.set_statistics import measure_set

    shown = mesh is None or mesh.is_first
    with ProgressReporter(f"measuring {samples.name}", samples.count, shown=shown) as progress:
        return measure_set(
            samples, network, wanted, option=option, batch_size=batch_size, mesh=mesh, progress=progress.advance_to
        )


def _plan(
    options: argparse.Namespace,
    trained: "TrainedModel",
    config: "RunConfig",
    condition: "tuple[str, Sequence[str]]",
    identity: "SetIdentity",
) -> "GenerationPlan":
    from rdm_scale.config.schema import OBJECTIVE_SAMPLERS
    from rdm_scale.evaluation.generated_samples import GenerationPlan, digest_of_names, digest_of_parameters

    sampling = config.sampling
    return GenerationPlan(
        model=options.model,
        step=trained.step,
        weights=trained.weights,
        config=trained.config.digest(),
        parameters=digest_of_parameters(trained.model),
        condition=condition[0],
        names=digest_of_names(condition[1]),
        samples=options.samples,
        sampler=sampling.sampler or OBJECTIVE_SAMPLERS[config.diffusion.objective][0],
        steps=sampling.steps,
        guidance=sampling.guidance,
        seed=options.seed,
        identity=identity,
        chunk=options.batch_size,
        pixels=bool(options.npz or options.media),
    )


def _measure_options(options: argparse.Namespace) -> "MeasureOptions":
    from rdm_scale.evaluation.measurements import MeasureOptions

    return MeasureOptions(options.is_splits, options.adm_distances, getattr(options, "seed", 0))


def _report(found: "Sequence[Measurement]", file: str | None, results: "Location | None" = None) -> None:
    """Print one line a measure, write `--json`, and append one JSON line to the results of `run`."""
    from rdm_scale.storage.location import Location

    for measurement in found:
        print(measurement.line(), flush=True)
        for warning in measurement.warnings:
            print(f"warning: {measurement.name}: {warning}", file=sys.stderr)
    content = json.dumps({measurement.name: measurement.record() for measurement in found})
    try:
        if file is not None:
            Location(file).write(f"{content}\n".encode())
        if results is not None:
            before = results.read() if results.exists() else b""
            results.write(before + f"{content}\n".encode())
    except OSError as error:
        raise ConfigError(f"cannot write the measures to {file or results}: {error}; they are printed above") from None


def _write_samples(samples: "GeneratedSamples", options: argparse.Namespace) -> None:
    """Write the drawn samples as an array, or as PNG or mp4 files."""
    import numpy as np

    from rdm_scale.evaluation.reference_file import write_arrays
    from rdm_scale.evaluation.sample_files import write_media
    from rdm_scale.storage.location import Location

    if options.npz:
        pixels = np.concatenate(list(samples.pixels()))
        write_arrays(Location(options.npz), arr_0=pixels[:, 0] if pixels.shape[1] == 1 else pixels)
    if options.media:
        write_media(Location(options.media), samples.pixels(), options.media_fps)


if __name__ == "__main__":
    main()
