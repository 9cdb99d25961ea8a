r"""Train a small diffusers AutoencoderKL (4 channels, a quarter of the size) on images, as a codec for encode_latents.

INPUT is what encode_latents takes: a folder of images, webdataset tars, or a list of paths. The loss is the
mean squared error plus a weighted Kullback-Leibler divergence to N(0, 1) (Kingma & Welling 2013), each averaged over
its elements. The images that `encode_latents --holdout` sets aside with the same seed and share are not trained on,
and are measured at the end. Images that cannot be decoded are left out, as encoding leaves them out. On a CPU, the same
versions, threads and seed give the same weights. The packaged VAE:

    python tools/make_digits.py digits.tar
    OMP_NUM_THREADS=1 python tools/train_vae.py digits.tar rdm_scale/codecs/digits_vae \
        --preview docs/images/vae_reconstructions.png
"""

import argparse
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdm_scale.config.paths import any_option
from rdm_scale.errors import DataError, RdmError
from rdm_scale.progress import ProgressReporter

if TYPE_CHECKING:
    from torch import Tensor

    from rdm_scale.encoding.inputs import MediaFile
    from rdm_scale.encoding.pixels import ImageSelection

LATENT_CHANNELS = 4
FACTOR = 4  # pixels along each side of a latent
PREVIEW_COLUMNS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=any_option, metavar="INPUT", help="where the images are")
    parser.add_argument(
        "output", type=any_option, metavar="OUTPUT_FOLDER", help="new folder for config.json and the weights (float16)"
    )
    parser.add_argument("--size", type=int, default=32, help="pixels a side, a multiple of 4 (default: %(default)s)")
    parser.add_argument("--width", type=int, default=8, help="channels, a multiple of 4 (default: %(default)s)")
    parser.add_argument("--kl-weight", type=float, default=1e-5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak of the one-cycle schedule (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--holdout-share", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument(
        "--max-rejected",
        type=float,
        default=0.01,
        help="share of the images that may prove undecodable; they are listed in rejected.jsonl (default: %(default)s)",
    )
    parser.add_argument(
        "--preview", type=any_option, metavar="FILE.png", help="picture of held-out originals above reconstructions"
    )
    options = parser.parse_args()
    if min(options.size, options.width, options.steps, options.batch_size) < 1:
        parser.error("--size, --width, --steps and --batch-size must be at least 1")
    if options.size % FACTOR or options.width % 4:
        parser.error("--size and --width must be multiples of 4")
    if not 0 < options.holdout_share < 1:
        parser.error("--holdout-share must lie between 0 and 1")
    if not 0 <= options.max_rejected < 1:
        parser.error("--max-rejected must lie between 0 and 1")
    try:
        run(options)
    except RdmError as error:
        sys.exit(f"train_vae: error: {error}")


def run(options: argparse.Namespace) -> None:
    from rdm_scale.encoding.inputs import find_images
    from rdm_scale.encoding.planning import split_files

    folder = Path(options.output)
    if folder.exists():
        raise DataError(f"{folder} exists already: choose another folder or remove it")
    source = find_images(options.input)
    selection = select(source.files, options)
    images, held_out = split_files(selection.usable, options.seed, options.holdout_share)
    if not images or not held_out:
        raise DataError(f"{len(selection.usable)} images are too few to train on some and measure the others")
    vae = build_vae(options.size, options.width, options.seed)
    train(vae, images, options)
    vae.half().float()  # the weights are saved as float16: what is measured is what will be loaded
    vae.register_to_config(**measure_normalization(vae, images, options))
    save(vae, folder, selection)
    report(folder, held_out, source.class_names, options)


def select(files: "Sequence[MediaFile]", options: argparse.Namespace) -> "ImageSelection":
    """Look at all images before training. Raises DataError: too many of them cannot be decoded."""
    from rdm_scale.encoding.pixels import select_decodable

    with ProgressReporter("looking", len(files)) as progress:
        selection = select_decodable(files, progress.update)
    for remark in selection.remarks:
        print(f"note: {remark}")
    if rejected := selection.rejected:
        first = rejected[0][1].reason
        if len(rejected) > options.max_rejected * len(files):
            raise DataError(
                f"{len(rejected)} of {len(files)} images cannot be decoded, more than a share of "
                f"{options.max_rejected}. The first: {first}. Repair or remove them, or raise --max-rejected"
            )
        print(f"note: {len(rejected)} images cannot be decoded and are left out. The first: {first}")
    return selection


def build_vae(size: int, width: int, seed: int) -> Any:
    """Build a light AutoencoderKL for size x size images, initialized by the seed."""
    import torch
    from diffusers import AutoencoderKL

    from rdm_scale import rng

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(seed, "vae init"))
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(width, 2 * width, 2 * width),
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            sample_size=size,
            mid_block_add_attention=False,
        )


