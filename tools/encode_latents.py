"""Encodes images into latent shards that rdm_scale.train reads.

INPUT is a folder of images (PNG, JPEG, WebP; the sub-folders are the classes), a webdataset tar (`key.png` with its
class in `key.cls`), or a folder or a quoted glob of tars. INPUT, OUTPUT and a codec's folder may be any fsspec URL.
Images are centre-cropped and resized; samples are shuffled over the whole input.
"""

import argparse
import io
import sys
from typing import TYPE_CHECKING

from tqdm import tqdm

from rdm_scale.errors import DataError, RdmError

if TYPE_CHECKING:
    from rdm_scale.data.codecs import ImageCodec
    from rdm_scale.data.images import ImageFile

HOLDOUT_SHARE = 0.1
PREVIEW_COLUMNS = 10
UNIT_STD = (0.5, 2.0)  # beyond these the noise levels of training do not fit the latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT", help="where the images are")
    parser.add_argument("output", metavar="OUTPUT", help="folder of the shards: new or empty")
    parser.add_argument("--codec", required=True, help="identity (pixels), digits, or the folder of an AutoencoderKL")
    parser.add_argument("--size", type=_positive, required=True, help="height and width in pixels to encode at")
    parser.add_argument(
        "--latents",
        choices=["mode", "moments"],
        default="mode",
        help="keep the posterior's mode, or its mean and variance, to be sampled in training (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float16")
    parser.add_argument("--holdout", metavar="DIR", help="folder of a second set of shards, for validation")
    parser.add_argument(
        "--holdout-share", type=_share, help=f"share of the samples held out (default: {HOLDOUT_SHARE})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order and of the holdout (default: %(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=64, help="default: %(default)s")
    parser.add_argument("--preview", metavar="FILE.png", help="picture of some originals above their reconstructions")
    options = parser.parse_args()
    if options.holdout_share is not None and options.holdout is None:
        parser.error("--holdout-share needs --holdout DIR")
    if options.preview and not options.preview.endswith(".png"):
        parser.error("--preview must end with .png")
    try:
        encode(options)
    except RdmError as error:
        sys.exit(f"encode_latents: error: {error}")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _share(text: str) -> float:
    if not 0 < (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return number


def encode(options: argparse.Namespace) -> None:
    import torch

    from rdm_scale.data.codecs import load_codec
    from rdm_scale.data.encode import Holdout, check_unused, encode_images, split
    from rdm_scale.data.images import find_images
    from rdm_scale.data.manifest import NAME
    from rdm_scale.data.storage import Location

    output = Location(options.output)
    holdout = Holdout(Location(options.holdout), options.holdout_share or HOLDOUT_SHARE) if options.holdout else None
    check_unused(output)  # said before the seconds that the codec takes to load
    source = find_images(options.input)
    classes = f"{len(source.class_names)} classes" if source.class_names else "no classes"
    print(f"{options.input}: {len(source.images)} images, {classes}", flush=True)
    if source.ignored:
        print(f"note: {source.ignored} files that are not PNG, JPEG or WebP were ignored")
    codec = load_codec(options.codec, "cuda" if torch.cuda.is_available() else "cpu")

    with tqdm(total=len(source.images), unit="sample", desc=f"encoding ({codec.device})") as bar:
        encoded = encode_images(
            source,
            codec,
            output,
            size=options.size,
            kind=options.latents,
            dtype=options.dtype,
            seed=options.seed,
            batch_size=options.batch_size,
            holdout=holdout,
            progress=bar.update,
        )
    print(f"{output / NAME}: {encoded.train.samples} samples, latents {list(encoded.train.shape)} [C, T, H, W]")
    if holdout and encoded.holdout:
        print(f"{holdout.folder / NAME}: {encoded.holdout.samples} samples held out")
    print(f"normalised latents: mean {encoded.mean:.3f}, standard deviation {encoded.std:.3f}")
    if not UNIT_STD[0] <= encoded.std <= UNIT_STD[1]:
        print(
            "warning: diffusion expects a standard deviation near 1: is this codec meant for such images, and is the "
            "scaling_factor in its config.json right?",
            file=sys.stderr,
        )
    if options.preview:
        shown = split(source.images, options.seed, holdout.share if holdout else 0.0)[0][:PREVIEW_COLUMNS]
        write_preview(options, codec, shown, [source.class_names[image.label] for image in shown if image.label >= 0])


def write_preview(
    options: argparse.Namespace, codec: "ImageCodec", images: "list[ImageFile]", names: list[str]
) -> None:
    import torch

    from rdm_scale.data.encode import reconstruct
    from rdm_scale.data.storage import Location
    from rdm_scale.evaluation.pictures import image_grid

    originals, reconstructions = reconstruct(images, codec, options.size)
    picture = io.BytesIO()
    image_grid(torch.cat([originals, reconstructions]), len(images), names).save(picture, "PNG")
    try:
        Location(options.preview).write(picture.getvalue())
    except OSError as error:
        raise DataError(f"the data is encoded, but the preview {options.preview} cannot be written: {error}") from None
    print(f"{options.preview}: originals above their reconstructions")


if __name__ == "__main__":
    main()
