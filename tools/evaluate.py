"""Evaluate a trained model by the label accuracy of its samples.

A nearest-neighbor classifier fitted on real images (or clips) labels the generated ones; label accuracy is the share
that it assigns to the requested class. The measure suits small images and clips of distinct classes, such as digits.
With --features, the Frechet distance of the same samples stands beside it; tools/measure.py has all other measures.
"""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from rdm_scale.config.paths import any_option, local_option
from rdm_scale.errors import ConfigError, DataError, RdmError
from rdm_scale.progress import ProgressReporter

if TYPE_CHECKING:
    from torch import Tensor

    from rdm_scale.checkpoint.trained_model import TrainedModel
    from rdm_scale.encoding.inputs import MediaSet
    from rdm_scale.sampling.requests import SamplingRequest

READ_AT_ONCE = 64  # real images and clips, which threads decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=any_option, help="a checkpoint's folder, or a run's directory (its newest checkpoint)"
    )
    parser.add_argument(
        "real", type=any_option, help="real, labeled images or videos: a folder or tar, as for encode_latents.py"
    )
    parser.add_argument("--fps", type=float, help="frames a second of real clips, as encoded (default: their own)")
    parser.add_argument("--stride", type=int, default=1, help="frame stride of real clips, as encoded (default: 1)")
    parser.add_argument("--per-class", type=int, default=25, help="images drawn of each class (default: %(default)s)")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="for a model with text: the prompt of a class; repeat for each class, in order",
    )
    parser.add_argument(
        "--text-encoder", type=any_option, metavar="DIR", help="its folder, if moved since the data were encoded"
    )
    parser.add_argument(
        "--features", help="print the Frechet distance of these features, too: digits, efficientnet-lite0, i3d, ..."
    )
    parser.add_argument("--neighbours", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--weights",
        metavar="{ema,raw}",
        help="EMA weights, or those without averaging (default: EMA where there are any)",
    )
    parser.add_argument("--guidance", type=float, help="guidance scale (default: as in the run)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=125, help="default: %(default)s")
    parser.add_argument("--picture", type=local_option, help="write the first samples to this PNG (clips: and a GIF)")
    parser.add_argument("--rows", type=int, default=10, help="images of each class in --picture (default: %(default)s)")
    try:
        evaluate(parser.parse_args())
    except RdmError as error:
        sys.exit(f"evaluate: error: {error}")


def evaluate(options: argparse.Namespace) -> None:
    if min(options.per_class, options.neighbours, options.batch_size, options.rows, options.stride) < 1:
        raise ConfigError("--per-class, --neighbours, --batch-size, --rows and --stride must be at least 1")
    if options.fps is not None and not 0 < options.fps <= 1000:
        raise ConfigError("--fps must be above 0, and 1000 at most")
    if options.picture and options.picture.suffix != ".png":
        raise ConfigError(f"--picture {options.picture} must end with .png")
    import torch

    from rdm_scale.checkpoint import load_trained
    from rdm_scale.device import local_device
    from rdm_scale.encoding.inputs import find_media
    from rdm_scale.evaluation.generated_samples import pixel_size
    from rdm_scale.evaluation.labels import label_accuracy
    from rdm_scale.evaluation.networks import load_network
    from rdm_scale.evaluation.real_comparison import distance_with_floor
    from rdm_scale.evaluation.sample_sets import to_float, to_uint8
    from rdm_scale.sampling.image_grid import write_grid
    from rdm_scale.sampling.requests import draw_request, override_sampling
    from rdm_scale.storage.location import Location
    from rdm_scale.storage.own_files import refuse_to_replace

    if options.picture:
        refuse_to_replace(Location(options.picture))
    trained = load_trained(options.checkpoint, options.weights, local_device())
    if trained.config.model.condition == "none":
        raise ConfigError("label accuracy needs a model with model.condition=class or text")
    source = find_media(options.real)
    wanted = "video" if trained.config.model.input.frames > 1 else "image"
    if source.kind != wanted:
        raise DataError(f"the model draws {wanted}s, but {options.real} holds {source.kind}s: give real {wanted}s")
    if options.features:
        load_network(options.features, pixel_size(trained).frames)  # a mistake costs seconds, not the drawing
    config = override_sampling(trained.config, "with the options given", guidance=options.guidance)
    request = request_of(options, trained, source)
    classes = request.columns
    labels = torch.arange(classes).repeat(options.per_class)
    with ProgressReporter("drawing", request.samples) as progress:
        pixels = draw_request(
            trained, request, options.seed, config=config, batch_size=options.batch_size, progress=progress.advance_to
        )
    if options.picture:
        shown, fps = pixels[: options.rows * classes], options.fps or 8.0
        files = write_grid(shown, Location(options.picture), classes, request.names, fps=fps)
        print(f"samples: {' and '.join(map(str, files))}")
    real, real_labels = real_samples(options, *pixels.shape[2:])
    accuracy = label_accuracy(to_float(real), real_labels, pixels, labels, options.neighbours)
    print(f"label accuracy: {100 * accuracy:.1f} % of {len(labels)} samples of step {trained.step}")
    if options.features:
        found = distance_with_floor(real, to_uint8(pixels), options.features, local_device())
        floor = f"floor {found.fields['floor']:.5g}: {found.fields['floor_samples']} real samples from the others"
        print(f"{found.name}: {found.value:.5g} of {len(labels)} samples ({floor})")


def real_samples(options: argparse.Namespace, frames: int, height: int, width: int) -> "tuple[Tensor, Tensor]":
    """All images, or the first clip of each video, as uint8 [N, T, H, W, 3], and their labels [N]."""
    import torch

    from rdm_scale.evaluation.sample_sets import MediaOptions, MediaSamples

    samples = MediaSamples(options.real, MediaOptions((height, width), frames, options.stride, options.fps))
    parts = []
    with ProgressReporter(f"reading {options.real}", samples.count) as progress:
        for batch in samples.batches(READ_AT_ONCE):
            parts.append(batch.pixels)
            progress.update(len(batch.pixels))
    return torch.cat(parts), torch.tensor(samples.labels)


def request_of(options: argparse.Namespace, trained: "TrainedModel", source: "MediaSet") -> "SamplingRequest":
    """Request `--per-class` samples of each class, by label or by prompt, under the names of the classes."""
    from rdm_scale.sampling.requests import refuse_unused_options, request_labels, request_prompts

    refuse_unused_options(trained.config, prompt=options.prompt, text_encoder=options.text_encoder)
    if trained.config.model.condition == "class":
        return request_labels(trained, range(len(trained.class_names)), options.per_class)
    names = source.class_names
    if len(options.prompt) != len(names):
        raise ConfigError(
            f"the model takes captions: give --prompt {len(names)} times, for the classes {names} in this order"
        )
    request = request_prompts(trained, options.prompt, options.per_class, options.text_encoder)
    return dataclasses.replace(request, names=tuple(names))


if __name__ == "__main__":
    main()