def train(vae: Any, images: "Sequence[MediaFile]", options: argparse.Namespace) -> None:
    import torch
    import torch.nn.functional as F

    from rdm_scale import rng

    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps, pct_start=0.1)
    progress = ProgressReporter("training", options.steps, "step")
    for step, pixels in enumerate(batches(images, options)):
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng.generator(options.seed, "vae noise", step))
        restored = vae.decode(posterior.mean + posterior.std * noise).sample
        mse = F.mse_loss(restored, pixels)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        optimizer.zero_grad()
        (mse + options.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.update(mse=f"{mse.item():.5f}", kl=f"{kl.item():.3f}")
    progress.close()


def batches(images: "Sequence[MediaFile]", options: argparse.Namespace) -> "Iterator[Tensor]":
    """Yield one batch [B, 3, size, size] per step; each epoch is shuffled anew, and a batch may span two epochs."""
    import torch

    from rdm_scale import rng
    from rdm_scale.encoding.images import decode

    epoch = 0
    queue: list[int] = []
    for _ in range(options.steps):
        while len(queue) < options.batch_size:
            queue += torch.randperm(len(images), generator=rng.generator(options.seed, "vae order", epoch)).tolist()
            epoch += 1
        taken, queue = queue[: options.batch_size], queue[options.batch_size :]
        yield torch.stack([decode(images[i].read(), options.size, options.size, images[i].name) for i in taken])


def measure_normalization(
    vae: Any, images: "Sequence[MediaFile]", options: argparse.Namespace
) -> dict[str, float | list[float]]:
    """Entries of config.json that normalize every channel of the posterior means to mean 0 and variance 1."""
    import torch

    from rdm_scale.encoding.moments import MomentAccumulator
    from rdm_scale.encoding.pixels import load_image_batches

    moments = MomentAccumulator(LATENT_CHANNELS)
    with torch.no_grad():
        for _, pixels in load_image_batches(images, options.size, options.batch_size):
            moments.add(vae.encode(pixels).latent_dist.mean)
    return {"scaling_factor": 1.0, "latents_mean": moments.mean.tolist(), "latents_std": moments.std.tolist()}


def save(vae: Any, folder: Path, selection: "ImageSelection") -> None:
    """Write the folder completely or not at all, with the list of images that were left out."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        vae.half().save_pretrained(partial, safe_serialization=True)
        if lines := [{"input": file.name, "reason": found.reason} for file, found in selection.rejected]:
            content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (partial / "rejected.jsonl").write_text(content, encoding="utf-8")
        partial.chmod(0o755)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def report(
    folder: Path, held_out: "Sequence[MediaFile]", class_names: Sequence[str], options: argparse.Namespace
) -> None:
    """Print the mean squared error of held-out images through the codec as it is loaded, and draw some of them."""
    import torch

    from rdm_scale.codecs import load_codec
    from rdm_scale.encoding.pixels import load_image_batches, reconstruct
    from rdm_scale.sampling.image_grid import image_grid

    codec = load_codec(str(folder))
    total = 0.0
    for _, originals in load_image_batches(held_out, options.size, options.batch_size):
        restored = reconstruct(originals.unsqueeze(2), codec).squeeze(2)
        total += float((originals - restored).square().mean(dim=(1, 2, 3)).sum())
    print(f"{folder}: mean squared error {total / len(held_out):.5f} on {len(held_out)} held-out images in [-1, 1]")
    if options.preview:
        by_label = {image.label: image for image in reversed(held_out)} if class_names else {}
        shown = ([by_label[label] for label in sorted(by_label)] or list(held_out))[:PREVIEW_COLUMNS]
        names = [class_names[image.label] for image in shown if class_names]
        picture, path = io.BytesIO(), Path(options.preview)
        _, originals = next(load_image_batches(shown, options.size, len(shown)))
        pair = torch.cat([originals, reconstruct(originals.unsqueeze(2), codec).squeeze(2)])
        image_grid(pair, len(shown), names).save(picture, "PNG")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.getvalue())
        print(f"{path}: originals above their reconstructions")


if __name__ == "__main__":
    main()
