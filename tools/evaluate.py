"""Judges a trained model by its own samples: how many look like the class that was asked for.

A nearest-neighbour classifier fitted on real images (or clips) labels the generated ones; the share it labels as asked
is the label accuracy. It suits small images and clips of clear classes, such as digits.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from rdm_scale.errors import ConfigError, DataError, RdmError
from rdm_scale.progress import ProgressReporter, track

if TYPE_CHECKING:
    from torch import Tensor

    from rdm_scale.encoding.inputs import MediaSet

READERS = 8  # threads that decode real images and clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's directory (its newest checkpoint)")
    parser.add_argument("real", help="real, labelled images or videos: a folder or tar, as for encode_latents.py")
    parser.add_argument("--fps", type=float, help="frames a second of real clips, as encoded (default: their own)")
    parser.add_argument("--stride", type=int, default=1, help="of the frames of real clips, as encoded (default: 1)")
    parser.add_argument("--per-class", type=int, default=25, help="images drawn of each class (default: %(default)s)")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="of a model with text: what to ask for, once a class, in order",
    )
    parser.add_argument("--text-encoder", metavar="DIR", help="its folder, if it was moved since the data were encoded")
    parser.add_argument("--neighbours", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--weights", choices=["ema", "weights"], default="ema", help="averaged or last weights")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=125, help="default: %(default)s")
    parser.add_argument("--picture", type=Path, help="show the first ones judged in this PNG (clips: and a GIF)")
    parser.add_argument(
        "--rows", type=int, default=10, help="images of each class in the picture (default: %(default)s)"
    )
    try:
        judge(parser.parse_args())
    except RdmError as error:
        sys.exit(f"evaluate: error: {error}")


def judge(options: argparse.Namespace) -> None:
    if min(options.per_class, options.neighbours, options.batch_size, options.rows, options.stride) < 1:
        raise ConfigError("--per-class, --neighbours, --batch-size, --rows and --stride must be at least 1")
    if options.fps is not None and not 0 < options.fps <= 1000:
        raise ConfigError("--fps must be above 0, and 1000 at most")
    if options.picture and options.picture.suffix != ".png":
        raise ConfigError(f"the picture {options.picture} must end with .png")
    import torch
    from torch import Tensor

    from rdm_scale.checkpoint import load_trained
    from rdm_scale.codecs import codec_of
    from rdm_scale.conditions import TextCondition, select_conditions
    from rdm_scale.data.captions import empty_caption
    from rdm_scale.device import local_device
    from rdm_scale.encoding.inputs import find_media
    from rdm_scale.encoding.text import encode_prompts
    from rdm_scale.evaluation.labels import label_accuracy
    from rdm_scale.sampling.generate import draw_pixels
    from rdm_scale.sampling.image_grid import write_grid
    from rdm_scale.storage.location import Location

    device = local_device()
    trained = load_trained(options.checkpoint, options.weights, device)
    kind = trained.config.model.condition
    if kind == "none":
        raise ConfigError("label accuracy needs a model with model.condition=class or text")
    source = find_media(options.real)
    wanted = "video" if trained.config.model.input.frames > 1 else "image"
    if source.kind != wanted:
        raise DataError(f"the model draws {wanted}s, but {options.real} holds {source.kind}s: give its kind")
    names = source.class_names if kind == "text" else trained.class_names
    classes = len(names)
    labels = torch.arange(classes).repeat(options.per_class)
    condition: Tensor | TextCondition = labels
    empty = None
    if kind == "text":
        if trained.text is None or len(options.prompt) != classes:
            raise ConfigError(
                f"the model takes captions: give --prompt {classes} times, for the classes {names} in turn"
            )
        prompts = encode_prompts(trained.text, options.prompt, options.text_encoder)
        condition, empty = select_conditions(prompts, labels), empty_caption(trained.text)
    with ProgressReporter("drawing", len(labels)) as progress:
        pixels = draw_pixels(
            trained.model,
            trained.config,
            codec_of(trained.codec, device),
            condition.to(device),
            options.seed,
            batch_size=options.batch_size,
            empty_caption=empty,
            progress=progress.advance_to,
        )
    if options.picture:
        shown, fps = pixels[: options.rows * classes], options.fps or 8.0
        files = write_grid(shown, Location(options.picture), classes, names, fps=fps)
        print(f"samples: {' and '.join(map(str, files))}")
    frames, height, width = pixels.shape[2:]
    real = real_pixels(source, frames, height, width, options)
    real_labels = torch.tensor([file.label for file in source.files])
    accuracy = label_accuracy(real, real_labels, pixels, labels, options.neighbours)
    print(f"label accuracy: {100 * accuracy:.1f} % of {len(labels)} samples of step {trained.step}")


def real_pixels(source: "MediaSet", frames: int, height: int, width: int, options: argparse.Namespace) -> "Tensor":
    """All images, or the first clip of all videos, [N, 3, T, H, W] in [-1, 1]."""
    import torch

    from rdm_scale.encoding.images import decode
    from rdm_scale.encoding.inputs import MediaFile
    from rdm_scale.encoding.videos import decode_clip

    def load(file: MediaFile) -> "Tensor":
        if frames == 1:
            return decode(file.read(), height, width, file.name).unsqueeze(1)
        with file.open() as content:
            return decode_clip(
                content,
                file.name,
                fps=options.fps,
                start=0,
                frames=frames,
                height=height,
                width=width,
                stride=options.stride,
            )

    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(load, source.files)
        return torch.stack(list(track(found, f"reading {options.real}", source.kind, len(source.files))))


if __name__ == "__main__":
    main()
